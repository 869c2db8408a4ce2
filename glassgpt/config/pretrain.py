"""Knobs of `glassgpt pretrain`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from glassgpt.config.errors import UserError, check_at_least, check_seed
from glassgpt.config.model import PRESETS, ModelConfig


@dataclass(frozen=True)
class DataConfig:
    """What to learn from."""

    sources: tuple[str, ...] = ("embedded",)
    """Text, JSONL or Parquet files (field `text`), folders of them, .gz, `hf:NAME` for a Hugging Face data set; `embedded` is
    Python's own documentation."""
    weights: tuple[float, ...] = ()
    """Share of each source in training, in the order of `sources` (any scale: 3 1 is 0.75 0.25); when not given, every
    token is seen equally often. With weights each source is a domain of its own, with a held-out part and a loss of its own."""
    tokenizer: str | None = None
    """A tokenizer file or folder; when not given, one of `model.vocab_size` ids is trained on the sources. The model's
    vocabulary is the tokenizer's, whatever `model.vocab_size` says."""
    holdout_share: float = 0.05
    """Share of the documents kept for validation (of every document's end when there are fewer than 40)."""
    deduplicate: bool = False
    """Drop documents that are exact repeats of an earlier one of their source."""
    mask_documents: bool = False
    """Let no token attend to another document in its window: each is computed as if it stood alone, from position 0."""
    replay_share: float = 0.0
    """With `--start RUN`: share of the training windows that come from what that run and those before it were trained on."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("data.sources is empty; name at least one file or folder, or `embedded`")
        if self.weights and len(self.weights) != len(self.sources):
            raise UserError(f"data.weights has {len(self.weights)} values, data.sources {len(self.sources)}; give one for each")
        if not all(weight > 0 and math.isfinite(weight) for weight in self.weights):
            raise UserError(f"data.weights must be positive; got {' '.join(map(str, self.weights))}")
        if not 0 <= self.replay_share < 1:
            raise UserError(f"data.replay_share must be at least 0 and below 1; got {self.replay_share}")
        if not 0 < self.holdout_share < 1:
            raise UserError(f"data.holdout_share must be between 0 and 1; got {self.holdout_share}")


@dataclass(frozen=True)
class OptimConfig:
    """How to step."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw for everything, or muon for the blocks' matrices and adamw for the rest."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    embedding_rate: float = 1.0
    """Learning rate of the embeddings (and of a head of its own) as a multiple of the others'."""
    momentum: float = 0.95
    """Muon's."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the rate falls after warm-up."""
    stable_share: float = 0.0
    """Share of the steps after warm-up that stay at the peak before the fall ("warm-up, stable, decay")."""
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
        if not 0 <= self.stable_share <= 1:
            raise UserError(f"optim.stable_share must be between 0 and 1; got {self.stable_share}")
        if not (self.embedding_rate > 0 and math.isfinite(self.embedding_rate)):
            raise UserError(f"optim.embedding_rate must be positive; got {self.embedding_rate}")
        for name in ("final_share", "weight_decay", "grad_clip", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise UserError(f"optim.{name} must not be negative; got {getattr(self, name)}")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optim.{name} must be in [0, 1); got {getattr(self, name)}")


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is spread when `torchrun` starts several processes. One process needs none of it."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every rank holds the whole model; fsdp: weights, gradients and optimiser state are sharded (FSDP2)."""
    tensor_parallel: int = 1
    """Ranks that share each MLP's matrices; the other ranks / this many share the data. Needs fsdp when both are above 1."""
    sharded_checkpoints: bool = False
    """Every rank writes its own part (torch.distributed.checkpoint, as safetensors), instead of gathering on rank 0."""

    def __post_init__(self) -> None:
        check_at_least(1, self, "tensor_parallel", prefix="parallel.")


@dataclass(frozen=True)
class Pretrain:
    """Train a model on text, from nothing or onwards from another. Writes a run folder that every other command accepts.

    `torchrun --nproc-per-node N -m glassgpt pretrain ...` trains the same run on N processes: batch_size and
    accumulation_steps are those of the whole job.
    """

    out_dir: str = "runs/pretrain"
    """Folder of the run: shards, checkpoints, log, plot, configuration."""
    resume: bool = False
    """Continue the run in `out_dir` from its newest complete checkpoint, bit for bit."""
    start: str | None = None
    """Continue from the weights and with the tokenizer of this model (a run folder, or anything that `generate` takes) on new
    data; its shape is kept, but for model.dropout. From a run, loss is reported on everything that run was trained on: what is
    forgotten shows."""
    keep_zeros: bool = False
    """With `--start`: weights of the blocks' matrices that are exactly zero there stay zero, as `glassgpt prune` needs them."""
    model: ModelConfig = field(default_factory=lambda: PRESETS["nano"])
    """The network; `--model NAME` starts from a preset, `--model.FIELD` changes one field."""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    max_steps: int = 500
    """Optimiser steps."""
    batch_size: int = 16
    """Sequences in one micro-batch."""
    accumulation_steps: int = 1
    """Micro-batches in one step, over all ranks: effective batch = batch_size * accumulation_steps sequences."""
    eval_interval: int = 100
    """Steps between validations (0: only at the end)."""
    eval_batches: int = 20
    """Batches, spread over the held-out text, in a validation during training (the last one reads everything)."""
    save_interval: int = 100
    """Steps between checkpoints (0: only at the end)."""
    keep_checkpoints: int = 2
    """Complete checkpoints kept, newest first; the one with the lowest held-out loss is always kept too."""
    sample_interval: int = 0
    """Steps between samples written during training (0: only at the end)."""
    sample_prompt: str = "The"
    """Start of the samples."""
    seed: int = 0
    """Seed of initial weights, data order and dropout."""
    device: str = "auto"
    """cpu, cuda, mps, or auto for the best there is."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the forward pass; auto times both on this machine and model and takes the faster. Weights stay float32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the blocks with torch.compile; auto does so where the run is long enough to win back the wait."""
    checkpoint_activations: bool = False
    """Keep only each block's input and compute the rest again for the gradient: less memory, a third more work."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    bad_steps: Literal["stop", "skip"] = "stop"
    """What to do at a loss or gradient that is not finite: stop, or skip the update. Spikes are reported either way, and with
    skip left out too; a report names the text of the batch."""
    spike_deviations: float = 8.0
    """A loss this many typical deviations above the median of the last 100 steps is a spike (0: never)."""
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Also send the log to these (extra `track`). Nothing is sent anywhere unless it is named here."""
    chaos: int = 0
    """Instead of training once: train the run while killing it this many times in every way, resume it, and prove that the
    weights are those of an uninterrupted run."""

    def __post_init__(self) -> None:
        check_at_least(1, self, "max_steps", "batch_size", "accumulation_steps", "eval_batches")
        for name in ("eval_interval", "save_interval", "sample_interval"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must not be negative; got {getattr(self, name)}")
        check_seed(self.seed)
        if not self.spike_deviations >= 0:
            raise UserError(f"spike_deviations must not be negative; got {self.spike_deviations}")
        if self.chaos < 0:
            raise UserError(f"chaos must not be negative; got {self.chaos}")
        if self.data.replay_share and self.start is None:
            raise UserError("data.replay_share needs --start RUN, the run whose data are to be replayed")
        if self.keep_zeros and self.start is None:
            raise UserError("keep_zeros needs --start MODEL, the model whose zeros are to stay")
        if not self.sample_prompt:
            raise UserError("sample_prompt is empty; give at least one character")
        if self.keep_checkpoints < 2:
            raise UserError(
                f"keep_checkpoints must be at least 2, as a crash may interrupt the newest; got {self.keep_checkpoints}"
            )
