"""`glassgpt distill --compare`: what the teacher is worth, the same student trained with it and without."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from glassgpt import charts
from glassgpt.compress import student
from glassgpt.compress.distill import context_of, distill, held_out_batches, opened, prepare
from glassgpt.config import UserError
from glassgpt.config.distill import Distill
from glassgpt.config.files import CONFIG_FILE, to_plain, write_yaml
from glassgpt.interpret.cost import parameters
from glassgpt.loading import load, pick_device
from glassgpt.train import machine
from glassgpt.train.evaluate import measure
from glassgpt.train.loss import Scored
from glassgpt.train.parallel import Ranks
from glassgpt.train.pretrain import SHARDS, TOKENIZER_FILE
from glassgpt.train.run import LOG_FILE, read_log

ALONE, LOGITS, HIDDEN = "alone", "logits", "logits-hidden"
NAMES = {ALONE: "alone", LOGITS: "teacher's logits", HIDDEN: "logits and hidden states"}
RESULT_FILE, CHART = "comparison.json", "comparison"


@dataclass(frozen=True)
class Arm:
    """One training."""

    name: str
    seed: int
    bits_per_byte: float
    """Of all held-out text, after the last step."""
    seconds: float
    """Of all steps: the teacher's forward pass is not free."""
    curve: list[tuple[int, float, float]]
    """(tokens seen, seconds of training, held-out bits per byte) at each validation; but for the last on a sample."""


@dataclass(frozen=True)
class Comparison:
    """What came of a comparison."""

    config: dict[str, Any]
    teacher_bits_per_byte: float
    teacher_parameters: int
    student_parameters: int
    arms: list[Arm]

    def gains(self, name: str) -> list[float]:
        """Bits per byte that a student with its teacher is below the same one alone, for each seed."""
        alone = {arm.seed: arm.bits_per_byte for arm in self.arms if arm.name == ALONE}
        return [alone[arm.seed] - arm.bits_per_byte for arm in self.arms if arm.name == name]

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"gains": {name: self.gains(name) for name in self.names() if name != ALONE}}

    def names(self) -> list[str]:
        return list(dict.fromkeys(arm.name for arm in self.arms))


