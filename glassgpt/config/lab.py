"""Knobs of `glassgpt demo`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from glassgpt.config.errors import UserError, check_seed


@dataclass(frozen=True)
class Demo:
    """A GPT-2 at work in two minutes: what it is made of, what it writes at three temperatures, how it learns."""

    model: str = "storyteller"
    """The model to look at."""
    prompt: str = "Once upon a time, in a little house by the sea, there lived"
    """The text that it continues."""
    out_dir: str = "demo"
    """Folder for the pictures and the small training run."""
    train_seconds: float = 60.0
    """Time for the small training run."""
    seed: int = 0
    """Seed of texts and training."""

    def __post_init__(self) -> None:
        if not 0 < self.train_seconds < math.inf:
            raise UserError(f"train_seconds must be positive; got {self.train_seconds}")
        check_seed(self.seed)
