"""Knobs of speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass

from glassgpt.config.errors import UserError, check_at_least

MOST_PROPOSALS = 32
"""More in one pass would hardly ever all be right."""


@dataclass(frozen=True)
class Speculation:
    """Several tokens a pass: cheap guesses, checked by the model all at once. The text has the same distribution."""

    draft: str | None = None
    """A smaller model with the same tokenizer, which guesses the next tokens: the text is written in fewer passes."""
    lookup: int = 0
    """Guess what followed the last N tokens where they occurred before; for texts that quote (0: off)."""
    proposals: int = 8
    """Tokens to guess at a time, at most; fewer are guessed while they are wrong."""

    def __post_init__(self) -> None:
        check_at_least(0, self, "lookup")
        if not 1 <= self.proposals <= MOST_PROPOSALS:
            raise UserError(f"proposals must be between 1 and {MOST_PROPOSALS}; got {self.proposals}")
        if self.draft is not None and self.lookup:
            raise UserError("give --draft MODEL or --lookup N, not both")

    @property
    def is_on(self) -> bool:
        return self.draft is not None or self.lookup > 0
