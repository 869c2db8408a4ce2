"""Direct logit attribution: what each part of the network writes into a logit, directly, and how large the parts' writings are.

A logit is linear in the residual stream once the scale of the final norm is taken as the run had it, and the stream is a sum of
writings: embeddings, heads, MLPs, biases. So the logit is a sum too, exactly (Elhage et al. 2021, "A Mathematical Framework for
Transformer Circuits"). What a part does through later parts is not in its number.

T positions, D width, H heads, W head width, F neurons, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glassgpt.config import UserError
from glassgpt.interpret.activations import check_no_dropout
from glassgpt.interpret.hooks import capture, edit, plain_model
from glassgpt.model import GPT
from glassgpt.model.lora import LoraLinear


@dataclass(frozen=True)
class Part:
    """One writer of the residual stream, or a bias."""

    name: str
    kind: str
    """token, position (or embedding, the two after a norm), head, attn_bias, mlp or neuron, mlp_bias, expert, shared_expert,
    norm_bias."""
    layer: int | None
    index: int | None
    """Head, neuron or expert."""
    value: float
    """What it adds to the logit, or to the difference of two."""


@dataclass(frozen=True)
class Attribution:
    """A logit, or the difference of two, as a sum."""

    parts: tuple[Part, ...]
    total: float
    """The parts summed."""
    logit: float
    """What the model says: equal to `total` but for rounding."""


@torch.no_grad()
def attribute(
    model: GPT, ids: Tensor, token: int, position: int = -1, against: int | None = None, neurons: bool = False
) -> Attribution:
    """Direct logit attribution of `token` after `position` of ids (T,); with `against`, of logit(token) - logit(against).

    The scale of the final norm is that of this run (frozen); its bias is a part. With `logit_cap` it is the logit before the
    cap. With `neurons` each neuron is a part, without ever making its output vector. A mixture's parts are the experts that
    the token was sent to, each with its bias, weighted by the router, then the shared experts.
    Raises UserError for ids, a token or a position that the model has not, for `neurons` of a mixture, and for a model in
    training mode with dropout.
    """
    ids, position = checked(model, ids, position)
    if neurons and model.config.moe.experts:
        raise UserError("neurons=True needs dense MLPs, and this model has a mixture of experts; leave it out to see the experts")
    wanted = ["token_embedding", "embed", "blocks.*", "blocks.*.attn.z", "blocks.*.norm_2", "head"]
    dense = [] if model.config.moe.experts else ["blocks.*.mlp.hidden"]
    with capture(model, wanted + dense) as seen:
        model(ids.unsqueeze(0))
    wide = torch.promote_types(seen["embed"].dtype, torch.float32)
    here = {name: (x[0, :, position] if name.endswith(".z") else x[0, position]).to(wide) for name, x in seen.items()}
    matrix = unembedding(model, token, against).to(wide)  # (D,)
    reader, constant = frozen_norm(model.norm_f, here[f"blocks.{model.config.n_layer - 1}"], matrix)

    parts = list(_embeddings(model, here, position, reader))
    for layer in range(model.config.n_layer):
        at = f"blocks.{layer}"
        parts += _heads(model.get_submodule(f"{at}.attn.out"), layer, here[f"{at}.attn.z"], reader)
        if model.config.moe.experts:
            parts += _experts(model, layer, here[f"{at}.norm_2"].to(seen["embed"].dtype), reader)
        else:
            parts += _mlp(model.get_submodule(f"{at}.mlp.down"), layer, here[f"{at}.mlp.hidden"], reader, neurons)
    if constant is not None:
        parts.append(Part("final norm bias", "norm_bias", None, None, float(constant)))
    logit = here["head"][token] - (here["head"][against] if against is not None else 0)
    return Attribution(tuple(parts), sum(part.value for part in parts), float(logit))


def head_attribution(model: GPT, ids: Tensor, token: int, position: int = -1, against: int | None = None) -> Tensor:
    """The heads' parts of `attribute` as a picture, (L, H). Raises UserError as it does."""
    parts = attribute(model, ids, token, position, against).parts
    values = [part.value for part in parts if part.kind == "head"]
    return torch.tensor(values).view(model.config.n_layer, model.config.n_head)


# ---------------------------------------------------------------------- the residual stream in numbers


def residual_norms(model: GPT, ids: Tensor) -> Tensor:
    """Euclidean norms of the residual stream over ids (T,): (2L + 1, T), of embed and after each attention and each MLP."""
    return _stream(model, ids).norm(dim=-1)


def residual_shares(model: GPT, ids: Tensor) -> Tensor:
    """The share of the last residual vector that each writing makes, (2L + 1, T): rows as in `residual_norms`.

    A writing's projection on the last vector, over that vector's length: a column sums to 1, and a share below 0 pulls away.
    """
    stream = _stream(model, ids)  # (2L + 1, T, D)
    written = torch.cat((stream[:1], stream.diff(dim=0)))
    return (written * stream[-1]).sum(dim=-1) / stream[-1].square().sum(dim=-1)


@torch.no_grad()
def _stream(model: GPT, ids: Tensor) -> Tensor:
    """(2L + 1, T, D), in float32 or wider."""
    ids, _ = checked(model, ids)
    layers = range(model.config.n_layer)
    order = ["embed"] + [name for layer in layers for name in (f"blocks.{layer}.resid_mid", f"blocks.{layer}")]
    with capture(model, order) as seen:
        model.hidden(ids.unsqueeze(0))
    stream = torch.stack([seen[name][0] for name in order])
    return stream.to(torch.promote_types(stream.dtype, torch.float32))


