"""Prefill and decode: prompts in, tokens out one step at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glassgpt.config import UserError
from glassgpt.config.generate import Sampling
from glassgpt.generation.generator import Generator
from glassgpt.generation.runner import Model, Runner, Scores, start

if TYPE_CHECKING:
    from torch import Tensor

    from glassgpt.generation.history import History


@dataclass(frozen=True)
class Token:
    """One token of one row."""

    row: int
    id: int
    logprob: float
    """Natural log of its probability under the model itself: temperature 1, nothing left out."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest (id, log-probability) pairs at this place, as many as were asked for."""


def fit(ids: Sequence[int], context_tokens: int, keep_tokens: int | None = None) -> list[int]:
    """A prompt that fits the context; a longer one is cut to its last `keep_tokens`.

    Raises UserError for an empty prompt or, without `keep_tokens`, for a long one.
    """
    if not ids:
        raise UserError("the prompt is empty; give at least one character")
    if len(ids) <= context_tokens:
        return list(ids)
    if keep_tokens is None:
        raise UserError(
            f"the prompt has {len(ids)} tokens and the context is {context_tokens};"
            " shorten it, or use --overflow drop-oldest to keep its end"
        )
    return list(ids)[-keep_tokens:]


def stream(
    model: Model,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    generators: Sequence[Generator],
    max_new_tokens: int,
    ends: Callable[[Token], bool] = lambda token: False,
    n_top: int = 0,
    n_ids: int | None = None,
) -> Iterator[Token]:
    """Continue each prompt; yields every token as it is drawn, all rows of a step together, rows in order.

    The first forward pass reads the prompts (prefill), equal ones once; every later one feeds one token a row (decode).
    A row goes on until `ends(token)` is true, `max_new_tokens` are written, or the context is full; it then leaves the
    batch. `generators` holds one random generator a row. Only the first `n_ids` of the vocabulary can be drawn (all if not
    given): some models have more rows than their tokenizer has tokens. Raises UserError for an empty or too long prompt.
    """
    prompts = [fit(ids, model.config.context_tokens) for ids in prompts]
    room = [min(max_new_tokens, model.config.context_tokens - len(ids) + 1) for ids in prompts]
    rows = list(range(len(prompts)))
    runner = start(model, n_ids)
    step = 0
    try:
        scores = read(runner, prompts)
        history = _history(prompts, scores) if sampling.has_penalties else None
        while rows:
            drawn = _drawn(scores, sampling, history, [generators[row] for row in rows])
            step += 1
            tokens = as_tokens(rows, drawn, scores, n_top)
            yield from tokens
            if history:
                history.add(drawn)
            left = [i for i, token in enumerate(tokens) if not ends(token) and step < room[token.row]]
            if left and len(left) < len(rows):
                runner.keep(left)
                if history:
                    history.keep(left)
            rows = [rows[i] for i in left]
            if rows:
                scores = runner.feed([[tokens[i].id] for i in left])
    finally:
        runner.close()


def read(runner: Runner, prompts: Sequence[Sequence[int]]) -> Scores:
    """Make a row of each prompt; one that occurs several times is computed once, if the runner can copy it."""
    different = list(dict.fromkeys(map(tuple, prompts)))
    fork = getattr(runner, "fork", None)
    if fork is None or len(different) == len(prompts):
        return runner.feed(prompts)
    scores = runner.feed(different)
    sources = [different.index(tuple(ids)) for ids in prompts]
    fork(sources)
    return scores.of(sources)


def _history(prompts: Sequence[Sequence[int]], scores: Scores) -> History:
    logits = scores.logits  # first: an engine's own scores leave PyTorch one thread when they import it
    from glassgpt.generation.history import History

    return History(prompts, logits.size(-1), logits.device)


def _drawn(scores: Scores, sampling: Sampling, history: History | None, generators: list[Generator]) -> list[int]:
    """The next token of each row. The likeliest, without penalties, needs no pass over the vocabulary."""
    if history is not None:
        return history.draw(scores, sampling, generators)
    return scores.best if sampling.temperature == 0 else scores.draw(sampling, generators)


def as_tokens(rows: Sequence[int], drawn: Sequence[int], scores: Scores, n_top: int) -> list[Token]:
    """What was drawn, in order, with its log-probability under the model. Raises UserError for scores that are no numbers."""
    totals = numbers(scores)
    tops = _likeliest(scores.logits, totals, n_top) if n_top else [()] * len(totals)
    return [
        Token(row, token_id, logit - total, top)
        for row, token_id, logit, total, top in zip(rows, drawn, scores.logits_of(drawn), totals, tops, strict=True)
    ]


def numbers(scores: Scores) -> list[float]:
    """`log_total` as numbers. Raises UserError where it is none, as it is wherever a logit is none."""
    if any(map(math.isnan, scores.log_total)):
        raise UserError("the model's logits are not numbers (NaN): its weights are damaged, or its training had diverged")
    return scores.log_total


def _likeliest(logits: Tensor, totals: Sequence[float], n_top: int) -> list[tuple[tuple[int, float], ...]]:
    values, ids = (x.tolist() for x in logits.topk(min(n_top, logits.size(-1))))  # (n, n_top)
    return [
        tuple((token_id, value - total) for token_id, value in zip(row_ids, row_values, strict=True))
        for row_ids, row_values, total in zip(ids, values, totals, strict=True)
    ]
