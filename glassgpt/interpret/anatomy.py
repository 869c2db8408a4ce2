"""What a network is made of, from its configuration alone: tensors, parameters, Q | K | V by head, memory.

The network is built on PyTorch's meta device, which knows shapes and holds no numbers: 175 billion parameters are
counted in about a second, in no memory. Nothing here prints; `glassgpt.interpret.info` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch

from glassgpt.config import ModelConfig, UserError
from glassgpt.config.quantize import stored_bytes
from glassgpt.interpret.cost import activation_bytes, active_parameters, cache_numbers
from glassgpt.model import GPT

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Size of one number."""
INFERENCE_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class TensorInfo:
    """One named tensor of the network."""

    name: str
    """Dotted, as in `model.state_dict()`."""
    shape: tuple[int, ...]
    dtype: str
    """As stored; int8 or int4/32 for quantised ones, after / the inputs that share a scale; `unknown` for files that cannot tell
    without being read whole."""
    count: int
    """Parameters that it adds to the model: 0 when it is another name for `tied_to`."""
    share: float
    """`count` over the model's parameters."""
    tied_to: str | None = None
    """The tensor that this one is."""

    @property
    def is_quantised(self) -> bool:
        return self.dtype.startswith("int")


@dataclass(frozen=True)
class Group:
    """Tensors that belong together: an embedding, a block, a block's attention."""

    name: str
    tensors: tuple[TensorInfo, ...]
    parts: tuple[Group, ...] = ()
    """A block's norms, attn and mlp, which hold the same tensors again; empty for the others."""

    @property
    def count(self) -> int:
        return sum(tensor.count for tensor in self.tensors)

    @property
    def share(self) -> float:
        return sum(tensor.share for tensor in self.tensors)


@dataclass(frozen=True)
class HeadRows:
    """The rows of the (3D, D) matrix `attn.qkv.weight`, and of its bias (3D,), that make one head's q, k or v."""

    part: Literal["q", "k", "v"]
    head: int
    rows: range


@dataclass(frozen=True)
class Inference:
    """Bytes needed to generate text in one dtype."""

    dtype: str
    weights: int
    kv_cache: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.logits


@dataclass(frozen=True)
class Training:
    """Bytes needed to train in float32 with AdamW."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Memory:
    """Estimated bytes, for `batch_size` sequences of `context_tokens` tokens."""

    batch_size: int
    context_tokens: int
    inference: tuple[Inference, ...]
    """One for each of INFERENCE_DTYPES."""
    training: Training


@dataclass(frozen=True)
class Anatomy:
    """Everything that `glassgpt info` shows."""

    config: ModelConfig
    tensors: tuple[TensorInfo, ...]
    """Every name, a tied head's too, in the order of the forward pass."""
    groups: tuple[Group, ...]
    """The same by embedding, block, final norm and head."""
    parameters: int
    """Each number counted once."""
    parameters_active: int
    """Of those, what one token meets: fewer in a mixture of experts."""
    parameters_untied: int
    """What there would be if the head had a matrix of its own."""
    reason: str
    """Why the two differ, with the arithmetic."""
    qkv: tuple[HeadRows, ...]
    memory: Memory

    @property
    def stored_bytes(self) -> int | None:
        """Size of the stored parameters; None where a dtype is not known."""
        if any(tensor.dtype not in BYTES and not tensor.is_quantised for tensor in self.tensors):
            return None
        return sum(
            stored_bytes(tensor.dtype, *tensor.shape) if tensor.is_quantised else tensor.count * BYTES[tensor.dtype]
            for tensor in self.tensors
            if tensor.tied_to is None
        )


def anatomy(
    config: ModelConfig,
    dtypes: Mapping[str, str] | None = None,
    batch_size: int = 1,
    context_tokens: int | None = None,
) -> Anatomy:
    """Take a model apart. `dtypes` names each stored tensor's dtype; without it they are float32, as a new model's are.

    The memory is that of `batch_size` sequences of `context_tokens` tokens (the model's context when not given). Raises
    UserError when they are longer than the context.
    """
    with torch.device("meta"):
        model = GPT(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())  # yields a shared one once
    tensors = tuple(_tensors(model, parameters, dtypes))
    matrix = f"{config.vocab_size:,} x {config.width:,} = {config.vocab_size * config.width:,}"
    head = "the token embedding matrix, used twice" if config.tied_head else "a matrix of its own"
    return Anatomy(
        config=config,
        tensors=tensors,
        groups=_groups(tensors),
        parameters=parameters,
        parameters_active=active_parameters(config),
        parameters_untied=sum(parameter.numel() for _, parameter in model.named_parameters(remove_duplicate=False)),
        reason=f"{matrix}: the head is {head}",
        qkv=qkv_rows(config),
        memory=memory(config, parameters, batch_size, context_tokens),
    )


