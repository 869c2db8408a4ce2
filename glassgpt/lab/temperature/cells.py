"""What `glassgpt lab temperature` makes of its texts: measures of a cell, the band of real text, the usable range."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

import numpy as np

from glassgpt.lab import text_measures as measure

WINDOW_TOKENS = 16
"""A text breaks down where the mean of so many tokens is beyond what real text has."""
RARE = 0.95
"""Beyond: above the largest such mean of this share of the real texts."""
FREE = 0.01
"""Shares may pass the widened band by so much: a band of real text can be 0 wide."""
MEASURES = {
    "entropy_bits": "entropy of what is drawn from, bits",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "distinct_3": "distinct-3",
    "repeated_3": "repeated 3-grams",
    "repeated_4": "repeated 4-grams",
    "self_bleu": "self-BLEU-4",
    "own_perplexity": "perplexity under the model",
    "judge_perplexity": "perplexity under the judge",
    "unknown_words": "words unknown to real text",
    "invalid_bytes": "bytes that are not UTF-8",
    "loop_share": "texts that fall into a loop",
    "chaos_share": "texts that fall apart",
}
"""What is measured, and how it is called."""
LARGE = "large"
"""A format of its own: perplexities go from 1 to millions."""
COLUMNS = {
    "entropy_bits": ("entropy", ".2f"),
    "distinct_1": ("dist-1", ".2f"),
    "distinct_2": ("dist-2", ".2f"),
    "distinct_3": ("dist-3", ".2f"),
    "repeated_3": ("rep-3", ".1%"),
    "repeated_4": ("rep-4", ".1%"),
    "self_bleu": ("sBLEU", ".2f"),
    "own_perplexity": ("own", LARGE),
    "judge_perplexity": ("judge", LARGE),
    "unknown_words": ("unknown", ".1%"),
    "invalid_bytes": ("bad", ".1%"),
    "loop_share": ("loops", ".0%"),
    "chaos_share": ("apart", ".0%"),
}
"""Heading and format of each measure in tables."""


@dataclass(frozen=True, eq=False)
class Written:
    """One text, generated or real."""

    ids: list[int]
    data: bytes
    """Its bytes, without special tokens."""
    own_bits: list[float]
    entropy_bits: list[float] | None
    """None for real text: nobody drew it."""
    judge_bits: list[float] | None

    @property
    def text(self) -> str:
        return self.data.decode("utf-8", errors="replace")

    @property
    def repeats(self) -> list[float]:
        """1 for each 3-gram that the text has had before, else 0."""
        return [float(is_repeat) for is_repeat in measure.repeats(self.ids)]


@dataclass(frozen=True)
class Limits:
    """The largest means of WINDOW_TOKENS that a share of RARE of the real texts stay within."""

    repeats: float
    judge_bits: float | None


@dataclass(frozen=True)
class Measures:
    """Of all texts of a cell, or of a group of real texts. None: not measured (no judge, no reference, or no distribution)."""

    entropy_bits: float | None
    distinct_1: float
    distinct_2: float
    distinct_3: float
    repeated_3: float
    repeated_4: float
    self_bleu: float
    own_perplexity: float
    judge_perplexity: float | None
    """Per token of the model, whatever the judge's own tokens are."""
    unknown_words: float | None
    invalid_bytes: float
    loop_share: float | None
    """Share of texts with a run of tokens that repeats more than real text does."""
    loop_token: float | None
    """Median place where such a run begins."""
    chaos_share: float | None
    """Share of texts with a run of tokens that the judge finds less likely than any run of real text."""
    chaos_token: float | None


def limits_of(real: Sequence[Written]) -> Limits | None:
    """What real text stays within; None without real text."""
    if not real:
        return None

    def limit(values: Sequence[Sequence[float]]) -> float:
        return float(np.quantile([max(measure.window_means(each, WINDOW_TOKENS), default=0.0) for each in values], RARE))

    judged = [text.judge_bits for text in real if text.judge_bits is not None]
    return Limits(limit([text.repeats for text in real]), limit(judged) if judged else None)


