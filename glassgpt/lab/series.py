"""A series of `pretrain` runs in one folder, over one tokenizer and corpus: what is missing is trained or continued."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from glassgpt.config import Pretrain, UserError
from glassgpt.config.files import CONFIG_FILE, read_yaml, to_plain, write_yaml
from glassgpt.train.pretrain import SHARDS, TOKENIZER_FILE, pretrain
from glassgpt.train.run import read_log

RUNS = "runs"


def open_folder(out: Path, config: Any, may_differ: Sequence[str], what: str) -> None:
    """Make the folder with its configuration, or check that the one there asks for the same runs.

    Raises UserError when it holds something else, or when a field that is not in `may_differ` has another value there.
    """
    path = out / CONFIG_FILE
    if path.exists():
        before = read_yaml(path, type(config))
        for name in to_plain(config):
            if name not in may_differ and getattr(before, name) != getattr(config, name):
                raise UserError(
                    f"{out} was begun with {name} = {getattr(before, name)}; this asks for {getattr(config, name)}."
                    " Leave it as it was, or choose another out_dir"
                )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty and holds no {what}; choose another out_dir")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_yaml(path, config)


def train_missing(
    out: Path, runs: Sequence[Pretrain], work: Callable[[Pretrain], float], describe: Callable[[Pretrain], str]
) -> None:
    """Train every run that is not complete, in order; a run's `out_dir` is its name alone.

    `work(run)` is proportional to its time. Raises UserError, with the run's name, for whatever `pretrain` refuses and when a
    run was told to stop.
    """
    console = Console(stderr=True)
    left = [run for run in runs if not is_complete(out / RUNS / run.out_dir, run)]
    if len(left) < len(runs):
        console.print(f"{len(runs) - len(left)} of {len(runs)} runs are complete already", highlight=False)
    began, eta = time.perf_counter(), ""
    for number, run in enumerate(left, 1):
        title = f"run {number} of {len(left)}: {run.out_dir} ({describe(run)}){eta}"
        console.print(title, highlight=False, soft_wrap=True)
        started = time.perf_counter()
        try:
            _train(out, run)
        except UserError as error:
            raise UserError(f"run {run.out_dir}: {error}") from error
        if not is_complete(out / RUNS / run.out_dir, run):
            raise UserError(f"run {run.out_dir} was told to stop and is saved; the same command goes on from there")
        now = time.perf_counter()
        ahead = sum(map(work, left[number:])) / work(run)  # in runs like this one, the nearest in cost
        eta = f"; {(now - began) / 60:.1f} min gone, eta {(now - started) * ahead / 60:.1f} min"


def _train(out: Path, run: Pretrain) -> None:
    """Train a run, or continue it. It sees the series' tokenizer and shards through links: they exist once."""
    folder = out / RUNS / run.out_dir
    data = replace(run.data, tokenizer=str((out / TOKENIZER_FILE).resolve()))
    run = replace(run, out_dir=str(folder), data=data)
    if not (folder / CONFIG_FILE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name in (TOKENIZER_FILE, SHARDS):
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(Path(os.path.relpath(out, folder)) / name)
        write_yaml(folder / CONFIG_FILE, run)
    pretrain(replace(run, resume=True))


def is_complete(folder: Path, run: Pretrain) -> bool:
    """Whether the run made its last step and measured its loss."""
    entries = read_log(folder)
    return bool(entries) and entries[-1]["step"] == run.max_steps and "val_loss" in entries[-1]
