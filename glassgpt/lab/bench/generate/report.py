"""`bench generate` as tables of at most 100 columns, as JSON, as a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from glassgpt import charts
from glassgpt.config.bench import BenchGenerate
from glassgpt.interpret.inspect import check_path
from glassgpt.lab.bench.generate.phases import Phase
from glassgpt.lab.bench.generate.result import TURNS_SPREAD, Measured, Result
from glassgpt.lab.bench.generate.systems import BASE

COLUMNS = 100
OURS, PEER = "tab:orange", "tab:blue"
PLAIN = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
"""Behind a label."""


def check_pictures(config: BenchGenerate) -> None:
    """Raise UserError for a picture that could not be written at the end."""
    check_path(config.png, ".png")
    check_path(config.svg, ".svg")


def show(result: Result) -> None:
    """Print what the configuration asks for, and draw."""
    paths = [Path(path) for path in (result.config.png, result.config.svg) if path]
    if paths:
        draw(result, paths)
    if result.config.json:
        print(json.dumps(as_json(result)))
        return
    console = Console()
    console.width = max(console.width, COLUMNS) if not console.is_terminal else console.width
    for title, table in tables(result):
        console.print(title, highlight=False, style="italic")
        console.print(table)
        console.print()
    for line in notes(result):
        console.print(line, highlight=False, style="yellow" if line.startswith("warning") else None)


def as_json(result: Result) -> dict[str, Any]:
    """Everything that was measured, and what the tables show of it."""
    shown = {
        name: {
            phase.name: {
                "tokens_per_second": result.rate(name, phase),
                "spread": result.spread(name, phase),
                "ratio": result.ratio(name, phase),
                "lead": result.lead(name, phase),
                "lead_of_same_bits": result.lead(name, phase, result.systems[name].bits),
                "floor_tokens_per_second": result.floor_rate(result.systems[name].bits, phase),
                "floor_share": result.floor_share(name, phase),
                "same_ids": result.same_ids(name, phase),
            }
            for phase in result.phases
            if result.finished(name, phase)
        }
        for name in result.systems
    }
    return asdict(result) | {"shown": shown, "noise": result.noise()}


# ---------------------------------------------------------------------- tables


def tables(result: Result) -> list[tuple[str, Table]]:
    """With their titles: rates; our lead; shares of the floor; equal ids; starts and sizes; the floor itself."""
    found = [_rates(result), _shares(result), _limits(result)]
    if any(system.is_ours for system in result.systems.values()) and any(map(result.best_peer, result.phases)):
        found.insert(1, _leads(result))
    if BASE in result.systems:
        found.insert(-1, _agreement(result))
    if result.config.starts:
        found.insert(-1, _starts(result))
    return found


def _table(*columns: str, first: str = "system") -> Table:
    table = Table(first, box=None, pad_edge=False, padding=(0, 1))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _fill(table: Table, result: Result, cell: Callable[[str, Phase], str]) -> Table:
    for name in result.systems:
        table.add_row(name, *(cell(name, phase) if result.finished(name, phase) else "-" for phase in result.phases))
    return table


def _rates(result: Result) -> tuple[str, Table]:
    config = result.config
    best = {phase.name: result.best_peer(phase) for phase in result.phases}

    def cell(name: str, phase: Phase) -> str:
        apart, ratio = result.spread(name, phase), result.ratio(name, phase)
        text = f"{_number(result.rate(name, phase))} {'~' if apart > TURNS_SPREAD else ''}{apart:.0%}".rjust(11)
        text += f" {_times(ratio):>5}" if ratio is not None else ""
        return f"[bold]{text}[/]" if best[phase.name] == name else text

    title = f"{config.preset}, random weights, {result.threads} threads: tokens/s, spread, ratio to {BASE}; best peer in bold"
    return title, _fill(_table(*_names(result)), result, cell)


def _leads(result: Result) -> tuple[str, Table]:
    table = _table(*_names(result))
    for name, found in result.systems.items():
        if found.is_ours:
            leads = [(result.lead(name, phase), result.lead(name, phase, found.bits)) for phase in result.phases]
            table.add_row(name, *(" / ".join(map(_times, pair)) for pair in leads))
    best = [f"{phase.name} {peer}" for phase in result.phases if (peer := result.best_peer(phase))]
    return f"ours over the best peer / over the best of as many bits\nbest: {', '.join(best)}", table


def _shares(result: Result) -> tuple[str, Table]:
    table = _fill(_table(*_names(result)), result, lambda name, phase: f"{result.floor_share(name, phase):.0%}")
    for bits in sorted({found.bits for found in result.systems.values()}, reverse=True):
        groups = " (groups of 32)" if bits == 4 else ""
        table.add_row(
            f"floor of {bits} bits{groups}", *(f"{_number(result.floor_rate(bits, phase))}/s" for phase in result.phases)
        )
    return "share of the floor of its precision: what memory and arithmetic of this machine allow", table


def _agreement(result: Result) -> tuple[str, Table]:
    def cell(name: str, phase: Phase) -> str:
        share = result.same_ids(name, phase)
        return "-" if share is None else f"{share:.0%}"

    return f"share of the greedy ids before the first that {BASE} has otherwise", _fill(_table(*_names(result)), result, cell)


def _starts(result: Result) -> tuple[str, Table]:
    table = _table("first token", "load", "memory", "on disk")
    for name, found in result.systems.items():
        start, load = statistics.median(found.start_seconds), statistics.median(found.load_seconds)
        peak = statistics.median(found.peak_bytes)
        table.add_row(name, f"{start:.2f} s", f"{load:.3f} s", f"{peak / 1e6:,.0f} MB", f"{found.disk_bytes / 1e6:,.1f} MB")
    return (
        f"{result.config.starts} fresh processes: time to the first token; to load alone; most memory; size of the files",
        table,
    )


def _limits(result: Result) -> tuple[str, Table]:
    limits = result.floor
    counts = sorted({bandwidth.threads for bandwidth in limits.bandwidths})
    table = _table(*(f"{count} thread{'s' * (count > 1)}" for count in counts), first="")
    for size in sorted({bandwidth.bytes for bandwidth in limits.bandwidths}):
        table.add_row(f"read {size / 1e6:,.0f} MB", *(f"{limits.bandwidth(size, count) / 1e9:.1f} GB/s" for count in counts))
    for kind, rate in limits.rates.items():
        table.add_row(f"multiply {kind}", *[""] * (len(counts) - 1), f"{rate / 1e9:,.0f} Gop/s")
    return f"this machine, measured by {limits.measured_by}", table


def _names(result: Result) -> list[str]:
    return [phase.name for phase in result.phases]


def notes(result: Result) -> list[str]:
    """What stands below the tables: who wrote the same, who was left out, how it was measured."""
    lines = []
    floats = [name for name, found in result.systems.items() if found.bits == 32]
    if BASE in floats and len(floats) > 1:
        other = [name for name in floats if any(result.same_ids(name, phase) not in (1, None) for phase in result.phases)]
        lines.append("all of float32 wrote the same ids" if not other else f"float32, but other ids: {', '.join(other)}")
    lines += [f"left out: {name}: {reason}" for name, reason in result.left_out.items()]
    lines.append(f"medians of {result.config.repeats} turns; spread: distance of the quartiles over the median")
    lines += _fairness(result)
    lines += [f"warning: {line}" for line in result.noise()]
    return lines


def _fairness(result: Result) -> list[str]:
    """What must be known before systems of one precision are compared."""
    names, peers = result.systems, {name.partition("-")[0] for name in result.systems}
    lines = []
    if "xllamacpp" in peers and "llama.cpp" not in peers:
        lines.append("llama.cpp here is a wheel without AVX-512; pip install llama-cpp-python compiles the faster one")
    if any(name.startswith("ours-int8") for name in names):
        lines.append(
            "ours-int8: a scale a row meets 99 % equal greedy choices by GPTQ only (docs/results.md); a8 rows are outside of it"
        )
    if "onnxruntime-int8" in names:
        lines.append("onnxruntime: its file holds a float embedding beside its 8-bit head")
    return lines


def _number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x"


# ---------------------------------------------------------------------- picture


def draw(result: Result, paths: list[Path]) -> list[Path]:
    """A panel a phase: bars of tokens/s, ours and theirs in two colours; a line across a bar is the floor of its precision."""
    names = list(result.systems)
    size = (3.2 * len(result.phases) + 1.8, 0.28 * len(names) + 1.6)
    drawn, axes = charts.figure(len(result.phases), size)
    panels = list(axes) if len(result.phases) > 1 else [axes]
    for axis, phase in zip(panels, result.phases, strict=True):
        _draw_phase(axis, result, phase)
    charts.label_axis(panels[0].yaxis, names)
    panels[0].invert_yaxis()
    drawn.suptitle(
        f"{result.config.preset}, random weights, {result.threads} threads: tokens/s"
        " (orange: ours; black line: floor of its precision, where it is in the picture)",
        fontsize=10,
    )
    return charts.save(drawn, *paths)


def _draw_phase(axis: Any, result: Result, phase: Phase) -> None:
    systems: dict[str, Measured] = result.systems
    rates = [result.rate(name, phase) if result.finished(name, phase) else 0.0 for name in systems]
    axis.barh(range(len(rates)), rates, color=[OURS if found.is_ours else PEER for found in systems.values()])
    edge = 1.25 * max(rates) or 1.0
    for place, (name, found) in enumerate(systems.items()):
        ratio, limit = result.ratio(name, phase), result.floor_rate(found.bits, phase)
        if limit < edge:
            axis.plot([limit, limit], [place - 0.45, place + 0.45], color="black", linewidth=1.5)
        if ratio is not None:
            axis.annotate(
                _times(ratio), (rates[place], place), (3, 0), textcoords="offset points", va="center", fontsize=7, bbox=PLAIN
            )
    axis.set_xlim(0, edge)
    axis.locator_params(axis="x", nbins=5)
    axis.set_title(phase.name, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
