"""One system in a process of its own: reads questions from stdin and writes answers to stdout, a JSON object a line.

Imports nothing heavy, so that a cold start costs what the engine itself takes. Run by `process.py`:
`python -m glassgpt.lab.bench.generate.worker serve|prepare MODULE VARIANT FILES THREADS|HF_FOLDER`
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any, TextIO


def main(job: str, module: str, variant: str, files: str, last: str) -> None:
    """Answer until stdin ends; {"error": one line} when something fails."""
    _die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what engines print, from C++ too, goes to stderr
    try:
        if job == "prepare":
            importlib.import_module(module).prepare(Path(last), Path(files), variant)
            _send(answers, {})
        else:
            _serve(answers, module, variant, Path(files), int(last))
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        _send(answers, {"error": f"{type(error).__name__}: {first_line}"})
    os._exit(0)  # some engines leave threads behind that never end


def _serve(answers: TextIO, module: str, variant: str, files: Path, threads: int) -> None:
    """Says when it is ready; then generates, or loads once more now that everything is imported, as it is asked."""
    engine = importlib.import_module(module)
    system = engine.System(files, variant, threads)
    _send(answers, {})
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["job"] == "load":
            start = time.perf_counter()
            system = engine.System(files, variant, threads)
            _send(answers, {"seconds": time.perf_counter() - start})
            continue
        if asked["warm_tokens"]:
            system.generate(asked["prompts"], asked["warm_tokens"], lambda: None)
        _send(answers, _timed(system, asked["prompts"], asked["new_tokens"]))


def _timed(system: Any, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Seconds from the start to the end of each step, the new ids of each row, and the most memory held so far."""
    stamps: list[float] = []
    start = time.perf_counter()
    ids = system.generate(prompts, new_tokens, lambda: stamps.append(time.perf_counter() - start))
    if len(stamps) != new_tokens or [len(row) for row in ids] != [new_tokens] * len(prompts):
        raise RuntimeError(f"wrote {[len(row) for row in ids]} tokens in {len(stamps)} steps; {new_tokens} were asked for")
    return {"seconds": stamps, "ids": ids, "peak_bytes": _peak_bytes()}


def _peak_bytes() -> int:
    with contextlib.suppress(OSError, StopIteration):  # Linux; there getrusage counts the parent's memory too
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _die_with_parent() -> None:
    """A worker waits stopped; it must not stay so when the parent is killed."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1  # sys/prctl.h
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _send(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
