"""Knobs of `glassgpt lab gradient-balance`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from glassgpt.config.errors import UserError, check_at_least, check_choices, check_seed
from glassgpt.config.tuning import Sft


@dataclass(frozen=True)
class GradientBalance:
    """Where the gradient of fine-tuning comes from: how much of it the instruction's tokens make, how much the response's, in
    every layer; and what it changes to learn the instruction too.

    Longer runs tell smaller differences apart, for example `--steps 200 --seeds 5 --batches 32`.
    """

    files: tuple[str, ...] = ()
    """Examples: JSON, JSONL (also .gz) or Parquet files, or `hf:OWNER/NAME`; as for `sft --data.files`."""
    model: str = "storyteller"
    """The model to start from: anything that `glassgpt generate` takes."""
    out_dir: str = "runs/gradient-balance"
    """Folder for results.json, the pictures and the finished parts; called again, it makes only the parts that are missing."""
    modes: tuple[str, ...] = ("response", "full", "weighted:0.1")
    """Losses to train with, as for `sft --loss`; the others are compared with the first."""
    template: Literal["chat", "none"] = "chat"
    """chat: the model's chat template; none: plain text, one after the other."""
    max_tokens: int = 128
    """Longest example in tokens, instruction and response together; longer ones are left out. 0 is the model's context."""
    held_out: int = 48
    """Examples kept apart for measuring."""
    batch_size: int = 8
    """Examples in a step, and in a batch whose gradient is taken apart."""
    batches: int = 8
    """Batches whose gradients are taken apart: the same ones at every point of every run."""
    points: int = 1
    """Times that this is done along the first seed's run of each mode, evenly spread up to its last step (0: only before)."""
    steps: int = 24
    """Optimiser steps of every run."""
    eval_interval: int = 6
    """Steps between measurements on the held-out examples (0: only at the beginning and the end)."""
    learning_rate: float = 2e-4
    """Peak learning rate of AdamW. Warm-up takes a tenth of the steps, a cosine leads to a tenth of the peak."""
    seeds: int = 3
    """Runs of each mode, with seeds `seed`, `seed` + 1, ...: of the order of the examples, which is one for all modes."""
    seed: int = 0
    """The first seed. It also parts the held-out examples from the others, and draws the batches."""
    device: str = "auto"
    """cpu, cuda, mps, or auto for the best there is."""
    json: bool = False
    """One JSON object instead of tables."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(1, self, "held_out", "batch_size", "batches", "steps", "seeds")
        check_at_least(0, self, "max_tokens", "points", "eval_interval")
        check_seed(self.seed)
        check_seed(self.seed + self.seeds - 1)
        if self.points > self.steps:
            raise UserError(f"points must be at most steps, {self.steps}; got {self.points}")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise UserError(f"learning_rate must be positive; got {self.learning_rate}")
        if not self.modes or len(set(self.modes)) != len(self.modes):
            raise UserError(f"modes must name at least one loss, and each once; got {' '.join(self.modes) or 'none'}")
        for mode in self.modes:
            weight_of(mode)


def weight_of(mode: str) -> float:
    """What a token outside the responses counts in a loss. Raises UserError for a name that is none."""
    return Sft(loss=mode).prompt_weight
