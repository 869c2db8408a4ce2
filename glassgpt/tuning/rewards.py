"""Rewards of reinforcement learning: what an answer is worth, as a sum of named parts.

Functions run in a process of their own, so that one that hangs, crashes or raises is noticed, whatever it does, and no training
run hangs or dies with it.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from glassgpt.config import UserError, nearest
from glassgpt.text.chat import Message
from glassgpt.tuning import reward_worker, verifiable

GRAMMAR = "arithmetic, length:N, contains:TEXT, format:REGEX, answer, code, model:FOLDER, module:function"
KINDS = (*verifiable.WITHOUT_ARGUMENT, *verifiable.WITH_ARGUMENT, "model")
OPENING_SECONDS = 120.0
"""Longest that the functions' modules may take to be imported."""
GRACE_SECONDS = 2.0
"""How much longer than the limit to wait: the process ends itself at the limit, and says where it was."""
POLL_SECONDS = 0.1
SHOWN_CHARACTERS = 160


@dataclass(frozen=True)
class Answer:
    """One sampled answer."""

    messages: tuple[Message, ...]
    """The prompt as a conversation."""
    response: str
    place: str
    """Where the prompt stands: "file.jsonl, line 3"."""
    fields: Mapping[str, Any]
    """The prompt's row: `answer`, `test` and whatever else it has."""
    is_whole: bool = True
    """Whether it ended by itself; one that was cut off did not."""

    @property
    def prompt(self) -> str:
        """What was said last."""
        return self.messages[-1].content


@dataclass(frozen=True)
class Scores:
    """What an answer is worth."""

    parts: dict[str, float]
    """By the name of the reward, not weighted."""
    total: float
    """The sum of the weighted parts."""


class RewardError(UserError):
    """A reward that could not be had for an answer. Nothing was trained on it."""


ScoreAnswers = Callable[[Sequence[Answer]], Sequence[float]]


class Rewards:
    """What answers are worth, by names like `arithmetic`, `0.5*length:80`, `rewards.py:f` or `model:runs/reward`.

    Raises UserError for a name that stands for nothing, and RewardError, naming the reward and the answer, for a function that
    takes longer than `seconds`, raises, crashes or returns no finite number; after that it is closed. Functions are called one
    after the other in a process of their own; the same answers give the same scores as far as the functions do.
    """

    def __init__(
        self, specs: Sequence[str], *, seconds: float = 10.0, open_model: Callable[[str], ScoreAnswers] | None = None
    ) -> None:
        parsed = [parse(spec) for spec in specs]
        self.names = [name for _, name in parsed]
        self._weights = [weight for weight, _ in parsed]
        if not parsed:
            raise UserError(f"no reward is given; --reward takes one or more of {GRAMMAR}")
        for name in self.names:
            if self.names.count(name) > 1:
                raise UserError(f"the reward {name!r} is given twice; give it once, with the sum of the weights")
        self._seconds = seconds
        self._models: dict[str, ScoreAnswers] = {}
        for name in self.names:
            if name.startswith("model:"):
                if open_model is None:
                    raise UserError(f"{name}: rewards of a model cannot be had here")
                self._models[name] = open_model(name.partition(":")[2])
        self._functions = [name for name in self.names if name not in self._models]
        self._takes_fields = False
        self._process = _Process() if self._functions else None
        try:
            self._open_functions()
        except BaseException:
            self.close(at_once=True)
            raise

    def _open_functions(self) -> None:
        if not self._process:
            return
        try:
            request = {"functions": self._functions, "seconds": self._seconds, "opening_seconds": OPENING_SECONDS}
            self._process.send(request, OPENING_SECONDS)
            reply = self._process.receive(OPENING_SECONDS)
        except _LostError as lost:
            raise UserError(f"rewards {', '.join(self._functions)}: opening them {lost}") from lost
        if "error" in reply:
            known = reply["known"] or KINDS
            raise UserError(f"reward {self._functions[reply['number']]!r}: {reply['error']}{nearest(reply['given'], known)}")
        self._takes_fields = reply["takes_fields"]

    def __call__(self, answers: Sequence[Answer]) -> list[Scores]:
        """The scores of each answer, in their order."""
        try:
            columns = {name: self._of_model(name, score, answers) for name, score in self._models.items()}
            rows = [self._of_functions(answer) for answer in answers]
            return [
                self._weighed(answer, {**row, **{name: column[number] for name, column in columns.items()}})
                for number, (answer, row) in enumerate(zip(answers, rows, strict=True))
            ]
        except BaseException:  # a reply may still be on its way
            self.close(at_once=True)
            raise

    def _of_functions(self, answer: Answer) -> dict[str, float]:
        """What each function says of one answer."""
        if not self._functions:
            return {}
        if not self._process:
            raise RuntimeError("these rewards are closed")
        scores: dict[str, float] = {}
        fields = dict(answer.fields) if self._takes_fields else {}
        for name in self._functions:
            try:
                if not scores:
                    self._process.send([answer.prompt, answer.response, fields], self._seconds)
                reply = self._process.receive(self._seconds)
            except _LostError as lost:
                hint = f"; --reward_seconds is {self._seconds:g}" if lost.is_late else ""
                raise _failed(name, answer, f"{lost}{hint}") from lost
            if "error" in reply:
                raise _failed(name, answer, reply["error"])
            scores[name] = reply["value"]
        return scores

    def _of_model(self, name: str, score: ScoreAnswers, answers: Sequence[Answer]) -> list[float]:
        """What a reward model says of all answers."""
        scores = [float(value) for value in score(answers)]
        for answer, value in zip(answers, scores, strict=True):
            if not math.isfinite(value):
                raise _failed(name, answer, f"gave {value}; a reward is a finite number")
        return scores

    def _weighed(self, answer: Answer, scores: Mapping[str, float]) -> Scores:
        parts = {name: scores[name] for name in self.names}
        total = sum(weight * part for weight, part in zip(self._weights, parts.values(), strict=True))
        if not math.isfinite(total):
            raise _failed(" + ".join(self.names), answer, f"gave {parts}, whose weighted sum is {total}")
        return Scores(parts, total)

    def close(self, *, at_once: bool = False) -> None:
        """End the functions' process and every process that it has started."""
        if self._process:
            process, self._process = self._process, None
            process.close(0.0 if at_once else GRACE_SECONDS)

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(at_once=kind is not None)


