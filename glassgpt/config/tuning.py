"""Knobs of what comes after pretraining: `sft`, `reward`, `dpo`, `ppo`, `grpo`, and what they share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from glassgpt.config.errors import UserError, check_at_least, check_choices, check_seed
from glassgpt.config.pretrain import OptimConfig

LoraTarget = Literal["qkv", "out", "up", "gate", "down"]
LORA_TARGETS: tuple[LoraTarget, ...] = ("qkv", "out", "up", "gate", "down")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021): W + alpha / rank * B A, where only A and B are trained."""

    rank: int = 0
    """Rank of the adapters; 0 trains all weights of the model instead."""
    alpha: float = 16.0
    """The adapters' product is scaled by alpha / rank."""
    targets: tuple[LoraTarget, ...] = LORA_TARGETS
    """Which matrices of every block get one: qkv and out of the attention, up, gate and down of the MLP (where it has them)."""
    dropout: float = 0.0
    """Share of the adapters' inputs set to zero in training."""

    def __post_init__(self) -> None:
        check_at_least(0, self, "rank", prefix="lora.")
        check_choices(self, prefix="lora.")
        if not self.targets:
            raise UserError("lora.targets is empty; name at least one of " + ", ".join(LORA_TARGETS))
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise UserError(f"lora.alpha must be positive; got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout must be in [0, 1); got {self.dropout}")


@dataclass(frozen=True)
class RecordsConfig:
    """Which examples, and how they become tokens."""

    files: tuple[str, ...] = ()
    """JSON, JSONL (also .gz) or Parquet files, or `hf:OWNER/NAME`; their shape is recognised (docs/tuning.md lists them)."""
    held_out: tuple[str, ...] = ()
    """Files to measure on; when not given, `holdout_share` of the examples is kept apart."""
    holdout_share: float = 0.05
    """Share of the examples kept for measuring where `held_out` names no file."""
    template: Literal["chat", "none"] = "chat"
    """chat: every example is a conversation in the model's chat template, as `glassgpt chat` serves it; none: `prompt` and what
    follows it are plain text, one after the other."""
    max_tokens: int = 0
    """Longest example in tokens, instruction and response together; 0 is the model's context."""
    overlong: Literal["drop", "truncate", "error"] = "drop"
    """What to do with a longer one: leave it out, cut the end of its response (never its instruction), or stop."""

    def __post_init__(self) -> None:
        check_choices(self, prefix="data.")
        if not 0 < self.holdout_share < 1:
            raise UserError(f"data.holdout_share must be between 0 and 1; got {self.holdout_share}")
        check_at_least(0, self, "max_tokens", prefix="data.")


@dataclass(frozen=True)
class DataInspect:
    """What a model would learn from files of examples: how they were recognised, lengths, what is learnt, only read, cut or left
    out, whether answers end, and some examples coloured by what is learnt."""

    files: Annotated[tuple[str, ...], Positional, arg(metavar="FILE")]
    """JSON, JSONL (also .gz) or Parquet files, or `hf:OWNER/NAME`."""
    model: str = "storyteller"
    """Whose tokenizer, chat template and context are used."""
    template: Literal["chat", "none"] = "chat"
    """chat: the model's chat template; none: plain text, one after the other."""
    max_tokens: int = 0
    """Longest example in tokens, instruction and response together; 0 is the model's context."""
    overlong: Literal["drop", "truncate", "error"] = "drop"
    """What to do with a longer one: leave it out, cut the end of its response (never its instruction), or stop."""
    show: int = 5
    """Examples shown, coloured by what is learnt."""
    chart: str | None = None
    """Draw the lengths as this .svg or .png file."""
    json: bool = False
    """One JSON object instead of text."""

    def __post_init__(self) -> None:
        if not self.files:
            raise UserError("no file to inspect; name at least one")
        check_at_least(0, self, "max_tokens", "show")


