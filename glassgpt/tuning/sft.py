"""Supervised fine-tuning: conversations in, a model that answers out. One flat function, to be read from top to bottom."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glassgpt.config import ParallelConfig
from glassgpt.config.tuning import Sft
from glassgpt.data.records import Record
from glassgpt.text import Tokenizer
from glassgpt.train import machine, optim, parallel
from glassgpt.train.loss import Scored
from glassgpt.train.parallel import Ranks
from glassgpt.train.session import Session, joined
from glassgpt.tuning import examples, rollout, stage
from glassgpt.tuning.examples import Audit, Example, Order, Rows, collate

ANSWER_TOKENS = 96
"""Longest answer at a measurement."""


def sft(config: Sft) -> Path:
    """Teach a model to answer; returns the run folder. Under `torchrun` every process calls it.

    Raises UserError for data that cannot be learnt from, a folder that holds another run, and a loss that is not finite.
    """
    with joined(Path(config.out_dir), ParallelConfig(), config.device) as ranks:
        return _train(config, ranks)


def _train(config: Sft, ranks: Ranks) -> Path:
    config = stage.opened(config, ranks)
    model, tokenizer = stage.start(config, ranks)
    longest, overlong, ends = stage.limits(config, model, tokenizer)

    def fitting(records: Sequence[Record]) -> tuple[list[Example], Audit]:
        audit = examples.fit(examples.conversations(records, tokenizer, config.data.template), longest, overlong, ends)
        return audit.examples, audit

    learnt, held, audit = stage.both_parts(config, fitting)
    order = Order(tuple(len(example.ids) for example in learnt), config.seed, longest if config.pack else None)
    size, micro_batches = parallel.share_batch(config.batch_size, config.accumulation_steps, ranks.world)
    scored, optimizers = Scored(model), optim.build(model, config.optim)
    low_precision = machine.autocast(ranks.device, config.precision)

    total_steps = stage.steps(config, order.rows_per_epoch())
    with Session("sft", config, ranks, model, tokenizer, optimizers, total_steps, saved_as=stage.saved_as(config)) as session:
        session.say(stage.banner(config, model, ranks))
        stage.show(session, audit)
        if session.step == 0:
            session.say(f"before: {said(look(scored, held, ends, tokenizer, config, ranks))}")
        for step in session.steps():
            batches = []
            for micro in range(micro_batches):
                rows = order.share(step, micro, ranks.rank, size, micro_batches, ranks.world)
                chosen = [[learnt[index] for index in row] for row in rows]
                batches.append(collate(chosen, config.prompt_weight, config.average).to(ranks.device))
            count = ranks.total([sum(batch.count for batch in batches)])[0]
            nats = 0.0
            for batch in batches:
                with low_precision:
                    loss = scored(batch.ids, batch.targets, batch.segments, weights=batch.weights)
                (loss / count).backward()
                nats += loss.item()
            total = session.update(nats, count, lambda batches=batches: worst(scored, batches, ranks))  # type: ignore[misc]
            entry = session.entry(total, tokens=count)
            if session.is_due(config.eval_interval):
                entry |= look(scored, held, ends, tokenizer, config, ranks)
                session.say(f"step {step + 1}: {said(entry)}")
                if "sample" in entry:
                    session.progress.show_sample(step + 1, entry["sample"])
            session.finish(entry, f"{sum(batch.ids.numel() for batch in batches) * ranks.world / entry['seconds']:,.0f} tokens/s")
    return Path(config.out_dir)


@torch.no_grad()
def measure(scored: nn.Module, held_out: list[Example], batch_size: int, ranks: Ranks) -> float:
    """Mean loss per token of the responses, in nats, whatever is trained on: shared out over the ranks."""
    was_training = scored.training
    scored.eval()
    nats = count = 0.0
    for start in range(ranks.rank * batch_size, len(held_out), ranks.world * batch_size):
        batch = collate([[example] for example in held_out[start : start + batch_size]]).to(ranks.device)
        nats += scored(batch.ids, batch.targets, batch.segments, weights=batch.weights).item()
        count += batch.count
    scored.train(was_training)
    nats, count = ranks.total([nats, count])
    return nats / count


@torch.no_grad()
def worst(scored: nn.Module, batches: list[Rows], ranks: Ranks) -> str:
    """The row of a step with the highest loss per token, over all ranks: where it stands."""
    scored.eval()
    found = []
    for batch in batches:
        for row, place in enumerate(batch.places):
            parts = (None if x is None else x[row : row + 1] for x in (batch.ids, batch.targets, batch.segments))
            loss = scored(*parts, weights=batch.weights[row : row + 1]).item() / max(float(batch.weights[row].sum()), 1e-30)
            found.append((math.inf if math.isnan(loss) else loss, place))
    scored.train()
    loss, place = max(max(some) for some in ranks.gather(found))
    return f"{place} ({loss:.2f} nats a token)"


def look(
    scored: Scored, held_out: list[Example], ends: list[int], tokenizer: Tokenizer, config: Sft, ranks: Ranks
) -> dict[str, Any]:
    """Held-out loss, `val_format`, the share of likeliest answers that say something and end by themselves, and one of them."""
    loss = measure(scored, held_out, config.batch_size, ranks)
    if not config.answers:
        return {"val_loss": loss}
    asked = held_out[: config.answers]
    every = [example.ids[: example.mask.index(True)] for example in asked]
    prompts = every[ranks.rank :: ranks.world]
    room = scored.model.config.context_tokens - max(map(len, every))
    n_ids, limit = tokenizer.vocab_size, max(1, min(ANSWER_TOKENS, room))
    answers = rollout.write(scored.model, prompts, ends, [0] * len(prompts), max_new_tokens=limit, n_ids=n_ids, temperature=0)
    good = sum(answer.is_whole and len(answer.ids) > 1 for answer in answers)
    texts = [tokenizer.decode([i for i in answer.ids if i not in ends]) for answer in answers]
    (share,) = ranks.total([good / len(asked)])
    return {"val_loss": loss, "val_format": share, "sample": ranks.gather(texts)[0][0]}


def said(found: dict[str, Any]) -> str:
    share = (
        f"; {found['val_format']:.0%} of the likeliest answers say something and end by themselves"
        if "val_format" in found
        else ""
    )
    return f"held-out loss {found['val_loss']:.4f} nats per token of the responses{share}"
