"""Who looks at whom: one head as a matrix, or all of them."""

from __future__ import annotations

import math
import re
from typing import Any

from rich.text import Text
from torch import Tensor

from glassgpt.config import ModelConfig, UserError
from glassgpt.config.inspect import Inspect
from glassgpt.interpret.heads import pattern_distance, pattern_entropy, rollout, value_weighted
from glassgpt.interpret.hooks import capture
from glassgpt.interpret.views.view import SEQUENTIAL, SHADES, Read, View, clamped, heat_map, last_look, table, title

SHOWN_COLUMNS = 64
"""Tokens of a matrix on a terminal: the last ones."""
STAGES = {
    "scores": "scores before the mask",
    "masked": "scores after the mask",
    "pattern": "who looks at whom",
    "weighted": "attention times the size of what it moves",
}


def attention(config: Inspect, read: Read) -> View:
    """The pattern of one head (or another stage of it), of all, or rolled out. Raises UserError for a head that there is not."""
    wanted = chosen(str(config.attention), read.model.config)
    if config.stage != "pattern" and wanted is None:
        raise UserError(f"--stage {config.stage} is of one head: --attention LAYER.HEAD; got {config.attention}")
    with capture(read.model, [f"blocks.*.attn.{name}" for name in ("pattern", "scores", "masked", "v")]) as seen:
        read.logits()
    layers = range(read.model.config.n_layer)
    patterns = [seen[f"blocks.{layer}.attn.pattern"] for layer in layers]  # each (1, H, T, T)
    labels = read.labels()
    facts: dict[str, Any] = {"model": read.name, "tokens": labels}
    if config.attention == "rollout":
        rolled = rollout(patterns)[-1][0].float()  # (T, T)
        facts |= {"rollout": rolled.tolist()}
        name = "attention rolled out through all layers"
        return View(facts, _matrix(labels, rolled, name), lambda: heat_map(rolled.flip(0), labels[::-1], labels, name, "share"))
    if wanted is None:
        numbered = ((layer, head, pattern) for layer, x in enumerate(patterns) for head, pattern in enumerate(x[0]))
        facts["heads"] = [measured(layer, head, pattern, labels) for layer, head, pattern in numbered]
        return View(facts, _all(facts), lambda: draw_all([x[0].float() for x in patterns]))
    layer, head = wanted
    if config.stage == "weighted":
        x = value_weighted(read.model, layer, patterns[layer], seen[f"blocks.{layer}.attn.v"])
    else:
        x = seen[f"blocks.{layer}.attn.{config.stage}"]
    matrix = x[0, head].detach().float()  # (T, T)
    plain = [[None if math.isinf(number) else number for number in row] for row in matrix.tolist()]  # JSON has no infinity
    facts |= measured(layer, head, patterns[layer][0, head], labels) | {"stage": config.stage, config.stage: plain}
    name = f"head {layer}.{head}: {STAGES[config.stage]}"
    looks = f"entropy {facts['entropy_bits']:.2f} bits, distance {facts['distance_tokens']:.1f} tokens"
    shown = (*_matrix(labels, matrix, name), Text(looks, style="dim"))
    diverging = config.stage in ("scores", "masked")
    return View(facts, shown, lambda: heat_map(matrix.flip(0), labels[::-1], labels, name, config.stage, diverging))


def chosen(text: str, config: ModelConfig) -> tuple[int, int] | None:
    """ "3.2" -> (3, 2); None for "all"."""
    if text in ("all", "rollout"):
        return None
    found = re.fullmatch(r"(\d+)\.(\d+)", text)
    if found is None or int(found[1]) >= config.n_layer or int(found[2]) >= config.n_head:
        last = f"{config.n_layer - 1}.{config.n_head - 1}"
        raise UserError(f"--attention takes LAYER.HEAD, here from 0.0 to {last}, all or rollout; got {text!r}")
    return int(found[1]), int(found[2])


def measured(layer: int, head: int, pattern: Tensor, labels: list[str]) -> dict[str, Any]:
    """One head's (T, T) pattern in numbers: how sharp, how far, and where its last token looks most."""
    return {
        "layer": layer,
        "head": head,
        "entropy_bits": float(pattern_entropy(pattern[None, None])),
        "distance_tokens": float(pattern_distance(pattern[None, None])),
        **last_look(pattern, labels),
    }


def _all(facts: dict[str, Any]) -> tuple[Any, ...]:
    rows = table("layer.head", ">entropy, bits", ">distance", "the last token looks at", ">weight")
    for x in facts["heads"]:
        where = Text.assemble(x["last_looks_at"], (f"  (token {x['place']})", "dim"))
        head = f"{x['layer']}.{x['head']}"
        rows.add_row(head, f"{x['entropy_bits']:.2f}", f"{x['distance_tokens']:.1f}", where, f"{x['weight']:.2f}")
    return (title("Attention", "mean entropy and distance in tokens; one head: --attention LAYER.HEAD"), rows)


def _matrix(labels: list[str], numbers: Tensor, name: str) -> tuple[Any, ...]:
    """A matrix of shades: a row for each token that looks, a column for each that is looked at."""
    first = max(0, len(labels) - SHOWN_COLUMNS)
    width = max(len(label) for label in labels[first:])
    finite = numbers.nan_to_num(neginf=float(numbers[~numbers.isinf()].min()))
    low = min(0.0, float(finite.min()))
    shares = (finite - low) / ((float(finite.max()) - low) or 1.0) * ~numbers.isinf()
    lines = [Text(f"{'':{width}}  columns: tokens {first} to {len(labels) - 1}", style="dim")]
    for label, row in zip(labels[first:], shares[first:, first:].tolist(), strict=True):
        shades = "".join(SHADES[min(len(SHADES) - 1, round(p * (len(SHADES) - 1) + 0.3))] for p in row)
        lines.append(Text.assemble(f"{label:>{width}}  ", (shades, "blue")))
    return (title(name[0].upper() + name[1:]), Text("each row looks back at the columns; darker is more", style="dim"), *lines)


def draw_all(patterns: list[Tensor]) -> Any:
    """Every head's pattern, a row for each layer, from the last down to the first."""
    from matplotlib.figure import Figure

    L, H = len(patterns), len(patterns[0])
    figure = Figure(figsize=(clamped(1.05 * H + 0.8), clamped(1.05 * L + 0.8)), layout="constrained")
    panels = figure.subplots(L, H, squeeze=False)
    for layer, row in enumerate(panels[::-1]):
        for head, axes in enumerate(row):
            axes.imshow(patterns[layer][head].tolist(), cmap=SEQUENTIAL, vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            if head == 0:
                axes.set_ylabel(f"layer {layer}", fontsize=8)
            if layer == 0:
                axes.set_xlabel(f"head {head}", fontsize=8)
    figure.suptitle("Attention of every head (rows look at columns)", fontsize=11)
    return figure
