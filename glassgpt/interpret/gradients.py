"""Which input tokens a logit answers to, by gradients of the token embeddings: gradient times input, and integrated gradients.

Direct logit attribution says which part writes a logit; this says which token of the text it goes back to, through every part.

T positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from glassgpt.config import UserError
from glassgpt.interpret.attribution import checked, unembedding
from glassgpt.interpret.hooks import edit
from glassgpt.model import GPT

Baseline = Literal["mean", "zero"]


@dataclass(frozen=True, eq=False)
class InputAttribution:
    """What each token of a text counts for one logit, or for the difference of two."""

    values: Tensor
    """(T,), in logits; a token's number is the sum over its embedding's."""
    output: float
    """f(x): the logit, before the cap that some models have."""
    baseline_output: float
    """f(baseline)."""
    gap: float
    """Sum of the values - (f(x) - f(baseline)): 0 for an exact integral. Large against f(x) - f(baseline): give more steps."""


def input_gradients(model: GPT, ids: Tensor, token: int, position: int = -1, against: int | None = None) -> Tensor:
    """Gradient (T, D) of a logit by the token embeddings of ids (T,). Arguments and errors as in `integrated_gradients`."""
    ids, position = checked(model, ids, position)
    rows = model.token_embedding.weight.detach()[ids].unsqueeze(0)
    return _gradients(model, ids, rows, position, unembedding(model, token, against))[1][0]


def gradient_times_input(model: GPT, ids: Tensor, token: int, position: int = -1, against: int | None = None) -> Tensor:
    """Gradient times embedding, summed over the width, (T,) (Shrikumar et al. 2016). Does not sum to the logit.

    Arguments and errors as in `integrated_gradients`.
    """
    ids, position = checked(model, ids, position)
    return (input_gradients(model, ids, token, position, against) * model.token_embedding.weight.detach()[ids]).sum(dim=-1)


def integrated_gradients(
    model: GPT,
    ids: Tensor,
    token: int,
    position: int = -1,
    against: int | None = None,
    *,
    baseline: Baseline = "mean",
    steps: int = 32,
    batch: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> InputAttribution:
    """Integrated gradients (Sundararajan et al. 2017, eq. 1) of `token` after `position` of ids (T,), by token embeddings.

    The gradient is integrated along the straight line from the baseline, at every position the mean row of the embedding
    matrix or zero, by Gauss-Legendre quadrature at `steps` points, `batch` at a time; positions stay as they are. With
    `against`, of logit(token) - logit(against). A model that norms its residual stream is steep near an embedding of zero, and a
    mixture of experts jumps where a router changes its mind: `gap` says what the integral missed.
    Raises UserError for ids, a token or a position that the model has not, for fewer than 1 step or an unknown baseline, and
    for a model in training mode with dropout.
    """
    ids, position = checked(model, ids, position)
    if steps < 1 or batch < 1:
        raise UserError(f"steps and batch must be at least 1; got {steps} and {batch}")
    if baseline not in ("mean", "zero"):
        raise UserError(f"baseline must be mean or zero; got {baseline!r}")
    table, reader = model.token_embedding.weight.detach(), unembedding(model, token, against)
    x = table[ids]  # (T, D)
    start = (table.mean(dim=0) if baseline == "mean" else torch.zeros_like(table[0])).expand_as(x)
    points, weights = (torch.tensor(a, device=x.device, dtype=x.dtype) for a in _unit_quadrature(steps))  # (steps,)
    total = torch.zeros_like(x)
    for done in range(0, steps, batch):
        at, weight = points[done : done + batch].view(-1, 1, 1), weights[done : done + batch].view(-1, 1, 1)
        _, gradients = _gradients(model, ids, start + at * (x - start), position, reader)  # (steps of the batch, T, D)
        total += (weight * gradients).sum(dim=0)
        if progress is not None:
            progress(min(done + batch, steps), steps)
    values = ((x - start) * total).sum(dim=-1)
    (before, after), _ = _gradients(model, ids, torch.stack((start, x)), position, reader)
    gap = values.sum() - (after - before)
    return InputAttribution(values, float(after), float(before), float(gap))


def _unit_quadrature(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Points in (0, 1) and weights that sum to 1: exact for polynomials up to degree 2 * steps - 1."""
    points, weights = np.polynomial.legendre.leggauss(steps)
    return (points + 1) / 2, weights / 2


@torch.inference_mode(False)
@torch.enable_grad()
def _gradients(model: GPT, ids: Tensor, embeddings: Tensor, position: int, reader: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B,) of `reader` (D,) with token embeddings (B, T, D), and the gradients by them; parameters get none."""
    x = embeddings.clone().requires_grad_()
    with edit(model, {"token_embedding": lambda _: x}):
        outputs = model.hidden(ids.expand(len(x), -1))[:, position] @ reader.clone()  # (B,)
    (gradients,) = torch.autograd.grad(outputs.sum(), x)
    return outputs.detach(), gradients
