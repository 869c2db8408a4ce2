"""Models opened to write: straight from the file where the native engine reads it, else by way of PyTorch."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from glassgpt.config import UserError
from glassgpt.config.compute import Compute
from glassgpt.config.folder import read_recipe
from glassgpt.config.speculation import Speculation
from glassgpt.generation import native
from glassgpt.generation.native.threads import leave_one, pytorch
from glassgpt.generation.runner import Model
from glassgpt.loading import Found, find, load
from glassgpt.text import Tokenizer

if TYPE_CHECKING:
    from glassgpt.generation.speculative import Guesses

GPU_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd")
"""Of the drivers of NVIDIA (in WSL too) and AMD."""


class Opened(NamedTuple):
    """A model that is ready to write."""

    model: Model
    tokenizer: Tokenizer
    parameters: int
    used: dict[str, object]
    """What computes, for `--json`: the engine, and the numbers."""


def open_model(name: str, device: str, compute: Compute, is_draft: bool = False) -> Opened:
    """The model called `name`, on the engine and in the numbers asked for. Raises UserError as `load` and `backend` do.

    A draft that is quantised already stays as it is. PyTorch is imported only when it has to make the network.
    """
    found = find(name)
    if (opened := _without_pytorch(found, device, compute)) is not None:
        return opened
    import torch

    from glassgpt.generation.backend import backend, precision_of
    from glassgpt.model import GPT
    from glassgpt.model.quantised import parameter_count, recipe_of

    # an adapter is added to its base in float32: in shorter numbers it would be rounded away
    dtype = torch.float32 if found.base is not None else None
    gpt, tokenizer = load(name, device=device, dtype=dtype)
    parameters = parameter_count(gpt)
    quantised = recipe_of(gpt) is not None
    if is_draft and quantised:
        compute = replace(compute, precision="as-is")
    stored = precision_of(gpt)
    model = backend(gpt, compute)
    if isinstance(model, GPT):
        return Opened(model, tokenizer, parameters, {"engine": "plain", "precision": precision_of(model)})
    leave_one()
    used = {name: getattr(model, name, getattr(compute, name)) for name in ("precision", "activations", "cache")}
    used |= {"engine": "native"} | ({"precision": stored} if quantised else {})
    return Opened(model, tokenizer, parameters, used)


def _without_pytorch(found: Found, device: str, compute: Compute) -> Opened | None:
    """A model whose file the native engine can read by itself; None for every other, and for one that is damaged."""
    on_cpu = device == "cpu" or (device == "auto" and not _may_have_gpu())
    is_rounded = compute.precision not in ("as-is", "float32", "bfloat16")
    if not on_cpu or compute.engine == "plain" or is_rounded or found.base is not None:
        return None
    recipe = None if found.is_hf else read_recipe(found.folder)
    if recipe is None and compute.activations == 8:
        return None
    precision = "float32" if recipe is None and compute.precision == "as-is" else compute.precision
    try:
        source, tokenizer = native.Stored(found.folder, precision, found.is_hf), found.tokenizer()
        if tokenizer.vocab_size > source.config.vocab_size:
            return None
        model = native.open_model(
            source,
            activations=8 if recipe and recipe.activation_bits == 8 else compute.activations,
            cache=compute.cache,
            threads=compute.threads,
            release=True,
        )
    except (native.Unfit, native.Unavailable):
        return None
    leave_one()
    used = {name: getattr(model, name) for name in ("precision", "activations", "cache")} | {"engine": "native"}
    return Opened(model, tokenizer, source.parameters, used | ({"precision": recipe.precision} if recipe else {}))


def _may_have_gpu() -> bool:
    """Whether PyTorch could find one; sure of No on Linux alone."""
    return sys.platform != "linux" or any(map(os.path.exists, GPU_FILES))


def open_guesses(speculation: Speculation, tokenizer: Tokenizer, device: str, compute: Compute) -> Guesses | None:
    """Who guesses, None for nobody. Raises UserError for a draft with another tokenizer."""
    if not speculation.is_on:
        return None
    pytorch()
    from glassgpt.generation.speculative import Guesses

    if speculation.draft is None:
        return Guesses(lookup=speculation.lookup, proposals=speculation.proposals)
    draft = open_model(speculation.draft, device, compute, is_draft=True)
    if not same_tokens(tokenizer, draft.tokenizer):
        raise UserError(f"the draft {speculation.draft} has another tokenizer than the model; give one with the same tokens")
    return Guesses(draft.model, proposals=speculation.proposals)


def same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether every id stands for the same bytes in both."""
    if (one.vocab_size, one.end_id) != (other.vocab_size, other.end_id):
        return False
    return all(one.token_bytes(token_id) == other.token_bytes(token_id) for token_id in range(one.vocab_size))
