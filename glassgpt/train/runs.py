"""`glassgpt runs`: what training runs there are, how far each got and how well."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from glassgpt import charts
from glassgpt.config import Pretrain, UserError
from glassgpt.config.distill import Distill
from glassgpt.config.files import CONFIG_FILE, read_yaml
from glassgpt.config.runs import Runs
from glassgpt.config.tuning import Dpo, Grpo, Ppo, Reward, Sft, Tuning
from glassgpt.loading import complete_checkpoints
from glassgpt.train import checkpoint
from glassgpt.train.run import LOG_FILE, read_log


@dataclass(frozen=True)
class Run:
    """One run, from its configuration and its log."""

    name: str
    state: str
    """`done`, or how many steps of how many."""
    parameters: int | None
    """As its newest checkpoint states, None before the first one."""
    tokens: int
    """Trained on so far."""
    loss: float | None
    """Of the last step, in nats per token."""
    best_val_loss: float | None
    best_bits_per_byte: float | None
    tokens_per_second: float | None
    """Median of the steps."""
    hours: float
    """Spent in steps."""
    curve: tuple[tuple[int, float], ...]
    """(tokens, held-out loss) at each validation."""


def runs(config: Runs) -> list[Run]:
    """Print the runs under some folders, best held-out loss first. Raises UserError when there is none."""
    folders = [found for place in config.folders for found in _runs_in(Path(place))]
    if not folders:
        raise UserError(f"no training run in {', '.join(config.folders)}; a run is a folder with {CONFIG_FILE} and {LOG_FILE}")
    base = Path(os.path.commonpath([str(folder.parent.resolve()) for folder in folders]))
    found = []
    for folder in folders:
        try:
            found.append(describe(folder, str(folder.resolve().relative_to(base))))
        except UserError as error:  # of one run: the others are shown all the same
            print(f"left out: {error}", file=sys.stderr)
    found.sort(key=lambda run: (run.best_val_loss is None, run.best_val_loss))
    if config.chart:
        plot(found, Path(config.chart))
    if config.json:
        print(json.dumps([asdict(run) for run in found]))
    else:
        _show(found, config.chart)
    return found


def _runs_in(place: Path) -> list[Path]:
    if not place.is_dir():
        raise UserError(f"{place}: no such folder")
    return sorted(path.parent for path in place.rglob(LOG_FILE) if (path.parent / CONFIG_FILE).is_file())


def describe(folder: Path, name: str) -> Run:
    """Read one run."""
    config = read_config(folder)
    log = read_log(folder)
    seen, curve = 0, []
    for entry in log:
        seen += round(entry.get("tokens", 0))
        if "val_loss" in entry:
            curve.append((seen, entry["val_loss"]))
    validated = [entry for entry in log if "val_loss" in entry]
    best = min(validated, key=lambda entry: entry["val_loss"], default=None)
    steps = log[-1]["step"] if log else 0
    saved = complete_checkpoints(folder)
    total = config.max_steps or (checkpoint.facts(saved[-1])["total_steps"] if saved else 0)
    return Run(
        name,
        "done" if steps == total else f"{steps:,}/{total:,}" if total else f"{steps:,}",
        _parameters(saved[-1]) if saved else None,
        seen,
        log[-1]["loss"] if log else None,
        best["val_loss"] if best else None,
        best.get("val_bits_per_byte") if best else None,
        statistics.median(entry["tokens"] / entry["seconds"] for entry in log) if seen else None,
        sum(entry["seconds"] for entry in log) / 3600,
        tuple(curve),
    )


def read_config(folder: Path) -> Pretrain | Tuning | Distill:
    """The configuration of a run of any stage: the one whose options its file holds."""
    try:
        given = set(yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        given = set()  # `read_yaml` will say what is wrong
    kinds: tuple[type[Pretrain | Tuning | Distill], ...] = (Pretrain, Sft, Reward, Dpo, Ppo, Grpo, Distill)
    kind = next((kind for kind in kinds if given == {field.name for field in dataclasses.fields(kind)}), Pretrain)
    return read_yaml(folder / CONFIG_FILE, kind)


def _parameters(folder: Path) -> int:
    """Counted on the meta device, without reading weights."""
    import torch

    from glassgpt.loading import find
    from glassgpt.model import GPT

    with torch.device("meta"):
        return sum(p.numel() for p in GPT(find(folder).config()).parameters())


def plot(found: list[Run], path: Path) -> None:
    """Held-out loss against tokens, a line for each run. Raises UserError for a suffix that is no picture."""
    if path.suffix not in charts.PICTURES:
        raise UserError(f"chart {path}: give a name that ends in .svg or .png")
    figure, axes = charts.figure()
    for run in found:
        if run.curve:
            axes.plot(*zip(*run.curve, strict=True), "o-", markersize=3, linewidth=1.4, label=run.name)
    axes.set(xlabel="tokens trained on", ylabel="held-out loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    charts.save(figure, path)


def _show(found: list[Run], chart: str | None) -> None:
    table = Table("run", box=None, pad_edge=False)
    for title in ("state", "params", "tokens", "loss", "held-out", "bits/byte", "tokens/s", "hours"):
        table.add_column(title, justify="right")
    for run in found:
        numbers = (run.loss, run.best_val_loss, run.best_bits_per_byte)
        table.add_row(
            run.name,
            run.state,
            "" if run.parameters is None else _short(run.parameters),
            _short(run.tokens),
            *("" if value is None else f"{value:.4f}" for value in numbers),
            "" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}",
            f"{run.hours:.2f}",
        )
    console = Console()
    console.print(table)
    if chart:
        console.print(f"wrote {chart}", highlight=False)


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)
