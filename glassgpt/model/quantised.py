"""Matrices of 8 or 4 bits: codes and scales, and the modules that stand in a network in place of its float ones.

A weight (N, K) is (code - zero) * scale. `group` numbers along K share a scale, or all of a row when it is None. N outputs (or
tokens of the vocabulary), K inputs. A network gets them from outside (`put`); its files know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.config import UserError
from glassgpt.config.quantize import Recipe
from glassgpt.model.gpt import GPT

ZERO = {8: 128, 4: 8}
"""The code of 0.0, by bits."""
LOWEST, HIGHEST = {8: -127, 4: -8}, {8: 127, 4: 7}
"""Of code - zero, by bits."""
FACTORS = {8: (1.0,), 4: tuple(step / 40 for step in range(28, 48))}
"""Scales are tried at these times the one that gives a group's largest number the lowest code; 8 bits gain nothing by others."""


@dataclass(frozen=True, eq=False)
class Codes:
    """A quantised matrix."""

    codes: Tensor
    """(N, K) uint8: 1 to 255 for 8 bits, 0 to 15 for 4."""
    scales: Tensor
    """(N, K / group) bfloat16; (N, 1) float32 where a row has one. Never 0; of 4 bits some are negative."""
    bits: int
    group: int | None

    def dequantised(self) -> Tensor:
        """The matrix that the codes stand for, (N, K) float32."""
        parts = (self.codes.float() - ZERO[self.bits]).unflatten(1, (self.scales.size(1), -1))  # (N, groups, group)
        return (parts * self.scales.float().unsqueeze(2)).flatten(1)


# ---------------------------------------------------------------------- rounding


@torch.no_grad()
def round_to_nearest(weight: Tensor, bits: int, group: int | None, importance: Tensor | None = None) -> Codes:
    """Quantise a matrix (N, K): each group's scale is the one of FACTORS with the least squared error, each code the nearest.

    `importance` (K,) weighs the errors of the inputs, such as their mean squares. Raises UserError when K is no multiple of
    the group, or when a number is not finite.
    """
    N, K = weight.shape
    if group is not None and K % group:
        raise UserError(f"group is {group}, which does not divide the matrix's {K} inputs; use a divisor, such as {_divisor(K)}")
    if not weight.isfinite().all():
        raise UserError("the matrix has numbers that are not finite; it cannot be quantised")
    parts = weight.detach().float().reshape(N, -1, group or K)  # (N, groups, group)
    weights = torch.ones(K) if importance is None else importance.float()
    weights = weights.to(weight.device).view(1, -1, group or K)
    first = _first_scales(parts, bits)  # (N, groups)
    scales, least = torch.ones_like(first), torch.full_like(first, torch.inf)
    for factor in FACTORS[bits]:
        tried = stored_scales(first * factor, group).float()
        errors = ((steps(parts, tried, bits) * tried.unsqueeze(2) - parts).square() * weights).sum(dim=2)  # (N, groups)
        scales, least = torch.where(errors < least, tried, scales), torch.minimum(errors, least)
    codes = (steps(parts, scales, bits) + ZERO[bits]).to(torch.uint8)
    return Codes(codes.flatten(1), stored_scales(scales, group), bits, group)


def _first_scales(parts: Tensor, bits: int) -> Tensor:
    """(N, groups): what gives the largest number of each group (N, groups, group) the lowest code.

    4 bits reach -8 and only +7: there a scale has the sign that puts the largest number at -8.
    """
    where = parts.abs().argmax(dim=2, keepdim=True)
    largest = parts.gather(2, where).squeeze(2)
    return largest / LOWEST[bits] if bits == 4 else largest.abs() / HIGHEST[bits]


