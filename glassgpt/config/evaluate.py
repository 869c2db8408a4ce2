"""Knobs of `glassgpt evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from glassgpt.config.errors import UserError, check_at_least


@dataclass(frozen=True)
class Evaluate:
    """Measure how well a model predicts text: loss, perplexity, bits per byte."""

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    """A bundled model, a run folder, a Hugging Face folder or a downloaded hub id."""
    sources: tuple[str, ...] = ("embedded",)
    """Text files, folders or JSONL files, as for `pretrain --data.sources`."""
    holdout_share: float = 1.0
    """Read only the documents that `pretrain` holds out for this share (1: all of them)."""
    stride_tokens: int | None = None
    """Tokens from one window to the next; below the context, every token but the first window's sees at least
    context - stride tokens before it. Default: the context, each token once, with what its window happens to hold."""
    batch_size: int = 8
    """Windows at once."""
    device: str = "auto"
    """cpu, cuda, mps, or auto for the best there is."""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass, as for `pretrain`."""
    json: bool = False
    """One JSON object instead of a line."""

    def __post_init__(self) -> None:
        if not 0 < self.holdout_share <= 1:
            raise UserError(f"holdout_share must be above 0 and at most 1; got {self.holdout_share}")
        check_at_least(1, self, "batch_size", "stride_tokens")
