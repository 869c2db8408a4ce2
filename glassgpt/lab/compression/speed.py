"""Speed of generation by models in folders, measured in turns."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from glassgpt.config.compute import Compute
from glassgpt.config.generate import Sampling
from glassgpt.data.progress import steps
from glassgpt.generation import stream
from glassgpt.generation.backend import backend, precision_of
from glassgpt.generation.generator import Generator
from glassgpt.generation.runner import Model
from glassgpt.loading import load
from glassgpt.model import GPT
from glassgpt.model.quantised import recipe_of


class Ready(NamedTuple):
    """A model that can be timed."""

    model: Model
    engine: str
    """native or plain (PyTorch)."""
    precision: str
    work: str
    """Equal for models of the same shape and formats: they do the same work, whatever their numbers are."""


def opened(folder: Path, compute: Compute, device: str) -> Ready:
    """A written model on the engine of `compute`, in its codes, in bfloat16 or in float32, as it is stored.

    Raises UserError as `backend` does.
    """
    gpt, _ = load(folder, device=device, dtype=None)
    precision, recipe, shape = precision_of(gpt), recipe_of(gpt), gpt.config
    formats = None if recipe is None else dataclasses.replace(recipe, method="rtn", calibration_tokens=0)
    if precision == "bfloat16":
        compute = dataclasses.replace(compute, precision="bfloat16")
    model = backend(gpt, compute)
    engine = "plain" if isinstance(model, GPT) else "native"
    return Ready(model, engine, precision, repr((engine, shape, precision, formats)))


def rates(models: Mapping[str, Ready], prompt: Sequence[int], new_tokens: int, repeats: int) -> dict[str, list[float]]:
    """Tokens a second of each turn, after one that does not count. Who begins changes from turn to turn.

    Models that do the same work all get the turns of each: what differs between them is the machine's, not theirs.
    """
    names = list(models)
    found: dict[str, list[float]] = {ready.work: [] for ready in models.values()}
    with steps("speed") as progress:
        for turn in range(repeats + 1):
            for place in range(len(names)):
                ready = models[names[(place + turn) % len(names)]]
                rate = decode_rate(ready.model, prompt, new_tokens)
                if turn:
                    found[ready.work].append(rate)
            progress(turn + 1, repeats + 1)
    return {name: found[ready.work] for name, ready in models.items()}


def decode_rate(model: Model, prompt: Sequence[int], new_tokens: int) -> float:
    """Greedy tokens a second after a prompt, from the first new one to the last."""
    tokens = stream(model, [prompt], Sampling(temperature=0), [Generator()], new_tokens)
    next(tokens)
    began = time.perf_counter()
    return sum(1 for _ in tokens) / (time.perf_counter() - began)
