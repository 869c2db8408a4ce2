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
from glassgpt.model import GPT, weights
from glassgpt.text import Tokenizer
from glassgpt.train import optim

OPTIMIZER_FILE = "optimizer.safetensors"
COMPLETE_FILE = "complete.json"


def save(run: Path, step: int, model: GPT, optimizers: list[Optimizer], tokenizer: Tokenizer, facts: dict[str, Any]) -> Path:
    """Write `run/checkpoints/step-NNNNNN`: the plain model, its tokenizer, the optimisers and, last, what must be there.

    `step` counts finished optimiser steps. Random state needs no saving: data order and dropout follow from the step.
    """
    target = run / "checkpoints" / f"step-{step:06d}"
    with complete_folder(target) as aside:
        weights.save(model, aside)
        tokenizer.save(aside)
        safetensors.torch.save_file(optim.state(model, optimizers), aside / OPTIMIZER_FILE)
        sizes = {path.name: path.stat().st_size for path in sorted(aside.iterdir())}
        (aside / COMPLETE_FILE).write_text(json.dumps({"step": step, "files": sizes, **facts}, indent=1))
    return target


def complete(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. Half-written ones are not checkpoints."""
    folders = sorted((run / "checkpoints").glob("step-*"), key=lambda folder: (len(folder.name), folder.name))  # by number
    return [folder for folder in folders if _is_complete(folder)]


def _is_complete(folder: Path) -> bool:
    try:
        files = json.loads((folder / COMPLETE_FILE).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints, and what interrupted saves have left."""
    for folder in complete(run)[:-keep]:
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
