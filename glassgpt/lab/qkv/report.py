"""What people see of `glassgpt lab qkv`: tables, a picture of three panels, a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from glassgpt import charts
from glassgpt.lab.bench.train import NOISY
from glassgpt.lab.ladder.compare import signed
from glassgpt.lab.qkv.speed import BASE, Timing
from glassgpt.lab.tables import markdown_tables

if TYPE_CHECKING:
    from glassgpt.lab.qkv.qkv import Result

NAME = "qkv"
WIDTH = 100
"""Of the tables, in columns."""
COLORS = {"fused": "#3a76c4", "separate": "#2e8b57", "untied": "#c8553d"}
INK = "#2b2f36"
SEEN = 1e-6
"""A difference in float64 that is no longer rounding alone: unstable training has magnified it."""
ZERO = 1e-16
"""Where a difference of exactly 0 is drawn on a logarithmic axis."""


def verdict(timing: Timing) -> str:
    """What the ratio to the first variant of its group says."""
    middle, low, high = timing.ratio
    if low == high == 1:
        return ""
    if low <= 1 <= high:
        return "undecided"
    return f"{abs(middle - 1):.0%} {'slower' if middle > 1 else 'faster'}"


def tables(result: Result) -> list[tuple[str, list[str], list[list[str]]]]:
    """All numbers as text: (title, headings, rows) of each table."""
    rows = []
    for timing in result.timings:
        middle, low, high = timing.ratio
        cells = [f"{timing.median * 1000:.2f}", f"{timing.spread:.0%}", f"{middle:.3f} [{low:.3f}, {high:.3f}]", verdict(timing)]
        rows.append([timing.what, timing.variant, *cells])
    found = [("Speed", ["what", "variant", "ms", "spread", "ratio to the first", ""], rows)]
    rows = []
    for name, held in result.memory.items():
        rows.append([name, f"{held.parameters:,}", *(f"{x / 1e6:.0f}" for x in (held.forward_bytes, held.training_bytes))])
    found.append(("Memory", ["variant", "parameters", "forward pass, MB", "training, MB"], rows))
    rows = [
        [run.variant, str(run.seed), run.dtype, f"{run.parameters:,}", f"{run.held_out[0][1]:.4f}", f"{run.held_out[-1][1]:.4f}"]
        for run in result.runs
    ]
    headings = ["variant", "seed", "numbers", "parameters", "at the start", "at the end"]
    return found + ([("Small trainings: held-out loss, nats per token", headings, rows)] if rows else [])


def findings(result: Result) -> list[str]:
    """What was found, in words."""
    config, about = result.config, result.about
    told = [
        f"{config['preset']} on {about['device']}, {about['threads']} thread(s): medians of {config['rounds']} turns; ratios are"
        " within turns, brackets are 95 % intervals (bootstrap over turns); spread is the distance of the quartiles."
    ]
    if noisy := [timing for timing in result.timings if timing.spread > NOISY]:
        told.append(
            f"The machine was not quiet: in {len(noisy)} of {len(result.timings)} timings the spread is above {NOISY:.0%}."
        )
    single, double = (result.differences(dtype) for dtype in ("float32", "float64"))
    if single and double:
        chaos = next((step for step, apart in enumerate(double, 1) if apart > SEEN), None)
        magnified = f" Training magnifies rounding: from step {chaos} on it is above {SEEN} in float64 too." if chaos else ""
        told.append(
            "Three matrices with the fused one's numbers compute the same: losses of the first step differ by"
            f" {single[0]:.1e} nats in float32 and {double[0]:.1e} in float64, those of all {len(single)} steps by at most"
            f" {max(single):.1e} and {max(double):.1e}.{magnified} What differs is speed."
        )
    if (difference := result.untied_difference) is not None:
        counts = {run.variant: run.parameters for run in result.runs}
        more = max(counts.values()) / counts[BASE] - 1
        told.append(
            f"A head of its own costs {more:.0%} more parameters in {config['train_preset']}; after {config['steps']} equal steps"
            f" its held-out loss differs by {signed(difference)} nats per token (95 % t interval, {config['seeds']} seed(s))."
        )
    return told


def show(result: Result, console: Console) -> None:
    """Print the tables and what they say."""
    for title, headings, rows in tables(result):
        table = Table(*headings, title=title, title_justify="left", box=None, pad_edge=False)
        for column in table.columns:
            column.no_wrap = True
        for column in table.columns[1:]:
            column.justify = "right"
        if title == "Speed":
            table.columns[1].justify = "left"
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print()
    for sentence in findings(result):
        console.print(sentence, highlight=False)
    console.print(f"\nWritten: {result.config['out_dir']}/report.md and the files beside it", highlight=False, soft_wrap=True)


def markdown(result: Result) -> str:
    """The report."""
    lines = ["# Fused QKV or three matrices; tied head or one of its own", "", *(f"- {one}" for one in findings(result))]
    lines += ["", f"![{NAME}]({NAME}.svg)", ""]
    return "\n".join([*lines, *markdown_tables(tables(result))])


# ---------------------------------------------------------------------- picture


def color_of(variant: str) -> str:
    if "untied" in variant:
        return COLORS["untied"]
    return COLORS["separate" if "separate" in variant or "three" in variant else "fused"]


def chart(result: Result, out: Path) -> list[Path]:
    """Time ratios with intervals; the difference of fused and separate; held-out losses of tied and untied."""
    import matplotlib

    inked: Any = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context(inked | {"svg.hashsalt": NAME}):
        figure, _ = charts.figure(size=(17, 5.4))
        figure.clear()
        ratios, same, loss = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
        _ratios(ratios, result)
        _same(same, result)
        _losses(loss, result)
        for axes in (ratios, same, loss):
            axes.grid(axis="x" if axes is ratios else "y", alpha=0.25)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.title.set_fontsize(11)
        return charts.save_both(figure, out, NAME)


def _ratios(axes: Any, result: Result) -> None:
    rows = [timing for timing in result.timings if verdict(timing)]
    for place, timing in enumerate(rows):
        middle, low, high = timing.ratio
        axes.hlines(place, low, high, color=color_of(timing.variant), lw=2)
        axes.plot(middle, place, "o", color=color_of(timing.variant), ms=6)
    axes.axvline(1, color=INK, lw=1)
    axes.set_yticks(range(len(rows)), [f"{timing.what}\n{timing.variant}" for timing in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(title="Time as a multiple of the fused, tied model's", xlabel="ratio within turns, 95 % interval; above 1 is slower")


def _same(axes: Any, result: Result) -> None:
    axes.set(title="Fused less separate: loss of every step", xlabel="step", ylabel="nats per token, absolute")
    for dtype, color in (("float32", COLORS["separate"]), ("float64", INK)):
        if apart := result.differences(dtype):
            axes.plot(range(1, len(apart) + 1), [max(ZERO, each) for each in apart], ".", color=color, ms=4, label=dtype)
    if not axes.lines:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#777777")
        return
    axes.axhline(result.runs[0].losses[-1], color=COLORS["fused"], lw=1, ls="--", label="the loss itself, last step")
    axes.set_yscale("log")
    axes.set_ylim(ZERO / 2, 20)
    axes.legend(frameon=False, fontsize=9, loc="center right")


def _losses(axes: Any, result: Result) -> None:
    axes.set(title="Tied and untied head: held-out loss", xlabel="step", ylabel="nats per token")
    told = set()
    for run in result.runs:
        if "separate" not in run.variant and run.dtype == "float32":
            label = None if run.variant in told else f"{run.variant}: {run.parameters:,} parameters"
            told.add(run.variant)
            steps, losses = zip(*run.held_out, strict=True)
            axes.plot(steps, losses, "o-", color=color_of(run.variant), lw=1.2, ms=3, alpha=0.75, label=label)
    if told:
        axes.legend(frameon=False, fontsize=9, title="a line a seed", title_fontsize=9)
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#777777")
