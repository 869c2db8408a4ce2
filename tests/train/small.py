"""A run small enough for a test, and what it leaves behind."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from glassgpt.config import DataConfig, OptimConfig, Pretrain, preset
from glassgpt.loading import complete_checkpoints


def write_sentences(folder: Path) -> Path:
    """A text of sentences that do not repeat, about 8 KB."""
    draw = random.Random(0)
    words = "the a cat dog fox hen sat ran saw ate on in under mat log box pen big red old new and then but so".split()
    path = folder / "sentences.txt"
    path.write_text("".join(" ".join(draw.choices(words, k=8)).capitalize() + ".\n" for _ in range(250)))
    return path


def settings(out_dir: Path, *sources: Path, data: dict[str, Any] | None = None, **changes: Any) -> Pretrain:
    """20 steps of a 2-layer network, without validations or checkpoints on the way."""
    values: dict[str, Any] = {
        "out_dir": str(out_dir),
        "model": preset("tiny", vocab_size=300),
        "data": DataConfig(sources=tuple(map(str, sources)), **(data or {})),
        "optim": OptimConfig(learning_rate=0.01, warmup_steps=4),
        "max_steps": 20,
        "batch_size": 2,
        "eval_interval": 0,
        "save_interval": 0,
        "device": "cpu",
        "precision": "fp32",
        "compile": "off",
    }
    return Pretrain(**{**values, **changes})


def tensors(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Weights and optimiser state of a checkpoint, by file and name."""
    return {
        (file, name): tensor
        for file in ("model.safetensors", "optimizer.safetensors")
        for name, tensor in safetensors.torch.load_file(checkpoint / file).items()
    }


def identical(a: Path, b: Path) -> bool:
    """Whether the newest checkpoints of two runs hold the same bits."""
    ours, theirs = (tensors(complete_checkpoints(run)[-1]) for run in (a, b))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
