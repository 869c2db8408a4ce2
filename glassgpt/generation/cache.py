"""The key/value cache: what attention has computed for earlier positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glassgpt.config import ModelConfig

GROWTH = 128
"""Positions added at a time, so that short texts do not pay for the whole context."""


class KVCache:
    """Keys and values of every layer, (B, H, S, W) each. Made per generation and passed in; nothing stays on the model.

    B batch, H heads, S positions so far, W head width. Memory: 2 * L * B * S * D numbers.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.length = 0
        self._limit = config.context_tokens
        self._k: list[Tensor | None] = [None] * config.n_layer
        self._v: list[Tensor | None] = [None] * config.n_layer

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, H, T, W) to a layer; returns all its keys and values (B, H, S, W). The last layer ends the step."""
        end = self.length + k.size(2)
        keys = self._k[layer] = self._with_room(self._k[layer], k, end)
        values = self._v[layer] = self._with_room(self._v[layer], v, end)
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        if layer == len(self._k) - 1:
            self.length = end
        return keys[:, :, :end], values[:, :, :end]

    def _with_room(self, held: Tensor | None, new: Tensor, end: int) -> Tensor:
        if held is not None and held.size(2) >= end:
            return held
        room = max(end, min(self._limit, -(-end // GROWTH) * GROWTH))
        bigger = new.new_empty(new.size(0), new.size(1), room, new.size(3))
        if held is not None:
            bigger[:, :, : self.length] = held[:, :, : self.length]
        return bigger

    def keep(self, rows: Tensor, drop: int = 0) -> None:
        """Keep only these rows (1-D indices) of the batch, without their first `drop` positions: what is over costs nothing."""
        self._k = [None if k is None else k[rows, :, drop : self.length] for k in self._k]
        self._v = [None if v is None else v[rows, :, drop : self.length] for v in self._v]
        self.length -= drop

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in (*self._k, *self._v) if t is not None)


def as_batch(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Prompts of different length as one (B, T) tensor padded on the left, and the padding of each row (B,), None if none."""
    longest = max(map(len, prompts))
    pad = torch.tensor([longest - len(ids) for ids in prompts], device=device)
    ids = torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in prompts], device=device)
    return ids, pad if bool(pad.any()) else None
