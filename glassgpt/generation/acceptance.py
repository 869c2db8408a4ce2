"""Counts of speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Acceptance:
    """How good the guesses were, counted while the text is written."""

    proposed: int = 0
    accepted: int = 0
    passes: int = 0
    """Forward passes of the model, those that read the prompts included."""
    tokens: int = 0
    """Tokens written."""

    def as_json(self) -> dict[str, float | None]:
        share = self.accepted / self.proposed if self.proposed else None
        return vars(self) | {"acceptance": share, "tokens_a_pass": self.tokens / self.passes if self.passes else None}
