"""A plain or quantised GPT -> the engine's panels. It reads the network from outside; the network knows nothing of it."""

from __future__ import annotations

import ctypes
import math
import mmap
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glassgpt.config import ModelConfig
from glassgpt.generation.native.build import Unavailable
from glassgpt.generation.native.library import ACTIVATIONS, FORMATS, MATRICES, VECTORS, Shape, checked
from glassgpt.model import GPT
from glassgpt.model.quantised import Quantised, round_to_nearest
from glassgpt.model.quantised import pack as pack_small

ROWS = 4096
"""Rows of a matrix that are packed at a time: what is made on the way stays small. A multiple of the 32 of a panel."""
INT4_GROUP = 32
"""Inputs that share a scale where a float matrix is rounded to 4 bits."""


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


def precision_of(model: GPT) -> str:
    """What `as-is` stands for: the bits of a quantised model, else the dtype. Raises Unavailable for another dtype."""
    for module in model.modules():
        if isinstance(module, Quantised):
            return f"int{module.matrix.bits}"
    return _dtype_of(model.norm_f.get_parameter("weight"))


def _dtype_of(weight: Tensor) -> str:
    precision = str(weight.dtype).removeprefix("torch.")
    if precision not in FORMATS:
        raise Unavailable(f"the native engine does not compute in {precision}")
    return precision


@torch.no_grad()
def pack(lib: Any, engine: int, model: GPT, precision: str, release: bool) -> None:
    """Hand all weights of `model` to a new engine: its plain matrices in `precision` or as they are, quantised ones as they are.

    With `release` the model's own are given back on the way, so that they are never held twice; it is then of no more use.
    """
    config, packer = model.config, Packer(lib, engine, precision, release)
    matrices = [
        (layer, name, block.get_submodule(path)) for layer, block in enumerate(model.blocks) for name, path in _matrices(config)
    ]
    matrices += [(0, "embedding", model.token_embedding)] + ([] if config.tied_head else [(0, "head", model.head)])
    for _, _, module in matrices:
        packer.kind(module)  # nothing is given back before all are known to be understood
    for block in model.blocks if config.mlp == "swiglu" else ():
        up, gate = (packer.kind(block.get_submodule(path)) for path in ("mlp.up", "mlp.gate"))
        if (up.number, up.group) != (gate.number, gate.group):  # they read the same rows, made ready once
            raise Unavailable("the native engine needs up and gate of an MLP stored alike; one of them was kept")
    for layer, name, module in matrices:
        packer.matrix(layer, name, module)
        packer.vector(layer, f"{name}_bias", getattr(module, "bias", None))
    for layer, block in enumerate(model.blocks):
        for name, path in (("norm_1", "norm_1"), ("norm_2", "norm_2"), ("q_norm", "attn.q_norm"), ("k_norm", "attn.k_norm")):
            packer.norm(layer, name, block.get_submodule(path))
        if config.span(layer) == "window":
            checked(lib, lib.glass_window_set(engine, layer, config.window_tokens))
        packer.vector(layer, "distance", _by_distance(model, layer))
    packer.norm(0, "norm_f", model.norm_f)
    packer.norm(0, "embedding_norm", model.embedding_norm)
    for name, table in _positions(model).items():
        packer.vector(0, name, table)


def _matrices(config: ModelConfig) -> list[tuple[str, str]]:
    """Of a block: the engine's names, and ours."""
    gate = [("gate", "mlp.gate")] if config.mlp == "swiglu" else []
    return [("qkv", "attn.qkv"), ("out", "attn.out"), ("up", "mlp.up"), *gate, ("down", "mlp.down")]


class Kind(NamedTuple):
    """How a matrix is stored, and how it will be packed."""

    stored: Tensor
    shape: tuple[int, int]
    number: str
    group: int | None


