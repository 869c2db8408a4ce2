"""What people see of a ladder: a page, a picture, two tables."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from glassgpt import charts
from glassgpt.lab.ladder.compare import BETTER, COUNTING, UNDECIDED, WORSE, Estimate, Result, Row, findings, signed

NAME = "ladder"
INK = "#2b2f36"
"""Text and axes; the page turns it into its own text colour, which is light in the dark."""
COLORS = {BETTER: "#2e8b57", WORSE: "#c8553d"}
GREY, BLUE = "#8a8f98", "#3a76c4"


def write(result: Result, out: Path) -> list[Path]:
    """ladder.svg, ladder.png and ladder.html, which holds the picture too and asks the network for nothing."""
    pictures = chart(result, out)
    path = out / f"{NAME}.html"
    path.write_text(page(result, (out / f"{NAME}.svg").read_text(encoding="utf-8")), encoding="utf-8")
    return [*pictures, path]


# ---------------------------------------------------------------------- terminal


def show(result: Result, console: Console) -> None:
    """Print what each rung buys and what it costs, 80 columns wide."""
    config, rows = result.config, result.rows
    other = "against the rung before" if config.mode == "cumulative" else "against the base"
    table = Table("rung", box=None, pad_edge=False, title="Bits per byte of held-out text", title_justify="left")
    table.add_column("bits per byte", justify="right")
    table.add_column(other, justify="right")
    table.add_column("")
    if config.mode == "cumulative":
        table.add_column("against the base", justify="right")
    for row in rows:
        cells = [row.name, _plus_minus(row.bits_per_byte), _signed(row.difference), _short(row.verdict)]
        table.add_row(*cells, *([_signed(row.from_base)] if config.mode == "cumulative" else []))
    console.print(table)
    console.print(f"undecided: {UNDECIDED}; ± is a 95 % t interval over seeds", style="dim", highlight=False)
    console.print()
    table = Table("rung", box=None, pad_edge=False, title="What it costs", title_justify="left")
    for column in ("training\ntokens/s", "decoding\ntokens/s", "peak\nmemory", "KV bytes\na token"):
        table.add_column(column, justify="right")
    for column in ("parameters\ntotal", "\nactive", "seconds\na run"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row.name, *_costs(row))
    console.print(table)
    machine = result.machine
    medians = f"medians of {config.turns} turns on {machine['device']}, {machine['threads']} threads; one sequence is decoded"
    console.print(medians, style="dim", highlight=False)
    console.print()
    for sentence in findings(result):
        console.print(sentence, highlight=False)
    names = [f"{NAME}{suffix}" for suffix in (".html", ".json", *charts.PICTURES)]
    console.print(
        "\nWritten:", *(f"  {Path(config.out_dir) / name}" for name in names), sep="\n", highlight=False, soft_wrap=True
    )


def _short(verdict: str) -> str:
    return {UNDECIDED: "undecided", "one seed: no interval": "one seed"}.get(verdict, verdict)


def _signed(found: Estimate | None) -> str:
    return "" if found is None else signed(found)


def _plus_minus(found: Estimate) -> str:
    return f"{found.mean:.3f}" + ("" if found.half is None else f" ± {found.half:.3f}")


def _costs(row: Row) -> list[str]:
    return [
        f"{row.training_tokens_per_second:,.0f}",
        f"{row.decoding_tokens_per_second:,.0f}",
        _scaled(row.peak_bytes, "B"),
        f"{row.cache_bytes_per_token:,.0f}",
        _scaled(row.parameters),
        _scaled(row.active_parameters),
        f"{row.seconds:,.1f}",
    ]


def _scaled(value: float, unit: str = "") -> str:
    """30700000 -> 30.7 M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}{unit}"
    return f"{value:.3g} {unit}".rstrip()


# ---------------------------------------------------------------------- picture


def chart(result: Result, out: Path) -> list[Path]:
    """Bits per byte with their intervals and seeds, the paired differences, speeds, cache; the base is on top."""
    import matplotlib

    rows = result.rows
    inked: Any = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context(inked | {"svg.fonttype": "none", "svg.hashsalt": NAME}):
        figure, panels = charts.figure(5, (16, 1.6 + 0.36 * len(rows)))
        places = range(len(rows))
        plus = "+ " if result.config.mode == "cumulative" else ""
        panels[0].set_yticks(places, [row.name if row.before is None else f"{plus}{row.name}" for row in rows], fontsize=11)
        panels[0].invert_yaxis()
        for place, row in zip(places, rows, strict=True):
            _bar(panels[0], place, row.bits_per_byte, BLUE, dots=True)
            if row.difference is not None:
                _bar(panels[1], place, row.difference, COLORS.get(row.verdict, GREY), dots=False)
        panels[1].axvline(0, color=INK, lw=0.8)
        for axes in panels[:2]:
            axes.locator_params(axis="x", nbins=5)
        _bars(panels[2], rows, [row.training_tokens_per_second for row in rows])
        _bars(panels[3], rows, [row.decoding_tokens_per_second for row in rows])
        _bars(panels[4], rows, [row.cache_bytes_per_token for row in rows])
        other = "rung before" if result.config.mode == "cumulative" else "base"
        titles = (
            ("Bits per byte, held-out text", "mean, 95 % interval; dots are seeds"),
            (f"Difference to the {other}", "paired by seed; grey: not distinguishable"),
            ("Training speed", "tokens/s"),
            ("Decoding speed", "tokens/s, one sequence"),
            ("KV cache", "bytes a token"),
        )
        for axes, (title, label) in zip(panels, titles, strict=True):
            axes.set_title(title, fontsize=11)
            axes.set_xlabel(label, fontsize=9)
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x", alpha=0.25)
            axes.set_axisbelow(True)
            axes.spines[["top", "right", "left"]].set_visible(False)
        return charts.save_both(figure, out, NAME)


