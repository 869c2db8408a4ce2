"""Losses: pure functions of tensors that return (sum, count). The loop divides once, by the count of the whole step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""A target that nothing is learned from."""


@dataclass(frozen=True, eq=False)
class Loss:
    """A loss not yet divided."""

    sum: Tensor
    """Scalar: total over the supervised tokens, in nats."""
    count: Tensor
    """Scalar int64: supervised tokens."""


def token_loss(logits: Tensor, targets: Tensor) -> Loss:
    """Cross-entropy -Σ log p(target) of logits (B, T, V) against targets (B, T); targets of IGNORE do not count.

    Half-precision logits are summed in float32.
    """
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return Loss(total, (targets != IGNORE).sum())
