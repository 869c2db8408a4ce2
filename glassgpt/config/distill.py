"""Knobs of `glassgpt distill`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from glassgpt.config.errors import UserError, check_at_least, check_choices, check_seed
from glassgpt.config.model import ModelConfig, MoeConfig
from glassgpt.config.pretrain import DataConfig, OptimConfig


@dataclass(frozen=True)
class StudentConfig:
    """The student's shape: the teacher's, but for what is given here."""

    n_layer: int | None = None
    """Blocks; when not given, half of the teacher's, rounded up."""
    n_head: int | None = None
    """Attention heads; when not given, as many as keep the teacher's head width."""
    n_kv_head: int | None = None
    """Heads of keys and values; when not given, each is shared by as many query heads as in the teacher."""
    width: int | None = None
    """Size of the residual stream."""
    mlp_width: int | None = None
    """Hidden size of the MLP; when not given the teacher's, and with another `width` the usual multiple of it."""

    def __post_init__(self) -> None:
        check_at_least(1, self, "n_layer", "n_head", "n_kv_head", "width", "mlp_width", prefix="student.")

    def shape(self, teacher: ModelConfig) -> ModelConfig:
        """The student of a teacher, always with dense MLPs. Raises UserError, as `ModelConfig`, for numbers that contradict."""
        width = self.width or teacher.width
        n_head = self.n_head or (teacher.n_head if width == teacher.width else max(1, width // teacher.head_width))
        shared_by = teacher.n_head // teacher.kv_heads
        changes = {
            "n_layer": self.n_layer or (teacher.n_layer + 1) // 2,
            "n_head": n_head,
            "n_kv_head": self.n_kv_head or (n_head // shared_by if n_head % shared_by == 0 else None),
            "width": width,
            "mlp_width": self.mlp_width or (teacher.mlp_width if width == teacher.width else None),
            "attention_width": teacher.attention_width if (width, n_head) == (teacher.width, teacher.n_head) else None,
            "moe": MoeConfig(),
        }
        if changes["n_kv_head"] == n_head:
            changes["n_kv_head"] = teacher.n_kv_head and n_head
        return dataclasses.replace(teacher, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Distill:
    """Train a smaller student on what a teacher expects of every next token (Hinton et al. 2015), and on its hidden states.

    The loss of a token is alpha * T^2 * KL(teacher || student), both at temperature T, plus (1 - alpha) times the usual loss of
    the next token, plus hidden_weight times the distance of the hidden states. Writes a run folder that every command accepts.
    """

    teacher: Annotated[str, Positional, arg(metavar="TEACHER")] = "storyteller"
    """The model to learn from: anything that `glassgpt generate` takes. The student has its tokenizer."""
    out_dir: str = "runs/distill"
    """Folder of the run: shards, checkpoints, log, plot, configuration."""
    resume: bool = False
    """Continue the run in `out_dir` from its newest complete checkpoint, bit for bit."""
    student: StudentConfig = field(default_factory=StudentConfig)
    init: str = "layers"
    """How the student begins. layers: embeddings, head and evenly spread blocks of the teacher (DistilBERT), which needs equal
    widths; random; or the name of a model with the teacher's vocabulary, such as a pruned one, whose shape is kept."""
    alpha: float = 0.5
    """Share of the teacher in the loss of a token, in [0, 1]: 0 trains the student alone, 1 on the teacher alone."""
    temperature: float = 2.0
    """T: both models' logits are divided by it where they are compared; above 1 unlikely tokens count for more."""
    hidden_weight: float = 0.0
    """Weight of the distance between hidden states, a mean over the student's blocks; 0 leaves it out."""
    hidden_loss: Literal["cosine", "mse"] = "cosine"
    """cosine: 1 - the cosine of the angle between the two (DistilBERT); mse: their squared difference, a mean over the width
    (TinyBERT). Between different widths a linear map of the student's states is learnt for each block, and left behind."""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    max_steps: int = 500
    """Optimiser steps."""
    batch_size: int = 8
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
    seed: int = 0
    """Seed of initial weights, data order and dropout."""
    device: str = "auto"
    """cpu, cuda, mps, or auto for the best there is."""
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """Arithmetic of both forward passes. Weights stay float32, but under fp64, where everything is float64: for proofs."""
    spike_deviations: float = 8.0
    """A loss this many typical deviations above the median of the last 100 steps is reported as a spike (0: never)."""
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Also send the log to these (extra `track`). Nothing is sent anywhere unless it is named here."""
    compare: bool = False
    """Train the same student from the same start on the same tokens in the same order alone, on the teacher's logits, and, where
    hidden_weight is given, on its hidden states too; report held-out bits per byte of each. Needs alpha above 0."""
    seeds: int = 1
    """With --compare: how many seeds, from `seed` on. Differences are taken within a seed."""
    json: bool = False
    """One JSON object at the end instead of a table."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(1, self, "max_steps", "batch_size", "accumulation_steps", "eval_batches", "seeds")
        check_at_least(0, self, "eval_interval", "save_interval", "spike_deviations")
        check_at_least(2, self, "keep_checkpoints")
        check_seed(self.seed)
        if not 0 <= self.alpha <= 1:
            raise UserError(f"alpha must be between 0 (the student alone) and 1 (the teacher alone); got {self.alpha}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UserError(f"temperature must be positive; got {self.temperature}")
        if not (self.hidden_weight >= 0 and math.isfinite(self.hidden_weight)):
            raise UserError(f"hidden_weight must be at least 0; got {self.hidden_weight}")
        if self.data.tokenizer is not None:
            raise UserError("the student has its teacher's tokenizer; leave data.tokenizer out")
        if self.data.replay_share:
            raise UserError("there is no earlier run whose data could be replayed; leave data.replay_share 0")
        if self.compare and not self.alpha:
            raise UserError("alpha 0 is the student alone, so there is nothing to compare it with; give an alpha above 0")
        if self.seeds > 1 and not self.compare:
            raise UserError(f"seeds is {self.seeds}, which is for --compare; add it, or give one --seed")

    @property
    def uses_teacher(self) -> bool:
        """Whether the teacher is asked in training at all."""
        return self.alpha > 0 or self.hidden_weight > 0
