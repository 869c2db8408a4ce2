"""`glassgpt lab qkv`: what the fused QKV matrix and the tied head are worth, measured side by side.

speed    forward pass, decoding, training step and the projection alone; variants take turns in one process
memory   parameters, and the most that a process of its own held
loss     small trainings: three matrices with the numbers of the fused one must learn the same, to rounding; a head of its own
         has more parameters, and learns something else
"""

from __future__ import annotations

import copy
import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from glassgpt import data
from glassgpt.config import OptimConfig, UserError, preset
from glassgpt.config.files import to_plain
from glassgpt.config.qkv import Qkv
from glassgpt.data.progress import Progress, steps
from glassgpt.lab.ladder.compare import Estimate, estimate, t_quantile
from glassgpt.lab.qkv import report as qkv_report
from glassgpt.lab.qkv.separate import parameters
from glassgpt.lab.qkv.speed import (
    BASE,
    DECODED,
    VARIANTS,
    Memory,
    Timing,
    base_model,
    decode_run,
    forward_run,
    memory,
    projection_runs,
    take_turns,
    train_run,
)
from glassgpt.loading import pick_device
from glassgpt.model import GPT, use_attention
from glassgpt.text import Tokenizer
from glassgpt.train import machine, optim
from glassgpt.train.loss import Scored

SEPARATE, UNTIED = [name for name in VARIANTS if name != BASE]
SINGLE, DOUBLE = "float32", "float64"
HELD_OUT = 0.05
MEGABYTES = 4
"""Of text, at most, for the small trainings."""


@dataclass(frozen=True)
class Trained:
    """One small training. Losses are nats per token."""

    variant: str
    seed: int
    dtype: str
    """float32, or float64: there rounding is too small to be seen, and what is left would be a mistake."""
    parameters: int
    losses: list[float]
    """Of every step, before it."""
    held_out: list[tuple[int, float]]
    """(steps done, loss on held-out text)."""


@dataclass(frozen=True)
class Result:
    """What the experiment found."""

    config: dict[str, Any]
    about: dict[str, Any]
    timings: list[Timing]
    memory: dict[str, Memory]
    runs: list[Trained]

    def differences(self, dtype: str) -> list[float]:
        """Between the losses of fused and separate, step by step; none where there were no trainings."""
        a, b = (next((run for run in self.runs if (run.variant, run.dtype) == (name, dtype)), None) for name in (BASE, SEPARATE))
        return [abs(x - y) for x, y in zip(a.losses, b.losses, strict=True)] if a and b else []

    @property
    def untied_difference(self) -> Estimate | None:
        """Held-out loss of untied less tied heads at the end, paired by seed."""
        ends = {(run.variant, run.seed): run.held_out[-1][1] for run in self.runs if run.dtype == SINGLE}
        seeds = [seed for variant, seed in ends if variant == UNTIED]
        return estimate([ends[UNTIED, seed] - ends[BASE, seed] for seed in seeds]) if seeds else None

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        difference = self.untied_difference
        largest = {dtype: max(self.differences(dtype), default=None) for dtype in (SINGLE, DOUBLE)}
        more = {"largest_difference": largest, "untied_difference": asdict(difference) if difference else None}
        return asdict(self) | more | {"findings": qkv_report.findings(self)}


def qkv(config: Qkv) -> Result:
    """Time, measure, train, compare; writes results.json, timings.csv, report.md and a picture.

    Raises UserError for a shape that is unknown, untied already or too short, for sources that cannot be read, and when scipy
    is not installed.
    """
    t_quantile(1)  # a missing package is told before minutes of work
    device = pick_device(config.device)
    config = replace(config, device=str(device), threads=config.threads or torch.get_num_threads())
    torch.set_num_threads(config.threads or 1)
    machine.keep_freed_memory()
    text = read(config) if config.steps else None
    timings = time_all(config, device)
    with steps("memory") as progress:
        peaks = {}
        for done, variant in enumerate(VARIANTS, 1):
            peaks[variant] = memory(config, variant)
            progress(done, len(VARIANTS))
    about = {"device": device.type, "threads": config.threads, "torch": torch.__version__}
    result = Result(to_plain(config), about, timings, peaks, train_all(config, text, device) if text else [])
    _write(result, Path(config.out_dir))
    if config.json:
        print(json.dumps(result.plain()))
    else:
        qkv_report.show(result, Console(width=qkv_report.WIDTH))
    return result


def time_all(config: Qkv, device: torch.device) -> list[Timing]:
    """Every kind of work by every variant."""
    base = base_model(config, device)
    models = {name: make(copy.deepcopy(base)) for name, make in VARIANTS.items()}
    tokens = config.batch_size * config.context_tokens
    works = {
        f"projection, {tokens:,} tokens": projection_runs(base, tokens),
        "projection, 1 token": projection_runs(base, 1),
        f"forward, {config.batch_size} x {config.context_tokens}": {n: forward_run(m, config) for n, m in models.items()},
        f"decode {DECODED} after {config.cached_tokens}": {n: decode_run(m, config) for n, m in models.items()},
        f"training step, {config.batch_size} x {config.context_tokens}": {n: train_run(m, config) for n, m in models.items()},
    }
    found = []
    for what, runs in works.items():
        with steps(what) as progress:
            found += take_turns(what, runs, config, device, progress)
    return found


