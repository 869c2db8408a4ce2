"""`glassgpt quantize`: a model in 8 or 4 bits, and what that costs and saves."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from glassgpt.compress import sensitivity
from glassgpt.compress.gptq import quantise_by_layers
from glassgpt.compress.quality import Quality, Yardstick
from glassgpt.compress.windows import windows
from glassgpt.config import UserError, nearest
from glassgpt.config.files import complete_folder
from glassgpt.config.quantize import Quantize, Recipe
from glassgpt.data.progress import steps
from glassgpt.interpret.anatomy import anatomy
from glassgpt.loading import find_config, load, pick_device
from glassgpt.model import GPT, weights
from glassgpt.model.quantised import put, recipe_of, round_to_nearest, targets
from glassgpt.text import Tokenizer

HEADS = ("token_embedding", "head")


@dataclass(frozen=True)
class Stage:
    """The model before or after."""

    name: str
    bytes: int | None
    """Of the weights; None for pickled ones, whose types cannot be known."""
    quality: Quality | None
    """On the text; None without one."""


@dataclass(frozen=True)
class Quantised:
    """What `quantize` has written."""

    out_dir: str
    recipe: Recipe
    kept: list[str]
    """Matrices that keep their floating point numbers."""
    before: Stage
    after: Stage


def quantize(config: Quantize) -> Quantised | sensitivity.Sensitivity:
    """Quantise, write, measure and tell; with `sensitivity` measure every part by itself instead and write no model.

    Raises UserError for an unknown model or one that is quantised already, for a group that does not fit it, for text that cannot
    be read, for a folder that exists.
    """
    if config.out_dir is not None and Path(config.out_dir).exists():
        raise UserError(f"{config.out_dir} exists already and is never overwritten; choose another out_dir or move it away")
    model, tokenizer = load(config.model, device=str(pick_device(config.device)))
    names = chosen(model, config)
    yardstick = None
    if config.text:
        text = windows_of(config, "val", config.text, config.text_tokens, model, tokenizer)
        yardstick = Yardstick(model, text, torch.tensor(tokenizer.byte_lengths()))
    if config.sensitivity:
        assert yardstick is not None  # the configuration asks for text
        return sensitivity.measure(config, model, names, yardstick)
    with complete_folder(Path(str(config.out_dir))) as aside:
        small = quantised(config, model, names, tokenizer)
        weights.save(small, aside, _rest_dtype(config.model))
        tokenizer.save(aside)
    recipe = recipe_of(small)
    assert recipe is not None
    found = Quantised(
        out_dir=str(config.out_dir),
        recipe=recipe,
        kept=[name for name in targets(model) if name not in names],
        before=Stage("before", _stored(config.model), None if yardstick is None else yardstick.original),
        after=Stage("after", _stored(str(config.out_dir)), None if yardstick is None else yardstick.measure(small)),
    )
    if config.json:
        print(json.dumps(asdict(found)))
    else:
        _show(found)
    return found


def quantised(config: Quantize, model: GPT, names: list[str], tokenizer: Tokenizer) -> GPT:
    """A copy of the model whose matrices of these names are quantised."""
    bits = {name: config.head_bits if name in HEADS else config.bits for name in names}
    group, small = config.group or None, copy.deepcopy(model)
    with steps("quantising") as progress:
        if config.method == "gptq":
            ids = windows_of(config, "train", config.calibration, config.calibration_tokens, model, tokenizer)[:, :-1]
            recipe = Recipe(bits, group, "gptq", ids.numel(), config.activations)
            return quantise_by_layers(small, ids.to(model.head.weight.device), recipe, progress)
        recipe = Recipe(bits, group, "rtn", 0, config.activations)
        for done, (name, its_bits) in enumerate(bits.items(), 1):
            put(small, {name: round_to_nearest(_matrix(small, name), its_bits, group)}, recipe)
            progress(done, len(bits))
    return small


def chosen(model: GPT, config: Quantize) -> list[str]:
    """The matrices to be quantised. Raises UserError when none are, or when the group or a name to keep does not fit."""
    if recipe_of(model) is not None:
        raise UserError(f"{config.model} is quantised already; quantise the model that it was made from")
    every = list(targets(model))
    for part in config.keep:
        if not any(_is_part(part, name) for name in every):
            ends = dict.fromkeys(name.rpartition(".")[2] for name in every)
            raise UserError(
                f"keep names {part}, which this model has not{nearest(part, [*ends, *every])}; it has {', '.join(ends)}"
            )
    names = [name for name in every if not any(_is_part(part, name) for part in config.keep)]
    if not names:
        raise UserError(f"keep is {' '.join(config.keep)}: that is every matrix, and none is left to quantise")
    for name in names:
        if not _matrix(model, name).isfinite().all():
            raise UserError(f"{name}: the matrix has numbers that are not finite; it cannot be quantised")
        K = _matrix(model, name).size(1)
        if config.group and K % config.group:
            fitting = max(size for size in range(1, config.group) if K % size == 0)
            raise UserError(f"group is {config.group}, which does not divide the {K} inputs of {name}; use {fitting} or 0")
    return names


def _is_part(part: str, name: str) -> bool:
    """`part` is the name, the beginning of it or its end, in whole words."""
    return f".{part}." in f".{name}."


def _matrix(model: GPT, name: str) -> Tensor:
    return model.get_submodule(name).get_parameter("weight")


def windows_of(config: Quantize, split: str, sources: tuple[str, ...], tokens: int, model: GPT, tokenizer: Tokenizer) -> Tensor:
    """Windows (N, T + 1) of some text."""
    return windows(sources, split, config.holdout_share, tokenizer, model.config.context_tokens, tokens, config.seed)


def _stored(name: str) -> int | None:
    return anatomy(*find_config(name)).stored_bytes


def _rest_dtype(name: str) -> torch.dtype:
    """What the norms are stored in, and so whatever is not quantised: float32 where it is not known."""
    dtype = find_config(name)[1].get("norm_f.weight", "float32")
    found: torch.dtype = getattr(torch, dtype)
    return found


def _show(found: Quantised) -> None:
    console = Console(highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for heading in ("", "weights, MB", "bits per byte", "change", "equal greedy choice"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for stage in (found.before, found.after):
        size = "-" if stage.bytes is None else f"{stage.bytes / 1e6:.2f}"
        table.add_row(stage.name, size, *quality_cells(stage.quality, found.before.quality))
    console.print(table)
    recipe = found.recipe
    kinds = sorted({recipe.kind(bits) for bits in recipe.matrices.values()})
    told = f"{len(recipe.matrices)} matrices as {' and '.join(kinds)} by {recipe.method}"
    told += f" (calibrated on {recipe.calibration_tokens:,} tokens)" if recipe.calibration_tokens else ""
    told += f"; {recipe.activation_bits}-bit activations" if recipe.activation_bits == 8 else ""
    console.print(told + (f"; not quantised: {', '.join(found.kept)}" if found.kept else ""), soft_wrap=True)
    if found.after.quality is not None:
        console.print(f"Measured on {found.after.quality.tokens:,} tokens.")
    console.print(f"wrote {found.out_dir}", soft_wrap=True)


def quality_cells(found: Quality | None, original: Quality | None) -> tuple[str, str, str]:
    """Bits per byte, their change and the share of equal choices, as text."""
    if found is None or original is None:
        return "-", "-", "-"
    change = found.bits_per_byte / original.bits_per_byte - 1
    return f"{found.bits_per_byte:.4f}", f"{change:+.3%}" if found != original else "", f"{found.equal_greedy:.2%}"