# ---------------------------------------------------------------------- names


def parse(spec: str) -> tuple[float, str]:
    """The weight and the name in `WEIGHT*NAME` or `NAME`; raises UserError for a name that cannot stand for a reward."""
    weight, name = 1.0, spec.strip()
    before, star, after = name.partition("*")
    if star and ":" not in before:
        try:
            weight, name = float(before), after.strip()
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise UserError(f"reward {spec!r}: the weight before * must be a number, e.g. 0.5*length:80; got {before!r}")
    kind, colon, argument = name.partition(":")
    if kind in verifiable.WITHOUT_ARGUMENT:
        if colon:
            raise UserError(
                f"reward {spec!r}: {kind} takes no argument (for a function in {kind}.py: {kind}.py:{argument or 'f'})"
            )
    elif kind in verifiable.WITH_ARGUMENT:
        try:
            verifiable.WITH_ARGUMENT[kind](argument)
        except ValueError as error:
            raise UserError(f"reward {spec!r}: {kind} {error}") from error
    elif kind == "model":
        if not argument:
            raise UserError(f"reward {spec!r}: model needs the folder of a reward model, as `glassgpt reward` writes it")
    else:
        _check_function(spec, name)
    return weight, name


def _check_function(spec: str, name: str) -> None:
    """Raises UserError unless a name can be module:function or file.py:function."""
    module, _, function = name.rpartition(":")
    is_path = module.endswith(".py") or os.sep in module
    if not function.isidentifier() or not (is_path or all(part.isidentifier() for part in module.split("."))):
        kind = name.partition(":")[0]
        raise UserError(f"reward {spec!r} is not known{nearest(kind, KINDS)}; rewards: {GRAMMAR}")
    if is_path and not (module.endswith(".py") and os.path.isfile(module)):
        raise UserError(
            f"reward {spec!r}: {module} is no Python file (a function is given as module:function or file.py:function)"
        )


# ---------------------------------------------------------------------- the process


class _LostError(Exception):
    """The process has ended, or was ended for its silence: what the function did to it."""

    is_late = False


