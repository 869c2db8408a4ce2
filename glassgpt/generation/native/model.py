"""A GPT packed for this machine's processor, and the runner that `generation.stream` drives."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

from glassgpt.config import UserError
from glassgpt.config.generate import Sampling
from glassgpt.generation.generator import Generator
from glassgpt.generation.native import packing
from glassgpt.generation.native.library import checked, library
from glassgpt.generation.native.model_file import FileSource, ModelFile
from glassgpt.generation.native.threads import default_threads, pytorch

if TYPE_CHECKING:
    from torch import Tensor

    from glassgpt.model import GPT

KNOWN: dict[str, tuple[object, ...]] = {
    "precision": ("as-is", "float32", "bfloat16", "int8", "int4"),
    "activations": (8, 16),
    "cache": ("auto", "float32", "bfloat16", "int8"),
}
PANEL = 32
"""Outputs of a matrix that lie together; rows of logits are padded to a multiple of it."""


class NativeModel:
    """A GPT as the kernel library has it. Several texts may be written with it, one forward pass at a time."""

    def __init__(
        self,
        model: GPT | ModelFile,
        *,
        precision: Literal["as-is", "float32", "bfloat16", "int8", "int4"] = "as-is",
        activations: Literal[8, 16] = 16,
        cache: Literal["auto", "float32", "bfloat16", "int8"] = "auto",
        threads: int | None = None,
        kernels: str | None = None,
        release: bool = False,
    ) -> None:
        """Pack `model`, which is not needed afterwards; with `release` its memory is taken on the way, and it is of no more use.

        `precision` is that of the matrices; a quantised model keeps its own. `activations` are the bits of what quantised
        matrices read. `cache` is the numbers of the keys and values: `auto` is float32 for float32 weights, else bfloat16.
        `kernels` names an instruction set of `library.kernels()` (default: the best). Raises Unavailable, and Unfit for numbers
        of a `ModelFile`.
        """
        for name, value in (("precision", precision), ("activations", activations), ("cache", cache)):
            if value not in KNOWN[name]:
                raise UserError(f"{name} must be one of {', '.join(map(str, KNOWN[name]))}; got {value!r}")
        source = FileSource(model, precision) if isinstance(model, ModelFile) else _network(model, precision)
        self.config, self.precision = source.config, source.precision
        self.cache = ("float32" if self.precision == "float32" else "bfloat16") if cache == "auto" else cache
        self.activations, self.threads = activations, threads or default_threads()
        shape = packing.shape_of(self.config, self.cache, activations)
        self.lib = library()
        self.engine: Any = self.lib.glass_new(ctypes.byref(shape), self.threads, kernels.encode() if kernels else None)
        if not self.engine:
            raise UserError(self.lib.glass_error().decode())
        self.finalizer = weakref.finalize(self, self.lib.glass_free, self.engine)
        self.finalizer.atexit = False  # runners may still have their rows then
        packing.pack(self.lib, self.engine, source, release)

    @property
    def kernels(self) -> str:
        """The instruction set that is used."""
        return str(self.lib.glass_engine_kernels(self.engine).decode())

    @property
    def nbytes(self) -> int:
        """Bytes of the packed matrices."""
        return int(self.lib.glass_bytes(self.engine))

    def start(self, n_ids: int | None = None) -> NativeRunner:
        """A runner without rows; the best id is chosen among the first `n_ids`."""
        return NativeRunner(self, n_ids)


def _network(model: GPT, precision: str) -> packing.Source:
    from glassgpt.generation.native.network import Network

    return Network(model, precision)


class NativeRunner:
    """Rows of tokens and their keys and values. Rows of different length stand side by side without padding."""

    def __init__(self, model: NativeModel, n_ids: int | None) -> None:
        self.config = model.config
        self._model, self._lib, self._engine = model, model.lib, model.engine
        self._n_ids = n_ids or model.config.vocab_size
        self._stride = -(-model.config.vocab_size // PANEL) * PANEL
        self._rows: list[int] = []  # the engine's numbers of them
        self._lengths: list[int] = []
        self._room = _Room(0, self._stride)
        self._last: _Pass | None = None

    @property
    def lengths(self) -> list[int]:
        return list(self._lengths)

    def feed(self, tokens: Sequence[Sequence[int]], every: bool = False) -> NativeScores:
        """Append tokens[i] to row i; a row may also get none (then it has no scores). The next call overwrites the logits."""
        if not self._rows:
            self._rows = [self._lib.glass_sequence_new(self._engine) for _ in tokens]
            self._lengths = [0] * len(tokens)
        longest = max(length + len(ids) for length, ids in zip(self._lengths, tokens, strict=True))
        if longest > self.config.context_tokens:
            raise UserError(f"context is {self.config.context_tokens} tokens; got {longest} (shorten the input)")
        counts = [len(ids) for ids in tokens]
        if self._last is None or self._last.counts != (counts, every):
            ends = zip(accumulate(counts), counts, strict=True)
            wanted = list(range(sum(counts))) if every else [end - 1 for end, count in ends if count]
            if self._room.rows < len(wanted):
                self._room = _Room(len(wanted), self._stride)
            self._last = _Pass(self._rows, counts, every, wanted, self._room, self._n_ids)
        self._last.tokens[:] = [token for ids in tokens for token in ids]
        result = self._lib.glass_forward(self._engine, *self._last.arguments)
        if result < 0 and b"bad_alloc" in self._lib.glass_error():
            raise UserError("not enough memory for the keys and values; write fewer or shorter texts, or use --cache int8")
        checked(self._lib, result)
        self._lengths = [length + count for length, count in zip(self._lengths, counts, strict=True)]
        last = self._last
        return NativeScores(self._model, self._room, self._n_ids, range(len(last.best)), last.best[:], last.log_total[:])

    def fork(self, rows: Sequence[int]) -> None:
        """Row i becomes a copy of row rows[i]; copies share the cache of what they have in common."""
        copies = [checked(self._lib, self._lib.glass_sequence_fork(self._engine, self._rows[row])) for row in rows]
        lengths = [self._lengths[row] for row in rows]
        self.close()
        self._rows, self._lengths = copies, lengths

    def keep(self, rows: Sequence[int]) -> None:
        for number in set(range(len(self._rows))) - set(rows):
            checked(self._lib, self._lib.glass_sequence_free(self._engine, self._rows[number]))
        self._rows, self._lengths, self._last = [self._rows[row] for row in rows], [self._lengths[row] for row in rows], None

    def rewind(self, lengths: Sequence[int]) -> None:
        for row, length in zip(self._rows, lengths, strict=True):
            checked(self._lib, self._lib.glass_sequence_rewind(self._engine, row, length))
        self._lengths = list(lengths)

    def close(self) -> None:
        for row in self._rows if self._model.finalizer.alive else ():  # in a cycle the model may have gone first
            self._lib.glass_sequence_free(self._engine, row)
        self._rows, self._lengths, self._last = [], [], None

    def __del__(self) -> None:
        self.close()


class _Room:
    """Memory for logits (rows, stride): fresh memory for each token would cost a twentieth of its time."""

    def __init__(self, rows: int, stride: int) -> None:
        self.rows, self.stride = rows, stride
        self.memory = mmap.mmap(-1, max(1, 4 * rows * stride))  # begins where a page does
        self.numbers = (ctypes.c_float * (rows * stride)).from_buffer(self.memory)
        self.address = ctypes.addressof(self.numbers)


class _Pass:
    """The arguments of a forward pass, and the memory of its results.

    The next pass of the same shape takes them again: while one token follows another, what Python does between two of them is a
    good part of their time, as the weights have pushed it out of every cache.
    """

    def __init__(self, texts: Sequence[int], counts: list[int], every: bool, wanted: list[int], room: _Room, n_ids: int) -> None:
        """`texts` are the engine's numbers of the rows, which get `counts` tokens each. Scores are `wanted` after these n of all
        tokens; `room` (n or more rows) is for their logits."""
        self.counts = (counts, every)
        count = sum(counts)
        self.tokens = (ctypes.c_int32 * count)()
        self.best, self.log_total = (ctypes.c_int32 * len(wanted))(), (ctypes.c_float * len(wanted))()
        of_tokens = [text for text, n in zip(texts, counts, strict=True) for _ in range(n)]
        self.arguments = (
            *(count, self.tokens, packing.as_ints(of_tokens), len(wanted), packing.as_ints(wanted), n_ids),
            *(room.address, room.stride, self.best, self.log_total),
        )


class NativeScores:
    """`Scores` in the engine's memory, until the next pass."""

    def __init__(
        self, model: NativeModel, room: _Room, n_ids: int, places: Sequence[int], best: list[int], log_total: list[float]
    ) -> None:
        """`places` are the room's rows."""
        self._model, self._room, self._n_ids, self._places = model, room, n_ids, places
        self.best, self.log_total = best, log_total

    @property
    def logits(self) -> Tensor:
        torch = pytorch()
        room = torch.frombuffer(self._room.memory, dtype=torch.float32, count=self._room.rows * self._room.stride)
        logits: Tensor = room.view(self._room.rows, self._room.stride)[:, : self._n_ids]
        places = self._places
        return logits[places.start : places.stop] if isinstance(places, range) else logits[list(places)]

    def logits_of(self, ids: Sequence[int]) -> list[float]:
        numbers, stride = self._room.numbers, self._room.stride
        return [numbers[place * stride + token_id] for place, token_id in zip(self._places, ids, strict=True)]

    def draw(self, sampling: Sampling, generators: Sequence[Generator]) -> list[int]:
        if sampling.temperature == 0:
            return self.best
        rules = sampling.temperature, min(sampling.top_k, self._n_ids), sampling.top_p, sampling.min_p
        lib, engine, room = self._model.lib, self._model.engine, self._room

        def drawn(place: int, best: int, point: float) -> int:
            return checked(lib, lib.glass_draw(engine, room.address + 4 * place * room.stride, self._n_ids, best, *rules, point))

        return [
            drawn(place, best, generator.uniform())
            for place, best, generator in zip(self._places, self.best, generators, strict=True)
        ]

    def of(self, places: Sequence[int]) -> NativeScores:
        best, log_total = [self.best[i] for i in places], [self.log_total[i] for i in places]
        return NativeScores(self._model, self._room, self._n_ids, [self._places[i] for i in places], best, log_total)
