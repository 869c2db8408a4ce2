"""Knobs of `glassgpt lab qkv`."""

from __future__ import annotations

from dataclasses import dataclass

from glassgpt.config.errors import UserError, check_at_least, check_seed


@dataclass(frozen=True)
class Qkv:
    """One fused matrix for queries, keys and values against three, and a tied head against one of its own: speed, memory, loss.

    All side by side in one run: timings take turns, memory is measured in processes of their own, trainings see the same batches.
    """

    preset: str = "storyteller"
    """Shape for speed and memory; its weights are random."""
    batch_size: int = 4
    """Sequences in a forward pass and in a training step."""
    context_tokens: int = 256
    """Tokens of each."""
    cached_tokens: int = 128
    """Tokens in the cache when single tokens are decoded, one sequence."""
    rounds: int = 15
    """Turns of each; medians are reported, with intervals of the ratios within turns."""
    train_preset: str = "nano"
    """Shape of the small trainings."""
    sources: tuple[str, ...] = ("embedded",)
    """Text for them, as for `pretrain --data.sources`; a twentieth is held out. The tokenizer is made from it."""
    steps: int = 200
    """Optimiser steps of each training (0: none)."""
    train_batch_size: int = 8
    """Sequences in a step."""
    eval_interval: int = 25
    """Steps between measurements on held-out text."""
    eval_batches: int = 16
    """Batches of held-out text."""
    learning_rate: float = 5e-4
    """Peak learning rate of AdamW. At 2e-3 `nano` magnifies rounding to a hundredth of a nat in 60 steps, at 5e-4 not at all."""
    seeds: int = 3
    """Trainings of tied and untied heads each, with seeds `seed`, `seed` + 1, ...: of the numbers and of the batches."""
    seed: int = 0
    """The first seed."""
    threads: int | None = None
    """CPU threads (default: PyTorch's)."""
    out_dir: str = "runs/qkv"
    """Folder for results.json, timings.csv, report.md and the picture; they replace those of an earlier call."""
    device: str = "auto"
    """cpu, cuda, or auto for the best there is."""
    json: bool = False
    """One JSON object instead of tables."""

    def __post_init__(self) -> None:
        check_at_least(1, self, "batch_size", "context_tokens", "cached_tokens", "train_batch_size", "eval_interval")
        check_at_least(1, self, "eval_batches", "seeds", "threads")
        check_at_least(2, self, "rounds")
        check_at_least(0, self, "steps")
        check_seed(self.seed)
        check_seed(self.seed + self.seeds - 1)
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate must be positive; got {self.learning_rate}")
