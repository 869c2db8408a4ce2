"""Low-rank adapters beside frozen matrices (Hu et al. 2021): put in from outside, switched off, added up, saved alone.

W x + b becomes W x + b + alpha / rank · B A x, and only A (rank, in) and B (out, rank) are trained. Files are `peft`'s, with the
names that the architecture's published checkpoints have; a network that none of them is keeps our own names.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from glassgpt.config import ModelConfig, UserError
from glassgpt.config.files import from_plain
from glassgpt.config.folder import ADAPTER_CONFIG_FILE, read_json
from glassgpt.config.tuning import LoraConfig
from glassgpt.model import weights
from glassgpt.model.families import Stored, family_of
from glassgpt.model.gpt import GPT

ADAPTER_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
PREFIX = "base_model.model."  # of every name in a file
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class LoraLinear(nn.Module):
    """A frozen linear map with a low-rank one beside it."""

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base
        self.lora_a, self.lora_b = _without_bias(a), _without_bias(b)  # (rank, in), (out, rank)
        self.alpha = alpha
        self.drop = nn.Dropout(dropout)
        self.is_on = True
        self.train(base.training)

    @property
    def rank(self) -> int:
        return self.lora_a.out_features

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.is_on:
            return y
        low = self.lora_a(self.drop(x).to(self.lora_a.weight.dtype))  # (..., rank)
        return y + (self.lora_b(low) * self.scale).to(y.dtype)

    def merged(self) -> Tensor:
        """W + alpha / rank · B A in float64, on the CPU."""
        W, A, B = (module.weight.detach().to("cpu", torch.float64) for module in (self.base, self.lora_a, self.lora_b))
        return W + self.scale * (B @ A)


def _without_bias(weight: Tensor) -> nn.Linear:
    """A linear map of these numbers; none are drawn for it."""
    linear = nn.Linear(weight.size(1), weight.size(0), bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear


# ---------------------------------------------------------------------- in the model


def add(model: GPT, config: LoraConfig, seed: int) -> list[nn.Parameter]:
    """Put adapters beside the matrices that `config.targets` names, and freeze all else; returns what is to be trained.

    A is uniform in ±1/√in, as `peft` has it, and follows from the seed alone; B is zero, so the model computes what it did.
    Raises UserError when the model has none of the targets, or adapters already.
    """
    if not config.rank:
        raise UserError("lora.rank is 0, which is no adapter; give at least 1")
    if adapters(model):
        raise UserError("the model has adapters already; merge them before others are added")
    every = linears(model)
    chosen = {name: linear for name, linear in every.items() if _last(name) in config.targets}
    if not chosen:
        there = ", ".join(dict.fromkeys(map(_last, every)))
        raise UserError(f"lora.targets is {', '.join(config.targets)}, of which this model has none; it has {there}")
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for name, linear in chosen.items():
        a = torch.empty(config.rank, linear.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        b = torch.zeros(linear.out_features, config.rank)
        _put(model, name, LoraLinear(linear, a.to(linear.weight), b.to(linear.weight), config.alpha, config.dropout))
    return [p for p in model.parameters() if p.requires_grad]


def adapters(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' parameters by name; empty when the model has none."""
    return {name: p for name, p in model.named_parameters() if _is_adapter(name.removesuffix(".weight"))}


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The matrices of the blocks by their names without adapters, whether they have one or not."""
    return {
        name.removesuffix(".base"): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.") and not _is_adapter(name)
    }


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """In here the model computes what its base does: the reference that tuning holds on to.

    Activations that are computed again for a gradient belong to a pass outside: no backward pass in here.
    """
    found = [module for module in model.modules() if isinstance(module, LoraLinear)]
    before = [module.is_on for module in found]
    try:
        for module in found:
            module.is_on = False
        yield
    finally:
        for module, was_on in zip(found, before, strict=True):
            module.is_on = was_on


@torch.no_grad()
def merge(model: GPT) -> GPT:
    """Add every adapter to its matrix, in float64 and rounded once, in place: a plain model again, with gradients everywhere."""
    for name, module in _adapted(model).items():
        module.base.weight.copy_(module.merged())
        _put(model, name, module.base)
    return model.requires_grad_(True)


def _adapted(model: nn.Module) -> dict[str, LoraLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def _is_adapter(module: str) -> bool:
    return _last(module) in ("lora_a", "lora_b")


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


# ---------------------------------------------------------------------- names


def _places(model: GPT) -> tuple[dict[str, Stored], set[str]]:
    """Where each of our matrices is in the published architecture, and all that has a name there."""
    names = [n.replace(".base.", ".") for n, _ in model.named_parameters() if not _is_adapter(n.removesuffix(".weight"))]
    try:
        kind = family_of(model.config)
    except UserError:  # none: our own names
        return {name: Stored((name,)) for name in linears(model)}, {name.rpartition(".")[0] for name in names}
    found = {name: kind.stored(model.config, name) for name in names}

    def modules(stored: Stored) -> tuple[str, ...]:
        return tuple(f"{kind.prefix}{theirs.rpartition('.')[0]}" for theirs in stored.names)

    places = {name: (stored := found[f"{name}.weight"])._replace(names=modules(stored)) for name in linears(model)}
    return places, {module for stored in found.values() for module in modules(stored)}


def _rows(config: ModelConfig, stored: Stored, out: int) -> list[int]:
    """Rows of ours that each of the matrices named has: all in one, or those of q, of k and of v."""
    if len(stored.names) == 1:
        return [out]
    return [heads * config.head_width for heads in (config.n_head, config.kv_heads, config.kv_heads)]


def _target_modules(chosen: set[str], every: set[str]) -> list[str]:
    """The shortest ends of the chosen modules' names that no other module has."""
    others = [f".{name}" for name in every - chosen]
    found = set()
    for name in chosen:
        parts = name.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        found.add(next((end for end in ends if not any(other.endswith(f".{end}") for other in others)), name))
    return sorted(found)


