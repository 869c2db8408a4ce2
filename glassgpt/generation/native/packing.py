"""Weights, wherever they come from, -> the engine's panels. The network knows nothing of it."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from glassgpt.config import ModelConfig
from glassgpt.generation.native.build import Unavailable
from glassgpt.generation.native.library import ACTIVATIONS, FORMATS, MATRICES, NUMBERS, VECTORS, Shape, checked

ROWS = 4096
"""Rows of a matrix that are packed at a time: what is made on the way stays small. A multiple of the 32 of a panel."""


class Floats(NamedTuple):
    """Numbers in memory, float32, one after the other."""

    address: int
    size: int
    owner: object
    """They stay there as long as this does."""


class PlainRows(NamedTuple):
    """Some rows of a matrix of floats in memory."""

    address: int
    kind: str
    """Of NUMBERS."""
    row_step: int
    """Numbers from one row to the next."""
    column_step: int
    owner: object


class CodedRows(NamedTuple):
    """Some rows of a matrix of codes in memory."""

    codes: int
    """(n, K), 4 bits two to a byte."""
    scales: int
    """(n, groups) float32."""
    owner: object


class Matrix(Protocol):
    """A matrix (N, K) that makes N outputs from K inputs."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def number(self) -> str:
        """float32, bfloat16, int8 or int4: what it becomes."""
        ...

    @property
    def group(self) -> int | None:
        """Inputs that share a scale."""
        ...

    def rows(self, first: int, end: int) -> PlainRows | CodedRows: ...

    def release(self, first: int, end: int) -> None:
        """Give the memory of these rows back: nobody needs them any more."""
        ...


class Source(Protocol):
    """Weights by our names for them."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def precision(self) -> str:
        """Of its matrices: float32, bfloat16, int8 or int4."""
        ...

    def matrix(self, name: str) -> Matrix:
        """The matrix of a module, such as blocks.0.attn.qkv. Raises Unavailable for one that there are no kernels for."""
        ...

    def vector(self, name: str) -> Floats | None:
        """A parameter, such as blocks.0.norm_1.weight; None where there is none."""
        ...

    def tables(self) -> Iterator[tuple[int, str, Floats]]:
        """What stands for positions: a layer, the engine's name, and the numbers."""
        ...


def shape_of(config: ModelConfig, cache: str, activations: int) -> Shape:
    """The engine's words for a configuration. Raises Unavailable for what it has no kernels for."""
    if config.moe.experts:
        raise Unavailable("the native engine has no mixtures of experts")
    return Shape(
        vocab=config.vocab_size,
        context=config.context_tokens,
        layers=config.n_layer,
        width=config.width,
        heads=config.n_head,
        kv_heads=config.kv_heads,
        head_width=config.head_width,
        hidden=config.hidden_width,
        rms_norm=config.norm == "rms",
        gated=config.mlp == "swiglu",
        activation=ACTIVATIONS[config.mlp],
        cache_format=FORMATS[cache],
        planes=1 if activations == 8 else 2,
        epsilon=config.norm_eps,
        scale=config.attention_scale or 1 / math.sqrt(config.head_width),
        logit_cap=config.logit_cap or 0.0,
    )


def pack(lib: Any, engine: int, source: Source, release: bool) -> None:
    """Hand all weights to a new engine.

    With `release` the source's own are given back on the way, so that they are never held twice; it is then of no more use.
    """
    config, names = source.config, matrix_names(source.config)
    matrices = {path: source.matrix(path) for path in names}  # all are understood before anything is given back
    for layer in range(config.n_layer) if config.mlp == "swiglu" else ():
        up, gate = (matrices[f"blocks.{layer}.mlp.{name}"] for name in ("up", "gate"))
        if (up.number, up.group) != (gate.number, gate.group):  # they read the same rows, made ready once
            raise Unavailable("the native engine needs up and gate of an MLP stored alike; one of them was kept")

    def vector(layer: int, name: str, values: Floats | None) -> None:
        if values is not None:
            checked(lib, lib.glass_vector_set(engine, layer, VECTORS[name], values.address, values.size))

    def norm(layer: int, name: str, path: str) -> None:
        vector(layer, name, source.vector(f"{path}.weight"))
        vector(layer, f"{name}_bias", source.vector(f"{path}.bias"))

    for path, (layer, name) in names.items():
        _fill(lib, (engine, layer, MATRICES[name]), matrices[path], release)
        if name not in ("embedding", "head"):
            vector(layer, f"{name}_bias", source.vector(f"{path}.bias"))
    for layer in range(config.n_layer):
        for name, path in (("norm_1", "norm_1"), ("norm_2", "norm_2"), ("q_norm", "attn.q_norm"), ("k_norm", "attn.k_norm")):
            norm(layer, name, f"blocks.{layer}.{path}")
        if config.span(layer) == "window":
            checked(lib, lib.glass_window_set(engine, layer, config.window_tokens))
    norm(0, "norm_f", "norm_f")
    norm(0, "embedding_norm", "embedding_norm")
    for layer, name, values in source.tables():
        vector(layer, name, values)


def matrix_names(config: ModelConfig) -> dict[str, tuple[int, str]]:
    """Our names of all matrices -> the layer, and the engine's name."""
    gate = [("gate", "mlp.gate")] if config.mlp == "swiglu" else []
    block = [("qkv", "attn.qkv"), ("out", "attn.out"), ("up", "mlp.up"), *gate, ("down", "mlp.down")]
    found = {f"blocks.{layer}.{path}": (layer, name) for layer in range(config.n_layer) for name, path in block}
    found["token_embedding"] = (0, "embedding")
    return found if config.tied_head else found | {"head": (0, "head")}


def _fill(lib: Any, where: tuple[int, int, int], matrix: Matrix, release: bool) -> None:
    """A matrix, some rows at a time."""
    N, K = matrix.shape
    checked(lib, lib.glass_matrix_new(*where, FORMATS[matrix.number], N, K, matrix.group or 0))
    for first in range(0, N, ROWS):
        end = min(first + ROWS, N)
        rows, which = matrix.rows(first, end), (*where, first, end - first)
        if isinstance(rows, CodedRows):
            checked(lib, lib.glass_matrix_fill_codes(*which, rows.codes, rows.scales))
        else:
            steps = rows.row_step, rows.column_step
            checked(lib, lib.glass_matrix_fill(*which, NUMBERS[rows.kind], rows.address, *steps))
        if release:
            matrix.release(first, end)


def give_back(address: int, nbytes: int) -> None:
    """Let the system take the memory pages that lie wholly in there. What a file is mapped to is otherwise held on."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def check_group(group: int | None) -> None:
    """Raises Unavailable for groups that there are no kernels for."""
    if group is not None and group % 8:
        raise Unavailable(f"the native engine needs groups of a multiple of 8; the model has {group}")


def as_ints(numbers: list[int]) -> Any:
    """A C array."""
    return (ctypes.c_int32 * len(numbers))(*numbers)
