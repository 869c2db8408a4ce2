"""An engine for the tests of `bench generate`: it counts, and needs nothing. Its variants wear the names of precisions."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

VARIANTS = ("float32", "other-float32", "int8", "short-float32", "crash-int8", "raise-int8", "lazy-int4", "spin-int4")


def missing() -> str | None:
    return None


def prepare(hf_folder: Path, files: Path, variant: str) -> None:
    print("a converter's words, which are no answer")
    os.write(1, b"and those of its C++\n")
    if variant == "lazy-int4":
        raise NotImplementedError("no converter\nfor this")
    assert (hf_folder / "config.json").is_file() and (hf_folder / "model.safetensors").is_file()
    (files / "weights.bin").write_bytes(bytes(1000))


class System:
    def __init__(self, files: Path, variant: str, threads: int) -> None:
        assert (files / "weights.bin").stat().st_size == 1000 and threads == int(os.environ["OMP_NUM_THREADS"])
        self.variant = variant
        if variant == "spin-int4":
            turns = (files / "turns").open("ab", buffering=0)  # here: it is there before the thread has its first turn
            threading.Thread(target=self._spin, args=(turns,), daemon=True).start()

    def _spin(self, turns: BinaryIO) -> None:
        """What a thread pool does that waits for work in a loop; the file grows as long as the process runs."""
        while True:
            turns.write(b".")
            time.sleep(0.001)

    def generate(self, prompts: list[list[int]], new_tokens: int, stamp: Callable[[], None]) -> list[list[int]]:
        if self.variant == "crash-int8" and len(prompts) > 1:
            os.write(2, b"out of luck\n")
            os._exit(7)
        if self.variant == "raise-int8" and len(prompts) > 1:
            raise ValueError("one prompt at most\n(or fewer)")
        for _ in range(new_tokens):
            stamp()
        count = new_tokens - (self.variant == "short-float32")
        change = 3 if self.variant in ("int8", "other-float32") else count
        return [[row[-1] + 1 + place + (place >= change) for place in range(count)] for row in prompts]
