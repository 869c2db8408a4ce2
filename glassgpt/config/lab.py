"""Knobs of `glassgpt demo` and `glassgpt bench generate`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from glassgpt.config.errors import UserError, check_at_least, check_seed


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


@dataclass(frozen=True)
class Bench:
    """Prefill and decoding side by side with `transformers`, in one run, as ratios."""

    preset: str = "gpt2"
    """Shape of the network; its weights are random, as speed does not depend on them."""
    prompt_tokens: int = 32
    """Tokens of the prompt."""
    new_tokens: int = 64
    """Tokens to write."""
    batch_size: int = 1
    """Prompts at once."""
    repeats: int = 5
    """Interleaved repeats; medians are reported."""
    threads: int | None = None
    """CPU threads for both sides (default: PyTorch's)."""
    json: bool = False
    """One JSON object instead of a table."""

    def __post_init__(self) -> None:
        check_at_least(1, self, "prompt_tokens", "new_tokens", "batch_size", "repeats", "threads")
