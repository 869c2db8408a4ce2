"""`glassgpt prune`: a model without its least important weights, heads or channels, and what that costs and saves."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from glassgpt.compress import masks, prune_curve, structured
from glassgpt.compress.prune_speed import Speed, speeds
from glassgpt.compress.recovery import PRUNED, check_sources, recover, recovery_folder
from glassgpt.compress.windows import bits_per_byte
from glassgpt.config import UserError
from glassgpt.config.files import complete_folder
from glassgpt.config.prune import Prune
from glassgpt.data.progress import steps
from glassgpt.interpret.anatomy import anatomy
from glassgpt.loading import find_config, load, pick_device
from glassgpt.model import GPT, weights
from glassgpt.text import Tokenizer

PAIR = 0.5
"""The sparsity when none is given, and of the pattern 2:4."""
NO_GAIN = "Zeros are stored and multiplied like other numbers: the file is as large and the model as fast as before."


@dataclass(frozen=True)
class Stage:
    """The model at one point: before, pruned, recovered."""

    name: str
    parameters: int
    zero_share: float
    """Of the weights in the blocks' matrices."""
    bytes: int | None
    """Of the weights; None for pickled ones, whose types cannot be known."""
    bits_per_byte: float | None
    """On the held-out text; None without one."""
    speed: Speed | None


@dataclass(frozen=True)
class Pruned:
    """What `prune` has written."""

    out_dir: str
    method: str
    text_tokens: int
    """Held-out tokens that the loss was measured on."""
    stages: list[Stage]


def prune(config: Prune) -> Pruned | prune_curve.Curve:
    """Prune, write, recover, measure and tell; with `curve` measure every method instead and write no model.

    Raises UserError for an unknown model or one that is not plain, for text that cannot be read, for folders that exist, and
    for more than the model has.
    """
    if config.curve:
        return prune_curve.curve(config)
    target, aside = Path(str(config.out_dir)), recovery_folder(config)
    for folder in (target, aside) if config.recover_steps else (target,):
        if folder.exists():
            raise UserError(f"{folder} exists already and is never overwritten; choose another out_dir or move it away")
    if config.recover_steps:
        check_sources(config)
    model, tokenizer = load(config.model, device=str(pick_device(config.device)))
    held_out = prune_curve.text_of(config, tokenizer, model) if config.text else None
    pruned = pruned_model(config, model, tokenizer)
    places = [("before", config.model)]
    if config.recover_steps:
        write(pruned, tokenizer, aside / PRUNED, stored_dtype(config.model))
        places += [("pruned", str(aside / PRUNED)), ("recovered", str(target))]
        pruned, _ = load(recover(config))
    else:
        places.append(("pruned", str(target)))
    write(pruned, tokenizer, target, stored_dtype(config.model))
    models = [model, *(load(folder, device=config.device)[0] for _, folder in places[1:])]
    measured = speeds(models, config.repeats, config.seed) if config.repeats else [None] * len(models)
    stages = [
        Stage(
            name,
            sum(parameter.numel() for parameter in one.parameters()),
            masks.zero_share(one),
            anatomy(*find_config(folder)).stored_bytes,
            None if held_out is None else bits_per_byte(one, held_out, tokenizer),
            speed,
        )
        for (name, folder), one, speed in zip(places, models, measured, strict=True)
    ]
    result = Pruned(str(target), config.method, 0 if held_out is None else held_out[:, 1:].numel(), stages)
    print(json.dumps(asdict(result))) if config.json else show(result)
    return result


def pruned_model(config: Prune, model: GPT, tokenizer: Tokenizer) -> GPT:
    """A new model, pruned as the configuration says; `model` stays as it is."""
    sparsity = PAIR if config.sparsity is None else config.sparsity
    if config.method == "magnitude":
        pruned = copy.deepcopy(model)
        masks.prune_magnitude(pruned, sparsity, config.pattern, config.compared or "matrix")
        return pruned
    if config.method == "structured":
        structured.check_heads(config.heads, model.config)
        masks.check_plain(model)
    ids = prune_curve.calibration_of(config, tokenizer, model)
    with steps(config.method) as progress:
        if config.method == "wanda":
            pruned = copy.deepcopy(model)
            masks.prune_wanda(pruned, ids[:, :-1], sparsity, config.pattern, config.compared or "row", progress)
            return pruned
        found = structured.importance(model, ids, progress)
    return structured.smaller(model, structured.choose(found, config.heads, config.mlp_share, model.config))


def write(model: GPT, tokenizer: Tokenizer, target: Path, dtype: torch.dtype | None) -> None:
    """A plain model's folder, complete or not at all."""
    with complete_folder(target) as aside:
        weights.save(model, aside, dtype)
        tokenizer.save(aside)


def stored_dtype(name: str) -> torch.dtype | None:
    """The one type that all weights of a model are stored in; None when there are several or it cannot be known."""
    names = set(find_config(name)[1].values())
    return getattr(torch, names.pop()) if len(names) == 1 else None


def show(result: Pruned) -> None:
    """Print the stages as a table."""
    table = Table("", "parameters", "zeros", "MB", "bits/byte", "generated tokens/s", "read tokens/s")
    for column in table.columns[1:]:
        column.justify = "right"
    for stage in result.stages:
        table.add_row(
            stage.name,
            f"{stage.parameters:,}",
            f"{stage.zero_share:.1%}",
            "-" if stage.bytes is None else f"{stage.bytes / 1e6:.1f}",
            "-" if stage.bits_per_byte is None else f"{stage.bits_per_byte:.4f}",
            "-" if stage.speed is None else f"{stage.speed.generate:,.0f}",
            "-" if stage.speed is None else f"{stage.speed.forward:,.0f}",
        )
    console = Console(highlight=False)
    console.print(table)
    if result.text_tokens:
        console.print(f"bits per byte on {result.text_tokens:,} tokens of the text")
    if result.method != "structured":
        console.print(NO_GAIN)
    console.print(f"wrote {result.out_dir}")
