"""`glassgpt distill`: a teacher and text in, a smaller model out. One flat function, to be read from top to bottom."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from glassgpt import data
from glassgpt.compress import student
from glassgpt.compress.matching import Blend, Matched, hidden_loss, soft_head_loss
from glassgpt.compress.student import Guided
from glassgpt.config import ParallelConfig
from glassgpt.config.distill import Distill
from glassgpt.data import Batch, Corpus
from glassgpt.interpret.cost import parameters
from glassgpt.loading import lasting_name
from glassgpt.model import GPT
from glassgpt.text import Tokenizer
from glassgpt.train import machine, optim, parallel
from glassgpt.train.evaluate import measure
from glassgpt.train.loss import Scored, head_loss
from glassgpt.train.parallel import Ranks
from glassgpt.train.pretrain import SHARDS, TOKENIZER_FILE
from glassgpt.train.run import read_log
from glassgpt.train.session import Session, joined, open_folder, without

FREE_ON_RESUME = (
    *("out_dir", "resume", "eval_interval", "eval_batches", "save_interval", "keep_checkpoints"),
    *("device", "spike_deviations", "track", "compare", "seeds", "json"),
)


def distill(config: Distill) -> Path:
    """Train a student; returns the run folder. Under `torchrun` every process calls it.

    With `compare`, several runs in that folder and what came of them (`glassgpt.compress.distill_compare`). Raises UserError
    for a teacher that is nowhere, a student that it cannot teach, text that cannot be trained on, and what every stage refuses.
    """
    if config.compare:
        from glassgpt.compress.distill_compare import compare

        compare(config)
        return Path(config.out_dir)
    with joined(Path(config.out_dir), ParallelConfig(), config.device) as ranks:
        run = _train(config, ranks)
        if config.json and ranks.is_first:
            last = read_log(run)[-1]
            held_out = {name: value for name, value in last.items() if name.startswith("val_")}
            print(json.dumps({"out_dir": str(run), "step": last["step"], **held_out}))
    return run


def _train(config: Distill, ranks: Ranks) -> Path:
    config = ranks.first(lambda: opened(config))
    run, device = Path(config.out_dir), ranks.device
    teacher, tokenizer = student.open_teacher(config, device)
    model = student.begin(config, teacher, tokenizer)
    if ranks.world > 1:
        ranks.first(lambda: prepare(run, config, tokenizer) and None)
    corpus = prepare(run, config, tokenizer, check=ranks.world == 1)
    guide = Guided(model, teacher.config) if config.hidden_weight else None
    trained: nn.Module = model if guide is None or not len(guide.head) else guide
    optimizers = optim.build(trained, config.optim)
    context, end_id = context_of(model, teacher), tokenizer.end_id if config.data.mask_documents else None
    size, micro_batches = parallel.share_batch(config.batch_size, config.accumulation_steps, ranks.world)
    stream = corpus.stream(context, size, micro_batches, ranks.world, config.seed, end_id)
    held_out = held_out_batches(corpus, context, config, end_id)
    byte_lengths = torch.tensor(tokenizer.byte_lengths(), device=device)
    low_precision = machine.autocast(device, config.precision)

    with Session("distill", config, ranks, trained, tokenizer, optimizers, config.max_steps) as session:
        session.say(banner(config, model, teacher, corpus, context))
        apart = -(-len(held_out) // config.eval_batches)
        if session.step == 0 and config.uses_teacher:
            found = measure(Scored(teacher), held_out.every(1), byte_lengths, low_precision, ranks)
            session.say(f"the teacher: held-out loss {found['loss']:.4f}, {found['bits_per_byte']:.4f} bits per byte")
        for step in session.steps():
            batches = [on(stream.batch(step, micro, ranks.rank), device) for micro in range(micro_batches)]
            count = sum(batch.count for batch in batches) * ranks.world
            told = torch.zeros(4, dtype=torch.float64)
            for batch in batches:
                with low_precision:
                    total, parts = losses(config, model, teacher, guide, batch)
                (total * (1 / count)).backward()
                told += torch.stack([total.detach(), *parts]).cpu()
            total_nats, *sums = told.tolist()
            entry = session.entry(session.update(total_nats, count), tokens=count)
            names = ("next_token_loss", "divergence", "hidden_distance")
            entry |= {name: value / count for name, value in zip(names, ranks.total(sums), strict=True)}
            if session.is_due(config.eval_interval):
                whole = step + 1 == config.max_steps
                found = measure(Scored(model), held_out.every(1 if whole else apart), byte_lengths, low_precision, ranks)
                entry |= {f"val_{name}": value for name, value in found.items()}
                part = "" if whole or apart == 1 else " (on a sample)"
                told_loss = f"held-out loss {found['loss']:.4f}, {found['bits_per_byte']:.4f} bits per byte"
                session.say(f"step {step + 1}: {told_loss}{part}")
            session.finish(entry, f"{count / entry['seconds']:,.0f} tokens/s")
    return run


# ---------------------------------------------------------------------- what a step learns from


def losses(
    config: Distill, model: GPT, teacher: GPT, guide: Guided | None, batch: Batch
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The loss of a batch, summed over its tokens; and what it is made of: nats, divergence, distance of hidden states."""
    (hidden, states), caps = flow(model, batch), (model.config.logit_cap, teacher.config.logit_cap)
    none = torch.zeros((), device=hidden.device)
    if config.uses_teacher:
        with torch.no_grad():
            teacher_hidden, teacher_states = flow(teacher, batch)
    if config.alpha:
        blend = Blend(config.alpha, config.temperature, *caps)
        found = soft_head_loss(hidden, model.head.weight, teacher_hidden, teacher.head.weight, batch.targets, blend)
    else:
        nats = head_loss(hidden, model.head.weight, batch.targets, caps[0]).sum
        found = Matched(nats, none, nats.detach())
    if guide is None:
        return found.sum, (found.nats, found.divergence, none)
    pairs = zip(guide.mapped(states), [teacher_states[layer] for layer in guide.layers], strict=True)
    distance = torch.stack([hidden_loss(own, its, batch.targets, config.hidden_loss) for own, its in pairs]).mean()
    return found.sum + config.hidden_weight * distance, (found.nats, found.divergence, distance.detach())


