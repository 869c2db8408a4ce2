"""What computes a network: the native engine where it can be used, else PyTorch."""

from __future__ import annotations

import sys
from typing import Any

import torch

from glassgpt.config import UserError
from glassgpt.config.compute import Compute
from glassgpt.config.quantize import Recipe
from glassgpt.generation.native.network import INT4_GROUP
from glassgpt.generation.runner import Model
from glassgpt.model import GPT
from glassgpt.model.quantised import put, recipe_of, round_to_nearest, targets


def backend(model: GPT, compute: Compute) -> Model:
    """`model`, with its weights as they are stored, on the engine and in the numbers asked for; it may be changed in place.

    `auto` is the native engine on a CPU, and PyTorch elsewhere, for float64, and (with a notice) where the native engine cannot
    be used. Raises UserError when what is asked for cannot be had.
    """
    asked = compute.resolved(recipe_of(model))
    on_cpu = next(model.parameters()).device.type == "cpu"
    if compute.engine == "native" and not on_cpu:
        raise UserError("the native engine computes on a CPU; use --device cpu")
    if compute.engine == "plain" or not on_cpu or compute.precision == "float64":
        if compute.needs_native:
            raise UserError("--activations 8 and --cache are the native engine's, for a CPU and not for float64; leave them out")
        return plain(model, compute)
    from glassgpt.generation import native

    try:
        options: dict[str, Any] = {"precision": asked.precision, "activations": asked.activations, "cache": asked.cache}
        return native.open_model(model, **options, threads=asked.threads, release=True)
    except native.Unavailable as error:
        if compute.engine == "native" or compute.needs_native:
            raise UserError(f"the native engine cannot be used: {error}") from error
        print(f"note: {error}; computing with PyTorch, which is slower", file=sys.stderr)
        return plain(model, compute)


def plain(model: GPT, compute: Compute) -> GPT:
    """The network itself in the numbers asked for; 8 and 4 bits are dequantised at each use: slow, but nothing is kept."""
    if compute.threads is not None:
        torch.set_num_threads(compute.threads)
    if compute.precision not in ("int8", "int4"):
        return model.to(torch.float32 if compute.precision == "as-is" else getattr(torch, compute.precision))
    bits = int(compute.precision.removeprefix("int"))
    matrices = {}
    for name, module in targets(model.float()).items():
        weight = module.get_parameter("weight")
        group = INT4_GROUP if bits == 4 and weight.size(1) % INT4_GROUP == 0 else None
        matrices[name] = round_to_nearest(weight, bits, group)
    recipe = Recipe(dict.fromkeys(matrices, bits), INT4_GROUP if bits == 4 else None)
    return put(model, matrices, recipe)


def precision_of(model: GPT) -> str:
    """Bits of its matrices where they are quantised, else the dtype of its weights."""
    if (recipe := recipe_of(model)) is not None:
        return recipe.precision
    return str(model.norm_f.get_parameter("weight").dtype).removeprefix("torch.")
