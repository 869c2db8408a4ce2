"""Knobs of `glassgpt lab alignment`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from glassgpt.config.errors import UserError, check_at_least, check_seed

FEWEST_PROBLEMS, MOST_HELD_OUT = 8, 2000
"""Of 5,050 sums that there are."""


@dataclass(frozen=True)
class Alignment:
    """PPO, DPO and GRPO from one small start model: a reward that is the goal, and one that only stands for it and is gamed.

    The task is adding numbers of one and two digits. Experiment `goal` rewards the exact answer. Experiment `proxy` rewards
    answers that have the right number somewhere in them, and longer ones more; whether an answer is that number and nothing else
    is measured, and no training sees it.
    """

    out_dir: str = "runs/alignment"
    """Folder for the start model, the runs, results.json and the chart; called again, it trains only what is missing."""
    school_steps: int = 1000
    """Steps of `sft` from random weights on right answers: it learns to add."""
    start_steps: int = 150
    """Steps of `sft` after them on the answers of people who are often wrong: it learns to answer as they do."""
    right_share: float = 0.25
    """Share of the start's examples that answer with the right number; but for the lists, the others are wrong."""
    list_share: float = 0.17
    """Share of the start's examples that answer with two or three neighbouring numbers, the right one among them."""
    steps: int = 100
    """Steps of every run after it."""
    measurements: int = 10
    """Times that each run is measured, its end included; the start is measured beside them."""
    prompts: int = 256
    """Held-out problems that each measurement asks, once each."""
    batch_size: int = 16
    """Prompts in a step of GRPO; PPO sees `group_size` times as many, and DPO half of that in pairs: as many answers each."""
    group_size: int = 8
    """Answers of GRPO to a prompt; also those of the start model that DPO's pairs are made from."""
    learning_rate: float = 5e-4
    """Of PPO and GRPO."""
    dpo_learning_rate: float = 1e-4
    """Of DPO, which learns from the same pairs again and again."""
    beta: float = 0.1
    """The leash of PPO and GRPO in experiment `proxy`; the other run there, and those for the goal, have 0."""
    dpo_betas: tuple[float, float] = (0.02, 0.5)
    """The loose and the tight leash of DPO, whose beta cannot be 0: its margin is a multiple of it. The goal has the loose."""
    seed: int = 0
    """Seed of problems, weights, order and sampling."""
    device: str = "auto"
    """cpu, cuda, mps, or auto for the best there is."""
    json: bool = False
    """One JSON object instead of the table."""

    def __post_init__(self) -> None:
        check_at_least(1, self, "school_steps", "start_steps", "steps", "measurements", "batch_size")
        check_at_least(2, self, "group_size")
        check_seed(self.seed)
        if not FEWEST_PROBLEMS <= self.prompts <= MOST_HELD_OUT:
            raise UserError(f"prompts must be between {FEWEST_PROBLEMS} and {MOST_HELD_OUT}; got {self.prompts}")
        if not 0 <= self.list_share <= 1 - self.right_share <= 1:
            raise UserError(f"right_share and list_share are shares of one whole; got {self.right_share} and {self.list_share}")
        for name, value in (
            ("learning_rate", self.learning_rate),
            ("beta", self.beta),
            *(("dpo_betas", b) for b in self.dpo_betas),
        ):
            if not (value > 0 and math.isfinite(value)):
                raise UserError(f"{name} must be positive; got {value}")
        if self.measurements > self.steps:
            raise UserError(f"measurements must be at most steps; got {self.measurements} and {self.steps}")

    @property
    def interval(self) -> int:
        """Steps between measurements."""
        return math.ceil(self.steps / self.measurements)
