"""`glassgpt pretrain --chaos N`: a run is killed N times in every way we know, resumed, and must end in the same bits."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from glassgpt.config import Pretrain, UserError
from glassgpt.config.files import CONFIG_FILE, write_yaml
from glassgpt.loading import complete_checkpoints
from glassgpt.train.run import LOG_FILE, read_log

REPORT_FILE = "chaos.json"
POLL_SECONDS = 0.002
START_SECONDS = 120.0
"""A child that has logged no further step for so long has failed."""
RUN_FILES = ("calm", "stormy")


class Child:
    """One `glassgpt pretrain` of the stormy run."""

    def __init__(self, config_file: Path, run: Path, limit_bytes: int | None = None) -> None:
        arguments = [sys.executable, "-m", "glassgpt", "pretrain", "--config", str(config_file), "--out_dir", str(run)]
        arguments += ["--resume"] if (run / CONFIG_FILE).exists() else []

        def limit() -> None:  # a disk that is full: no file may grow beyond this
            if limit_bytes is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

        self.run, self.errors = run, run.parent / "stderr.txt"
        self._log_before = _inode(run / LOG_FILE)
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(arguments, stderr=errors, stdout=subprocess.DEVNULL, preexec_fn=limit)

    def is_beyond(self, step: int) -> bool:
        """Whether this child has logged more than `step` steps. It opens the log anew, after it has set its signal handlers."""
        return _inode(self.run / LOG_FILE) != self._log_before and steps_logged(self.run) > step

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Whether the condition came true while the child lived."""
        end, seen = time.monotonic() + START_SECONDS, 0
        while time.monotonic() < end:
            if condition():
                return True
            if self.process.poll() is not None:
                return False
            if (steps := steps_logged(self.run)) > seen:
                end, seen = time.monotonic() + START_SECONDS, steps
            time.sleep(POLL_SECONDS)
        self.process.kill()
        raise UserError(f"chaos: the child does not get on; its errors are in {self.errors}")


def chaos(config: Pretrain) -> Path:
    """Train `config` once in calm and once while it is killed `config.chaos` times; returns the folder with the report.

    Kinds: SIGKILL after some steps, SIGTERM (which must save and exit with 0), SIGKILL inside a save, a disk that is full in the
    middle of a save, and half-written files put in the way before the next start. After each one, no complete checkpoint may
    have been lost but to pruning. Raises UserError when anything was lost or the final weights differ in any bit.
    """
    out, console = Path(config.out_dir), Console(stderr=True)
    if out.exists():
        raise UserError(f"{out} exists already; chaos needs a folder of its own")
    if not config.save_interval:
        raise UserError("chaos needs a save_interval above 0: without checkpoints there is nothing to resume from")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("chaos kills runs of one process; start it without torchrun")
    out.mkdir(parents=True)
    calm, stormy = (out / name for name in RUN_FILES)
    asked = out / CONFIG_FILE
    write_yaml(asked, dataclasses.replace(config, chaos=0, resume=False, out_dir=str(calm)))
    console.print(f"the calm run: {config.max_steps} steps", highlight=False)
    child = Child(asked, calm)
    if child.process.wait():
        raise UserError(f"chaos: the run fails by itself:\n{child.errors.read_text()[-500:]}")

    file = calm / CONFIG_FILE  # what `auto` stood for is settled there
    draw = random.Random(config.seed)
    kinds = [KINDS[number % len(KINDS)] for number in range(config.chaos)]
    draw.shuffle(kinds)
    counts: Counter[str] = Counter()
    lost = 0
    # kills are spread over the run, so that each part of it meets some
    for number, kind in enumerate(kinds):
        reached = newest(stormy)
        goal = max(reached, round(config.max_steps * number / max(1, config.chaos)))
        if reached >= config.max_steps:
            break
        landed = kind(file, stormy, min(goal, config.max_steps - 1), draw)
        counts[f"{kind.__name__}{'' if landed else ' (too late)'}"] += 1
        after = newest(stormy)
        if after < reached:
            lost += 1
            console.print(f"kill {number + 1}: checkpoint {reached} is lost, {after} is the newest", style="red")
        name = kind.__name__.replace("_", " ")
        console.print(f"kill {number + 1}/{config.chaos}: {name}; step {after} is safe", highlight=False)
    child = Child(file, stormy)
    if child.process.wait():
        raise UserError(f"chaos: the last resume failed:\n{child.errors.read_text()[-500:]}")
    same = digest(calm) == digest(stormy)
    kills = sum(count for name, count in counts.items() if "late" not in name)
    report = {"kills": kills, "kinds": dict(counts), "lost_checkpoints": lost, "identical": same, "sha256": digest(calm)}
    (out / REPORT_FILE).write_text(json.dumps(report, indent=1))
    how = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(counts.items()))
    console.print(f"{kills} kills ({how}); {lost} checkpoints lost; final weights {'identical' if same else 'DIFFERENT'}")
    if lost or not same:
        raise UserError(f"chaos: {lost} checkpoints lost, weights {'identical' if same else 'differ'}; see {out / REPORT_FILE}")
    return out


