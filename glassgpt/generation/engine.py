"""Prefill and decode: prompts in, tokens out one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glassgpt.config import UserError
from glassgpt.config.generate import Sampling
from glassgpt.generation.cache import KVCache, as_batch
from glassgpt.generation.sampling import choose, exact, penalised
from glassgpt.model import GPT


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


@torch.inference_mode()
def stream(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    max_new_tokens: int,
    ends: Callable[[Token], bool] = lambda token: False,
    n_top: int = 0,
    n_ids: int | None = None,
) -> Iterator[Token]:
    """Continue each prompt; yields every token as it is drawn, all rows of a step together, rows in order.

    The first forward pass reads the prompts (prefill); every later one feeds one token a row through the cache (decode).
    A row goes on until `ends(token)` is true, `max_new_tokens` are written, or the context is full; it then leaves the
    batch. `generators` holds one random generator a row. Only the first `n_ids` of the vocabulary can be drawn (all if not
    given): some models have more rows than their tokenizer has tokens. Raises UserError for an empty or too long prompt.
    """
    device = next(model.parameters()).device
    prompts = [fit(ids, model.config.context_tokens) for ids in prompts]
    room = [min(max_new_tokens, model.config.context_tokens - len(ids) + 1) for ids in prompts]
    ids, pad = as_batch(prompts, device)  # (B, T), (B,)
    rows = list(range(len(prompts)))
    cache = KVCache(model.config)
    history = History(prompts, n_ids or model.config.vocab_size, device) if History.matters(sampling) else None
    step = 0
    while rows:
        logits = exact(model.logits(model.hidden(ids, cache, pad)[:, -1])[:, :n_ids])  # (B, V)
        if logits.isnan().any():
            raise UserError("the model's logits are not numbers (NaN): its weights are damaged, or its training had diverged")
        wanted = penalised(logits, sampling, history.seen, history.written) if history else logits
        drawn = choose(wanted, sampling, [generators[row] for row in rows])  # (B,)
        step += 1
        tokens = _tokens(rows, drawn, logits.log_softmax(-1), n_top)
        yield from tokens
        ids = drawn[:, None]  # (B, 1)
        if history:
            history.add(drawn)
        left = [i for i, token in enumerate(tokens) if not ends(token) and step < room[token.row]]
        if left and len(left) < len(rows):
            index = torch.tensor(left, device=device)
            ids, pad, drop = ids[index], *_trimmed(pad, index)
            cache.keep(index, drop)
            if history:
                history.keep(index)
        rows = [rows[i] for i in left]


def _tokens(rows: list[int], drawn: Tensor, log_p: Tensor, n_top: int) -> list[Token]:
    chosen = log_p.gather(-1, drawn[:, None]).squeeze(-1).tolist()
    values, ids = (t.tolist() for t in log_p.topk(min(n_top, log_p.size(-1)))) if n_top else ([()] * len(rows),) * 2
    return [
        Token(row, token_id, logprob, tuple(zip(top_ids, top_values, strict=True)))
        for row, token_id, logprob, top_ids, top_values in zip(rows, drawn.tolist(), chosen, ids, values, strict=True)
    ]


def _trimmed(pad: Tensor | None, index: Tensor) -> tuple[Tensor | None, int]:
    """Padding of the rows that stay, less what is common to all, and how much that is.

    The longest row that stays then starts at position 0, so the padded length never passes the context.
    """
    if pad is None:
        return None, 0
    pad = pad[index]
    common = int(pad.min())
    return (pad - common if bool((pad > common).any()) else None), common


class History:
    """Which tokens each row has seen (B, V) and how often it wrote each one (B, V): what penalties look at."""

    def __init__(self, prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> None:
        self.seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
        self.written = torch.zeros(len(prompts), vocab_size, device=device)
        for row, ids in enumerate(prompts):
            self.seen[row, list(ids)] = True

    @staticmethod
    def matters(sampling: Sampling) -> bool:
        return (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1, 0, 0)

    def add(self, drawn: Tensor) -> None:
        """Count one new token (B,) a row."""
        self.seen.scatter_(1, drawn[:, None], True)
        self.written.scatter_add_(1, drawn[:, None], torch.ones_like(drawn[:, None], dtype=self.written.dtype))

    def keep(self, rows: Tensor) -> None:
        self.seen, self.written = self.seen[rows], self.written[rows]
