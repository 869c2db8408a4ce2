"""What a model expects next, over its whole vocabulary: a table, how much the real text surprised it, a tree of continuations.

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from glassgpt.config import UserError
from glassgpt.config.generate import Sampling
from glassgpt.generation import KVCache, distribution
from glassgpt.generation.history import History
from glassgpt.generation.sampling import entropy, exact, penalised
from glassgpt.model import GPT

MAX_LEAVES = 4096
"""Nodes in the last level of a tree, at most."""
CACHED_TOKENS = 4096
"""Tokens whose keys and values a tree holds at once: 300 MB in the smallest GPT-2."""
ROWS = 64
"""Positions whose probabilities are computed at once."""
NATS_PER_BIT = math.log(2)


@torch.inference_mode()
def logits_of(model: GPT, ids: Sequence[int] | Tensor) -> Tensor:
    """Logits (T, V) at every position of one text, at least in float32. Raises UserError for an empty or too long text."""
    row = torch.as_tensor(ids, dtype=torch.long, device=next(model.parameters()).device)  # (T,)
    if row.numel() == 0:
        raise UserError("the text is empty; give at least one token")
    return exact(model(row[None])[0])


# ---------------------------------------------------------------------- the table


@dataclass(frozen=True)
class NextToken:
    """One row of the table, column by column as the probability is computed."""

    id: int
    logit: float
    """The model's own."""
    scaled: float
    """After penalties, divided by the temperature; at temperature 0, where there is no division, after penalties alone."""
    kept: bool
    """Whether it can be drawn: top-k, top-p and min-p let it pass, and its probability does not round to 0."""
    probability: float
    """Of all tokens that can be drawn; exactly what `generation.distribution` gives."""


def next_tokens(logits: Tensor, sampling: Sampling, count: int, prompt: Sequence[int] = ()) -> list[NextToken]:
    """The `count` likeliest next tokens by their logits (V,), likeliest first, the lower id first among equals.

    Probabilities are over the whole vocabulary, however few are shown; `rest` has the others'. The order does not depend
    on the temperature. `prompt` are the ids that penalties look at. Raises UserError when `count` is below 1.
    """
    _at_least_1("count", count)
    logits = exact(logits)
    wanted = _after_penalties(logits[None], sampling, prompt)  # (1, V)
    probabilities = distribution(wanted, sampling)[0]  # (V,)
    ids = wanted[0].argsort(descending=True, stable=True)[:count]  # of logits: cold probabilities round to ties at 0
    columns = (ids, logits[ids], wanted[0][ids], probabilities[ids])
    return [
        NextToken(token_id, logit, after / (sampling.temperature or 1.0), probability > 0, probability)
        for token_id, logit, after, probability in zip(*(column.tolist() for column in columns), strict=True)
    ]


def rest(shown: Sequence[NextToken]) -> float:
    """Probability of the rest of the vocabulary: with it the bars sum to 1."""
    return max(0.0, 1 - math.fsum(token.probability for token in shown))


def _after_penalties(logits: Tensor, sampling: Sampling, prompt: Sequence[int], written: Tensor | None = None) -> Tensor:
    """Logits (B, V) of rows that have seen the same prompt and have since written (B, t) ids."""
    if not sampling.has_penalties:
        return logits
    history = History([prompt] * len(logits), logits.size(-1), logits.device)
    for drawn in () if written is None else written.T:
        history.add(drawn.tolist())
    return penalised(logits, sampling, history.seen, history.written)


# ---------------------------------------------------------------------- how likely the real text was


@dataclass(frozen=True)
class Surprise:
    """A token of a text, as the model saw it coming."""

    surprisal_bits: float
    """-log2 of its probability: 1 for one that is as likely as not."""
    rank: int
    """Its place among all tokens of the vocabulary: 1 is the likeliest."""
    entropy_bits: float
    """What the surprisal was expected to be: log2 of the number of equally likely choices."""


