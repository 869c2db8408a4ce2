"""Two models on the same text: before and after tuning, in full and in short floats, two checkpoints of a run.

L layers, T tokens, H heads, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glassgpt.config import UserError
from glassgpt.generation.sampling import exact
from glassgpt.interpret.hooks import capture
from glassgpt.interpret.lens import kl_bits, residual_stream
from glassgpt.interpret.next_token import Surprise, surprises
from glassgpt.model import GPT, lora
from glassgpt.model.quantised import dequantised
from glassgpt.text import Tokenizer


@dataclass(frozen=True, eq=False)
class Side:
    """What one of the two models expects at each token."""

    ids: Tensor
    """The k likeliest next tokens, likeliest first, (T, k)."""
    probabilities: Tensor
    """Theirs, of the whole vocabulary, (T, k)."""
    surprises: list[Surprise | None]
    """How it saw each real token coming; None for the first."""


@dataclass(frozen=True)
class ParameterDifference:
    """One tensor of both models; adapters are added to their matrix."""

    name: str
    difference: float
    """‖a − b‖."""
    relative: float
    """‖a − b‖ / ‖a‖; infinite where a is all zeros and b is not."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Where two models differ, from what they say down to their parameters; all zeros for a model and itself."""

    kl_bits: Tensor
    """KL(a || b) of the next token, (T,)."""
    a: Side
    b: Side
    residual_relative: Tensor | None
    """‖a − b‖ / ‖a‖ of the residual stream, (L + 1, T), row 0 before the first block; None where depth or width differ."""
    residual_cosine: Tensor | None
    """Cosine of the two, (L + 1, T), or None likewise."""
    pattern_distance: Tensor | None
    """Total variation of where each head looks, Σ|a − b| / 2 from 0 to 1, (L, H, T); None where depth or number of heads differ.

    The first token can look at itself alone: leave it out of a mean.
    """
    parameters: list[ParameterDifference]
    """Tensors that have the same name and shape in both, the largest relative difference first."""


@torch.inference_mode()
def compare(a: GPT, b: GPT, ids: Tensor, k: int = 5, n_ids: int | None = None) -> Comparison:
    """Both models on one text, ids (T,). Holds both models' attention patterns, 8 L H T² bytes in float32.

    Only the first `n_ids` of the vocabulary count (all if not given): some models have more rows than their tokenizer tokens.
    Raises UserError when their vocabularies have different sizes (`check_tokenizers` compares what the ids stand for), for an
    empty text, for one longer than a context, and for a `k` below 1.
    """
    if n_ids is None and a.config.vocab_size != b.config.vocab_size:
        sizes = f"{a.config.vocab_size:,} and {b.config.vocab_size:,}"
        raise UserError(f"models can be compared on the same ids only; they have {sizes} of them. Take two with one tokenizer")
    if len(ids) == 0 or k < 1:
        raise UserError(f"comparing needs a text of at least one token, and k of at least 1; got {len(ids)} tokens and k = {k}")
    residuals_a, patterns_a, logits_a = _run(a, ids)
    residuals_b, patterns_b, logits_b = _run(b, ids)
    log_a, log_b = (exact(logits)[:, :n_ids].log_softmax(-1) for logits in (logits_a, logits_b))  # (T, V)
    residuals_match = residuals_a.shape == residuals_b.shape
    return Comparison(
        kl_bits=kl_bits(*_alike(log_a, log_b)),
        a=_side(log_a, ids, k),
        b=_side(log_b, ids, k),
        residual_relative=_relative(residuals_a, residuals_b) if residuals_match else None,
        residual_cosine=F.cosine_similarity(residuals_a, residuals_b, dim=-1) if residuals_match else None,
        pattern_distance=(patterns_a - patterns_b).abs().sum(-1) / 2 if patterns_a.shape == patterns_b.shape else None,
        parameters=parameter_differences(a, b),
    )


def _run(model: GPT, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Residual stream (L + 1, T, D) in float64, patterns (L, H, T, S) and logits (T, V), the first two on the CPU."""
    with capture(model, "blocks.*.attn.pattern") as patterns:
        residuals, logits = residual_stream(model, ids[None].to(model.head.weight.device))
    return torch.cat(residuals).double().cpu(), torch.cat([exact(p) for p in patterns.values()]).cpu(), logits[0].cpu()


def _side(log_p: Tensor, ids: Tensor, k: int) -> Side:
    top = log_p.topk(min(k, log_p.size(-1)))  # (T, k)
    return Side(top.indices, top.values.exp(), surprises(log_p, ids.cpu()))


def _relative(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).norm(dim=-1) / a.norm(dim=-1)


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of their dtypes, at least float32, on the first one's device."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(dtype), b.to(a.device, dtype)


# ---------------------------------------------------------------------- parameters


@torch.no_grad()
def parameter_differences(a: GPT, b: GPT) -> list[ParameterDifference]:
    """The tensors that have the same name and shape in both models, the largest relative difference first."""
    found, others = [], _parameters(b)
    for name, ours in _parameters(a).items():
        if name in others and others[name].shape == ours.shape:
            one, other = _alike(ours, others[name])
            difference, norm = float((one - other).norm()), float(one.norm())
            found.append(ParameterDifference(name, difference, difference / norm if norm else math.inf * bool(difference)))
    return sorted(found, key=lambda row: -row.relative)


def _parameters(model: GPT) -> dict[str, Tensor]:
    """Parameters by the names that they have without adapters; those that are on are added to their matrix."""
    model = dequantised(model)
    adapters = lora.adapters(model)
    found: dict[str, Tensor] = {name.replace(".base.", "."): p for name, p in model.named_parameters() if name not in adapters}
    for name, module in model.named_modules():
        if isinstance(module, lora.LoraLinear) and module.is_on:
            found[f"{name}.weight"] = module.merged()
    return found


# ---------------------------------------------------------------------- tokenizers


def check_tokenizers(a: Tokenizer, b: Tokenizer) -> None:
    """Raises UserError unless every id stands for the same token in both."""
    for token_id, (ours, theirs) in enumerate(itertools.zip_longest(a.pieces(), b.pieces())):
        if ours != theirs:
            raise UserError(
                f"models can be compared on the same ids only; id {token_id} is {ours!r} to one tokenizer and {theirs!r} to the"
                " other. Take two models with one tokenizer"
            )
