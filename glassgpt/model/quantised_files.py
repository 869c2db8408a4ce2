"""Quantised models to and from files: the recipe beside the configuration, codes and scales beside the other parameters.

`model.json` has a key "quantisation", the recipe. `model.safetensors` has, for a quantised matrix `blocks.0.attn.qkv`,
`blocks.0.attn.qkv.codes` (uint8; 4 bits two to a byte, even columns in the low halves) and `blocks.0.attn.qkv.scales`, and no
`blocks.0.attn.qkv.weight`; a tied head is the token embedding's.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glassgpt.config import ModelConfig, UserError
from glassgpt.config.folder import RECIPE
from glassgpt.config.quantize import Recipe
from glassgpt.model.gpt import GPT
from glassgpt.model.quantised import QuantisedMatrix, put, quantised_modules, recipe_of, targets

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Expected(NamedTuple):
    """A tensor that a file must have."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


def recipe_values(model: GPT) -> dict[str, Any]:
    """What `model.json` gets beside the configuration: nothing for a plain model."""
    recipe = recipe_of(model)
    return {} if recipe is None else {RECIPE: dataclasses.asdict(recipe)}


def to_tensors(model: GPT) -> dict[str, Tensor]:
    """The codes and scales of a model, by their names in a file."""
    found: dict[str, Tensor] = {}
    for name, module in quantised_modules(model):
        found |= {f"{name}.codes": module.matrix.codes, f"{name}.scales": module.matrix.scales}
    return found


def expected(config: ModelConfig, recipe: Recipe) -> dict[str, Expected]:
    """Every tensor of a quantised model's file. Raises UserError when the recipe names what the network has not."""
    with torch.device("meta"):
        model = GPT(config)
    found = {name: Expected(tuple(p.shape), FLOATS) for name, p in model.named_parameters()}
    known = targets(model)
    for name, bits in recipe.matrices.items():
        if name not in known:
            raise UserError(f"{RECIPE}.matrices names {name}, which this network has not")
        N, K = found.pop(f"{name}.weight").shape
        if K % (recipe.group or K):
            raise UserError(f"{RECIPE}.group is {recipe.group}, which does not divide the {K} inputs of {name}")
        codes, scales = recipe.shapes(bits, N, K)
        found[f"{name}.codes"] = Expected(codes, (torch.uint8,))
        found[f"{name}.scales"] = Expected(scales, (torch.bfloat16 if recipe.group else torch.float32,))
    return found


def from_tensors(config: ModelConfig, recipe: Recipe, tensors: dict[str, Tensor], folder: Path) -> GPT:
    """The model of a quantised folder. Raises UserError, in one line, when the tensors are not those of the configuration."""
    try:
        wanted = expected(config, recipe)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    problems += [f"{name} is not expected" for name in tensors if name not in wanted]
    for name in (name for name in wanted if name in tensors):
        tensor, (shape, dtypes) = tensors[name], wanted[name]
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            kind = "numbers" if dtypes == FLOATS else dtypes[0]
            problems.append(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {kind} {shape}")
    problems += [
        f"{name} has numbers that are no scales"
        for name in tensors
        if name.endswith(".scales") and not (tensors[name].isfinite() & (tensors[name] != 0)).all()
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{folder}: the weights are not those of model.json: {problems[0]}{more}; are they of another model?")
    return _filled(config, recipe, tensors)


def _filled(config: ModelConfig, recipe: Recipe, tensors: dict[str, Tensor]) -> GPT:
    with torch.device("meta"):
        model = GPT(config)
    widths = {name: module.get_parameter("weight").size(1) for name, module in targets(model).items()}
    rest = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in ("codes", "scales")}
    model.load_state_dict(rest, strict=False, assign=True)
    matrices = {}
    for name, bits in recipe.matrices.items():
        codes, scales = tensors[f"{name}.codes"], tensors[f"{name}.scales"]
        matrices[name] = QuantisedMatrix(codes, scales, bits, recipe.group, widths[name])
    model.tie()
    return put(model, matrices, recipe)
