"""How far a student is from its teacher: pure functions of tensors, summed over tokens and not yet divided.

B batch, T tokens, D width of a model, V vocabulary. The temperature is called `temperature`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from glassgpt.interpret.cost import CHUNK_LOGITS, PIECE_LOGITS
from glassgpt.model.gpt import capped
from glassgpt.train.loss import IGNORE


@dataclass(frozen=True, eq=False)
class Matched:
    """A student's loss against its teacher and its text, in nats, not yet divided."""

    sum: Tensor
    """Scalar: alpha * T^2 * divergence + (1 - alpha) * nats. The only one with a gradient."""
    divergence: Tensor
    """Scalar: KL(teacher || student) at the temperature."""
    nats: Tensor
    """Scalar: -log p(next token) of the student at temperature 1."""


class Blend(NamedTuple):
    """How divergence and next-token loss are put together."""

    alpha: float
    temperature: float
    logit_cap: float | None = None
    """Of the student."""
    teacher_cap: float | None = None


def soft_loss(logits: Tensor, teacher_logits: Tensor, targets: Tensor, alpha: float, temperature: float) -> Matched:
    """Distillation (Hinton et al. 2015, §2) of logits and teacher's logits (B, T, V); targets (B, T), IGNORE does not count.

    T^2 makes the gradient of the divergence as large as at T = 1, whatever T is. The teacher gets no gradient. The plain maths:
    `soft_head_loss` is the same from one step earlier.
    """
    counts = targets != IGNORE  # (B, T)
    p = (teacher_logits.detach() / temperature).log_softmax(dim=-1)  # (B, T, V)
    q = (logits / temperature).log_softmax(dim=-1)
    divergence = ((p.exp() * (p - q)).sum(dim=-1) * counts).sum()
    nats = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return Matched(alpha * temperature**2 * divergence + (1 - alpha) * nats, divergence.detach(), nats.detach())


def soft_head_loss(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, targets: Tensor, blend: Blend
) -> Matched:
    """`soft_loss` of both heads' logits, without ever holding all of them.

    hidden (B, T, D), weight (V, D); the teacher's (B, T, D'), (V, D'); targets (B, T). As `train.loss.head_loss`, a chunk of
    positions at a time makes its logits and, at once and in the same place, their gradient: the memory is twice CHUNK_LOGITS
    numbers of the products' precision (on a GPU a few times in float32 too) and the gradient of the weight, where the plain loss
    holds B * T * V numbers about six times.
    """
    weight = weight if torch.is_grad_enabled() else weight.detach()
    return Matched(*_SoftHeadLoss.apply(hidden, weight, teacher_hidden.detach(), teacher_weight.detach(), targets, blend))


