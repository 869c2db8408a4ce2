"""The next token: from logits to the distribution that is drawn from, and the tree of ways to go on."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from rich.text import Text
from rich.tree import Tree

from glassgpt import charts
from glassgpt.config.inspect import Inspect
from glassgpt.generation.sampling import entropy
from glassgpt.interpret.next_token import Node, next_tokens, rest, sampling_tree
from glassgpt.interpret.views.view import BLUE, Read, View, bar, clamped, percent, table, title


def view(config: Inspect, read: Read) -> View:
    """Logit -> /T -> kept -> probability of the likeliest tokens after --position, over the whole vocabulary."""
    place = read.place(config.position)
    logits = read.logits()[place]
    everything = next_tokens(logits, config.sampling, logits.numel(), read.ids[: place + 1].tolist())
    found, drawn = everything[: config.top], torch.tensor([x.probability for x in everything], dtype=torch.float64)
    facts = {
        "model": read.name,
        "place": place,
        "vocabulary": logits.numel(),
        "entropy_bits": float(entropy(logits[None])) / math.log(2),
        "entropy_bits_drawn": float(torch.special.entr(drawn).sum()) / math.log(2),
        "can_be_drawn": int((drawn > 0).sum()),
        "tokens": [{"token": read.label(x.id), **dataclasses.asdict(x)} for x in found],
        "rest": rest(found),
    }
    return View(facts, _columns(facts, config), lambda: draw(facts))


def _columns(facts: dict[str, Any], config: Inspect) -> tuple[Any, ...]:
    rows = table("token", ">id", ">logit", ">/T", "kept", ">probability", "")
    for x in facts["tokens"]:
        kept, style = ("yes", "") if x["kept"] else ("no", "dim")
        cells = (f"{x['id']:,}", f"{x['logit']:.3f}", f"{x['scaled']:.3f}", kept, percent(x["probability"]))
        rows.add_row(Text(x["token"]), *cells, bar(x["probability"]), style=style)
    others = f"all {facts['vocabulary'] - len(facts['tokens']):,} others"
    rows.add_row(others, "", "", "", "", percent(facts["rest"]), bar(facts["rest"]), style="dim")
    sampling = config.sampling
    flags = f"temperature {sampling.temperature:g}, top-k {sampling.top_k or 'all'}, top-p {sampling.top_p:g}"
    bits = f"entropy {facts['entropy_bits']:.2f} bits of the model, {facts['entropy_bits_drawn']:.2f} as drawn from"
    note = Text(f"{bits}; {facts['can_be_drawn']:,} of {facts['vocabulary']:,} tokens can be drawn", style="dim")
    return (title(f"Next token after token {facts['place']}", flags), rows, note)


def draw(facts: dict[str, Any]) -> Any:
    """Bars that sum to 1, with all other tokens as the last."""
    names = [x["token"] for x in facts["tokens"]] + ["all others"]
    heights = [x["probability"] for x in facts["tokens"]] + [facts["rest"]]
    figure, axes = charts.figure(size=(7, clamped(0.3 * len(names) + 1.4)))
    axes.barh(range(len(names)), heights, color=[BLUE] * (len(names) - 1) + ["#9aa4b1"])
    charts.label_axis(axes.yaxis, names)
    for place, height in enumerate(heights):
        axes.text(height + 0.01, place, percent(height), va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, max(heights) * 1.15), xlabel="probability", title=f"Next token (entropy {facts['entropy_bits']:.2f} bits)")
    return figure


# ---------------------------------------------------------------------- the tree


def tree(config: Inspect, read: Read) -> View:
    """The likeliest continuations, --width after each token, --depth tokens deep."""
    end = read.tokenizer.end_id
    size = {"depth": config.depth, "width": config.width}
    root = sampling_tree(read.model, read.ids, **size, sampling=config.sampling, end_id=end, n_ids=read.tokenizer.vocab_size)
    shown = Tree(Text.assemble(("…" + read.labels()[-1], "bold")))
    _grow(shown, root, read)
    facts = {"model": read.name, "tree": _as_json(root, read)}
    return View(
        facts, (title("Tree", "probability after the parent, and of the whole path"), shown), lambda: draw_tree(root, read)
    )


def _grow(shown: Tree, node: Node, read: Read) -> None:
    for child in node.children:
        path = f"{percent(child.path_probability)} in all"
        label = Text.assemble(
            (read.label(child.id), "bold blue" if child.probability > 0.5 else ""), f"  {percent(child.probability)}"
        )
        _grow(shown.add(Text.assemble(label, (f"  {path}", "dim"))), child, read)
    if node.children and node.rest > 0.0005:
        shown.add(Text(f"others  {percent(node.rest)}", style="dim"))


def _as_json(node: Node, read: Read) -> dict[str, Any]:
    own = {
        "token": read.label(node.id),
        "id": node.id,
        "probability": node.probability,
        "path_probability": node.path_probability,
    }
    return own | {"rest": node.rest if node.children else None, "children": [_as_json(child, read) for child in node.children]}


def draw_tree(root: Node, read: Read) -> Any:
    """Branches from left to right, as thick as their path is likely."""
    places: dict[int, tuple[float, float]] = {}

    def put(node: Node, depth: int, top: float) -> float:
        """Give a node and all below it their places; returns where the next one begins."""
        end = top
        for child in node.children:
            end = put(child, depth + 1, end)
        places[id(node)] = (depth, (top + end - 1) / 2 if node.children else top)
        return end if node.children else top + 1

    leaves = put(root, 0, 0)
    depth = max(int(x) for x, _ in places.values())
    figure, axes = charts.figure(size=(clamped(2.4 * depth + 1.5), clamped(0.26 * leaves + 1)))

    def branch(node: Node) -> None:
        x, y = places[id(node)]
        for child in node.children:
            cx, cy = places[id(child)]
            axes.plot(
                (x, x + 0.35, cx - 0.3, cx), (y, cy, cy, cy), color=BLUE, alpha=0.6, linewidth=0.4 + 6 * child.path_probability
            )
            axes.text(
                cx - 0.28, cy, f"{charts.drawable(read.label(child.id))}  {percent(child.probability)}", fontsize=8, va="bottom"
            )
            branch(child)

    branch(root)
    axes.text(0, places[id(root)][1], "…" + charts.drawable(read.label(root.id)), fontsize=9, ha="right", weight="bold")
    axes.set(xlim=(-0.6, depth + 0.3), ylim=(leaves, -1))
    axes.axis("off")
    return figure
