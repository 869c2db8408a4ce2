"""Rewards that check an answer by themselves: sums, lengths, patterns, known answers, programs with tests.

Each is a function f(prompt, response) or f(prompt, response, fields) of its arguments alone, or makes one out of the argument in
its name. A ValueError says what is wrong with a sample or an argument. Only the standard library is imported, so that the process
that runs them starts at once.
"""

from __future__ import annotations

import contextlib
import inspect
import marshal
import math
import operator
import os
import re
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

# ---------------------------------------------------------------------- length:N, contains:TEXT, format:REGEX


def length(words: str) -> Callable[[str, str], float]:
    """1 for a response of so many words (parted by white space), less by 1/words for each one more or fewer, 0 at the least."""
    wanted = int(words) if words.strip().isdecimal() else 0
    if wanted < 1:
        raise ValueError(f"needs a number of words, at least 1; got {words!r}")

    def score(prompt: str, response: str) -> float:
        return max(0.0, 1 - abs(len(response.split()) - wanted) / wanted)

    return score


def contains(text: str) -> Callable[[str, str], float]:
    """1 when the text is in the response, in upper or lower case; é and e with an accent behind it are the same."""
    if not text:
        raise ValueError("needs a text to look for")

    def score(prompt: str, response: str) -> float:
        return float(_folded(text) in _folded(response))

    return score


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


