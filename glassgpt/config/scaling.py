"""Knobs of `glassgpt lab scaling`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from glassgpt.config.errors import UserError, check_at_least, check_seed

HEAD_WIDTH = 16
"""Width of one attention head in every model of the ladder."""
FEWEST = 3
"""Sizes and budgets that a joint fit with a run left out needs."""
FEWEST_RESAMPLES = 40
"""Below this the 2.5th and the 97.5th percentile are the extremes themselves."""


@dataclass(frozen=True)
class Scaling:
    """Scaling laws on your own machine: train a ladder of sizes on several token budgets, fit, predict a run left out."""

    out_dir: str = "runs/scaling"
    """Folder for the runs, scaling.json and the pictures; called again, it trains only what is missing."""
    sources: tuple[str, ...] = ("embedded",)
    """Text files, folders or JSONL files, as for `pretrain --data.sources`."""
    tokenizer: str | None = None
    """A tokenizer file or folder; when not given, one of `vocab_size` ids is trained on the sources. One for all runs."""
    vocab_size: int = 512
    """Ids of the tokenizer that is trained."""
    widths: tuple[int, ...] = (16, 32, 48, 64, 80, 96)
    """Sizes: widths of the residual stream, multiples of 16 (a head's width). A model of width D has max(2, D // 32) blocks."""
    token_budgets: tuple[int, ...] = (61_440, 122_880, 245_760, 491_520, 983_040)
    """Tokens seen in training, rounded down to whole steps. Each budget is a run of its own, with its own decay."""
    context_tokens: int = 128
    """Tokens in a sequence."""
    batch_size: int = 2
    """Sequences in a step. Few, as budgets are small: at width 64 and 123 thousand tokens, 2 sequences reached 4.27 nats per
    token, 8 sequences 4.84 (learning rate 2e-3)."""
    learning_rate: float = 2e-3
    """Peak learning rate at width 64; at width D it is this * sqrt(64 / D). Warm-up takes a tenth of the steps."""
    seeds: int = 1
    """Runs of each size and budget, with seeds `seed`, `seed` + 1, ..."""
    bootstrap: int = 200
    """Resamples of the runs behind each 95 % interval."""
    seed: int = 0
    """First seed of the runs, and the seed of the resampling."""
    device: str = "auto"
    """cpu, cuda, mps, or auto for the best there is."""
    json: bool = False
    """One JSON object instead of tables."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("sources is empty; name at least one file or folder, or `embedded`")
        check_at_least(1, self, "context_tokens", "batch_size", "seeds")
        if self.tokenizer is None and self.vocab_size < 257:
            raise UserError(f"vocab_size must be at least 257 (256 bytes and the end-of-text token); got {self.vocab_size}")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise UserError(f"learning_rate must be positive; got {self.learning_rate}")
        if self.bootstrap < FEWEST_RESAMPLES:
            raise UserError(f"bootstrap must be at least {FEWEST_RESAMPLES} for a 95 % interval; got {self.bootstrap}")
        check_seed(self.seed)
        check_seed(self.seed + self.seeds - 1)
        for width in self.widths:
            if width < HEAD_WIDTH or width % HEAD_WIDTH:
                raise UserError(f"widths must be multiples of {HEAD_WIDTH}, the width of a head; got {width}")
        for budget in self.token_budgets:
            if budget < self.step_tokens:
                raise UserError(
                    f"token_budgets must hold at least one step, batch_size * context_tokens = {self.step_tokens}; got {budget}"
                )
        sizes, steps = set(self.widths), {budget // self.step_tokens for budget in self.token_budgets}
        if len(sizes) != len(self.widths):
            raise UserError(f"widths must differ from one another; got {_listed(self.widths)}")
        if len(steps) != len(self.token_budgets):
            raise UserError(
                f"token_budgets must differ by at least one step of {self.step_tokens} tokens; got {_listed(self.token_budgets)}"
            )
        for name, count in (("widths", len(sizes)), ("token_budgets", len(steps))):
            if count < FEWEST:
                raise UserError(f"a joint fit with a run left out needs at least {FEWEST} {name}; got {count}")

    @property
    def step_tokens(self) -> int:
        """Tokens that one optimiser step sees."""
        return self.batch_size * self.context_tokens


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
