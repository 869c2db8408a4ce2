"""See and change what flows through a model: `capture` and `edit`, over PyTorch's own forward hooks.

Every module has a dotted name, and the model's taps (`nn.Identity`) give one to the tensors that no module returns. The model is
taken as it is: nothing is folded, centred or renamed. `docs/activations.md` lists the names with their shapes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from glassgpt.config import UserError, nearest
from glassgpt.model import GPT
from glassgpt.model.attention import Attention

SHAPES = {
    "token_embedding": ("B, T, D", "rows of the embedding matrix, without positions"),
    "embedding_norm": ("B, T, D", "embedding with positions, after the norm that some models have there"),
    "embed": ("B, T, D", "residual stream before the first block"),
    "blocks.*": ("B, T, D", "residual stream after a block"),
    "blocks.*.norm_1": ("B, T, D", "what attention reads"),
    "blocks.*.attn.qkv": ("B, T, (H + 2 * G) * W", "queries, keys and values in one, before they are parted"),
    "blocks.*.attn.q_norm": ("B, H, T, W", "queries after the norm that some models have there, not yet turned"),
    "blocks.*.attn.k_norm": ("B, G, T, W", "keys likewise"),
    "blocks.*.attn.q": ("B, H, T, W", "queries as they are compared: normed and turned, if the model does that"),
    "blocks.*.attn.k": ("B, G, T, W", "keys likewise, of the new positions alone when there is a cache"),
    "blocks.*.attn.v": ("B, G, T, W", "values"),
    "blocks.*.attn.scores": ("B, H, T, S", "q kᵀ times the scale (1/√W), before mask and bias"),
    "blocks.*.attn.masked": ("B, H, T, S", "the same after mask and bias: -inf where a key is not seen"),
    "blocks.*.attn.pattern": ("B, H, T, S", "softmax of that: who looks at whom"),
    "blocks.*.attn.z": ("B, H, T, W", "each head's mixture of values, before the output matrix"),
    "blocks.*.attn.out": ("B, T, D", "all heads through the output matrix"),
    "blocks.*.attn": ("B, T, D", "the same: what attention adds to the residual stream"),
    "blocks.*.resid_mid": ("B, T, D", "residual stream between attention and MLP"),
    "blocks.*.norm_2": ("B, T, D", "what the MLP reads"),
    "blocks.*.mlp.gate": ("B, T, F", "what the gate of a SwiGLU is made of, before SiLU"),
    "blocks.*.mlp.up": ("B, T, F", "neurons before the activation"),
    "blocks.*.mlp.hidden": ("B, T, F", "neurons after it (and after the gate)"),
    "blocks.*.mlp.down": ("B, T, D", "all neurons through the second matrix"),
    "blocks.*.mlp": ("B, T, D", "what the MLP adds to the residual stream"),
    "blocks.*.mlp.router": ("B * T, E", "a mixture's scores, a row for each token"),
    "blocks.*.mlp.experts.*": ("n, D", "an expert's output for the n tokens that were sent to it"),
    "blocks.*.mlp.experts.*.gate": ("n, F", "inside of an expert"),
    "blocks.*.mlp.experts.*.up": ("n, F", "inside of an expert"),
    "blocks.*.mlp.experts.*.hidden": ("n, F", "inside of an expert"),
    "blocks.*.mlp.experts.*.down": ("n, D", "inside of an expert"),
    "blocks.*.mlp.shared.*": ("B * T, D", "a shared expert's output, for every token"),
    "blocks.*.mlp.shared.*.gate": ("B * T, F", "inside of a shared expert"),
    "blocks.*.mlp.shared.*.up": ("B * T, F", "inside of a shared expert"),
    "blocks.*.mlp.shared.*.hidden": ("B * T, F", "inside of a shared expert"),
    "blocks.*.mlp.shared.*.down": ("B * T, D", "inside of a shared expert"),
    "norm_f": ("B, T, D", "what the head reads"),
    "head": ("B, T, V", "logits (before the cap that some models have)"),
}
"""Every name that `capture` and `edit` take, * standing for a number, with the shape of its tensor and what it is."""
WRITTEN_OUT = ("scores", "masked", "pattern")
"""Taps that exist only when attention is written out: layers asked for them compute so as long as they are watched."""

Edit = Callable[[Tensor], Tensor]


def names(model: GPT) -> list[str]:
    """The names that `capture` and `edit` take on this model, in the order of its modules."""
    allowed = [_pattern(name) for name in SHAPES]
    return [name for name, _ in model.named_modules() if any(pattern.fullmatch(name) for pattern in allowed)]


@contextmanager
def capture(model: GPT, wanted: str | list[str] | tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """`with capture(model, ["blocks.*.attn.pattern"]) as seen: model(ids)`: then `seen["blocks.3.attn.pattern"]` (B, H, T, S).

    `*` stands for one part of a name, `**` for any number of them. A name holds what the last forward pass gave, on the
    graph if one was recorded: after a backward pass its `.grad` is there. Hooks run in the order in which they were
    opened: `with edit(...), capture(...)` sees what the edit made. Nothing is left on the model, also after an exception.
    Raises UserError for a name that there is not, and for a model that is compiled or wrapped.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.retain_grad()
            seen[name] = output

        return hook

    with _hooked(model, {name: keep(name) for name in _matching(model, wanted)}):
        yield seen


