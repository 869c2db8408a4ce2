"""Activations as numbers to learn from: one vector for each token of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glassgpt.config import UserError
from glassgpt.interpret.hooks import capture
from glassgpt.model import GPT


@torch.no_grad()
def activations(model: GPT, names: Sequence[str], ids: Tensor) -> dict[str, Tensor]:
    """The activations (B, T, D) of these names over ids (B, T), in float32 or wider.

    Raises UserError for a name that the model has not or that has not one vector a token (such as attn.pattern, or a pattern of
    several names), for ids of another shape, and for a model that drops activations at random.
    """
    check_no_dropout(model)
    if ids.dim() != 2:
        raise UserError(f"expected batches of token ids, shape (B, T); got {tuple(ids.shape)}")
    with capture(model, list(names)) as seen:
        model.hidden(ids.to(model.head.weight.device))
    for name in names:
        shape = tuple(seen[name].shape) if name in seen else None
        if shape is None or len(shape) != 3 or shape[:2] != tuple(ids.shape):
            raise UserError(f"{name!r} is not one activation with a vector for each token, (B, T, width); try blocks.0")
    return {name: seen[name].to(torch.promote_types(seen[name].dtype, torch.float32)) for name in names}


def check_no_dropout(model: nn.Module) -> None:
    """Raises UserError for a model in training mode with dropout: a second run would give other numbers."""
    if any(isinstance(module, nn.Dropout) and module.training and module.p > 0 for module in model.modules()):
        raise UserError("the model is in training mode and drops activations at random; call model.eval() first")