def measures_of(texts: Sequence[Written], known: Collection[str] | None, limits: Limits | None) -> Measures:
    """All measures of some texts of equal length."""
    ids = [text.ids for text in texts]
    entropies = [bits for text in texts for bits in text.entropy_bits or []]
    judged = [bits for text in texts for bits in text.judge_bits or []]
    loop: tuple[float | None, float | None] = (None, None)
    chaos = loop
    if limits is not None:
        loop = _breakdown([text.repeats for text in texts], limits.repeats)
        if limits.judge_bits is not None:
            chaos = _breakdown([text.judge_bits or [] for text in texts], limits.judge_bits)
    return Measures(
        entropy_bits=fmean(entropies) if entropies else None,
        distinct_1=measure.distinct(ids, 1),
        distinct_2=measure.distinct(ids, 2),
        distinct_3=measure.distinct(ids, 3),
        repeated_3=fmean(measure.repeated_share(each, 3) for each in ids),
        repeated_4=fmean(measure.repeated_share(each, 4) for each in ids),
        self_bleu=measure.self_bleu(ids),
        own_perplexity=2 ** fmean(bits for text in texts for bits in text.own_bits),
        judge_perplexity=2 ** fmean(judged) if judged else None,
        unknown_words=None if known is None else fmean(measure.unknown_share(text.text, known) for text in texts),
        invalid_bytes=fmean(measure.invalid_share(text.data) for text in texts),
        loop_share=loop[0],
        loop_token=loop[1],
        chaos_share=chaos[0],
        chaos_token=chaos[1],
    )


def _breakdown(texts: Sequence[Sequence[float]], limit: float) -> tuple[float, float | None]:
    """The share of texts that break down, and the median place where they do."""
    places = [measure.first_above(values, WINDOW_TOKENS, limit) for values in texts]
    broken = [place for place in places if place is not None]
    return len(broken) / len(texts), float(median(broken)) if broken else None


# ---------------------------------------------------------------------- result


@dataclass(frozen=True)
class Cell:
    """One temperature and top-p."""

    temperature: float
    top_p: float
    measures: Measures
    texts: list[str]
    """The first text of each prompt."""


@dataclass(frozen=True)
class Result:
    """What the experiment found."""

    config: dict[str, Any]
    prompts: list[str]
    judge: str
    """Its name; empty when there is none."""
    cells: list[Cell]
    real: list[Measures]
    """Of each group of real texts; empty without a reference."""
    limits: Limits | None

    def at(self, top_p: float) -> list[Cell]:
        """The cells of one top-p, in the order of the temperatures."""
        return [cell for cell in self.cells if cell.top_p == top_p]

    def band(self, name: str) -> tuple[float, float] | None:
        """Lowest and highest value of a measure in the groups of real texts."""
        values = [value for group in self.real if (value := getattr(group, name)) is not None]
        return (min(values), max(values)) if values else None

    def criteria(self) -> list[str]:
        """What a usable cell must be, in words; empty without a reference."""
        told = []
        for name, (low, high) in self._allowed().items():
            told.append(f"{MEASURES[name]} {'at most' if low == -math.inf else f'{low:.3g} to'} {high:.3g}")
        return told

    def fails(self, cell: Cell) -> list[str]:
        """The measures that keep a cell from being usable."""
        values = {name: getattr(cell.measures, name) for name in MEASURES}
        return [name for name, (low, high) in self._allowed().items() if not low <= values[name] <= high]

    def _allowed(self) -> dict[str, tuple[float, float]]:
        """Repeats and unknown words: no more than the band, widened. Perplexity under the judge: neither more nor less."""
        factor, allowed = float(self.config["factor"]), {}
        for name in ("repeated_3", "unknown_words", "judge_perplexity"):
            if (band := self.band(name)) is not None:
                is_share = name != "judge_perplexity"
                allowed[name] = (-math.inf, band[1] * factor + FREE) if is_share else (band[0] / factor, band[1] * factor)
        return allowed

    def usable(self, top_p: float) -> list[float]:
        """The temperatures that are usable at a top-p."""
        return [cell.temperature for cell in self.at(top_p) if not self.fails(cell)]

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        found = asdict(self)
        for cell, row in zip(self.cells, found["cells"], strict=True):
            row["fails"] = self.fails(cell)
        usable = {f"{top_p:g}": self.usable(top_p) for top_p in self.config["top_p"]} if self.real else None
        return found | {"criteria": self.criteria(), "usable": usable}

    def csv(self) -> str:
        """A row a cell, then a row a group of real texts."""
        names = [field.name for field in dataclasses.fields(Measures)]
        file = io.StringIO()
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["temperature", "top_p", *names])
        table.writerows([cell.temperature, cell.top_p, *asdict(cell.measures).values()] for cell in self.cells)
        table.writerows(["real text", "", *asdict(group).values()] for group in self.real)
        return file.getvalue()


def shown(value: float | None, form: str) -> str:
    """A value of a table; large ones without digits that say nothing."""
    if value is None:
        return "-"
    if form != LARGE:
        return format(value, form)
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}" if value < 1e5 else f"{value:.1e}"
