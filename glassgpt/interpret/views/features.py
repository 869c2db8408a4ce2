"""Features of a sparse autoencoder that a prompt activates."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from rich.text import Text
from torch import Tensor

from glassgpt.config.inspect import Inspect
from glassgpt.interpret.activations import activations
from glassgpt.interpret.sae_report import Context, evaluate_sae, on_device, top_contexts
from glassgpt.interpret.views.trained import autoencoder
from glassgpt.interpret.views.view import Read, View, heat_map, table, title

CONTEXTS = 3


def view(config: Inspect, read: Read) -> View:
    """The features that are strongest anywhere in the prompt, where, and in what other text (of --source) they are."""
    trained, batches = autoencoder(config, read)
    report = evaluate_sae(trained, read.model, batches) if batches else None
    with torch.no_grad():
        x = activations(read.model, [trained.name], read.ids[None])[trained.name][0].float()
        codes = on_device(trained, read.model).encode(x)  # (T, M)
    strongest = codes.amax(dim=0).topk(min(config.top, codes.size(1))).indices
    numbers = [int(feature) for feature in strongest if codes[:, feature].max() > 0]
    contexts = top_contexts(trained, read.model, batches, numbers, CONTEXTS) if batches else [[] for _ in numbers]
    labels = read.labels()
    facts = {
        "model": read.name,
        "activation": trained.name,
        "autoencoder": dataclasses.asdict(trained.config),
        "report": None if report is None else dataclasses.asdict(report),
        "tokens": labels,
        "features": [
            _feature(number, codes[:, number], labels, read, found) for number, found in zip(numbers, contexts, strict=True)
        ],
    }
    picture = lambda: heat_map(  # noqa: E731
        codes[:, numbers].T, [f"feature {number}" for number in numbers], labels, f"Features of {trained.name}", "activation"
    )
    return View(facts, _shown(facts), picture)


def _feature(number: int, codes: Tensor, labels: list[str], read: Read, contexts: list[Context]) -> dict[str, Any]:
    place = int(codes.argmax())
    return {
        "feature": number,
        "strongest_at": place,
        "token": labels[place],
        "codes": codes.tolist(),
        "contexts": [
            {"code": c.code, **_parted(read, c)} for c in contexts
        ],
    }  # fmt: skip


def _parted(read: Read, context: Context) -> dict[str, str]:
    """What stands before the token, the token, and what stands after it."""
    parts = {"before": slice(context.at), "token": slice(context.at, context.at + 1), "after": slice(context.at + 1, None)}
    return {name: "".join(map(read.label, context.ids[part])) for name, part in parts.items()}


def _shown(facts: dict[str, Any]) -> tuple[Any, ...]:
    rows = table(">feature", ">strength", "strongest at", "elsewhere")
    for feature in facts["features"]:
        elsewhere = Text("\n").join(
            Text.assemble(c["before"][-28:], (f"«{c['token']}»", "bold blue"), c["after"][:16]) for c in feature["contexts"]
        )
        where = Text.assemble(feature["token"], (f"  (token {feature['strongest_at']})", "dim"))
        rows.add_row(str(feature["feature"]), f"{max(feature['codes']):.2f}", where, elsewhere)
    parts: list[Any] = [title(f"Features of {facts['activation']}", f"{facts['autoencoder']['features']:,} in all"), rows]
    if report := facts["report"]:
        parts.append(
            Text(
                f"explained variance {report['explained_variance']:.3f}, {report['l0']:.1f} features a token, loss recovered"
                f" {report['loss_recovered']:.3f}, dead {report['dead_share']:.1%} (on {report['tokens']:,} tokens)",
                style="dim",
            )
        )
    else:
        parts.append(Text("--source TEXT adds how faithful it is, and where else each feature is strong", style="dim"))
    return tuple(parts)
