"""Token shards to batches, as a pure function of (seed, step, micro-batch, rank): no loader state, nothing replays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from glassgpt.config import UserError


@dataclass(frozen=True, eq=False)
class Batch:
    """Windows of one micro-step."""

    ids: Tensor
    """(B, T) int64."""
    targets: Tensor
    """(B, T) int64: `ids` one position further."""

    @property
    def count(self) -> int:
        """Tokens that the loss is summed over."""
        return self.targets.numel()


@dataclass(frozen=True, eq=False)
class Stream:
    """Windows of `context_tokens` + 1 ids over a list of id arrays.

    Every epoch cuts the arrays into windows at a new offset and visits each window once, in a new order. All of it
    follows from `seed`, so a resumed run continues exactly where it stopped and any batch can be asked for again.
    """

    arrays: Sequence[np.ndarray]
    context_tokens: int
    batch_size: int
    accumulation_steps: int = 1
    world: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not len(self):
            longest = max((len(array) for array in self.arrays), default=0)
            raise UserError(
                f"the text is too short: its longest shard has {longest} tokens; a window of context {self.context_tokens} needs"
                f" {2 * self.context_tokens} (give more text or a smaller context_tokens)"
            )

    def __len__(self) -> int:
        """Windows in one epoch. The offset of an epoch is below T, so each array has room for (n - T) // T of them."""
        return sum(self._windows(array) for array in self.arrays)

    def _windows(self, array: np.ndarray) -> int:
        return max(0, (len(array) - self.context_tokens) // self.context_tokens)

    def batch(self, step: int, micro: int = 0, rank: int = 0) -> Batch:
        """The batch of one micro-step of one rank."""
        first = ((step * self.accumulation_steps + micro) * self.world + rank) * self.batch_size
        rows = [self._window(first + row) for row in range(self.batch_size)]
        window = torch.from_numpy(np.stack(rows).astype(np.int64))  # (B, T + 1)
        return Batch(window[:, :-1], window[:, 1:])

    def _window(self, number: int) -> np.ndarray:
        epoch, place = divmod(number, len(self))
        offset, order = _epoch_plan(self.seed, epoch, len(self), self.context_tokens)
        index = int(order[place])
        for array in self.arrays:
            if index < self._windows(array):
                start = offset + index * self.context_tokens
                return array[start : start + self.context_tokens + 1]
            index -= self._windows(array)
        raise AssertionError("unreachable: index is below the number of windows")


def in_order(arrays: Sequence[np.ndarray], context_tokens: int, batch_size: int) -> list[Batch]:
    """Every array once, front to back, each target in one window: for validation. An array's rest is a shorter window.

    Raises UserError when the text has fewer than two tokens.
    """
    T = context_tokens
    rows = [array[start : start + T + 1] for array in arrays for start in range(0, len(array) - 1, T)]
    if not rows:
        raise UserError("the held-out text has fewer than two tokens; give more text or a larger data.holdout_share")
    batches = []
    for _, group in groupby(rows, key=len):  # only rows of one length make a tensor
        alike = list(group)
        for first in range(0, len(alike), batch_size):
            window = torch.from_numpy(np.stack(alike[first : first + batch_size]).astype(np.int64))  # (B, T + 1)
            batches.append(Batch(window[:, :-1], window[:, 1:]))
    return batches


@lru_cache(maxsize=4)
def _epoch_plan(seed: int, epoch: int, n_windows: int, context_tokens: int) -> tuple[int, np.ndarray]:
    generator = np.random.default_rng([seed, epoch])
    return int(generator.integers(context_tokens)), generator.permutation(n_windows)