def compare(config: Distill) -> Comparison:
    """Train every arm that is not complete, then print and write `comparison.json` and a picture; see `Distill.compare`.

    Arms are ordinary runs in folders of their own. Raises UserError as `distill` does, and when an arm was told to stop.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--compare trains one run after the other in one process; start it without torchrun")
    out = Path(config.out_dir)
    if not config.resume and any(out.glob(f"*/{LOG_FILE}")):
        raise UserError(f"{out} holds a comparison already; continue it with --resume, or choose another out_dir")
    settled = opened(config)
    device = pick_device(config.device)
    teacher, tokenizer = student.open_teacher(settled, device)
    corpus = prepare(out, settled, tokenizer)
    planned = arms(settled)
    console = Console(stderr=True)
    for number, arm in enumerate(planned, 1):
        folder = Path(arm.out_dir)
        if not is_complete(folder, arm):
            console.print(f"{number} of {len(planned)}: {folder.name}", highlight=False)
            train(arm)
        if not is_complete(folder, arm):
            raise UserError(f"{folder.name} was told to stop and is saved; the same command with --resume goes on from there")
    model = load(planned[0].out_dir)[0]
    end_id = tokenizer.end_id if config.data.mask_documents else None
    found = measure(
        Scored(teacher),
        held_out_batches(corpus, context_of(model, teacher), config, end_id),
        torch.tensor(tokenizer.byte_lengths(), device=device),
        machine.autocast(device, config.precision),
        Ranks(device),
    )
    large, small = (parameters(which.config) for which in (teacher, model))
    result = Comparison(to_plain(settled), found["bits_per_byte"], large, small, [read(arm) for arm in planned])
    (out / RESULT_FILE).write_text(json.dumps(result.plain(), indent=1) + "\n", encoding="utf-8")
    chart(result, out)
    if config.json:
        print(json.dumps(result.plain()))
    else:
        show(result, Console())
    return result


def arms(config: Distill) -> list[Distill]:
    """The runs of a comparison, seed by seed: nothing differs within a seed but what is learnt from."""
    changes: dict[str, dict[str, Any]] = {ALONE: {"alpha": 0.0, "hidden_weight": 0.0}, LOGITS: {"hidden_weight": 0.0}}
    if config.hidden_weight:
        changes[HIDDEN] = {}
    plain = dataclasses.replace(config, compare=False, seeds=1, json=False, resume=True)
    return [
        dataclasses.replace(plain, out_dir=str(Path(config.out_dir) / f"{name}-{seed}"), seed=seed, **change)
        for seed in range(config.seed, config.seed + config.seeds)
        for name, change in changes.items()
    ]


def train(arm: Distill) -> None:
    """Train an arm, or continue it. It sees the comparison's tokenizer and shards through links: they exist once."""
    folder = Path(arm.out_dir)
    if not (folder / LOG_FILE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name in (TOKENIZER_FILE, SHARDS):
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(Path("..") / name)
        write_yaml(folder / CONFIG_FILE, dataclasses.replace(arm, resume=False))
    distill(arm)


def is_complete(folder: Path, arm: Distill) -> bool:
    """Whether the run made its last step and measured its loss."""
    entries = read_log(folder)
    return bool(entries) and entries[-1]["step"] == arm.max_steps and "val_loss" in entries[-1]


def read(arm: Distill) -> Arm:
    """What a complete arm's log says."""
    tokens, seconds, curve = 0, 0.0, []
    log = read_log(Path(arm.out_dir))
    for entry in log:
        tokens, seconds = tokens + round(entry["tokens"]), seconds + entry["seconds"]
        if "val_bits_per_byte" in entry:
            curve.append((tokens, seconds, entry["val_bits_per_byte"]))
    name = Path(arm.out_dir).name.rpartition("-")[0]
    return Arm(name, arm.seed, log[-1]["val_bits_per_byte"], seconds, curve)


# ---------------------------------------------------------------------- table and picture


def show(result: Comparison, console: Console) -> None:
    """A row an arm, then what the teacher was worth."""
    table = Table("trained on", box=None, pad_edge=False)
    for title in ("seed", "bits/byte", "less than alone", "minutes"):
        table.add_column(title, justify="right")
    gains = {name: iter(result.gains(name)) for name in result.names()}
    for arm in result.arms:
        gain = "" if arm.name == ALONE else f"{next(gains[arm.name]):+.4f}"
        table.add_row(NAMES[arm.name], str(arm.seed), f"{arm.bits_per_byte:.4f}", gain, f"{arm.seconds / 60:.1f}")
    console.print(table)
    console.print(
        f"teacher: {result.teacher_bits_per_byte:.4f} bits per byte, {result.teacher_parameters:,} parameters; student"
        f" {result.student_parameters:,}",
        highlight=False,
    )
    for name in result.names()[1:]:
        console.print(f"{NAMES[name]}: {verdict(result.gains(name))}", highlight=False)


def verdict(gains: list[float]) -> str:
    """What the differences of all seeds allow to say, in words."""
    mean = statistics.fmean(gains)
    told = f"{abs(mean):.4f} bits per byte {'better' if mean > 0 else 'worse'} than alone at equal tokens"
    if len(gains) == 1:
        return f"{told}, with one seed"
    if min(gains) > 0 or max(gains) < 0:
        return f"{told} on average, with the same sign for all {len(gains)} seeds ({min(gains):+.4f} to {max(gains):+.4f})"
    return f"no difference that {len(gains)} seeds agree on ({min(gains):+.4f} to {max(gains):+.4f} bits per byte)"


def chart(result: Comparison, out: Path) -> list[Path]:
    """Held-out bits per byte over tokens, and over the seconds that they took."""
    figure, panels = charts.figure(2, (11, 4.5))
    colours = dict(zip(NAMES, ("#7a7a7a", "#2f5d9b", "#c8553d"), strict=True))
    for place, (axes, what) in enumerate(zip(panels, ("tokens", "seconds of training"), strict=True)):
        named: set[str] = set()
        for arm in result.arms:
            points = [(point[place], point[2]) for point in arm.curve]
            label = None if arm.name in named else NAMES[arm.name]
            named.add(arm.name)
            axes.plot(*zip(*points, strict=True), "o-", ms=3.5, lw=1.4, color=colours[arm.name], label=label)
        axes.axhline(result.teacher_bits_per_byte, color="#333333", lw=1, ls="--", label="teacher")
        axes.set(xlabel=what)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="held-out bits per byte")
    panels[0].legend(frameon=False)
    return charts.save_both(figure, out, CHART)
