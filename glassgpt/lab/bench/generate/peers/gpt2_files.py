"""A Hugging Face GPT-2 folder as plain arrays, for the peers whose graphs we write."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class GPT2:
    """The shape and the float32 weights of one checkpoint."""

    layers: int
    heads: int
    width: int
    epsilon: float
    tensors: dict[str, np.ndarray[Any, np.dtype[np.float32]]]
    """Named as published, without the prefix `transformer.`; matrices are (inputs, outputs)."""


def read_gpt2(hf_folder: Path) -> GPT2:
    """Read `config.json` and `model.safetensors`. The head is tied to `wte.weight` (V, C)."""
    from safetensors.numpy import load_file

    config = json.loads((hf_folder / "config.json").read_text(encoding="utf-8"))
    tensors = {
        name.removeprefix("transformer."): np.asarray(values, np.float32)
        for name, values in load_file(hf_folder / "model.safetensors").items()
    }
    return GPT2(config["n_layer"], config["n_head"], config["n_embd"], config["layer_norm_epsilon"], tensors)
