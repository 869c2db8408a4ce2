"""Checkpoints: folders that are complete or absent, each one a model that `glassgpt.load` opens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
from torch.optim import Optimizer

from glassgpt.config import UserError
from glassgpt.config.files import complete_folder
from glassgpt.loading import COMPLETE_FILE, complete_checkpoints
from glassgpt.model import GPT, weights
from glassgpt.text import Tokenizer
from glassgpt.train import optim

OPTIMIZER_FILE = "optimizer.safetensors"


def save(run: Path, step: int, model: GPT, optimizers: list[Optimizer], tokenizer: Tokenizer, facts: dict[str, Any]) -> Path:
    """Write `run/checkpoints/step-NNNNNN`: the plain model, its tokenizer, the optimisers and, last, what must be there.

    `step` counts finished optimiser steps. Random state needs no saving: data order and dropout follow from the step.
    """
    target = run / "checkpoints" / f"step-{step:06d}"
    if target.exists() and target not in complete_checkpoints(run):
        shutil.rmtree(target)  # a damaged one or half a copy, which resuming has passed over
    with complete_folder(target) as aside:
        weights.save(model, aside)
        tokenizer.save(aside)
        safetensors.torch.save_file(optim.state(model, optimizers), aside / OPTIMIZER_FILE)
        sizes = {path.name: path.stat().st_size for path in sorted(aside.iterdir())}
        (aside / COMPLETE_FILE).write_text(json.dumps({"step": step, "files": sizes, **facts}, indent=1))
    return target


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints, and what interrupted saves have left."""
    for folder in complete_checkpoints(run)[:-keep]:
        shutil.rmtree(folder)
    for folder in (run / "checkpoints").glob(".tmp-step-*"):
        shutil.rmtree(folder, ignore_errors=True)


def restore(folder: Path, model: GPT, optimizers: list[Optimizer]) -> int:
    """Load weights and optimisers in place; returns the number of finished steps."""
    try:
        step = int(json.loads((folder / COMPLETE_FILE).read_text())["step"])
        model.load_state_dict(weights.load(folder).state_dict())
        optim.set_state(model, optimizers, safetensors.torch.load_file(folder / OPTIMIZER_FILE))
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{folder}: cannot restore this checkpoint ({error}); delete it to continue from the one before"
        ) from error
    return step
