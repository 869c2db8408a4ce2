"""What penalties look at: the tokens that each row has seen, and those that it wrote."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from glassgpt.config.generate import Sampling
from glassgpt.generation.generator import Generator
from glassgpt.generation.runner import Scores
from glassgpt.generation.sampling import choose, penalised


class History:
    """Which tokens each row has seen (B, V) and how often it wrote each one (B, V)."""

    def __init__(self, prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device | None = None) -> None:
        with torch.inference_mode(False):  # the caller's mode may be another at the next token, and they are written in place
            self.seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
            self.written = torch.zeros(len(prompts), vocab_size, device=device)
        for row, ids in enumerate(prompts):
            self.seen[row, list(ids)] = True

    def draw(self, scores: Scores, sampling: Sampling, generators: Sequence[Generator]) -> list[int]:
        """The next token of each row; it is not counted yet."""
        with torch.inference_mode():
            drawn: list[int] = choose(penalised(scores.logits, sampling, self.seen, self.written), sampling, generators).tolist()
        return drawn

    def add(self, drawn: Sequence[int]) -> None:
        """Count one new token a row."""
        ids = torch.tensor(drawn, device=self.seen.device)[:, None]  # (B, 1)
        self.seen.scatter_(1, ids, True)
        self.written.scatter_add_(1, ids, torch.ones_like(ids, dtype=self.written.dtype))

    def keep(self, rows: Sequence[int]) -> None:
        rows = list(rows)
        with torch.inference_mode(False):
            self.seen, self.written = self.seen[rows], self.written[rows]