class _Process:
    """The process of the functions: a line goes out, lines come back, each within a time."""

    def __init__(self) -> None:
        # a session of its own: Ctrl-C in a terminal is for the training loop, and what functions start can be ended with them;
        # and a hash seed: the order of a set must not move a reward
        command = [sys.executable, "-m", "glassgpt.tuning.reward_worker"]
        environment, pipe = {"PYTHONHASHSEED": "0", **os.environ}, subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0, env=environment, start_new_session=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.pid = self._process.pid
        self._to, self._from = self._process.stdin, self._process.stdout
        self._read = b""
        for file in (self._to, self._from):
            os.set_blocking(file.fileno(), False)

    def send(self, request: object, seconds: float) -> None:
        """Write one line; raises _LostError when it is not read."""
        data, end = memoryview(reward_worker.encode(request)), time.monotonic() + seconds + GRACE_SECONDS
        while data:
            try:
                data = data[os.write(self._to.fileno(), data) :]
            except BlockingIOError:
                if not self._is_ready(self._to, selectors.EVENT_WRITE, end):
                    raise self._lost(seconds) from None
            except BrokenPipeError:
                raise self._lost(seconds) from None

    def receive(self, seconds: float) -> dict[str, Any]:
        """The next line; raises _LostError when none comes in time."""
        end = time.monotonic() + seconds + GRACE_SECONDS
        while not (self._read.startswith(b"{") and b"\n" in self._read):  # else it is no reply, but where it was when it ended
            block = os.read(self._from.fileno(), 2**16) if self._is_ready(self._from, selectors.EVENT_READ, end) else b""
            if not block:
                raise self._lost(seconds)
            self._read += block
        line, _, self._read = self._read.partition(b"\n")
        return dict(reward_worker.decode(line))

    def _is_ready(self, file: Any, event: int, end: float) -> bool:
        """Wait until a pipe can be used; false when the process has ended or the time is over."""
        with selectors.DefaultSelector() as selector:
            selector.register(file, event)
            while True:
                has_ended = self._process.poll() is not None  # first, so that its last words are not missed
                if selector.select(0 if has_ended else max(0, min(POLL_SECONDS, end - time.monotonic()))):
                    return True
                if has_ended or time.monotonic() >= end:
                    return False

    def _lost(self, seconds: float) -> _LostError:
        """End the process and say what has become of it."""
        is_at_end = False
        with contextlib.suppress(BlockingIOError):
            while block := os.read(self._from.fileno(), 2**16):
                self._read += block
            is_at_end = True
        said = self._read.decode("utf-8", "replace")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_SECONDS if is_at_end else 0)
        code = self._process.poll()
        self.close(0.0)
        if code is None or said.startswith("Timeout"):
            lost = _LostError(f"took longer than {seconds:g} s{_place(said)}")
            lost.is_late = True
            return lost
        if code < 0:
            name = {number.value: number.name for number in signal.Signals}.get(-code, f"signal {-code}")
            return _LostError(f"ended the process by {name}{_place(said)}{' (out of memory?)' if name == 'SIGKILL' else ''}")
        return _LostError(f"ended the process with exit code {code}{_place(said)}")

    def close(self, seconds: float) -> None:
        """Let the process end for so long, then kill it and all that it has started."""
        for file in (self._to, self._from):
            file.close()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()


def _place(said: str) -> str:
    """Where the functions' thread was, by what faulthandler wrote when the process ended."""
    threads = re.split(r"\(most recent call first\):", said)
    mine = [thread for thread in threads if "reward_worker.py" in thread] or threads
    calls = [
        (re.sub(r"\\(?:x..|u.{4}|U.{8})", lambda match: chr(int(match[0][2:], 16)), file), int(line))
        for file, line in re.findall(r'File "(.*)", line (\d+) in', mine[0])
    ]
    where = reward_worker.users_place(calls)
    return f" ({where})" if where else ""


# ---------------------------------------------------------------------- what is said of a failure


def _failed(name: str, answer: Answer, what: str) -> RewardError:
    shown = "".join(f"\n  {label}: {_shown(text)}" for label, text in (("prompt", answer.prompt), ("response", answer.response)))
    return RewardError(f"reward {name!r}, {answer.place}: {what}{shown}")


def _shown(text: str) -> str:
    """A text in quotes, its middle left out where it is long."""
    if len(text) <= SHOWN_CHARACTERS:
        return repr(text)
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]!r} ... {text[-half:]!r} ({len(text):,} characters)"