class _SoftHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, targets: Tensor, blend: Blend
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        rows, above = (states.flatten(0, 1).to(dtype) for states in (hidden, teacher_hidden))  # (N, D), (N, D')
        head, teacher_head = weight.to(dtype), teacher_weight.to(dtype)
        wants_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        drows = torch.empty_like(rows) if wants_grad else None
        dhead = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        totals = torch.zeros(2, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=hidden.device)
        size = max(1, CHUNK_LOGITS // weight.size(0))
        piece_size = max(1, PIECE_LOGITS // weight.size(0)) if kind == "cpu" else size
        with torch.autocast(kind, enabled=False):
            for part, wanted in zip(range(0, len(rows), size), targets.flatten().split(size), strict=True):
                chunk = rows[part : part + size]  # (n, D)
                logits = chunk @ head.mT  # (n, V)
                teacher_logits = above[part : part + size] @ teacher_head.mT  # (n, V)
                pieces = (some.split(piece_size) for some in (logits, teacher_logits, wanted))
                for piece, teacher_piece, piece_wanted in zip(*pieces, strict=True):
                    totals += _to_gradient(piece, teacher_piece, piece_wanted, totals.dtype, blend, wants_grad)
                if drows is not None:
                    drows[part : part + size] = logits @ head
                if dhead is not None:
                    dhead += logits.mT @ chunk
        if drows is not None:
            ctx.save_for_backward(drows.view_as(hidden).to(hidden.dtype), dhead)
        divergence, nats = totals.unbind()
        total = blend.alpha * blend.temperature**2 * divergence + (1 - blend.alpha) * nats
        divergence, nats = divergence.clone(), nats.clone()
        ctx.mark_non_differentiable(divergence, nats)
        return total, divergence, nats

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise NotImplementedError("`soft_head_loss` has no second derivative; soft_loss has")
        drows, dhead = ctx.saved_tensors
        return drows * grad, None if dhead is None else dhead * grad, None, None, None, None


def _to_gradient(
    logits: Tensor, teacher_logits: Tensor, targets: Tensor, dtype: torch.dtype, blend: Blend, wants_grad: bool
) -> Tensor:
    """Divergence and nats (2,) of logits (n, V), summed in `dtype`; the loss's gradient takes the logits' place if wanted."""
    alpha, temperature, cap, teacher_cap = blend
    counts = (targets != IGNORE).to(dtype)  # (n,)
    index = targets.clamp(min=0).unsqueeze(1)  # (n, 1)
    scores = capped(logits.to(dtype), cap)  # (n, V)
    log_p = capped(teacher_logits.to(dtype), teacher_cap).div(temperature).log_softmax(dim=1)
    log_q = (scores / temperature).log_softmax(dim=1)
    log_own = log_q if temperature == 1 else scores.log_softmax(dim=1)
    p = log_p.exp()
    divergence = (log_p.sub_(log_q).mul_(p).sum(dim=1) * counts).sum()
    nats = -(log_own.gather(1, index).squeeze(1) * counts).sum()
    if wants_grad:
        own = log_own.exp().scatter_add_(1, index, -torch.ones_like(index, dtype=dtype))  # softmax - one-hot
        slope = log_q.exp_().sub_(p).mul_(alpha * temperature).add_(own, alpha=1 - alpha)
        slope *= counts.unsqueeze(1)
        if cap is not None:
            slope *= 1 - (scores / cap).square()  # of the cap
        logits.copy_(slope)
    return torch.stack((divergence, nats))


def hidden_loss(states: Tensor, teacher_states: Tensor, targets: Tensor, kind: Literal["cosine", "mse"]) -> Tensor:
    """Distance of hidden states (B, T, D) from the teacher's, same shape, summed over the positions with a target; a scalar.

    mse: the squared difference, a mean over D (Jiao et al. 2020, TinyBERT, eq. 8). cosine: 1 - the cosine of the angle (Sanh et
    al. 2019, DistilBERT, §2), which no scale changes. The teacher gets no gradient.
    """
    wide = torch.promote_types(states.dtype, torch.float32)
    states, teacher_states = states.to(wide), teacher_states.detach().to(wide)
    if kind == "mse":
        distance = (states - teacher_states).square().mean(dim=-1)  # (B, T)
    else:
        distance = 1 - F.cosine_similarity(states, teacher_states, dim=-1)  # (B, T)
    return (distance * (targets != IGNORE)).sum()


def matched_layers(student_layers: int, teacher_layers: int) -> list[int]:
    """For each block of the student, the block of the teacher whose output its own is to resemble: the share of the way that is
    done by then, rounded up, so that the last belongs to the last."""
    return [-(-(layer + 1) * teacher_layers // student_layers) - 1 for layer in range(student_layers)]


def copied_layers(student_layers: int, teacher_layers: int) -> list[int]:
    """For each block of the student, the block of the teacher that it begins as: evenly spread, first and last among them.

    6 of 12: 0, 2, 4, 7, 9, 11, as in DistilBERT's code. A student of one block begins as the first.
    """
    return [round(layer * (teacher_layers - 1) / max(1, student_layers - 1)) for layer in range(student_layers)]
