"""Knobs of `glassgpt generate`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from glassgpt.config.compute import Compute, Dtype
from glassgpt.config.errors import UserError, check_at_least
from glassgpt.config.speculation import Speculation


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the model's logits.

    Applied in this order: penalties, temperature, top-k, top-p, min-p.
    """

    temperature: float = 1.0
    """Logits are divided by it: below 1 sharper, above 1 flatter; 0 takes the most likely token, always."""
    top_k: int = 0
    """Draw from the k most likely tokens (0: all)."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens whose probabilities reach p."""
    min_p: float = 0.0
    """Draw from tokens at least min_p times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or the text so far (1: off)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the text written so far."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time it was written so far."""

    def __post_init__(self) -> None:
        self._require("temperature", self.temperature >= 0, "at least 0 (0 is greedy)")
        self._require("top_k", self.top_k >= 0, "at least 0 (0 keeps all tokens)")
        self._require("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._require("min_p", 0 <= self.min_p <= 1, "between 0 and 1")
        self._require("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "between 0.01 and 100 (1 is off)")
        self._require("presence_penalty", abs(self.presence_penalty) <= 100, "between -100 and 100")
        self._require("frequency_penalty", abs(self.frequency_penalty) <= 100, "between -100 and 100")

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens so far matter."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    def _require(self, name: str, holds: bool, expected: str) -> None:
        value = getattr(self, name)
        if not (holds and math.isfinite(value)):
            raise UserError(f"{name} must be {expected}; got {value}")


@dataclass(frozen=True)
class Generate:
    """Continue one or more prompts."""

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    """A bundled model, a run folder, a Hugging Face folder or a downloaded hub id."""
    prompt: Annotated[tuple[str, ...], Positional, arg(metavar="PROMPT")] = ()
    """Texts to continue; several are run as one batch."""
    prompt_file: str | None = None
    """Read one more prompt from this UTF-8 file (- is standard input)."""
    max_new_tokens: int = 128
    """Tokens to write at most."""
    sampling: OmitArgPrefixes[Sampling] = field(default_factory=lambda: Sampling(temperature=0.8))
    stop: tuple[str, ...] = ()
    """Texts at which to stop; they are not shown."""
    seed: int | None = None
    """Equal seeds give equal text; a random one is drawn, and shown with --json, when not given."""
    n: int = 1
    """Continuations of each prompt."""
    overflow: Literal["error", "drop-oldest"] = "error"
    """What to do with a prompt longer than the context: refuse it, or cut its beginning so that there is room to write."""
    logprobs: int | None = None
    """Show each token's log-probability, and this many of the likeliest alternatives."""
    ignore_end: bool = False
    """Write on after the end-of-text token."""
    device: str = "auto"
    """cpu, cuda, mps, or auto for the best there is."""
    compute: OmitArgPrefixes[Compute] = field(default_factory=Compute)
    dtype: Dtype | None = None
    """The older name of --precision."""
    speculation: OmitArgPrefixes[Speculation] = field(default_factory=Speculation)
    json: bool = False
    """One JSON object instead of text."""

    def __post_init__(self) -> None:
        check_at_least(1, self, "max_new_tokens", "n")
        check_at_least(0, self, "logprobs")
        if "" in self.stop:
            raise UserError("a stop text is empty; give at least one character")
