"""Pictures: one size, one resolution, no screen. matplotlib is imported when the first one is drawn."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

PICTURES = (".svg", ".png")


def figure(panels: int = 1, size: tuple[float, float] = (8, 4.5), share_y: bool = True) -> tuple[Any, Any]:
    """An empty figure and its axes; several panels lie side by side and share their y axis unless told not to."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=size, layout="constrained")
    return drawn, drawn.subplots(1, panels, sharey=share_y)


def save(drawn: Any, *paths: Path) -> list[Path]:
    """Write a figure to every path, by its suffix. Characters that the font has not are written as their number, U+1F42E."""
    _make_drawable(drawn)
    for path in paths:
        drawn.savefig(path, dpi=120)
    return list(paths)


def save_both(drawn: Any, folder: Path, name: str) -> list[Path]:
    """Write `folder/name.svg` and `folder/name.png`."""
    return save(drawn, *(folder / f"{name}{suffix}" for suffix in PICTURES))


def _make_drawable(drawn: Any) -> None:
    from matplotlib.text import Text
    from matplotlib.ticker import FixedFormatter

    for axes in drawn.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if isinstance(formatter := axis.get_major_formatter(), FixedFormatter):
                formatter.seq = [drawable(label) for label in formatter.seq]
    for text in drawn.findobj(Text):
        text.set_text(drawable(text.get_text()))


def drawable(text: str) -> str:
    """Text without the characters that matplotlib's own font has no shape for."""
    return "".join(c if c == "\n" or ord(c) in _shapes() else f"U+{ord(c):X}" for c in text)


@functools.cache
def _shapes() -> frozenset[int]:
    """The characters of the font that figures are drawn in."""
    from matplotlib import font_manager

    return frozenset(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())
