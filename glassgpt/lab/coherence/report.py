"""What people see of `glassgpt lab coherence`: tables, a picture of four panels, a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from glassgpt import charts
from glassgpt.lab.bootstrap import Interval
from glassgpt.lab.coherence.context_loss import WITHIN_BITS, WITHIN_SHARE, Point, Reach
from glassgpt.lab.coherence.topics import COMMON_WORDS, LEAST_LETTERS, Shares
from glassgpt.lab.tables import markdown_tables

if TYPE_CHECKING:
    from glassgpt.lab.coherence.coherence import Result

NAME = "coherence"
WIDTH = 100
"""Of the tables, in columns."""
BLUE, RED, GREEN, INK = "#3a76c4", "#c8553d", "#2e8b57", "#2b2f36"


def range_of(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}-{high}"


def said(found: Interval, form: str = ".3f") -> str:
    """A mean with its interval."""
    return f"{found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]"


def tables(result: Result) -> list[tuple[str, list[str], list[list[str]]]]:
    """All numbers as text: (title, headings, rows) of each table."""
    positions = [[range_of(point.low, point.high), said(point.bits)] for point in result.positions]
    cut = [[str(k), said(a), said(b)] for k, a, b in zip(result.sizes, result.cut, result.gain, strict=True)]
    found = [
        ("Loss by position", ["tokens before", "bits per token"], positions),
        ("Loss with the context cut to the last k tokens, the same targets", ["k", "bits per token", "more than with all"], cut),
    ]
    for title, shares in (("written by the model", result.written), ("real", result.real)):
        rows = [
            [range_of(each.low, each.high), *(said(one, ".1%") for one in (each.own, each.others, each.more)), str(each.words)]
            for each in shares
        ]
        headings = ["tokens after", "in its own prompt", "in other prompts", "difference", "words"]
        if rows:
            found.append((f"Content words that the prompt has, in text {title}", headings, rows))
    rows = []
    for layer, heads in enumerate(result.distance_tokens):
        cells = [sum(heads) / len(heads), min(heads), max(heads)]
        rows.append([str(layer), *(f"{cell:.1f}" for cell in cells)])
    title = f"Mean distance of attention, tokens (if all were looked at alike: {result.uniform_tokens:.1f})"
    return [*found, (title, ["layer", "mean", "nearest head", "farthest head"], rows)]


def sentences(result: Result) -> list[str]:
    """What was found, in words."""
    first, last = result.positions[0], result.positions[-1]
    told = [
        f"{result.documents} documents are longer than the context of {result.context_tokens} tokens; brackets are 95 % intervals"
        f" over documents.",
        f"A token after {first.low} other costs {first.bits.mean:.2f} bits on average, one after {range_of(last.low, last.high)}"
        f" others {last.bits.mean:.2f}.",
        f"How far back the model really looks: {_reach(result.near_share)} bring the loss within {WITHIN_SHARE:.0%} of what"
        f" {result.context_tokens} bring, {_reach(result.near_bits)} within {WITHIN_BITS} bits.",
    ]
    if result.written and result.real:
        told.append(
            f"Content words ({LEAST_LETTERS} letters or more, not among the {COMMON_WORDS} most frequent) that the prompt has,"
            f" above the share that other prompts have: {_far(result.written)} in written text,"
            f" {_far(result.real)} in real text."
        )
    return told


def _reach(found: Reach) -> str:
    return f"{found.tokens} tokens [{found.low}, {found.high}]"


def _far(shares: Sequence[Shares]) -> str:
    near, far = shares[0], shares[-1]
    ends = f"{range_of(near.low, near.high)} tokens on", f"{range_of(far.low, far.high)} tokens on"
    return f"{near.more.mean:+.1%} {ends[0]} and {said(far.more, '+.1%')} {ends[1]}"


def show(result: Result, console: Console) -> None:
    """Print the tables and what they say."""
    for title, headings, rows in tables(result):
        table = Table(*headings, title=title, title_justify="left", box=None, pad_edge=False)
        for column in table.columns:
            column.justify = "right"
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print()
    for sentence in sentences(result):
        console.print(sentence, highlight=False)
    console.print(f"\nWritten: {result.config['out_dir']}/report.md and the files beside it", highlight=False, soft_wrap=True)


def markdown(result: Result) -> str:
    """The report."""
    lines = [f"# How far back {result.config['model']} looks", "", *(f"- {sentence}" for sentence in sentences(result))]
    lines += ["", f"![coherence]({NAME}.svg)", ""]
    return "\n".join([*lines, *markdown_tables(tables(result))])


# ---------------------------------------------------------------------- picture


def chart(result: Result, out: Path) -> list[Path]:
    """Loss by position, loss with the context cut, words that come again, distance of attention."""
    import matplotlib

    inked: Any = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context(inked | {"svg.hashsalt": NAME}):
        figure, _ = charts.figure(size=(14, 9.5))
        figure.clear()
        (position, cut), (topic, attention) = figure.subplots(2, 2)
        _losses(position, result)
        _cut(cut, result)
        _topic(topic, result)
        _attention(attention, result)
        for axes in (position, cut, topic, attention):
            axes.grid(alpha=0.25)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            if axes.get_legend_handles_labels()[1]:
                axes.legend(frameon=False, fontsize=9)
        figure.suptitle(f"How far back {result.config['model']} looks", fontsize=13)
        return charts.save_both(figure, out, NAME)


def _band(
    axes: Any, x: Sequence[float], found: Sequence[Interval], color: str, label: str | None = None, dashed: bool = False
) -> None:
    """A line of means upon the area of their intervals."""
    axes.fill_between(x, [each.low for each in found], [each.high for each in found], color=color, alpha=0.18, lw=0)
    axes.plot(x, [each.mean for each in found], "o--" if dashed else "o-", color=color, ms=4, lw=1.6, label=label)


def _middle(point: Point) -> float:
    return float((point.low * point.high) ** 0.5)


def _tokens(axes: Any, most: int) -> None:
    """A logarithmic axis of tokens with plain numbers."""
    axes.set_xscale("log", base=2)
    ticks = [2**n for n in range(most.bit_length()) if 2**n <= most]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])


def _losses(axes: Any, result: Result) -> None:
    _band(axes, [_middle(point) for point in result.positions], [point.bits for point in result.positions], BLUE)
    _tokens(axes, result.context_tokens)
    axes.set(title="Loss by position", xlabel="tokens before", ylabel="bits per token")


def _cut(axes: Any, result: Result) -> None:
    _band(axes, result.sizes, result.gain, RED)
    _tokens(axes, result.context_tokens)
    full = result.cut[-1].mean
    for level, label in (
        (WITHIN_BITS, f"{WITHIN_BITS} bits"),
        (WITHIN_SHARE * full, f"{WITHIN_SHARE:.0%}: {WITHIN_SHARE * full:.3f} bits"),
    ):
        axes.axhline(level, color=INK, lw=0.9, ls=":" if level == WITHIN_BITS else "--", label=label)
    reached = result.near_share
    axes.axvspan(reached.low, reached.high, color=GREEN, alpha=0.12, lw=0)
    axes.axvline(reached.tokens, color=GREEN, lw=1.4, label=f"within {WITHIN_SHARE:.0%}: {_reach(reached)}")
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set(
        title=f"Context cut to the last k tokens: loss above that of all {result.context_tokens}",
        xlabel="k",
        ylabel="more bits per token",
    )


def _topic(axes: Any, result: Result) -> None:
    axes.set(title="Content words that the prompt has too", xlabel="tokens after the prompt", ylabel="share")
    if not result.written:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#777777")
        return
    for shares, color, label in ((result.written, BLUE, "written"), (result.real, GREEN, "real")):
        x = range(len(shares))
        _band(axes, x, [each.own for each in shares], color, f"{label} text, its own prompt")
        _band(axes, x, [each.others for each in shares], color, f"{label} text, other prompts", dashed=True)
    longest = max(result.written, result.real, key=len)
    axes.set_xticks(range(len(longest)), [range_of(each.low, each.high) for each in longest])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylim(bottom=0)


def _attention(axes: Any, result: Result) -> None:
    for layer, heads in enumerate(result.distance_tokens):
        axes.plot([layer] * len(heads), heads, "o", color=BLUE, ms=5, alpha=0.6, label="a head" if not layer else None)
    means = [sum(heads) / len(heads) for heads in result.distance_tokens]
    axes.plot(range(len(means)), means, "-", color=INK, lw=1.6, label="mean of the layer")
    axes.axhline(result.uniform_tokens, color=RED, lw=1, ls="--", label="if all tokens were looked at alike")
    axes.set_xticks(range(len(means)))
    axes.set(title=f"Mean distance of attention, {result.context_tokens} tokens of text", xlabel="layer", ylabel="tokens back")
