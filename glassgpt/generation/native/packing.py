"""A plain or quantised GPT -> the engine's panels. It reads the network from outside; the network knows nothing of it."""

from __future__ import annotations

import ctypes
import math
import mmap
from typing import Any

import torch
from torch import Tensor, nn

from glassgpt.config import ModelConfig
from glassgpt.generation.native.build import Unavailable
from glassgpt.generation.native.library import ACTIVATIONS, FORMATS, MATRICES, VECTORS, Shape, checked
from glassgpt.model import GPT
from glassgpt.model.gpt import Block
from glassgpt.model.quantised import QuantisedEmbedding, QuantisedLinear, round_to_nearest

ROWS = 4096
"""Rows of a matrix that are packed at a time: what is made on the way stays small. A multiple of the 64 of a panel."""
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
        if isinstance(module, QuantisedLinear):
            return f"int{module.matrix.bits}"
    precision = str(model.norm_f.get_parameter("weight").dtype).removeprefix("torch.")
    if precision not in FORMATS:
        raise Unavailable(f"the native engine does not compute in {precision}")
    return precision


@torch.no_grad()
def pack(lib: Any, engine: int, model: GPT, precision: str, release: bool) -> None:
    """Hand all weights of `model` to a new engine: matrices in `precision`, or as they are where they are quantised already.

    With `release` the model's own are given back on the way, so that they are never held twice; it is then of no more use.
    """
    config, packer = model.config, Packer(lib, engine, precision, release)
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        for name in ("attn.qkv", "attn.out", "mlp.up", "mlp.down", *(["mlp.gate"] if config.mlp == "swiglu" else [])):
            packer.linear(layer, name.partition(".")[2], block.get_submodule(name))
        for name, norm in (
            ("norm_1", block.norm_1),
            ("norm_2", block.norm_2),
            ("q_norm", block.attn.q_norm),
            ("k_norm", block.attn.k_norm),
        ):
            packer.norm(layer, name, norm)
        if config.span(layer) == "window":
            checked(lib, lib.glass_window_set(engine, layer, config.window_tokens))
        packer.vector(layer, "distance", _by_distance(model, layer))
    packer.norm(0, "norm_f", model.norm_f)
    packer.norm(0, "embedding_norm", model.embedding_norm)
    packer.matrix(0, "embedding", model.token_embedding)
    if not config.tied_head:
        packer.matrix(0, "head", model.head)
    for name, table in _positions(model).items():
        packer.vector(0, name, table)


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

    def linear(self, layer: int, name: str, module: nn.Module) -> None:
        self.matrix(layer, name, module)
        self.vector(layer, f"{name}_bias", getattr(module, "bias", None))

    def matrix(self, layer: int, name: str, module: nn.Module) -> None:
        """A matrix (N, K), some rows at a time. Raises Unavailable for a module that is no plain or quantised matrix."""
        if isinstance(module, QuantisedLinear | QuantisedEmbedding):
            stored, number, group = module.matrix.codes, f"int{module.matrix.bits}", module.matrix.group
            N, K = len(stored), module.matrix.columns
        elif type(module) in (nn.Linear, nn.Embedding):
            stored, number = module.get_parameter("weight").detach(), self.precision
            N, K = stored.shape
            group = INT4_GROUP if number == "int4" and K % INT4_GROUP == 0 else None
        else:
            raise Unavailable(f"the native engine does not compute {type(module).__name__}; merge adapters first")
        if group is not None and group % 8:
            raise Unavailable(f"the native engine needs groups of a multiple of 8; the model has {group}")
        where = self.engine, layer, MATRICES[name]
        checked(self.lib, self.lib.glass_matrix_new(*where, FORMATS[number], N, K, group or 0))
        for first in range(0, N, ROWS):
            rows = slice(first, min(first + ROWS, N))
            values, scales = _rows(module, rows, number, group)
            pointer = None if scales is None else scales.data_ptr()
            checked(self.lib, self.lib.glass_matrix_fill(*where, first, rows.stop - first, values.data_ptr(), pointer))
            if self.release:
                _give_back(stored[rows])


def _rows(module: nn.Module, rows: slice, number: str, group: int | None) -> tuple[Tensor, Tensor | None]:
    """Some rows of a matrix: floats (n, K), or codes (n, K) and scales (n, groups)."""
    if isinstance(module, QuantisedLinear | QuantisedEmbedding):
        codes = module.matrix.unpacked(rows)
    elif number in ("int8", "int4"):
        codes = round_to_nearest(module.get_parameter("weight")[rows], int(number.removeprefix("int")), group)
    else:
        return module.get_parameter("weight")[rows].detach().float().contiguous(), None
    return codes.codes.contiguous(), codes.scales.float().contiguous()


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
