"""`glassgpt lab ladder`: from GPT-2 to a modern architecture, one change at a time; what each one buys, and what it costs.

In the default mode a rung keeps all changes before it, also those that cost bits: grouped heads and windows pay in memory, not in
loss, and a ladder that chose its own steps by their results could not be planned or compared. `--mode single` has every
change alone.

What is equal for all rungs: text, tokenizer, held-out text, seeds and with them the batches, the budget, the learning rate of
AdamW. What is not: initial weights (drawn from the same seed, but into other shapes) and the learning rate of Muon.

What is measured how:

    bits per byte       of the whole held-out text after the last step; 95 % t interval over seeds
    difference          paired by seed, with the t interval of the differences; one that holds 0 is "not distinguishable"
    tokens/s, memory    on new models of each rung's shape, which take turns before the first run (lab/ladder/speed.py): a moment
                        of other load meets all of them. The runs' own seconds are reported beside them
    the kernel          `pretrain` always trains with the fastest kernel. A rung whose attention is written out is timed so, and
                        its losses come from runs with the fast one; how far the two differ is measured over five steps.
                        Runs that would be equal are trained once: base and `kernel`, unless the budget is in seconds
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from glassgpt.config import DataConfig, Pretrain, UserError
from glassgpt.config.ladder import Ladder, Rung, climb
from glassgpt.data import Corpus
from glassgpt.lab import series
from glassgpt.lab.ladder import report as ladder_report
from glassgpt.lab.ladder.compare import Result, Trained, compare, step_flops, t_quantile
from glassgpt.lab.ladder.speed import Cost, measure
from glassgpt.loading import pick_device
from glassgpt.train.pretrain import prepare
from glassgpt.train.run import read_log

RESULT_FILE = "ladder.json"
SPEED_FILE = "speed.json"
SAVE_INTERVAL = 200
MAY_DIFFER = ("out_dir", "device", "json")  # on a second call in the same folder


def ladder(config: Ladder) -> Result:
    """Measure every rung's cost, train what is missing, compare; writes ladder.json, ladder.html and the pictures.

    Raises UserError for a rung that cannot be built, when scipy is not installed, when `out_dir` holds something else or another
    ladder, for a budget of less than one step, and for whatever `pretrain` refuses, with the run's name.
    """
    climb(config)  # a rung that cannot be built, or a missing package, is told before minutes of training
    t_quantile(1)
    if config.tokenizer is None and config.model.vocab_size < 257:
        raise UserError(
            f"model.vocab_size must be at least 257 (256 bytes and the end-of-text token); got {config.model.vocab_size}"
        )
    device, out = pick_device(config.device), Path(config.out_dir)
    series.open_folder(out, config, MAY_DIFFER, "ladder")
    data = DataConfig(sources=config.sources, tokenizer=config.tokenizer)
    tokenizer, corpus = prepare(out, data, config.model.vocab_size)
    rungs = climb(replace(config, model=replace(config.model, vocab_size=tokenizer.vocab_size)))
    about, costs = _costs(out, config, rungs, corpus, device)
    runs = plan(config, rungs, costs)

    step_seconds = {run.out_dir: costs[rung].step for rung, own in runs.items() for run in own}
    missing = dict.fromkeys(run for own in zip(*runs.values(), strict=True) for run in own)  # a seed after the other
    series.train_missing(
        out,
        list(missing),
        lambda run: run.max_steps * step_seconds[run.out_dir],
        lambda run: f"{run.max_steps:,} steps, about {run.max_steps * step_seconds[run.out_dir]:.0f} s",
    )
    result = compare(config, about, rungs, costs, {rung: [_read(out, run) for run in own] for rung, own in runs.items()})
    (out / RESULT_FILE).write_text(json.dumps(result.plain(), indent=1) + "\n")
    ladder_report.write(result, out)
    if config.json:
        print(json.dumps(result.plain()))
    else:
        ladder_report.show(result, Console())
    return result


# ---------------------------------------------------------------------- runs


def _costs(
    out: Path, config: Ladder, rungs: Sequence[Rung], corpus: Corpus, device: torch.device
) -> tuple[dict[str, Any], dict[str, Cost]]:
    """What every rung costs: measured once and written down, so that a second call reports the same."""
    path = out / SPEED_FILE
    if path.exists():
        held = json.loads(path.read_text())
        if held["machine"]["device"] != device.type:
            raise UserError(
                f"{out} was measured on {held['machine']['device']} and this is {device.type}; go on with --device"
                f" {held['machine']['device']}, or choose another out_dir"
            )
        return held["machine"], {name: Cost(**cost) for name, cost in held["rungs"].items()}
    told = Console(stderr=True)
    told.print(f"measuring the speed of {len(rungs)} rungs, {config.turns} turns", highlight=False)
    stream = corpus.stream(config.model.context_tokens, config.batch_size, 1, 1, config.seed, None)
    costs = measure(config, rungs, stream.batch, device, lambda text: told.print(text, highlight=False))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    about = {"device": device.type, "name": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps({"machine": about, "rungs": {rung: asdict(cost) for rung, cost in costs.items()}}))
    aside.replace(path)
    return about, costs


def steps(config: Ladder, rung: Rung, step_seconds: float) -> int:
    """Optimiser steps that the budget allows a rung. Raises UserError when it is less than one."""
    if config.budget == "tokens":
        return int(config.tokens // config.step_tokens)
    amount = config.amount or 0.0
    step = step_seconds if config.budget == "seconds" else step_flops(config, rung.model)
    if amount < step:
        raise UserError(f"rung {rung.name}: a step takes {step:.3g} {config.budget} and amount is {amount:g}; raise it")
    return int(amount / step)


def plan(config: Ladder, rungs: Sequence[Rung], costs: dict[str, Cost]) -> dict[str, tuple[Pretrain, ...]]:
    """Every rung's runs, by seed; `out_dir` is a run's name alone. Rungs that would train alike share theirs."""
    named: dict[Pretrain, Pretrain] = {}
    planned = {}
    for rung in rungs:
        n = steps(config, rung, costs[rung.name].step)
        own = []
        for seed in range(config.seed, config.seed + config.seeds):
            run = Pretrain(
                model=rung.model,
                data=DataConfig(sources=config.sources),
                optim=replace(rung.optim, warmup_steps=max(1, n // 10)),
                max_steps=n,
                batch_size=config.batch_size,
                eval_interval=0,
                save_interval=SAVE_INTERVAL,
                seed=seed,
                device=config.device,
                precision=config.precision,
                compile="off",
            )
            own.append(named.setdefault(run, replace(run, out_dir=f"{rung.name}-s{seed}")))
        planned[rung.name] = tuple(own)
    return planned


def _read(out: Path, run: Pretrain) -> Trained:
    entries = read_log(out / series.RUNS / run.out_dir)
    last, seconds = entries[-1], sum(entry["seconds"] for entry in entries)
    return Trained(run.out_dir, run.max_steps, last["val_bits_per_byte"], int(last["val_bytes"]), seconds)
