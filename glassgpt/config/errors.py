"""Errors that are the user's to mend: printed as one line with exit code 2, never as a traceback."""

from __future__ import annotations

import difflib
import functools
import typing
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """Bad input. The message says what was given, what was expected and what to do.

    Not a ValueError: parsers of arguments catch those and would wrap the message in their own words.
    """


def nearest(given: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' when a known name is close to the given one, else ''."""
    close = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_at_least(least: int, owner: object, *names: str, prefix: str = "") -> None:
    """Raise UserError for the first of the fields of `owner` that is below `least`; None stands for not given."""
    for name in names:
        value = getattr(owner, name)
        if value is not None and not value >= least:
            raise UserError(f"{prefix}{name} must be at least {least}; got {value}")


def check_choices(owner: object, prefix: str = "") -> None:
    """Raise UserError for the first field whose value is none of its annotation's literals."""
    for name, allowed in _choices(typing.cast(Any, type(owner))).items():
        value = getattr(owner, name)
        for item in value if isinstance(value, tuple) else (value,):
            if item not in allowed:
                known = ", ".join(map(str, allowed))
                raise UserError(f"{prefix}{name} must be one of {known}; got {item!r}{nearest(str(item), map(str, allowed))}")


@functools.cache
def _choices(kind: Any) -> dict[str, tuple[object, ...]]:
    found = {}
    for name, hint in typing.get_type_hints(kind).items():
        inner = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
        if typing.get_origin(inner) is typing.Literal:
            found[name] = typing.get_args(inner)
    return found


def check_seed(seed: int) -> None:
    """Raise UserError unless `seed` is one that every random generator takes."""
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be between 0 and {2**32 - 1}; got {seed}")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, its class when it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
