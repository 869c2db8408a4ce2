"""The process that runs reward functions: `python -m glassgpt.tuning.reward_worker`, started by glassgpt.tuning.rewards.

It reads JSON lines and writes JSON lines: first which functions to open; then, for each answer, a line in and a line out for
every function. What functions print goes to stderr. When one takes too long or breaks the interpreter, faulthandler writes on the
same pipe where it stood, and the process ends: that works inside C code too, and also when nobody waits for the reply any more.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib
import importlib.util
import inspect
import json
import math
import numbers
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from glassgpt.tuning import verifiable

Function = Callable[[str, str, Mapping[str, Any]], object]
LONGEST_ERROR = 500
END_SECONDS = 2.0
"""Longest that modules of the user may take to end."""
_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_LIBRARY, _INSTALLED = str(Path(os.__file__).parent) + os.sep, f"{os.sep}site-packages{os.sep}"


class OpeningError(Exception):
    """A function that cannot be had. `known` are names that may have been meant by `given`."""

    def __init__(self, message: str, given: str = "", known: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.given, self.known = given, list(known)


def encode(value: object) -> bytes:
    """A JSON line. Lone surrogates stay as they are; what JSON has no form for becomes its text."""
    return json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass") + b"\n"


def decode(line: bytes) -> Any:
    """What `encode` made a line of."""
    return json.loads(line.decode("utf-8", "surrogatepass"))


def main() -> None:
    """Serve until the pipe of requests is closed."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    faulthandler.enable(file=replies)
    watch = functools.partial(faulthandler.dump_traceback_later, exit=True, file=replies)

    first = decode(requests.readline())
    watch(first["opening_seconds"])
    functions = []
    for number, name in enumerate(first["functions"]):
        try:
            function = opened(name, first["seconds"])
            functions.append((function, takes_fields(function)))
        except OpeningError as error:
            replies.write(encode({"number": number, "error": str(error), "given": error.given, "known": error.known}))
            return
    faulthandler.cancel_dump_traceback_later()
    replies.write(encode({"takes_fields": any(wants for _, wants in functions)}))

    for line in requests:
        request = decode(line)
        for function, wants in functions:
            watch(first["seconds"])
            reply = call(function, request[: 3 if wants else 2])
            faulthandler.cancel_dump_traceback_later()
            replies.write(encode(reply))
    watch(END_SECONDS)


# ---------------------------------------------------------------------- opening


def opened(name: str, seconds: float) -> Callable[..., object]:
    """The function of a reward's name, which may take so many seconds; raises OpeningError saying why it cannot be had."""
    kind, colon, argument = name.partition(":")
    try:
        if name == "code":
            verifiable.check_code()
            return functools.partial(verifiable.code, seconds=seconds / 2)  # so that a program that hangs is worth 0
        if name in verifiable.WITHOUT_ARGUMENT:
            return verifiable.WITHOUT_ARGUMENT[name]
        if colon and kind in verifiable.WITH_ARGUMENT:
            return verifiable.WITH_ARGUMENT[kind](argument)
    except ValueError as error:
        raise OpeningError(str(error)) from error
    module_name, _, function_name = name.rpartition(":")
    module = imported(module_name)
    function = getattr(module, function_name, None)
    if function is None:
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise OpeningError(f"{module.__file__ or module_name} has no function {function_name!r}", function_name, known)
    if not callable(function):
        raise OpeningError(f"{function_name} in {module.__file__ or module_name} is {short(function)}, which is no function")
    return function


def imported(name: str) -> ModuleType:
    """A module by its name, looked for in the current folder first, or by the path of its .py file."""
    is_file = name.endswith(".py")
    folder = str(Path(name).resolve().parent) if is_file else str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        if not is_file:
            return importlib.import_module(name)
        known_as = f"reward_file_{len(sys.modules)}"  # a name of its own, so that code.py does not stand for Python's `code`
        spec = importlib.util.spec_from_file_location(known_as, Path(name).resolve())
        if spec is None or spec.loader is None:
            raise OpeningError(f"{name} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[known_as] = module
        spec.loader.exec_module(module)
        return module
    except OpeningError:
        raise
    except BaseException as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise OpeningError(f"there is no module {name!r} in {folder} or on Python's path", name) from error
        where = users_place(frames(error))
        raise OpeningError(f"importing {name} fails: {told(error)}{f' ({where})' if where else ''}") from error


def takes_fields(function: Callable[..., object]) -> bool:
    """Whether to give a function the row's fields: when its third parameter has no default, or is called `fields`."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # written in C
        return False
    positional = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    needed = [one.name for one in positional if one.default is one.empty]
    takes_more = any(one.kind is one.VAR_POSITIONAL for one in parameters)
    keywords = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY and one.default is one.empty]
    if len(needed) > 3 or keywords or (len(positional) < 2 and not takes_more):
        raise OpeningError(
            f"takes {inspect.signature(function)}; a reward takes (prompt, response) or (prompt, response, fields)"
        )
    return len(needed) == 3 or (len(positional) >= 3 and positional[2].name == "fields")


# ---------------------------------------------------------------------- calling


def call(function: Callable[..., object], arguments: list[Any]) -> dict[str, object]:
    """{"value": a finite float}, or {"error": what happened instead}."""
    try:
        result = function(*arguments)
        value = float(result) if isinstance(result, numbers.Real) else math.nan
        if math.isfinite(value):
            return {"value": value}
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: nobody else would notice
        where = users_place(frames(error))
        return {"error": f"raised {told(error)}{f' ({where})' if where else ''}"}
    return {"error": f"returned {short(result)}; a reward is a finite number"}


def told(error: BaseException) -> str:
    """The class and the message of an error."""
    message = ""
    with contextlib.suppress(Exception):  # an error whose own text fails
        message = str(error)[:LONGEST_ERROR]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def short(value: object) -> str:
    """A value's repr and its class."""
    shown = ""
    with contextlib.suppress(Exception):
        shown = f"{value!r:.100}, "
    return f"{shown}of the class {type(value).__name__}" if shown else f"something of the class {type(value).__name__}"


def frames(error: BaseException) -> Iterator[tuple[str, int]]:
    """File and line of every call that led to an error, the innermost first."""
    trace, found = error.__traceback__, []
    while trace:
        found.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    return reversed(found)


def users_place(calls: Iterable[tuple[str, int]]) -> str:
    """`file:line` of the innermost call in the user's own code, else in an installed package; '' where there is none."""
    outside = [(file, line) for file, line in calls if not file.startswith((_PACKAGE, "<"))]
    own = [(file, line) for file, line in outside if not file.startswith(_LIBRARY) and _INSTALLED not in file]
    for file, line in own or [(file, line) for file, line in outside if _INSTALLED in file]:
        inside = os.path.relpath(file)
        return f"{file if inside.startswith('..') else inside}:{line}"
    return ""


if __name__ == "__main__":
    main()
