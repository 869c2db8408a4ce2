"""Pictures of `glassgpt lab temperature`: curves with samples beside them, and maps of temperature by top-p."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from glassgpt import charts
from glassgpt.lab.temperature.cells import COLUMNS, MEASURES, Cell, Result, shown

CURVES, MAPS = "temperature-curves", "temperature-maps"
INK, BAND = "#2b2f36", "#8fbf9f"
DRAWN = ("entropy_bits", "repeated_3", "distinct_2", "self_bleu", "own_perplexity", "judge_perplexity", "unknown_words", "broken")
MAPPED = ("entropy_bits", "repeated_3", "judge_perplexity", "unknown_words", "own_perplexity", "distinct_2")
LOGARITHMIC = ("own_perplexity", "judge_perplexity")


def chart(result: Result, out: Path) -> list[Path]:
    """Curves with samples beside them, and maps of temperature by top-p."""
    import matplotlib

    inked: Any = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context(inked | {"svg.hashsalt": CURVES}):
        return [*_curves(result, out), *_maps(result, out)]


def _curves(result: Result, out: Path) -> list[Path]:
    figure, _ = charts.figure(size=(19, 11.5))
    figure.clear()
    rows = [[*DRAWN[i : i + 2], "samples"] for i in range(0, len(DRAWN), 2)]
    panels = figure.subplot_mosaic(rows, width_ratios=(1, 1, 1.5))
    for name in DRAWN:
        _curve(panels[name], result, name)
    handles, labels = panels[DRAWN[0]].get_legend_handles_labels()
    band_handles, band_labels = panels["repeated_3"].get_legend_handles_labels()
    drawn = dict(zip(band_labels + labels, band_handles + handles, strict=True))
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower left", ncols=8, frameon=False)
    _samples(panels["samples"], result)
    figure.suptitle(f"What temperature does to {result.config['model']}", fontsize=14)
    return charts.save_both(figure, out, CURVES)


def _curve(axes: Any, result: Result, name: str) -> None:
    """A measure over the temperatures, evenly spaced, a line a top-p, upon the band of real text."""
    temperatures = result.config["temperatures"]
    many = len(result.config["top_p"])
    for number, top_p in enumerate(result.config["top_p"]):
        color = _color(number, many)
        values = [_value(cell, name) for cell in result.at(top_p)]
        if any(value is not None for value in values):
            drawn = [float("nan") if value is None else value for value in values]
            axes.plot(range(len(temperatures)), drawn, "o-", color=color, ms=4, lw=1.6, label=f"top-p {top_p:g}")
    if name != "broken" and (band := result.band(name)):
        low, high = band
        axes.axhspan(low, max(high, low + 1e-9), color=BAND, alpha=0.55, lw=0, label="real text, lowest to highest group")
    axes.set_xticks(range(len(temperatures)), [f"{t:g}" for t in temperatures])
    axes.set_title("texts that loop or fall apart" if name == "broken" else MEASURES[name], fontsize=11)
    if name in LOGARITHMIC:
        axes.set_yscale("log")
    elif name != "entropy_bits":
        axes.set_ylim(-0.02, 1.02)
    if name in DRAWN[-2:]:
        axes.set_xlabel("temperature")
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if not axes.lines:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#777777")


def _value(cell: Cell, name: str) -> float | None:
    if name != "broken":
        return getattr(cell.measures, name)
    shares = [cell.measures.loop_share, cell.measures.chaos_share]
    return max((share for share in shares if share is not None), default=None)


def _color(number: int, many: int) -> Any:
    """From light to dark: the larger top-p, the darker."""
    import matplotlib

    return matplotlib.colormaps["viridis_r"](0.15 + 0.8 * number / max(1, many - 1))


def _samples(axes: Any, result: Result) -> None:
    """One text a temperature at the largest top-p, with its numbers."""
    axes.axis("off")
    top_p = max(result.config["top_p"])
    cells = result.at(top_p)
    axes.set_title(charts.drawable(f"After “{result.prompts[0]}”, top-p {top_p:g}"), fontsize=11, loc="left")
    most_lines = max(1, 32 // len(cells))
    for place, cell in enumerate(cells):
        y = 0.98 - place / len(cells)
        numbers = f"{cell.measures.entropy_bits or 0:.2f} bits, {cell.measures.repeated_3:.0%} repeated 3-grams"
        verdict = ""
        if result.real:
            fails = [COLUMNS[name][0] for name in result.fails(cell)]
            verdict = f"; not usable ({', '.join(fails)})" if fails else "; usable"
        heading = f"temperature {cell.temperature:g}: {numbers}{verdict}"
        axes.text(0, y, heading, fontsize=9.5, weight="bold", va="top", transform=axes.transAxes, parse_math=False)
        lines = textwrap.wrap(printable(" ".join(cell.texts[0].split())), 104)
        text = "\n".join([*lines[:most_lines], *(["…"] if len(lines) > most_lines else [])])
        axes.text(0, y - 0.022, text, fontsize=9.5, va="top", transform=axes.transAxes, parse_math=False, linespacing=1.15)


def printable(text: str) -> str:
    """The text with □ for what the pictures' font has no sign for."""
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    return "".join(c if c.isprintable() and font.get_char_index(ord(c)) else "□" for c in text)


def _maps(result: Result, out: Path) -> list[Path]:
    """Measures by temperature and top-p; cells that are usable have a frame."""
    from matplotlib.colors import LogNorm

    temperatures, top_ps = result.config["temperatures"], result.config["top_p"]
    names = [name for name in MAPPED if all(getattr(cell.measures, name) is not None for cell in result.cells)]
    figure, _ = charts.figure(size=(5.6 * ((len(names) + 1) // 2), 2 * (1.5 + 0.5 * len(top_ps))))
    figure.clear()
    for axes, name in zip(figure.subplots(2, (len(names) + 1) // 2).flat, names, strict=False):
        grid = [[getattr(cell.measures, name) for cell in result.at(top_p)] for top_p in top_ps]
        axes.imshow(grid, cmap="cividis", aspect="auto", norm=LogNorm() if name in LOGARITHMIC else None, origin="lower")
        low, high = axes.images[0].get_clim()
        middle = (low * high) ** 0.5 if name in LOGARITHMIC else (low + high) / 2
        for y, top_p in enumerate(top_ps):
            for x, cell in enumerate(result.at(top_p)):
                value = grid[y][x]
                ink = "black" if value > middle else "white"
                axes.text(x, y, shown(value, COLUMNS[name][1]), ha="center", va="center", fontsize=8, color=ink)
                if result.real and not result.fails(cell):
                    axes.add_patch(_frame(x, y))
        axes.set_xticks(range(len(temperatures)), [f"{t:g}" for t in temperatures])
        axes.set_yticks(range(len(top_ps)), [f"{p:g}" for p in top_ps])
        axes.set(xlabel="temperature", ylabel="top-p")
        axes.set_title(MEASURES[name], fontsize=11)
    for axes in figure.axes[len(names) :]:
        axes.set_visible(False)
    framed = "; framed: usable" if result.real else ""
    figure.suptitle(f"Temperature by top-p: {result.config['model']}{framed}", fontsize=13)
    return charts.save_both(figure, out, MAPS)


def _frame(x: int, y: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, edgecolor="#e4572e", lw=2.2)
