"""The forgetting ledger: held-out loss on every domain after every stage of a chain of `--start`s."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from glassgpt import charts

LEDGER_FILE = "ledger.json"
Row = dict[str, Any]
"""{"after": name of the stage, "domains": {name: {"loss", "bits_per_byte", "tokens"}}}."""


def read(run: Path) -> list[Row]:
    """The rows so far, first stage first; none when the folder has no ledger."""
    path = run / LEDGER_FILE
    return json.loads(path.read_text()) if path.is_file() else []


def write(run: Path, rows: list[Row]) -> None:
    """Replace the ledger whole."""
    aside = run / f".{LEDGER_FILE}.tmp"
    aside.write_text(json.dumps(rows, indent=1))
    aside.replace(run / LEDGER_FILE)


def add(rows: list[Row], after: str, domains: dict[str, dict[str, float]]) -> list[Row]:
    """The rows with this one last; one of the same stage is replaced."""
    return [*(row for row in rows if row["after"] != after), {"after": after, "domains": domains}]


def table(rows: list[Row]) -> Table:
    """Stages down, domains across: nats per token, with the change since the domain's best so far."""
    names = _domains(rows)
    shown = Table("after training on", *(f"loss on {name}" for name in names), box=None, pad_edge=False)
    for number, row in enumerate(rows):
        cells = []
        for name in names:
            value = row["domains"].get(name, {}).get("loss")
            earlier = [r["domains"][name]["loss"] for r in rows[:number] if name in r["domains"]]
            change = f" ({value - min(earlier):+.3f})" if value is not None and earlier else ""
            cells.append("" if value is None else f"{value:.4f}{change}")
        shown.add_row(row["after"], *cells)
    return shown


def plot(run: Path, rows: list[Row]) -> list[Path]:
    """A line for each domain over the stages, as `forgetting.svg` and `forgetting.png`."""
    figure, axes = charts.figure()
    for name in _domains(rows):
        points = [(number, row["domains"][name]["loss"]) for number, row in enumerate(rows) if name in row["domains"]]
        axes.plot(*zip(*points, strict=True), "o-", linewidth=1.8, label=name)
        axes.annotate(f"{points[-1][1]:.2f}", points[-1], textcoords="offset points", xytext=(7, -3))
    axes.set_xticks(range(len(rows)), [f"after {row['after']}" for row in rows])
    axes.set(ylabel="held-out loss (nats per token)", title="What is remembered, stage by stage")
    axes.margins(x=0.12)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, title="text of")
    return charts.save_both(figure, run, "forgetting")


def _domains(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["domains"]))
