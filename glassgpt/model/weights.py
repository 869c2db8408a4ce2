"""Weights to and from files: our own folders."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from glassgpt.config import ModelConfig, UserError
from glassgpt.config.files import from_plain
from glassgpt.model.gpt import GPT

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "model.json"


def save(model: GPT, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write `model.safetensors` (a tied head is stored once, as the token embedding) and `model.json` into `folder`."""
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.named_parameters()}
    safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(dataclasses.asdict(model.config), indent=1))


def read_state(folder: Path, model: GPT) -> dict[str, Tensor]:
    tensors = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    if model.config.tied_head:
        tensors["head.weight"] = tensors["token_embedding.weight"]
    return tensors


def load(folder: Path) -> GPT:
    config = from_plain(ModelConfig, json.loads((folder / CONFIG_FILE).read_text()))
    model = GPT(config)
    model.load_state_dict(read_state(folder, model))
    return model