# ---------------------------------------------------------------------- to a folder


def save_adapter(model: GPT, folder: Path, base_name: str, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` into an existing folder, as `peft` does.

    `base_name` is what `glassgpt.load` finds the model without its adapters by. Where one matrix of ours is q, k and v in the
    architecture, they share A, and each has its rows of B. `tensors` are written in place of the model's own parameters, where
    those are spread over several processes.
    """
    modules, held = _adapted(model), adapters(model) if tensors is None else tensors
    if not modules:
        raise UserError("the model has no adapters to save; write it as a whole")
    places, every = _places(model)
    written, kinds = {}, {}
    for name, module in modules.items():
        stored = places[name]
        a, b = (held[f"{name}.lora_{letter}.weight"].detach().cpu() for letter in "ab")
        if stored.by_head:
            b = b.unflatten(0, (3, model.config.n_head, -1)).transpose(0, 1).flatten(0, 2)
        for theirs, part in zip(stored.names, b.split(_rows(model.config, stored, len(b))), strict=True):
            written[f"{PREFIX}{theirs}.lora_A.weight"] = a.clone()  # a file has no place for one tensor under two names
            written[f"{PREFIX}{theirs}.lora_B.weight"] = part.clone(memory_format=torch.contiguous_format)
            kinds[theirs] = (module.rank, int(module.alpha) if float(module.alpha).is_integer() else module.alpha)
    ((rank, alpha), _), *_ = collections.Counter(kinds.values()).most_common(1)
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {theirs: r for theirs, (r, _) in kinds.items() if r != rank},
        "alpha_pattern": {theirs: own for theirs, (_, own) in kinds.items() if own != alpha},
        "lora_dropout": next(iter(modules.values())).drop.p,
        "target_modules": _target_modules(set(kinds), every),
        "fan_in_fan_out": any(places[name].transposed for name in modules),
        "bias": "none",
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    safetensors.torch.save_file(written, folder / ADAPTER_FILE, metadata={"format": "pt"})
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n")


# ---------------------------------------------------------------------- from a folder

# Fields of `adapter_config.json` that leave what the file's tensors do as it is, whatever they say.
HARMLESS = (
    *("auto_mapping", "base_model_name_or_path", "peft_version", "inference_mode", "runtime_config", "ensure_weight_tying"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "eva_config"),
    "qalora_group_size",
)
# Fields that must have one of these values. Some starts change the base's own weights, which the file does not hold.
NEEDS: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "revision": (None, "main"),
    "megatron_core": ("megatron.core", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


@dataclass(frozen=True)
class Settings:
    """What of `adapter_config.json` matters here, under its names; left out it means this."""

    base_model_name_or_path: str = ""
    r: int = 8
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    """Scaled by alpha / √rank (Kalajdzievski 2023)."""
    rank_pattern: dict = field(default_factory=dict)  # type: ignore[type-arg]
    """Of modules whose names end as the pattern says; so is `alpha_pattern`."""
    alpha_pattern: dict = field(default_factory=dict)  # type: ignore[type-arg]

    def __post_init__(self) -> None:
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise UserError(f"the rank {name} must be a whole number above 0; got {rank!r}")
        for name, alpha in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha) or not alpha:
                raise UserError(f"the scale {name} must be a number, and not 0; got {alpha!r}")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout must be in [0, 1); got {self.lora_dropout}")
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            try:
                _ends_as(pattern, "")
            except re.error as error:
                raise UserError(f"{pattern!r} is no pattern of names: {error}") from error

    def rank_of(self, module: str) -> int:
        return next((rank for pattern, rank in self.rank_pattern.items() if _ends_as(pattern, module)), self.r)

    def alpha_of(self, module: str) -> float:
        """So that alpha / rank is the scale."""
        found = (alpha for pattern, alpha in self.alpha_pattern.items() if _ends_as(pattern, module))
        alpha = float(next(found, self.lora_alpha))
        return alpha * math.sqrt(self.rank_of(module)) if self.use_rslora else alpha


def _ends_as(pattern: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def read_settings(folder: Path) -> Settings:
    """Read `adapter_config.json`. Raises UserError naming the field that cannot be represented."""
    path = folder / ADAPTER_CONFIG_FILE
    values = read_json(path)
    ours = {f.name for f in dataclasses.fields(Settings)}
    for name, value in {"peft_type": "", **values}.items():
        if name in NEEDS and value not in NEEDS[name]:
            raise UserError(f"{path}: {name} = {value!r} cannot be represented; expected {' or '.join(map(repr, NEEDS[name]))}")
        if value and name not in NEEDS and name not in ours and name not in HARMLESS:
            raise UserError(f"{path}: {name} = {value!r} cannot be represented; expected it to be absent or off")
    try:
        return from_plain(Settings, {name: value for name, value in values.items() if name in ours and value is not None})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


class Adapter(NamedTuple):
    """One matrix's."""

    a: Tensor
    b: Tensor
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / len(self.a)


def read_adapter(model: GPT, folder: Path) -> dict[str, Adapter]:
    """The adapters in a folder, by our names of the matrices, on the CPU; the model is asked for names and shapes only.

    Raises UserError for what no adapter of this model has, and for a damaged file. Nothing is ever unpickled.
    """
    settings, tensors = read_settings(folder), _read_tensors(folder)
    places, _ = _places(model)
    problems: list[str] = []
    found: dict[str, Adapter] = {}
    dtypes = {tensor.dtype for tensor in tensors.values()} & {*FLOATS}
    dtype = functools.reduce(torch.promote_types, dtypes) if dtypes else torch.float32

    def taken(theirs: str, out: int, width: int) -> Adapter | None:
        """What the file has beside one matrix of theirs."""
        rank, fitting = settings.rank_of(theirs), []
        shapes = {f"{PREFIX}{theirs}.lora_A.weight": (rank, width), f"{PREFIX}{theirs}.lora_B.weight": (out, rank)}
        for key, shape in shapes.items() if shapes.keys() & tensors.keys() else ():
            tensor = tensors.pop(key, None)
            if tensor is None:
                problems.append(f"{key}: missing, expected shape {shape}")
            elif tuple(tensor.shape) != shape or tensor.dtype not in FLOATS:
                problems.append(f"{key}: {tensor.dtype}, shape {tuple(tensor.shape)}; expected numbers of shape {shape}")
            else:
                fitting.append(tensor.to(dtype))
        return Adapter(fitting[0], fitting[1], settings.alpha_of(theirs)) if len(fitting) == 2 else None

    for name, matrix in linears(model).items():
        is_own = f"{PREFIX}{name}.lora_A.weight" in tensors  # written when its configuration was no architecture's
        stored = Stored((name,)) if is_own else places[name]
        rows = _rows(model.config, stored, matrix.out_features)
        parts = [taken(theirs, count, matrix.in_features) for theirs, count in zip(stored.names, rows, strict=True)]
        if any(part is not None for part in parts):
            found[name] = one = _joined(parts, rows)
            if stored.by_head:
                found[name] = one._replace(b=one.b.unflatten(0, (model.config.n_head, 3, -1)).transpose(0, 1).flatten(0, 2))
    problems += [f"{name}: unexpected, shape {tuple(tensor.shape)}" for name, tensor in tensors.items()]
    if problems or not found:
        raise UserError(
            f"{folder / ADAPTER_FILE}: does not fit the model; it was made for {settings.base_model_name_or_path}:\n  "
            + "\n  ".join(problems or ["no adapter in it"])
        )
    return found


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    if (folder / ADAPTER_FILE).is_file():
        return weights.read_file(folder / ADAPTER_FILE)
    if (folder / PICKLED_FILE).is_file():
        raise UserError(
            f"{folder / PICKLED_FILE}: running code from a file is refused, and a pickle may hold code; save it as {ADAPTER_FILE}"
        )
    raise UserError(f"{folder}: no weights of the adapter; looked for {ADAPTER_FILE}")


def _joined(parts: list[Adapter | None], rows: list[int]) -> Adapter:
    """One adapter for matrices whose rows follow one another: they share A, or B is block-diagonal over all their A's."""
    given = [part for part in parts if part is not None]
    first = given[0]
    if len(given) == len(parts) and all(torch.equal(part.a, first.a) and part.alpha == first.alpha for part in given):
        return first._replace(b=torch.cat([part.b for part in given]))
    a = torch.cat([part.a for part in given])
    b, row, column = first.b.new_zeros(sum(rows), len(a)), 0, 0
    for part, count in zip(parts, rows, strict=True):
        if part is not None:
            rank = len(part.a)
            b[row : row + count, column : column + rank] = part.b * (part.scale / first.scale)  # they share one scale
            column += rank
        row += count
    return Adapter(a, b, first.alpha * len(a) / len(first.a))


@torch.no_grad()
def load_adapter(model: GPT, folder: Path) -> GPT:
    """Put a folder's adapters beside the model's matrices, all else frozen; returns the model.

    Where the model has adapters they keep their tensors, which get the folder's numbers. Raises UserError as `read_adapter`, and
    when the model's adapters are of other matrices or ranks.
    """
    found, held = read_adapter(model, folder), _adapted(model)
    if held:
        ours, theirs = {name: module.rank for name, module in held.items()}, {name: len(one.a) for name, one in found.items()}
        if differing := [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]:
            first = differing[0]
            raise UserError(
                f"{folder}: not the adapters that this model has: at {first} their rank is {theirs.get(first, 0)}, the model's"
                f" {ours.get(first, 0)}"
            )
        for name, one in found.items():
            held[name].lora_a.weight.copy_(one.a)
            held[name].lora_b.weight.copy_(one.b)
            held[name].alpha = one.alpha
        return model
    model.requires_grad_(False)
    matrices, dropout = linears(model), read_settings(folder).lora_dropout
    for name, (a, b, alpha) in found.items():
        weight = matrices[name].weight
        dtype = torch.promote_types(a.dtype, weight.dtype)
        _put(model, name, LoraLinear(matrices[name], a.to(weight.device, dtype), b.to(weight.device, dtype), alpha, dropout))
    return model
