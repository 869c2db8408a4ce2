"""Names beside the points of a chart, none of them upon another or upon a point."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

INK, GREY = "#2b2f36", "#8a9099"
POINT = 7.0
"""Half the side of the square that a marker takes, in points (1/72 inch)."""
LINE = 1.0
"""Half of what a line takes, in points."""
RINGS, DIRECTIONS = 40, 16
"""Places that are tried: so many distances, POINT / 2 apart, each in so many directions."""
FAR = 2.5 * POINT
"""A name that is further than this from its point gets a line to it."""


class Box(NamedTuple):
    """A rectangle, in points."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: Box) -> bool:
        apart = self.right <= other.left or other.right <= self.left or self.top <= other.bottom or other.top <= self.bottom
        return not apart

    def is_inside(self, other: Box) -> bool:
        return other.left <= self.left and self.right <= other.right and other.bottom <= self.bottom and self.top <= other.top

    @property
    def middle(self) -> tuple[float, float]:
        return (self.left + self.right) / 2, (self.bottom + self.top) / 2


def place(
    points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], room: Box, taken: Sequence[Box]
) -> list[Box]:
    """A box of each size (width, height) beside its point: the nearest one inside `room` that is free.

    Not free are the points, the boxes of `taken`, and the names that were placed before; the points with the most neighbours
    come first. One for which there is no room at all stands to the right of its point.
    """
    busy = [*taken, *(Box(x - POINT, y - POINT, x + POINT, y + POINT) for x, y in points)]
    found: dict[int, Box] = {}

    def neighbours(number: int) -> int:
        return sum(math.dist(points[number], other) < 10 * POINT for other in points)

    for number in sorted(range(len(points)), key=lambda number: (-neighbours(number), number)):
        tried = list(around(points[number], sizes[number]))
        free = (box for box in tried if box.is_inside(room) and not any(box.overlaps(other) for other in busy))
        found[number] = next(free, tried[0])
        busy.append(found[number])
    return [found[number] for number in range(len(points))]


def around(point: tuple[float, float], size: tuple[float, float]) -> Iterator[Box]:
    """Boxes around a point, the nearest first; to the right of it before all others of a ring."""
    (x, y), (width, height) = point, size
    for ring in range(RINGS):
        reach = POINT * (1.2 + ring / 2)
        for direction in range(DIRECTIONS):
            turn = (direction + 1) // 2 * (-1) ** direction * 2 * math.pi / DIRECTIONS
            middle_x = x + (reach + width / 2) * math.cos(turn)
            middle_y = y + (reach + height / 2) * math.sin(turn)
            yield Box(middle_x - width / 2, middle_y - height / 2, middle_x + width / 2, middle_y + height / 2)


def label_points(
    figure: Any,
    axes: Any,
    points: Sequence[tuple[float, float]],
    labels: Sequence[str],
    path: Sequence[tuple[float, float]] = (),
) -> list[Any]:
    """Write a name beside each point (in the data's numbers) of a chart that is complete but for them; returns the texts.

    No name lies upon a point, the legend, or a `path` of level and upright lines.
    """
    scale = 72 / figure.dpi
    texts = [
        axes.annotate(label, point, (0, 0), textcoords="offset points", fontsize=8.5, color=INK, ha="center", va="center")
        for label, point in zip(labels, points, strict=True)
    ]
    for text in texts:
        text.set_in_layout(False)  # the axes stay where they are, whatever the names are
    figure.draw_without_rendering()
    pixels = axes.transData.transform(points) * scale  # (n, 2)
    sizes = [(box.width * scale + 2, box.height * scale) for box in (text.get_window_extent() for text in texts)]
    taken = [_box(legend.get_window_extent(), scale) for legend in [axes.get_legend()] if legend is not None]
    corners = [axes.transData.transform(corner) * scale for corner in path]
    taken += [_around_line(a, b) for a, b in itertools.pairwise(corners)]
    boxes = place([(float(x), float(y)) for x, y in pixels], sizes, _box(axes.bbox, scale), taken)
    for text, box, (x, y) in zip(texts, boxes, pixels, strict=True):
        middle_x, middle_y = box.middle
        text.set_position((middle_x - x, middle_y - y))
        gap = math.hypot(max(box.left - x, x - box.right, 0), max(box.bottom - y, y - box.top, 0))
        if gap > FAR:
            nearest = (min(max(x, box.left), box.right) - x, min(max(y, box.bottom), box.top) - y)
            line = {"arrowstyle": "-", "color": GREY, "lw": 0.7}
            axes.annotate("", text.xy, nearest, textcoords="offset points", arrowprops=line).set_in_layout(False)
    return texts


def _around_line(a: Any, b: Any) -> Box:
    (low_x, high_x), (low_y, high_y) = (sorted((float(a[axis]), float(b[axis]))) for axis in (0, 1))
    return Box(low_x - LINE, low_y - LINE, high_x + LINE, high_y + LINE)


def _box(found: Any, scale: float) -> Box:
    return Box(*(float(number) * scale for number in (found.x0, found.y0, found.x1, found.y1)))
