"""Losses: pure functions of tensors that return (sum, count). The loop divides once, by the count of the whole step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.interpret.cost import CHUNK_LOGITS, PIECE_LOGITS
from glassgpt.model import GPT, Routes
from glassgpt.model.quantised import QuantisedLinear

IGNORE = -100
"""A target that nothing is learned from."""


@dataclass(frozen=True, eq=False)
class Loss:
    """A loss not yet divided."""

    sum: Tensor
    """Scalar: total over the supervised tokens, in nats."""
    count: Tensor
    """Scalar: supervised tokens, or their weights summed."""


def token_loss(logits: Tensor, targets: Tensor) -> Loss:
    """Cross-entropy -Σ log p(target) of logits (B, T, V) against targets (B, T); targets of IGNORE do not count.

    Half-precision logits are summed in float32. The plain maths: `head_loss` is the same from one step earlier.
    """
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return Loss(total, (targets != IGNORE).sum())


def head_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, logit_cap: float | None = None, weights: Tensor | None = None
) -> Loss:
    """`token_loss(capped(hidden @ weight.T, logit_cap), targets)` without ever holding all logits.

    hidden (B, T, D), weight (V, D), targets (B, T); `weights` (B, T) say what each target counts (1 if not given).
    A chunk of positions at a time makes its logits, their loss and, at once and in the same place, their gradient, and of it
    those of hidden and weight: the memory is CHUNK_LOGITS numbers of the product's precision (on a GPU in float32 too) and the
    gradient of the weight, where the plain loss holds B * T * V numbers three times. (The idea of Liger Kernel's fused linear
    cross-entropy, Hsu et al. 2024.)
    """
    weight = weight if torch.is_grad_enabled() else weight.detach()  # whose gradient would be computed for nothing
    supervised = targets != IGNORE
    worth = supervised if weights is None else weights * supervised
    return Loss(_HeadLoss.apply(hidden, weight, targets, logit_cap, worth), worth.sum())


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, logit_cap: float | None, worth: Tensor) -> Tensor:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        rows = hidden.flatten(0, 1).to(dtype)  # (N, D)
        head = weight.to(dtype)
        wants_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        drows = torch.empty_like(rows) if wants_grad else None
        dhead = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # none beside adapters: the head is frozen
        total = torch.zeros((), dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=hidden.device)
        size = max(1, CHUNK_LOGITS // weight.size(0))
        piece_size = max(1, PIECE_LOGITS // weight.size(0)) if kind == "cpu" else size
        with torch.autocast(kind, enabled=False):
            wholes = (targets.flatten().split(size), worth.flatten().split(size))
            for part, wanted, counts in zip(range(0, len(rows), size), *wholes, strict=True):
                chunk = rows[part : part + size]  # (n, D)
                logits = chunk @ head.mT  # (n, V)
                pieces = (some.split(piece_size) for some in (logits, wanted, counts))
                for piece, piece_wanted, piece_counts in zip(*pieces, strict=True):
                    total += _to_gradient(piece, piece_wanted, piece_counts, total.dtype, logit_cap, wants_grad)
                if drows is not None:
                    drows[part : part + size] = logits @ head
                if dhead is not None:
                    dhead += logits.mT @ chunk
        if drows is not None:
            ctx.save_for_backward(drows.view_as(hidden).to(hidden.dtype), dhead)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            raise NotImplementedError("`head_loss` has no second derivative; token_loss has")
        drows, dhead = ctx.saved_tensors
        return drows * grad, None if dhead is None else dhead * grad, None, None, None


def _to_gradient(
    logits: Tensor, targets: Tensor, worth: Tensor, dtype: torch.dtype, logit_cap: float | None, wants_grad: bool
) -> Tensor:
    """The loss of logits (n, V), summed in `dtype`; its gradient by the logits, before their cap, takes their place if wanted."""
    worth = worth.to(dtype)  # (n,): 0 where nothing is supervised
    index = targets.clamp(min=0).unsqueeze(1)  # (n, 1)
    scores = logits.to(dtype)  # (n, V): a copy, or the logits themselves
    slope = None
    if logit_cap is not None:
        scores.div_(logit_cap).tanh_()
        slope = 1 - scores.square()  # of the cap
        scores *= logit_cap
    scores -= scores.amax(dim=1, keepdim=True)
    target_score = scores.gather(1, index).squeeze(1)  # (n,)
    norm = scores.exp_().sum(dim=1)  # (n,)
    total = ((norm.log() - target_score) * worth).sum()
    if not wants_grad:
        return total
    scores.mul_((worth / norm).unsqueeze(1))  # softmax, 0 where nothing is supervised
    scores.scatter_add_(1, index, -worth.unsqueeze(1))
    if slope is not None:
        scores *= slope
    if scores is not logits:
        logits.copy_(scores)
    return total


@dataclass(frozen=True, eq=False)
class Routing:
    """How the routers of one forward pass have shared out the tokens, as means over the layers."""

    balance: Tensor
    """Scalar: E Σ f_e P_e, f the share of the choices that fell on an expert, P its mean probability (Fedus et al. 2021, eq. 4);
    1 when all is even, up to E when one expert gets everything."""
    z: Tensor
    """Scalar: mean of (log Σ_e exp score_e)² (Zoph et al. 2022, eq. 5)."""
    usage: Tensor
    """(L, E): share of each layer's choices that fell on each expert."""


def routing(routes: Routes, top_k: int) -> Routing:
    """Losses and statistics of the routers' logits, each (N, E)."""
    balance, z, usage = [], [], []
    for logits in (layer.float() if layer.dtype != torch.float64 else layer for layer in routes.logits):
        shares = logits.softmax(dim=-1)  # (N, E)
        chosen = F.one_hot(shares.topk(top_k, dim=-1).indices, logits.size(-1)).sum(dim=1)  # (N, E)
        usage.append(chosen.to(logits.dtype).mean(dim=0) / top_k)
        balance.append(logits.size(-1) * (usage[-1] * shares.mean(dim=0)).sum())
        z.append(logits.logsumexp(dim=-1).square().mean())
    return Routing(torch.stack(balance).mean(), torch.stack(z).mean(), torch.stack(usage))


class Scored(nn.Module):
    """A model and its loss in one forward pass, as training and evaluation run it: `scored(ids, targets)` -> nats, summed."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        ids: Tensor,
        targets: Tensor,
        segments: Tensor | None = None,
        routes: Routes | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """ids, targets, segments, weights (B, T); a scalar, differentiable. Routers leave their logits in `routes`, if given.

        In training the gradient of a mixture of experts has the routers' losses in it, times the number of tokens; the value is
        the plain loss all the same.
        """
        config = self.model.config
        if routes is None and config.moe.experts and self.training:
            routes = Routes()
        hidden = self.model.hidden(ids, segments=segments, routes=routes)
        if isinstance(self.model.head, QuantisedLinear):
            hidden = self.model.head.rounded(hidden)
        loss = head_loss(hidden, self.model.head.weight, targets, config.logit_cap, weights)
        if routes is None or not self.training:
            return loss.sum
        shared_out = routing(routes, config.moe.top_k)
        more = loss.count * (config.moe.balance_loss * shared_out.balance + config.moe.z_loss * shared_out.z)
        return loss.sum + (more - more.detach())
