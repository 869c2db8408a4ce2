"""Weights to and from files: our own folders and Hugging Face's, whose names for things are in `families`.

Ours: `model.json` (the configuration) and `model.safetensors` (parameters by our names; a tied head is stored once); what a
quantised model has instead of some of them is in `quantised_files`.
Theirs: `config.json` and weights as safetensors or PyTorch pickles, whole or in shards.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from glassgpt.config import ModelConfig, UserError
from glassgpt.config.errors import first_line
from glassgpt.config.folder import CONFIG_FILE, HF_CONFIG_FILE, SHARDED, WEIGHTS_FILE, read_json, read_own, read_recipe
from glassgpt.model import quantised_files
from glassgpt.model.families import Family, Stored, family_of, read_hf
from glassgpt.model.gpt import GPT

HF_WEIGHTS_FILES = (WEIGHTS_FILE, f"{WEIGHTS_FILE}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


# ---------------------------------------------------------------------- our folders


def save(model: GPT, folder: Path, dtype: torch.dtype | None = None, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write `model.json` and `model.safetensors` into an existing folder, weights in `dtype` (default: as they are).

    `tensors` are written in place of the model's own parameters, where those are spread over several processes.
    """
    named = dict(model.named_parameters()) if tensors is None else tensors
    if any(".lora_" in name for name in named):
        raise UserError("a model with adapters is no plain model; merge them first, or save the adapters")
    plain = {name: p.detach().to("cpu", dtype).contiguous() for name, p in named.items()}
    plain |= {name: p.to("cpu").contiguous() for name, p in quantised_files.to_tensors(model).items()}
    safetensors.torch.save_file(plain, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    save_config(model, folder)


def save_config(model: GPT, folder: Path) -> None:
    """Write `model.json`."""
    values = dataclasses.asdict(model.config) | quantised_files.recipe_values(model)
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=1) + "\n")


def load(folder: Path) -> GPT:
    """Read one of our folders. Raises UserError naming every tensor that is missing, unexpected or of a wrong shape."""
    config, recipe = read_own(folder)
    if recipe is not None:
        return quantised_files.from_tensors(config, recipe, _read_tensors(folder, [WEIGHTS_FILE]), folder)
    tensors = _read_sharded(config, folder) if (folder / SHARDED).is_dir() else _read_tensors(folder, [WEIGHTS_FILE])
    return _fill(config, tensors, _own_names(config), folder)


def _read_sharded(config: ModelConfig, folder: Path) -> dict[str, Tensor]:
    """The parameters that several processes have written, each its part."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    with torch.device("meta"):
        shapes = dict(GPT(config).named_parameters())
    tensors = {name: torch.empty(p.shape, dtype=torch.float32) for name, p in shapes.items()}
    try:
        named = {f"model.{name}": tensor for name, tensor in tensors.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that there is one process
            load(named, storage_reader=sharded_reader(folder), no_dist=True)
    except (Exception, CheckpointException) as error:  # the library raises many kinds for a damaged or missing part
        raise _damaged(folder / SHARDED, error) from error
    return tensors


def sharded_reader(folder: Path) -> Any:
    """Reads the parts as safetensors; the library's own default would unpickle."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(folder / SHARDED))


# ---------------------------------------------------------------------- Hugging Face folders

_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names -> PyTorch's


def config_to_hf(config: ModelConfig, end_id: int | None, dtype: torch.dtype, begin_id: int | None = None) -> dict[str, Any]:
    """Our configuration as a `config.json`. Raises UserError when no published architecture says all of it."""
    family = family_of(config)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **family.write(config),
        "bos_token_id": end_id if begin_id is None else begin_id,
        "eos_token_id": end_id,
        "dtype": str(dtype).removeprefix("torch."),
    }


def load_hf(folder: Path) -> GPT:
    """Read a Hugging Face folder: names with or without prefix, no mask buffers, a tied head stored or not.

    Raises UserError naming every tensor that is missing, unexpected or of the wrong shape, or the file that is damaged.
    """
    kind, config = read_hf(folder)
    tensors = {
        name.removeprefix(kind.prefix): tensor
        for name, tensor in _read_tensors(folder, HF_WEIGHTS_FILES).items()
        if not name.endswith(kind.ignored)
    }
    (embedding,), (head_name,) = (kind.stored(config, f"{name}.weight").names for name in ("token_embedding", "head"))
    if config.tied_head and head_name in tensors:
        head = tensors.pop(head_name)
        if not torch.equal(head, tensors.setdefault(embedding, head)):  # some writers keep the head's name only
            raise UserError(
                f"{folder}: tie_word_embeddings is true, but {head_name} differs from {embedding};"
                " set tie_word_embeddings to false in config.json to keep both"
            )
    return _fill(config, tensors, _hf_names(kind, config), folder)