# ---------------------------------------------------------------------- what reads the stream


def checked(model: GPT, ids: Tensor, position: int = -1) -> tuple[Tensor, int]:
    """ids (T,) on the model's device, and a position counted from 0. Raises UserError for what the model cannot take."""
    plain_model(model)
    check_no_dropout(model)
    if ids.dim() != 1 or not len(ids) or ids.is_floating_point():
        raise UserError(f"expected the token ids of one text, shape (T,); got {tuple(ids.shape)} {ids.dtype}")
    vocab_size = model.config.vocab_size
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise UserError(f"token ids must be between 0 and {vocab_size - 1}; got {int(ids.min())} to {int(ids.max())}")
    if not -len(ids) <= position < len(ids):
        raise UserError(
            f"position {position} is not in a text of {len(ids)} tokens; give 0 to {len(ids) - 1}, or -1 for the last"
        )
    return ids.to(model.head.weight.device), position % len(ids)


def unembedding(model: GPT, token: int, against: int | None = None) -> Tensor:
    """The head's row of `token`, (D,), less that of `against`: a logit before the cap is this times the final norm's output."""
    for given in (token, against):
        if given is not None and not 0 <= given < model.config.vocab_size:
            raise UserError(f"token must be an id between 0 and {model.config.vocab_size - 1}; got {given}")
    rows = model.head.weight.detach()
    return rows[token] if against is None else rows[token] - rows[against]


def frozen_norm(norm: Any, x: Tensor, reader: Tensor) -> tuple[Tensor, Tensor | None]:
    """`(direction (D,), constant)` with norm(x) @ reader = x @ direction + constant, at the scale that x (D,) gives.

    LayerNorm's subtraction of the mean is linear and belongs to the direction. None where the norm has no bias.
    """
    gain = reader * norm.weight
    if not isinstance(norm, nn.LayerNorm):  # RMSNorm
        return gain * (x.square().mean() + norm.eps).rsqrt(), None
    scale = (x.var(correction=0) + norm.eps).rsqrt()
    return (gain - gain.mean()) * scale, None if norm.bias is None else norm.bias.to(x.dtype) @ reader


# ---------------------------------------------------------------------- the parts


def _embeddings(model: GPT, here: dict[str, Tensor], position: int, reader: Tensor) -> Iterator[Part]:
    if model.config.embedding_norm:  # not a sum of the two any more
        yield Part("embedding", "embedding", None, None, float(here["embed"] @ reader))
        return
    yield Part("token embedding", "token", None, None, float(here["token_embedding"] @ reader))
    if model.config.position in ("learned", "sinusoidal"):
        nothing, where = torch.zeros_like(here["embed"]), torch.tensor([position], device=reader.device)
        added = model.position_embedding.add(nothing.view(1, 1, -1), where).flatten()  # (D,)
        yield Part("position embedding", "position", None, None, float(added @ reader))


def _heads(out: nn.Module, layer: int, z: Tensor, reader: Tensor) -> Iterator[Part]:
    """z (H, W): a head is its numbers through its columns of the output matrix."""
    weight, bias = linear_parts(out, reader.dtype)
    values = (z * (reader @ weight).view_as(z)).sum(dim=-1)  # (H,)
    for head, value in enumerate(values.tolist()):
        yield Part(f"block {layer} head {head}", "head", layer, head, value)
    if bias is not None:
        yield Part(f"block {layer} attention bias", "attn_bias", layer, None, float(bias @ reader))


def _mlp(down: nn.Module, layer: int, hidden: Tensor, reader: Tensor, neurons: bool) -> Iterator[Part]:
    """hidden (F,): the projection is folded into what reads, so a neuron is one product."""
    weight, bias = linear_parts(down, reader.dtype)
    values = hidden * (reader @ weight)  # (F,)
    if neurons:
        for neuron, value in enumerate(values.tolist()):
            yield Part(f"block {layer} neuron {neuron}", "neuron", layer, neuron, value)
    else:
        yield Part(f"block {layer} MLP", "mlp", layer, None, float(values.sum()))
    if bias is not None:
        yield Part(f"block {layer} MLP bias", "mlp_bias", layer, None, float(bias @ reader))


def _experts(model: GPT, layer: int, x: Tensor, reader: Tensor) -> Iterator[Part]:
    """x (D,), what the MLP reads: an expert is the mixture's output when all others are silent."""
    mixture, moe = model.get_submodule(f"blocks.{layer}.mlp"), model.config.moe
    kinds = {"experts": ("expert", moe.experts), "shared": ("shared_expert", moe.shared)}
    every = [f"blocks.{layer}.mlp.{name}.{index}" for name, (_, count) in kinds.items() for index in range(count)]
    with capture(model, every) as seen:
        mixture(x.view(1, 1, -1))
    used = [name for name in every if len(seen[name])]  # was sent the token
    for name in used:
        with edit(model, {other: torch.zeros_like for other in used if other != name}):
            value = mixture(x.view(1, 1, -1)).flatten().to(reader.dtype) @ reader
        *_, group, index = name.split(".")
        kind, _ = kinds[group]
        yield Part(f"block {layer} {kind.replace('_', ' ')} {index}", kind, layer, int(index), float(value))


def linear_parts(linear: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The matrix (out, in) that a linear map multiplies by, an adapter added up, and its bias."""
    base = linear.base if isinstance(linear, LoraLinear) else linear
    weight = linear.merged().to(base.weight.device) if isinstance(linear, LoraLinear) and linear.is_on else base.weight
    return weight.to(dtype), None if base.bias is None else base.bias.to(dtype)
