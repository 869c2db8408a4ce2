"""Loss against what a model can see: by position, and with the context cut. Bits per token throughout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glassgpt.data.progress import Progress
from glassgpt.generation.sampling import exact
from glassgpt.lab.bootstrap import Interval, intervals, means, weights
from glassgpt.model import GPT

WITHIN_SHARE, WITHIN_BITS = 0.01, 0.01
"""How near to the loss with all of the context a cut one counts as as good."""


@dataclass(frozen=True)
class Point:
    """Mean loss of the tokens that see `low` to `high` tokens before them."""

    low: int
    high: int
    bits: Interval


@dataclass(frozen=True)
class Reach:
    """The smallest context from which on no larger one tried is better by more than a margin; its interval over documents."""

    tokens: int
    low: int
    high: int


# ---------------------------------------------------------------------- by position


@torch.inference_mode()
def position_bits(model: GPT, rows: Tensor, batch: int, progress: Progress | None = None) -> np.ndarray:
    """Loss (N, T) of every token of rows (N, T + 1) but the first; column t sees t + 1 tokens."""
    found = []
    for first in range(0, len(rows), batch):
        some = rows[first : first + batch]
        logits = model(some[:, :-1])  # (n, T, V)
        found.append(_bits(logits.flatten(0, 1), some[:, 1:].flatten()).reshape(len(some), -1))
        if progress:
            progress(min(first + batch, len(rows)), len(rows))
    return np.concatenate(found)


def buckets(tokens: int) -> list[tuple[int, int]]:
    """1, 2, 3-4, 5-8, ... up to `tokens`, as (first, last)."""
    found, low = [], 1
    while low <= tokens:
        high = min(tokens, 1 if low == 1 else 2 * (low - 1))
        found.append((low, high))
        low = high + 1
    return found


def by_position(bits: np.ndarray, document: Sequence[int], resamples: int, seed: int) -> list[Point]:
    """Means of `position_bits` (N, T) by bucket; `document` (N,) says which document a row is from."""
    ranges = buckets(bits.shape[1])
    sums = by_document(np.stack([bits[:, low - 1 : high].sum(1) for low, high in ranges], axis=1), document)
    sizes = np.array([high - low + 1 for low, high in ranges])
    counts = by_document(np.tile(sizes, (len(bits), 1)), document)
    found = intervals(sums, counts, resamples, seed)
    return [Point(low, high, interval) for (low, high), interval in zip(ranges, found, strict=True)]


def by_document(rows: np.ndarray, document: Sequence[int]) -> np.ndarray:
    """Rows (N, columns) summed by document: (documents, columns)."""
    names, places = np.unique(np.asarray(document), return_inverse=True)
    found = np.zeros((len(names), rows.shape[1]))
    np.add.at(found, places, rows)
    return found


# ---------------------------------------------------------------------- context cut


def lengths(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself."""
    return [*(2**n for n in range(most.bit_length()) if 2**n < most), most]


def cut_bits(
    model: GPT, rows: Tensor, sizes: Sequence[int], batch_tokens: int, start: Sequence[int] = (), progress: Progress | None = None
) -> np.ndarray:
    """Loss (N, len(sizes)) of the last token of rows (N, T + 1), seeing no more than the last k tokens before it.

    A row for each token and k: positions count from 0, as in a text that begins there, after `start` if texts begin with it.
    """
    found = np.empty((len(rows), len(sizes)))
    total, done = len(rows) * sum(sizes), 0
    for column, k in enumerate(sizes):
        for first, some in _batches(rows, max(1, batch_tokens // k)):
            before = torch.tensor(list(start), device=rows.device, dtype=rows.dtype).expand(len(some), -1)
            seen = torch.cat([before, some[:, -1 - k : -1]], dim=1)  # (n, start + k)
            found[first : first + len(some), column] = _last_bits(model, seen, some[:, -1])
            done += k * len(some)
            if progress:
                progress(done, total)
    return found


def _batches(rows: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    for first in range(0, len(rows), size):
        yield first, rows[first : first + size]


@torch.inference_mode()
def _last_bits(model: GPT, seen: Tensor, targets: Tensor) -> np.ndarray:
    logits = model.logits(model.hidden(seen)[:, -1])  # (n, V): the head is asked once a row
    return _bits(logits, targets)


def _bits(logits: Tensor, targets: Tensor) -> np.ndarray:
    """-log2 p of targets (n,) under logits (n, V)."""
    return F.cross_entropy(exact(logits), targets, reduction="none").double().cpu().numpy() / math.log(2)


def reach(
    bits: np.ndarray,
    sizes: Sequence[int],
    document: Sequence[int],
    margin: Callable[[np.ndarray], np.ndarray],
    resamples: int,
    seed: int,
) -> Reach:
    """The smallest k of `cut_bits` that is, with all larger ones, within a margin of the longest; resampled over documents.

    `margin(full)` gives the bits that count as near from the loss with all of the context, (R,) -> (R,).
    """
    sums = by_document(bits, document)
    counts = by_document(np.ones_like(bits), document)
    drawn = np.concatenate([np.ones((1, len(sums)), dtype=int), weights(len(sums), resamples, seed)])
    values = means(sums, counts, drawn)  # (1 + resamples, sizes)
    near = values <= (values[:, -1] + margin(values[:, -1]))[:, None]
    stays = np.flip(np.logical_and.accumulate(np.flip(near, 1), axis=1), 1)
    places = stays.argmax(1)
    low, high = np.quantile(places[1:], (0.025, 0.975), method="nearest")
    return Reach(*(int(sizes[int(place)]) for place in (places[0], low, high)))


def mean_bits(bits: np.ndarray, document: Sequence[int], resamples: int, seed: int) -> list[Interval]:
    """The mean of each column of `cut_bits`."""
    return intervals(by_document(bits, document), by_document(np.ones_like(bits), document), resamples, seed)


def gain_bits(bits: np.ndarray, document: Sequence[int], resamples: int, seed: int) -> list[Interval]:
    """How much more each cut costs than all of the context, paired by target: the mean and its interval."""
    return mean_bits(bits - bits[:, -1:], document, resamples, seed)
