"""How far a lab is: a bar with the time left on a terminal, a line now and then elsewhere. On stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import rich.progress
from rich.console import Console

LINE_SECONDS = 20.0
Item = TypeVar("Item")
Progress = Callable[[int, int], None]
"""progress(done, total)"""


@contextmanager
def bar(title: str, console: Console | None = None) -> Iterator[Progress]:
    """`with bar("cells") as progress: ... progress(done, total)`."""
    console = console or Console(stderr=True)
    began = shown = time.perf_counter()

    def line(done: int, total: int) -> None:
        nonlocal shown
        now = time.perf_counter()
        if now - shown >= LINE_SECONDS and done < total:
            shown = now
            left = (now - began) / done * (total - done)
            console.print(f"{title}: {done:,} of {total:,}, eta {left / 60:.1f} min", highlight=False, soft_wrap=True)

    if not console.is_terminal:
        yield line
        return
    with rich.progress.Progress(console=console, transient=True) as drawn:
        task = drawn.add_task(title, total=None)
        yield lambda done, total: drawn.update(task, completed=done, total=total)


def tracked(items: Sequence[Item], title: str) -> Iterator[Item]:
    """The same items; how many are done, and the time that the rest will take, is shown."""
    with bar(title) as progress:
        for done, item in enumerate(items, 1):
            yield item
            progress(done, len(items))
