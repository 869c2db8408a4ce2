"""Token shards to batches, as a pure function of (seed, step, micro-batch, rank): no loader state, nothing replays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from glassgpt.config import UserError

PERIOD = 1000
"""Windows after which a mixture of domains has its shares exactly (to the nearest thousandth)."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Windows of one micro-step."""

    ids: Tensor
    """(B, T) int64."""
    targets: Tensor
    """(B, T) int64: `ids` one position further."""
    segments: Tensor | None = None
    """(B, T) int64: number of the document within its row, where documents are kept apart."""

    @property
    def count(self) -> int:
        """Tokens that the loss is summed over."""
        return self.targets.numel()


class Place(NamedTuple):
    """Where a window was cut."""

    domain: int
    array: int
    """Which of the domain's shards."""
    start: int
    """Its first token."""


@dataclass(frozen=True, eq=False)
class Windows:
    """The endless sequence of windows of `context_tokens` + 1 ids over a list of id arrays.

    Every epoch cuts the arrays at a new offset and visits each window once, in a new order. All of it follows from `seed`.
    """

    arrays: Sequence[np.ndarray]
    context_tokens: int
    seed: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self):
            longest = max((len(array) for array in self.arrays), default=0)
            raise UserError(
                f"the text is too short: its longest shard has {longest} tokens; a window of context {self.context_tokens} needs"
                f" {2 * self.context_tokens} (give more text or a smaller context_tokens)"
            )

    def __len__(self) -> int:
        """Windows in one epoch. The offset of an epoch is below T, so each array has room for (n - T) // T of them."""
        return sum(self._room)

    @cached_property
    def _room(self) -> list[int]:
        return [max(0, (len(array) - self.context_tokens) // self.context_tokens) for array in self.arrays]

    def place(self, number: int) -> tuple[int, int]:
        """(array, start) of the window with this number, counted over all epochs."""
        epoch, place = divmod(number, len(self))
        offset, order = _epoch_plan(self.seed, epoch, len(self), self.context_tokens)
        index = int(order[place])
        for array, room in enumerate(self._room):
            if index < room:
                return array, offset + index * self.context_tokens
            index -= room
        raise AssertionError("unreachable: index is below the number of windows")


@dataclass(frozen=True, eq=False)
class Stream:
    """Batches of windows over one or several domains, mixed in given shares.

    A resumed run continues exactly where it stopped, on any number of ranks, and any batch can be asked for again.
    """

    domains: Sequence[Windows]
    shares: Sequence[float]
    """Share of each domain among the windows; they add up to 1."""
    batch_size: int
    """Windows in a micro-batch of one rank."""
    accumulation_steps: int = 1
    """Micro-batches of one rank in a step."""
    world: int = 1
    end_id: int | None = None
    """Id that ends documents, when they are to be kept apart."""

    def batch(self, step: int, micro: int = 0, rank: int = 0) -> Batch:
        """The batch of one micro-step of one rank."""
        T = self.domains[0].context_tokens
        rows = [
            self.domains[place.domain].arrays[place.array][place.start : place.start + T + 1]
            for place in self.places(step, micro, rank)
        ]
        window = torch.from_numpy(np.stack(rows).astype(np.int64))  # (B, T + 1)
        return apart(window, self.end_id)

    def places(self, step: int, micro: int = 0, rank: int = 0) -> list[Place]:
        """Where the rows of a batch come from."""
        first = ((step * self.accumulation_steps + micro) * self.world + rank) * self.batch_size
        return [self._place(number) for number in range(first, first + self.batch_size)]

    def _place(self, number: int) -> Place:
        if len(self.domains) == 1:
            return Place(0, *self.domains[0].place(number))
        periods, rest = divmod(number, PERIOD)
        turn, before = _turns(tuple(self.shares))
        domain = int(turn[rest])
        return Place(domain, *self.domains[domain].place(periods * int(before[-1, domain]) + int(before[rest, domain])))


def apart(window: Tensor, end_id: int | None) -> Batch:
    """The batch of windows (B, T + 1); with `end_id`, the documents of a row get numbers."""
    ids, targets = window[:, :-1], window[:, 1:]
    if end_id is None:
        return Batch(ids, targets)
    ends = (ids == end_id).long()
    return Batch(ids, targets, ends.cumsum(dim=1) - ends)  # the end token belongs to the document that it ends


@lru_cache(maxsize=16)
def _turns(shares: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A period's domains in turn (PERIOD,), and how many windows each domain has had before each turn (PERIOD + 1, n).

    Quotas by largest remainder, at least one each, then the domain that lags its share the most goes next.
    """
    exact = np.array(shares) / sum(shares) * PERIOD
    quota = np.maximum(1, np.floor(exact)).astype(int)
    while quota.sum() > PERIOD:
        quota[np.argmax(quota)] -= 1
    for domain in np.argsort(quota - exact, kind="stable")[: PERIOD - quota.sum()]:
        quota[domain] += 1
    turn = np.empty(PERIOD, int)
    before = np.zeros((PERIOD + 1, len(shares)), int)
    for number in range(PERIOD):
        turn[number] = np.argmax(quota * (number + 1) / PERIOD - before[number])
        before[number + 1] = before[number]
        before[number + 1, turn[number]] += 1
    return turn, before


class InOrder(Sequence[Batch]):
    """Every array once, front to back, each target in one window: for validation. An array's rest is a shorter window.

    A batch is read when it is asked for. Raises UserError when the text has fewer than two
    tokens.
    """

    def __init__(self, arrays: Sequence[np.ndarray], context_tokens: int, batch_size: int, end_id: int | None = None) -> None:
        T = context_tokens
        rows = [array[start : start + T + 1] for array in arrays for start in range(0, len(array) - 1, T)]
        if not rows:
            raise UserError("the held-out text has fewer than two tokens; give more text or a larger data.holdout_share")
        alike = [list(group) for _, group in groupby(rows, key=len)]  # only rows of one length make a tensor
        self._groups = [group[first : first + batch_size] for group in alike for first in range(0, len(group), batch_size)]
        self._end_id = end_id

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: Any) -> Any:
        return apart(torch.from_numpy(np.stack(self._groups[index]).astype(np.int64)), self._end_id)  # (B, T + 1)

    def every(self, apart: int) -> Iterator[Batch]:
        """Each batch whose number `apart` divides, one at a time."""
        return (self[number] for number in range(0, len(self), apart))


@lru_cache(maxsize=64)
def _epoch_plan(seed: tuple[int, ...], epoch: int, n_windows: int, context_tokens: int) -> tuple[int, np.ndarray]:
    generator = np.random.default_rng([seed[0], epoch, *seed[1:]])
    return int(generator.integers(context_tokens)), generator.permutation(n_windows)
