"""What attention heads look at, what they add to the residual stream, and which kinds of head a model has.

B batch, H heads of queries, G heads of keys and values, T queries, S keys, W head width, D width of the residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glassgpt.config import UserError
from glassgpt.config.errors import check_seed
from glassgpt.interpret.attribution import linear_parts
from glassgpt.interpret.hooks import capture
from glassgpt.model import GPT
from glassgpt.model.attention import Attention
from glassgpt.model.position import distances
from glassgpt.text import Tokenizer

HIGH = 0.4
"""A head is named after a place that gets at least this share of its attention. Below one half, because a head that looks for its
own token finds two of them, itself and the double, and shares its attention between them."""
TIMES_CONTROL = 4.0
"""A score that a repeat makes is at least this many times its control. A head that always looks the same way back has a ratio
of 1, whatever the tokens are; one that spreads evenly has a score of about 0.7 / tokens on both."""
USUAL_TOKENS = 25
LEAST_TOKENS = 3
"""With 2 tokens repeated, one step after the last time is the previous token: two kinds of head in one place."""


@dataclass(frozen=True)
class HeadScore:
    """What one head does on random tokens that are repeated once, and (`_control`) on as many that are all different."""

    layer: int
    head: int
    entropy_bits: float
    """Mean entropy of a query's attention over the keys; see `pattern_entropy`."""
    distance_tokens: float
    """Mean distance that it looks back; see `pattern_distance`."""
    previous: float
    """Attention to the token before, from every query but the first."""
    previous_control: float
    duplicate: float
    """Attention of the second half to the same token in the first half."""
    duplicate_control: float
    induction: float
    """Attention of the second half to the token that came after the same token in the first half."""
    induction_control: float
    entropy_bits_control: float
    distance_tokens_control: float


def head_scores(
    model: GPT, *, tokens: int = USUAL_TOKENS, rows: int = 8, seed: int = 0, bos: int | None = None, n_ids: int | None = None
) -> list[HeadScore]:
    """Scores of every head, layer by layer, on the probe of Olsson et al. (2022, "In-context Learning and Induction Heads").

    Probe: `tokens` different random ids, repeated once, in each of `rows` sequences; `bos` stands before them if it is given, and
    is not drawn. Control: the same first half, followed by `tokens` other ids, so that nothing occurs twice. A score is the mean
    of the attention from certain queries to certain keys; the control is the mean over the same places. All come from the
    first `n_ids` ids (the whole vocabulary if not given) and follow from `seed` alone.

    Raises UserError when vocabulary or context have no room for the probe; `longest_probe` says how much they have.
    """
    probe, control = _probes(model, tokens, rows, seed, bos, n_ids)  # (B, T) twice
    start = int(bos is not None)
    found = []
    for layer, (repeated, different) in enumerate(zip(_patterns(model, probe), _patterns(model, control), strict=True)):
        scores, controls = (_measures(pattern, tokens, start) for pattern in (repeated, different))
        for head, (score, beside) in enumerate(zip(scores, controls, strict=True)):
            found.append(HeadScore(layer, head, **score, **{f"{name}_control": value for name, value in beside.items()}))
    return found


def usual_scores(model: GPT, tokenizer: Tokenizer, seed: int = 0) -> list[HeadScore]:
    """`head_scores` with 25 tokens, or as many as there is room for, after the token that begins (or ends) texts.

    Raises UserError as `head_scores`.
    """
    bos = tokenizer.begin_id if tokenizer.begin_id is not None else tokenizer.end_id
    n_ids = min(tokenizer.vocab_size, model.config.vocab_size)
    tokens = max(LEAST_TOKENS, min(USUAL_TOKENS, longest_probe(model, bos, n_ids)))
    return head_scores(model, tokens=tokens, seed=seed, bos=bos, n_ids=n_ids)


def _measures(pattern: Tensor, tokens: int, start: int) -> list[dict[str, float]]:
    """Every measure of a pattern (B, H, T, T), the mean over its rows, head by head."""
    columns = {
        "entropy_bits": pattern_entropy(pattern),
        "distance_tokens": pattern_distance(pattern),
        "previous": previous_score(pattern),
        "duplicate": duplicate_score(pattern, tokens, start),
        "induction": induction_score(pattern, tokens, start),
    }  # each (B, H)
    table = torch.stack(list(columns.values())).mean(dim=1).T.tolist()  # (H, 5)
    return [dict(zip(columns, row, strict=True)) for row in table]


