"""What this machine allows: how fast it reads memory and multiplies, and the least time that a phase takes at that."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from glassgpt.config import ModelConfig
from glassgpt.generation import native
from glassgpt.interpret.cost import block_entries, keys_seen
from glassgpt.lab.bench.generate.phases import Phase

RATE_OF = {32: "float32", 16: "bfloat16", 8: "int8", 4: "int8"}
"""Bits of a weight -> the fastest arithmetic that its precision allows."""
BYTES_OF = {32: 4.0, 16: 2.0, 8: 1.0, 4: 4.5 / 8}
"""Bits of a weight -> bytes that it takes; 4 bits share a scale of 16 among 32."""
CACHED_BYTES = 16_000_000
LEAST_BYTES = 1_000_000
MEASURE_SECONDS = 0.25
TURNS = 5
"""Of the calibration at the start; the best counts."""
SIZE = 1024
"""Of the square matrices that are multiplied."""


@dataclass(frozen=True)
class Bandwidth:
    """How fast memory is read."""

    bytes: int
    threads: int
    bytes_per_second: float


@dataclass(frozen=True)
class Floor:
    """Measured limits."""

    bandwidths: list[Bandwidth]
    """By size and threads."""
    rates: dict[str, float]
    """Operations a second of a matrix product with all threads, by precision; a multiply-add is two."""
    measured_by: str
    """`native`, or `torch` where there are no kernels of our own."""

    def bandwidth(self, size: int, threads: int) -> float:
        """Bytes a second at the measured size that is nearest."""
        return min((b for b in self.bandwidths if b.threads == threads), key=lambda b: abs(b.bytes - size)).bytes_per_second

    def seconds(self, shape: ModelConfig, phase: Phase, bits: int, threads: int) -> float:
        """The least time of a phase: of each step whichever takes longer, reading every weight once or computing."""
        size = weight_bytes(shape, bits)
        reading = size / self.bandwidth(size, threads)
        computing = step_operations(shape, phase) / self.rates[RATE_OF[bits]]
        return phase.timed_steps * max(reading, computing)


def weight_bytes(shape: ModelConfig, bits: int) -> int:
    """What a step reads of the weights: every matrix once, the head's among them."""
    return round((shape.n_layer * block_entries(shape) + shape.vocab_size * shape.width) * BYTES_OF[bits])


def step_operations(shape: ModelConfig, phase: Phase) -> int:
    """Of one step: 2 a matrix entry and token, 4 * H * W for each key in reach; the head for the last token of each row only."""
    blocks = 2 * shape.n_layer * block_entries(shape)
    head = 2 * shape.vocab_size * shape.width
    if phase.kind == "decode":
        reach = range(phase.prompt_tokens + 1, phase.prompt_tokens + phase.new_tokens)
        mean_keys = sum(_keys(shape, context) for context in reach) / len(reach)
        return round(phase.rows * (blocks + head + 4 * shape.n_head * shape.head_width * mean_keys))
    keys = sum(_keys(shape, context) for context in range(1, phase.prompt_tokens + 1))
    return phase.rows * (blocks * phase.prompt_tokens + head + 4 * shape.n_head * shape.head_width * keys)


def _keys(shape: ModelConfig, context_tokens: int) -> int:
    """That the last token sees, in all layers."""
    return sum(keys_seen(shape, layer, context_tokens) for layer in range(shape.n_layer))


# ---------------------------------------------------------------------- measuring


def typical(found: list[Floor]) -> Floor:
    """The medians of several measurements: what the machine allowed while the systems took their turns."""
    bandwidths = [
        Bandwidth(one.bytes, one.threads, statistics.median(floor.bandwidths[i].bytes_per_second for floor in found))
        for i, one in enumerate(found[0].bandwidths)
    ]
    rates = {kind: statistics.median(floor.rates[kind] for floor in found) for kind in found[0].rates}
    return Floor(bandwidths, rates, found[0].measured_by)


def measure(shape: ModelConfig, bits: set[int], threads: int, turns: int = 1) -> Floor:
    """Memory at 16 MB and at the size of the weights in every precision of `bits`, with one thread and with all; matrix rates.

    The best of so many turns counts: a limit is what can be reached.
    """
    sizes = sorted({CACHED_BYTES, *(max(LEAST_BYTES, weight_bytes(shape, b)) for b in bits)})
    counts = sorted({1, threads})
    kinds = sorted({RATE_OF[b] for b in bits})
    read: Callable[[int, int], float] = native.measure_bandwidth
    multiply: Callable[[str, int], float] = native.measure_rate
    try:
        read(LEAST_BYTES, 1)
    except native.Unavailable:
        read, multiply = _read_by_torch, _multiply_by_torch
    bandwidths = [Bandwidth(size, count, max(read(size, count) for _ in range(turns))) for size in sizes for count in counts]
    rates = {kind: max(multiply(kind, threads) for _ in range(turns)) for kind in kinds}
    return Floor(bandwidths, rates, "torch" if read is _read_by_torch else "native")


def _read_by_torch(size: int, threads: int) -> float:
    numbers = torch.ones(size // 4)
    with torch_threads(threads):
        return size / _least_seconds(numbers.sum)


def _multiply_by_torch(kind: str, threads: int) -> float:
    dtype = getattr(torch, kind)
    a, b = (torch.ones(SIZE, SIZE, dtype=dtype) for _ in range(2))
    multiply = torch._int_mm if kind == "int8" else torch.mm
    with torch_threads(threads):
        return 2 * SIZE**3 / _least_seconds(lambda: multiply(a, b))


def calibrate(threads: int) -> float:
    """Seconds of a fixed piece of work, reading 64 MB and a matrix product: what differs is the machine's other load."""
    numbers, matrix = _calibration()
    with torch_threads(threads):
        start = time.perf_counter()
        numbers.sum()
        matrix @ matrix
        return time.perf_counter() - start


@functools.cache
def _calibration() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(16_000_000), torch.ones(768, 768)


def _least_seconds(work: Callable[[], object]) -> float:
    """The best of as many turns as fit, five at least: a limit is what can be reached."""
    best, end, turns = float("inf"), time.perf_counter() + MEASURE_SECONDS, 0
    while turns < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
        turns += 1
    return best


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """PyTorch with so many threads, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
