"""Do the words of a prompt come again? Shares of content words that a prompt has, by distance, against other prompts."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from glassgpt.lab.bootstrap import Interval, intervals
from glassgpt.lab.text_measures import WORD, words
from glassgpt.text import Tokenizer

COMMON_WORDS = 200
"""So many of the source's most frequent words are of no topic."""
LEAST_LETTERS = 3
NEAREST_TOKENS = 32
"""The nearest range of distances: shorter ones hold too few words."""


@dataclass(frozen=True)
class Shares:
    """Of the content words at tokens `low` to `high` after the prompt, the share that the prompt has."""

    low: int
    high: int
    own: Interval
    """In the text's own prompt."""
    others: Interval
    """In the prompts of the other texts, on average: what there is by chance."""
    more: Interval
    """The difference, paired by text."""
    words: int


def common_words(texts: Iterable[str]) -> frozenset[str]:
    """The COMMON_WORDS most frequent words."""
    return frozenset(word for word, _ in Counter(word for text in texts for word in words(text)).most_common(COMMON_WORDS))


def is_content(word: str, common: frozenset[str]) -> bool:
    return len(word) >= LEAST_LETTERS and word not in common


def placed_words(tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[int, str]]:
    """The words of a text with the number of the token, from 1, that each begins in. A word that may have begun before the
    text, at its very start, is left out."""
    pieces = [b"" if tokenizer.is_special(token) else tokenizer.token_bytes(token) for token in ids]
    ends = list(accumulate(map(len, pieces)))
    text = b"".join(pieces).decode("utf-8", errors="surrogateescape")
    starts = [0, *accumulate(len(character.encode("utf-8", "surrogateescape")) for character in text)]
    return [(bisect_right(ends, starts[m.start()]) + 1, m.group().lower()) for m in WORD.finditer(text) if m.start()]


def shares(
    texts: Sequence[Sequence[tuple[int, str]]],
    prompts: Sequence[frozenset[str]],
    ranges: Sequence[tuple[int, int]],
    common: frozenset[str],
    resamples: int,
    seed: int,
) -> list[Shares]:
    """For each range of tokens; `texts` are `placed_words`, `prompts` the content words of each one's prompt.

    A range in which no text has a content word is left out. Intervals are over texts.
    """
    holders = Counter(word for prompt in prompts for word in prompt)
    others = len(prompts) - 1
    tables = np.zeros((3, len(texts), len(ranges)))  # hits in the own prompt, in the others, words
    for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        for token, word in text:
            column = next((i for i, (low, high) in enumerate(ranges) if low <= token <= high), None)
            if column is not None and is_content(word, common):
                in_own = word in prompt
                tables[:, row, column] += (in_own, (holders[word] - in_own) / others, 1)
    own, chance, counts = tables[:, :, (tables[2].sum(0) > 0)]
    if not counts.size:
        return []
    kept = [each for each, count in zip(ranges, tables[2].sum(0), strict=True) if count]
    found = [intervals(sums, counts, resamples, seed) for sums in (own, chance, own - chance)]
    return [
        Shares(low, high, mine, theirs, more, int(count))
        for (low, high), count, mine, theirs, more in zip(kept, counts.sum(0), *found, strict=True)
    ]