def save_hf(model: GPT, folder: Path, end_id: int | None, dtype: torch.dtype | None = None, begin_id: int | None = None) -> None:
    """Write `config.json` and `model.safetensors` as `transformers` does for the architecture. Loading gives the same bits.

    Raises UserError when no published architecture is this network.
    """
    values = config_to_hf(model.config, end_id, dtype or next(model.parameters()).dtype, begin_id)
    safetensors.torch.save_file(hf_tensors(model, dtype), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / HF_CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n")


def hf_tensors(model: GPT, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The parameters as the state dict of the class in `transformers`; a tied head is left out."""
    config, kind = model.config, family_of(model.config)
    tensors = {}
    for name, parameter in model.named_parameters():
        stored, ours = kind.stored(config, name), parameter.detach().to("cpu", dtype)
        if stored.by_head:
            ours = ours.unflatten(0, (3, config.n_head, -1)).transpose(0, 1).flatten(0, 2)
        for theirs, part in zip(stored.names, ours.split(stored.rows(config, len(ours))), strict=True):
            prefix = "" if name == "head.weight" else kind.prefix
            tensors[prefix + theirs] = (part.t() if stored.transposed else part).contiguous()
    return tensors


def _hf_names(kind: Family, config: ModelConfig) -> dict[str, Stored]:
    """Our parameter names -> theirs, in our order."""
    return {name: kind.stored(config, name) for name in _own_names(config)}


# ---------------------------------------------------------------------- shared by both


def stored_dtypes(config: ModelConfig, folder: Path, is_hf: bool) -> dict[str, str]:
    """The dtype of each parameter in a folder's safetensors files, by our names; only their headers are read.

    Empty for pickled weights, whose types cannot be known without reading them.
    """
    found: dict[str, str] = {}
    for path in _weights_files(folder, HF_WEIGHTS_FILES if is_hf else [WEIGHTS_FILE]):
        if path.suffix == ".safetensors":
            found |= _read_dtypes(path)
    kind = read_hf(folder)[0] if is_hf else None
    found = {name.removeprefix(kind.prefix if kind else ""): dtype for name, dtype in found.items()}
    recipe = None if is_hf else read_recipe(folder)
    if recipe is not None:
        found |= {f"{name}.weight": recipe.kind(bits) for name, bits in recipe.matrices.items() if f"{name}.codes" in found}
    theirs = _hf_names(kind, config) if kind else _own_names(config)
    firsts = {ours: stored.names[0] for ours, stored in theirs.items()}
    return {ours: _DTYPES.get(found[name], found[name]) for ours, name in firsts.items() if name in found}


def _own_names(config: ModelConfig) -> dict[str, Stored]:
    """Every parameter once, stored under our own name; nothing is allocated."""
    with torch.device("meta"):
        return {name: Stored((name,)) for name, _ in GPT(config).named_parameters()}


def _fill(config: ModelConfig, tensors: dict[str, Tensor], names: dict[str, Stored], folder: Path) -> GPT:
    """A model whose parameters are `tensors`, after checking every name and shape."""
    with torch.device("meta"):
        model = GPT(config)
    problems, state = [], {}
    for ours, parameter in model.named_parameters():
        stored, parts = names[ours], []
        for name, rows in zip(stored.names, stored.rows(config, len(parameter)), strict=True):
            shape = (rows, *parameter.shape[1:])
            expected = shape[::-1] if stored.transposed else shape
            tensor = tensors.pop(name, None)
            if tensor is None:
                problems.append(f"{name}: missing, expected shape {expected}")
            elif tuple(tensor.shape) != expected:
                problems.append(f"{name}: shape {tuple(tensor.shape)}, expected {expected}")
            elif not tensor.is_floating_point():
                problems.append(f"{name}: {tensor.dtype}, expected floating point numbers")
            else:
                parts.append(tensor.t().contiguous() if stored.transposed else tensor)
        if len(parts) == len(stored.names):
            state[ours] = parts[0] if len(parts) == 1 else torch.cat(parts)
            if stored.by_head:
                state[ours] = state[ours].unflatten(0, (config.n_head, 3, -1)).transpose(0, 1).flatten(0, 2)
    problems += [f"{name}: unexpected, shape {tuple(tensor.shape)}" for name, tensor in tensors.items()]
    if problems:
        raise UserError(f"{folder}: the weights do not fit the configuration:\n  " + "\n  ".join(problems))
    if config.tied_head:
        state["head.weight"] = state["token_embedding.weight"]
    model.load_state_dict(state, assign=True)
    model.tie()  # assigning made the two names two parameters
    return model


def _read_dtypes(path: Path) -> dict[str, str]:
    """What a safetensors file says of its tensors, by their names."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _read_tensors(folder: Path, candidates: Sequence[str]) -> dict[str, Tensor]:
    """Every tensor of the first weights file (or index of shards) that is there."""
    files = _weights_files(folder, candidates)
    if not files:
        raise UserError(f"{folder}: no weights found; looked for {', '.join(candidates)}")
    return {name: tensor for path in files for name, tensor in read_file(path).items()}


def _weights_files(folder: Path, candidates: Sequence[str]) -> list[Path]:
    """The first candidate that is there: the file itself, or the shards that an index names. Empty when none is."""
    path = next((folder / name for name in candidates if (folder / name).is_file()), None)
    if path is None or path.suffix != ".json":
        return [path] if path else []
    parts = read_json(path).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
        raise UserError(f"{path}: expected a `weight_map` from tensors to files")
    files = [folder / part for part in sorted(set(parts.values()))]
    if absent := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{path}: shards are missing: {', '.join(absent)}; download the model again")
    return files


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a PyTorch pickle read with `weights_only=True` (no code of it runs)."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: damaged, or holds more than tensors; running code from a file is refused"
            " (download it again, or convert it to safetensors)"
        ) from error
    except Exception as error:  # a damaged pickle raises anything
        raise _damaged(path, error) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{path}: expected names and tensors, nothing around them; convert it to safetensors")
    return tensors


def _damaged(path: Path, error: BaseException) -> UserError:
    return UserError(f"{path}: truncated or not a weights file ({first_line(error)}); download or copy it again")
