"""Run a model again with something changed on the way: what patching, ablation, tracing and path patching share.

Nothing is computed twice that a change cannot reach: not the layers below it, not the positions before it (their keys and values
are those of the unchanged run), and no logits but those that are scored. Changes of the same positions go through the model
together: more rows join at each layer.

N rows, T positions of the text, t of them from the first changed one on, D width, H heads, W head width, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from glassgpt.config import UserError
from glassgpt.interpret.attribution import checked
from glassgpt.interpret.hooks import Edit, capture, edit
from glassgpt.model import GPT, Block, Where

PIECE_TOKENS = 128
"""Tokens of the runs that are made together, and of those that go through a block at once: bounds the memory."""
HEAD_TOKENS = 16
"""Positions whose logits are held at once."""

Metric = Callable[[Tensor], Tensor]
"""metric(logits (N, V) of the last position) -> (N,)"""
Finish = Callable[[Tensor, int], Tensor]
"""finish(residual stream after the last block (N, t, D), first position) -> (N,)"""
Progress = Callable[[int, int], None]
Activation = Literal["residual", "attn", "mlp", "attn.z"]
RECORDED = ("resid_mid", "attn", "mlp", "attn.z", "attn.k", "attn.v")


@dataclass(frozen=True, eq=False)
class Run:
    """One text's activations, all layers together."""

    ids: Tensor
    """(T,)"""
    seen: Mapping[str, Tensor]
    """"residual" (L + 1, T, D), before each block and after the last; "resid_mid", "attn", "mlp" (L, T, D); "attn.z"
    (L, H, T, W); "attn.k", "attn.v" (L, G, T, W), with G heads of keys and values."""

    def __getitem__(self, name: str) -> Tensor:
        return self.seen[name]


def record(model: GPT, ids: Tensor, edits: Mapping[str, Edit] | None = None) -> Run:
    """Run a text (T,), with edits if given, and keep what the functions here need.

    Raises UserError for ids that are not one text of this model's, and for a model in training mode with dropout.
    """
    ids, _ = checked(model, ids)
    names = ["embed", "blocks.*", *(f"blocks.*.{name}" for name in RECORDED)]
    with torch.no_grad(), edit(model, edits or {}), capture(model, names) as seen:
        model.hidden(ids.unsqueeze(0))
    layers = range(len(model.blocks))
    stacked = {name: torch.cat([seen[f"blocks.{layer}.{name}"] for layer in layers]) for name in RECORDED}
    stacked["residual"] = torch.cat([seen["embed"], *(seen[f"blocks.{layer}"] for layer in layers)])
    return Run(ids, stacked)


class Prefix:
    """A cache that holds a run's keys and values before position `length`, for every row."""

    def __init__(self, run: Run, length: int) -> None:
        self.run, self.length = run, length

    def held(self, layer: int) -> int:
        return self.length

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k_before, v_before = (self.run[name][layer, :, : self.length].expand(len(k), -1, -1, -1) for name in ("attn.k", "attn.v"))
        return torch.cat((k_before, k), dim=2), torch.cat((v_before, v), dim=2)  # (N, G, T, W)


