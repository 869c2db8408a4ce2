"""A pass over documents shows how far it is, and changes nothing."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from glassgpt.config import UserError
from glassgpt.data import progress
from glassgpt.data.progress import counted

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
"""What a terminal is told of its cursor."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until its one number is changed."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def shown(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_quick_pass_shows_nothing(terminal: bool) -> None:
    console = shown(terminal)
    assert list(counted(["a", "b"], "reading", console)) == ["a", "b"]
    assert text_of(console) == ""


def test_off_a_terminal_a_line_every_ten_seconds(clock: list[float]) -> None:
    console = shown(terminal=False)
    for _ in counted(["x" * 100_000] * 35, "reading", console):
        clock[0] += 1
    assert text_of(console).splitlines() == [
        "reading: 10 documents, 1.0 M characters, 0.1 M/s",
        "reading: 20 documents, 2.0 M characters, 0.1 M/s",
        "reading: 30 documents, 3.0 M characters, 0.1 M/s",
    ]


def test_on_a_terminal_a_live_line_that_goes(clock: list[float]) -> None:
    console = shown(terminal=True)
    for _ in counted(["x" * 1000] * 5, "reading", console):
        assert (HIDE in text_of(console)) is (clock[0] >= 102)
        clock[0] += 1
    assert "reading: 5 documents" in text_of(console)
    assert text_of(console).count(HIDE) == text_of(console).count(SHOW) == 1


def test_the_terminal_is_left_as_it_was(clock: list[float]) -> None:
    def broken() -> Iterator[str]:
        for _ in range(5):
            clock[0] += 3
            yield "a"
        raise UserError("unreadable")

    console = shown(terminal=True)
    with pytest.raises(UserError, match="unreadable"):
        list(counted(broken(), "reading", console))
    assert text_of(console).count(SHOW) == 1
    console = shown(terminal=True)
    left = counted(["a"] * 5, "reading", console)
    for _ in left:
        clock[0] += 3
        if HIDE in text_of(console):
            break
    left.close()  # type: ignore[attr-defined]
    assert text_of(console).count(SHOW) == 1


@pytest.mark.parametrize("terminal", [False, True])
def test_steps_say_what_is_left(clock: list[float], terminal: bool) -> None:
    console = shown(terminal)
    with progress.steps("patching", console) as step:
        step(1, 10)  # too soon to say anything
        assert text_of(console) == ""
        clock[0] += 20.0
        step(4, 10)
    said = text_of(console)
    assert ("patching: 4/10, 0.2 a second, eta 30 s" in said) is not terminal
    assert ("4/10" in said) is terminal or not terminal


def test_tracked_items_are_the_same() -> None:
    assert list(progress.tracked([3, 1], "x", shown(False))) == [3, 1]
