"""What people read of `glassgpt lab temperature`: a table on the terminal, a report."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from glassgpt.lab.temperature.cells import COLUMNS, RARE, WINDOW_TOKENS, Result, shown
from glassgpt.lab.temperature.pictures import CURVES, MAPS

WIDTH = 120
"""Of the table, in columns."""
LEGEND = (
    "entropy: bits of the distribution that each token is drawn from; dist-n: different n-grams over all n-grams of the cell;"
    " rep-n: n-grams that the same text has had before; sBLEU: self-BLEU of 4-grams, each text against the others of the cell;"
    " own, judge: perplexity per token under the model itself and under the judge; unknown: words that the reference does not"
    " have; bad: bytes that are not UTF-8; loops, apart: texts with a run of"
    f" {WINDOW_TOKENS} tokens that repeats more, or that the judge finds less likely, than any in {RARE:.0%} of the real texts,"
    " with the median place where it begins."
)


def row_of(measures: Any) -> list[str]:
    """All measures as text."""
    found = []
    for name, (_, form) in COLUMNS.items():
        place = getattr(measures, name.replace("_share", "_token")) if name.endswith("_share") else None
        found.append(shown(getattr(measures, name), form) + (f" @{place:.0f}" if place is not None else ""))
    return found


def band_rows(result: Result) -> list[list[str]]:
    """The band of real text: lowest and highest of the groups; nothing without a reference."""
    bands = [(result.band(name) or (None, None), form) for name, (_, form) in COLUMNS.items()]
    ends = ("lowest", "highest") if result.real else ()
    return [[end, *(shown(band[place], form) for band, form in bands)] for place, end in enumerate(ends)]


def verdicts(result: Result) -> list[str]:
    """What is usable, a sentence a top-p."""
    if not result.real:
        return ["No reference was given: nothing says what is usable. Give real text with --reference."]
    told = []
    for top_p in result.config["top_p"]:
        usable = result.usable(top_p)
        which = ", ".join(f"{t:g}" for t in usable) if usable else "none"
        told.append(f"top-p {top_p:g}: usable temperatures of those tried: {which}")
    return told


# ---------------------------------------------------------------------- terminal and report


def show(result: Result, console: Console) -> None:
    """Print a row a cell, the band of real text, and what is usable."""
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for heading in ("top-p", "T", *(COLUMNS[name][0] for name in COLUMNS)):
        table.add_column(heading, justify="right", no_wrap=True)
    for top_p in result.config["top_p"]:
        for cell in result.at(top_p):
            usable = result.real and not result.fails(cell)
            table.add_row(f"{top_p:g}", f"{cell.temperature:g}", *row_of(cell.measures), style="bold green" if usable else None)
        table.add_section()
    for row in band_rows(result):
        table.add_row("real", *row)
    console.print(table)
    console.print(LEGEND, style="dim", highlight=False)
    for line in (*_about(result), *verdicts(result)):
        console.print(line, highlight=False)
    console.print(f"\nWritten: {result.config['out_dir']}/report.md and the files beside it", highlight=False, soft_wrap=True)


def _about(result: Result) -> list[str]:
    config = result.config
    texts = f"{len(result.prompts)} prompts, {config['samples']} texts each"
    told = [f"{texts}, {config['new_tokens']} tokens, seed {config['seed']}."]
    nobody = "No judge: give a second model (--second) or real text (--reference)."
    told.append(f"Judge: {result.judge}." if result.judge else nobody)
    if result.real:
        told.append(f"Real text: {len(result.real)} groups of as many texts of the same length.")
        told.append(f"Usable: {'; '.join(result.criteria())}.")
    return told


def markdown(result: Result) -> str:
    """The whole report: criteria, table, pictures, samples."""
    lines = [f"# Temperature and top-p: {result.config['model']}", ""]
    lines += [f"- {line}" for line in (*_about(result), *verdicts(result))]
    lines += ["", f"![curves]({CURVES}.svg)", "", f"![maps]({MAPS}.svg)", "", "## Numbers", "", LEGEND, ""]
    headings = ["top-p", "temperature", *(heading for heading, _ in COLUMNS.values()), *(["fails"] if result.real else [])]
    rows = [headings, ["---"] * len(headings)]
    for cell in result.cells:
        fails = [", ".join(COLUMNS[name][0] for name in result.fails(cell)) or "usable"] if result.real else []
        rows.append([f"{cell.top_p:g}", f"{cell.temperature:g}", *row_of(cell.measures), *fails])
    rows += [["real", *row, ""] for row in band_rows(result)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", "## Samples", "", f"After {result.prompts[0]!r}:", ""]
    for cell in result.cells:
        text = " ".join(cell.texts[0].split()).replace("`", "'")
        lines += [f"- top-p {cell.top_p:g}, temperature {cell.temperature:g}: `{text}`"]
    return "\n".join(lines) + "\n"
