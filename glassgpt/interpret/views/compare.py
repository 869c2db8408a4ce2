"""Two models on one prompt: what they expect, how far apart their insides are, and which tensors differ."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from rich.text import Text
from torch import Tensor

from glassgpt import charts
from glassgpt.config.inspect import Inspect
from glassgpt.interpret.compare import Comparison, ParameterDifference, check_tokenizers, compare
from glassgpt.interpret.views.view import BLUE, ORANGE, Read, View, bar, clamped, table, title
from glassgpt.loading import load


def view(config: Inspect, read: Read) -> View:
    """--compare A B, of which `read` holds A."""
    assert config.compare is not None
    other, tokenizer = load(config.compare[1], device=str(read.ids.device), dtype=getattr(torch, config.dtype))
    check_tokenizers(read.tokenizer, tokenizer)
    found = compare(read.model, other, read.ids, config.top, tokenizer.vocab_size)
    facts = {
        "model": read.name,
        "other": config.compare[1],
        "places": _places(found, read),
        "layers": _layers(found),
        "heads": _heads(found.pattern_distance),
        "parameters": [_tensor(row) for row in found.parameters],
    }
    parts = [*_expected(facts), *_inside(facts), *_tensors(facts, config.top)]
    return View(facts, tuple(parts), lambda: draw(facts, config.compare or ("", "")))


def _places(found: Comparison, read: Read) -> list[dict[str, Any]]:
    rows = []
    for place, (label, kl) in enumerate(zip(read.labels(), found.kl_bits.tolist(), strict=True)):
        row: dict[str, Any] = {"place": place, "token": label, "kl_bits": kl}
        for name, side in (("a", found.a), ("b", found.b)):
            surprise = side.surprises[place]
            top = zip(side.ids[place].tolist(), side.probabilities[place].tolist(), strict=True)
            row[name] = {
                "top": [{"token": read.label(i), "id": i, "probability": p} for i, p in top],
                "surprisal_bits": None if surprise is None else surprise.surprisal_bits,
                "rank": None if surprise is None else surprise.rank,
            }
        rows.append(row)
    return rows


def _layers(found: Comparison) -> list[dict[str, float]]:
    """The residual stream, mean over the tokens; none where the shapes differ."""
    if found.residual_relative is None or found.residual_cosine is None:
        return []
    pairs = zip(found.residual_relative.mean(dim=1).tolist(), found.residual_cosine.mean(dim=1).tolist(), strict=True)
    return [{"relative": relative, "cosine": cosine} for relative, cosine in pairs]


def _heads(distance: Tensor | None) -> list[dict[str, Any]]:
    """Mean total variation of each head's pattern, the largest first; the first token has no choice."""
    if distance is None or distance.size(-1) < 2:
        return []
    means = distance[:, :, 1:].mean(dim=-1)  # (L, H)
    rows = [
        {"layer": layer, "head": head, "distance": x} for layer, row in enumerate(means.tolist()) for head, x in enumerate(row)
    ]
    return sorted(rows, key=lambda row: -float(row["distance"]))


def _tensor(row: ParameterDifference) -> dict[str, Any]:
    """Where A is all zeros there is no relative difference, and JSON has no infinity."""
    return dataclasses.asdict(row) | {"relative": None if math.isinf(row.relative) else row.relative}


def _expected(facts: dict[str, Any]) -> tuple[Any, ...]:
    rows = table(">", "token", "A expects", "B expects", ">KL bits", "", ">bits A", ">bits B")
    for x in facts["places"]:
        tops = [Text(x[side]["top"][0]["token"][:14]) for side in "ab"]
        bits = ["" if x[side]["surprisal_bits"] is None else f"{x[side]['surprisal_bits']:.2f}" for side in "ab"]
        rows.add_row(
            str(x["place"]), Text(x["token"][:14]), *tops, f"{x['kl_bits']:.3f}", bar(x["kl_bits"] / 4, 8, "yellow"), *bits
        )
    note = f"A {facts['model']}, B {facts['other']}"
    return (
        title("What they expect", note),
        Text("KL(A || B) of the next token; bits: surprisal of the token that is there", style="dim"),
        rows,
    )


def _inside(facts: dict[str, Any]) -> tuple[Any, ...]:
    if not facts["layers"]:
        return (Text("\nTheir shapes differ, so layers and heads are not compared.", style="dim"),)
    rows = table("residual stream", ">difference", ">cosine")
    for row, layer in enumerate(facts["layers"]):
        name = "embed" if row == 0 else f"after layer {row - 1}"
        rows.add_row(name, f"{layer['relative']:.4f}", f"{layer['cosine']:.5f}")
    heads = ", ".join(f"{x['layer']}.{x['head']} {x['distance']:.3f}" for x in facts["heads"][:5])
    parts = [title("Inside", "difference over the norm of A, mean of all tokens"), rows]
    return (*parts, Text(f"heads that look elsewhere most (total variation): {heads}", style="dim")) if heads else tuple(parts)


def _tensors(facts: dict[str, Any], count: int) -> tuple[Any, ...]:
    changed = [row for row in facts["parameters"] if row["difference"] > 0]
    if not changed:
        return (Text("\nAll tensors of the same name and shape are equal.", style="dim"),)
    rows = table("tensor", ">difference over norm")
    for row in changed[:count]:
        rows.add_row(row["name"], "A is 0" if row["relative"] is None else f"{row['relative']:.5f}")
    return (title("Tensors that differ most", f"{len(changed)} of {len(facts['parameters'])} differ"), rows)


def draw(facts: dict[str, Any], names: tuple[str, str]) -> Any:
    """KL by token, surprisal of both, and the difference of the residual stream by layer."""
    places = facts["places"]
    figure, (left, right) = charts.figure(2, (12, clamped(0.24 * len(places) + 1.6)), share_y=False)
    left.barh(
        [x["place"] - 0.2 for x in places],
        [x["a"]["surprisal_bits"] or 0 for x in places],
        0.38,
        color=BLUE,
        label=charts.drawable(f"A {names[0]}"),
    )
    left.barh(
        [x["place"] + 0.2 for x in places],
        [x["b"]["surprisal_bits"] or 0 for x in places],
        0.38,
        color=ORANGE,
        label=charts.drawable(f"B {names[1]}"),
    )
    charts.label_axis(left.yaxis, [x["token"] for x in places])
    left.set(xlabel="surprisal, bits", title="How each saw the prompt coming")
    left.legend(fontsize=8)
    right.barh(range(len(places)), [x["kl_bits"] for x in places], color="#6b7785")
    charts.label_axis(right.yaxis, [x["token"] for x in places])
    right.set(xlabel="KL(A || B), bits", title="How far apart they are on the next token")
    for axes in (left, right):
        axes.invert_yaxis()
    return figure