def surprises(logits: Tensor, ids: Tensor) -> list[Surprise | None]:
    """Of each token in ids (T,), by the logits (T, V) of the model on them; None for the first, which nothing comes before."""
    found: list[Surprise | None] = [None] * min(1, len(ids))
    for rows, real in zip(logits[:-1].split(ROWS), ids[1:].split(ROWS), strict=True):
        rows = exact(rows)
        bits = -rows.log_softmax(-1).gather(-1, real[:, None])[:, 0] / NATS_PER_BIT  # (rows,)
        columns = (bits, ranks(rows, real), entropy(rows) / NATS_PER_BIT)
        found += [Surprise(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
    return found


def ranks(logits: Tensor, ids: Tensor) -> Tensor:
    """The place (...) of `ids` (...) among all logits (..., V): 1 is the largest, and of equals the lower id is first."""
    own = logits.gather(-1, ids[..., None])
    lower = torch.arange(logits.size(-1), device=logits.device) < ids[..., None]  # (..., V)
    return 1 + ((logits > own) | ((logits == own) & lower)).sum(-1)


# ---------------------------------------------------------------------- the tree


@dataclass(frozen=True)
class Node:
    """A token in a tree of continuations."""

    id: int
    probability: float
    """That it is drawn after its parent."""
    path_probability: float
    """That the whole path from the root to it is drawn."""
    children: list[Node] = field(default_factory=list)
    """The likeliest next tokens, likeliest first."""

    @property
    def rest(self) -> float:
        """Probability that none of the children shown is drawn: 1 at the end of a path."""
        return max(0.0, 1 - math.fsum(child.probability for child in self.children))


@torch.inference_mode()
def sampling_tree(
    model: GPT,
    ids: Tensor,
    *,
    depth: int,
    width: int,
    sampling: Sampling,
    end_id: int | None = None,
    n_ids: int | None = None,
) -> Node:
    """What may follow ids (T,): the `width` likeliest tokens after each node, `depth` levels deep. The root is the last of `ids`.

    Probabilities are those of sampling: tokens that it never draws have no node, and at temperature 0 the tree is one path.
    Nothing follows `end_id`; only the first `n_ids` of the vocabulary can be drawn (all if not given). The prompt is computed
    once, a level in one batch (in several where its keys and values would be those of more than CACHED_TOKENS tokens).
    Raises UserError for an empty prompt, for one that leaves no room in the context, and for a tree that is too large.
    """
    _at_least_1("depth", depth)
    _at_least_1("width", width)
    if width**depth > MAX_LEAVES:
        raise UserError(f"a tree of width {width} and depth {depth} has {width**depth:,} leaves; give at most {MAX_LEAVES:,}")
    if len(ids) == 0 or len(ids) + depth - 1 > model.config.context_tokens:
        room = f"1 to {model.config.context_tokens - depth + 1}"
        raise UserError(f"a tree of depth {depth} needs a prompt of {room} tokens in this model's context; got {len(ids)}")
    prompt = ids.tolist()
    cache = KVCache(model.config)
    if len(ids) > 1:
        model.hidden(ids[None, :-1], cache)  # the last token begins every path

    def grown(part: list[tuple[Node, list[int]]]) -> list[tuple[Node, list[int]]]:
        """Children of these nodes; each node comes with the ids from the root to it."""
        paths = torch.tensor([path for _, path in part], device=ids.device)  # (B, t)
        logits = _after_paths(model, cache, paths)[:, :n_ids]
        likely = distribution(_after_penalties(logits, sampling, prompt, paths[:, 1:]), sampling)  # (B, V)
        chances, children = (x.tolist() for x in likely.topk(min(width, likely.size(-1))))  # (B, width)
        below = []
        for (node, path), row, probabilities in zip(part, children, chances, strict=True):
            node.children.extend(Node(i, p, node.path_probability * p) for i, p in zip(row, probabilities, strict=True) if p > 0)
            below += [(child, [*path, child.id]) for child in node.children if child.id != end_id]
        return below

    rows = max(1, CACHED_TOKENS // (len(ids) + depth))
    root = Node(prompt[-1], 1.0, 1.0)
    level = [(root, [root.id])]
    for _ in range(depth):
        level = [pair for start in range(0, len(level), rows) for pair in grown(level[start : start + rows])]
    return root


def _after_paths(model: GPT, cache: KVCache, paths: Tensor) -> Tensor:
    """Logits (B, V) after the prompt that the cache holds and each of the paths (B, t); the cache stays as it is."""
    copied = copy.deepcopy(cache)
    copied.keep(torch.zeros(len(paths), dtype=torch.long, device=paths.device))  # the one row, once for each path
    return exact(model.logits(model.hidden(paths, copied)[:, -1]))


def _at_least_1(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{name} must be at least 1; got {value}")