@dataclass(frozen=True)
class Tuning:
    """What every stage after pretraining shares."""

    out_dir: str = "runs/tuning"
    """Folder of the run: checkpoints, log, plots, configuration."""
    resume: bool = False
    """Continue the run in `out_dir` from its newest complete checkpoint, bit for bit."""
    start: str = "storyteller"
    """The model to start from: anything that `glassgpt generate` takes."""
    data: RecordsConfig = field(default_factory=RecordsConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=5e-5, warmup_steps=10, weight_decay=0.01))
    epochs: float = 1.0
    """Times that every example is seen, where `max_steps` is 0."""
    max_steps: int = 0
    """Optimiser steps; 0 is as many as `epochs` takes."""
    batch_size: int = 8
    """Examples (sft with --pack: rows) in one micro-batch."""
    accumulation_steps: int = 1
    """Micro-batches in one step, over all ranks: effective batch = batch_size * accumulation_steps."""
    eval_interval: int = 50
    """Steps between measurements on held-out examples (0: only at the beginning and the end)."""
    eval_examples: int = 256
    """Held-out examples that a measurement reads at most."""
    save_interval: int = 50
    """Steps between checkpoints (0: only at the end)."""
    keep_checkpoints: int = 2
    """Complete checkpoints kept, newest first; the one with the lowest held-out loss is always kept too."""
    seed: int = 0
    """Seed of data order, dropout, adapters and sampling."""
    device: str = "auto"
    """cpu, cuda, mps, or auto for the best there is."""
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """Arithmetic of the forward pass. Weights stay float32, but under fp64, where everything is float64: for proofs."""
    checkpoint_activations: bool = False
    """Keep only each block's input and compute the rest again for the gradient: less memory, a third more work."""
    spike_deviations: float = 8.0
    """A loss this many typical deviations above the median of the last 100 steps is reported as a spike (0: never)."""
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Also send the log to these (extra `track`). Nothing is sent anywhere unless it is named here."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(1, self, "batch_size", "accumulation_steps", "eval_examples")
        check_at_least(0, self, "max_steps", "eval_interval", "save_interval")
        check_seed(self.seed)
        if not (self.epochs > 0 and math.isfinite(self.epochs)):
            raise UserError(f"epochs must be positive; got {self.epochs}")
        if not self.spike_deviations >= 0:
            raise UserError(f"spike_deviations must not be negative; got {self.spike_deviations}")
        check_at_least(2, self, "keep_checkpoints")


