"""Steering vectors: push the residual stream in a direction found by contrast (Turner et al. 2023, Rimsky et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from glassgpt.config import UserError
from glassgpt.interpret.attribution import checked
from glassgpt.interpret.hooks import capture, edit
from glassgpt.model import GPT


@torch.no_grad()
def steering_vector(
    model: GPT, layer: int, wanted: Sequence[Tensor], unwanted: Sequence[Tensor], position: int | None = -1
) -> Tensor:
    """(D,): the mean residual stream after block `layer` in the wanted prompts, minus that in the unwanted ones.

    Prompts are (T,) each, of any lengths. Taken at one `position` of each (the last, as Rimsky et al. do), or None for the
    mean over a prompt's positions. Raises UserError for no prompts, no such layer, a prompt that is too short or too long or no
    ids (T,) of this model's, and for a model in training mode with dropout.
    """
    name = _name(model, layer)
    if not len(wanted) or not len(unwanted):
        raise UserError(f"expected prompts of both kinds; got {len(wanted)} wanted and {len(unwanted)} unwanted")

    def mean(prompts: Sequence[Tensor]) -> Tensor:
        found = []
        for ids in prompts:
            ids, place = checked(model, ids, -1 if position is None else position)
            with capture(model, name) as seen:
                model.hidden(ids.unsqueeze(0))
            found.append(seen[name][0].mean(0) if position is None else seen[name][0, place])
        return torch.stack(found).mean(0)

    return mean(wanted) - mean(unwanted)


@contextmanager
def steer(model: GPT, layer: int, vector: Tensor, scale: float = 1.0, positions: Sequence[int] | None = None) -> Iterator[None]:
    """In here the residual stream after block `layer` has `scale * vector` added, in generation with a cache too.

    `positions` count from the start of the text (of the padded row, where a batch is padded on the left); None is all of them,
    those of new tokens included. One beyond the text has its effect when the text has grown to it, with a cache. Raises
    UserError for no such layer, for a vector that is not (D,), and for positions that are not whole numbers from 0 up.
    """
    name = _name(model, layer)
    weight = model.token_embedding.weight
    if vector.shape != (model.config.width,):
        raise UserError(f"the steering vector must be ({model.config.width},), the model's width; got {tuple(vector.shape)}")
    shift = (scale * vector).to(weight)
    chosen = None if positions is None else torch.tensor(list(positions), device=weight.device)
    if chosen is not None and len(chosen) and (chosen.is_floating_point() or int(chosen.min()) < 0):
        raise UserError(f"positions must be whole numbers from 0 up, counted from the text's start; got {positions}")
    start = 0

    def find_start(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal start  # read before the block: the last one makes the cache longer
        cache = inputs[2] if len(inputs) > 2 else None
        start = 0 if cache is None else cache.length

    def pushed(x: Tensor) -> Tensor:
        if chosen is None:
            return x + shift
        here = torch.isin(torch.arange(start, start + x.size(1), device=x.device), chosen)  # (T,)
        return torch.where(here.unsqueeze(1), x + shift, x)

    with edit(model, {name: pushed}):
        handle = model.blocks[layer].register_forward_pre_hook(find_start)
        try:
            yield
        finally:
            handle.remove()


def _name(model: GPT, layer: int) -> str:
    if not 0 <= layer < len(model.blocks):
        raise UserError(f"no layer {layer}: the model has 0 to {len(model.blocks) - 1}")
    return f"blocks.{layer}"
