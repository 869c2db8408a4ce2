"""Knobs of `glassgpt runs`."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional


@dataclass(frozen=True)
class Runs:
    """List training runs in one table and one chart."""

    folders: Positional[tuple[str, ...]] = ("runs",)
    """Run folders, or folders that hold some at any depth."""
    chart: str | None = None
    """Write the held-out losses of all of them over tokens to this file (.svg or .png)."""
    json: bool = False
    """One JSON array instead of a table."""