def newest(run: Path) -> int:
    """Steps of the newest complete checkpoint; 0 when there is none."""
    saved = complete_checkpoints(run)
    return int(saved[-1].name.removeprefix("step-")) if saved else 0


def digest(run: Path) -> str:
    """SHA-256 of the last checkpoint's weights and optimiser state."""
    folder = complete_checkpoints(run)[-1]
    files = sorted(path for path in folder.rglob("*.safetensors"))
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def _inode(path: Path) -> int:
    return path.stat().st_ino if path.exists() else 0


def steps_logged(run: Path) -> int:
    """Steps that the run's log shows."""
    entries = read_log(run)
    return entries[-1]["step"] if entries else 0


# ---------------------------------------------------------------------- ways to be killed; each says whether it struck in time


def sigkill(file: Path, run: Path, goal: int, draw: random.Random) -> bool:
    """`kill -9` at any moment: during start-up, or a random time after the goal."""
    child = Child(file, run)
    if draw.random() < 0.25:
        time.sleep(draw.uniform(0, 3))
    else:
        child.wait_for(lambda: child.is_beyond(goal))
        time.sleep(draw.uniform(0, 0.3))
    return _end(child, signal.SIGKILL)


def sigterm(file: Path, run: Path, goal: int, draw: random.Random) -> bool:
    """SIGTERM: the step that it is in is finished and saved, and the exit code is 0."""
    child = Child(file, run)
    child.wait_for(lambda: child.is_beyond(goal))
    time.sleep(draw.uniform(0, 0.1))
    before = steps_logged(run)
    struck = child.process.poll() is None
    child.process.send_signal(signal.SIGTERM)
    code = child.process.wait()
    if struck and code != 0:
        raise UserError(f"chaos: SIGTERM ended with exit code {code}; see {child.errors}")
    if newest(run) < before:
        raise UserError(f"chaos: SIGTERM after step {before} saved step {newest(run)} only")
    return struck


def kill_inside_save(file: Path, run: Path, goal: int, draw: random.Random) -> bool:
    """`kill -9` while a checkpoint is being written: as soon as its hidden folder is there, or a moment later."""
    child = Child(file, run)
    child.wait_for(lambda: child.is_beyond(goal))
    saving = child.wait_for(lambda: any((run / "checkpoints").glob(f".tmp-step-*-{child.process.pid}")))
    time.sleep(draw.choice([0, 0.001, 0.003, 0.01]))
    return _end(child, signal.SIGKILL) and saving


def full_disk(file: Path, run: Path, goal: int, draw: random.Random) -> bool:
    """A disk with room for part of a checkpoint: the save fails with a message, and the exit code is 2."""
    written = complete_checkpoints(file.parent)[-1]  # the calm run's: as large as this one's will be
    largest = max(path.stat().st_size for path in written.rglob("*.safetensors"))
    child = Child(file, run, limit_bytes=int(largest * draw.uniform(0.1, 0.9)))
    code = child.process.wait()
    if code != 2:
        raise UserError(f"chaos: a full disk ended with exit code {code}, not 2; see {child.errors}")
    return True


def garbage(file: Path, run: Path, goal: int, draw: random.Random) -> bool:
    """`kill -9`, then half-written files in the way: a cut-off log line, a truncated newer checkpoint, an unfinished folder."""
    struck = sigkill(file, run, goal, draw)
    saved = complete_checkpoints(run)
    if saved:
        number = newest(run) + draw.randint(1, 3)
        torn = saved[-1].with_name(f"step-{number:06d}")
        with contextlib.suppress(FileExistsError):
            shutil.copytree(saved[-1], torn)
            victim = draw.choice(sorted(torn.rglob("*.safetensors")))
            os.truncate(victim, victim.stat().st_size // 2)
        unfinished = run / "checkpoints" / f".tmp-step-{number:06d}-999999"
        unfinished.mkdir(exist_ok=True)
        (unfinished / "model.safetensors").write_bytes(draw.randbytes(1000))
    with contextlib.suppress(FileNotFoundError), (run / LOG_FILE).open("a") as log:
        log.write('{"step": 1, "lo')
    return struck


KINDS = (sigkill, sigterm, kill_inside_save, full_disk, garbage)


def _end(child: Child, number: int) -> bool:
    struck = child.process.poll() is None
    child.process.send_signal(number)
    child.process.wait()
    return struck