def matches(pattern: str) -> Callable[[str, str], float]:
    """1 when all of the response, without white space at its ends, matches the regular expression; its dot matches line ends."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is no regular expression: {error}") from error

    def score(prompt: str, response: str) -> float:
        return float(compiled.fullmatch(response.strip()) is not None)

    return score


# ---------------------------------------------------------------------- arithmetic

SIGNS = str.maketrans("×·÷−", "**/-")
LARGEST = 10**1000
"""Values beyond it are not computed."""
DEEPEST = 50
"""Most parentheses and signs inside one another."""
_INTEGER = re.compile(r"(?<![\w.])(?<![0-9],)(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?!\w|[.,][0-9])")
_ADD = re.compile(r"[ \t]*([+-])[ \t]*")
_MULTIPLY = re.compile(r"[ \t]*(//|[*/])[ \t]*")
_OPERATORS: dict[str, Callable[[Fraction, Fraction], Fraction | int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
}
# what stands around an expression that goes on with something which is not understood: 3x + 4 - 2, 1 + 2**3, f(1 + 2), 1 + 2.5;
# but the stars of **1 + 2** and the dash before a list's "- 1 + 2" are no operators
_GOES_ON_BEFORE = re.compile(r"[0-9)][ \t]*[-+*/^%]+[ \t]*$|\w(?:[-+*/^%]+[ \t]*|[ \t]*[-+*/^%]+[ \t]+)$|[\w)]$")
_GOES_ON_AFTER = re.compile(r"[\w(]|[ \t]*[-+*/^%]+[ \t]*(?:[0-9(]|\.[0-9])|(?:[ \t]+[-+*/^%]+[ \t]*|[-+*/^%]+)\w")
_NUMBER = re.compile(
    r"(?:(?<![\w)])[-−])?\$?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)",
)


def arithmetic(prompt: str, response: str) -> float:
    """1 when the first number of the response is the value of the prompt's last expression: "12+34=", "What is 3 * (4 - 5)?".

    Expressions are of whole numbers with + - * / // and parentheses, on one line. The first number counts, since a model that
    has only read sums goes on with the next one; where a chain of thought comes first, `answer` takes the last.
    Raises ValueError for a prompt without an expression, or with one whose value is not a whole number.
    """
    number = _NUMBER.search(response)
    return float(expression_value(prompt) == (_decimal(number[0]) if number else None))


def expression_value(prompt: str) -> int:
    """The value of the last expression in the prompt."""
    text, found, at = prompt.translate(SIGNS), None, 0
    while start := re.compile(r"[-(0-9]").search(text, at):
        part = _sum(text, start.start(), 0)
        at = part.end if part else start.end()
        if not (part and part.operators) or _GOES_ON_AFTER.match(text, part.end):
            continue
        if not _GOES_ON_BEFORE.search(text[max(0, start.start() - 40) : start.start()].rpartition("\n")[2]):
            found = (part.value, prompt[start.start() : part.end])
    if found is None:
        raise ValueError("the prompt holds no expression of whole numbers with + - * / // and parentheses, e.g. 12+34=")
    if found[0].denominator != 1:
        raise ValueError(f"the value of {found[1]!r} is {found[0]}, which is not a whole number")
    return found[0].numerator


class _Part(NamedTuple):
    """A piece of an expression: its value, where it ends, and how many operators it has."""

    value: Fraction
    end: int
    operators: int


def _sum(text: str, at: int, depth: int) -> _Part | None:
    return _chain(text, at, depth, _ADD, _product)


def _product(text: str, at: int, depth: int) -> _Part | None:
    return _chain(text, at, depth, _MULTIPLY, _factor)


def _chain(text: str, at: int, depth: int, sign: re.Pattern[str], operand: Callable[..., _Part | None]) -> _Part | None:
    """Operands with signs between them, computed from left to right; as many as there are."""
    left = operand(text, at, depth)
    while left and (match := sign.match(text, left.end)) and (right := operand(text, match.end(), depth)):
        if right.value == 0 and "/" in match[1]:
            raise ValueError("the prompt divides by zero")
        value = Fraction(_OPERATORS[match[1]](left.value, right.value))
        if abs(value) > LARGEST:
            raise ValueError("the prompt's expression has a value of more than 1000 digits")
        left = _Part(value, right.end, left.operators + right.operators + 1)
    return left


def _factor(text: str, at: int, depth: int) -> _Part | None:
    """A whole number, something with a minus sign, or a sum in parentheses."""
    if number := _INTEGER.match(text, at):
        return _Part(Fraction(int(number[0].replace(",", ""))), number.end(), 0)
    if depth == DEEPEST:
        return None
    if text.startswith("-", at):
        negated = _factor(text, at + 1, depth + 1)
        return negated and _Part(-negated.value, negated.end, negated.operators)
    if opening := re.compile(r"\([ \t]*").match(text, at):
        inner = _sum(text, opening.end(), depth + 1)
        closing = inner and re.compile(r"[ \t]*\)").match(text, inner.end)
        return _Part(inner.value, closing.end(), inner.operators) if inner and closing else None
    return None


# ---------------------------------------------------------------------- answer


def answer(prompt: str, response: str, fields: Mapping[str, Any]) -> float:
    """1 when the response ends in the row's field `answer`.

    An answer that is a number is compared with the last number of the response, as numbers: 1,000.0 is 1000, and $ and % are left
    out. Any other must be all of the response, in upper or lower case. What follows the last `####` is the answer, in the field
    (the form of GSM8K) and in the response. Raises ValueError when the row has no answer.
    """
    wanted = fields.get("answer")
    if isinstance(wanted, bool) or not isinstance(wanted, str | int | float) or not str(wanted).strip():
        raise ValueError(f"the row's field `answer` must be a text or a number; got {wanted!r}")
    if isinstance(wanted, float) and not math.isfinite(wanted):
        raise ValueError(f"the row's field `answer` is {wanted}")
    text, said = (given.rpartition("####")[2].strip() for given in (str(wanted), response))
    if re.fullmatch(rf"\+?{_NUMBER.pattern}%?\.?", text) or not isinstance(wanted, str):
        numbers = _NUMBER.findall(said)
        return float(bool(numbers) and _decimal(numbers[-1]) == _decimal(text))
    return float(_folded(said) == _folded(text))


def _decimal(number: str) -> Decimal:
    """The value of a number as people write it."""
    return Decimal(number.rstrip(".%").translate(str.maketrans("−", "-", ",$")))


# ---------------------------------------------------------------------- code

CODE_SECONDS = 5.0
MEMORY_BYTES = 2**30
FILE_BYTES = 2**20
TEST_FIELDS = ("test", "tests", "test_list")
_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```[ \t\r]*$|\Z)", re.DOTALL | re.MULTILINE)


def code(prompt: str, response: str, fields: Mapping[str, Any], seconds: float = CODE_SECONDS) -> float:
    """1 when the program in the response passes the row's tests, 0 when it does not, for whatever reason.

    The program is the first block fenced as Python (or as nothing), else all of the response. Tests are the row's field `test`,
    `tests` or `test_list`, a text or a list of texts with assert statements. With a field `entry_point` (the form of HumanEval)
    the prompt is Python too and comes first: the program continues it, unless it has the function itself; and where the tests
    define `check`, they end with check(entry_point).
    Raises ValueError for a row without tests.

    Each program runs in a process of its own in a temporary folder, with so many seconds, 1 GiB of memory, files of at most
    1 MiB, the standard library only, no environment variables, and Python's own ways to other processes, to the network and to
    changes of files elsewhere shut. That keeps a model's blunders from doing harm. It is a limit, not a security sandbox: a
    program that is written to break out will. Run models that you do not trust in a container or a virtual machine.
    """
    entry_point = fields.get("entry_point")
    if not (entry_point is None or (isinstance(entry_point, str) and entry_point.isidentifier())):
        raise ValueError(f"the row's field `entry_point` must be the name of a function; got {entry_point!r}")
    test = _test(fields, entry_point)
    return float(passes(_program(prompt, response, entry_point), test, seconds))


def _test(fields: Mapping[str, Any], entry_point: str | None) -> str:
    """The tests of a row, with the call of `check` where they define one."""
    given = next((fields[name] for name in TEST_FIELDS if fields.get(name)), None)
    lines = [given] if isinstance(given, str) else given
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines) or not "".join(lines).strip():
        raise ValueError(f"the row needs its tests in a field {' or '.join(TEST_FIELDS)}: a text, or a list of texts")
    test = "\n".join(lines)
    if not re.search(r"^def check\(", test, re.MULTILINE):
        return test
    if entry_point is None:
        raise ValueError("the row's tests define `check`, so it needs a field `entry_point` with the name of what they check")
    return f"{test}\ncheck({entry_point})\n"


def _program(prompt: str, response: str, entry_point: str | None) -> str:
    """The program that a response holds."""
    blocks = [(language.lower(), block) for language, block in _FENCE.findall(response)]
    python = [block for language, block in blocks if language in ("python", "python3", "py")]
    bare = [block for language, block in blocks if not language]
    written = [*python, *bare, response][0]
    if not entry_point:
        return written
    is_whole = re.search(rf"^(?:async )?def {re.escape(entry_point)}\b", written, re.MULTILINE)
    return f"{prompt}\n{written}" if is_whole else prompt + written


def passes(program: str, test: str, seconds: float = CODE_SECONDS) -> bool:
    """Whether a program runs, and its test after it, to the end in a process with limits."""
    ours, theirs = os.pipe()
    word = os.urandom(16)  # what the process says at its end; a program that just exits does not know it
    job = marshal.dumps((program, test, math.ceil(seconds), MEMORY_BYTES, FILE_BYTES, theirs, word))
    command = [sys.executable, "-S", "-P", "-s", "-B", "-c", _CANDIDATE]
    try:
        with tempfile.TemporaryDirectory(prefix="glassgpt-code-", ignore_cleanup_errors=True) as folder:
            none, environment = subprocess.DEVNULL, {"PYTHONHASHSEED": "0"}
            with subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=none, stderr=none, pass_fds=(theirs,)
            ) as process:
                try:
                    process.communicate(job, timeout=seconds)
                except subprocess.TimeoutExpired:
                    return False
                finally:
                    process.kill()
        os.set_blocking(ours, False)
        with contextlib.suppress(BlockingIOError):  # nothing was said
            return os.read(ours, len(word)) == word
        return False
    finally:
        os.close(ours)
        os.close(theirs)


def check_code() -> None:
    """Raises ValueError when programs cannot be run here, since every answer would then be worth 0."""
    if not passes("x = 1", "assert x == 1", seconds=60.0):
        raise ValueError("a program of one line does not run under the limits of `code` on this computer")


def _candidate() -> None:
    """What the process of `code` runs. Its source is handed over, so it imports for itself."""
    import marshal
    import os
    import resource
    import sys

    program, test, seconds, memory, file_size, passed, word = marshal.loads(sys.stdin.buffer.read())
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: file_size,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(kind, (least, least))
        except (OSError, ValueError):  # a system that lacks this one
            continue

    inside = os.path.realpath(os.getcwd()) + os.sep
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    shut = (
        "os.fork", "os.exec", "os.posix_spawn", "os.system", "os.kill", "subprocess.", "ctypes.dlopen",
        "socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostby",
    )  # fmt: skip
    changing = (
        "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
        "os.utime", "shutil.rmtree",
    )  # fmt: skip

    def guard(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(shut):
            raise PermissionError(event)
        if not event.startswith(changing) and not (event == "open" and arguments[2] & writing):
            return
        for name in arguments[: 1 if event == "open" else None]:
            path = os.path.realpath(os.fsdecode(name)) + os.sep if isinstance(name, str | bytes) else inside
            if not path.startswith((inside, os.devnull)):
                raise PermissionError(event)

    module = type(sys)("candidate")
    sys.modules["candidate"] = module
    sys.addaudithook(guard)
    for source in (program, test):  # one after the other: an open string or bracket must not swallow the tests
        exec(compile(source, "candidate", "exec"), module.__dict__)
    os.write(passed, word)
    os._exit(0)


_CANDIDATE = f"from __future__ import annotations\n{inspect.getsource(_candidate)}_candidate()\n"

WITHOUT_ARGUMENT: dict[str, Callable[..., float]] = {"arithmetic": arithmetic, "answer": answer, "code": code}
WITH_ARGUMENT: dict[str, Callable[[str], Callable[[str, str], float]]] = {
    "length": length,
    "contains": contains,
    "format": matches,
}