def head_class(score: HeadScore) -> str:
    """What to call a head: "previous-token", "duplicate-token", "induction", or "none".

    A duplicate-token or induction head needs a repeat: its score is HIGH, and TIMES_CONTROL times its control. A previous-token
    head does not, so there the control shows the opposite: it must be HIGH as well.
    """
    kinds = {"previous-token": min(score.previous, score.previous_control)}
    if score.duplicate >= TIMES_CONTROL * score.duplicate_control:
        kinds["duplicate-token"] = score.duplicate
    if score.induction >= TIMES_CONTROL * score.induction_control:
        kinds["induction"] = score.induction
    best = max(kinds, key=lambda kind: kinds[kind])
    return best if kinds[best] >= HIGH else "none"


def longest_probe(model: GPT, bos: int | None = None, n_ids: int | None = None) -> int:
    """The largest `tokens` for which `head_scores` has enough different ids and enough context."""
    return min(_drawn_from(model, bos, n_ids), model.config.context_tokens - (bos is not None)) // 2


# ---------------------------------------------------------------------- the pattern (B, H, T, S)


def pattern_entropy(pattern: Tensor) -> Tensor:
    """Entropy in bits of each query's attention, mean over the queries: (B, H). 0 is one key, log2 n is n keys alike.

    Every query counts. The first of a sequence sees itself alone, so it counts with 0 bits.
    """
    return torch.special.entr(_wide(pattern)).sum(dim=-1).mean(dim=-1) / math.log(2)


def pattern_distance(pattern: Tensor) -> Tensor:
    """How many tokens back each query looks, weighted by its attention, mean over the queries: (B, H).

    Every query counts. The first of a sequence sees itself alone, so it counts with distance 0.
    """
    T, S = pattern.shape[-2:]
    return (_wide(pattern) * distances(T, S, pattern.device)).sum(dim=-1).mean(dim=-1)


def previous_score(pattern: Tensor) -> Tensor:
    """Attention from query i to key i - 1, mean over all i but the first, which has none before it: (B, H)."""
    return _back(pattern, 1).mean(dim=-1)


def duplicate_score(pattern: Tensor, tokens: int, start: int = 0) -> Tensor:
    """Attention from query start + tokens + i to key start + i, mean over i = 0 ... tokens - 1: (B, H).

    `start` counts what stands before the repeated `tokens`: 1 with a beginning-of-text token.
    """
    return _back(pattern, tokens)[..., start : start + tokens].mean(dim=-1)


def induction_score(pattern: Tensor, tokens: int, start: int = 0) -> Tensor:
    """Attention from query start + tokens + i to key start + i + 1, mean over i = 0 ... tokens - 2: (B, H).

    The last query is left out: after its token's first occurrence the repeat begins, so the key is no part of the first half.
    """
    return _back(pattern, tokens - 1)[..., start + 1 : start + tokens].mean(dim=-1)


def rollout(patterns: Sequence[Tensor]) -> list[Tensor]:
    """Attention rollout (Abnar & Zuidema 2020, eq. 1): after each layer, how much of position i stems from token j, (B, T, T).

    From the layers' patterns (B, H, T, T) in order, first to last: heads averaged, half of the residual stream taken to come
    from attention and half to pass by, layers multiplied. Rows sum to 1. Values and MLPs do not enter, so it is a rough picture.
    Raises UserError for patterns that are not square: those of a forward pass with a cache.
    """
    found: list[Tensor] = []
    for pattern in patterns:
        T, S = pattern.shape[-2:]
        if T != S:
            raise UserError(f"rollout needs patterns of whole sequences; got {T} queries and {S} keys (capture without a cache)")
        passed = torch.eye(T, dtype=pattern.dtype, device=pattern.device)
        mixed = 0.5 * pattern.mean(dim=1) + 0.5 * passed  # (B, T, T)
        found.append(mixed @ found[-1] if found else mixed)
    return found


# ---------------------------------------------------------------------- what heads write


def head_outputs(model: GPT, layer: int, z: Tensor) -> Tensor:
    """What each head adds to the residual stream, (B, T, H, D), from the `blocks.LAYER.attn.z` of a pass, (B, H, T, W).

    Each head has its own columns of the output matrix. The matrix's bias belongs to no head: the sum over the heads plus that
    bias is `blocks.LAYER.attn.out`. Adapters that are on are part of the matrix.
    Raises UserError for a layer that there is not, and for a z of another shape.
    """
    attention = _attention(model, layer)
    H, W = attention.heads[0], attention.head_width
    if z.ndim != 4 or (z.size(1), z.size(3)) != (H, W):
        raise UserError(f"z of layer {layer} must be (B, {H}, T, {W}); got {tuple(z.shape)} (capture blocks.{layer}.attn.z)")
    return torch.einsum("bhtw,dhw->bthd", z, linear_parts(attention.out, z.dtype)[0].unflatten(1, (H, W)))


