"""Pretraining: text in, run folder out. One flat function, to be read from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glassgpt import data
from glassgpt.config import DataConfig, ModelConfig, Pretrain, UserError
from glassgpt.config.files import CONFIG_FILE
from glassgpt.config.generate import Sampling
from glassgpt.data import Corpus
from glassgpt.generation import complete
from glassgpt.interpret.cost import training_flops
from glassgpt.loading import complete_checkpoints, find_config, load
from glassgpt.model import GPT, use_attention
from glassgpt.text import Tokenizer
from glassgpt.train import checkpoint, guard, ledger, machine, optim, parallel
from glassgpt.train.evaluate import expert_usage, measure
from glassgpt.train.loss import Scored
from glassgpt.train.parallel import Ranks
from glassgpt.train.session import Session, joined, open_folder

TOKENIZER_FILE = "tokenizer.json"
SHARDS = "shards"
SAMPLING = Sampling(temperature=0.8)
SAMPLE_TOKENS = 48
FIXED_ON_RESUME = (
    *("start", "keep_zeros", "model", "data", "optim", "max_steps", "batch_size", "accumulation_steps", "seed"),
    *("precision", "compile", "bad_steps", "spike_deviations"),
)


def pretrain(config: Pretrain) -> Path:
    """Train a model on text; returns the run folder. Under `torchrun` every process calls it.

    Raises UserError for input that cannot be trained on, for a folder that holds another run, for a loss that is no longer
    finite, and on the ranks that are left when one has ended.
    """
    if config.chaos:
        from glassgpt.train.chaos import chaos

        return chaos(config)
    with joined(Path(config.out_dir), config.parallel, config.device) as ranks:
        return _train(config, ranks)


def _train(config: Pretrain, ranks: Ranks) -> Path:
    run, device = Path(config.out_dir), ranks.device
    config = ranks.first(lambda: open_run(run, config, device, ranks.data_world))
    if ranks.world > 1:
        ranks.first(lambda: prepare(run, config.data, config.model.vocab_size, config.start) and None)
    tokenizer, corpus = prepare(run, config.data, config.model.vocab_size, config.start, check=ranks.world == 1)
    shape = config.model if config.start else dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
    end_id = tokenizer.end_id if config.data.mask_documents else None
    batch_size, accumulation_steps = parallel.share_batch(config.batch_size, config.accumulation_steps, ranks.data_world)

    torch.manual_seed(config.seed)
    model = GPT(shape)
    if config.start and not complete_checkpoints(run):
        checkpoint.put(model, load(config.start, plain=True)[0])
    model.to(device)
    use_attention(model, machine.attend_by(device))
    compiled = config.compile == "on"
    trained = parallel.spread(
        Scored(model), config.parallel, ranks, compiled=compiled, checkpoint_activations=config.checkpoint_activations
    )
    optimizers = optim.build(model, config.optim)
    stream = corpus.stream(shape.context_tokens, batch_size, accumulation_steps, ranks.data_world, config.seed, end_id)
    held_out = {
        domain.name: data.InOrder(domain.shards.tokens("val"), shape.context_tokens, config.batch_size, end_id)
        for domain in corpus.domains
    }
    byte_lengths = torch.tensor(tokenizer.byte_lengths(), device=device)
    low_precision = machine.autocast(device, config.precision)
    step_tokens = config.batch_size * config.accumulation_steps * shape.context_tokens
    step_flops = training_flops(shape, shape.context_tokens) * step_tokens
    peak = machine.peak_flops(device, config.precision) * (ranks.world if device.type == "cuda" else 1)

    with Session(
        "pretrain",
        config,
        ranks,
        model,
        tokenizer,
        optimizers,
        config.max_steps,
        skip_bad=config.bad_steps == "skip",
        sums_gradients=False,  # what `spread` gives does it during the backward pass
        saved_as={"sharded": config.parallel.sharded_checkpoints},
    ) as session:
        if config.keep_zeros:
            optim.keep_zeros(model, optimizers)
        session.say(
            f"{sum(p.numel() for p in model.parameters()):,} parameters on {ranks.world} x {device}, {config.precision}"
            f"{', compiled' if compiled else ''}; {corpus.count('train'):,} training tokens, {corpus.count('val'):,} held out;"
            f" {step_tokens:,} tokens a step"
        )
        if config.start and session.step == 0:
            before = {name: measure(trained, batches, byte_lengths, low_precision, ranks) for name, batches in held_out.items()}
            stage = Path(config.start.rstrip("/")).name
            ranks.first(lambda: ledger.write(run, ledger.add(ledger.read(run), stage, before)))
        entry: dict[str, Any] = session.log.before[-1] if session.log.before else {}  # of a run that is finished already
        for step in session.steps():
            batches = [stream.batch(step, micro, ranks.data_rank) for micro in range(accumulation_steps)]
            count = sum(batch.count for batch in batches) * ranks.data_world
            losses = []
            for micro, batch in enumerate(batches):
                parallel.synchronise(trained, on=micro == accumulation_steps - 1)
                segments = None if batch.segments is None else batch.segments.to(device)
                with low_precision:
                    loss = trained(batch.ids.to(device), batch.targets.to(device), segments)
                (loss * (ranks.data_world / count)).backward()  # the exchange of gradients takes their mean
                losses.append(loss.detach())
            total = session.update(
                sum(loss.item() for loss in losses),
                count,
                lambda step=step, batches=batches: _tell(  # type: ignore[misc]
                    trained, batches, stream.places, step, corpus, tokenizer, low_precision, ranks
                ),
            )
            entry = session.entry(total, tokens=count)
            entry["mfu"] = round(step_flops / entry["seconds"] / peak, 4)
            if session.is_due(config.eval_interval):
                whole = step + 1 == config.max_steps
                entry |= _validate(trained, held_out, corpus, config, byte_lengths, low_precision, ranks, whole=whole)
                said = f"held-out loss {entry['val_loss']:.4f}, {entry['val_bits_per_byte']:.4f} bits per byte"
                parts = ", ".join(f"{name} {value['loss']:.4f}" for name, value in entry.get("domains", {}).items())
                session.say(f"step {step + 1}: {said}{f' ({parts})' if parts else ''}")
                if shape.moe.experts:
                    entry["expert_usage"] = usage = expert_usage(trained, batches[0], shape.moe.top_k, ranks)
                    busiest, idlest = max(map(max, usage)), min(map(min, usage))
                    session.say(
                        f"  experts: {idlest:.0%} to {busiest:.0%} of a layer's choices (even: {1 / shape.moe.experts:.0%})"
                    )
            if session.is_due(config.sample_interval):
                entry["sample"] = sample(model, tokenizer, config, ranks)
                session.progress.show_sample(step + 1, f"{config.sample_prompt}{entry['sample']}")
            session.finish(entry, f"{count / entry['seconds']:,.0f} tokens/s  MFU {entry['mfu']:.0%}")
        if ranks.is_first and session.step == config.max_steps:
            rows = ledger.add(ledger.read(run) if config.start else [], run.name, _domains(entry, corpus))
            ledger.write(run, rows)
            if config.start:
                ledger.plot(run, rows)
                session.progress.show(ledger.table(rows))
    return run


def _validate(
    trained: nn.Module,
    held_out: dict[str, data.InOrder],
    corpus: Corpus,
    config: Pretrain,
    byte_lengths: torch.Tensor,
    low_precision: contextlib.AbstractContextManager[object],
    ranks: Ranks,
    *,
    whole: bool,
) -> dict[str, Any]:
    """Held-out loss of this stage's domains together, and of every domain if there are several."""
    domains = {}
    for name, batches in held_out.items():
        apart = 1 if whole else -(-len(batches) // config.eval_batches)
        domains[name] = measure(trained, batches.every(apart), byte_lengths, low_precision, ranks)
    own = [domains[domain.name] for domain in corpus.domains if domain.stage == corpus.stage]
    tokens = sum(part["tokens"] for part in own)
    nats = sum(part["loss"] * part["tokens"] for part in own)
    text_bytes = sum(part["bytes"] for part in own)  # bytes per token differ from domain to domain
    entry: dict[str, Any] = {"val_loss": nats / tokens, "val_bits_per_byte": nats / math.log(2) / text_bytes}
    return entry | {"val_tokens": tokens, "val_bytes": text_bytes} | ({"domains": domains} if len(domains) > 1 else {})


def _domains(entry: dict[str, Any], corpus: Corpus) -> dict[str, dict[str, float]]:
    """The ledger's row of a run's last validation."""
    only = {key.removeprefix("val_"): value for key, value in entry.items() if key.startswith("val_")}
    return entry.get("domains", {corpus.domains[0].name: only})


def sample(model: GPT, tokenizer: Tokenizer, config: Pretrain, ranks: Ranks) -> str:
    """A short text of the model as it is now. Draws from a generator of its own, so training is not disturbed."""
    if parallel.is_sharded(model):
        plain = GPT(model.config)
        for (_, target), (_, source) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
            target.data = parallel.whole(source.detach())
        model = plain

    def write() -> str:
        model.eval()
        prompts, tokens = [config.sample_prompt], SAMPLE_TOKENS
        with machine.eager():  # the cache grows with each token: a shape a token to compile
            (completion,) = complete(
                model, tokenizer, prompts, SAMPLING, max_new_tokens=tokens, seed=config.seed, drop_oldest=True
            )
        model.train()
        return completion.text

    return ranks.first(write)


def _tell(
    trained: nn.Module,
    batches: list[data.Batch],
    places: Any,
    step: int,
    corpus: Corpus,
    tokenizer: Tokenizer,
    low_precision: contextlib.AbstractContextManager[object],
    ranks: Ranks,
) -> str:
    """The row of a bad step that has the highest loss, over all ranks."""
    losses, where = [], []
    trained.eval()
    for micro, batch in enumerate(batches):
        where += places(step, micro, ranks.data_rank)
        for row in range(len(batch.ids)):
            parts = (None if x is None else x[row : row + 1].to(ranks.device) for x in (batch.ids, batch.targets, batch.segments))
            with torch.no_grad(), low_precision:
                losses.append(trained(*parts).item() / batch.ids.size(1))
    trained.train()
    parallel.reshard(trained)
    worst = max(math.inf if math.isnan(loss) else loss for loss in losses)
    found = ranks.gather((worst, guard.describe(where, losses, corpus, tokenizer)))
    return max(found, key=lambda pair: pair[0])[1]


def open_run(run: Path, config: Pretrain, device: torch.device, world: int = 1) -> Pretrain:
    """Make the run folder and write the resolved configuration, or check that a resumed one asks for the same run.

    Returns the configuration with nothing left to choose: shape, precision, compilation. `world` ranks share the data.
    """

    def resolve(before: Pretrain | None) -> Pretrain:
        if before is not None:
            return dataclasses.replace(config, model=before.model, precision=before.precision, compile=before.compile)
        resolved = _resolve(config, device, world)
        if (run / CONFIG_FILE).exists():  # a start that failed before its first step: what it prepared may be of other sources
            (run / TOKENIZER_FILE).unlink(missing_ok=True)
            shutil.rmtree(run / SHARDS, ignore_errors=True)
        return resolved

    fixed = tuple(name for name in FIXED_ON_RESUME if not (name == "model" and config.start))
    return open_folder(run, config, fixed, resolve)


def _resolve(config: Pretrain, device: torch.device, world: int) -> Pretrain:
    """The configuration with the starting model's shape and what was measured on this machine in place of `auto`."""
    shape: ModelConfig = config.model
    if config.start:
        shape, _ = find_config(config.start)
        shape = dataclasses.replace(shape, dropout=config.model.dropout)
        if config.model not in (shape, dataclasses.replace(Pretrain().model, dropout=config.model.dropout)):
            raise UserError(f"--start keeps the shape of {config.start}; of --model only model.dropout may be given with it")
    config = dataclasses.replace(config, model=shape)
    if "auto" in (config.precision, config.compile):
        rows, micro_batches = parallel.share_batch(config.batch_size, config.accumulation_steps, world)
        best, seconds = machine.faster_precision(shape, rows, device)
        pays = machine.pays_to_compile(seconds, shape, config.max_steps * micro_batches, device)
        config = dataclasses.replace(
            config,
            precision=best if config.precision == "auto" else config.precision,
            compile=("on" if pays else "off") if config.compile == "auto" else config.compile,
        )
    return config


def prepare(
    run: Path, config: DataConfig, vocab_size: int, start: str | None = None, *, check: bool = True
) -> tuple[Tokenizer, Corpus]:
    """The run's tokenizer and corpus: read (and with `check` compared with their hashes) if they are there, else made."""
    if (run / TOKENIZER_FILE).exists() and (run / SHARDS).exists():
        tokenizer = Tokenizer.load(run)
        return tokenizer, data.corpus.read(run / SHARDS, tokenizer, check=check)
    earlier = None
    if start and config.tokenizer is not None:
        raise UserError("--start keeps the tokenizer of the model that it starts from; leave data.tokenizer out")
    if start:
        tokenizer = load(start)[1]
        before = Path(start)
        if (before / SHARDS).is_dir():
            earlier = data.corpus.read(before / SHARDS, tokenizer)
            ledger.write(run, ledger.read(before))
        elif config.replay_share:
            raise UserError(f"{start} is no run folder with shards, so there is nothing to replay; leave data.replay_share 0")
    elif config.tokenizer is not None:
        tokenizer = Tokenizer.load(config.tokenizer)
    else:
        tokenizer = Tokenizer.train(_not_empty(data.corpus.training_texts(config), config), vocab_size)
    tokenizer.save(run)
    return tokenizer, data.corpus.write(run / SHARDS, config, tokenizer, earlier)


def _not_empty(texts: Iterator[str], config: DataConfig) -> Iterator[str]:
    first = next(texts, None)
    if first is None:
        raise UserError(f"the corpus is empty: no text in {', '.join(config.sources)}")
    yield first
    yield from texts
