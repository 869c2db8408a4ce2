"""What `bench generate` measured, and what follows from it: rates, ratios, spreads, shares of the floor, noise."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from glassgpt.config import ModelConfig
from glassgpt.config.bench import BenchGenerate
from glassgpt.lab.bench.generate.floor import Floor
from glassgpt.lab.bench.generate.phases import Phase
from glassgpt.lab.bench.generate.systems import BASE

CALIBRATION_SPREAD = 0.15
"""The same work, timed before every turn: with quartiles further apart than this share the machine was too noisy."""
TURNS_SPREAD = 0.25
"""The same of one system's turns in one phase."""
BUSY_TIMES = 1.5
"""A median this many times the least says that other work ran beside all of it: quartiles alone do not see a steady load."""
NOISY_SHARE = 0.1
"""Of all systems and phases, this many may be above that."""


@dataclass(frozen=True)
class Measured:
    """One system."""

    bits: int
    """Of a weight."""
    is_ours: bool
    disk_bytes: int
    """Of the files that it loads."""
    start_seconds: list[float] = field(default_factory=list)
    """From the start of a fresh process to its first token."""
    load_seconds: list[float] = field(default_factory=list)
    """Of opening the weights alone, its libraries being imported."""
    peak_bytes: list[int] = field(default_factory=list)
    """Most memory that a fresh process held which loaded and wrote one text."""
    turns: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of each turn, by phase that it finished."""
    ids: dict[str, list[list[int]]] = field(default_factory=dict)
    """What it wrote in each of them."""


@dataclass(frozen=True)
class Result:
    """Every system that finished a phase, and why others did not, or not all."""

    config: BenchGenerate
    shape: ModelConfig
    threads: int
    phases: list[Phase]
    systems: dict[str, Measured]
    left_out: dict[str, str]
    """Why, by name."""
    best_calibration_seconds: float
    """The least of the same work at the start."""
    calibration_seconds: list[float]
    """Of the same work before each turn."""
    floor: Floor

    def finished(self, name: str, phase: Phase) -> bool:
        """Whether the system is there and went through this phase: only then has it a rate."""
        return name in self.systems and phase.name in self.systems[name].turns

    def rate(self, name: str, phase: Phase) -> float:
        """Median tokens a second, all rows together."""
        return phase.tokens / statistics.median(self.systems[name].turns[phase.name])

    def spread(self, name: str, phase: Phase) -> float:
        """Distance of the quartiles over the median."""
        return spread(self.systems[name].turns[phase.name])

    def ratio(self, name: str, phase: Phase) -> float | None:
        """To `transformers` in float32: above 1, faster; None when that was not measured."""
        both = self.finished(name, phase) and self.finished(BASE, phase)
        return self.rate(name, phase) / self.rate(BASE, phase) if both else None

    def best_peer(self, phase: Phase, bits: int | None = None) -> str | None:
        """The fastest of the others, of all or of those with so many bits a weight."""
        peers = [name for name, found in self.systems.items() if not found.is_ours and bits in (None, found.bits)]
        peers = [name for name in peers if self.finished(name, phase)]
        return max(peers, key=lambda name: self.rate(name, phase), default=None)

    def lead(self, name: str, phase: Phase, bits: int | None = None) -> float | None:
        """The rate over the best peer's; None without a peer."""
        best = self.best_peer(phase, bits)
        return self.rate(name, phase) / self.rate(best, phase) if best and self.finished(name, phase) else None

    def floor_rate(self, bits: int, phase: Phase) -> float:
        """The most tokens a second that memory and arithmetic allow."""
        return phase.tokens / self.floor.seconds(self.shape, phase, bits, self.threads)

    def floor_share(self, name: str, phase: Phase) -> float:
        """Share of that which the system reaches."""
        return self.rate(name, phase) / self.floor_rate(self.systems[name].bits, phase)

    def same_ids(self, name: str, phase: Phase) -> float | None:
        """Share of the new ids before the first that differs from `transformers` in float32, over all rows."""
        if not (self.finished(name, phase) and self.finished(BASE, phase)):
            return None
        rows = list(zip(self.systems[name].ids[phase.name], self.systems[BASE].ids[phase.name], strict=True))
        return sum(common_start(ours, theirs) for ours, theirs in rows) / sum(len(theirs) for _, theirs in rows)

    def noise(self) -> list[str]:
        """Why the numbers are not to be relied on, a line each; nothing when they are."""
        lines = []
        apart = spread(self.calibration_seconds)
        if apart > CALIBRATION_SPREAD:
            lines.append(f"the same work took times whose quartiles are {apart:.0%} apart (limit {CALIBRATION_SPREAD:.0%})")
        times = statistics.median(self.calibration_seconds) / min(self.best_calibration_seconds, *self.calibration_seconds)
        if times > BUSY_TIMES:
            lines.append(f"the machine was busy throughout: the same work took {times:.1f}x its best time (limit {BUSY_TIMES}x)")
        cells = [(name, phase) for name in self.systems for phase in self.phases if self.finished(name, phase)]
        spreads = {(name, phase.name): self.spread(name, phase) for name, phase in cells}
        noisy = {where: found for where, found in spreads.items() if found > TURNS_SPREAD}
        if len(noisy) > NOISY_SHARE * len(spreads):
            worst = sorted(noisy, key=lambda where: -noisy[where])[:3]
            named = ", ".join(f"{name} in {phase} {noisy[name, phase]:.0%}" for name, phase in worst)
            lines.append(f"quartiles of {len(noisy)} of {len(spreads)} cells are more than {TURNS_SPREAD:.0%} apart: {named}")
        return lines


def spread(values: Sequence[float]) -> float:
    """Distance of the quartiles over the median; of fewer than three values, of the lowest and highest."""
    if len(values) < 3:
        return (max(values) - min(values)) / statistics.median(values)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


def common_start(a: Sequence[int], b: Sequence[int]) -> int:
    """Ids that two rows have in common before the first difference."""
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
