"""The key/value cache: what attention has computed for earlier positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glassgpt.config import ModelConfig

GROWTH = 128
"""Positions added at a time, so that short texts do not pay for the whole context."""


class KVCache:
    """Keys and values of every layer, (B, G, S, W) each. Made per generation and passed in; nothing stays on the model.

    B batch, G heads of keys and values, S positions held, W head width. A layer that sees a window holds no more than the window
    and `spare` positions, which is how many `rewind` can take back. Memory: 2 * B * G * W numbers a layer and position.
    """

    def __init__(self, config: ModelConfig, spare: int = 0) -> None:
        self.length = 0
        self._spare = spare
        self._limit = config.context_tokens
        spans = [config.span(layer) for layer in range(config.n_layer)]
        self._windows = [config.window_tokens if span == "window" else None for span in spans]
        self._k: list[Tensor | None] = [None] * config.n_layer
        self._v: list[Tensor | None] = [None] * config.n_layer

    def held(self, layer: int) -> int:
        """Positions that a layer still holds, the newest: a token sees itself and what else its window has room for."""
        window = self._windows[layer]
        return self.length if window is None else min(self.length, window - 1)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, G, T, W) to a layer; returns all that it holds with them (B, G, S, W). The last layer ends the step."""
        if self._windows[layer] is None:
            keys, values = self._appended(layer, k, v)
        else:
            keys, values = self._slid(layer, k, v)
        if layer == len(self._k) - 1:
            self.length += k.size(2)
        return keys, values

    def _appended(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + k.size(2)
        keys = self._k[layer] = self._with_room(self._k[layer], k, end)
        values = self._v[layer] = self._with_room(self._v[layer], v, end)
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def _slid(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        held, room = self.held(layer), (self._windows[layer] or 0) + self._spare
        before_k, before_v = self._k[layer], self._v[layer]
        keys = k if before_k is None else torch.cat((before_k, k), dim=2)
        values = v if before_v is None else torch.cat((before_v, v), dim=2)
        self._k[layer], self._v[layer] = (x[:, :, -room:].clone() for x in (keys, values))  # not a view of something larger
        first = keys.size(2) - k.size(2) - held
        return keys[:, :, first:], values[:, :, first:]

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
        before = self.length
        self.length -= drop
        for layer, window in enumerate(self._windows):
            for tensors in (self._k, self._v):
                if (tensor := tensors[layer]) is not None:
                    end = before if window is None else tensor.size(2)
                    held = min(end, self.length, self.held(layer) + self._spare)
                    tensors[layer] = tensor[rows, :, end - held : end]

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` positions. Raises ValueError where a window no longer holds what it would see."""
        cut = self.length - length
        self.length = length
        for layer, window in enumerate(self._windows):
            for tensors in (self._k, self._v):
                if window is not None and (tensor := tensors[layer]) is not None:
                    left = tensor.size(2) - cut
                    if left < self.held(layer):
                        raise ValueError(f"a window can take back at most {self._spare} positions; got {cut}")
                    tensors[layer] = tensor[:, :, :left]

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
