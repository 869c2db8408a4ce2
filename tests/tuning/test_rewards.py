"""Rewards: what each says of an answer, by hand, and that no function can hang, kill or fool what calls it."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from glassgpt.config import UserError
from glassgpt.text.chat import Message
from glassgpt.tuning import reward_worker, rewards, verifiable
from glassgpt.tuning.rewards import Answer, RewardError, Rewards, parse
from glassgpt.tuning.verifiable import answer, arithmetic, code, contains, expression_value, length, matches, passes

FUNCTIONS = """
import ctypes, json, os, re, subprocess, sys, time
from fractions import Fraction
from pathlib import Path

def one(prompt, response): return True
def letters(prompt, response): return len(response)
def whole(prompt, response): return 7
def half(prompt, response): return Fraction(1, 2)
def field(prompt, response, fields): return fields["worth"]
def named(prompt, response, scale=2.0, fields=None): return scale * (fields is None)
def third(prompt, response, fields=None): return fields["worth"]
def many(*given): return len(given)
def lengths(prompt, response): return len(prompt) * 1000 + len(response)
def hashed(prompt, response): return hash("a text") % 1000
def heavy(prompt, response): return sum(name in sys.modules for name in ("torch", "numpy", "glassgpt.text", "tokenizers"))
def stdin(prompt, response): return len(sys.stdin.read())
def surrogate(prompt, response): return len(response) if response == "\\ud83d\\ude00\\ud800" else -1

def noise(prompt, response):
    print("printed", response, {"value": 3})
    sys.stdout.write('{"value": 4}\\n')
    os.write(1, b'{"value": 5}\\n')
    ctypes.CDLL(None).puts(b'{"value": 6}')
    ctypes.CDLL(None).fflush(None)
    subprocess.run([sys.executable, "-S", "-c", "print('from a child')"], check=True)
    return 2.0

def pid(prompt, response):
    Path("pid").write_text(str(os.getpid()))
    return 0.0

def loops(prompt, response):
    pid(prompt, response)
    while True: pass

def sleeps(prompt, response):
    pid(prompt, response)
    time.sleep(100)

def pattern(prompt, response):
    pid(prompt, response)
    re.fullmatch("(a+)+b", "a" * 60)

def with_child(prompt, response):
    pid(prompt, response)
    Path("child").write_text(str(subprocess.Popen(["sleep", "100"]).pid))
    time.sleep(100)

def forgets_child(prompt, response):
    pid(prompt, response)
    Path("child").write_text(str(subprocess.Popen(["sleep", "100"]).pid))
    return 1.0

def dies_with_child(prompt, response):
    if os.fork() == 0:  # it keeps the pipes open
        time.sleep(100)
    os._exit(4)

def slow(prompt, response):
    pid(prompt, response)
    time.sleep(1)
    return 1.0

def raises(prompt, response):
    return json.loads("{")
def leaves(prompt, response): sys.exit("enough")
def interrupts(prompt, response): raise KeyboardInterrupt
def forever(prompt, response): return forever(prompt, response)
def exits(prompt, response): os._exit(3)
def crashes(prompt, response): ctypes.string_at(0)
def aborts(prompt, response): os.abort()
def killed(prompt, response): os.kill(os.getpid(), 9)
def not_a_number(prompt, response): return float("nan")
def infinite(prompt, response): return float("-inf")
def too_large(prompt, response): return 10**400
def none(prompt, response): pass
def text(prompt, response): return "1.0"
def listed(prompt, response): return [1.0]
def imaginary(prompt, response): return 1j
async def later(prompt, response): return 1.0

class Odd(Exception):
    def __str__(self): raise ValueError
def odd(prompt, response): raise Odd

class Unshowable:
    def __repr__(self): raise ValueError
def unshowable(prompt, response): return Unshowable()

def lonely(prompt): return 0.0
def greedy(prompt, response, fields, more): return 0.0
def keyed(prompt, response, *, more): return 0.0
number = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with `mine.py`."""
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(response: str = "yes", prompt: str = "1+1=", place: str = "sums.jsonl, line 3", **fields: Any) -> Answer:
    return Answer((Message("system", "Be brief."), Message("user", prompt)), response, place, fields)


def score(spec: str, response: str = "yes", prompt: str = "1+1=", seconds: float = 20.0, **fields: Any) -> float:
    with Rewards([spec], seconds=seconds) as opened:
        return opened([make(response, prompt, **fields)])[0].total


def line_of(text: str) -> int:
    return FUNCTIONS[: FUNCTIONS.index(text)].count("\n") + 1


def is_gone(pid: int) -> bool:
    """Whether a process has ended (one that nobody has waited for counts)."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return not state or state.startswith("Z")


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> bool:
    """Whether it was so once: what it looks for may be gone again a moment later."""
    end = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return holds


def pid_in(name: str) -> int:
    """The number that a function writes to a file, once it is there."""
    assert wait_until(lambda: Path(name).exists() and Path(name).read_text() != "")
    return int(Path(name).read_text())


# ---------------------------------------------------------------------- length, contains, format


@pytest.mark.parametrize(
    ("words", "response", "expected"),
    [
        ("4", "a b c d", 1.0), ("4", " a\tb\n\nc  d ", 1.0), ("4", "a b c", 0.75), ("4", "a b c d e", 0.75), ("4", "", 0.0),
        ("4", "a " * 8, 0.0), ("4", "a " * 100, 0.0), ("1", "x", 1.0), ("2", "Tiếng Việt", 1.0),
    ],
)  # fmt: skip
def test_length_by_hand(words: str, response: str, expected: float) -> None:
    assert length(words)("", response) == expected


