"""How far long work is: a live line on a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import rich.progress
from rich.console import Console

QUIET_SECONDS = 2.0
"""Work that is over sooner shows nothing."""
LINE_SECONDS = 10.0
Item = TypeVar("Item")
Progress = Callable[[int, int], None]
"""progress(done, total)"""


def counted(documents: Iterable[str], title: str, console: Console | None = None) -> Iterator[str]:
    """The same documents; how many there were, and how fast, is shown on stderr. How many come is not known."""
    console = console or Console(stderr=True)
    start = shown = time.perf_counter()
    bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"), rich.progress.SpinnerColumn(), console=console, transient=True
    )
    task = bar.add_task(title, total=None)
    number = characters = 0
    try:
        for text in documents:
            yield text
            number += 1
            characters += len(text)
            now = time.perf_counter()
            if now - start < QUIET_SECONDS or now - shown < (0.2 if console.is_terminal else LINE_SECONDS):
                continue
            shown = now
            line = (
                f"{title}: {number:,} documents, {characters / 1e6:,.1f} M characters, {characters / 1e6 / (now - start):.1f} M/s"
            )
            if console.is_terminal:
                bar.start()
                bar.update(task, description=line)
            else:
                console.print(line, highlight=False, soft_wrap=True)
    finally:
        if bar.live.is_started:  # off a terminal `stop` would print an empty line
            bar.stop()


@contextmanager
def steps(title: str, console: Console | None = None) -> Iterator[Progress]:
    """`with steps(title) as progress: ... progress(done, total)`: a bar with rate and time left on stderr."""
    console = console or Console(stderr=True)
    start = shown = time.perf_counter()
    bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=24),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("eta"),
        rich.progress.TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task(title, total=None)

    def progress(done: int, total: int) -> None:
        nonlocal shown
        now = time.perf_counter()
        bar.update(task, completed=done, total=total)
        if now - start < QUIET_SECONDS or now - shown < (0.2 if console.is_terminal else LINE_SECONDS):
            return
        shown = now
        if console.is_terminal:
            bar.start()
        else:
            rate = done / (now - start)
            left = (total - done) / rate if rate else 0.0
            console.print(f"{title}: {done:,}/{total:,}, {rate:.1f} a second, eta {left:.0f} s", highlight=False, soft_wrap=True)

    try:
        yield progress
    finally:
        if bar.live.is_started:
            bar.stop()


def tracked(items: Sequence[Item], title: str, console: Console | None = None) -> Iterator[Item]:
    """The same items; how many are done, and the time that the rest will take, is shown."""
    with steps(title, console) as progress:
        for done, item in enumerate(items, 1):
            yield item
            progress(done, len(items))
