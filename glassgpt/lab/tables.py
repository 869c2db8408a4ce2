"""Tables of a report, (title, headings, rows), in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Titled = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""(title, headings, rows of as many cells)"""


def markdown_tables(tables: Iterable[Titled]) -> list[str]:
    """The lines of every table under its title."""
    lines = []
    for title, headings, rows in tables:
        lines += [f"## {title}", "", *(f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *rows)), ""]
    return lines