@dataclass(frozen=True)
class Sft(Tuning):
    """Teach a model to answer: supervised fine-tuning on conversations. Writes a run folder that every command accepts.

    Full tuning wants a learning rate of 1e-5 to 1e-4, adapters (--lora.rank 8) about ten times that. `torchrun
    --nproc-per-node N -m -- glassgpt sft ...` trains the same run on N processes.
    """

    out_dir: str = "runs/sft"
    """Folder of the run: checkpoints, log, plots, configuration."""
    epochs: float = 3.0
    """Times that every example is seen, where `max_steps` is 0."""
    loss: str = "response"
    """response: learn what the assistant says; full: every token; weighted:W, e.g. weighted:0.1: every token, those outside the
    responses with weight W. The sum is divided by the weights of the whole step, over all micro-batches and ranks."""
    average: Literal["token", "example"] = "token"
    """token: every supervised token counts the same; example: every example does, however long."""
    answers: int = 16
    """Held-out instructions that are answered at every measurement: how many of the answers end by themselves (0: none)."""
    pack: bool = False
    """Put several examples into one row of `data.max_tokens`; none sees another."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(0, self, "answers")
        self.prompt_weight  # noqa: B018  (raises for a loss that is none)

    @property
    def prompt_weight(self) -> float:
        """Weight of the tokens outside the responses: 0 for `response`, 1 for `full`."""
        name, _, number = self.loss.partition(":")
        try:
            weight = {"response": 0.0, "full": 1.0}[self.loss] if name != "weighted" else float(number)
        except (KeyError, ValueError):
            weight = math.nan
        if not (weight >= 0 and math.isfinite(weight)):
            raise UserError(f"loss must be response, full or weighted:W with W at least 0; got {self.loss!r}")
        return weight


@dataclass(frozen=True)
class Reward(Tuning):
    """Train a reward model on pairs of a better and a worse answer (Bradley-Terry): the model with a scalar head.

    Writes a run folder that `ppo --reward model:FOLDER` takes, with the held-out accuracy and a calibration plot.
    """

    out_dir: str = "runs/reward"
    """Folder of the run: checkpoints, log, plots, configuration."""


@dataclass(frozen=True)
class Dpo(Tuning):
    """Prefer better answers to worse ones without a reward model: direct preference optimisation (Rafailov et al. 2023)."""

    out_dir: str = "runs/dpo"
    """Folder of the run: checkpoints, log, plots, configuration."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=1e-5, warmup_steps=10, weight_decay=0.0))
    loss: Literal["sigmoid", "ipo", "kto"] = "sigmoid"
    """sigmoid: DPO's eq. 7; ipo: eq. 17 of Azar et al. 2023, on log-probabilities per token; kto: Ethayarajh et al. 2024, for
    single answers with a label (pairs are taken apart)."""
    beta: float = 0.1
    """How strongly to hold on to the starting model."""
    label_smoothing: float = 0.0
    """Share of the pairs whose order is taken to be wrong (sigmoid only; Mitchell 2023)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.beta > 0 and math.isfinite(self.beta)):
            raise UserError(f"beta must be positive; got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing must be in [0, 0.5); got {self.label_smoothing}")
        if self.label_smoothing and self.loss != "sigmoid":
            raise UserError(f"label_smoothing is for loss sigmoid; with {self.loss} leave it 0")


@dataclass(frozen=True)
class Rollouts(Tuning):
    """What PPO and GRPO share: prompts, sampled answers, rewards."""

    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(learning_rate=1e-5, warmup_steps=5, weight_decay=0.0, final_share=1.0)
    )
    reward: tuple[str, ...] = ()
    """What answers are worth, summed: arithmetic, length:N, contains:TEXT, format:REGEX, answer, code, model:FOLDER (a trained
    reward model) or module:function, a function f(prompt, response) -> float; WEIGHT*NAME weighs one, e.g. 0.1*length:50."""
    reward_seconds: float = 10.0
    """Longest that a reward function may take for one answer."""
    max_new_tokens: int = 64
    """Longest answer in tokens."""
    temperature: float = 1.0
    """Answers are sampled at it, and it is the policy's own: the trained probabilities have it too."""
    beta: float = 0.05
    """Weight of the KL divergence to the starting model."""
    clip: float = 0.2
    """A token's probability moves its gain only while its ratio to the sampling policy's is in [1 - clip, 1 + clip]."""
    updates: int = 1
    """Passes over each step's answers."""
    sample_interval: int = 20
    """Steps between answers shown (0: only at the end)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, self, "max_new_tokens", "updates")
        check_at_least(0, self, "sample_interval")
        for name in ("temperature", "reward_seconds", "clip"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise UserError(f"{name} must be positive; got {getattr(self, name)}")
        if not (self.beta >= 0 and math.isfinite(self.beta)):
            raise UserError(f"beta must be at least 0; got {self.beta}")
        if self.lora.dropout:
            raise UserError(
                "dropout would change the policy between writing and learning, so it is off here; leave lora.dropout 0"
            )


@dataclass(frozen=True)
class Ppo(Rollouts):
    """Reinforcement learning with a value head (PPO, Schulman et al. 2017): answers are sampled, rewarded, and made likelier."""

    out_dir: str = "runs/ppo"
    """Folder of the run: checkpoints, log, plots, configuration."""
    updates: int = 4
    """Passes over each step's answers."""
    target_kl: float = 0.0
    """Adapt beta so that the KL divergence per answer stays near this many nats (Ziegler et al. 2019, eq. 4); 0 keeps beta."""
    discount: float = 1.0
    """Gamma: what a reward one token later is worth."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation: 0 trusts the value head, 1 the sampled return."""
    value_weight: float = 0.1
    """Weight of the value head's loss."""
    value_clip: float = 0.2
    """A value's gain counts only while it is within this of the value before the update."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("discount", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must be between 0 and 1; got {getattr(self, name)}")
        for name in ("target_kl", "value_weight", "value_clip"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise UserError(f"{name} must be at least 0; got {getattr(self, name)}")
        if self.target_kl and not self.beta:
            raise UserError("target_kl multiplies beta, which is 0; give a beta above 0 to begin with")


@dataclass(frozen=True)
class Grpo(Rollouts):
    """Reinforcement learning by comparing several answers to one prompt (GRPO, Shao et al. 2024): no value head."""

    out_dir: str = "runs/grpo"
    """Folder of the run: checkpoints, log, plots, configuration."""
    group_size: int = 8
    """Answers to each prompt."""
    average: Literal["constant", "token", "sequence"] = "constant"
    """How tokens share in the loss. constant: divided by max_new_tokens ("Dr. GRPO", Liu et al. 2025: no bias by length);
    token: by the tokens of the step (DAPO, Yu et al. 2025); sequence: by each answer's own length (as published: long wrong
    answers are punished less)."""
    scale: Literal["none", "group"] = "none"
    """Divide a group's advantages by nothing, or by their standard deviation (as published: easy and hard prompts weigh more)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(2, self, "group_size")
