"""Knobs of `glassgpt pretrain`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from glassgpt.config.errors import UserError, check_seed
from glassgpt.config.model import PRESETS, ModelConfig


@dataclass(frozen=True)
class DataConfig:
    """What to learn from."""

    sources: tuple[str, ...] = ("embedded",)
    """Text files, folders, JSONL files with a `text` field (each also as .gz); `embedded` is Python's own documentation."""
    tokenizer: str | None = None
    """A tokenizer file or folder; when not given, one of `model.vocab_size` ids is trained on the sources. The model's
    vocabulary is the tokenizer's, whatever `model.vocab_size` says."""
    holdout_share: float = 0.05
    """Share of the documents kept for validation (of every document's end when there are fewer than 40)."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("data.sources is empty; name at least one file or folder, or `embedded`")
        if not 0 < self.holdout_share < 1:
            raise UserError(f"data.holdout_share must be between 0 and 1; got {self.holdout_share}")


@dataclass(frozen=True)
class OptimConfig:
    """How to step."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw for everything, or muon for the blocks' matrices and adamw for the rest."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the rate falls after warm-up."""
    final_share: float = 0.1
    """Learning rate of the last step as a share of the peak."""
    warmup_steps: int = 50
    """Steps in which the rate rises from zero."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; biases and norms never decay."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.95
    """Decay of AdamW's second moment."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise UserError(f"optim.learning_rate must be positive; got {self.learning_rate}")
        for name in ("final_share", "weight_decay", "grad_clip", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise UserError(f"optim.{name} must not be negative; got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optim.{name} must be in [0, 1); got {getattr(self, name)}")


@dataclass(frozen=True)
class Pretrain:
    """Train a model from nothing on text. Writes a run folder that `generate`, `info` and `export` accept."""

    out_dir: str = "runs/pretrain"
    """Folder of the run: shards, checkpoints, log, plot, configuration."""
    resume: bool = False
    """Continue the run in `out_dir` from its newest complete checkpoint, bit for bit."""
    model: ModelConfig = field(default_factory=lambda: PRESETS["nano"])
    """The network; `--model NAME` starts from a preset, `--model.FIELD` changes one field."""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    max_steps: int = 500
    """Optimiser steps."""
    batch_size: int = 16
    """Sequences in one micro-batch."""
    accumulation_steps: int = 1
    """Micro-batches in one step: effective batch = batch_size * accumulation_steps sequences."""
    eval_interval: int = 100
    """Steps between validations (0: only at the end)."""
    eval_batches: int = 20
    """Batches, spread over the held-out text, in a validation during training (the last one reads everything)."""
    save_interval: int = 100
    """Steps between checkpoints (0: only at the end)."""
    keep_checkpoints: int = 2
    """Complete checkpoints kept, newest first."""
    sample_interval: int = 0
    """Steps between samples written during training (0: only at the end)."""
    sample_prompt: str = "The"
    """Start of the samples."""
    seed: int = 0
    """Seed of initial weights, data order and dropout."""
    device: str = "auto"
    """cpu, cuda, mps, or auto for the best there is."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the forward pass; auto takes bf16 where the machine multiplies it in
    hardware and, on a CPU, the width is at least 256. Weights stay float32."""
    compile: bool = False
    """Compile the model with torch.compile: faster steps after a minute's wait."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "accumulation_steps", "eval_batches"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("eval_interval", "save_interval", "sample_interval"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must not be negative; got {getattr(self, name)}")
        check_seed(self.seed)
        if not self.sample_prompt:
            raise UserError("sample_prompt is empty; give at least one character")
        if self.keep_checkpoints < 2:
            raise UserError(
                f"keep_checkpoints must be at least 2, as a crash may interrupt the newest; got {self.keep_checkpoints}"
            )