@pytest.mark.parametrize(
    ("text", "response", "expected"),
    [
        ("Hello", "oh, HELLO there", 1.0), ("hello", "hell", 0.0), ("việt", "TIẾNG VIỆT", 1.0),
        ("ß", "STRASSE", 1.0),
        ("Vi\u1ec7t", "VI\u0065\u0323\u0302T", 1.0), (" ", "ab", 0.0), ("😀", "a😀b", 1.0),
        ("a.b", "axb", 0.0),
        ("\ud800", "x\ud800", 1.0), ("3*4", "3*4", 1.0),
    ],
)  # fmt: skip
def test_contains_by_hand(text: str, response: str, expected: float) -> None:
    assert contains(text)("", response) == expected


@pytest.mark.parametrize(
    ("pattern", "response", "expected"),
    [
        (r"\d+", " 42\n", 1.0), (r"\d+", "42 ", 1.0), (r"\d+", "a42", 0.0), (r"\d+", "42a", 0.0),
        ("<a>.*</a>", "<a>x\ny</a>", 1.0),
        ("", "  ", 1.0), ("(?i)yes", "YES", 1.0), ("a:b*", "a:bb", 1.0),
    ],
)  # fmt: skip
def test_format_by_hand(pattern: str, response: str, expected: float) -> None:
    assert matches(pattern)("", response) == expected


# ---------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("prompt", "value"),
    [
        ("12+34=", 46), ("What is 12 + 34?", 46), ("1+1=2\n3+4=7\n12-34=", -22), ("1+1=2 3+4=7 12+34=", 46), ("10-2-3=", 5),
        ("2+3*4=", 14), ("(2+3)*4", 20), ("20//3*2", 12), ("-7//2", -4), ("7/2*2", 7), ("1-(2-3)", 2), ("-3 + 4", 1),
        ("2*-3", -6),
        ("-(1+2)*3", -9), ("((1 + 2) * (3 + 4))", 21), ("1,000 + 2,500", 3500), ("3 × 4 ÷ 2 − 1", 5), ("(what is 3+4?)", 7),
        ("- 12 + 34 =", 46), ("Compute **12 + 34**.", 46), ("**1+2** is what?", 3),
        ("3+4.", 7), ("3+4, please", 7), ("Tổng của 3+4 là", 7),
        ("3 + 4 (easy)", 7), ("5 + 6 = _", 11), ("99999999999999999999+1", 10**20), ("0*5", 0),
    ],
)  # fmt: skip
def test_expressions_by_hand(prompt: str, value: int) -> None:
    assert expression_value(prompt) == value
    assert arithmetic(prompt, f" {value}\n") == 1.0
    assert arithmetic(prompt, f" {value + 1}\n") == 0.0


@pytest.mark.parametrize(
    "prompt",
    [
        "", "hello", "12", "12=", "3x + 4 - 2", "1+2**3", "2**3+4", "2 ** 3 + 4", "2(3+4)", "f(3+4)", "1.5+2", "2+2.5", "1+2.5",
        "a-3+4", "5 + ? = 12", "2^3+4", "(3+4)x", "__import__('os')", "3+", "v2+3", "1" * 5000 + "+1",
    ],
)  # fmt: skip
def test_what_is_no_expression_is_an_error_not_a_guess(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"no expression|digits"):
        arithmetic(prompt, "0")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("1/0", "divides by zero"),
        ("4//(2-2)", "divides by zero"),
        ("7/2", "'7/2' is 7/2"),
        ("9" * 900 + "*" + "9" * 900, "1000 digits"),
    ],
)
def test_values_that_nobody_can_answer_are_errors(prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arithmetic(prompt, "0")


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("46", 1.0), (" 46\n13+5=18", 1.0), ("= 46.", 1.0), ("46.0", 1.0), ("46.5", 0.0), ("-46", 0.0), ("−46", 0.0),
        ("12+34=46", 0.0),
        ("", 0.0), ("forty-six", 0.0), ("046", 1.0), ("4 6", 0.0), ("460", 0.0), ("4,6", 0.0), ("٤٦", 0.0), ("9" * 100_000, 0.0),
        ("\ud800 46", 1.0), ("47 46", 0.0),
    ],
)  # fmt: skip
def test_the_first_number_of_the_response_counts(response: str, expected: float) -> None:
    assert arithmetic("12+34=", response) == expected


def test_random_expressions_against_their_trees() -> None:
    draw = random.Random(0)

    def tree(depth: int) -> tuple[str, Fraction, int]:
        """An expression, its value, and how strongly it binds: 0 a sum, 1 a product, 2 a number or parentheses."""
        if depth == 0 or draw.random() < 0.2:
            number = draw.randrange(200)
            return str(number), Fraction(number), 2
        (left, a, strong), (right, b, stronger) = tree(depth - 1), tree(depth - 1)
        sign = draw.choice("+-*")
        binds = int(sign == "*")
        left = left if strong >= binds else f"({left})"
        right = right if stronger > binds else f"({right})"
        space = draw.choice(["", " "])
        return f"{left}{space}{sign}{space}{right}", {"+": a + b, "-": a - b, "*": a * b}[sign], binds

    for _ in range(500):
        text, value, binds = tree(4)
        if binds < 2:
            assert expression_value(f"What is {text}?") == value, text


# ---------------------------------------------------------------------- answer


