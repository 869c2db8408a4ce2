"""A model's folder: what its files are called, and `model.json`. Read without PyTorch, as all of `config` is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from glassgpt.config.errors import UserError
from glassgpt.config.files import from_plain
from glassgpt.config.model import ModelConfig
from glassgpt.config.quantize import PREFIX, VERSION, Recipe

CONFIG_FILE = "model.json"
WEIGHTS_FILE = "model.safetensors"
SHARDED = "sharded"
"""Folder of the parts that several processes have written."""
HF_CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
RECIPE = PREFIX.removesuffix(".")
"""The recipe's key in `model.json`."""


def read_config(folder: Path) -> ModelConfig:
    """The configuration of one of our folders."""
    return read_own(folder)[0]


def read_recipe(folder: Path) -> Recipe | None:
    """How the model of one of our folders was quantised; None for a plain one."""
    return read_own(folder)[1]


def read_own(folder: Path) -> tuple[ModelConfig, Recipe | None]:
    """Both. Raises UserError for a file that cannot be read, an unknown key, a wrong value, and a newer version."""
    path = folder / CONFIG_FILE
    values = read_json(path)
    is_quantised, recipe = RECIPE in values, values.pop(RECIPE, None)
    try:
        return from_plain(ModelConfig, values), as_recipe(recipe) if is_quantised else None
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def as_recipe(values: Any) -> Recipe:
    """What `model.json` says under "quantisation". Raises UserError for a newer version and for what no recipe says."""
    version = values.get("version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise UserError(f"made by a newer GlassGPT ({RECIPE} version {version}; this one reads {VERSION}): upgrade GlassGPT")
    if version != VERSION:
        raise UserError(f"{RECIPE}.version must be {VERSION}; got {version!r}")
    return from_plain(Recipe, values, where=PREFIX)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError for a file that is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object")
    return values
