"""The parent's side of a worker process: start it, ask it, stop it while another one is timed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from glassgpt.lab.bench.generate.systems import PEERS, System

QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}


class Failed(Exception):  # noqa: N818
    """A system did not do what it was asked; the message says why in one line."""


class Worker:
    """A process that serves one system. Between two questions it is stopped (SIGSTOP): no thread of it spins."""

    def __init__(self, system: System, files: Path, threads: int, log: Path) -> None:
        self.system, self._log = system, log
        self._process = _start("serve", system, files, str(threads), threads, log)
        try:
            _read(self._process, log)
        except BaseException:
            _end(self._process)
            raise
        self._signal("SIGSTOP")

    def generate(self, prompts: list[list[int]], new_tokens: int, warm_tokens: int = 0) -> dict[str, Any]:
        """{"seconds": end of each step, "ids": new ids of each row, "peak_bytes": most memory so far}; raises Failed.

        Before the timed call a shorter one of `warm_tokens` brings back what other systems have driven out of the caches.
        """
        return self._ask(job="generate", prompts=prompts, new_tokens=new_tokens, warm_tokens=warm_tokens)

    def load_again(self) -> float:
        """Seconds that loading takes in a process that has imported everything; raises Failed."""
        seconds: float = self._ask(job="load")["seconds"]
        return seconds

    def _ask(self, **question: Any) -> dict[str, Any]:
        self._signal("SIGCONT")
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it has ended; _read says so
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        answer = _read(self._process, self._log)
        self._signal("SIGSTOP")
        return answer

    def close(self) -> None:
        """Kill it, stopped or not."""
        _end(self._process)

    def _signal(self, name: str) -> None:
        if hasattr(signal, name) and self._process.poll() is None:
            self._process.send_signal(getattr(signal, name))


def prepare(system: System, hf_folder: Path, files: Path, threads: int, log: Path) -> None:
    """Let a process of its own convert the weights; raises Failed."""
    process = _start("prepare", system, files, str(hf_folder), threads, log)
    try:
        _read(process, log)
    finally:
        _end(process)


def _start(job: str, system: System, files: Path, last: str, threads: int, log: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "glassgpt.lab.bench.generate.worker",
        job,
        PEERS[system.peer],
        system.variant,
        str(files),
        last,
    ]
    environment = os.environ | QUIET | {"OMP_NUM_THREADS": str(threads)}
    with log.open("w") as errors:
        return subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _read(process: subprocess.Popen[str], log: Path) -> dict[str, Any]:
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        told = log.read_text(errors="replace").strip().splitlines()
        raise Failed(f"its process ended with code {process.wait()}" + (f": {told[-1][:200]}" if told else ""))
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise Failed(answer["error"])
    return answer
