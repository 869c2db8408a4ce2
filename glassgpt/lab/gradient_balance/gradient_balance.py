"""`glassgpt lab gradient-balance`: is it true that the gradient comes mostly from the response?

"Responses are longer than instructions, so masking the instruction hardly changes what is learnt" is three claims, each with a
number of its own here: which is longer, which of the two the gradient comes from, and what the mask changes.

    lengths         tokens of Q and A, in the loss, over all training examples
    gradients       of the same batches before and along each mode's first run; lab/gradient_balance/split.py says how
    what it does    held-out losses of the responses and of the instructions after equal steps from the same weights, on the same
                    batches, one run a seed; differences are paired by seed, with the t interval of the differences
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from glassgpt.config import OptimConfig, UserError
from glassgpt.config.gradient_balance import GradientBalance, weight_of
from glassgpt.config.tuning import RecordsConfig, Sft
from glassgpt.data import records as reading
from glassgpt.lab import series
from glassgpt.lab.gradient_balance import report as gradient_balance_report
from glassgpt.lab.gradient_balance.compare import RESULT_FILE, Part, Point, Result
from glassgpt.lab.gradient_balance.split import KINDS, Marked, Split, batch, losses, mark, split
from glassgpt.lab.ladder.compare import t_quantile
from glassgpt.loading import load, pick_device
from glassgpt.model import GPT, use_attention
from glassgpt.text import chat
from glassgpt.train import machine, optim
from glassgpt.train.loss import Scored
from glassgpt.tuning import examples, stage
from glassgpt.tuning.examples import Order, collate

PARTS = "parts"
START = "start"
MAY_DIFFER = ("out_dir", "device", "json")  # on a second call in the same folder


def gradient_balance(config: GradientBalance) -> Result:
    """Take gradients apart, train what is missing, compare; writes results.json and the pictures.

    Raises UserError for data that cannot be learnt from, when `out_dir` holds something else or was made with other options, when
    scipy is not installed, and for a loss that is not finite.
    """
    t_quantile(1)  # a missing package is told before minutes of training
    out, device, told = Path(config.out_dir), pick_device(config.device), Console(stderr=True)
    machine.keep_freed_memory()
    model = _model(config, device)
    data = read(config, model)
    series.open_folder(out, config, MAY_DIFFER, "gradient-balance")
    for line in data.told:
        told.print(line, highlight=False, soft_wrap=True)
    made: dict[str, Callable[[], Part]] = {START: lambda: start(config, model, data)}
    for seed in range(config.seed, config.seed + config.seeds):
        made |= {run_name(mode, seed): lambda mode=mode, seed=seed: train(config, mode, seed, data) for mode in config.modes}  # type: ignore[misc]
    parts = {}
    for number, (name, make) in enumerate(made.items(), 1):
        path = out / PARTS / f"{name.replace(':', '-')}.json"
        if path.exists():
            parts[name] = Part.read(path)
            continue
        began = time.perf_counter()
        parts[name] = make()
        parts[name].write(path)
        told.print(f"part {number} of {len(made)}: {name}, {time.perf_counter() - began:.1f} s", highlight=False)
    about = {"device": device.type, "threads": torch.get_num_threads(), "torch": torch.__version__}
    runs = {mode: [parts[run_name(mode, config.seed + n)] for n in range(config.seeds)] for mode in config.modes}
    result = Result(config, about, data.lengths, parts[START], runs)
    (out / RESULT_FILE).write_text(json.dumps(result.plain(), indent=1) + "\n")
    gradient_balance_report.chart(result, out)
    if config.json:
        print(json.dumps(result.plain()))
    else:
        gradient_balance_report.show(result, Console(width=gradient_balance_report.WIDTH))
    return result


def run_name(mode: str, seed: int) -> str:
    return f"{mode}-s{seed}"


def _model(config: GradientBalance, device: torch.device) -> GPT:
    model, _ = load(config.model, device=str(device), plain=True)
    use_attention(model, machine.attend_by(device))
    return model


# ---------------------------------------------------------------------- examples


@dataclass(frozen=True, eq=False)
class Data:
    """Examples to learn from, held-out ones, and what is said of them."""

    learnt: list[Marked]
    held: list[Marked]
    """By length, so that batches hold little padding."""
    lengths: dict[str, float]
    told: list[str]

    def order(self, seed: int) -> Order:
        return Order(tuple(len(item.example.ids) for item in self.learnt), seed)


def read(config: GradientBalance, model: GPT) -> Data:
    """Records as `sft` reads them, each token with its kind. Raises UserError when too few are left."""
    if not config.files:
        raise UserError("no data: name at least one file with --files FILE (docs/tuning.md lists the shapes)")
    _, tokenizer = load(config.model)
    tokenizer = tokenizer.with_template(chat.template_of(tokenizer) if config.template == "chat" else None)
    ends = examples.end_ids(tokenizer, config.template)
    longest = stage.longest(RecordsConfig(max_tokens=config.max_tokens), model)
    records = reading.read(config.files)
    audit = examples.fit(examples.conversations(records, tokenizer, config.template), longest, "drop", ends)
    if len(audit.examples) <= config.held_out:
        raise UserError(
            f"{len(audit.examples)} example(s) cannot be parted into {config.held_out} held-out ones and others to train on;"
            " give more, or lower held_out or raise max_tokens"
        )
    messages = {record.place: record.messages for record in records}
    marked = [mark(example, messages[example.place], tokenizer, config.template, ends) for example in audit.examples]
    shuffled = [marked[place] for place in np.random.default_rng(config.seed).permutation(len(marked)).tolist()]
    held, learnt = shuffled[: config.held_out], shuffled[config.held_out :]
    counts = np.array([np.bincount(item.kinds[1:], minlength=len(KINDS)) for item in learnt])  # (examples, 4)
    lengths = {name: float(mean) for name, mean in zip(KINDS, counts.mean(0), strict=True)}
    lengths["left_out"] = 1 - len(audit.examples) / (len(audit.examples) + sum(audit.dropped.values()))
    lengths["longer"] = float((counts[:, 2:].sum(1) > counts[:, :2].sum(1)).mean())
    lengths["longer_content"] = float((counts[:, 2] > counts[:, 1]).mean())
    return Data(learnt, sorted(held, key=lambda item: len(item.kinds)), lengths, stage.told(audit))


# ---------------------------------------------------------------------- parts


def start(config: GradientBalance, model: GPT, data: Data) -> Part:
    """What there is before any step."""
    return Part([Point(0, *held_out(config, model, data), splits(config, model, data))], [])


def splits(config: GradientBalance, model: GPT, data: Data) -> list[Split]:
    """The gradients of the same batches of training examples, whatever was learnt in between. Dropout is off."""
    model.eval()
    order = data.order(config.seed)
    found = []
    for number in range(config.batches):
        rows = order.share(number, 0, 0, config.batch_size, 1, 1)
        found.append(split(model, *batch([data.learnt[index] for (index,) in rows], model.head.weight.device)))
    return found


@torch.no_grad()
def held_out(config: GradientBalance, model: GPT, data: Data) -> tuple[list[float], list[int]]:
    """Nats and tokens of each kind over all held-out examples."""
    model.eval()
    nats, counts = [0.0] * len(KINDS), [0] * len(KINDS)
    for first in range(0, len(data.held), config.batch_size):
        rows, kinds = batch(data.held[first : first + config.batch_size], model.head.weight.device)
        for kind, loss in enumerate(losses(model, rows, kinds)):
            if loss is not None:
                nats[kind] += loss.sum.item()
                counts[kind] += int(loss.count)
    return nats, counts


def train(config: GradientBalance, mode: str, seed: int, data: Data) -> Part:
    """One short run of `sft`'s arithmetic in memory: loss, order, optimiser and schedule are its own."""
    device = pick_device(config.device)
    model = _model(config, device)
    scored, order = Scored(model), data.order(seed)
    settings = replace(Sft().optim, learning_rate=config.learning_rate, warmup_steps=max(1, config.steps // 10))
    optimizers = optim.build(model, settings)
    weight = weight_of(mode)
    taken_apart = {round(config.steps * n / config.points) for n in range(1, config.points + 1)} if seed == config.seed else set()
    points, trained = [], []
    for step in range(config.steps):
        model.train()
        torch.manual_seed((seed * 1_000_003 + step) * 4096)
        rows = order.share(step, 0, 0, config.batch_size, 1, 1)
        given = collate([[data.learnt[index].example] for (index,) in rows], weight).to(device)
        loss = scored(given.ids, given.targets, given.segments, weights=given.weights) / given.count
        loss.backward()
        _step(model, optimizers, settings, step, config.steps)
        trained.append(loss.item())
        if not np.isfinite(trained[-1]):
            raise UserError(
                f"run {run_name(mode, seed)}, step {step + 1}: loss {trained[-1]}; try a lower learning_rate,"
                f" now {config.learning_rate}"
            )
        done = step + 1
        is_due = done == config.steps or bool(config.eval_interval and done % config.eval_interval == 0)
        if is_due or done in taken_apart:
            apart = splits(config, model, data) if done in taken_apart else []
            points.append(Point(done, *held_out(config, model, data), apart))
    return Part(points, trained)


def _step(model: GPT, optimizers: list[torch.optim.Optimizer], settings: OptimConfig, step: int, steps: int) -> None:
    optim.set_rate(optimizers, optim.learning_rate(step, steps, settings))
    optim.clip(model, settings.grad_clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
