"""Knobs of `glassgpt lab coherence`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from glassgpt.config.errors import UserError, check_at_least, check_seed


@dataclass(frozen=True)
class Coherence:
    """How far back a model looks: loss by position, loss with the context cut, and whether a prompt's words come again."""

    model: Annotated[str, Positional, arg(metavar="MODEL")] = "storyteller"
    """A bundled model, a run folder, a Hugging Face folder or a downloaded hub id."""
    source: tuple[str, ...] = ("embedded",)
    """Text that the model has not learnt from: files or folders as for `pretrain --data.sources`."""
    holdout_share: float = 1.0
    """Read only the documents that `pretrain` holds out for this share (1: all of them)."""
    context_tokens: int | None = None
    """Longest context to try (default: the model's). Documents that are not longer are left out."""
    windows: int = 64
    """Stretches of text for the loss by position, from as many documents as there are."""
    targets: int = 512
    """Tokens to predict with the context cut to 1, 2, 4, ... tokens."""
    prompts: int = 24
    """Beginnings that are continued, to see whether their words come again (0: none)."""
    prompt_tokens: int = 64
    """Tokens of each beginning."""
    new_tokens: int = 192
    """Tokens written after it."""
    temperature: float = 0.8
    """Of the texts."""
    resamples: int = 2000
    """Of the documents, for the 95 % intervals."""
    batch_tokens: int = 8192
    """Tokens in a forward pass."""
    out_dir: str = "runs/coherence"
    """Folder for results.json, tables, report.md and the picture; they replace those of an earlier call."""
    seed: int = 0
    """Seed of windows, texts and intervals."""
    device: str = "auto"
    """cpu, cuda, mps, or auto for the best there is."""
    json: bool = False
    """One JSON object instead of tables."""

    def __post_init__(self) -> None:
        check_at_least(2, self, "windows", "targets", "context_tokens")
        check_at_least(0, self, "prompts")
        check_at_least(1, self, "prompt_tokens", "new_tokens", "resamples", "batch_tokens")
        check_seed(self.seed)
        if self.prompts == 1:
            raise UserError("prompts must be 0 or at least 2: a text is compared with the prompts of others; got 1")
        if not 0 < self.holdout_share <= 1:
            raise UserError(f"holdout_share must be above 0 and at most 1; got {self.holdout_share}")
        if not self.temperature >= 0:
            raise UserError(f"temperature must be at least 0; got {self.temperature}")
