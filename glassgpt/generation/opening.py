"""Models opened to write: straight from the file where the native engine reads it, else by way of PyTorch."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from glassgpt.config import UserError
from glassgpt.config.compute import Compute
from glassgpt.config.quantize import Recipe
from glassgpt.config.speculation import Speculation
from glassgpt.generation import native
from glassgpt.generation.native.threads import leave_one, pytorch
from glassgpt.generation.runner import Model
from glassgpt.loading import Found, find, load
from glassgpt.text import Tokenizer

if TYPE_CHECKING:
    from glassgpt.generation.speculative import Guesses


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
    return _from_file(found, device, compute, is_draft) or _from_network(found, name, device, compute, is_draft)


def _from_file(found: Found, device: str, compute: Compute, is_draft: bool) -> Opened | None:
    """A model whose file the native engine can read by itself; None for every other, and for one that is damaged."""
    if compute.engine == "plain" or found.base is not None:
        return None
    if device != "cpu" and (device != "auto" or _may_have_gpu()):
        return None
    try:
        file = native.ModelFile(found.folder, found.is_hf)
        asked = _of_draft(compute, is_draft and file.recipe is not None).resolved(file.recipe)
        if asked.precision not in ("as-is", "float32", "bfloat16"):
            return None
        tokenizer = found.tokenizer()
        if tokenizer.vocab_size > file.config.vocab_size:
            return None
        options: dict[str, Any] = {"precision": asked.precision, "activations": asked.activations, "cache": asked.cache}
        model = native.open_model(file, **options, threads=asked.threads, release=True)
    except (native.Unfit, native.Unavailable):
        return None
    leave_one()
    return Opened(model, tokenizer, file.parameters, _used(model, file.recipe))


def _from_network(found: Found, name: str, device: str, compute: Compute, is_draft: bool) -> Opened:
    import torch

    from glassgpt.generation.backend import backend, precision_of
    from glassgpt.model import GPT
    from glassgpt.model.quantised import parameter_count, recipe_of

    # an adapter is added to its base in float32: in shorter numbers it would be rounded away
    gpt, tokenizer = load(name, device=device, dtype=torch.float32 if found.base is not None else None)
    parameters, recipe = parameter_count(gpt), recipe_of(gpt)
    model = backend(gpt, _of_draft(compute, is_draft and recipe is not None))
    if isinstance(model, GPT):
        return Opened(model, tokenizer, parameters, {"engine": "plain", "precision": precision_of(model)})
    leave_one()
    return Opened(model, tokenizer, parameters, _used(model, recipe))


def _of_draft(compute: Compute, stays: bool) -> Compute:
    return replace(compute, precision="as-is") if stays else compute


def _used(model: Any, recipe: Recipe | None) -> dict[str, object]:
    """What a native model computes in."""
    return {
        "engine": "native",
        "precision": model.precision if recipe is None else recipe.precision,
        "activations": model.activations,
        "cache": model.cache,
    }


def _may_have_gpu() -> bool:
    """Whether PyTorch might find one: whether NVIDIA's driver or AMD's is there. Only of Linux is that known."""
    if sys.platform != "linux" or os.path.exists("/dev/kfd"):
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


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
