"""What every head does, by probes of random tokens with a control beside each."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from rich.text import Text

from glassgpt import charts
from glassgpt.config.inspect import Inspect
from glassgpt.interpret.heads import HeadScore, head_class, usual_scores
from glassgpt.interpret.hooks import capture
from glassgpt.interpret.views.view import SEQUENTIAL, Read, View, last_look, table, title

SCORES = ("previous", "duplicate", "induction")


def heads(config: Inspect, read: Read) -> View:
    """Scores of every head; the probe needs no prompt."""
    scores = usual_scores(read.model, read.tokenizer, config.seed)
    looks = _last_looks(read)
    facts = {"model": read.name, "heads": [_as_json(score, looks) for score in scores]}
    rows = table("head", *(f">{name}" for name in SCORES), ">bits", ">distance", "is", "looks at" if looks else "")
    for score in sorted(scores, key=lambda x: -max(x.previous, x.duplicate, x.induction)):
        cells = [_number(getattr(score, name), getattr(score, f"{name}_control")) for name in SCORES]
        kind = head_class(score).removesuffix("-token").replace("none", "")
        at = str(looks[score.layer, score.head]["last_looks_at"]) if looks else ""
        spread = f"{score.entropy_bits:.2f}", f"{score.distance_tokens:.1f}"
        rows.add_row(f"{score.layer}.{score.head}", *cells, *spread, kind, Text(at))
    note = "mean attention on repeated random tokens / its control: the same places, nothing repeats"
    return View(facts, (title("Heads"), Text(note, style="dim"), rows), lambda: draw(scores))


def _as_json(score: HeadScore, looks: dict[tuple[int, int], dict[str, Any]]) -> dict[str, Any]:
    return dataclasses.asdict(score) | {"class": head_class(score)} | looks.get((score.layer, score.head), {})


def _last_looks(read: Read) -> dict[tuple[int, int], dict[str, Any]]:
    """By layer and head, where the last token of the prompt looks most; nothing without a prompt."""
    if not read.ids.numel():
        return {}
    with capture(read.model, "blocks.*.attn.pattern") as seen:
        read.logits()
    labels = read.labels()
    numbered = ((layer, head, pattern) for layer, x in enumerate(seen.values()) for head, pattern in enumerate(x[0]))
    return {(layer, head): last_look(pattern, labels) for layer, head, pattern in numbered}


def _number(score: float, control: float) -> Text:
    style = "bold blue" if score > 0.5 else "" if score > 0.1 else "dim"
    return Text.assemble((f"{score:.2f}", style), (f" / {control:.2f}", "dim"))


def draw(scores: list[HeadScore]) -> Any:
    """Each score and its control as layers x heads."""
    L, H = 1 + max(score.layer for score in scores), 1 + max(score.head for score in scores)
    figure, panels = charts.figure(2 * len(SCORES), (2.2 * len(SCORES) + 0.55 * H * len(SCORES), 0.36 * L + 2.0))
    for place, name in enumerate(f"{score}{end}" for score in SCORES for end in ("", "_control")):
        values = torch.tensor([getattr(score, name) for score in scores]).view(L, H)
        picture = panels[place].imshow(values.tolist(), origin="lower", cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto")
        panels[place].set(title=name.replace("_", " "), xlabel="head", xticks=range(H), yticks=range(L))
    panels[0].set_ylabel("layer")
    figure.colorbar(picture, ax=panels[-1], label="mean attention")
    return figure
