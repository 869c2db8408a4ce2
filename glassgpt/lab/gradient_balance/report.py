"""What people see of `glassgpt lab gradient-balance`: four tables and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from glassgpt import charts
from glassgpt.config.gradient_balance import weight_of
from glassgpt.lab.gradient_balance.compare import RESULT_FILE, Point, Result, findings, with_quarters
from glassgpt.lab.gradient_balance.split import WHOLE
from glassgpt.lab.ladder.compare import BETTER, UNDECIDED, WORSE, Estimate, signed

NAME = "gradient-balance"
WIDTH = 100
"""Of the tables, in columns."""
COLORS = ("#3a76c4", "#c8553d", "#2e8b57", "#8a5fb0", "#b08a2e", "#5f6b7a")
INK = "#2b2f36"
VERDICTS = {BETTER: "lower", WORSE: "higher", UNDECIDED: "undecided"}


# ---------------------------------------------------------------------- terminal


def show(result: Result, console: Console) -> None:
    """Print where the gradient comes from, and what the masks change, 100 columns wide."""
    _show_layers(result, console)
    _show_kinds(result, console)
    _show_along(result, console)
    _show_ends(result, console)
    for sentence in findings(result):
        console.print(sentence, highlight=False)
    names = [RESULT_FILE, *(f"{NAME}{suffix}" for suffix in charts.PICTURES)]
    folder = Path(result.config.out_dir)
    console.print("\nWritten:", *(f"  {folder / name}" for name in names), sep="\n", highlight=False, soft_wrap=True)


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _show_layers(result: Result, console: Console) -> None:
    columns = ("|g_Q|", "|g_A|", "share of A", "part", "Q/token", "A/token", "cosine")
    table = _table("The full loss's gradient before any step, by layer", "layer", *columns)
    for layer in result.layers:
        at = result.before.spreads(layer)
        numbers = [f"{at[name].median:.3g}" for name in ("instruction", "response")]
        each = [f"{at[name].median:.3g}" for name in ("instruction_per_token", "response_per_token")]
        table.add_row(layer, *numbers, with_quarters(at["share"]), f"{at['part'].median:.2f}", *each, with_quarters(at["cosine"]))
    console.print(table)
    tokens = result.before.spreads()["tokens"]
    console.print(
        "share: |g_A| / (|g_Q| + |g_A|), both divided by all tokens of the batch; part: <g_A, g> / <g, g>, g = g_Q + g_A.",
        f"A is the response with its end, Q the instruction and the template's words. Share of A in the tokens:"
        f" {with_quarters(tokens)}.",
        f"Medians of {result.config.batches} batches of {result.config.batch_size}, in brackets the quartiles.\n",
        sep="\n",
        style="dim",
        highlight=False,
    )


def _show_kinds(result: Result, console: Console) -> None:
    columns = ("tokens an example", "share of tokens", "norm", "norm a token")
    table = _table("The same by kind of token, whole model", "kind", *columns)
    for kind, own in result.before.kinds().items():
        cells = [f"{own['tokens'].median:.2f}", f"{own['norm'].median:.3g}", f"{own['per_token'].median:.3g}"]
        table.add_row(kind, f"{result.lengths[kind]:.1f}", *cells)
    console.print(table)
    console.print()


def _show_along(result: Result, console: Console) -> None:
    title = "Along the first run of each mode, whole model: the full loss's gradient on the same batches"
    table = _table(title, "trained with", "step", "|g_Q|", "|g_A|", "share of A", "part", "cosine")
    moments = [("(start)", result.before), *((mode, point) for mode in result.config.modes for point in result.along(mode))]
    for mode, point in moments:
        at = point.spreads()
        numbers = [f"{at[name].median:.3g}" for name in ("instruction", "response")]
        share, cosine = with_quarters(at["share"]), with_quarters(at["cosine"])
        table.add_row(mode, str(point.step), *numbers, share, f"{at['part'].median:.2f}", cosine)
    console.print(table)
    for mode in result.config.modes:
        if 0 < weight_of(mode) != 1:
            found = result.before.spreads(prompt_weight=weight_of(mode))["share"]
            console.print(f"in the loss {mode} A's share is {with_quarters(found)} at the start", style="dim", highlight=False)
    console.print()


def _show_ends(result: Result, console: Console) -> None:
    config = result.config
    seeds = f"{config.seeds} seed{'s' * (config.seeds > 1)}"
    title = f"Held-out loss after {config.steps} steps, nats per token; {seeds}"
    table = _table(title, "trained with", "responses", f"against {config.modes[0]}", "", "instructions", "against it", "")
    start = [f"{result.before.loss(of):.4f}" for of in ("response", "instruction")]
    table.add_row("(start)", start[0], "", "", start[1], "", "")
    for mode in config.modes:
        cells = []
        for of in ("response", "instruction"):
            outcome = result.outcome(mode, of)
            apart = "" if outcome.difference is None else signed(outcome.difference)
            cells += [_plus_minus(outcome.end), apart, VERDICTS.get(outcome.verdict, outcome.verdict)]
        table.add_row(mode, *cells)
    console.print(table)
    said = f"undecided: {UNDECIDED}; ± is a 95 % t interval over seeds, of differences paired by seed\n"
    console.print(said, style="dim", highlight=False)


def _plus_minus(found: Estimate) -> str:
    return f"{found.mean:.4f}" + ("" if found.half is None else f" ± {found.half:.4f}")


# ---------------------------------------------------------------------- picture


def chart(result: Result, out: Path) -> list[Path]:
    """Share and cosine by layer, at the start and at the end of each mode; norms by kind; held-out losses along the runs."""
    import matplotlib

    inked: Any = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context(inked | {"svg.fonttype": "none", "svg.hashsalt": NAME}):
        figure, _ = charts.figure(size=(15, 2.6 + 0.34 * max(16, len(result.layers))))
        figure.clear()
        rows = [["share", "cosine", "response"], ["share", "cosine", "instruction"]]
        panels = figure.subplot_mosaic(rows, width_ratios=(1.25, 1, 1.15))
        _by_layer(panels["share"], result, "share")
        _by_layer(panels["cosine"], result, "cosine")
        panels["cosine"].tick_params(labelleft=False)
        tokens = result.before.spreads()["tokens"].median
        panels["share"].axvline(tokens, color=INK, lw=1, ls="--", label=f"share of A in the tokens: {tokens:.2f}")
        panels["share"].axvline(0.5, color=INK, lw=0.6, alpha=0.4)
        panels["cosine"].axvline(0, color=INK, lw=0.6, alpha=0.4)
        panels["share"].set(xlim=(0, 1), xlabel="$|g_A|\\,/\\,(|g_Q| + |g_A|)$", title="A's share of the full loss's gradient")
        panels["cosine"].set(xlabel="cosine of $g_Q$ and $g_A$", title="Do both pull the same way?")
        for of in ("response", "instruction"):
            _curves(panels[of], result, of)
        panels["instruction"].set_xlabel("step")
        figure.legend(
            *panels["share"].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=9
        )
        for axes in panels.values():
            axes.grid(axis="x" if axes in (panels["share"], panels["cosine"]) else "y", alpha=0.25)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.title.set_fontsize(11)
        return charts.save_both(figure, out, NAME)


def _by_layer(axes: Any, result: Result, name: str) -> None:
    """A point for the median of the batches and a line between the quartiles, a row a layer."""
    moments: list[tuple[str, Point, str]] = [("before any step", result.before, INK)]
    for mode, color in zip(result.config.modes, COLORS, strict=False):
        moments += [(f"{mode}, step {point.step}", point, color) for point in result.along(mode)[-1:]]
    for number, (label, point, color) in enumerate(moments):
        shift = 0.18 * (number - (len(moments) - 1) / 2)
        places = [place + shift for place in range(len(result.layers))]
        found = [point.spreads(layer)[name] for layer in result.layers]
        axes.hlines(places, [one.low for one in found], [one.high for one in found], color=color, lw=1.6, alpha=0.6)
        axes.plot([one.median for one in found], places, "o", color=color, ms=4, label=label)
    axes.axhline(result.layers.index(WHOLE) + 0.5, color=INK, lw=0.6, alpha=0.4)
    axes.set_yticks(range(len(result.layers)), result.layers, fontsize=9)
    axes.set_ylim(len(result.layers) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _curves(axes: Any, result: Result, of: str) -> None:
    """Held-out loss along every run: a thin line a seed, a thick one for their mean."""
    for mode, color in zip(result.config.modes, COLORS, strict=False):
        steps = [0, *(point.step for point in result.runs[mode][-1].points)]
        curves = []
        for run in result.runs[mode]:
            by_step = {0: result.before.loss(of)} | {point.step: point.loss(of) for point in run.points}
            curves.append([by_step[step] for step in steps])
            axes.plot(steps, curves[-1], color=color, lw=0.7, alpha=0.5)
        axes.plot(steps, [sum(at) / len(at) for at in zip(*curves, strict=True)], "o-", color=color, lw=1.8, ms=3.5, label=mode)
    axes.set(title=f"Held-out loss of the {of}s", ylabel="nats per token")
    axes.legend(frameon=False, fontsize=9, title="trained with", title_fontsize=9)
