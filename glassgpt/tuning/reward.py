"""The reward model: pairs of answers in, a number for every answer out. One flat function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from glassgpt import charts
from glassgpt.config import ParallelConfig
from glassgpt.config.tuning import Reward
from glassgpt.train import machine, optim, parallel
from glassgpt.train.parallel import Ranks
from glassgpt.train.session import Session, joined
from glassgpt.tuning import objectives, stage
from glassgpt.tuning.examples import Order, Pair
from glassgpt.tuning.scalar import Headed

BINS = 10


def reward(config: Reward) -> Path:
    """Train a reward model; returns the run folder. Under `torchrun` every process calls it."""
    with joined(Path(config.out_dir), ParallelConfig(), config.device) as ranks:
        return _train(config, ranks)


def _train(config: Reward, ranks: Ranks) -> Path:
    config = stage.opened(config, ranks)
    model, tokenizer = stage.start(config, ranks)
    headed = Headed(model)
    learnt, held, audit = stage.pairs(config, model, tokenizer)
    order = Order(tuple(len(pair.chosen.ids) for pair in learnt), config.seed)
    size, micro_batches = parallel.share_batch(config.batch_size, config.accumulation_steps, ranks.world)
    optimizers = optim.build(headed, config.optim)
    low_precision = machine.autocast(ranks.device, config.precision)

    total_steps = stage.steps(config, order.rows_per_epoch())
    with Session("reward", config, ranks, headed, tokenizer, optimizers, total_steps, saved_as=stage.saved_as(config)) as session:
        session.say(stage.banner(config, headed, ranks))
        stage.show(session, audit)
        session.say(f"{len(learnt):,} pairs to learn from, {len(held):,} held out")
        for step in session.steps():
            count, nats, right = config.batch_size * config.accumulation_steps, 0.0, 0.0
            for micro in range(micro_batches):
                rows = order.share(step, micro, ranks.rank, size, micro_batches, ranks.world)
                with low_precision:
                    better, worse = scores(headed, [learnt[index] for (index,) in rows])
                loss = objectives.bradley_terry(better, worse).sum()
                (loss / count).backward()
                nats += loss.item()
                right += float((better > worse).sum())
            entry = session.entry(session.update(nats, count), pairs=count)
            entry["accuracy"] = ranks.total([right])[0] / count
            if session.is_due(config.eval_interval):
                margins = measure(headed, held, config.batch_size)
                entry["val_loss"] = float(objectives.bradley_terry(margins, torch.zeros_like(margins)).mean())
                entry["val_accuracy"] = float((margins > 0).double().mean())
                session.say(
                    f"step {step + 1}: held-out loss {entry['val_loss']:.4f} (chance {math.log(2):.4f}), the better"
                    f" answer scores higher in {entry['val_accuracy']:.1%} of {len(held)} pairs"
                )
                if ranks.is_first:
                    plot_calibration(margins, Path(config.out_dir))
            session.finish(entry, f"{count / entry['seconds']:,.1f} pairs/s  accuracy {entry['accuracy']:.0%}")
    return Path(config.out_dir)


def scores(headed: Headed, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Scores (N,) of the better and of the worse answers, in one pass."""
    found = headed.scores([pair.chosen.ids for pair in pairs] + [pair.rejected.ids for pair in pairs])
    return found[: len(pairs)], found[len(pairs) :]


@torch.no_grad()
def measure(headed: Headed, pairs: Sequence[Pair], batch_size: int) -> Tensor:
    """Margins (N,) of the better answers' scores over the worse ones'."""
    was_training = headed.training
    headed.eval()
    parts = [scores(headed, pairs[start : start + batch_size]) for start in range(0, len(pairs), batch_size)]
    headed.train(was_training)
    return torch.cat([better - worse for better, worse in parts]).cpu()


def calibration(margins: Tensor) -> list[tuple[float, float, int]]:
    """(predicted, observed, pairs) for each bin of the predicted probability that the first of two answers is the better one.

    Which answer is the first is a toss-up, so every pair counts once from each side.
    """
    predicted = torch.cat([margins, -margins]).double().sigmoid()
    observed = torch.cat([torch.ones(len(margins)), torch.zeros(len(margins))]).double()
    bins = (predicted * BINS).long().clamp(max=BINS - 1)
    found = []
    for number in range(BINS):
        inside = bins == number
        if inside.any():
            found.append((float(predicted[inside].mean()), float(observed[inside].mean()), int(inside.sum())))
    return found


def plot_calibration(margins: Tensor, run: Path) -> list[Path]:
    """Draw the share of pairs in which an answer is the better one against the probability that the model gives it."""
    points = calibration(margins)
    figure, axes = charts.figure()
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--", label="as it should be")
    predicted, observed = [point[0] for point in points], [point[1] for point in points]
    axes.plot(
        predicted, observed, "o-", color="#2f5d9b", linewidth=1.4, label=f"{len(margins)} held-out pairs, each from both sides"
    )
    for x, y, count in points:
        axes.annotate(str(count), (x, y), textcoords="offset points", xytext=(5, -10), fontsize=7, color="#666666")
    axes.set(xlabel="predicted probability that an answer is the better one", ylabel="share in which it is", title=run.name)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return charts.save_both(figure, run, "calibration")
