"""Windows of tokens from all over a text: to calibrate on, and to measure the loss of several models on the same tokens.

N windows, T tokens of each that are read.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from glassgpt import data
from glassgpt.config import UserError
from glassgpt.data import Batch
from glassgpt.model import GPT
from glassgpt.text import Tokenizer
from glassgpt.train.evaluate import measure
from glassgpt.train.loss import Scored
from glassgpt.train.parallel import Ranks

POOL = 16
"""So many times the tokens that are wanted are read, and every so many-th window of them is taken: many documents."""
ROWS = 8
"""Windows in one forward pass."""


def windows(
    sources: Sequence[str], split: str, holdout_share: float, tokenizer: Tokenizer, context_tokens: int, tokens: int, seed: int
) -> Tensor:
    """About `tokens` tokens as windows (N, T + 1) of ids, evenly from the documents in an order that `seed` draws.

    `split` is val for the documents that `pretrain` holds out for `holdout_share`, train for the others; with 1 both are all.
    T is `context_tokens`, or all of a shorter text. Raises UserError for text that cannot be read or has fewer than two tokens.
    """
    texts = list(data.documents(sources))
    if holdout_share < 1:
        texts = [text for part, text in data.shards.hold_out(texts, holdout_share) if part == split]
    random.Random(seed).shuffle(texts)
    begin, end = ([] if token_id is None else [token_id] for token_id in (tokenizer.begin_id, tokenizer.end_id))
    ids: list[int] = []
    while texts and len(ids) <= POOL * tokens:
        ids += itertools.chain(begin, tokenizer.encode(texts.pop()), end)
    size = min(context_tokens, len(ids) - 1) + 1
    if size < 2:
        raise UserError(f"{' '.join(sources)}: fewer than two tokens of text; give more")
    whole = torch.tensor(ids[: len(ids) // size * size]).view(-1, size)  # (windows, T + 1)
    wanted = min(len(whole), max(1, round(tokens / (size - 1))))
    return whole[torch.arange(wanted) * len(whole) // wanted]


def bits_per_byte(model: GPT, ids: Tensor, tokenizer: Tokenizer) -> float:
    """Mean loss of the windows (N, T + 1), each read by itself: nats / ln 2 / the bytes that the predicted tokens stand for."""
    device = next(model.parameters()).device
    batches = (Batch(rows[:, :-1], rows[:, 1:]) for rows in ids.split(ROWS))
    byte_lengths = torch.tensor(tokenizer.byte_lengths(), device=device)
    return measure(Scored(model), batches, byte_lengths, contextlib.nullcontext(), Ranks(device))["bits_per_byte"]
