"""Losses: pure functions of tensors that return (sum, count). The loop divides once, by the count of the whole step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.model import GPT

IGNORE = -100
"""A target that nothing is learned from."""
CHUNK_LOGITS = 2**26
"""Logits that exist at once in `head_loss`: 128 MiB in bfloat16, 1,335 positions of a vocabulary of 50,257."""
PIECE_LOGITS = 2**20
"""Logits that a CPU turns into gradients at a time: 4 MiB in float32 stay in its cache."""


@dataclass(frozen=True, eq=False)
class Loss:
    """A loss not yet divided."""

    sum: Tensor
    """Scalar: total over the supervised tokens, in nats."""
    count: Tensor
    """Scalar int64: supervised tokens."""


def token_loss(logits: Tensor, targets: Tensor) -> Loss:
    """Cross-entropy -Σ log p(target) of logits (B, T, V) against targets (B, T); targets of IGNORE do not count.

    Half-precision logits are summed in float32. The plain maths: `head_loss` is the same from one step earlier.
    """
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return Loss(total, (targets != IGNORE).sum())


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Loss:
    """`token_loss(hidden @ weight.T, targets)` without ever holding all logits: hidden (B, T, D), weight (V, D), targets (B, T).

    A chunk of positions at a time makes its logits, their loss and, at once and in the same place, their gradient, and of it
    those of hidden and weight: the memory is CHUNK_LOGITS numbers of the product's precision and the gradient of the weight,
    where the plain loss holds B * T * V numbers three times. (The idea of Liger Kernel's fused linear cross-entropy, Hsu et
    al. 2024.)
    """
    weight = weight if torch.is_grad_enabled() else weight.detach()  # whose gradient would be computed for nothing
    return Loss(_HeadLoss.apply(hidden, weight, targets), (targets != IGNORE).sum())


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        rows = hidden.flatten(0, 1).to(dtype)  # (N, D)
        head = weight.to(dtype)
        wants_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        drows = torch.empty_like(rows) if wants_grad else None
        dhead = torch.zeros_like(weight) if wants_grad else None
        total = torch.zeros((), dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=hidden.device)
        size = max(1, CHUNK_LOGITS // weight.size(0))
        piece_size = max(1, PIECE_LOGITS // weight.size(0)) if kind == "cpu" else size
        with torch.autocast(kind, enabled=False):
            for part, wanted in zip(range(0, len(rows), size), targets.flatten().split(size), strict=True):
                chunk = rows[part : part + size]  # (n, D)
                logits = chunk @ head.mT  # (n, V)
                for piece, piece_wanted in zip(logits.split(piece_size), wanted.split(piece_size), strict=True):
                    total += _to_gradient(piece, piece_wanted, total.dtype)
                if drows is not None and dhead is not None:
                    drows[part : part + size] = logits @ head
                    dhead += logits.mT @ chunk
        if drows is not None and dhead is not None:
            ctx.save_for_backward(drows.view_as(hidden).to(hidden.dtype), dhead)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            raise NotImplementedError("`head_loss` has no second derivative; token_loss has")
        drows, dhead = ctx.saved_tensors
        return drows * grad, dhead * grad, None


def _to_gradient(logits: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """The loss of logits (n, V), summed in `dtype`; its gradient by the logits takes their place."""
    supervised = targets != IGNORE  # (n,)
    index = targets.clamp(min=0).unsqueeze(1)  # (n, 1)
    scores = logits.to(dtype)  # (n, V): a copy, or the logits themselves
    scores -= scores.amax(dim=1, keepdim=True)
    target_score = scores.gather(1, index).squeeze(1)  # (n,)
    norm = scores.exp_().sum(dim=1)  # (n,)
    scores.mul_((supervised / norm).unsqueeze(1))  # softmax, 0 where nothing is supervised
    scores.scatter_add_(1, index, -supervised.to(dtype).unsqueeze(1))
    if scores is not logits:
        logits.copy_(scores)
    return ((norm.log() - target_score) * supervised).sum()


class Scored(nn.Module):
    """A model and its loss in one forward pass, as training and evaluation run it: `scored(ids, targets)` -> nats, summed."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, targets: Tensor, segments: Tensor | None = None) -> Tensor:
        """ids, targets, segments (B, T); a scalar, differentiable."""
        return head_loss(self.model.hidden(ids, segments=segments), self.model.head.weight, targets).sum
