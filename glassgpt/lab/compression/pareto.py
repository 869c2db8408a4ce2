"""The Pareto front: what nothing else beats."""

from __future__ import annotations

from collections.abc import Sequence


def front(points: Sequence[Sequence[float]], margins: Sequence[float] | None = None) -> list[bool]:
    """Whether each point is on the front: no other point dominates it (`dominates`)."""
    return [not any(dominates(other, point, margins) for other in points) for point in points]


def dominates(a: Sequence[float], b: Sequence[float], margins: Sequence[float] | None = None) -> bool:
    """Whether `a` is nowhere worse than `b` and somewhere better; numbers are positive, and better when they are lower.

    `margins` say how far apart two numbers must be to count as different, as a share of the smaller one (default: not at all).
    Of equal points none dominates another: all of them are on the front or none is. When only one of the numbers has a margin
    above 0, no points dominate each other in a circle, so there always is a front.
    """
    limits = [1 + margin for margin in margins or (0.0,) * len(a)]
    triples = list(zip(a, b, limits, strict=True))
    return all(x <= y * limit for x, y, limit in triples) and any(x * limit < y for x, y, limit in triples)
