"""A run's folder and what people see of it: JSONL log, progress line, loss plot."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import rich.progress
from rich.console import Console

LOG_FILE = "log.jsonl"
PLAIN_LINE_SECONDS = 10.0


class Log:
    """One JSON object a line, flushed as written. Entries after `step` (from before a crash) are dropped on opening."""

    def __init__(self, run: Path, step: int) -> None:
        path = run / LOG_FILE
        kept = [entry for entry in read_log(run) if entry["step"] <= step]
        aside = path.with_suffix(".tmp")  # a crash must not leave half a log
        aside.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        aside.replace(path)
        self._file = path.open("a")

    def write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_log(run: Path) -> list[dict[str, Any]]:
    """The log's entries; a last line that a crash cut off is left out."""
    path = run / LOG_FILE
    entries = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


class Progress:
    """A live line (step, loss, tokens/s, time left) on a terminal; elsewhere a plain line every ten seconds."""

    def __init__(self, title: str, total_steps: int, first_step: int, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._total, self._first = total_steps, first_step
        self._start = self._last_line = time.perf_counter()
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=24),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[text]}"),
            rich.progress.TextColumn("eta"),
            rich.progress.TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=False,
        )
        self._task = self._bar.add_task(title, total=total_steps, completed=first_step, text="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """`step` steps are done."""
        text = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, text=text)
        now = time.perf_counter()
        if not self.console.is_terminal and (now - self._last_line >= PLAIN_LINE_SECONDS or step == self._total):
            self._last_line = now
            left = (now - self._start) / max(1, step - self._first) * (self._total - step)
            self.say(f"step {step}/{self._total}  {text}  eta {left / 60:.1f} min")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        sys.stderr.flush()


def plot_loss(run: Path) -> list[Path]:
    """Draw training and validation loss against step from the log, as `loss.svg` and `loss.png`."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    entries = read_log(run)
    training = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    validation = [(entry["step"], entry["val_loss"]) for entry in entries if "val_loss" in entry]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    if training:
        axes.plot(*zip(*training, strict=True), color="#9db8d9", linewidth=0.8, label="training, each step")
        axes.plot(*zip(*_smoothed(training), strict=True), color="#2f5d9b", linewidth=1.6, label="training, smoothed")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color="#c8553d", markersize=3.5, linewidth=1.2, label="held-out text")
    axes.set(xlabel="optimiser step", ylabel="loss (nats per token)", title=run.name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    paths = [run / "loss.svg", run / "loss.png"]
    for path in paths:
        figure.savefig(path, dpi=120)
    plt.close(figure)
    return paths


def _smoothed(points: list[tuple[int, float]], decay: float = 0.95) -> list[tuple[int, float]]:
    """Exponential mean, unbiased at the start."""
    mean = weight = 0.0
    out = []
    for step, value in points:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        out.append((step, mean / weight))
    return out