def flow(model: GPT, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """`model.hidden` (B, T, D) of a batch, and the output of every block on the way to it, each (B, T, D)."""
    x, where = model.enter(batch.ids, segments=batch.segments)
    states = []
    for block in model.blocks:
        x = block(x, where)
        states.append(x)
    return model.norm_f(x), states


# ---------------------------------------------------------------------- how a run begins


def opened(config: Distill) -> Distill:
    """Make the run folder, or check that a resumed run asks for the same; returns the configuration with nothing left open."""
    init = config.init if config.init in ("layers", "random") else lasting_name(config.init)
    settled = dataclasses.replace(config, teacher=lasting_name(config.teacher), init=init)
    student.check(settled)
    run = Path(config.out_dir)

    def resolve(before: Distill | None) -> Distill:
        if before is None:  # after a start that failed before its first step, what it prepared may be of other sources
            (run / TOKENIZER_FILE).unlink(missing_ok=True)
            shutil.rmtree(run / SHARDS, ignore_errors=True)
        return settled

    return open_folder(run, settled, without(config, *FREE_ON_RESUME), resolve)


def prepare(folder: Path, config: Distill, tokenizer: Tokenizer, *, check: bool = True) -> Corpus:
    """The text as the teacher's tokens: read (and with `check` compared with its hashes) if it is there, else made."""
    if (folder / TOKENIZER_FILE).exists() and (folder / SHARDS).exists():
        return data.corpus.read(folder / SHARDS, tokenizer, check=check)
    tokenizer.save(folder)
    return data.corpus.write(folder / SHARDS, config.data, tokenizer)


def held_out_batches(corpus: Corpus, context: int, config: Distill, end_id: int | None) -> data.InOrder:
    """All held-out text, every domain's."""
    arrays = [array for domain in corpus.domains for array in domain.shards.tokens("val")]
    return data.InOrder(arrays, context, config.batch_size, end_id)


def context_of(model: GPT, teacher: GPT) -> int:
    """Tokens of a window: what both can see."""
    return min(model.config.context_tokens, teacher.config.context_tokens)


def on(batch: Batch, device: torch.device) -> Batch:
    segments = None if batch.segments is None else batch.segments.to(device)
    return Batch(batch.ids.to(device), batch.targets.to(device), segments)


def banner(config: Distill, model: GPT, teacher: GPT, corpus: Corpus, context: int) -> str:
    """Who learns from whom, on what."""
    own, its = (parameters(which.config) for which in (model, teacher))
    how = f"alpha {config.alpha:g}, temperature {config.temperature:g}" if config.uses_teacher else "alone, without the teacher"
    if config.hidden_weight:
        how += f", hidden states ({config.hidden_loss}) x {config.hidden_weight:g}"
    larger = f"\nthe student is larger than its teacher: {own:,} parameters against {its:,}" if own > its else ""
    tokens = config.batch_size * config.accumulation_steps * context
    return (
        f"student: {own:,} parameters in {model.config.n_layer} blocks; teacher {config.teacher}: {its:,} in"
        f" {teacher.config.n_layer}; {how}; {corpus.count('train'):,} training tokens, {corpus.count('val'):,} held out;"
        f" {tokens:,} tokens a step{larger}"
    )
