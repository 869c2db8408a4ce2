"""A small language model of counts, to judge the texts of a large one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

ORDER = 3


class Ngram:
    """Interpolated Kneser-Ney of token ids (Kneser & Ney 1995; Chen & Goodman 1999, eq. 9 to 11, one discount an order).

    The longest runs count how often they occur, shorter ones after how many different ids; below single ids all are alike.
    """

    def __init__(self, texts: Iterable[Sequence[int]], vocab_size: int, order: int = ORDER) -> None:
        self.order, self.vocab_size = order, vocab_size
        counts = Counter(tuple(text[i : i + order]) for text in texts for i in range(len(text) - order + 1))
        levels = [counts]
        for _ in range(order - 1):
            levels.append(Counter(run[1:] for run in levels[-1]))
        self._counts = levels[::-1]  # of runs of 1, 2, ... ids
        self._totals: list[Counter[tuple[int, ...]]] = []
        self._followers: list[Counter[tuple[int, ...]]] = []
        self._discounts = []
        for level in self._counts:
            totals: Counter[tuple[int, ...]] = Counter()
            for run, count in level.items():
                totals[run[:-1]] += count
            self._totals.append(totals)
            self._followers.append(Counter(run[:-1] for run in level))
            once, twice = (sum(count == n for count in level.values()) for n in (1, 2))
            self._discounts.append(once / (once + 2 * twice) if once and twice else 0.5)

    def probability(self, before: Sequence[int], token: int) -> float:
        """p(token | the last order - 1 ids of `before`); fewer are fine."""
        before = tuple(before[max(0, len(before) - self.order + 1) :])
        p = 1 / self.vocab_size
        for size in range(len(before) + 1):
            context = before[len(before) - size :]
            total = self._totals[size][context]
            if not total:
                break  # never seen, so no longer one was
            discount = self._discounts[size]
            own = max(0.0, self._counts[size][*context, token] - discount)
            p = (own + discount * self._followers[size][context] * p) / total
        return p

    def bits(self, before: Sequence[int], ids: Sequence[int]) -> list[float]:
        """-log2 p of each of the ids, which go on after `before`."""
        text = [*before, *ids]
        first = len(before)
        return [-math.log2(self.probability(text[max(0, i - self.order + 1) : i], text[i])) for i in range(first, len(text))]
