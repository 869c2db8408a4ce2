"""What a smaller model loses: bits per byte, and how often its likeliest next token is the original's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glassgpt.data.progress import tracked
from glassgpt.model import GPT

ROWS = 4
"""Windows in one forward pass."""


@dataclass(frozen=True)
class Quality:
    """Of a model on some text, beside the original's."""

    bits_per_byte: float
    equal_greedy: float
    """Share of the places where its likeliest next token is the original's."""
    tokens: int


class Yardstick:
    """Windows of text (N, T + 1), and what the original model would write at each of their places."""

    def __init__(self, original: GPT, windows: Tensor, byte_lengths: Tensor) -> None:
        """`byte_lengths` (V,) holds the bytes behind each id."""
        self._windows, self._bytes = windows, int(byte_lengths[windows[:, 1:]].sum())
        self.tokens = windows[:, 1:].numel()
        nats, self._greedy = self._read(original, "the original")
        self.original = Quality(self._bits_per_byte(nats), 1.0, self.tokens)

    def measure(self, model: GPT, title: str = "measuring") -> Quality:
        nats, greedy = self._read(model, title)
        return Quality(self._bits_per_byte(nats), float((greedy == self._greedy).double().mean()), self.tokens)

    def _bits_per_byte(self, nats: float) -> float:
        return nats / math.log(2) / max(1, self._bytes)

    @torch.no_grad()
    def _read(self, model: GPT, title: str) -> tuple[float, Tensor]:
        """The summed loss in nats, and the likeliest token at each place (N, T)."""
        device, nats, greedy = next(model.parameters()).device, 0.0, []
        for rows in tracked(self._windows.split(ROWS), title):
            ids, targets = rows[:, :-1].to(device), rows[:, 1:].to(device)
            logits = model(ids).float()  # (n, T, V)
            nats += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
            greedy.append(logits.argmax(dim=-1).cpu())
        return nats, torch.cat(greedy)
