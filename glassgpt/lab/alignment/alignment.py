"""`glassgpt lab alignment`: PPO, DPO and GRPO from the same start, for the goal itself and for a proxy of it.

What all runs have in common: start model, problems, steps, answers in a step (DPO: as many in pairs, drawn once from
the start model, and a learning rate of its own). What differs: the method, the reward, and the leash, beta.

    goal    the reward is 1 for an answer that is the right number and nothing else. There is nothing to be gamed: no leash
    proxy   the reward is that of a judge who is content to find the right number, and likes longer answers. Naming many numbers
            pays, and is no answer

Every run writes a checkpoint at each measurement. When it is over they are measured by alignment_measure.Judge, both rewards on
all of them: the truth is no part of a `proxy` run's configuration, and is not computed while it trains.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from glassgpt.config import OptimConfig, UserError
from glassgpt.config.alignment import Alignment
from glassgpt.config.files import CONFIG_FILE, to_plain
from glassgpt.config.tuning import Dpo, Grpo, Ppo, RecordsConfig, Tuning
from glassgpt.lab import series
from glassgpt.lab.alignment import arithmetic
from glassgpt.lab.alignment import report as alignment_report
from glassgpt.lab.alignment import start as alignment_start
from glassgpt.lab.alignment.measure import Judge, Point
from glassgpt.lab.alignment.start import ANSWER_TOKENS, FRESH, HELD_OUT, PROMPTS, pairs_file
from glassgpt.loading import complete_checkpoints, pick_device
from glassgpt.train.run import read_log
from glassgpt.tuning.dpo import dpo
from glassgpt.tuning.grpo import grpo
from glassgpt.tuning.ppo import ppo
from glassgpt.tuning.sft import sft

RESULT_FILE, POINTS_FILE, START = "results.json", "points.json", "start"
MAY_DIFFER = ("out_dir", "device", "json")  # on a second call in the same folder
REWARDS: Mapping[str, Callable[[str, str], float]] = {"goal": arithmetic.exact, "proxy": arithmetic.proxy}
"""What training sees in each experiment."""
STAGES: dict[type[Tuning], Callable[[Any], Path]] = {Ppo: ppo, Dpo: dpo, Grpo: grpo}
METHODS = {Ppo: "PPO", Dpo: "DPO", Grpo: "GRPO"}


@dataclass(frozen=True)
class Run:
    """One training run, measured."""

    name: str
    experiment: str
    method: str
    beta: float
    is_tight: bool
    """Whether beta is the larger of the two."""
    points: tuple[Point, ...]
    """The start model first."""
    seconds: float
    """Time in training steps."""
    margin: float | None
    """DPO: beta times how much more the better answer of a held-out pair has gained; at the end."""
    accuracy: float | None
    """DPO: share of the held-out pairs of which the better answer has gained more; at the end."""
    answers: tuple[str, ...]
    """A few of the last checkpoint's answers."""

    @property
    def best(self) -> Point:
        """Where the truth was highest."""
        return max(self.points, key=lambda point: point.truth)


@dataclass(frozen=True)
class Result:
    """What `glassgpt lab alignment` found."""

    config: Alignment
    parameters: int
    chance: tuple[float, float]
    """Right answers by drawing one as often as it comes, and by always saying the commonest."""
    pairs: dict[str, tuple[int, int]]
    """DPO's pairs by experiment: to learn from, held out."""
    start_seconds: float
    """Time in the training steps of the start model."""
    runs: tuple[Run, ...]

    @property
    def start(self) -> Point:
        return self.runs[0].points[0]

    def of(self, experiment: str) -> list[Run]:
        return [run for run in self.runs if run.experiment == experiment]

    def plain(self) -> dict[str, Any]:
        """For results.json and `--json`."""
        return asdict(self) | {"config": to_plain(self.config)}


def alignment(config: Alignment) -> Result:
    """Make the start model, train and measure what is missing; writes results.json and the chart.

    Raises UserError when `out_dir` holds something else or other runs, and when a run was told to stop.
    """
    out, device, told = Path(config.out_dir), pick_device(config.device), Console(stderr=True)
    series.open_folder(out, config, MAY_DIFFER, "alignment runs")
    learnt, held = alignment_start.write_problems(config, out)
    start = out / series.RUNS / START
    if not (out / FRESH).exists():
        alignment_start.write_fresh(out / FRESH, config.seed)
    for name in alignment_start.lessons(config):
        _train(alignment_start.lesson(config, out, name, out / series.RUNS), sft)
    counts = alignment_start.write_pairs(config, start, learnt, held, REWARDS, out)
    told.print(
        f"start model: {config.school_steps} + {config.start_steps} steps; pairs of its answers: "
        + ", ".join(f"{name} {learn} and {held} held out" for name, (learn, held) in counts.items()),
        highlight=False,
        soft_wrap=True,
    )

    judge, runs = Judge(start, held, config.seed, device), []
    planned = plan(config, out)
    began = time.perf_counter()
    for number, (name, stage) in enumerate(planned.items(), 1):
        gone = f"; {(time.perf_counter() - began) / 60:.1f} min gone" if number > 1 else ""
        told.print(f"run {number} of {len(planned)}: {name} ({stage.max_steps} steps){gone}", highlight=False, soft_wrap=True)
        _train(stage, STAGES[type(stage)])
        runs.append(_measured(name, stage, judge, start))
        last = runs[-1].points[-1]
        told.print(
            f"  proxy {last.proxy:.1%}, truth {last.truth:.1%}, KL {last.kl:.2f}, {last.length:.1f} tokens", highlight=False
        )
    lessons = [out / series.RUNS / name for name in alignment_start.lessons(config)]
    seconds = round(sum(entry["seconds"] for lesson in lessons for entry in read_log(lesson)), 2)
    size = sum(p.numel() for p in judge.start.parameters())
    result = Result(config, size, arithmetic.chance(learnt, held), counts, seconds, tuple(runs))
    (out / RESULT_FILE).write_text(json.dumps(result.plain(), indent=1) + "\n")
    alignment_report.chart(result, out)
    if config.json:
        print(json.dumps(result.plain()))
    else:
        alignment_report.show(result, Console())
    return result


