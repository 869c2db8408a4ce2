"""Training a pruned model back: a pretraining run that starts from it and keeps its zeros."""

from __future__ import annotations

import shutil
from pathlib import Path

from glassgpt import data
from glassgpt.config import DataConfig, OptimConfig, Pretrain, UserError
from glassgpt.config.prune import Prune
from glassgpt.loading import complete_checkpoints
from glassgpt.train.pretrain import pretrain
from glassgpt.train.run import read_log

HOLDOUT_SHARE = 0.05
"""What is held out where `holdout_share` is 1."""
WARMUP_SHARE = 0.05
PRUNED, RUN = "pruned", "run"
"""In the folder of the recovery: the model before it, and the run."""


def recovery_folder(config: Prune) -> Path:
    """Beside `out_dir`."""
    target = Path(str(config.out_dir))
    return target.with_name(f"{target.name}-recovery")


def check_sources(config: Prune) -> None:
    """Raises UserError for text to train on that is not there or cannot be read, before anything is done."""
    if next(data.documents(config.sources), None) is None:
        raise UserError(f"{' '.join(config.sources)}: no text to train on; give --sources FILES that have some")


def recover(config: Prune) -> Path:
    """Train the model in `recovery_folder(config) / PRUNED`; returns the run folder.

    Raises UserError as `pretrain` does, and for training that a signal has stopped. The recovery's folder goes when training
    fails before its first step, so that the same command can be given again.
    """
    folder = recovery_folder(config)
    run = folder / RUN
    try:
        pretrain(_training(config, folder))
    except UserError:
        if not read_log(run):
            shutil.rmtree(folder)
        raise
    if complete_checkpoints(run)[-1].name != f"step-{config.recover_steps:06d}":
        raise UserError(f"recovery was stopped; `glassgpt pretrain --resume --out_dir {run}` goes on, and {run} is the model")
    return run


def _training(config: Prune, folder: Path) -> Pretrain:
    """The run that trains the pruned model back."""
    return Pretrain(
        out_dir=str(folder / RUN),
        start=str(folder / PRUNED),
        keep_zeros=config.method != "structured",
        data=DataConfig(config.sources, holdout_share=config.holdout_share if config.holdout_share < 1 else HOLDOUT_SHARE),
        optim=OptimConfig(
            learning_rate=config.learning_rate, warmup_steps=round(WARMUP_SHARE * config.recover_steps), final_share=0.0
        ),
        max_steps=config.recover_steps,
        batch_size=config.batch_size,
        eval_interval=0,
        save_interval=0,
        seed=config.seed,
        device=config.device,
    )
