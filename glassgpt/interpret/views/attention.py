"""Who looks at whom: one head as a matrix, or all of them."""

from __future__ import annotations

import re
from typing import Any

from rich.text import Text
from torch import Tensor

from glassgpt.config import ModelConfig, UserError
from glassgpt.config.inspect import Inspect
from glassgpt.interpret.heads import pattern_distance, pattern_entropy
from glassgpt.interpret.hooks import capture
from glassgpt.interpret.views.view import SEQUENTIAL, SHADES, Read, View, heat_map, table, title

SHOWN_COLUMNS = 64
"""Tokens of a matrix on a terminal: the last ones."""


def attention(config: Inspect, read: Read) -> View:
    """The pattern of one head, or of all. Raises UserError for a head that the model has not."""
    wanted = chosen(str(config.attention), read.model.config)
    with capture(read.model, "blocks.*.attn.pattern") as seen:
        read.logits()
    patterns = [x[0].float() for x in seen.values()]  # each (H, T, T)
    labels = read.labels()
    facts: dict[str, Any] = {"model": read.name, "tokens": labels}
    if wanted is None:
        facts["heads"] = [measured(layer, head, x[head], labels) for layer, x in enumerate(patterns) for head in range(len(x))]
        return View(facts, _all(facts), lambda: draw_all(patterns))
    layer, head = wanted
    pattern = patterns[layer][head]  # (T, T)
    facts |= measured(layer, head, pattern, labels) | {"pattern": pattern.tolist()}
    name = f"head {layer}.{head}"
    return View(facts, _one(facts, pattern), lambda: heat_map(pattern.flip(0), labels[::-1], labels, name, "attention"))


def chosen(text: str, config: ModelConfig) -> tuple[int, int] | None:
    """ "3.2" -> (3, 2); None for "all"."""
    if text == "all":
        return None
    found = re.fullmatch(r"(\d+)\.(\d+)", text)
    if found is None or int(found[1]) >= config.n_layer or int(found[2]) >= config.n_head:
        last = f"{config.n_layer - 1}.{config.n_head - 1}"
        raise UserError(f"--attention takes LAYER.HEAD, here from 0.0 to {last}, or all; got {text!r}")
    return int(found[1]), int(found[2])


def measured(layer: int, head: int, pattern: Tensor, labels: list[str]) -> dict[str, Any]:
    """One head's (T, T) pattern in numbers: how sharp, how far, and where its last token looks most."""
    place = int(pattern[-1].argmax())
    return {
        "layer": layer,
        "head": head,
        "entropy_bits": float(pattern_entropy(pattern[None, None])),
        "distance_tokens": float(pattern_distance(pattern[None, None])),
        "last_looks_at": labels[place],
        "place": place,
        "weight": float(pattern[-1, place]),
    }


def _all(facts: dict[str, Any]) -> tuple[Any, ...]:
    rows = table("layer.head", ">entropy, bits", ">distance", "the last token looks at", ">weight")
    for x in facts["heads"]:
        where = Text.assemble(x["last_looks_at"], (f"  (token {x['place']})", "dim"))
        head = f"{x['layer']}.{x['head']}"
        rows.add_row(head, f"{x['entropy_bits']:.2f}", f"{x['distance_tokens']:.1f}", where, f"{x['weight']:.2f}")
    return (title("Attention", "mean entropy and distance in tokens; one head: --attention LAYER.HEAD"), rows)


def _one(facts: dict[str, Any], pattern: Tensor) -> tuple[Any, ...]:
    """A matrix of shades: a row for each token that looks, a column for each that is looked at."""
    labels, first = facts["tokens"], max(0, len(facts["tokens"]) - SHOWN_COLUMNS)
    width = max(len(label) for label in labels[first:])
    lines = [Text(f"{'':{width}}  columns: tokens {first} to {len(labels) - 1}", style="dim")]
    for label, row in zip(labels[first:], pattern[first:, first:].tolist(), strict=True):
        shades = "".join(SHADES[min(len(SHADES) - 1, round(p * (len(SHADES) - 1) + 0.3))] for p in row)
        lines.append(Text.assemble(f"{label:>{width}}  ", (shades, "blue")))
    head, note = f"Head {facts['layer']}.{facts['head']}", "each row looks back at the columns; darker is more"
    looks = f"entropy {facts['entropy_bits']:.2f} bits, distance {facts['distance_tokens']:.1f} tokens"
    return (title(head, note), *lines, Text(looks, style="dim"))


def draw_all(patterns: list[Tensor]) -> Any:
    """Every head's pattern, a row for each layer, from the last down to the first."""
    from matplotlib.figure import Figure

    L, H = len(patterns), len(patterns[0])
    figure = Figure(figsize=(1.05 * H + 0.8, 1.05 * L + 0.8), layout="constrained")
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
