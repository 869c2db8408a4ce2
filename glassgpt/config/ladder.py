"""Knobs of `glassgpt lab ladder`, and its rungs: what each of them changes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from glassgpt.config.errors import UserError, check_at_least, check_seed
from glassgpt.config.model import ModelConfig
from glassgpt.config.pretrain import OptimConfig

RungName = Literal["kernel", "rmsnorm", "rope", "swiglu", "gqa", "qk-norm", "untied", "window", "moe", "muon"]
BASE = "base"
DEFAULT_TOKENS = 409_600.0
"""Of one run, when no amount is given."""

CHANGES: dict[str, str] = {
    BASE: "the shape as given, AdamW",
    "kernel": "written-out -> fused attention",
    "rmsnorm": "LayerNorm -> RMSNorm",
    "rope": "learned positions -> RoPE",
    "swiglu": "GELU -> SwiGLU, as many parameters",
    "gqa": "a key and value head each -> shared ones",
    "qk-norm": "a norm on queries and keys",
    "untied": "tied -> own head",
    "window": "full -> window in every other layer",
    "moe": "dense -> experts, as many active parameters",
    "muon": "AdamW -> Muon",
}
"""What a rung changes, for people."""


@dataclass(frozen=True)
class Rung:
    """A way to build and train, one change away from another."""

    name: str
    before: str | None
    """The rung that it differs from in one thing; None for the base."""
    model: ModelConfig
    optim: OptimConfig
    """Warm-up is left out: it follows from the number of steps."""
    written_out: bool
    """Whether attention is computed by the written-out maths or by the kernel that trains fastest on the device."""


@dataclass(frozen=True)
class Ladder:
    """From GPT-2 to a modern architecture, one change at a time: what each step buys on the same data and budget.

    The same command climbs on a GPU and at a bigger size, for example `--model gpt2 --model.dropout 0 --device cuda
    --precision bf16 --batch-size 32 --amount 500e6 --sources my-texts`.
    """

    out_dir: str = "runs/ladder"
    """Folder for the runs, ladder.json, ladder.html and the pictures; called again, it trains only what is missing."""
    sources: tuple[str, ...] = ("embedded",)
    """Text files, folders or JSONL files, as for `pretrain --data.sources`."""
    tokenizer: str | None = None
    """A tokenizer file or folder; when not given, one of `model.vocab_size` ids is trained on the sources. One for all rungs."""
    model: ModelConfig = field(
        default_factory=lambda: ModelConfig(vocab_size=512, context_tokens=128, n_layer=4, n_head=4, width=64)
    )
    """The base's shape; `--model NAME` starts from a preset. What a rung changes must not be changed in it already."""
    rungs: tuple[RungName, ...] = ("kernel", "rmsnorm", "rope", "swiglu", "gqa", "qk-norm", "untied", "window", "moe", "muon")
    """The changes, in this order. The kernel is first because all runs train with the fast one (it changes no loss)."""
    mode: Literal["cumulative", "single"] = "cumulative"
    """cumulative: each rung keeps the changes before it, helpful or not, and is compared with the rung before and with the base;
    single: each is the base with one change."""
    budget: Literal["tokens", "flops", "seconds"] = "tokens"
    """What every run gets the same amount of. flops: floating-point operations of the model, 6 a matrix entry and token and the
    attention; seconds: of training steps, by the speed that is measured before the first run."""
    amount: float | None = None
    """That amount for one run, rounded down to whole steps; 409,600 tokens when not given."""
    batch_size: int = 8
    """Sequences in a step."""
    learning_rate: float = 4e-3
    """Peak learning rate of every rung with AdamW. Warm-up takes a tenth of the steps, a cosine leads to a tenth of the peak."""
    muon_rate: float = 1e-2
    """Peak learning rate of the rung `muon` (its AdamW part, embeddings and norms, takes the same)."""
    seeds: int = 3
    """Runs of each rung, with seeds `seed`, `seed` + 1, ...: the same batches for all rungs of one seed."""
    seed: int = 0
    """The first seed."""
    kv_heads: int | None = None
    """Key and value heads after the rung `gqa`; the largest divisor of n_head up to its half when not given."""
    window_tokens: int | None = None
    """Window of the rung `window`; a quarter of the context when not given."""
    experts: int = 8
    """Experts of the rung `moe`; each is 1/top_k as wide as the dense MLP."""
    top_k: int = 2
    """Experts that each token goes to."""
    turns: int = 5
    """Times that the speed of every rung is measured, in turn; medians are reported. It is done once: delete speed.json in the
    folder to have it done again, on a quiet machine."""
    device: str = "auto"
    """cpu, cuda, mps, or auto for the best there is."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass, one for all rungs."""
    json: bool = False
    """One JSON object instead of tables."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("sources is empty; name at least one file or folder, or `embedded`")
        if not self.rungs:
            raise UserError(f"rungs is empty; name at least one of {', '.join(list(CHANGES)[1:])}")
        if len(set(self.rungs)) != len(self.rungs):
            raise UserError(f"rungs must differ from one another; got {' '.join(self.rungs)}")
        check_at_least(1, self, "batch_size", "seeds", "turns", "kv_heads", "window_tokens", "top_k")
        check_at_least(2, self, "experts")
        check_seed(self.seed)
        check_seed(self.seed + self.seeds - 1)
        for name in ("learning_rate", "muon_rate", "amount"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UserError(f"{name} must be positive; got {value}")
        if self.amount is None and self.budget != "tokens":
            raise UserError(f"budget {self.budget} needs --amount, the {self.budget} of one run")
        if self.budget == "tokens" and self.tokens < self.step_tokens:
            raise UserError(
                f"amount must hold a step, batch_size * context_tokens = {self.step_tokens} tokens; got {self.tokens:g}"
            )

    @property
    def tokens(self) -> float:
        """The amount of a budget of tokens."""
        return DEFAULT_TOKENS if self.amount is None else self.amount

    @property
    def step_tokens(self) -> int:
        """Tokens that one optimiser step sees."""
        return self.batch_size * self.model.context_tokens


def climb(config: Ladder) -> tuple[Rung, ...]:
    """The base and every rung above it. Raises UserError for a rung that would change nothing or cannot be built.

    Not part of the configuration's own checks: `--model NAME` is read before `--rungs`, which may suit it.
    """
    rungs = [Rung(BASE, None, config.model, OptimConfig(learning_rate=config.learning_rate), "kernel" in config.rungs)]
    for name in config.rungs:
        below = rungs[-1 if config.mode == "cumulative" else 0]
        try:
            above = _changed(name, below, config)
        except UserError as error:
            raise UserError(f"rung {name}: {error}") from error
        if replace(above, name=below.name, before=below.before) == below:
            raise UserError(f"rung {name} changes nothing: model has it already; leave it out of --rungs, or start from another")
        rungs.append(above)
    return tuple(rungs)


def _changed(name: str, below: Rung, config: Ladder) -> Rung:
    model, optim, written_out = below.model, below.optim, below.written_out
    match name:
        case "kernel":
            written_out = False
        case "rmsnorm":
            model = replace(model, norm="rms")
        case "rope":
            model = replace(model, position="rope")
        case "swiglu":
            model = replace(model, mlp="swiglu")
        case "gqa":
            model = replace(model, n_kv_head=config.kv_heads or _half(model.n_head))
            if model.kv_heads == below.model.n_head:
                heads = f"n_head is {model.n_head} and kv_heads {model.kv_heads}"
                raise UserError(f"{heads}, so nothing is shared; lower kv_heads, or leave gqa out of rungs")
        case "qk-norm":
            model = replace(model, qk_norm=True)
        case "untied":
            model = replace(model, tied_head=False)
        case "window":
            window = config.window_tokens or max(1, model.context_tokens // 4)
            if window >= model.context_tokens:
                raise UserError(f"window_tokens {window} is no shorter than the context, {model.context_tokens} tokens")
            model = replace(model, spans=("window", "full"), window_tokens=window)
        case "moe":
            model = replace(model, moe=replace(model.moe, experts=config.experts, top_k=config.top_k))
        case "muon":
            optim = replace(optim, optimizer="muon", learning_rate=config.muon_rate)
    return Rung(name, below.name, model, optim, written_out)


def _half(heads: int) -> int:
    """The largest divisor up to half of it; 1 for 1."""
    return next((n for n in range(heads // 2, 0, -1) if heads % n == 0), 1)