@pytest.mark.parametrize(
    ("wanted", "response", "expected"),
    [
        ("42", "so it is 42", 1.0), ("42", "42 or 43", 0.0), ("42", "43, no, 42.", 1.0), ("#### 42", "#### 42", 1.0),
        ("6*7=<<6*7=42>>42\n#### 42", "6*7 is 42", 1.0), ("6*7=<<6*7=42>>42\n#### 43", "42", 0.0), ("1,000", "1000.00", 1.0),
        ("$18", "$18", 1.0), ("-5", "it is -5", 1.0), ("-5", "it is 5", 0.0), ("5", "7-5", 1.0), ("0.5", ".5", 1.0),
        (".5%", "0.5", 1.0),
        (42, "42", 1.0), (42.0, "42", 1.0), (0.1, "0.10", 1.0), (-3, "−3", 1.0), (1e20, "1" + "0" * 20, 1.0), (42, "", 0.0),
        ("Paris", " paris\n", 1.0), ("Paris", "Paris, France", 0.0), ("Paris", "I think so #### PARIS", 1.0), ("A1", "1", 0.0),
        ("Hà Nội", "hà nội", 1.0), ("12:30", "12:30", 1.0), ("12:30", "30", 0.0), ("1234567", "1,234,567", 1.0),
        ("12", "1,2", 0.0),
        (7, "seven 7% ", 1.0), ("+7", "7", 1.0),
    ],
)  # fmt: skip
def test_answers_by_hand(wanted: object, response: str, expected: float) -> None:
    assert answer("", response, {"answer": wanted}) == expected


@pytest.mark.parametrize(
    "row", [{}, {"answer": None}, {"answer": ""}, {"answer": [4]}, {"answer": True}, {"answer": float("nan")}]
)
def test_a_row_without_an_answer_is_an_error(row: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="field `answer`"):
        answer("", "4", row)


def test_gsm8k_knows_its_own_answers(shared: Path) -> None:
    with gzip.open(shared / "eval" / "gsm8k_test.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) > 1000
    finals = [row["answer"].rpartition("#### ")[2] for row in rows]
    assert all(answer("", row["answer"], row) == 1.0 for row in rows)
    assert all(answer("", f"So the answer is {final}.", row) == 1.0 for row, final in zip(rows, finals, strict=True))
    assert not any(answer("", f"So the answer is {final}1.", row) for row, final in zip(rows, finals, strict=True))
    assert not any(answer("", row["answer"].rpartition("####")[0] + "I do not know: -0.5", row) for row in rows)


# ---------------------------------------------------------------------- mutants: the usual mistakes, and the row that shows each


def last_number(prompt: str, response: str) -> float:
    numbers = re.findall(r"-?\d+", response)
    return float(bool(numbers) and int(numbers[-1]) == expression_value(prompt))


def any_number(prompt: str, response: str) -> float:
    return float(str(expression_value(prompt)) in response)


def glued_sign(prompt: str, response: str) -> float:
    number = re.search(r"\d+", response)
    return float(number is not None and int(number[0]) == expression_value(prompt))


@pytest.mark.parametrize(
    ("mutant", "prompt", "response"),
    [(last_number, "12+34=", "46\n1+1=2"), (any_number, "12+34=", "1 2 3 46"), (glued_sign, "12+34=", "-46")],
)
def test_a_mistake_in_reading_the_response_is_noticed(mutant: Callable[[str, str], float], prompt: str, response: str) -> None:
    assert mutant(prompt, response) != arithmetic(prompt, response)


@pytest.mark.parametrize(
    ("name", "wrong", "prompt"),
    [
        ("_ADD", r"[ \t]*([+])[ \t]*", "10-2+3"),
        ("_MULTIPLY", r"[ \t]*(//|[*/+-])[ \t]*", "2+3*4"),  # everything from left to right
        ("_GOES_ON_BEFORE", r"(?!)", "3x + 4 - 2"),
        ("_GOES_ON_AFTER", r"(?!)", "1+2**3"),
        ("_INTEGER", r"[0-9]+", "1.5+2"),
    ],
)
def test_a_mistake_in_the_grammar_is_noticed(name: str, wrong: str, prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def value() -> int | None:
        try:
            return expression_value(prompt)
        except ValueError:
            return None

    right = value()
    monkeypatch.setattr(verifiable, name, re.compile(wrong))
    assert value() != right


# ---------------------------------------------------------------------- code

ADD = {"test": "assert add(1, 2) == 3\nassert add(-1, 1) == 0"}
GOOD = "def add(a, b):\n    return a + b\n"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (GOOD, 1.0),
        (f"Sure!\n```python\n{GOOD}```\nDone.", 1.0),
        (f"```\n{GOOD}```", 1.0),
        (f"```bash\npip install x\n```\ntext\n```py\n{GOOD}\n```", 1.0),
        (f"```\nnot this\n```\n```Python\n{GOOD}```", 1.0),
        (f"```python\n{GOOD}", 1.0),  # cut off before the fence
        (f"```python\r\n{GOOD}```\r\n".replace("\n", "\r\n").replace("\r\r", "\r"), 1.0),
        (f"```python\n{GOOD}```\n```python\nadd = None\n```", 1.0),
        (f"Sure!\n{GOOD}", 0.0),
        (GOOD.replace("+", "-"), 0.0),
        (GOOD[:-4], 0.0),
        ("", 0.0),
        ("def add(a, b): return a + b if a > 0 else 1", 0.0),
        (GOOD + "\ud800", 0.0),
        (GOOD + "\0", 0.0),
        ("# Tiếng Việt 😀\n" + GOOD, 1.0),
        (GOOD + "#" * 2**20, 1.0),
    ],
)
def test_programs_in_responses(response: str, expected: float) -> None:
    assert code("", response, ADD) == expected


