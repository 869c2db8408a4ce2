"""What people see of the alignment runs: nine small panels, a table, and a sentence on each run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from glassgpt import charts

if TYPE_CHECKING:
    from glassgpt.lab.alignment.alignment import Result, Run

NAME = "alignment"
METHODS = {"PPO": "#2f5d9b", "DPO": "#2e8b57", "GRPO": "#b8722c"}
LOOSE, TIGHT = "#c8553d", "#2f5d9b"
DEVIATIONS = 3.0
"""The truth has fallen when it is so many standard errors of the difference below its best, which is the luckiest of many."""


# ---------------------------------------------------------------------- words


def has_fallen(run: Run, prompts: int) -> bool:
    """Whether the truth is clearly below its best."""
    best, last = run.best, run.points[-1]
    variance = sum(point.truth * (1 - point.truth) for point in (best, last)) / prompts
    return best.truth - last.truth > DEVIATIONS * math.sqrt(variance)


def verdict(run: Run, prompts: int) -> str:
    """Over-optimised: the truth has fallen, and the proxy is no lower than it was at the truth's best."""
    if not has_fallen(run, prompts):
        return "not over-optimised"
    return "over-optimised" if run.points[-1].proxy >= run.best.proxy else "truth and proxy have both fallen"


def findings(result: Result) -> list[str]:
    """One sentence on each run."""
    drawn, commonest = result.chance
    start = result.start
    said = [
        f"the start answers {start.truth:.1%} exactly (chance: {drawn:.1%} by drawing an answer as often as it comes,"
        f" {commonest:.1%} by always saying the commonest), and pleases the proxy to {start.proxy:.2f}"
    ]
    for run in result.runs:
        best, last, name = run.best, run.points[-1], f"{run.method}, beta {run.beta:g}"
        if run.experiment == "goal":
            way = f" -> {best.truth:.1%} (step {best.step})" if has_fallen(run, result.config.prompts) else ""
            said.append(f"{name}, rewarded for the truth: {start.truth:.1%}{way} -> {last.truth:.1%}, {last.kl:.1f} nats")
            continue
        proxy = f"proxy {start.proxy:.2f} -> {last.proxy:.2f}"
        course = f"truth {start.truth:.1%} -> {best.truth:.1%} (step {best.step}) -> {last.truth:.1%}, {last.kl:.1f} nats"
        said.append(f"{name}, rewarded for the proxy: {proxy}, {course}: {verdict(run, result.config.prompts)}")
    return said


def show(result: Result, console: Console) -> None:
    """Print the table and the sentences."""
    table = Table("reward", "method", box=None, pad_edge=False)
    for column in ("beta", "proxy", "truth", "best", "wins", "KL", "entropy", "length", "s"):
        table.add_column(column, justify="right")
    start = result.start
    table.add_row("", "start", "", *_cells(start), f"{result.start_seconds:.0f}")
    for run in result.runs:
        table.add_row(run.experiment, run.method, f"{run.beta:g}", *_cells(run.points[-1], run.best), f"{run.seconds:.0f}")
    console.print(table)
    console.print(
        f"measured on {result.config.prompts} held-out problems; best: the highest truth on the way; wins: against the start's"
        " answers, draws half; KL in nats per answer, entropy per token, length in tokens, s: seconds of training steps",
        style="dim",
        highlight=False,
    )
    for run in result.runs:
        if run.margin is not None and run.accuracy is not None:
            pairs = result.pairs[run.experiment][1]
            text = f"DPO, {run.experiment}, beta {run.beta:g}: margin {run.margin:+.3f}, better one gained in {run.accuracy:.1%}"
            console.print(f"{text} of {pairs} held-out pairs", highlight=False)
    for sentence in findings(result):
        console.print(sentence, highlight=False)
    names = ", ".join(f"{NAME}{suffix}" for suffix in charts.PICTURES)
    console.print(f"wrote {result.config.out_dir}/results.json, {names}", highlight=False)


def _cells(point: Any, best: Any = None) -> list[str]:
    return [
        f"{point.proxy:.3f}", f"{point.truth:.3f}", f"{best.truth:.3f}" if best else "", f"{point.wins:.3f}", f"{point.kl:.2f}",
        f"{point.entropy:.2f}", f"{point.length:.1f}",
    ]  # fmt: skip


# ---------------------------------------------------------------------- picture


def series_of(run: Run, name: str) -> tuple[list[float], list[float]]:
    """(steps, numbers) of a run."""
    return [float(point.step) for point in run.points], [float(getattr(point, name)) for point in run.points]


def chart(result: Result, out: Path) -> list[Path]:
    """Draw `alignment.svg` and `alignment.png`."""
    figure, _ = charts.figure(1, (13, 10))
    figure.clear()
    panels = figure.subplots(3, 3)
    for axes, method in zip(panels[0], METHODS, strict=True):
        for run in (run for run in result.of("proxy") if run.method == method):
            color = TIGHT if run.is_tight else LOOSE
            axes.plot(*series_of(run, "proxy"), "-", color=color, lw=1.6, label=f"proxy, beta {run.beta:g}")
            axes.plot(*series_of(run, "truth"), "--", color=color, lw=1.6, label=f"truth, beta {run.beta:g}")
        axes.set(title=f"{method}, rewarded for the proxy", xlabel="step", ylim=(-0.03, 1.03))
        axes.legend(frameon=False, fontsize=8, loc="upper right" if method == "DPO" else "center right")

    axes = panels[1][0]
    for run in result.of("proxy"):
        axes.plot([math.sqrt(max(0.0, p.kl)) for p in run.points], [p.truth for p in run.points], *_style(run), **_look(run))
    axes.set(title="Truth against distance from the start", xlabel="square root of the KL divergence (nats)", ylim=(-0.03, 1.03))
    axes.legend(frameon=False, fontsize=8)

    rest = {
        "kl": "KL divergence to the start (nats an answer)",
        "wins": "Win rate against the start, by the truth",
        "entropy": "Entropy (nats a token)",
        "length": "Length of an answer (tokens)",
    }
    for axes, (name, title) in zip((*panels[1][1:], *panels[2][:2]), rest.items(), strict=True):
        for run in result.of("proxy"):
            axes.plot(*series_of(run, name), *_style(run), **_look(run))
        axes.set(title=title, xlabel="step")
    panels[1][1].set_yscale("symlog", linthresh=1.0)
    panels[1][2].axhline(0.5, color="#888888", lw=0.8)

    axes = panels[2][2]
    for run in result.of("goal"):
        axes.plot(*series_of(run, "truth"), *_style(run), **_look(run))
    axes.set(title="Rewarded for the truth: truth", xlabel="step", ylim=(-0.03, 1.03))
    axes.legend(frameon=False, fontsize=8)
    for axes in panels.flat:
        axes.grid(alpha=0.3)
        axes.title.set_fontsize(10)
    return charts.save_both(figure, out, NAME)


def _style(run: Run) -> tuple[str]:
    return (":o" if run.is_tight else "-o",)


def _look(run: Run) -> dict[str, Any]:
    return {"color": METHODS[run.method], "lw": 1.4, "ms": 3, "label": f"{run.method}, beta {run.beta:g}"}
