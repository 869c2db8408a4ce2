"""What people see of `glassgpt lab compression`: a table and a chart."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from glassgpt import charts
from glassgpt.lab.bench.generate.result import TURNS_SPREAD
from glassgpt.lab.compression.labels import label_points
from glassgpt.lab.compression.pareto import front

if TYPE_CHECKING:
    from glassgpt.lab.compression.compression import Result

INK = "#2b2f36"
ENGINES = {"native": "the native engine", "plain": "PyTorch"}
LINEAR = 1e-4
"""Changes of bits per byte below this share are drawn on a linear scale, larger ones on a logarithmic one."""
MARKS = sorted([0.0, *(sign * 10.0**power for power in range(-4, 3) for sign in (-1, 1))])
"""Of that scale."""


def show(result: Result) -> None:
    """Print a row a variant, and what the columns mean."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for heading in ("", "variant", "MB", "tokens/s", "spread", "bits/byte", "change", "equal greedy"):
        table.add_column(heading, justify="left" if heading in ("", "variant") else "right", no_wrap=True)
    for one in result.variants:
        quality = (f"{one.quality.bits_per_byte:.4f}", f"{result.change(one):+.3%}", f"{one.quality.equal_greedy:.2%}")
        mark, style = ("●", "bold") if one.is_on_front else ("", "")
        speed = (f"{one.tokens_per_second:,.0f}", f"{one.spread:.0%}")
        table.add_row(mark, one.name, f"{one.bytes / 1e6:.2f}", *speed, *quality, style=style)
    console = Console(highlight=False)
    console.print(table)
    for line in notes(result):
        console.print(line, soft_wrap=True)


def notes(result: Result) -> list[str]:
    """What was measured, and how far it can be relied on."""
    config, original = result.config, result.original
    told = [
        "● on the Pareto front: no other variant is as small, as fast and as good, and better in one of the three; speeds less"
        f" than {result.margin:.0%} apart count as equal.",
        f"{config['model']}: {original.bits_per_byte:.4f} bits per byte on {original.tokens:,} tokens, by PyTorch in float32;"
        " MB of the file of weights.",
        f"tokens/s: greedy, one text, {result.new_tokens} tokens after {result.prompt_tokens}, {result.threads} thread(s),"
        f" medians of {config['repeats']} turns; variants that do the same work (same shape and formats) share theirs.",
    ]
    for engine, title in ENGINES.items():
        names = [one.name for one in result.variants if one.engine == engine]
        if names:
            told.append(f"by {title}: {'all' if len(names) == len(result.variants) else ', '.join(names)}")
    noisy = [one.name for one in result.variants if one.spread > TURNS_SPREAD]
    if noisy:
        told.append(f"The machine was not quiet: quartiles more than {TURNS_SPREAD:.0%} apart for {', '.join(noisy)}.")
    return told + [f"left out: {name}: {why}" for name, why in result.left_out.items()]


# ---------------------------------------------------------------------- chart


def draw(result: Result) -> Any:
    """Size by bits per byte, speed as colour; the front of size and loss is a line, that of all three has dark rims."""
    figure, axes = charts.figure(size=(11, 6.4))
    variants = sorted(result.variants, key=lambda one: one.is_on_front)  # drawn last, on top
    sizes, changes = [one.bytes / 1e6 for one in variants], [result.change(one) for one in variants]
    line = staircase(sizes, changes)
    axes.plot(*zip(*line, strict=True), color=INK, lw=1.2, alpha=0.6, zorder=1, label="front of size and loss")
    points = axes.scatter(
        *(sizes, changes),
        c=[one.tokens_per_second for one in variants],
        cmap="viridis",
        s=90,
        edgecolors=[INK if one.is_on_front else "white" for one in variants],
        linewidths=[2.2 if one.is_on_front else 0.8 for one in variants],
        zorder=3,
    )
    axes.scatter([], [], s=90, c="white", edgecolors=INK, linewidths=2.2, label="front of size, loss and speed")
    figure.colorbar(points, ax=axes, label=f"tokens/s, greedy, {result.threads} thread(s)", pad=0.01)
    _scales(axes, result, sizes, changes)
    axes.set(
        title=f"{charts.drawable(result.config['model'])}: size, loss and speed of its smaller forms",
        xlabel="weights on disk, MB",
        ylabel="held-out bits per byte (stretched around the original)",
    )
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    names = [charts.drawable(one.name) for one in variants]
    label_points(figure, axes, list(zip(sizes, changes, strict=True)), names, line)
    return figure


def staircase(sizes: list[float], changes: list[float]) -> list[tuple[float, float]]:
    """The corners of the line below which there is nothing: it goes down at the points that no other beats in both."""
    points = list(zip(sizes, changes, strict=True))
    best = sorted({point for point, is_on in zip(points, front(points), strict=True) if is_on})
    corners = [(size, before) for (_, before), (size, _) in itertools.pairwise(best)]
    return sorted([*best, *corners], key=lambda point: (point[0], -point[1]))


def _scales(axes: Any, result: Result, sizes: list[float], changes: list[float]) -> None:
    """Sizes logarithmic; bits per byte stretched around the original's, so that thousandths and halves can both be seen."""
    axes.set_xscale("log")
    low, high = 0.85 * min(sizes), 1.2 * max(sizes)
    axes.set_xlim(low, high)
    axes.set_xticks(sizes_between(low, high), minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_yscale("symlog", linthresh=LINEAR)
    low, high = 3 * min(-LINEAR / 4, *changes), 3 * max(LINEAR / 4, *changes)
    axes.set_ylim(low, high)
    marks = [mark for mark in MARKS if low <= mark <= high]
    axes.set_yticks(marks, [_tick(result.original.bits_per_byte, mark) for mark in marks])
    axes.set_yticks([], minor=True)


def sizes_between(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic axis."""
    return [
        x
        for power in range(-4, 8)
        for digit in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8)
        if low <= (x := digit * 10.0**power) <= high
    ]


def _tick(original: float, change: float) -> str:
    return f"{original * (1 + change):.4f}\n({f'{100 * change:+g} %' if change else 'the original'})"
