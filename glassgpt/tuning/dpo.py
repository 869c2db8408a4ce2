"""Direct preference optimisation: pairs of answers in, a model that prefers the better ones out. One flat function."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from glassgpt.config import ParallelConfig, UserError
from glassgpt.config.tuning import Dpo
from glassgpt.model import GPT, lora
from glassgpt.train import machine, optim, parallel
from glassgpt.train.loss import IGNORE
from glassgpt.train.parallel import Ranks
from glassgpt.train.session import Session, joined
from glassgpt.tuning import examples, objectives, stage
from glassgpt.tuning.examples import Example, Judged, Order, Pair


def dpo(config: Dpo) -> Path:
    """Prefer better answers; returns the run folder. Under `torchrun` every process calls it."""
    with joined(Path(config.out_dir), ParallelConfig(), config.device) as ranks:
        return _train(config, ranks)


def _train(config: Dpo, ranks: Ranks) -> Path:
    config = stage.opened(config, ranks)
    model, tokenizer = stage.start(config, ranks)
    read = stage.judged if config.loss == "kto" else stage.pairs
    learnt, held, audit = read(config, model, tokenizer)
    if config.loss == "kto" and len(learnt) < 2:
        raise UserError("kto needs at least two labelled answers to learn from: its drift is measured on each other's")
    low_precision = machine.autocast(ranks.device, config.precision)
    order = Order(tuple(len(two[0].ids) for two in learnt), config.seed)
    size, micro_batches = parallel.share_batch(config.batch_size, config.accumulation_steps, ranks.world)
    optimizers = optim.build(model, config.optim)

    total_steps = stage.steps(config, order.rows_per_epoch())
    with Session("dpo", config, ranks, model, tokenizer, optimizers, total_steps, saved_as=stage.saved_as(config)) as session:
        session.say(stage.banner(config, model, ranks))
        stage.show(session, audit)
        session.say(
            f"{len(learnt):,} {'labelled answers' if config.loss == 'kto' else 'pairs'} to learn from, {len(held):,} held out"
        )
        own = stage.reference(config, model)
        rows_needed = order.rows(0, min(len(learnt), total_steps * config.batch_size * config.accumulation_steps))
        needed = sorted({index for (index,) in rows_needed})
        session.say(f"the starting model reads {len(needed) + len(held):,} of them first")
        before_learnt, before_held = (
            references(config, model, own, some, index, low_precision, ranks)  # (N, 2)
            for some, index in ((learnt, needed), (held, list(range(len(held)))))
        )
        del own
        for step in session.steps():
            count, total, told = config.batch_size * config.accumulation_steps, 0.0, [0.0, 0.0]
            mine = [order.share(step, micro, ranks.rank, size, micro_batches, ranks.world) for micro in range(micro_batches)]
            drift = kto_drift(config, model, learnt, before_learnt, mine, low_precision, ranks) if config.loss == "kto" else None
            for rows in mine:
                index = [row for (row,) in rows]
                losses, margins = judge(config, model, [learnt[i] for i in index], before_learnt[index], drift, low_precision)
                (losses.sum() / count).backward()
                total += losses.sum().item()
                told = [told[0] + float(margins.sum()), told[1] + float((margins > 0).sum())]
            entry = session.entry(session.update(total, count), pairs=count)
            entry["margin"], entry["accuracy"] = (number / count for number in ranks.total(told))
            if session.is_due(config.eval_interval):
                entry |= measure(config, model, held, before_held, low_precision, drift)
                session.say(
                    f"step {step + 1}: held-out loss {entry['val_loss']:.4f}, margin {entry['val_margin']:+.4f}, the better"
                    f" answer has gained more in {entry['val_accuracy']:.1%} of {len(held)}"
                )
            session.finish(entry, f"{count / entry['seconds']:,.1f} pairs/s  margin {entry['margin']:+.3f}")
    return Path(config.out_dir)


def logps(model: GPT, texts: Sequence[Example], *, per_token: bool) -> Tensor:
    """Log-probability (N,) of each response given its instruction, summed or as a mean over its tokens."""
    rows = examples.collate([[text] for text in texts]).to(next(model.parameters()).device)
    targets = objectives.token_logprobs(model.hidden(rows.ids), model.head.weight, rows.targets, model.config.logit_cap)  # (N, T)
    sums = targets.sum(dim=1)
    return sums / (rows.targets != IGNORE).sum(dim=1) if per_token else sums


@torch.no_grad()
def references(
    config: Dpo,
    model: GPT,
    own: GPT | None,
    items: Sequence[Pair | Judged],
    needed: Sequence[int],
    low_precision: contextlib.AbstractContextManager[object],
    ranks: Ranks,
) -> Tensor:
    """What the starting model (`own`, or without one the model with its adapters off) gives both texts of each item, (N, 2).

    Computed once, for the items that the run will need, so that no second model stays in memory. Shared out over the ranks.
    """
    weight = model.head.weight
    found = torch.full((len(items), 2), torch.nan, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
    with lora.disabled(model) if own is None else contextlib.nullcontext(), low_precision:
        judging = (model if own is None else own).eval()
        mine: dict[int, list[float]] = {}
        for start in range(ranks.rank * config.batch_size, len(needed), ranks.world * config.batch_size):
            index = needed[start : start + config.batch_size]
            some = [items[i] for i in index]
            both = logps(judging, [item[0] for item in some] + [item[1] for item in some], per_token=config.loss == "ipo")
            mine |= dict(zip(index, both.view(2, -1).T.tolist(), strict=True))
    model.train()
    for part in ranks.gather(mine):
        for number, two in part.items():
            found[number] = torch.tensor(two, dtype=found.dtype)
    return found


def judge(
    config: Dpo,
    model: GPT,
    items: Sequence[Pair | Judged],
    before: Tensor,
    drift: Tensor | None,
    low_precision: contextlib.AbstractContextManager[object],
) -> tuple[Tensor, Tensor]:
    """Losses (N,) of pairs or labelled answers, and how far each has moved the right way, in implicit reward; before (N, 2)."""
    per_token = config.loss == "ipo"
    with low_precision:
        if drift is not None:
            logp = logps(model, [item[0] for item in items], per_token=per_token)
            good = torch.tensor([isinstance(item, Judged) and item.is_good for item in items], device=logp.device)
            losses = objectives.kto(logp, before[:, 0], good, drift, config.beta)
            return losses, config.beta * (logp - before[:, 0]).detach() * (2.0 * good - 1)
        both = logps(model, [item[0] for item in items] + [item[1] for item in items], per_token=per_token)
    better, worse = both[: len(items)], both[len(items) :]
    if config.loss == "ipo":
        losses = objectives.ipo(better, worse, before[:, 0], before[:, 1], config.beta)
    else:
        losses = objectives.dpo(better, worse, before[:, 0], before[:, 1], config.beta, config.label_smoothing)
    return losses, config.beta * ((better - before[:, 0]) - (worse - before[:, 1])).detach()


@torch.no_grad()
def kto_drift(
    config: Dpo,
    model: GPT,
    items: Sequence[Pair | Judged],
    before: Tensor,
    mine: Sequence[Sequence[tuple[int, ...]]],
    low_precision: contextlib.AbstractContextManager[object],
    ranks: Ranks,
) -> Tensor:
    """z_0: how far the model has moved from its start on answers to other prompts, over the whole step and at least 0."""
    total = 0.0
    for rows in mine:
        index = [row for (row,) in rows]
        with low_precision:
            total += float((logps(model, [items[i][1] for i in index], per_token=False) - before[index, 1]).sum())
    mean = ranks.total([total])[0] / (config.batch_size * config.accumulation_steps)
    return torch.tensor(max(0.0, mean), device=before.device, dtype=before.dtype)


@torch.no_grad()
def measure(
    config: Dpo,
    model: GPT,
    items: Sequence[Pair | Judged],
    before: Tensor,
    low_precision: contextlib.AbstractContextManager[object],
    drift: Tensor | None,
) -> dict[str, float]:
    """Loss, margin and accuracy on held-out items."""
    model.eval()
    losses, margins = [], []
    for start in range(0, len(items), config.batch_size):
        part = slice(start, start + config.batch_size)
        some = judge(config, model, items[part], before[part], drift, low_precision)
        losses.append(some[0])
        margins.append(some[1])
    model.train()
    loss, margin = torch.cat(losses).double(), torch.cat(margins).double()
    return {
        "val_loss": float(loss.mean()),
        "val_margin": float(margin.mean()),
        "val_accuracy": float((margin > 0).double().mean()),
    }
