"""A run's folder and what people see of it: JSONL log, progress line, loss plot."""

from __future__ import annotations

import hashlib
import io
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import rich.progress
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from glassgpt import charts
from glassgpt.config import UserError
from glassgpt.config.errors import first_line

LOG_FILE = "log.jsonl"
PLAIN_LINE_SECONDS = 10.0


class Log:
    """One JSON object a line, flushed as written. Entries after `step` (from before a crash) are dropped on opening."""

    def __init__(self, run: Path, step: int, *, writes: bool = True) -> None:
        path = run / LOG_FILE
        self.before = kept = [entry for entry in read_log(run) if entry["step"] <= step]
        self._file: TextIO = io.StringIO()
        if not writes:  # a rank that only reads
            return
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
    """A live view on a terminal: step and time left, loss, speed, memory, the curve, the last sample. Elsewhere a plain line
    every ten seconds."""

    def __init__(self, title: str, total_steps: int, first_step: int, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._total, self._first = total_steps, first_step
        self._start = self._last_line = time.perf_counter()
        self._mean = Mean()
        self._curve: list[float] = []
        self._sample = ""
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=24),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("eta"),
            rich.progress.TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._bar.add_task(title, total=total_steps, completed=first_step)
        self._live = Live(self._view(""), console=self.console, refresh_per_second=4) if self.console.is_terminal else None

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, step: int, loss: float, speed: str, memory_bytes: int) -> None:
        """`step` steps are done."""
        smoothed = self._mean.add(loss)
        self._curve.append(smoothed)
        text = f"loss {loss:.4f} (mean {smoothed:.4f})  {speed}  {memory_bytes / 1e9:.2f} GB"
        now = time.perf_counter()
        if self._live:
            self._bar.update(self._task, completed=step)
            self._live.update(self._view(text))
        elif now - self._last_line >= PLAIN_LINE_SECONDS or step == self._total:
            self._last_line = now
            left = (now - self._start) / max(1, step - self._first) * (self._total - step)
            self.say(f"step {step}/{self._total}  {text}  eta {left / 60:.1f} min")

    def _view(self, text: str) -> Group:
        parts: list[Any] = [self._bar, Text(text)]
        if len(self._curve) > 1:
            parts.append(Text(f"{sparkline(self._curve)}  {self._curve[0]:.2f} -> {self._curve[-1]:.2f}", style="cyan"))
        if self._sample:
            parts.append(Text(self._sample, style="dim", overflow="ellipsis", no_wrap=True))
        return Group(*parts)

    def show_sample(self, step: int, text: str) -> None:
        """Keep a sample in view; say it where there is no live view."""
        self._sample = f"step {step}: " + " ".join(text.split())
        if not self._live:
            self.say(f"step {step}: {text}")

    def say(self, text: str) -> None:
        """Print a line above the live view."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        sys.stderr.flush()

    def show(self, what: Any) -> None:
        """Print a table or another thing that Rich knows above the live view."""
        self.console.print(what)


class Silent(Progress):
    """For the ranks that do not print."""

    def __init__(self) -> None:
        super().__init__("", 1, 0, Console(file=io.StringIO()))


class Mean:
    """Exponential mean, unbiased at the start."""

    def __init__(self, decay: float = 0.95) -> None:
        self._decay, self._sum, self._weight = decay, 0.0, 0.0

    def add(self, value: float) -> float:
        """The mean with this value in it; one that is not finite is passed over."""
        if not math.isfinite(value):
            return self._sum / self._weight if self._weight else 0.0
        self._sum = self._decay * self._sum + (1 - self._decay) * value
        self._weight = self._decay * self._weight + (1 - self._decay)
        return self._sum / self._weight


def sparkline(values: Sequence[float], width: int = 48) -> str:
    """A curve in one line of characters, eight heights."""
    size = max(1, len(values) / width)
    points = [values[int(n * size)] for n in range(min(width, len(values)))]
    low, high = min(points), max(points)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / ((high - low) or 1))] for value in points)


class Trackers:
    """The log's numbers, sent to what the user named; nothing when that is empty.

    TensorBoard's files lie in `run/tensorboard`. Raises UserError when a package is missing.
    """

    def __init__(self, names: Sequence[str], run: Path, config: dict[str, Any]) -> None:
        self._send: list[Callable[[int, dict[str, float]], Any]] = []
        self._close: list[Callable[[], Any]] = []
        for name in names:
            try:
                getattr(self, f"_open_{name}")(run, config)
            except ImportError as error:
                raise UserError(f"the tracker {name} is not installed; pip install 'glassgpt[track]'") from error
            except Exception as error:  # no key, no network: whatever the package raises
                raise UserError(f"the tracker {name} cannot be opened: {first_line(error)}") from error

    def _open_tensorboard(self, run: Path, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run / "tensorboard"))

        def send(step: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        self._send.append(send)
        self._close.append(writer.close)

    def _open_wandb(self, run: Path, config: dict[str, Any]) -> None:
        import wandb

        same = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]  # a resumed run goes on where it was
        opened = wandb.init(project="glassgpt", name=run.name, id=same, dir=str(run), config=config, resume="allow")
        self._send.append(lambda step, values: opened.log(values, step=step))
        self._close.append(opened.finish)

    def _open_trackio(self, run: Path, config: dict[str, Any]) -> None:
        import trackio

        opened = trackio.init(project="glassgpt", name=run.name, config=config, resume="allow")
        self._send.append(lambda step, values: opened.log(values, step=step))
        self._close.append(opened.finish)

    def send(self, entry: dict[str, Any]) -> None:
        """One log entry's numbers."""
        numbers = ((name, value) for name, value in entry.items() if isinstance(value, int | float) and name != "step")
        values = {name: float(value) for name, value in numbers}
        for send in self._send:
            send(entry["step"], values)

    def close(self) -> None:
        for close in self._close:
            close()


def plot_loss(run: Path) -> list[Path]:
    """Draw training and held-out loss against step from the log, as `loss.svg` and `loss.png`; of a run with rewards these, and
    the divergence from the start, as `reward.svg` and `reward.png`."""
    entries = read_log(run)
    if any("reward" in entry for entry in entries):
        return _plot_curve(run, entries, "reward", "reward of an answer")
    unit = " (nats per token)" if any("tokens" in entry for entry in entries) else ""
    return _plot_curve(run, entries, "loss", f"loss{unit}")


def _plot_curve(run: Path, entries: list[dict[str, Any]], name: str, what: str) -> list[Path]:
    figure, axes = charts.figure()
    training, held_out, divergence = (
        [(entry["step"], entry[key]) for entry in entries if key in entry] for key in (name, f"val_{name}", "kl")
    )
    if training:
        axes.plot(*zip(*training, strict=True), color="#9db8d9", linewidth=0.8, label="training, each step")
        axes.plot(*zip(*_smoothed(training), strict=True), color="#2f5d9b", linewidth=1.6, label="training, smoothed")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="#c8553d", markersize=3.5, linewidth=1.2, label="held out")
    axes.set(xlabel="step", ylabel=what, title=run.name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="upper left")
    if divergence:
        other = axes.twinx()
        other.plot(*zip(*divergence, strict=True), color="#7a7a7a", linewidth=1, linestyle="--", label="KL to the start")
        other.set(ylabel="KL divergence to the start (nats an answer)")
        other.legend(frameon=False, loc="lower right")
    return charts.save_both(figure, run, name)


def _smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    mean = Mean()
    return [(step, mean.add(value)) for step, value in points]
