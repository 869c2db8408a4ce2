"""What a model loses without each of its heads and MLPs."""

from __future__ import annotations

import math
from typing import Any

import torch
from rich.text import Text
from torch import Tensor

from glassgpt.config import UserError
from glassgpt.config.inspect import Inspect
from glassgpt.data.progress import steps
from glassgpt.interpret.ablation import ablation_sweep
from glassgpt.interpret.patching import log_probability, logit_difference
from glassgpt.interpret.rerun import Metric
from glassgpt.interpret.views.trained import windows
from glassgpt.interpret.views.view import Read, View, bar, heat_map, table, title, token_id

HOWS = {
    "zero": "nothing in its place",
    "mean": "its mean in its place",
    "resample": "what it does in another text in its place",
}


def ablate(config: Inspect, read: Read) -> View:
    """Every head and every MLP taken away in turn, at all positions. The score is the loss of the prompt, or --answer's."""
    how = config.ablate
    assert how is not None
    metric, score = scored(config, read)
    with steps("ablating") as progress:
        ids = read.ids[None]
        found = ablation_sweep(read.model, ids, how, metric, reference(config, read), config.seed, progress)
    unit = 1 / math.log(2) if metric is None else 1.0  # a loss is shown in bits
    heads, mlps = ((x - found.intact) * unit for x in (found.heads, found.mlps))
    facts = {
        "model": read.name,
        "how": how,
        "score": score,
        "intact": found.intact * unit,
        "heads": heads.tolist(),
        "mlps": mlps.tolist(),
    }
    changes = torch.cat((heads, mlps[:, None]), dim=1)  # (L, H + 1)
    layers = [f"layer {layer}" for layer in range(len(mlps))]
    columns = [f"head {head}" for head in range(heads.size(1))] + ["MLP"]
    heading = f"Change of the {score}\n{HOWS[how]}"
    return View(facts, _shown(facts, changes, config.top), lambda: heat_map(changes, layers, columns, heading, "change", True))


def scored(config: Inspect, read: Read) -> tuple[Metric | None, str]:
    """What is measured, and its name: the loss where no --answer is given."""
    if config.answer is None:
        if config.against is not None:
            raise UserError("--against needs --answer, the token whose logit it is subtracted from")
        return None, "loss of the prompt, bits a token"
    answer = token_id(read.tokenizer, config.answer, "--answer")
    if config.against is None:
        return log_probability(answer), f"log-probability of {read.label(answer)!r}"
    against = token_id(read.tokenizer, config.against, "--against")
    return logit_difference(answer, against), f"logit of {read.label(answer)!r} less that of {read.label(against)!r}"


def reference(config: Inspect, read: Read) -> Tensor | None:
    """The texts that other values come from: --source's, else the prompt itself."""
    if config.ablate == "resample" and not config.source:
        raise UserError("--ablate resample takes values from another text; give it with --source TEXT")
    if config.ablate == "zero" or not config.source:
        return None
    found = next(windows(config, read, "--ablate"), None)
    if found is None:
        raise UserError("--source is too short to take another text from it; give more text")
    return found


def _shown(facts: dict[str, Any], changes: Tensor, count: int) -> tuple[Any, ...]:
    rows = table("part", ">change", "")
    order = changes.abs().flatten().argsort(descending=True)[:count].tolist()
    largest = float(changes.abs().max()) or 1.0
    for place in order:
        layer, column = divmod(place, changes.size(1))
        value = float(changes[layer, column])
        name = f"layer {layer} MLP" if column == changes.size(1) - 1 else f"head {layer}.{column}"
        rows.add_row(name, f"{value:+.3f}", bar(abs(value) / largest, 24, "blue" if value > 0 else "yellow"))
    intact = Text(f"as it is: {facts['intact']:+.3f}", style="dim")
    return (title("Ablation", f"change of the {facts['score']}"), Text(HOWS[facts["how"]], style="dim"), rows, intact)
