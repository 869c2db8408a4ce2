"""Numbers that say how varied, how repetitive and how broken texts are. Texts are lists of token ids or of words."""

from __future__ import annotations

import codecs
import math
import re
from collections import Counter
from collections.abc import Collection, Hashable, Sequence

WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
EPSILON = 0.1
"""What a zero count is in BLEU: smoothing method 1 of Chen & Cherry 2014, which Texygen's self-BLEU has."""

Text = Sequence[Hashable]


def ngrams(text: Text, n: int) -> list[tuple[Hashable, ...]]:
    """The runs of `n` items of a text, in order."""
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


def repeats(text: Text, n: int = 3) -> list[bool]:
    """For every run of `n` items whether it equals an earlier run of the same text."""
    seen: set[tuple[Hashable, ...]] = set()
    found = []
    for run in ngrams(text, n):
        found.append(run in seen)
        seen.add(run)
    return found


def repeated_share(text: Text, n: int = 3) -> float:
    """Share of the runs of `n` items that equal an earlier run; 0 for fewer than `n` items."""
    found = repeats(text, n)
    return sum(found) / len(found) if found else 0.0


def distinct(texts: Sequence[Text], n: int) -> float:
    """distinct-n (Li et al. 2016): different runs of `n` items over all runs, in all texts together; 0 when there are none.

    It falls as texts grow longer or more: compare only equal numbers of texts of equal length.
    """
    runs = [run for text in texts for run in ngrams(text, n)]
    return len(set(runs)) / len(runs) if runs else 0.0


def self_bleu(texts: Sequence[Text], n: int = 4) -> float:
    """Self-BLEU-n (Zhu et al. 2018): the mean BLEU of each text with all others as references; 1 when all are alike, 0 for one.

    BLEU of runs of 1 to `n` items (Papineni et al. 2002) with equal weights, the brevity penalty against the reference of the
    closest length, and EPSILON for a zero count.
    """
    if len(texts) < 2:
        return 0.0
    logs = [0.0] * len(texts)
    for order in range(1, n + 1):
        counts = [Counter(ngrams(text, order)) for text in texts]
        best = _best_two(counts)
        for place, count in enumerate(counts):
            matches = sum(min(times, _of_others(best[run], place)) for run, times in count.items())
            logs[place] += math.log((matches or EPSILON) / max(1, count.total())) / n
    return sum(math.exp(log) * _brevity(texts, place) for place, log in enumerate(logs)) / len(texts)


def _best_two(counts: Sequence[Counter[tuple[Hashable, ...]]]) -> dict[tuple[Hashable, ...], tuple[int, int, int]]:
    """For each run its largest count, the text that has it, and the largest of the other texts."""
    best: dict[tuple[Hashable, ...], tuple[int, int, int]] = {}
    for place, count in enumerate(counts):
        for run, times in count.items():
            first, where, second = best.get(run, (0, -1, 0))
            best[run] = (times, place, first) if times > first else (first, where, max(second, times))
    return best


def _of_others(best: tuple[int, int, int], place: int) -> int:
    first, where, second = best
    return second if where == place else first


def _brevity(texts: Sequence[Text], place: int) -> float:
    own = len(texts[place])
    closest = min((abs(len(other) - own), len(other)) for i, other in enumerate(texts) if i != place)[1]
    return 1.0 if own > closest or not own else math.exp(1 - closest / own)


# ---------------------------------------------------------------------- words and bytes


def words(text: str) -> list[str]:
    """The words of a text in lower case: letters of any script, with apostrophes and hyphens inside."""
    return [found.group().lower() for found in WORD.finditer(text)]


def unknown_share(text: str, known: Collection[str]) -> float:
    """Share of the words that are not among the known ones. 1 for a text without words: that is no text either."""
    found = words(text)
    return sum(word not in known for word in found) / len(found) if found else 1.0


def invalid_share(data: bytes) -> float:
    """Share of bytes that are not part of valid UTF-8; a character that the end cuts off does not count."""
    decoded = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape").decode(data)
    return sum("\udc80" <= character <= "\udcff" for character in decoded) / len(data) if data else 0.0


# ---------------------------------------------------------------------- where a text breaks down


def window_means(values: Sequence[float], size: int) -> list[float]:
    """Means of every run of `size` values; of all of them when there are fewer."""
    size = min(size, len(values))
    return [math.fsum(values[i : i + size]) / size for i in range(len(values) - size + 1)] if size else []


def first_above(values: Sequence[float], size: int, limit: float) -> int | None:
    """Where the first run of `size` values begins whose mean is above the limit; None when there is none."""
    return next((place for place, mean in enumerate(window_means(values, size)) if mean > limit), None)