def test_the_ways_to_give_tests() -> None:
    for name in ("test", "tests", "test_list"):
        for tests in (ADD["test"], ADD["test"].split("\n")):
            assert code("", GOOD, {name: tests}) == 1.0
            assert code("", GOOD.replace("+", "-"), {name: tests}) == 0.0
    check = "def check(candidate):\n    assert candidate(1, 2) == 3"
    row = {"test": check, "entry_point": "add"}
    start = "from math import inf\ndef add(a, b):\n    '''Adds.'''\n"
    assert code(start, "    return a + b\n", row) == 1.0  # HumanEval: the response goes on
    assert code(start, "```python\n    return a + b\n```", row) == 1.0
    assert code(start, "```python\ndef add(a, b):\n    return a + b if inf else 0\n```", row) == 1.0  # or has it all
    assert code(start, "    return a - b\n", row) == 0.0
    assert code(start, "", row) == 0.0
    with pytest.raises(ValueError, match="needs a field `entry_point`"):
        code("", GOOD, {"test": check})  # nothing would call it, and all would pass
    with pytest.raises(ValueError, match="name of a function; got 'a b'"):
        code("", GOOD, {"test": check, "entry_point": "a b"})
    for row in ({}, {"test": ""}, {"test": " \n"}, {"tests": []}, {"test": 3}, {"test_list": ["", 3]}):  # type: ignore[assignment]
        with pytest.raises(ValueError, match="needs its tests"):
            code("", GOOD, row)


@pytest.mark.parametrize(
    "program",
    [
        "import os; os._exit(0)", "import sys; sys.exit()", "raise SystemExit(0)", "quit()", "x = '''", "x = (", "if True:",
        "assert 0", "def check(f): pass\nraise KeyboardInterrupt", "import ctypes; ctypes.string_at(0)", "def f(): f()\nf()",
        "input()", "1/0",
        "import os; os.kill(os.getpid(), 15)", "import numpy", "import glassgpt",
        "import os; os.close(0); os.closerange(3, 99); 1/0",
    ],
)  # fmt: skip
def test_a_program_that_ends_early_does_not_pass(program: str) -> None:
    assert not passes(program, "pass")


@pytest.mark.parametrize(
    "program",
    [
        "from __future__ import annotations\ndef f(x: List[int]) -> nothing: pass",
        "import asyncio\nasync def f(): await asyncio.sleep(0)\nasyncio.run(f())",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int' = 1\nassert A().x == 1",
        "import tempfile\nwith tempfile.TemporaryFile() as file: file.write(b'x')",
        "import os, shutil\nos.mkdir('a'); open('a/b', 'w').write('x'); assert open('a/b').read() == 'x'; shutil.rmtree('a')",
        "import contextlib, os\nwith contextlib.redirect_stdout(open(os.devnull, 'w')): print('x')",
        "print('x' * 10**7); import sys; sys.stderr.write('y' * 10**6)",
        "if __name__ == '__main__': 1/0",
        "import os; assert dict(os.environ).keys() <= {'PYTHONHASHSEED', 'LC_CTYPE'}",
        "import threading; one = threading.Thread(target=print); one.start(); one.join()",
        "import sys; assert sys.stdin.read() == ''",
        "x = [0] * 10**7",
    ],
)
def test_what_a_program_may_do(program: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "s")
    assert passes(program, "pass")
    assert capfd.readouterr() == ("", "")


OPENED = "arguments[2] & writing"
LIMITS = {
    "import mmap; mmap.mmap(-1, 2**31)": "resource.RLIMIT_AS: memory,",
    "file = open('large', 'wb'); file.write(bytes(2**21)); file.flush()": "resource.RLIMIT_FSIZE: file_size,",
    "import os\nif os.fork() == 0: os._exit(0)": '"os.fork",',
    "import subprocess; subprocess.run(['/bin/true'], check=True)": '"subprocess.",',
    "import os; assert os.system('true') == 0": '"os.system",',
    "import socket; socket.socket().connect(('127.0.0.1', PORT))": '"socket.connect",',
    "import socket; socket.getaddrinfo('127.0.0.1', PORT)": '"socket.getaddrinfo",',
    "import ctypes; ctypes.CDLL(None)": '"ctypes.dlopen",',
    "open(FILE, 'a').close()": OPENED,
    "import os; os.close(os.open(FILE, os.O_RDWR | os.O_CREAT))": OPENED,
    "import os; os.remove(FILE)": '"os.remove",',
    "import os; os.rename(FILE, 'x')": '"os.rename",',
    "import os; os.mkdir(FILE + '2')": '"os.mkdir",',
    "import os; os.chmod(FILE, 0)": '"os.chmod",',
    "import os, shutil; shutil.rmtree(FOLDER, True); assert not os.path.exists(FOLDER + '/file')": '"shutil.rmtree",',
}