class Packer:
    """Calls of the C interface for one engine."""

    def __init__(self, lib: Any, engine: int, precision: str, release: bool) -> None:
        self.lib, self.engine, self.precision, self.release = lib, engine, precision, release

    def vector(self, layer: int, name: str, values: Tensor | None) -> None:
        if values is not None:
            values = values.detach().float().contiguous()
            checked(self.lib, self.lib.glass_vector_set(self.engine, layer, VECTORS[name], values.data_ptr(), values.numel()))

    def norm(self, layer: int, name: str, module: nn.Module) -> None:
        if not isinstance(module, nn.Identity):
            self.vector(layer, name, module.get_parameter("weight"))
            self.vector(layer, f"{name}_bias", getattr(module, "bias", None))

    def kind(self, module: nn.Module) -> Kind:
        """Raises Unavailable for a module that is no plain or quantised matrix."""
        if isinstance(module, Quantised):
            matrix = module.matrix
            if matrix.group is not None and matrix.group % 8:
                raise Unavailable(f"the native engine needs groups of a multiple of 8; the model has {matrix.group}")
            return Kind(matrix.codes, (len(matrix.codes), matrix.columns), f"int{matrix.bits}", matrix.group)
        if type(module) not in (nn.Linear, nn.Embedding):
            raise Unavailable(f"the native engine does not compute {type(module).__name__}; merge adapters first")
        weight = module.get_parameter("weight").detach()
        N, K = weight.shape
        number = _dtype_of(weight) if self.precision == "as-is" else self.precision
        return Kind(weight, (N, K), number, INT4_GROUP if number == "int4" and K % INT4_GROUP == 0 else None)

    def matrix(self, layer: int, name: str, module: nn.Module) -> None:
        """A matrix (N, K), some rows at a time."""
        kind, where = self.kind(module), (self.engine, layer, MATRICES[name])
        N, K = kind.shape
        checked(self.lib, self.lib.glass_matrix_new(*where, FORMATS[kind.number], N, K, kind.group or 0))
        for first in range(0, N, ROWS):
            rows = slice(first, min(first + ROWS, N))
            values, scales = _rows(module, rows, kind)
            pointer = None if scales is None else scales.data_ptr()
            checked(self.lib, self.lib.glass_matrix_fill(*where, first, rows.stop - first, values.data_ptr(), pointer))
            if self.release:
                _give_back(kind.stored[rows])


def _rows(module: nn.Module, rows: slice, kind: Kind) -> tuple[Tensor, Tensor | None]:
    """Some rows of a matrix: floats (n, K), or codes (n, K; 4 bits two to a byte) and scales (n, groups)."""
    if isinstance(module, Quantised):
        codes, scales = module.matrix.codes[rows], module.matrix.scales[rows]
    elif kind.number in ("int8", "int4"):
        rounded = round_to_nearest(kind.stored[rows], int(kind.number.removeprefix("int")), kind.group)
        codes, scales = pack_small(rounded.codes) if kind.number == "int4" else rounded.codes, rounded.scales
    else:
        return kind.stored[rows].float().contiguous(), None
    return codes.contiguous(), scales.float().contiguous()


def _give_back(tensor: Tensor) -> None:
    """Let the system take the memory pages that lie wholly inside a tensor. What a file is mapped to is otherwise held on."""
    if not tensor.is_contiguous() or not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _positions(model: GPT) -> dict[str, Tensor]:
    """What the position slot adds to embeddings, (context, D), and by what angles it turns, (context, W / 2)."""
    config, slot, tables = model.config, model.position_embedding, {}
    places = torch.arange(config.context_tokens)
    if config.position in ("learned", "sinusoidal"):
        tables["position"] = slot.add(torch.zeros(config.context_tokens, config.width), places)
    if (rotation := slot.rotation(places, torch.float32)) is not None:  # (2, 1, 1, T, W): both halves of W alike
        tables["cosine"], tables["sine"] = rotation.squeeze(2).squeeze(1)[..., : config.head_width // 2]
    return tables


def _by_distance(model: GPT, layer: int) -> Tensor | None:
    """Added to a score by how far back its key lies, (H, context): a bias, and -inf where a strided layer does not look."""
    config, S = model.config, model.config.context_tokens
    bias = model.position_embedding.bias(1, S, torch.device("cpu"), torch.float32)  # (H, 1, S): of the last query
    table = None if bias is None else bias[:, 0].flip(-1)  # (H, S)
    if config.span(layer) != "strided":
        return table
    back, near = torch.arange(S), config.window_tokens or 1
    seen = (back < near) | (back % near == 0)
    table = torch.zeros(config.n_head, S) if table is None else table
    return table.masked_fill(~seen, float("-inf"))


def as_ints(numbers: list[int]) -> Any:
    """A C array."""
    return (ctypes.c_int32 * len(numbers))(*numbers)