@contextmanager
def edit(model: GPT, edits: Mapping[str, Edit]) -> Iterator[None]:
    """`with edit(model, {"blocks.3.attn.z": f}): model(ids)`: the model goes on with `f(x)` in place of the tensor `x`.

    `f` must return a tensor of the same shape and dtype, and must not change `x` itself. Names, order and errors as in
    `capture`; a shape that differs raises UserError.
    """

    def change(name: str, f: Edit) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            new = f(output)
            if not isinstance(new, Tensor) or (new.shape, new.dtype) != (output.shape, output.dtype):
                got = f"{tuple(new.shape)} {new.dtype}" if isinstance(new, Tensor) else type(new).__name__
                wanted = f"{tuple(output.shape)} {output.dtype}"
                raise UserError(f"the edit of {name} must return a tensor {wanted}; it returned {got}")
            return new

        return hook

    with ExitStack() as stack:
        for pattern, f in edits.items():
            stack.enter_context(_hooked(model, {name: change(name, f) for name in _matching(model, [pattern])}))
        yield


@contextmanager
def _hooked(model: GPT, hooks: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """The hooks by name, for as long as the context lasts."""
    modules = dict(model.named_modules())
    with ExitStack() as stack:
        for name, hook in hooks.items():
            parent, _, tap = name.rpartition(".")
            layer = modules[parent]
            if isinstance(layer, Attention) and tap in WRITTEN_OUT:
                stack.callback(setattr, layer, "attend", layer.attend)
                layer.attend = layer.tapped
            stack.callback(modules[name].register_forward_hook(hook).remove)
        yield


def _matching(model: GPT, wanted: str | list[str] | tuple[str, ...]) -> list[str]:
    """The names that the patterns stand for, each once."""
    plain_model(model)
    known, found = names(model), []
    for text in [wanted] if isinstance(wanted, str) else wanted:
        matching = [name for name in known if _pattern(text).fullmatch(name)]
        if not matching:
            raise UserError(f"no activation {text!r} in this model{nearest(text, known)}; docs/activations.md lists the names")
        found += matching
    return list(dict.fromkeys(found))


def _pattern(text: str) -> re.Pattern[str]:
    parts = {"**": ".*", "*": "[^.]*"}
    return re.compile("".join(parts.get(part, re.escape(part)) for part in re.split(r"(\*\*|\*)", text)))


def plain_model(model: nn.Module) -> None:
    """Raises UserError where hooks would not fire, or would see parts: in a compiled, wrapped or sharded model."""
    if isinstance(model, GPT):
        odd = next((name for name, module in model.named_modules() if _is_odd(module)), None)
        if odd is None:
            return
        what = f"a part that is compiled or wrapped: {odd or 'the model itself'}"
    else:
        what = f"a {type(model).__name__}"
    raise UserError(f"looking inside needs the plain GPT; got {what}. Use the model as it was before torch.compile, DDP or FSDP")


def _is_odd(module: nn.Module) -> bool:
    kinds = {kind.__name__ for kind in type(module).__mro__}
    compiled = getattr(module, "_compiled_call_impl", None) is not None or "forward" in vars(module)
    return compiled or bool(kinds & {"OptimizedModule", "DistributedDataParallel", "FSDPModule", "CheckpointWrapper"})