@pytest.mark.parametrize("program", LIMITS)
def test_each_limit_is_what_stops_a_program(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same program passes where just this limit is left out."""
    file, inside = folder / "precious", folder / "inside"
    inside.mkdir()
    for path in (file, inside / "file"):
        path.write_text("precious")
    source, limit = verifiable._CANDIDATE, LIMITS[program]
    without = source.replace(limit, "0" if limit == OPENED else "")
    assert without != source
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"FILE, FOLDER, PORT = {str(file)!r}, {str(inside)!r}, {server.getsockname()[1]}\n{program}"
        assert not passes(program, "pass")
        assert file.read_text() == (inside / "file").read_text() == "precious" and file.stat().st_mode & 0o400
        assert sorted(path.name for path in folder.iterdir()) == ["inside", "mine.py", "precious"]
        monkeypatch.setattr(verifiable, "_CANDIDATE", without)
        assert passes(program, "pass")


@pytest.mark.parametrize(
    "program", ["while True: pass", "import time; time.sleep(60)", "import re; re.match('(a+)+b', 'a' * 60)"]
)
def test_a_program_that_hangs_is_worth_nothing(program: str) -> None:
    start = time.monotonic()
    assert code("", program, {"test": "pass"}, seconds=0.4) == 0.0
    assert 0.3 < time.monotonic() - start < 10


def test_the_program_and_its_test_are_read_one_after_the_other() -> None:
    program, test = "def add(a, b): return 0\nx = '''", "assert add(1, 2) == 3  # '''"
    exec(f"{program}\n{test}", {})  # in one piece, the program's open string hides the test
    assert code("", program, {"test": test}) == 0.0


def test_a_computer_that_runs_no_program_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    verifiable.check_code()
    monkeypatch.setattr(verifiable, "MEMORY_BYTES", 2**20)
    with pytest.raises(ValueError, match="does not run under the limits"):
        verifiable.check_code()


def human_eval(shared: Path) -> list[dict[str, str]]:
    with gzip.open(shared / "eval" / "HumanEval.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def check_human_eval(rows: list[dict[str, str]], thorough: bool = False) -> None:
    for row in rows:
        solution, prompt = row["canonical_solution"], row["prompt"]
        signature = f"def {row['entry_point']}" + prompt.rpartition(f"def {row['entry_point']}")[2]
        assert code(prompt, solution, row) == 1.0, row["task_id"]
        assert code(prompt, solution[: len(solution) // 2], row) == 0.0, row["task_id"]
        if thorough:
            assert code(prompt, f"Here:\n```python\n{signature}{solution}```\n", row) == 1.0, row["task_id"]
            for wrong in ("", "    return None\n", "    import os; os._exit(0)\n"):
                assert code(prompt, wrong, row) == 0.0, row["task_id"]


def test_solutions_of_human_eval(shared: Path) -> None:
    check_human_eval(human_eval(shared)[::7])


@pytest.mark.slow
def test_all_solutions_of_human_eval(shared: Path) -> None:
    rows = human_eval(shared)
    assert len(rows) == 164
    check_human_eval(rows, thorough=True)


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("arithmetic", (1.0, "arithmetic")), ("0.5*length:80", (0.5, "length:80")), ("-2 * answer", (-2.0, "answer")),
        ("1e-3*code", (1e-3, "code")), ("0*length:5", (0.0, "length:5")), ("contains:3*4", (1.0, "contains:3*4")),
        ("2*contains:3*4", (2.0, "contains:3*4")), (r"format:\d*", (1.0, r"format:\d*")), ("mine:one", (1.0, "mine:one")),
        ("format:a:b*", (1.0, "format:a:b*")), ("mine.py:one", (1.0, "mine.py:one")),
        ("model:runs/reward", (1.0, "model:runs/reward")),
        ("package.module:f", (1.0, "package.module:f")),
    ],
)  # fmt: skip
def test_names_and_weights(spec: str, expected: tuple[float, str]) -> None:
    assert parse(spec) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("aritmetic", "did you mean 'arithmetic'"),
        ("lenght:50", "did you mean 'length'"),
        ("anwser", "did you mean 'answer'"),
        ("", "is not known; rewards: arithmetic, length:N"),
        ("0.1*", "is not known"),
        ("half*length:5", "the weight before .* must be a number.*got 'half'"),
        ("nan*answer", "must be a number"),
        ("1e999*answer", "must be a number"),
        ("length", "needs a number of words, at least 1; got ''"),
        ("length:0", "at least 1; got '0'"),
        ("length:-3", "at least 1"),
        ("length:2.5", "at least 1"),
        ("contains:", "needs a text"),
        ("format:(", "is no regular expression: missing \\)"),
        ("arithmetic:f", "takes no argument .*arithmetic.py:f"),
        ("model:", "needs the folder"),
        ("gone.py:f", "gone.py is no Python file"),
        ("folder/mine:f", "folder/mine is no Python file"),
        ("mine.py:", "is not known"),
        ("mine:1", "is not known"),
        ("gone:f", "there is no module 'gone' in .* or on Python's path"),
        ("contain:please", "no module 'contain'.*did you mean 'contains'"),
        ("mine:lettres", "has no function 'lettres' \\(did you mean 'letters'\\?\\)"),
        ("mine:number", "number in .*mine.py is 3, of the class int, which is no function"),
        ("mine:lonely", "takes \\(prompt\\); a reward takes \\(prompt, response\\)"),
        ("mine:greedy", "takes \\(prompt, response, fields, more\\)"),
        ("mine:keyed", "takes \\(prompt, response, \\*, more\\)"),
        ("model:runs/reward", "cannot be had here"),
    ],
)
def test_names_that_stand_for_nothing(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Rewards([spec])
    assert not isinstance(caught.value, RewardError)


def test_no_reward_and_the_same_twice() -> None:
    with pytest.raises(UserError, match="no reward is given"):
        Rewards([])
    with pytest.raises(UserError, match="'answer' is given twice"):
        Rewards(["answer", "2*answer"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import gone_too", "importing bad fails: ModuleNotFoundError: No module named 'gone_too' \\(bad.py:1\\)"),
        ("x = 1\nx.y", "importing bad fails: AttributeError: 'int' object has no attribute 'y' \\(bad.py:2\\)"),
        ("def f(:", "importing bad fails: SyntaxError: invalid syntax \\(bad.py, line 1\\)"),
        ("import sys; sys.exit(4)", "importing bad fails: SystemExit: 4"),
        ("import os; os._exit(4)", "bad:f: opening them ended the process with exit code 4"),
        ("import ctypes\nctypes.string_at(0)", "bad:f: opening them ended the process by SIGSEGV \\(bad.py:2\\)"),
        ("while True:\n  pass", "bad:f: opening them took longer than 1 s \\(bad.py:"),
    ],
)
def test_modules_that_cannot_be_imported(source: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("bad.py").write_text(source)
    if "while" in source:
        monkeypatch.setattr(rewards, "OPENING_SECONDS", 1.0)
    with pytest.raises(UserError, match=message):
        Rewards(["bad:f"])


def test_modules_are_found_here_and_by_their_path(folder: Path) -> None:
    (folder / "package").mkdir()
    (folder / "package" / "beside.py").write_text("worth = 5")
    (folder / "package" / "code.py").write_text("from beside import worth\ndef f(prompt, response): return worth\n")
    assert score("package/code.py:f") == 5.0
    assert score(f"{folder}/package/code.py:f") == 5.0
    (folder / "package" / "within.py").write_text("from package.beside import worth\ndef f(prompt, response): return worth\n")
    assert score("package.within:f") == 5.0


# ---------------------------------------------------------------------- scores


def test_every_kind_in_one_sum_by_hand() -> None:
    specs = [
        "arithmetic",
        "0.5*length:4",
        "-1*contains:sorry",
        r"2*format:\d+ .*",
        "answer",
        "code",
        "0.1*mine:letters",
        "mine.py:field",
    ]
    with Rewards(specs) as opened:
        assert opened.names == [spec.rpartition("*")[2] if "format" not in spec else r"format:\d+ .*" for spec in specs]
        row = {"answer": "#### 3", "test": "assert 1", "worth": 0.25}
        good, bad = opened([make("2 and then 3", **row), make("Sorry, 2", **row)])
    assert list(good.parts) == opened.names
    assert list(good.parts.values()) == [1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 12.0, 0.25]
    assert good.total == pytest.approx(1 + 0.5 + 2 + 1 + 1.2 + 0.25, rel=0, abs=1e-12)
    assert list(bad.parts.values()) == [1.0, 0.5, 1.0, 0.0, 0.0, 0.0, 8.0, 0.25]
    assert bad.total == pytest.approx(1 + 0.25 - 1 + 0.8 + 0.25, rel=0, abs=1e-12)


def test_answers_keep_their_order() -> None:
    draw = random.Random(0)
    sizes = [(draw.randrange(1, 900), draw.randrange(900)) for _ in range(100)]
    with Rewards(["3*mine:lengths", "-0.5*mine:letters", "mine:field"]) as opened:
        found = opened([make("r" * many, "p" * few, worth=number) for number, (few, many) in enumerate(sizes)])
        assert opened([]) == []
    for number, ((few, many), one) in enumerate(zip(sizes, found, strict=True)):
        assert one.parts == {"mine:lengths": few * 1000 + many, "mine:letters": many, "mine:field": number}
        assert one.total == 3 * (few * 1000 + many) - 0.5 * many + number


@pytest.mark.parametrize(
    ("name", "expected"),
    [("one", 1.0), ("whole", 7.0), ("half", 0.5), ("third", 4.0), ("named", 2.0), ("many", 2.0), ("stdin", 0.0)],
)
def test_what_functions_are_given_and_may_return(name: str, expected: float) -> None:
    assert score(f"mine:{name}", worth=4) == expected


def test_the_prompt_is_what_was_said_last() -> None:
    assert score("mine:lengths", "ab", "c") == 1002.0


@pytest.mark.parametrize(
    "text", ["Tiếng Việt có dấu", "😀" * 100, "\ud800", "\ud83d\ude00\ud800", "a\nb\r\n\0\u2028\x85c", '{"value": 1}\n', ""]
)
def test_texts_arrive_as_they_are(text: str) -> None:
    Path("exact.py").write_text(
        "import zlib\ndef f(prompt, response, fields):\n"
        "    assert prompt == response == fields['text'] == fields['nested'][0]['text']\n"
        "    return zlib.crc32(response.encode('utf-8', 'surrogatepass')) + len(response)\n"
    )
    expected = zlib.crc32(text.encode("utf-8", "surrogatepass")) + len(text)
    assert score("exact:f", text, text, text=text, nested=[{"text": text}]) == expected


def test_large_answers() -> None:
    with Rewards(["mine:letters", "mine:field"]) as opened:
        found = opened([make("é" * 2**20, "p" * 2**20, worth=1, more="x" * 2**20)] * 3)
    assert [one.total for one in found] == [2**20 + 1] * 3


def test_fields_that_json_has_no_form_for_arrive_as_text() -> None:
    Path("fields.py").write_text("def f(prompt, response, fields): return float(fields['odd'] == str(fields['odd']))")
    assert score("fields:f", odd=Fraction(1, 3)) == 1.0


def test_printing_disturbs_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with Rewards(["mine:noise", "mine:letters"]) as opened:
        found = opened([make("ab\ud800😀")] * 3)
    assert [one.parts for one in found] == [{"mine:noise": 2.0, "mine:letters": 4.0}] * 3
    out, errors = capfd.readouterr()
    assert out == ""
    for said in ("printed ab\\ud800😀", '{"value": 4}', '{"value": 5}', '{"value": 6}', "from a child"):
        assert errors.count(said) == 3


def test_the_process_is_light_and_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    assert score("mine:heavy") == 0.0
    assert len({score("mine:hashed") for _ in range(3)}) == 1


def test_hundreds_of_short_calls_take_a_moment() -> None:
    with Rewards(["mine:one", "arithmetic"]) as opened:
        start = time.perf_counter()
        opened([make("2")] * 300)
        assert (time.perf_counter() - start) / 300 < 0.005


def test_a_reward_model_scores_all_answers_at_once() -> None:
    asked: list[object] = []

    def open_model(folder: str) -> Callable[[Any], list[float]]:
        asked.append(folder)

        def scored(answers: Any) -> list[float]:
            asked.append([one.messages[0].role for one in answers])
            return [float(len(one.response)) for one in answers]

        return scored

    with Rewards(["2*model:runs/reward", "mine:one"], open_model=open_model) as opened:
        found = opened([make("abc"), make("a")])
    assert asked == ["runs/reward", ["system", "system"]]
    assert [one.parts for one in found] == [
        {"model:runs/reward": 3.0, "mine:one": 1.0},
        {"model:runs/reward": 1.0, "mine:one": 1.0},
    ]
    assert [list(one.parts) for one in found] == [["model:runs/reward", "mine:one"]] * 2
    assert [one.total for one in found] == [7.0, 3.0]


def test_a_reward_model_that_gives_no_number_is_named() -> None:
    with (
        Rewards(["model:m"], open_model=lambda folder: lambda answers: [0.0, float("nan")]) as opened,
        pytest.raises(RewardError, match="reward 'model:m', b, line 2: gave nan"),
    ):
        opened([make(place="a, line 1"), make(place="b, line 2")])
    with (
        Rewards(["model:m"], open_model=lambda folder: lambda answers: [0.0]) as opened,
        pytest.raises(ValueError, match="shorter"),
    ):
        opened([make(), make()])


def test_a_sum_that_overflows_is_named() -> None:
    with Rewards(["1e308*mine:letters"]) as opened, pytest.raises(RewardError, match="weighted sum is inf"):
        opened([make("abc")])


# ---------------------------------------------------------------------- functions that fail

LATE = "took longer than 0.5 s"
FAILURES = {
    "raises": r"raised JSONDecodeError: Expecting property name .* \(mine.py:LINE\)",
    "leaves": r"raised SystemExit: enough \(mine.py:LINE\)",
    "interrupts": r"raised KeyboardInterrupt \(mine.py:LINE\)",
    "forever": r"raised RecursionError: maximum recursion depth exceeded.* \(mine.py:LINE\)",
    "odd": r"raised Odd \(mine.py:LINE\)",
    "exits": r"ended the process with exit code 3$",
    "dies_with_child": r"ended the process with exit code 4$",
    "crashes": r"ended the process by SIGSEGV \(mine.py:LINE\)",
    "aborts": r"ended the process by SIGABRT \(mine.py:LINE\)",
    "killed": r"ended the process by SIGKILL \(out of memory\?\)",
    "not_a_number": "returned nan",
    "infinite": "returned -inf",
    "too_large": "raised OverflowError",
    "none": "returned None, of the class NoneType; a reward is a finite number",
    "text": "returned '1.0', of the class str",
    "listed": r"returned \[1.0\], of the class list",
    "imaginary": "returned 1j, of the class complex",
    "unshowable": "returned something of the class Unshowable",
}


def failure(name: str, seconds: float = 20.0) -> str:
    """What is said of a function that fails on the second of three answers' rewards."""
    answers = [make("first", place="a.jsonl, line 1"), make("second 😀", "Bao nhiêu? 1+1=", place="a.jsonl, line 2")]
    with Rewards(["mine:one", f"0.5*{name}", "mine:letters"], seconds=seconds) as opened:
        with pytest.raises(RewardError) as caught:
            opened(answers[1:])
        with pytest.raises(RuntimeError, match="closed"):
            opened(answers)
    said = str(caught.value)
    assert said.startswith(f"reward {name!r}, a.jsonl, line 2: ")
    assert said.endswith("\n  prompt: 'Bao nhiêu? 1+1='\n  response: 'second 😀'")
    return said.partition("line 2: ")[2].partition("\n")[0]


@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_named(name: str) -> None:
    body = FUNCTIONS.index(f"def {name}(")
    line = FUNCTIONS[:body].count("\n") + 1 + (name == "raises")  # the only one over two lines
    assert re.match(FAILURES[name].replace("LINE", str(line)), failure(f"mine:{name}"))


def test_a_coroutine_is_no_number(capfd: pytest.CaptureFixture[str]) -> None:
    assert re.match("returned <coroutine object later .*, of the class coroutine", failure("mine:later"))


@pytest.mark.parametrize(
    ("name", "line"), [("loops", "while True: pass"), ("sleeps", "time.sleep(100)"), ("pattern", "re.fullmatch(")]
)
def test_hangs_are_noticed_and_their_process_is_gone(name: str, line: str) -> None:
    start = time.monotonic()
    assert failure(f"mine:{name}", 0.5) == f"{LATE} (mine.py:{line_of(line)}); --reward_seconds is 0.5"
    assert 0.5 <= time.monotonic() - start < 10
    assert is_gone(pid_in("pid"))


def test_a_hanging_pattern_given_by_name() -> None:
    with (
        Rewards(["format:(a+)+b"], seconds=0.5) as opened,
        pytest.raises(RewardError, match=f"'format:.*{LATE};.*\n.*\n.*(6,000 ch|a')"),
    ):
        opened([make("a" * 6000)])


def test_a_hang_that_the_process_cannot_end_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is stopped says nothing, not even where it is; then the caller's clock ends it."""
    monkeypatch.setattr(rewards, "GRACE_SECONDS", 0.3)
    Path("stopped.py").write_text(
        "import os, signal\nfrom mine import pid\ndef f(p, r):\n    pid(p, r)\n    os.kill(os.getpid(), signal.SIGSTOP)"
    )
    assert failure("stopped:f", 0.3) == "took longer than 0.3 s; --reward_seconds is 0.3"
    assert is_gone(pid_in("pid"))


def test_the_children_of_a_function_end_with_it() -> None:
    assert failure("mine:with_child", 0.5).startswith(LATE)
    assert is_gone(pid_in("pid")) and wait_until(lambda: is_gone(pid_in("child")))
    Path("child").unlink()
    assert score("mine:forgets_child") == 1.0
    assert is_gone(pid_in("pid")) and wait_until(lambda: is_gone(pid_in("child")))


def test_time_is_counted_for_each_call_and_not_for_the_batch() -> None:
    Path("steady.py").write_text("import time\ndef f(prompt, response):\n    time.sleep(0.25)\n    return 1.0\n")
    with Rewards(["steady:f"], seconds=0.7) as opened:
        assert len(opened([make()] * 3)) == 3


def test_long_texts_are_shortened_in_errors() -> None:
    with Rewards(["mine:none"]) as opened, pytest.raises(RewardError) as caught:
        opened([make("a" * 10**6 + "\ud800", "b" * 161)])
    said = str(caught.value)
    assert "(1,000,001 characters)" in said and "(161 characters)" in said and "\\ud800'" in said
    assert len(said) < 600
    said.encode("ascii")


def test_a_sample_without_what_a_reward_needs_is_named() -> None:
    for spec, message in (("arithmetic", "no expression"), ("answer", "field `answer`"), ("code", "needs its tests")):
        with (
            Rewards([spec]) as opened,
            pytest.raises(RewardError, match=f"{spec}', sums.jsonl, line 3: raised ValueError: .*{message}"),
        ):
            opened([make(prompt="hello")])


SLEEPS = f"{LATE} (mine.py:{line_of('time.sleep(100)')}); --reward_seconds is 0.5"
MISTAKES: dict[str, tuple[str, str, Callable[[], bool]]] = {
    "no watch": ('watch(first["seconds"])', "pass", lambda: failure("mine:sleeps", 0.5) == SLEEPS),
    "stdout is the pipe": ("os.dup2(2, 1)", "pass", lambda: score("mine:noise", seconds=0.8) == 2.0),
    "stdin is the pipe": ("os.dup2(nothing.fileno(), 0)", "pass", lambda: score("mine:stdin", seconds=0.8) == 0.0),
    "only some errors": (
        "except BaseException as error:  # S",
        "except Exception as error:  #",
        lambda: "raised" in failure("mine:leaves"),
    ),
    "nan": ("if math.isfinite(value):", "if True:", lambda: failure("mine:not_a_number").startswith("returned nan")),
    "anything": ("isinstance(result, numbers.Real)", "result", lambda: failure("mine:text").startswith("returned '1.0'")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_process_is_noticed(mistake: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    right, wrong, holds = MISTAKES[mistake]
    source = Path(str(reward_worker.__file__)).read_text()
    start = subprocess.Popen

    def start_copy(command: list[str], **rest: Any) -> Any:
        return start([*command[:2], "copy_of_reward_worker"] if "-m" in command else command, **rest)

    monkeypatch.setattr(subprocess, "Popen", start_copy)
    copy, package = folder / "copy_of_reward_worker.py", f"Path({str(Path(reward_worker.__file__).parents[1])!r})"
    source = source.replace("Path(__file__).parents[1]", package)
    copy.write_text(source)
    assert holds()
    assert right in source
    copy.write_text(source.replace(right, wrong))
    monkeypatch.setattr(rewards, "GRACE_SECONDS", 0.3)
    survives = False
    with contextlib.suppress(AssertionError, UserError, ValueError, pytest.fail.Exception):  # nothing to be read comes back
        survives = holds()
    assert not survives


# ---------------------------------------------------------------------- the parent ends

PARENT = """
import os, signal, sys, time
os.chdir(sys.argv[1])
from glassgpt.text.chat import Message
from glassgpt.tuning.rewards import Answer, Rewards
name, seconds, what = sys.argv[2:5]
noted = []
if what == "note":  # as a training loop does
    signal.signal(signal.SIGINT, lambda number, frame: noted.append(int(number)))
with Rewards([name], seconds=float(seconds)) as rewards:
    answer = Answer((Message("user", "p"),), "x = 1", "line 1", {"test": "import time; time.sleep(100)"})
    print(rewards([answer])[0].total, noted, flush=True)
    if what == "wait":
        time.sleep(100)
    if what == "leave":
        os._exit(0)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("name", ["mine:pattern", "mine:pid"])
def test_no_orphan_is_left_when_the_parent_is_ended(
    number: signal.Signals, name: str, folder: Path, start_python: Callable[..., subprocess.Popen[str]]
) -> None:
    """In the middle of a function that holds the interpreter's lock, and between two calls."""
    with start_python(PARENT, folder, name, 0.8, "wait") as parent:
        worker = pid_in("pid")
        assert not is_gone(worker)
        parent.send_signal(number)
        parent.wait(timeout=30)
        start = time.monotonic()
        assert wait_until(lambda: is_gone(worker), 10)
        if number == signal.SIGINT:
            assert time.monotonic() - start < 1  # the `with` has ended it
        assert parent.stderr is not None
        assert number != signal.SIGINT or "KeyboardInterrupt" in parent.stderr.read()


def test_no_orphan_is_left_when_the_parent_leaves_without_closing(folder: Path, start_python: Any) -> None:
    with start_python(PARENT, folder, "mine:pid", 20, "leave") as parent:
        worker = pid_in("pid")
        parent.wait(timeout=30)
        assert wait_until(lambda: is_gone(worker), 10)


def test_the_program_of_a_code_reward_ends_with_an_interrupt(folder: Path, start_python: Any) -> None:
    def children(pid: int) -> list[int]:
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
        return [int(child) for child in found.stdout.split()]

    with start_python(PARENT, folder, "code", 60, "wait") as parent:
        workers: list[int] = []
        program: list[int] = []

        def is_running() -> bool:
            workers[:] = children(parent.pid)
            program[:] = [child for worker in workers for child in children(worker)]
            return bool(program)

        assert wait_until(is_running)
        time.sleep(0.3)  # beyond the first program, which tries the limits
        assert wait_until(is_running)
        parent.send_signal(signal.SIGINT)
        parent.wait(timeout=30)
        assert all(wait_until(lambda pid=pid: is_gone(pid), 5) for pid in [*workers, *program])


def test_the_first_ctrl_c_lets_a_reward_finish(folder: Path) -> None:
    """A terminal sends it to every process of the foreground; the training loop notes it and ends after the step."""
    command = [sys.executable, "-c", PARENT, str(folder), "mine:slow", "20", "note"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0) as parent:
        pid_in("pid")
        os.killpg(parent.pid, signal.SIGINT)
        out, errors = parent.communicate(timeout=30)
    assert (out, errors, parent.returncode) == ("1.0 [2]\n", "", 0)