def value_weighted(model: GPT, layer: int, pattern: Tensor, v: Tensor) -> Tensor:
    """How much each query really takes from each key: the norm of pattern_ij v_j W_O, (B, H, T, S) (Kobayashi et al. 2020).

    `pattern` (B, H, T, S) and `v` (B, G, S, W) are `blocks.LAYER.attn.pattern` and `.v` of one pass without a cache. A key may
    get much attention and have a value near zero: it then counts for little. Raises UserError as `head_outputs`.
    """
    H, G, _ = _attention(model, layer).heads
    if v.ndim != 4 or (v.size(1), v.size(2)) != (G, pattern.size(-1)):
        expected = f"(B, {G}, {pattern.size(-1)}, W)"
        raise UserError(f"v of layer {layer} must be {expected}; got {tuple(v.shape)} (capture v and pattern without a cache)")
    written = head_outputs(
        model, layer, v.repeat_interleave(H // G, dim=1)
    )  # (B, S, H, D), of a query that took all from one key
    return pattern * written.norm(dim=-1).transpose(1, 2).unsqueeze(2)  # (B, H, T, S)


# ---------------------------------------------------------------------- parts


def _attention(model: GPT, layer: int) -> Attention:
    if not 0 <= layer < len(model.blocks):
        raise UserError(f"layer must be between 0 and {len(model.blocks) - 1}; got {layer}")
    return model.blocks[layer].attn  # type: ignore[return-value]


def _back(pattern: Tensor, tokens: int) -> Tensor:
    """Attention to the key so many tokens back, by key: (B, H, S - tokens). Of whole sequences, T = S."""
    return _wide(pattern).diagonal(offset=-tokens, dim1=-2, dim2=-1)


def _wide(x: Tensor) -> Tensor:
    """Means over many small numbers lose too much below float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def _patterns(model: GPT, ids: Tensor) -> list[Tensor]:
    """Of every layer, (B, H, T, T)."""
    with capture(model, "blocks.*.attn.pattern") as seen:
        model.hidden(ids)
    return [seen[f"blocks.{layer}.attn.pattern"] for layer in range(len(model.blocks))]


def _probes(model: GPT, tokens: int, rows: int, seed: int, bos: int | None, n_ids: int | None) -> tuple[Tensor, Tensor]:
    """Random ids repeated once, and ids that are all different: (rows, T) each."""
    check_seed(seed)
    _check_probe(model, tokens, rows, bos, n_ids)
    generator, drawn_from = torch.Generator().manual_seed(seed), _drawn_from(model, bos, n_ids)
    ids = torch.stack([torch.randperm(drawn_from, generator=generator)[: 2 * tokens] for _ in range(rows)])  # (B, 2 * tokens)
    if bos is not None:
        ids = ids + (ids >= bos)  # leaves it out
    first = ids.new_full((rows, int(bos is not None)), bos or 0)  # (B, 0 or 1)
    half, device = ids[:, :tokens], next(model.parameters()).device
    return torch.cat((first, half, half), dim=1).to(device), torch.cat((first, ids), dim=1).to(device)


def _drawn_from(model: GPT, bos: int | None, n_ids: int | None) -> int:
    """How many ids may be drawn."""
    count = model.config.vocab_size if n_ids is None else n_ids
    return count - (bos is not None and bos < count)


def _check_probe(model: GPT, tokens: int, rows: int, bos: int | None, n_ids: int | None) -> None:
    vocab_size, context = model.config.vocab_size, model.config.context_tokens
    if n_ids is not None and not 1 <= n_ids <= vocab_size:
        raise UserError(f"n_ids must be between 1 and the vocabulary's {vocab_size}; got {n_ids}")
    if bos is not None and not 0 <= bos < vocab_size:
        raise UserError(f"bos must be between 0 and {vocab_size - 1}; got {bos}")
    if rows < 1:
        raise UserError(f"rows must be at least 1; got {rows}")
    if tokens < LEAST_TOKENS:
        raise UserError(
            f"tokens must be at least {LEAST_TOKENS}, so that the kinds of heads look at different keys; got {tokens}"
        )
    longest = longest_probe(model, bos, n_ids)
    if tokens > longest:
        has = f"{_drawn_from(model, bos, n_ids)} ids to draw from and a context of {context}"
        advice = f"use tokens {longest} or fewer" if longest >= LEAST_TOKENS else "this model is too small for the probe"
        needs = f"{2 * tokens} different ids and a context of {2 * tokens + (bos is not None)}"
        raise UserError(f"a probe of {tokens} tokens needs {needs}; the model has {has}: {advice}")