# ---------------------------------------------------------------------- trainings


@dataclass(frozen=True, eq=False)
class Tokens:
    """Ids of all documents in a row: to learn from, and held out."""

    learnt: np.ndarray
    held_out: np.ndarray

    def batch(self, part: str, rows: int, length: int, seed: int) -> torch.Tensor:
        """Random stretches (rows, length) of `learnt` or `held_out`."""
        ids = getattr(self, part)
        starts = np.random.default_rng(seed).integers(0, len(ids) - length + 1, rows)
        return torch.from_numpy(np.stack([ids[start : start + length] for start in starts]))


def read(config: Qkv) -> Tokens:
    """Text in the ids of a tokenizer made from what is not held out. Raises UserError when there is too little."""
    shape = preset(config.train_preset)
    parts: dict[str, list[str]] = {"train": [], "val": []}
    size = 0
    for part, text in data.shards.hold_out(data.documents(config.sources), HELD_OUT):
        parts[part].append(text)
        size += len(text)
        if size > MEGABYTES * 1_000_000:
            break
    tokenizer = Tokenizer.train(parts["train"], shape.vocab_size)
    learnt, held_out = (_joined(tokenizer, parts[part]) for part in ("train", "val"))
    least = shape.context_tokens + 1
    if min(len(learnt), len(held_out)) < least or tokenizer.vocab_size < shape.vocab_size:
        raise UserError(
            f"{' '.join(config.sources)}: too little text for {config.train_preset}: {len(learnt)} tokens to learn from and"
            f" {len(held_out)} held out, each must be {least}; {tokenizer.vocab_size} of {shape.vocab_size} different tokens"
        )
    return Tokens(learnt, held_out)


def _joined(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    end = [] if tokenizer.end_id is None else [tokenizer.end_id]
    return np.array([token for ids in tokenizer.encode_batch(texts) for token in (*ids, *end)], dtype=np.int64)


def train_all(config: Qkv, text: Tokens, device: torch.device) -> list[Trained]:
    """Tied and untied with every seed; separate with the first, beside fused also in float64 where the device has it."""
    wanted = [(SEPARATE, config.seed, SINGLE)]
    wanted += [(variant, config.seed + n, SINGLE) for n in range(config.seeds) for variant in (BASE, UNTIED)]
    wanted += [(variant, config.seed, DOUBLE) for variant in (BASE, SEPARATE) if device.type != "mps"]
    found = []
    with steps("trainings") as progress:
        for number, (variant, seed, dtype) in enumerate(wanted):
            before, total = number * config.steps, len(wanted) * config.steps
            step = lambda done, _: progress(before + done, total)  # noqa: B023, E731
            found.append(train(config, variant, seed, text, device, dtype, step))
    return found


def train(
    config: Qkv,
    variant: str,
    seed: int,
    text: Tokens,
    device: torch.device,
    dtype: str = SINGLE,
    progress: Progress | None = None,
) -> Trained:
    """One training: the seed decides the first numbers and the batches, whatever the variant."""
    torch.manual_seed(seed)
    shape = replace(preset(config.train_preset), dropout=0.0)
    model = VARIANTS[variant](GPT(shape)).to(device, getattr(torch, dtype))
    use_attention(model, machine.attend_by(device))
    settings = OptimConfig(learning_rate=config.learning_rate, warmup_steps=max(1, config.steps // 10))
    scored, optimizers = Scored(model), optim.build(model, settings)
    losses, held_out = [], [(0, measure(config, model, text))]
    for step in range(config.steps):
        ids = text.batch("learnt", config.train_batch_size, shape.context_tokens + 1, seed * 1_000_003 + step).to(device)
        loss = scored(ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()
        loss.backward()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise UserError(
                f"{variant}, step {step + 1}: loss {losses[-1]}; try a lower learning_rate, now {config.learning_rate}"
            )
        optim.set_rate(optimizers, optim.learning_rate(step, config.steps, settings))
        optim.clip(model, settings.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if (step + 1) % config.eval_interval == 0 or step + 1 == config.steps:
            held_out.append((step + 1, measure(config, model, text)))
        if progress:
            progress(step + 1, config.steps)
    return Trained(variant, seed, dtype, parameters(model), losses, held_out)


@torch.no_grad()
def measure(config: Qkv, model: GPT, text: Tokens) -> float:
    """Nats per token on held-out text, the same for all."""
    scored, total, count = Scored(model), 0.0, 0
    for number in range(config.eval_batches):
        ids = text.batch("held_out", config.train_batch_size, model.config.context_tokens + 1, number).to(
            model.head.weight.device
        )
        total += scored(ids[:, :-1], ids[:, 1:]).item()
        count += ids[:, 1:].numel()
    return total / count


def _write(result: Result, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(result.plain(), indent=1) + "\n", encoding="utf-8")
    with (out / "timings.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["what", "variant", "turn", "seconds"])
        for timing in result.timings:
            table.writerows([timing.what, timing.variant, turn, seconds] for turn, seconds in enumerate(timing.seconds, 1))
    qkv_report.chart(result, out)
    (out / "report.md").write_text(qkv_report.markdown(result), encoding="utf-8")
