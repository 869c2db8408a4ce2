"""What every layer would say comes next: a grid of layers and tokens."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from glassgpt import charts
from glassgpt.config.inspect import Inspect
from glassgpt.interpret.attribution import residual_norms
from glassgpt.interpret.lens import Lens, lens
from glassgpt.interpret.views.trained import tuned
from glassgpt.interpret.views.view import SEQUENTIAL, Read, View, clamped, table, title

SHOWN_TOKENS = 8
"""Columns on a terminal: the last ones."""
MOST_WRITTEN = 40
"""Tokens of a picture that has words in its cells; with more it is colour alone."""


def view(config: Inspect, read: Read) -> View:
    """The logit lens, or the tuned lens of --tuned-lens."""
    found = lens(read.model, read.ids, config.top, tuned(config, read), read.tokenizer.vocab_size)
    norms = residual_norms(read.model, read.ids)[::2]  # (L + 1, T): before the first block, and after each
    names = ["embed", *(f"layer {layer}" for layer in range(read.model.config.n_layer))]
    labels = read.labels()
    facts = {
        "model": read.name,
        "lens": "logit" if config.tuned_lens is None else "tuned",
        "tokens": labels,
        "layers": [_layer(read, found, name, row) | {"residual_norm": norms[row].tolist()} for row, name in enumerate(names)],
    }
    return View(facts, _grid(facts), lambda: draw(facts, names))


def _layer(read: Read, found: Lens, name: str, row: int) -> dict[str, Any]:
    numbers = found.ids, found.probabilities, found.rank, found.kl_bits, found.entropy_bits
    return {
        "name": name,
        "places": [
            {
                "top": [{"token": read.label(i), "id": i, "probability": p} for i, p in zip(ids, probabilities, strict=True)],
                "rank_of_next": rank or None,
                "kl_bits": kl,
                "entropy_bits": bits,
            }
            for ids, probabilities, rank, kl, bits in zip(*(x[row].tolist() for x in numbers), strict=True)
        ],
    }


def _grid(facts: dict[str, Any]) -> tuple[Any, ...]:
    first = max(0, len(facts["tokens"]) - SHOWN_TOKENS)
    rows = table("", *(str(place) for place in range(first, len(facts["tokens"]))))
    for layer in reversed(facts["layers"]):
        rows.add_row(layer["name"], *(_cell(place["top"][0]) for place in layer["places"][first:]))
    rows.add_row("reads", *(Text(label, style="bold") for label in facts["tokens"][first:]))
    note = "top token after each layer at each place; bold: above 50 %, dim: below 10 %"
    return (title(f"{facts['lens'].capitalize()} lens", note), rows)


def _cell(top: dict[str, Any]) -> Text:
    p = top["probability"]
    return Text(top["token"], style="bold blue" if p > 0.5 else "dim" if p < 0.1 else "")


def draw(facts: dict[str, Any], names: list[str]) -> Any:
    """The grid, layers from the bottom up, with the top token written into each cell."""
    tops = [[place["top"][0] for place in layer["places"]] for layer in facts["layers"]]
    T = len(facts["tokens"])
    figure, axes = charts.figure(size=(clamped(0.95 * T + 2.2), clamped(0.42 * len(tops) + 1.6)))
    picture = axes.imshow(
        [[top["probability"] for top in row] for row in tops], origin="lower", aspect="auto", cmap=SEQUENTIAL, vmin=0, vmax=1
    )
    for row, cells in enumerate(tops if T <= MOST_WRITTEN else ()):
        for place, top in enumerate(cells):
            ink = "white" if top["probability"] > 0.6 else "black"
            axes.text(place, row, charts.drawable(top["token"][:12]), ha="center", va="center", fontsize=8, color=ink)
    charts.label_axis(axes.xaxis, facts["tokens"])
    charts.label_axis(axes.yaxis, names)
    axes.set_xlabel("token read")
    axes.set_title(f"{facts['lens'].capitalize()} lens: what each layer would say comes next", fontsize=11)
    figure.colorbar(picture, label="probability of the top token")
    return figure
