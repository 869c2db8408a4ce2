"""What each part of a model costs when it alone is quantised: a table and a chart."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from glassgpt import charts
from glassgpt.compress.quality import Quality, Yardstick
from glassgpt.config.quantize import Quantize, Recipe
from glassgpt.data.progress import tracked
from glassgpt.model import GPT
from glassgpt.model.quantised import put, round_to_nearest, targets

INK, BLUE, RED = "#2b2f36", "#3a76c4", "#c8553d"
ALL = "all of them"


@dataclass(frozen=True)
class Part:
    """Matrices that were quantised together, all others being left."""

    name: str
    numbers: int
    quality: Quality


@dataclass(frozen=True)
class Sensitivity:
    """Parts in the order of the forward pass; the last one is all of them."""

    model: str
    bits: int
    group: int
    each: str
    original: Quality
    parts: list[Part]

    def change(self, part: Part) -> float:
        """Bits per byte more than the original's, as a share of them."""
        return part.quality.bits_per_byte / self.original.bits_per_byte - 1


def measure(config: Quantize, model: GPT, names: list[str], yardstick: Yardstick) -> Sensitivity:
    """Quantise each part of a plain model alone, to `config.bits` whatever it is; print, draw and return what it costs."""
    parts = []
    for name, members in tracked(list(parts_of(names, config.each).items()), "sensitivity"):
        small, group = copy.deepcopy(model), config.group or None
        found = {member: targets(small)[member].get_parameter("weight") for member in members}
        recipe = Recipe(dict.fromkeys(members, config.bits), group, activation_bits=config.activations)
        numbers = sum(weight.numel() for weight in found.values())
        put(small, {member: round_to_nearest(weight, config.bits, group) for member, weight in found.items()}, recipe)
        parts.append(Part(name, numbers, yardstick.measure(small, name)))
    result = Sensitivity(config.model, config.bits, config.group, config.each, yardstick.original, parts)
    if config.json:
        print(json.dumps(asdict(result)))
    else:
        _show(result)
    if paths := [Path(path) for path in (config.svg, config.png) if path is not None]:
        draw(result, *paths)
    return result


def parts_of(names: list[str], each: str) -> dict[str, list[str]]:
    """The matrices of each part, and at last all of them."""
    found: dict[str, list[str]] = {}
    for name in names:
        words = name.split(".")
        part = {"matrix": name, "layer": ".".join(words[:2]), "kind": words[-1]}[each]
        found.setdefault(part, []).append(name)
    return found | {ALL: names}


def _show(result: Sensitivity) -> None:
    console = Console(highlight=False)
    original, tokens = result.original.bits_per_byte, result.original.tokens
    group = f"groups of {result.group}" if result.group else "a scale for each output"
    console.print(
        f"{result.model}: {original:.4f} bits per byte on {tokens:,} tokens; quantised to {result.bits} bits, {group}",
        soft_wrap=True,
    )
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for heading in ("alone in few bits", "numbers", "bits per byte", "change", "equal greedy choice"):
        table.add_column(heading, justify="left" if heading.startswith("alone") else "right", no_wrap=True)
    for part in result.parts:
        cells = (f"{part.quality.bits_per_byte:.4f}", f"{result.change(part):+.3%}", f"{part.quality.equal_greedy:.2%}")
        table.add_row(part.name, f"{part.numbers:,}", *cells, style="bold" if part.name == ALL else "")
    console.print(table)


def draw(result: Sensitivity, *paths: Path) -> list[Path]:
    """Bars of the change in bits per byte and of the choices that differ, a row for each part but all of them."""
    parts = [part for part in result.parts if part.name != ALL]
    figure, (loss, choice) = charts.figure(2, size=(10, 1.6 + 0.24 * len(parts)))
    _bars(loss, [100 * result.change(part) for part in parts], BLUE, "more bits per byte, %")
    _bars(choice, [100 * (1 - part.quality.equal_greedy) for part in parts], RED, "other greedy choice, % of places")
    loss.invert_yaxis()
    charts.label_axis(loss.yaxis, [part.name for part in parts], most=len(parts), fontsize=8)
    figure.suptitle(charts.drawable(f"{result.model}: each part alone in {result.bits} bits"), fontsize=12, color=INK)
    return charts.save(figure, *paths)


def _bars(axes: Any, values: list[float], color: str, label: str) -> None:
    axes.barh(range(len(values)), values, color=color)
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
