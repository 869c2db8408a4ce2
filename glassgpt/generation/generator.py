"""Random numbers of one text."""

from __future__ import annotations

import random

_WORDS = 624


class Generator:
    """The numbers that `torch.Generator().manual_seed(seed)` gives to `torch.rand(dtype=float64)`, without PyTorch.

    A Mersenne Twister (Matsumoto and Nishimura 1998, MT19937) started from the seed's last 32 bits.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed & 0xFFFFFFFF
        self._twister: random.Random | None = None  # made when it is asked for: greedy writing never does

    def uniform(self) -> float:
        """The next number, at least 0 and below 1, of 53 random bits."""
        if self._twister is None:
            self._twister = _started(self._seed)
        high = self._twister.getrandbits(32)
        return ((high << 32 | self._twister.getrandbits(32)) & (2**53 - 1)) * 2.0**-53


def _started(seed: int) -> random.Random:
    """Python's own seeding is another one (init_by_array); this is init_genrand of the paper's program."""
    words = [seed]
    for place in range(1, _WORDS):
        words.append((1812433253 * (words[-1] ^ words[-1] >> 30) + place) & 0xFFFFFFFF)
    twister = random.Random()
    twister.setstate((3, (*words, _WORDS), None))
    return twister
