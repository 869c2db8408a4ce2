"""Knobs of `glassgpt info`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from glassgpt.config.errors import check_at_least


@dataclass(frozen=True)
class Info:
    """Show what a model is made of: parameters, queries, keys and values by head, memory. No weights are loaded."""

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    """A bundled model, a run folder, a Hugging Face folder, a downloaded hub id, or a preset (gpt2, gpt3-175b, ...)."""
    all: bool = False
    """List every tensor instead of folding equal blocks into one."""
    json: bool = False
    """One JSON object instead of tables."""
    batch_size: int = 1
    """Sequences in the batch whose memory is estimated."""
    context_tokens: int | None = None
    """Tokens in each of them; the model's whole context when not given."""

    def __post_init__(self) -> None:
        check_at_least(1, self, "batch_size", "context_tokens")
