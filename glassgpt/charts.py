"""Pictures: one size, one resolution, no screen. matplotlib is imported when the first one is drawn."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PICTURES = (".svg", ".png")
MOST_LABELS = 64
"""On one axis."""


def figure(panels: int = 1, size: tuple[float, float] = (8, 4.5), share_y: bool = True) -> tuple[Any, Any]:
    """An empty figure and its axes; several panels lie side by side and share their y axis unless told not to."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=size, layout="constrained")
    return drawn, drawn.subplots(1, panels, sharey=share_y)


def save(drawn: Any, *paths: Path) -> list[Path]:
    """Write a figure to every path, by its suffix."""
    for path in paths:
        drawn.savefig(path, dpi=120)
    return list(paths)


def save_both(drawn: Any, folder: Path, name: str) -> list[Path]:
    """Write `folder/name.svg` and `folder/name.png`."""
    return save(drawn, *(folder / f"{name}{suffix}" for suffix in PICTURES))


def label_axis(axis: Any, labels: Sequence[str], most: int = MOST_LABELS, **how: Any) -> None:
    """Ticks 0, 1, 2 ... with these labels, or as many of them as there is room for, every character as it is."""
    shown = range(0, len(labels), -(-len(labels) // most) or 1)
    axis.set_ticks(shown, [drawable(labels[place]) for place in shown], **how)


def drawable(text: str) -> str:
    """Any text for matplotlib: characters that its font has not as their number, U+1F42E, and dollars that are no mathematics."""
    whole = "".join(c if c == "\n" or ord(c) in _shapes() else f"U+{ord(c):X}" for c in text)
    return whole.replace("$", r"\$")


@functools.cache
def _shapes() -> frozenset[int]:
    """The characters of the font that figures are drawn in."""
    from matplotlib import font_manager

    return frozenset(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())