def _bar(axes: Any, place: int, found: Estimate, color: str, *, dots: bool) -> None:
    if found.low is not None and found.high is not None:
        axes.plot([found.low, found.high], [place, place], color=color, lw=2.4, solid_capstyle="butt")
    if dots:
        axes.plot(found.values, [place] * len(found.values), "o", color=color, ms=4, alpha=0.45, mew=0)
    axes.plot(found.mean, place, "D", color=color, ms=6)


def _bars(axes: Any, rows: Sequence[Row], values: Sequence[float]) -> None:
    axes.barh(range(len(rows)), values, color=BLUE, height=0.62, alpha=0.75)
    for place, value in enumerate(values):
        axes.annotate(f"{value:,.0f}", (value, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.set_xlim(0, 1.3 * max(values))
    axes.set_xticks([])


# ---------------------------------------------------------------------- page

STYLE = """
:root { color-scheme: light dark; --ink: #2b2f36; --paper: #ffffff; --line: #d8dbe0; --dim: #6a707a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --paper: #16181c; --line: #3a3f47; --dim: #a0a6b0; } }
body { color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
.wide svg { width: 100%; min-width: 56rem; height: auto; color: var(--ink); }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; } th:first-child, td:first-child, .text { text-align: left; }
td.text { white-space: normal; }
.better { color: #2e9b60; } .worse { color: #d9664d; } .dim, dd { color: var(--dim); }
dt { font-weight: 600; } dd { margin: 0 0 0.4rem 1rem; } code { font-size: 0.88rem; }
"""


def page(result: Result, svg: str) -> str:
    """One HTML file that needs nothing else; `svg` is the picture's."""
    config, rows = result.config, result.rows
    other = "the rung before" if config.mode == "cumulative" else "the base"
    quality = _table(
        ("rung", "what changes", "bits per byte", f"against {other}", "", "against the base", ""),
        [
            (
                row.name, row.change.replace("->", "→"), _plus_minus(row.bits_per_byte),
                _signed(row.difference), row.verdict, _signed(row.from_base), row.base_verdict,
            )
            for row in rows
        ],
    )  # fmt: skip
    costs = _table(
        (
            "rung", "attention timed", "training tokens/s", "decoding tokens/s", "peak memory", "KV bytes a token",
            "parameters", "active", "seconds a run", "tokens a run",
        ),
        [(row.name, row.kernel, *_costs(row), f"{row.tokens:,}") for row in rows],
    )  # fmt: skip
    seeds = _table(
        ("rung", *(f"seed {config.seed + number}" for number in range(config.seeds))),
        [(row.name, *(f"{value:.4f}" for value in row.bits_per_byte.values)) for row in rows],
    )
    counted = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in COUNTING.items())
    said = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in findings(result))
    machine = ", ".join(f"{key} {value}" for key, value in result.machine.items())
    shape = config.model
    setting = (
        f"{shape.n_layer} layers of width {shape.width}, {shape.n_head} heads, context {shape.context_tokens} tokens;"
        f" {config.batch_size} sequences a step; AdamW at {config.learning_rate:g}, Muon at {config.muon_rate:g}; text:"
        f" {', '.join(config.sources)}, {result.held_out_bytes:,} bytes held out; {config.precision}; {machine}"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Ladder: what each change of architecture buys</title>
<style>{STYLE}</style>
</head>
<body>
<h1>What each change of architecture buys</h1>
<p class="dim">{html.escape(setting)}</p>
<ul>{said}</ul>
<div class="wide">{inline(svg)}</div>
<h2>What it buys</h2>
<div class="wide">{quality}</div>
<h2>What it costs</h2>
<div class="wide">{costs}</div>
<h2>Bits per byte by seed</h2>
<div class="wide">{seeds}</div>
<h2>What was measured how</h2>
<dl>{counted}</dl>
<p class="dim">Made by <code>glassgpt lab ladder</code>; ladder.json beside this page holds every number.</p>
</body>
</html>
"""


def inline(svg: str) -> str:
    """A picture of matplotlib's for a page: no prologue, no metadata, the page's colours for ink and ground."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return svg.replace(INK, "currentColor").replace("#ffffff", "none")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    columns = zip(head, *rows, strict=True)  # one is of words when no cell of it is a number
    first = "".join(_cell(cell, "th", "" if any(map(_is_number, cells)) else "text") for cell, *cells in columns)
    lines = ["".join(_cell(cell, "td", "" if not cell or _is_number(cell) else "text") for cell in row) for row in rows]
    return f"<table><tr>{first}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _cell(text: str, tag: str, kind: str) -> str:
    kind = f"{kind} {text}" if text in (BETTER, WORSE) else kind
    return f'<{tag} class="{kind}">{html.escape(text)}</{tag}>' if kind else f"<{tag}>{html.escape(text)}</{tag}>"


def _is_number(text: str) -> bool:
    return bool(text) and text[0] in "+-0123456789"
