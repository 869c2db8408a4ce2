"""Intervals from resampling documents: tokens of one document are alike, so documents are what is drawn (Efron 1979)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval, by percentiles of the resamples."""

    mean: float
    low: float
    high: float


def weights(documents: int, resamples: int, seed: int) -> np.ndarray:
    """How often each document is drawn: (resamples, documents), rows of sum `documents`."""
    return np.random.default_rng(seed).multinomial(documents, np.full(documents, 1 / documents), resamples)


def means(sums: np.ndarray, counts: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Mean of each column in each resample, (resamples, columns), of sums and counts by document (documents, columns)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (drawn @ sums) / (drawn @ counts)


def percentiles(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the interval of each column of (resamples, columns); resamples without a value do not count."""
    low, high = np.nanquantile(values, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2), axis=0)
    return low, high


def intervals(sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int) -> list[Interval]:
    """Of each column of sums and counts by document (documents, columns)."""
    low, high = percentiles(means(sums, counts, weights(len(sums), resamples, seed)))
    mean = sums.sum(0) / counts.sum(0)
    return [Interval(*map(float, each)) for each in zip(mean, low, high, strict=True)]