def _tensors(model: GPT, parameters: int, dtypes: Mapping[str, str] | None) -> Iterator[TensorInfo]:
    first_name: dict[torch.nn.Parameter, str] = {}  # a parameter is its own key: equal only to itself
    for name, parameter in model.named_parameters(remove_duplicate=False):
        home = first_name.setdefault(parameter, name)
        dtype = "float32" if dtypes is None else dtypes.get(home, "unknown")
        count = parameter.numel() if home == name else 0
        yield TensorInfo(name, tuple(parameter.shape), dtype, count, count / parameters, None if home == name else home)


# ---------------------------------------------------------------------- groups


def _groups(tensors: Iterable[TensorInfo]) -> tuple[Group, ...]:
    groups = []
    for name, members in _gathered(tensors, _group_name).items():
        parts = _gathered(members, _part_name) if _is_block(name) else {}
        groups.append(Group(name, members, tuple(Group(part, inside) for part, inside in parts.items())))
    return tuple(groups)


def _gathered(tensors: Iterable[TensorInfo], key: Callable[[str], str]) -> dict[str, tuple[TensorInfo, ...]]:
    gathered: dict[str, tuple[TensorInfo, ...]] = {}
    for tensor in tensors:
        gathered[key(tensor.name)] = (*gathered.get(key(tensor.name), ()), tensor)
    return gathered


def _is_block(name: str) -> bool:
    return name.startswith("blocks.")


def _group_name(tensor: str) -> str:
    """blocks.3.attn.qkv.weight -> blocks.3; norm_f.weight -> norm_f."""
    return ".".join(tensor.split(".")[: 2 if _is_block(tensor) else 1])


def _part_name(tensor: str) -> str:
    """blocks.3.attn.qkv.weight -> attn; blocks.3.norm_1.weight -> norms."""
    part = tensor.split(".")[2]
    return "norms" if part.startswith("norm_") else part


def folded(groups: Iterable[Group]) -> list[tuple[Group, ...]]:
    """The groups, neighbouring blocks of equal names, shapes and dtypes put together; everything else stands alone."""

    def inside(group: Group) -> object:
        tensors = [(t.name.removeprefix(group.name), t.shape, t.dtype, t.tied_to) for t in group.tensors]
        return tensors if _is_block(group.name) else group.name

    return [tuple(alike) for _, alike in groupby(groups, key=inside)]


# ---------------------------------------------------------------------- Q | K | V


def qkv_rows(config: ModelConfig) -> tuple[HeadRows, ...]:
    """Which rows of `attn.qkv.weight` ((H + 2G)W, D) are whose: q of every head, then k, then v of the G heads that have them.

    nn.Linear keeps (out, in), so its rows are outputs: the first HW are Q, the next GW are K, the last GW are V, and head
    h has rows h * W to (h + 1) * W - 1 of each. Hugging Face's GPT-2 keeps the matrix as a Conv1D, (in, out) = (D, 3D):
    there the same ranges are columns of `c_attn.weight`.
    """
    W, rows, first = config.head_width, [], 0
    parts: tuple[tuple[Literal["q", "k", "v"], int], ...] = (("q", config.n_head), ("k", config.kv_heads), ("v", config.kv_heads))
    for part, heads in parts:
        for head in range(heads):
            rows.append(HeadRows(part, head, range(first, first + W)))
            first += W
    return tuple(rows)


# ---------------------------------------------------------------------- memory


def memory(config: ModelConfig, parameters: int, batch_size: int = 1, context_tokens: int | None = None) -> Memory:
    """Bytes to run and to train a model of this many parameters on B sequences of T tokens (the context by default).

    Inference: the weights; keys and values of every layer (`KVCache` at its fullest: `cache_numbers`); the logits of one
    step, B * V, as generation asks for the last position only.
    Training in float32 with AdamW: weights and gradients, 4 bytes a parameter each; AdamW's two moments, 8; and what
    autograd keeps (`activation_bytes`). Temporary buffers, the framework itself and fragmentation come on top
    (`glassgpt plan` counts the buffers too).
    Raises UserError when T is more than the model's context.
    """
    T = config.context_tokens if context_tokens is None else context_tokens
    if config.context_tokens < T:
        raise UserError(f"this model's context is {config.context_tokens} tokens; got context_tokens {T}")
    cached = cache_numbers(config, batch_size, T)
    logits = batch_size * config.vocab_size
    return Memory(
        batch_size=batch_size,
        context_tokens=T,
        inference=tuple(
            Inference(dtype, weights=size * parameters, kv_cache=size * cached, logits=size * logits)
            for dtype, size in BYTES.items()
            if dtype in INFERENCE_DTYPES
        ),
        training=Training(
            weights=4 * parameters,
            gradients=4 * parameters,
            optimizer=8 * parameters,
            activations=activation_bytes(config, batch_size, T),
        ),
    )
