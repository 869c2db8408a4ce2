"""Pictures: one size, one resolution, no screen. matplotlib is imported when the first one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PICTURES = (".svg", ".png")


def figure(panels: int = 1, size: tuple[float, float] = (8, 4.5)) -> tuple[Any, Any]:
    """An empty figure and its axes; several panels lie side by side and share their y axis."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=size, layout="constrained")
    return drawn, drawn.subplots(1, panels, sharey=True)


def save(drawn: Any, *paths: Path) -> list[Path]:
    """Write a figure to every path, by its suffix."""
    for path in paths:
        drawn.savefig(path, dpi=120)
    return list(paths)


def save_both(drawn: Any, folder: Path, name: str) -> list[Path]:
    """Write `folder/name.svg` and `folder/name.png`."""
    return save(drawn, *(folder / f"{name}{suffix}" for suffix in PICTURES))
