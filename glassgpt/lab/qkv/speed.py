"""Speed and memory of the variants: timings that take turns in one process, peaks in processes of their own."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context

import numpy as np
import torch

from glassgpt.config import OptimConfig, UserError, preset
from glassgpt.config.qkv import Qkv
from glassgpt.data.progress import Progress
from glassgpt.generation import KVCache
from glassgpt.lab.qkv.separate import SeparateQKV, parameters, separate, untie
from glassgpt.model import GPT, use_attention
from glassgpt.model.attention import Attention
from glassgpt.train import machine, optim
from glassgpt.train.loss import Scored

BASE = "fused, tied"
VARIANTS: dict[str, Callable[[GPT], GPT]] = {BASE: lambda model: model, "separate, tied": separate, "fused, untied": untie}
"""What each variant does to the plain model."""
DECODED = 8
"""Tokens that are decoded in one timing."""
PROJECTIONS = 20
"""Products in one timing of the projection alone."""
RESAMPLES = 2000
Run = Callable[[], None]


@dataclass(frozen=True)
class Timing:
    """Seconds of one thing done by one variant, a number a turn."""

    what: str
    variant: str
    seconds: list[float]
    ratio: tuple[float, float, float]
    """Median of the ratios to the first variant within the turns, and its 95 % interval (bootstrap)."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance of the quartiles as a share of the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median


def base_model(config: Qkv, device: torch.device) -> GPT:
    """The plain model of the speed tests, with seeded random numbers."""
    shape = replace(preset(config.preset), dropout=0.0)
    need = max(config.context_tokens, config.cached_tokens + DECODED)
    if need > shape.context_tokens:
        raise UserError(f"{config.preset} has a context of {shape.context_tokens} tokens; {need} are asked for")
    torch.manual_seed(config.seed)
    model = GPT(shape).to(device)
    use_attention(model, machine.attend_by(device))
    return model


def take_turns(what: str, runs: Mapping[str, Run], config: Qkv, device: torch.device, progress: Progress) -> list[Timing]:
    """Time each run once a turn; who begins changes from turn to turn. One turn before them warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(config.rounds + 1):
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            _wait(device)
            began = time.perf_counter()
            runs[name]()
            _wait(device)
            if turn:
                seconds[name].append(time.perf_counter() - began)
        progress(turn + 1, config.rounds + 1)
    first = seconds[names[0]]
    return [Timing(what, name, each, ratio(each, first, config.seed)) for name, each in seconds.items()]


def ratio(seconds: Sequence[float], base: Sequence[float], seed: int) -> tuple[float, float, float]:
    """Median of the ratios turn by turn, with a 95 % interval by resampling the turns."""
    ratios = np.array(seconds) / np.array(base)
    drawn = np.random.default_rng(seed).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[drawn], axis=1), (0.025, 0.975))
    return float(np.median(ratios)), float(low), float(high)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------- what is timed


def forward_run(model: GPT, config: Qkv) -> Run:
    """One forward pass with logits."""
    ids = _tokens(model, config.batch_size, config.context_tokens, config.seed)

    def run() -> None:
        with torch.inference_mode():
            model(ids)

    return run


def decode_run(model: GPT, config: Qkv) -> Run:
    """DECODED tokens, one after the other, upon a cache of `cached_tokens`."""
    ids = _tokens(model, 1, config.cached_tokens + DECODED, config.seed)
    with torch.inference_mode():
        cache = KVCache(model.config)
        model.hidden(ids[:, : config.cached_tokens], cache)

    def run() -> None:
        with torch.inference_mode():
            cache.length = config.cached_tokens  # what lies after that is written again
            for place in range(config.cached_tokens, config.cached_tokens + DECODED):
                model.logits(model.hidden(ids[:, place : place + 1], cache))

    return run


def train_run(model: GPT, config: Qkv) -> Run:
    """One training step: loss, gradients, AdamW."""
    ids = _tokens(model, config.batch_size, config.context_tokens + 1, config.seed)
    scored, optimizers = Scored(model), optim.build(model, OptimConfig())

    def run() -> None:
        (scored(ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()).backward()
        optim.clip(model, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def projection_runs(model: GPT, rows: int) -> dict[str, Run]:
    """The projection of the first layer alone, for `rows` tokens: one product, three that are joined, three that are not."""
    fused = next(layer.qkv for layer in model.modules() if isinstance(layer, Attention))
    three = next(layer for layer in separate(copy.deepcopy(model)).modules() if isinstance(layer, SeparateQKV))
    x = torch.ones(rows, model.config.width, device=fused.weight.device)

    def repeated(f: Callable[[], object]) -> Run:
        def run() -> None:
            with torch.inference_mode():
                for _ in range(PROJECTIONS):
                    f()

        return run

    return {
        "fused": repeated(lambda: fused(x)),
        "three, joined": repeated(lambda: three(x)),
        "three, not joined": repeated(lambda: (three.q(x), three.k(x), three.v(x))),
    }


def _tokens(model: GPT, batch: int, length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator).to(model.head.weight.device)


# ---------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Memory:
    """Of one variant."""

    parameters: int
    forward_bytes: int
    """Most that the process held for the model and a forward pass, above what it held before."""
    training_bytes: int
    """The same after two training steps."""


def memory(config: Qkv, variant: str) -> Memory:
    """Measured in a fresh process. Raises UserError when that process ends, most likely for want of memory."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(_measure, config, variant).result()
    except BrokenProcessPool as error:
        raise UserError(f"the process of {variant} ended, most likely for want of memory; take a smaller batch") from error


def _measure(config: Qkv, variant: str) -> Memory:
    device = torch.device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    machine.keep_freed_memory()
    torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)  # libraries load what they need
    before = machine.memory_bytes(device)
    model = VARIANTS[variant](base_model(config, device))
    forward_run(model, config)()
    forward = machine.memory_bytes(device)
    step = train_run(model, config)
    step()
    step()
    return Memory(parameters(model), forward - before, machine.memory_bytes(device) - before)