class Again:
    """Blocks on changed residual streams (N, t, D), in place of a run's positions from `first` on."""

    def __init__(self, model: GPT, run: Run, first: int = 0) -> None:
        self.model, self.cache = model, Prefix(run, first) if first else None
        self.where: Where = model.enter(run.ids[first:].unsqueeze(0), self.cache)[1]

    def block(self, layer: int, x: Tensor) -> Tensor:
        parts = x.split(max(1, PIECE_TOKENS // x.size(1)))
        return torch.cat([self.model.blocks[layer](part, self.where, self.cache) for part in parts]) if len(x) else x


# ---------------------------------------------------------------------- scores


def last_position(model: GPT, metric: Metric) -> Finish:
    """The metric of the last position's logits."""

    def finish(x: Tensor, first: int) -> Tensor:
        found = []
        for part in model.norm_f(x[:, -1]).split(HEAD_TOKENS):
            logits = model.logits(part)
            scores = metric(logits.to(torch.promote_types(logits.dtype, torch.float32)))
            if scores.shape != (len(part),):
                raise UserError(f"a metric must return one number a row, ({len(part)},); it returned {tuple(scores.shape)}")
            found.append(scores)
        return torch.cat(found)

    return finish


def mean_loss(model: GPT, run: Run) -> Finish:
    """The mean cross-entropy of the run's next tokens, in nats. Raises UserError for a run of one token."""
    if len(run.ids) < 2:
        raise UserError("a loss needs texts of at least 2 tokens, as the first is not predicted; got 1")

    def finish(x: Tensor, first: int) -> Tensor:
        before = run["residual"][-1, :first].expand(len(x), -1, -1)
        hidden = model.norm_f(torch.cat((before, x), dim=1)[:, :-1])  # (N, T - 1, D)
        found = []
        for part in hidden.split(max(1, HEAD_TOKENS // hidden.size(1))):
            logits = model.logits(part)  # (n, T - 1, V)
            log_p = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
            found.append(-log_p.gather(-1, run.ids[1:].expand(len(part), -1).unsqueeze(-1)).squeeze(-1).mean(1))
        return torch.cat(found)

    return finish


# ---------------------------------------------------------------------- many changes at once


@dataclass(frozen=True)
class Column:
    """A change that is made once in each layer."""

    head: int
    """0 for activations that are not of heads."""
    positions: slice
    first: int
    """The first position at which anything changes, in any layer."""


def sweep(
    model: GPT,
    base: Run,
    activation: Activation,
    new: Tensor,
    finish: Finish,
    by_position: bool,
    progress: Progress | None = None,
) -> Tensor:
    """Put `new` in place of the base run's activation, one layer and head and position at a time, and score the end of each run.

    `new` is as the base run's, with rows R (L + 1 for "residual", else L) and heads H (1 for what is not of heads). Returns
    scores (R, H, T), or (R, H, 1) where all positions change together; a change to what was there scores as the base.
    `progress` counts the scores, those that are known at once at the start.
    """
    T = len(base.ids)
    differs = (new != base[activation]).any(-1).reshape(len(new), -1, T)  # (R, H, T)
    ever = differs.any(0).cpu()  # (H, T)
    spans = [slice(p, p + 1) for p in range(T)] if by_position else [slice(0, T)]
    columns = [
        Column(head, span, span.start + int(ever[head, span].nonzero()[0]))
        for span in spans
        for head in range(len(ever))
        if ever[head, span].any()
    ]
    scores = finish(base["residual"][-1:], 0).repeat(len(new), len(ever), len(spans))  # (R, H, T or 1)
    progress = progress or (lambda done, total: None)
    done = scores.numel() - len(new) * len(columns)  # where nothing changes
    progress(done, scores.numel())
    for piece in _pieces(columns, len(new), T):
        _score_together(model, base, activation, new, differs, piece, finish, scores)
        done += len(new) * len(piece)
        progress(done, scores.numel())
    return scores


def _pieces(columns: Sequence[Column], rows: int, T: int) -> Iterator[Sequence[Column]]:
    """Columns that go together: at least one, within `PIECE_TOKENS`."""
    start = 0
    while start < len(columns):
        count = max(1, PIECE_TOKENS // (rows * (T - columns[start].first)))
        yield columns[start : start + count]
        start += count


def _score_together(
    model: GPT,
    base: Run,
    activation: Activation,
    new: Tensor,
    differs: Tensor,
    columns: Sequence[Column],
    finish: Finish,
    scores: Tensor,
) -> None:
    """Fill in the scores of some columns: at each layer the runs join that are changed there."""
    first = min(c.first for c in columns)
    again, own = Again(model, base, first), torch.zeros(len(columns), *differs.shape[1:], dtype=torch.bool)  # (n, H, T)
    for own_column, c in zip(own, columns, strict=True):
        own_column[c.head, c.positions] = True
    x, places = base["residual"][:0, first:], []
    for depth in range(len(model.blocks) + 1):
        row = depth - (activation != "residual")  # blocks' own activations are seen in the stream after the block
        if row >= 0:
            column, head, position = (differs[row] & own.to(differs.device)).nonzero().unbind(1)  # (P,) each: what changes
            runs, run = column.unique(return_inverse=True)
            joining = base["residual"][depth, first:].repeat(len(runs), 1, 1)  # (N, t, D)
            joining[run, position - first] = _changed(model, base, activation, new[row], row, head, position)
            x = torch.cat((x, joining))
            places += [(row, columns[n].head, columns[n].positions.start) for n in runs.tolist()]
        if depth < len(model.blocks):
            x = again.block(depth, x)
    scores[tuple(torch.tensor(places, device=x.device).unbind(1))] = finish(x, first)


def _changed(model: GPT, base: Run, activation: Activation, new: Tensor, layer: int, head: Tensor, position: Tensor) -> Tensor:
    """The residual stream (P, D) where the change is first seen in it: before a block, or after the block that it is in."""
    if activation == "residual":
        return new[position]
    block = cast(Block, model.blocks[layer])
    if activation == "mlp":
        return base["resid_mid"][layer, position] + new[position]
    if activation == "attn":
        out = new[position]
    else:
        z = base["attn.z"][layer].transpose(0, 1)[position].clone()  # (P, H, W)
        z[torch.arange(len(z)), head] = new[head, position]
        out = block.attn.out(z.flatten(1))
    mid = base["residual"][layer, position] + out
    return mid + block.mlp(block.norm_2(mid))