def steps(parts: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Code - zero, the nearest, of numbers (N, groups, group) for scales (N, groups)."""
    return (parts / scales.unsqueeze(2)).round().clamp(LOWEST[bits], HIGHEST[bits])


def stored_scales(scales: Tensor, group: int | None) -> Tensor:
    """Scales as they are kept: float32 for rows, bfloat16 rounded away from 0 for groups, and 1 where all of a group is 0."""
    scales = torch.where(scales == 0, 1.0, scales)
    if group is None:
        return scales
    short = scales.bfloat16()
    outward = torch.nextafter(short, short * torch.inf)
    return torch.where(short.float().abs() < scales.abs(), outward, short)


def _divisor(K: int) -> int:
    return max(size for size in range(1, min(K, 64) + 1) if K % size == 0)


def rounded_activations(x: Tensor) -> Tensor:
    """x (..., K) as 8 bits have it: whole steps from -127 to 127 of a scale for each token."""
    step = x.abs().amax(dim=-1, keepdim=True) / 127
    step = torch.where(step > 0, step, 1.0)
    return (x / step).round() * step


def pack(codes: Tensor) -> Tensor:
    """Codes of 4 bits (N, K) two to a byte, (N, ⌈K / 2⌉): even columns in the low halves."""
    codes = F.pad(codes, (0, codes.size(1) % 2))
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack(packed: Tensor, K: int) -> Tensor:
    """What `pack` was given, (N, K)."""
    return torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)[:, :K]


# ---------------------------------------------------------------------- modules


class QuantisedMatrix(nn.Module):
    """Codes and scales as the file has them (4 bits two to a byte), and nothing else."""

    def __init__(self, codes: Tensor, scales: Tensor, bits: int, group: int | None, columns: int) -> None:
        super().__init__()
        self.bits, self.group, self.columns = bits, group, columns
        self.codes: Tensor
        self.register_buffer("codes", codes)
        self.scales: Tensor
        self.register_buffer("scales", scales)
        self.like: Tensor
        self.register_buffer("like", torch.empty(0, device=codes.device), persistent=False)
        """Its dtype is that of results, and follows `model.to(dtype)`."""

    @classmethod
    def of(cls, codes: Codes) -> QuantisedMatrix:
        """4 bits are put two to a byte."""
        stored = pack(codes.codes) if codes.bits == 4 else codes.codes
        return cls(stored, codes.scales, codes.bits, codes.group, codes.codes.size(1))

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> QuantisedMatrix:
        """Move like any module, except that scales keep their numbers."""
        scales = self.scales
        super()._apply(fn, recurse)
        self.scales = scales.to(self.scales.device)
        return self

    def unpacked(self, rows: Tensor | slice | None = None) -> Codes:
        """The matrix, or some rows of it."""
        codes, scales = (self.codes, self.scales) if rows is None else (self.codes[rows], self.scales[rows])
        return Codes(unpack(codes, self.columns) if self.bits == 4 else codes, scales, self.bits, self.group)

    def dequantised(self, rows: Tensor | None = None) -> Tensor:
        """The same as numbers of the results' dtype."""
        return self.unpacked(rows).dequantised().to(self.like.dtype)


class Quantised(nn.Module):
    """What stands in the place of a module with a float matrix."""

    def __init__(self, matrix: QuantisedMatrix, recipe: Recipe) -> None:
        super().__init__()
        self.matrix, self.recipe = matrix, recipe

    @property
    def weight(self) -> Tensor:
        """(N, K), made anew each time."""
        return self.matrix.dequantised()

    @property
    def quantised(self) -> Codes:
        return self.matrix.unpacked()


class QuantisedLinear(Quantised):
    """A linear map by a quantised matrix, which is dequantised for each use and then forgotten."""

    def __init__(self, matrix: QuantisedMatrix, bias: nn.Parameter | None, recipe: Recipe) -> None:
        super().__init__(matrix, recipe)
        self.register_parameter("bias", bias)
        self.in_features, self.out_features = matrix.columns, len(matrix.codes)

    def rounded(self, x: Tensor) -> Tensor:
        """What the matrix reads of x (..., K): x, or its 8 bits where the recipe says so."""
        return x if self.recipe.activation_bits == 16 else rounded_activations(x)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.rounded(x), self.weight, self._parameters["bias"])


class QuantisedEmbedding(Quantised):
    """Rows of a quantised matrix."""

    def __init__(self, matrix: QuantisedMatrix, recipe: Recipe) -> None:
        super().__init__(matrix, recipe)
        self.num_embeddings, self.embedding_dim = len(matrix.codes), matrix.columns

    def forward(self, ids: Tensor) -> Tensor:
        return self.matrix.dequantised(ids.flatten()).view(*ids.shape, -1)


# ---------------------------------------------------------------------- in the model


def targets(model: GPT) -> dict[str, nn.Module]:
    """The modules that may be quantised, by name: the embedding, the blocks' linear maps but routers, a head of its own."""
    kinds = nn.Linear | QuantisedLinear
    blocks = {name: module for name, module in model.blocks.named_modules(prefix="blocks") if isinstance(module, kinds)}
    found: dict[str, nn.Module] = {"token_embedding": model.token_embedding, **blocks}
    if not model.config.tied_head:
        found["head"] = model.head
    return {name: module for name, module in found.items() if not name.endswith(".router")}


@torch.no_grad()
def put(model: GPT, matrices: Mapping[str, Codes | QuantisedMatrix], recipe: Recipe) -> GPT:
    """Put quantised matrices in the place of those of the same names, in place; returns the model.

    A tied head goes with the embedding: one matrix under two names.
    """
    like = model.norm_f.get_parameter("weight")
    for name, codes in matrices.items():
        matrix, old = codes if isinstance(codes, QuantisedMatrix) else QuantisedMatrix.of(codes), model.get_submodule(name)
        matrix = matrix.to(like.device, like.dtype)
        if name == "token_embedding":
            _replace(model, name, QuantisedEmbedding(matrix, recipe))
        else:
            _replace(model, name, QuantisedLinear(matrix, getattr(old, "bias", None), recipe))
        if name == "token_embedding" and model.config.tied_head:
            _replace(model, "head", QuantisedLinear(matrix, None, recipe))
    return model


def _replace(model: GPT, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    module.train(model.training)
    setattr(model.get_submodule(parent), last, module)


def quantised_modules(model: nn.Module) -> Iterator[tuple[str, Quantised]]:
    """By name; a tied head is not named again."""
    seen = set()
    for name, module in model.named_modules():
        if isinstance(module, Quantised) and module.matrix not in seen:
            seen.add(module.matrix)
            yield name, module


def recipe_of(model: nn.Module) -> Recipe | None:
    """How the model was quantised; None for a plain one."""
    return next((module.recipe for _, module in quantised_modules(model)), None)


@torch.no_grad()
def dequantised(model: GPT) -> GPT:
    """The plain network of the same numbers, in the same dtype: the model itself when it is one, else a copy."""
    if recipe_of(model) is None:
        return model
    with torch.device("meta"):
        plain = GPT(model.config)
    state = {f"{name}.weight": module.weight for name, module in quantised_modules(model)}
    state |= {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    plain.load_state_dict(state, strict=False, assign=True)
    plain.tie()
    return plain.train(model.training)


def parameter_count(model: nn.Module) -> int:
    """All numbers of a model, those of quantised matrices too; shared ones once."""
    matrices = sum(module.matrix.columns * len(module.matrix.codes) for _, module in quantised_modules(model))
    return matrices + sum(parameter.numel() for parameter in model.parameters())
