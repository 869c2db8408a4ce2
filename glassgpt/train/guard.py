"""What keeps a run from being lost: signals that stop it in order, and steps that look wrong."""

from __future__ import annotations

import math
import signal
import statistics
import threading
from collections import deque
from collections.abc import Iterable
from types import FrameType, TracebackType

from glassgpt.data import Corpus, Place
from glassgpt.text import Tokenizer

WINDOW_STEPS = 100
FEWEST_STEPS = 20
"""Losses that must have been seen before one can be called a spike."""
SHOWN_CHARACTERS = 60


class Stop:
    """SIGTERM and the first Ctrl-C are noted, so that the loop ends after the step that it is in; a second Ctrl-C interrupts."""

    def __init__(self, *, has_mates: bool = False) -> None:
        self.signal: int | None = None
        self._has_mates = has_mates
        self._before: dict[int, object] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # when a mate has ended, torchrun sends SIGTERM, and what has happened is still to be told
        deaf = self._has_mates and isinstance(error, RuntimeError | ConnectionError)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if deaf and number == signal.SIGTERM else handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


class Spikes:
    """Notices a loss far above the last hundred: more than so many typical deviations above their median.

    The typical deviation is 1.4826 times the median absolute one, which for normal noise is the standard deviation and which a
    spike itself does not move (Rousseeuw & Croux 1993).
    """

    def __init__(self, deviations: float, losses: Iterable[float] = ()) -> None:
        self._deviations = deviations
        self._losses = deque(filter(math.isfinite, losses), WINDOW_STEPS)

    def typical(self) -> tuple[float, float]:
        """Median and deviation of the losses so far."""
        median = statistics.median(self._losses)
        deviation = 1.4826 * statistics.median(abs(loss - median) for loss in self._losses)
        return median, max(deviation, 1e-3 * abs(median), 1e-12)

    def sees(self, loss: float) -> bool:
        """Whether this loss is a spike. It counts as seen from now on, so that a loss that stays high is soon typical."""
        if not math.isfinite(loss):
            return False
        is_spike = False
        if self._deviations and len(self._losses) >= FEWEST_STEPS:
            median, deviation = self.typical()
            is_spike = loss > median + self._deviations * deviation
        self._losses.append(loss)
        return is_spike


def describe(places: Iterable[Place], losses: Iterable[float], corpus: Corpus, tokenizer: Tokenizer) -> str:
    """The worst row of a step: which shard, which token, and how its text begins."""
    loss, place = max(zip(losses, places, strict=True), key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])
    domain = corpus.trained[place.domain]
    array = domain.shards.tokens("train")[place.array]
    text = tokenizer.decode(array[place.start : place.start + SHOWN_CHARACTERS].tolist())[:SHOWN_CHARACTERS]
    where = f"{domain.shards.files()[1 + place.array]} from token {place.start:,}"
    return f"{where}: {text!r} ({loss:.2f} nats a token)"
