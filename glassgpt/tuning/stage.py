"""How every stage after pretraining begins: its folder, its model with or without adapters, its examples."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from glassgpt import charts
from glassgpt.config import UserError
from glassgpt.config.tuning import RecordsConfig, Tuning
from glassgpt.data import records as reading
from glassgpt.data.records import Record
from glassgpt.loading import lasting_name, load
from glassgpt.model import GPT, lora, use_attention
from glassgpt.text import Tokenizer, chat
from glassgpt.train import machine
from glassgpt.train.parallel import Ranks
from glassgpt.train.session import Session, open_folder, without
from glassgpt.tuning import examples
from glassgpt.tuning.examples import Audit, Judged, Pair

FREE_ON_RESUME = (
    *("out_dir", "resume", "eval_interval", "save_interval", "keep_checkpoints", "sample_interval", "answers"),
    *("device", "spike_deviations", "track", "reward_seconds"),
)

BINS = 40
DATA_FILE = "data.json"

Config = TypeVar("Config", bound=Tuning)
Item = TypeVar("Item")


def opened(config: Config, ranks: Ranks) -> Config:
    """Make the run folder, or check that a resumed run asks for the same; returns the configuration with nothing left open."""
    settled, run = dataclasses.replace(config, start=lasting_name(config.start)), Path(config.out_dir)

    def make() -> Config:
        found = open_folder(run, settled, without(config, *FREE_ON_RESUME), lambda before: settled)
        _compare_files(run, config)
        return found

    return ranks.first(make)


def _compare_files(run: Path, config: Tuning) -> None:
    """Note the data files' hashes at the first start, and refuse to go on with others: the order of examples would be another."""
    named = [Path(name) for name in (*config.data.files, *config.data.held_out) if not name.startswith("hf:")]
    paths = [path for name in named for path in (sorted(name.rglob("*")) if name.is_dir() else [name]) if path.is_file()]
    hashes = {str(path.resolve()): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    note = run / DATA_FILE
    if not (config.resume and note.exists()):
        note.write_text(json.dumps(hashes, indent=1) + "\n")
    elif changed := [path for path, value in json.loads(note.read_text()).items() if hashes.get(path) != value]:
        raise UserError(f"{changed[0]} has changed since {run} was started; put it back, or start a new run in another out_dir")


def start(config: Tuning, ranks: Ranks) -> tuple[GPT, Tokenizer]:
    """The model to be trained, on its device and in training mode, and its tokenizer with the template of its chats.

    With `lora.rank` its own weights are frozen, and adapters stand beside them.
    """
    model, tokenizer = load(config.start, device=str(ranks.device), plain=True)
    if config.precision == "fp64":
        model.double()
    tokenizer = tokenizer.with_template(chat.template_of(tokenizer) if config.data.template == "chat" else None)
    if config.lora.rank:
        lora.add(model, config.lora, config.seed)
    use_attention(model, machine.attend_by(ranks.device))
    if config.checkpoint_activations:
        for block in model.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return model.train(), tokenizer


def reference(config: Tuning, model: GPT) -> GPT | None:
    """The starting model as it stays, without gradients; None when it is the trained one with its adapters off."""
    if config.lora.rank:
        return None
    own, _ = load(config.start, device=str(next(model.parameters()).device), plain=True)
    own.to(next(model.parameters()).dtype).requires_grad_(False)
    use_attention(own, machine.attend_by(next(model.parameters()).device))
    return own.eval()


def read(config: RecordsConfig, seed: int) -> tuple[list[Record], list[Record]]:
    """Records to train on, and records to measure on. Raises UserError when no file is named or nothing is left of one."""
    if not config.files:
        raise UserError("no data: name at least one file with --data.files FILE (docs/tuning.md lists the shapes)")
    records = reading.read(config.files)
    if config.held_out:
        return records, reading.read(config.held_out)
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(1, round(config.holdout_share * len(records)))
    if count >= len(records):
        raise UserError(
            f"{len(records)} example(s) cannot be parted into training and held-out ones; give more, or data.held_out"
        )
    apart = set(order[:count])
    return [r for i, r in enumerate(records) if i not in apart], [r for i, r in enumerate(records) if i in apart]


def saved_as(config: Tuning) -> dict[str, Any]:
    """What `checkpoint.save` is to know: adapters are written alone, with the name of the model that they stand upon."""
    return {"base": config.start} if config.lora.rank else {}


def pairs(config: Tuning, model: GPT, tokenizer: Tokenizer) -> tuple[list[Pair], list[Pair], Audit]:
    """Pairs to learn from and held-out ones, of which both answers fit, and the audit of the first."""

    most, overlong, ends = limits(config, model, tokenizer)

    def fitting(records: Sequence[Record]) -> tuple[list[Pair], Audit]:
        items = examples.pairs(records, tokenizer, config.data.template)
        kept, audit = examples.fit_together(items, most, overlong, ends)
        return [Pair(*texts) for _, texts in kept], audit

    return both_parts(config, fitting)


def judged(config: Tuning, model: GPT, tokenizer: Tokenizer) -> tuple[list[Judged], list[Judged], Audit]:
    """Labelled answers to learn from and held-out ones, and the audit of the first; pairs are taken apart."""
    most, overlong, ends = limits(config, model, tokenizer)

    def fitting(records: Sequence[Record]) -> tuple[list[Judged], Audit]:
        items = examples.judged(records, tokenizer, config.data.template)
        kept, audit = examples.fit_together([item[:1] for item in items], most, overlong, ends)
        found = [items[number]._replace(answer=answer) for number, (answer,) in kept]
        # drift is measured on what fits of a mismatched answer, if nothing does on the answer itself
        short = (examples.truncated(item.mismatched, most) for item in found)
        return [i._replace(mismatched=s if s.n_response else i.answer) for i, s in zip(found, short, strict=True)], audit

    return both_parts(config, fitting)


def both_parts(
    config: Tuning, fitting: Callable[[Sequence[Record]], tuple[list[Item], Audit]]
) -> tuple[list[Item], list[Item], Audit]:
    """What `fitting` makes of the records to learn from and of those held out, of the latter as many as are measured."""
    learnt, held = read(config.data, config.seed)
    items, audit = fitting(learnt)
    try:
        others, _ = fitting(held[: config.eval_examples])
    except UserError as error:
        raise UserError(f"the held-out examples: {error}") from error
    return items, others, audit


def limits(config: Tuning, model: GPT, tokenizer: Tokenizer) -> tuple[int, Literal["drop", "truncate", "error"], list[int]]:
    """What `examples.fit` is to hold examples to: T_max, what to do with longer ones, which tokens end an answer."""
    return longest(config.data, model), config.data.overlong, examples.end_ids(tokenizer, config.data.template)


def longest(config: RecordsConfig, model: GPT) -> int:
    """T_max in tokens. Raises UserError when it is beyond the context."""
    context = model.config.context_tokens
    if config.max_tokens > context:
        raise UserError(f"data.max_tokens is {config.max_tokens} and the model's context {context}; use at most that")
    return config.max_tokens or context


def steps(config: Tuning, rows_per_epoch: int) -> int:
    """Optimiser steps of the run."""
    return config.max_steps or math.ceil(config.epochs * rows_per_epoch / (config.batch_size * config.accumulation_steps))


def show(session: Session, audit: Audit) -> None:
    """Every run says first what it will learn from: an audit in two lines, and its lengths as a picture."""
    for line in told(audit):
        session.say(line)
    if session.ranks.is_first and session.step == 0:
        plot_lengths(audit, session.run)


def told(audit: Audit) -> list[str]:
    """An audit in two lines."""
    questions, answers = ([getattr(e, name) for e in audit.examples] for name in ("n_instruction", "n_response"))
    count = len(audit.examples)
    lost = "".join(f"; {number:,} dropped: {reason}" for reason, number in audit.dropped.items())
    cut = f"; {audit.truncated:,} truncated" if audit.truncated else ""
    ended = "every answer" if audit.ended == count else f"{audit.ended:,} of {count:,} answers" if audit.ended else "NO answer"
    return [
        f"{count:,} texts{lost}{cut}; E[Q] {sum(questions) / count:.1f} tokens of instruction, E[A] {sum(answers) / count:.1f}"
        " of response",
        f"{audit.supervised:,} tokens to be learnt, {audit.masked:,} only read; the end token is learnt after {ended}",
    ]


def banner(config: Tuning, model: nn.Module, ranks: Ranks) -> str:
    """What is trained, on what, in which steps."""
    every, trained = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.parameters() if p.requires_grad)
    return (
        f"{every:,} parameters, {trained:,} trained, on {ranks.world} x {ranks.device}, {config.precision}; effective batch ="
        f" {config.batch_size} x {config.accumulation_steps} = {config.batch_size * config.accumulation_steps}"
    )


def plot_lengths(audit: Audit, place: Path) -> None:
    """Draw how long instructions and responses are, in tokens, into a file, or a folder as `lengths.svg` and `lengths.png`."""
    figure, axes = charts.figure()
    longest = max(len(example.ids) for example in audit.examples)
    for name, lengths, colour in (
        ("instruction", [e.n_instruction for e in audit.examples], "#9db8d9"),
        ("response", [e.n_response for e in audit.examples], "#c8553d"),
    ):
        label = f"{name}: {statistics.fmean(lengths):.1f} tokens on average"
        axes.hist(lengths, bins=BINS, range=(0, longest), alpha=0.65, color=colour, label=label)
    axes.set(xlabel="tokens", ylabel="examples", title=f"{len(audit.examples):,} examples")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    paths = [place / f"lengths{suffix}" for suffix in charts.PICTURES] if place.is_dir() else [place]
    charts.save(figure, *paths)