# ---------------------------------------------------------------------- runs


def plan(config: Alignment, out: Path) -> dict[str, Tuning]:
    """Every run after the start, by its name."""
    planned: dict[str, Tuning] = {}
    for experiment, leashes in (("goal", (0.0,)), ("proxy", (0.0, config.beta))):
        reward = f"{arithmetic.__name__}:{REWARDS[experiment].__name__}"
        for kind in (Ppo, Dpo, Grpo):
            for place, beta in enumerate(leashes):
                tight = "tight" if place else "loose"
                name = f"{experiment}-{METHODS[kind].lower()}-{tight}"
                planned[name] = _stage(
                    config, out, name, kind, experiment, reward, config.dpo_betas[place] if kind is Dpo else beta
                )
    return planned


def _stage(config: Alignment, out: Path, name: str, kind: type[Tuning], experiment: str, reward: str, beta: float) -> Tuning:
    answers = config.batch_size * config.group_size
    optim = OptimConfig(
        learning_rate=config.dpo_learning_rate if kind is Dpo else config.learning_rate,
        warmup_steps=min(5, config.steps),
        weight_decay=0.0,
        final_share=1.0,
    )
    shared: dict[str, Any] = {
        "out_dir": str(out / series.RUNS / name),
        "start": str(out / series.RUNS / START),
        "optim": optim,
        "max_steps": config.steps,
        "eval_interval": config.interval,
        "save_interval": config.interval,
        "keep_checkpoints": config.measurements + 2,
        "seed": config.seed,
        "device": config.device,
        "beta": beta,
    }
    if kind is Dpo:
        files = [str(out / pairs_file(experiment, held_out=apart)) for apart in (False, True)]
        return Dpo(**shared, data=RecordsConfig((files[0],), (files[1],)), batch_size=answers // 2)
    shared |= {"data": RecordsConfig((str(out / PROMPTS),), (str(out / HELD_OUT),)), "reward": (reward,)}
    shared |= {"max_new_tokens": ANSWER_TOKENS, "sample_interval": 0}
    if kind is Ppo:
        return Ppo(**shared, batch_size=answers)
    return Grpo(**shared, batch_size=config.batch_size, group_size=config.group_size)


def _train(stage: Any, train: Callable[[Any], Path]) -> None:
    """Train a run that is not complete, or go on with it."""
    folder = Path(stage.out_dir)
    if _is_complete(folder, stage.max_steps):
        return
    try:
        train(replace(stage, resume=(folder / CONFIG_FILE).exists()))
    except UserError as error:
        raise UserError(f"run {folder.name}: {error}") from error
    if not _is_complete(folder, stage.max_steps):
        raise UserError(f"run {folder.name} was told to stop and is saved; the same command goes on from there")


def _is_complete(folder: Path, steps: int) -> bool:
    """Whether the run has made its last step and saved it."""
    saved = complete_checkpoints(folder)
    return bool(saved) and saved[-1].name == f"step-{steps:06d}"


def _measured(name: str, stage: Any, judge: Judge, start: Path) -> Run:
    """The run's numbers: from its log, and of its checkpoints, measured once and written down."""
    folder = Path(stage.out_dir)
    path, entries = folder / POINTS_FILE, read_log(folder)
    if path.exists():
        held = json.loads(path.read_text())
    else:
        found = [judge.point(start, 0)]
        found += [judge.point(saved, int(saved.name.removeprefix("step-"))) for saved in complete_checkpoints(folder)]
        held = {"points": [asdict(point) for point, _ in found], "answers": found[-1][1]}
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(held, indent=1))
        aside.replace(path)
    last = entries[-1]
    return Run(
        name,
        name.partition("-")[0],
        METHODS[type(stage)],
        stage.beta,
        name.endswith("-tight"),
        tuple(Point(**point) for point in held["points"]),
        round(sum(entry["seconds"] for entry in entries), 2),
        last.get("val_margin"),
        last.get("val_accuracy"),
        tuple(held["answers"]),
    )
