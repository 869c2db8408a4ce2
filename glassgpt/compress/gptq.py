"""GPTQ (Frantar et al. 2022): codes chosen column by column, each column's error made good by the columns that follow.

A matrix W (N, K) that reads X (tokens, K) should keep its outputs: the error of codes Q is tr(E H Eᵀ), E = W - Q, H = XᵀX.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from glassgpt.config.quantize import Recipe
from glassgpt.data.progress import Progress
from glassgpt.model import GPT
from glassgpt.model.quantised import HIGHEST, LOWEST, ZERO, Codes, put, round_to_nearest, targets

DAMPING = 0.01
"""Share of the mean of H's diagonal that is added to it, so that H can be inverted (the paper's 1 %)."""
BLOCK = 128
"""Columns whose errors are gathered before the columns after them are corrected: the same numbers, in fewer passes over W."""
ROWS = 8192
"""Rows of W at once; no row knows of another."""
WINDOWS = 8
"""Of text in one forward pass."""


@torch.no_grad()
def gptq(weight: Tensor, hessian: Tensor, bits: int, group: int | None, damping: float = DAMPING) -> Codes:
    """Codes of `weight` (N, K) that lose little of its outputs; `hessian` (K, K) is XᵀX of what it reads, float64, on the CPU.

    Columns are taken in falling order of H's diagonal ("act-order" of the paper's code), with the scales of round to nearest,
    whose errors are weighed by that diagonal. Raises UserError as `round_to_nearest`.
    """
    weight = weight.detach().cpu()
    diagonal = hessian.diagonal()
    start = round_to_nearest(weight, bits, group, importance=diagonal if diagonal.any() else None)
    order = diagonal.argsort(descending=True, stable=True)
    upper = _inverse_factor(hessian[order][:, order], damping)
    K = weight.size(1)
    scales = start.scales.double().repeat_interleave(K // start.scales.size(1), dim=1)[:, order]  # (N, K)
    parts = zip(weight.double()[:, order].split(ROWS), scales.split(ROWS), strict=True)
    steps = torch.cat([_steps(part.clone(), scale, upper, bits) for part, scale in parts])  # (N, K)
    codes = (steps + ZERO[bits]).to(torch.uint8)[:, order.argsort()]
    return Codes(codes, start.scales, bits, group)


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper triangular U (K, K) with UᵀU = (H + damping)⁻¹. An input that was always 0 is left to round to nearest."""
    damped = hessian.clone()
    damped.diagonal().add_(damping * hessian.diagonal().mean())
    damped.diagonal().add_((damped.diagonal() == 0).double())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def _steps(weight: Tensor, scales: Tensor, upper: Tensor, bits: int) -> Tensor:
    """Code - zero of each number of weight (n, K), which is overwritten; algorithm 1 of the paper."""
    K = weight.size(1)
    steps = torch.empty_like(weight)
    for first in range(0, K, BLOCK):
        last = min(first + BLOCK, K)
        errors = torch.empty_like(weight[:, first:last])  # over U's diagonal
        for k in range(first, last):
            steps[:, k] = (weight[:, k] / scales[:, k]).round().clamp(LOWEST[bits], HIGHEST[bits])
            error = (weight[:, k] - steps[:, k] * scales[:, k]) / upper[k, k]
            weight[:, k:last] -= error.unsqueeze(1) * upper[k, k:last]
            errors[:, k - first] = error
        weight[:, last:] -= errors @ upper[first:last, last:]
    return steps


# ---------------------------------------------------------------------- through a model


@torch.no_grad()
def quantise_by_layers(model: GPT, ids: Tensor, recipe: Recipe, progress: Progress = lambda done, total: None) -> GPT:
    """Put the matrices that `recipe.matrices` names in place, each by GPTQ on what it reads of calibration text ids (n, T).

    Each sees what the quantised matrices before it give. A tied head is quantised first, on what it reads in the float model,
    as it is the embedding as well; an embedding that is no head is rounded to nearest.
    """
    bits, total = recipe.matrices, len(recipe.matrices)
    done = 0

    def place(name: str, codes: Codes) -> None:
        nonlocal done
        put(model, {name: codes}, recipe)
        progress(done := done + 1, total)

    if (name := "token_embedding") in bits:
        weight = model.token_embedding.weight
        if model.config.tied_head:
            place(name, gptq(weight, _sums(model.hidden(part) for part in ids.split(WINDOWS)), bits[name], recipe.group))
        else:
            place(name, round_to_nearest(weight, bits[name], recipe.group))
    entered = [model.enter(part) for part in ids.split(WINDOWS)]
    xs, wheres = [x for x, _ in entered], [where for _, where in entered]
    for layer, block in enumerate(model.blocks):
        for name in (name for name in targets(model) if name.startswith(f"blocks.{layer}.") and name in bits):
            linear = model.get_submodule(name)
            with read_by(linear) as read:
                for x, where in zip(xs, wheres, strict=True):
                    block(x, where)
            place(name, gptq(linear.get_parameter("weight"), read, bits[name], recipe.group))
        xs = [block(x, where) for x, where in zip(xs, wheres, strict=True)]
    if "head" in bits:
        place("head", gptq(model.head.weight, _sums(model.norm_f(x) for x in xs), bits["head"], recipe.group))
    return model


@contextlib.contextmanager
def read_by(linear: nn.Module) -> Iterator[Tensor]:
    """In here XᵀX of all that a linear map reads is added up in the tensor (K, K), float64."""
    K = int(linear.in_features)  # type: ignore[arg-type]
    total = torch.zeros(K, K, dtype=torch.float64)

    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        total.add_(_sums([inputs[0]]))

    hook = linear.register_forward_pre_hook(add)
    try:
        yield total
    finally:
        hook.remove()


def _sums(inputs: Iterable[Tensor]) -> Tensor:
    """XᵀX (K, K) of all inputs (..., K), float64."""
    return sum((x.flatten(0, -2).T @ x.flatten(0, -2)).cpu().double() for x in inputs)  # type: ignore[return-value]
