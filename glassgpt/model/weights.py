"""Weights to and from files: our own folders and Hugging Face's. The one place where published names live.

Ours: `model.json` (the configuration) and `model.safetensors` (parameters by our names; a tied head is stored once).
Theirs: `config.json` and weights as safetensors or PyTorch pickles, whole or in shards.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from glassgpt.config import ModelConfig, UserError
from glassgpt.config.errors import first_line
from glassgpt.config.files import from_plain
from glassgpt.model.gpt import GPT

CONFIG_FILE = "model.json"
WEIGHTS_FILE = "model.safetensors"
SHARDED = "sharded"  # folder of the parts that several processes have written
HF_CONFIG_FILE = "config.json"
HF_WEIGHTS_FILES = (WEIGHTS_FILE, f"{WEIGHTS_FILE}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


class Stored(NamedTuple):
    """Where one of our parameters is found in a file."""

    name: str
    transposed: bool = False


# ---------------------------------------------------------------------- our folders


def save(model: GPT, folder: Path, dtype: torch.dtype | None = None, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write `model.json` and `model.safetensors` into an existing folder, weights in `dtype` (default: as they are).

    `tensors` are written in place of the model's own parameters, where those are spread over several processes.
    """
    named = dict(model.named_parameters()) if tensors is None else tensors
    plain = {name: p.detach().to("cpu", dtype).contiguous() for name, p in named.items()}
    safetensors.torch.save_file(plain, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    save_config(model, folder)


def save_config(model: GPT, folder: Path) -> None:
    """Write `model.json`."""
    (folder / CONFIG_FILE).write_text(json.dumps(dataclasses.asdict(model.config), indent=1) + "\n")


def read_config(folder: Path) -> ModelConfig:
    """The configuration of one of our folders."""
    values = _read_json(folder / CONFIG_FILE)
    try:
        return from_plain(ModelConfig, values)
    except UserError as error:
        raise UserError(f"{folder / CONFIG_FILE}: {error}") from error


def load(folder: Path) -> GPT:
    """Read one of our folders. Raises UserError naming every tensor that is missing, unexpected or of a wrong shape."""
    config = read_config(folder)
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

_OUTSIDE = {
    "token_embedding.weight": Stored("wte.weight"),
    "position_embedding.weight": Stored("wpe.weight"),
    "norm_f.weight": Stored("ln_f.weight"),
    "norm_f.bias": Stored("ln_f.bias"),
    "head.weight": Stored("lm_head.weight"),
}
# GPT-2 stores its linear maps as Conv1D, (in, out): the transpose of ours.
_LINEAR = {"attn.qkv": "attn.c_attn", "attn.out": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
_NORM = {"norm_1": "ln_1", "norm_2": "ln_2"}
_MASK_BUFFERS = (".attn.bias", ".attn.masked_bias")
_PREFIX = "transformer."
_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names -> PyTorch's
# Settings that change the maths and that this model does not have, with the value it stands for.
_FIXED: dict[str, tuple[object, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


def config_from_hf(values: dict[str, Any]) -> ModelConfig:
    """A Hugging Face `config.json` as ours. Raises UserError with the field that cannot be represented."""
    if values.get("model_type") != "gpt2":
        raise UserError(f"model_type {values.get('model_type')!r} is not supported; this version loads 'gpt2'")
    for name, allowed in _FIXED.items():
        if name in values and values[name] not in allowed:
            raise UserError(f"{name} = {values[name]!r} cannot be represented; expected {' or '.join(map(repr, allowed))}")
    try:
        ours = {
            "vocab_size": values["vocab_size"],
            "context_tokens": values.get("n_positions", values.get("n_ctx", 1024)),
            "n_layer": values["n_layer"],
            "n_head": values["n_head"],
            "width": values["n_embd"],
            "mlp_width": values.get("n_inner"),
            "dropout": values.get("resid_pdrop", 0.1),
            "norm_eps": values.get("layer_norm_epsilon", 1e-5),
            "tied_head": values.get("tie_word_embeddings", True),
        }
    except KeyError as error:
        raise UserError(f"the field {error} is missing") from error
    return from_plain(ModelConfig, ours)  # checks the types


def config_to_hf(config: ModelConfig, end_id: int | None, dtype: torch.dtype) -> dict[str, Any]:
    """Our configuration as the `config.json` of a `GPT2LMHeadModel`."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_tokens,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.width,
        "n_inner": config.mlp_width,
        "activation_function": "gelu_new",
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": end_id,
        "eos_token_id": end_id,
        "dtype": str(dtype).removeprefix("torch."),
    }


def read_hf_config(folder: Path) -> ModelConfig:
    """The configuration of a Hugging Face folder."""
    values = _read_json(folder / HF_CONFIG_FILE)
    try:
        return config_from_hf(values)
    except UserError as error:
        raise UserError(f"{folder / HF_CONFIG_FILE}: {error}") from error


def load_hf(folder: Path) -> GPT:
    """Read a Hugging Face folder: names with or without `transformer.`, no mask buffers, a tied head stored or not.

    Raises UserError naming every tensor that is missing, unexpected or of the wrong shape, or the file that is damaged.
    """
    config = read_hf_config(folder)
    tensors = {
        name.removeprefix(_PREFIX): tensor
        for name, tensor in _read_tensors(folder, HF_WEIGHTS_FILES).items()
        if not name.endswith(_MASK_BUFFERS)
    }
    if config.tied_head and "lm_head.weight" in tensors:
        head = tensors.pop("lm_head.weight")
        if not torch.equal(head, tensors.setdefault("wte.weight", head)):  # some writers keep the head's name only
            raise UserError(
                f"{folder}: tie_word_embeddings is true, but lm_head.weight differs from wte.weight;"
                " set tie_word_embeddings to false in config.json to keep both"
            )
    return _fill(config, tensors, _hf_names(config), folder)


def save_hf(model: GPT, folder: Path, end_id: int | None, dtype: torch.dtype | None = None) -> None:
    """Write `config.json` and `model.safetensors` as `transformers` does for GPT-2. Loading gives the same bits."""
    safetensors.torch.save_file(hf_tensors(model, dtype), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    values = config_to_hf(model.config, end_id, dtype or next(model.parameters()).dtype)
    (folder / HF_CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n")


def hf_tensors(model: GPT, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The parameters as a `GPT2LMHeadModel`'s state dict; a tied head is left out."""
    stored = _hf_names(model.config)
    tensors = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach().to("cpu", dtype)
        prefix = "" if name == "head.weight" else _PREFIX
        tensors[prefix + stored[name].name] = (tensor.t() if stored[name].transposed else tensor).contiguous()
    return tensors


def _hf_names(config: ModelConfig) -> dict[str, Stored]:
    """Our parameter names -> theirs, in our order."""
    names = dict(_OUTSIDE)
    for layer in range(config.n_layer):
        for ours, theirs in _LINEAR.items():
            names[f"blocks.{layer}.{ours}.weight"] = Stored(f"h.{layer}.{theirs}.weight", transposed=True)
            names[f"blocks.{layer}.{ours}.bias"] = Stored(f"h.{layer}.{theirs}.bias")
        for ours, theirs in _NORM.items():
            for kind in ("weight", "bias"):
                names[f"blocks.{layer}.{ours}.{kind}"] = Stored(f"h.{layer}.{theirs}.{kind}")
    return {name: names[name] for name in _own_names(config)}


# ---------------------------------------------------------------------- shared by both


def stored_dtypes(config: ModelConfig, folder: Path, is_hf: bool) -> dict[str, str]:
    """The dtype of each parameter in a folder's safetensors files, by our names; only their headers are read.

    Empty for pickled weights, whose types cannot be known without reading them.
    """
    found: dict[str, str] = {}
    for path in _weights_files(folder, HF_WEIGHTS_FILES if is_hf else [WEIGHTS_FILE]):
        if path.suffix == ".safetensors":
            found |= _read_dtypes(path)
    theirs = _hf_names(config) if is_hf else _own_names(config)
    return {ours: _DTYPES.get(found[name.name], found[name.name]) for ours, name in theirs.items() if name.name in found}


def _own_names(config: ModelConfig) -> dict[str, Stored]:
    """Every parameter once, stored under our own name; nothing is allocated."""
    with torch.device("meta"):
        return {name: Stored(name) for name, _ in GPT(config).named_parameters()}


def _fill(config: ModelConfig, tensors: dict[str, Tensor], names: dict[str, Stored], folder: Path) -> GPT:
    """A model whose parameters are `tensors`, after checking every name and shape."""
    with torch.device("meta"):
        model = GPT(config)
    problems, state = [], {}
    for ours, parameter in model.named_parameters():
        stored = names[ours]
        expected = tuple(reversed(parameter.shape)) if stored.transposed else tuple(parameter.shape)
        tensor = tensors.pop(stored.name, None)
        if tensor is None:
            problems.append(f"{stored.name}: missing, expected shape {expected}")
        elif tuple(tensor.shape) != expected:
            problems.append(f"{stored.name}: shape {tuple(tensor.shape)}, expected {expected}")
        elif not tensor.is_floating_point():
            problems.append(f"{stored.name}: {tensor.dtype}, expected floating point numbers")
        else:
            state[ours] = tensor.t().contiguous() if stored.transposed else tensor
    problems += [f"{name}: unexpected, shape {tuple(tensor.shape)}" for name, tensor in tensors.items()]
    if problems:
        raise UserError(f"{folder}: the weights do not fit the configuration:\n  " + "\n  ".join(problems))
    if config.tied_head:
        state["head.weight"] = state["token_embedding.weight"]
    model.load_state_dict(state, assign=True)
    model.tie()  # assigning made the two names two parameters
    return model


def _read_dtypes(path: Path) -> dict[str, str]:
    """What a safetensors file says of its tensors, by their names without prefix."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name.removeprefix(_PREFIX): file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
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
    parts = _read_json(path).get("weight_map")
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object")
    return values
