"""Pretraining: text in, run folder out. One flat function, to be read from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glassgpt import data
from glassgpt.config import DataConfig, ModelConfig, Pretrain, UserError
from glassgpt.config.files import CONFIG_FILE, read_yaml, to_plain, write_yaml
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
from glassgpt.train.run import LOG_FILE, Log, Progress, Silent, Trackers, plot_loss

TOKENIZER_FILE = "tokenizer.json"
SHARDS = "shards"
SAMPLING = Sampling(temperature=0.8)
SAMPLE_TOKENS = 48
PLOT_SECONDS = 30.0
MOST_SKIPPED = 100
"""Steps in a row that `--bad_steps skip` leaves out before it gives up."""
FIXED_ON_RESUME = (
    *("start", "model", "data", "optim", "max_steps", "batch_size", "accumulation_steps", "seed"),
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
    with parallel.joined(config.parallel, config.device) as ranks:
        try:
            return _train(config, ranks)
        except (RuntimeError, ConnectionError) as error:
            if lost := _lost_rank(Path(config.out_dir), ranks, error):
                raise lost from error
            raise


def _train(config: Pretrain, ranks: Ranks) -> Path:
    run, device = Path(config.out_dir), ranks.device
    machine.keep_freed_memory()
    config = ranks.first(lambda: open_run(run, config, device, ranks.data_world))
    if ranks.world > 1:
        ranks.first(lambda: prepare(run, config.data, config.model.vocab_size, config.start) and None)
    tokenizer, corpus = prepare(run, config.data, config.model.vocab_size, config.start, check=ranks.world == 1)
    shape = config.model if config.start else dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
    end_id = tokenizer.end_id if config.data.mask_documents else None
    batch_size, accumulation_steps = parallel.share_batch(config.batch_size, config.accumulation_steps, ranks.data_world)

    torch.manual_seed(config.seed)
    saved = complete_checkpoints(run)
    model = GPT(shape)
    if config.start and not saved:
        checkpoint.put(model, load(config.start)[0])
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

    step = checkpoint.restore(saved[-1], model, optimizers) if saved else 0
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(guard.Stop(has_mates=ranks.world > 1))
        log = stack.enter_context(contextlib.closing(Log(run, step, writes=ranks.is_first)))
        tracked = config.track if ranks.is_first else ()
        trackers = stack.enter_context(contextlib.closing(Trackers(tracked, run, to_plain(config))))
        progress = stack.enter_context(Progress(run.name, config.max_steps, step) if ranks.is_first else Silent())
        spikes = guard.Spikes(config.spike_deviations, [entry["loss"] for entry in log.before])
        progress.say(
            f"{sum(p.numel() for p in model.parameters()):,} parameters on {ranks.world} x {device}, {config.precision}"
            f"{', compiled' if compiled else ''}; {corpus.count('train'):,} training tokens, {corpus.count('val'):,} held out;"
            f" {step_tokens:,} tokens a step"
        )
        if config.start and step == 0:
            before = {name: measure(trained, batches, byte_lengths, low_precision, ranks) for name, batches in held_out.items()}
            stage = Path(config.start.rstrip("/")).name
            ranks.first(lambda: ledger.write(run, ledger.add(ledger.read(run), stage, before)))
        plotted, left_out = 0.0, 0
        entry: dict[str, Any] = log.before[-1] if log.before else {}  # of a run that is finished already
        while step < config.max_steps:
            began = time.perf_counter()
            torch.manual_seed((config.seed * 1_000_003 + step) * 4096 + ranks.data_rank)  # dropout follows from step and rank
            rate = optim.learning_rate(step, config.max_steps, config.optim)
            optim.set_rate(optimizers, rate)
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
            nats, stopping = ranks.total([sum(loss.item() for loss in losses), float(stop.signal is not None)])
            total = nats / count
            norm = optim.clip(model, config.optim.grad_clip)
            is_finite = math.isfinite(total) and math.isfinite(norm)
            is_spike = spikes.sees(total)
            if not is_finite or is_spike:
                told = _tell(trained, batches, stream.places, step, corpus, tokenizer, low_precision, ranks)
                what = f"a spike: typical is {spikes.typical()[0]:.4f}" if is_finite else "not finite"
                progress.say(f"step {step + 1}: loss {total:.4f}, gradient norm {norm:.4g}: {what}. The worst row: {told}")
            if not is_finite and config.bad_steps == "stop":
                # the weights of a checkpoint written by the step before are the ones that have just failed
                good = [folder for folder in saved if folder.name != f"step-{step:06d}"] if not math.isfinite(total) else saved
                raise ranks.error(
                    f"step {step + 1}: loss {total}, gradient norm {norm}: training has diverged; this step was not applied."
                    f" Last good checkpoint: {good[-1] if good else 'none'}"
                    f" (try a lower optim.learning_rate, now {config.optim.learning_rate}, or --bad_steps skip)"
                )
            skipped = config.bad_steps == "skip" and (not is_finite or is_spike)
            left_out = left_out + 1 if skipped else 0
            if left_out > MOST_SKIPPED:
                raise ranks.error(
                    f"step {step + 1}: the last {left_out} steps were all left out, so nothing is learned any more. Last complete"
                    f" checkpoint: {saved[-1] if saved else 'none'} (try a lower optim.learning_rate, now"
                    f" {config.optim.learning_rate}, or --spike_deviations 0)"
                )
            for optimizer in optimizers:
                if not skipped:
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1

            seconds = time.perf_counter() - began
            entry = {"step": step, "loss": total, "grad_norm": norm, "lr": rate, "tokens": count}
            entry |= {"seconds": round(seconds, 4), "mfu": round(step_flops / seconds / peak, 4)}
            entry |= {name: True for name, true in (("spike", is_spike), ("skipped", skipped)) if true}
            last = step == config.max_steps
            if last or (config.eval_interval and step % config.eval_interval == 0):
                entry |= _validate(trained, held_out, corpus, config, byte_lengths, low_precision, ranks, whole=last)
                said = f"held-out loss {entry['val_loss']:.4f}, {entry['val_bits_per_byte']:.4f} bits per byte"
                parts = ", ".join(f"{name} {value['loss']:.4f}" for name, value in entry.get("domains", {}).items())
                progress.say(f"step {step}: {said}{f' ({parts})' if parts else ''}")
                if shape.moe.experts:
                    entry["expert_usage"] = usage = expert_usage(trained, batches[0], shape.moe.top_k, ranks)
                    busiest, idlest = max(map(max, usage)), min(map(min, usage))
                    progress.say(
                        f"  experts: {idlest:.0%} to {busiest:.0%} of a layer's choices (even: {1 / shape.moe.experts:.0%})"
                    )
            if last or (config.sample_interval and step % config.sample_interval == 0):
                entry["sample"] = sample(model, tokenizer, config, ranks)
                progress.show_sample(step, f"{config.sample_prompt}{entry['sample']}")
            log.write(entry)
            trackers.send(entry)
            progress.update(step, total, count / seconds, entry["mfu"], machine.memory_bytes(device))
            if last or stopping or (config.save_interval and step % config.save_interval == 0):
                facts = {key: value for key, value in entry.items() if key.startswith("val_")}
                sharded = config.parallel.sharded_checkpoints
                saved.append(checkpoint.save(run, step, model, optimizers, tokenizer, facts, ranks, sharded=sharded))
                if ranks.is_first:
                    checkpoint.prune(run, config.keep_checkpoints)
                if ranks.is_first and (last or stopping or time.perf_counter() - plotted > PLOT_SECONDS):
                    plot_loss(run)
                    plotted = time.perf_counter()
            if stopping and not last:
                progress.say(f"stopped after step {step}, which is saved; continue with\n  {resume_command(run, ranks.world)}")
                if stop.signal == signal.SIGINT:
                    raise KeyboardInterrupt
                return run
        if ranks.is_first:
            rows = ledger.add(ledger.read(run) if config.start else [], run.name, _domains(entry, corpus))
            ledger.write(run, rows)
            if config.start:
                ledger.plot(run, rows)
                progress.show(ledger.table(rows))
    return run


def resume_command(run: Path, world: int = 1) -> str:
    """What continues a run, on as many processes; on several hosts `torchrun` needs what it was given there too."""
    here = os.environ.get("LOCAL_WORLD_SIZE", world)
    start = "glassgpt" if world == 1 else f"torchrun --nproc-per-node {here} -m glassgpt"
    return f"{start} pretrain --resume --out_dir {run}"


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
        with torch.compiler.set_stance("force_eager"):  # the cache grows with each token: a shape a token to compile
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


def _lost_rank(run: Path, ranks: Ranks, error: Exception) -> UserError | None:
    """What the ranks that are left say: who is gone, and where to go on from. Only the first of them says it aloud.

    None when the error is this rank's own.
    """
    if ranks.world == 1 or getattr(error, "own", False):
        return None
    gone = ranks.gone()
    for _ in range(20 * (not gone)):
        time.sleep(0.1)
        gone = ranks.gone()
    if not gone and "onnection" not in str(error):
        return None
    names = ", ".join(f"rank {rank} (host {ranks.processes[rank][0]}, process {ranks.processes[rank][1]})" for rank in gone)
    saved = complete_checkpoints(run)
    told = UserError(
        f"{names or 'a rank on another host'} has ended, so this job cannot go on. Last complete checkpoint:"
        f" {saved[-1] if saved else 'none'}; continue with the same command and --resume, or start torchrun with --max-restarts"
    )
    is_first_left = ranks.rank == min(rank for rank in ranks.processes if rank not in gone)
    return told if is_first_left else parallel.QuietError(str(told))


def open_run(run: Path, config: Pretrain, device: torch.device, world: int = 1) -> Pretrain:
    """Make the run folder and write the resolved configuration, or check that a resumed one asks for the same run.

    Returns the configuration with nothing left to choose: shape, precision, compilation. `world` ranks share the data.
    """
    path = run / CONFIG_FILE
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 and path.exists()  # by torchrun, after a rank ended
    if config.resume and not path.exists():
        raise UserError(f"nothing to resume: {run} holds no run (no {path})")
    if config.resume or restarted:
        before = read_yaml(path, Pretrain)
        for name in FIXED_ON_RESUME:
            asked, was = getattr(config, name), getattr(before, name)
            if asked != was and asked != "auto" and not (name == "model" and config.start):
                raise UserError(
                    f"{run} was started with {name} = {was}; resuming asks for {asked}."
                    " Leave it as it was, or start a new run in another out_dir"
                )
        return dataclasses.replace(config, model=before.model, precision=before.precision, compile=before.compile)
    if path.exists() and (run / LOG_FILE).exists():
        raise UserError(f"{run} holds a run already; continue it with --resume, or choose another out_dir")
    if not path.exists() and run.exists() and any(run.iterdir()):
        raise UserError(f"{run} is not empty and holds no run; choose another out_dir")
    resolved = _resolve(config, device, world)
    if path.exists():  # a start that failed before its first step: what it prepared may be of other sources
        (run / TOKENIZER_FILE).unlink(missing_ok=True)
        shutil.rmtree(run / SHARDS, ignore_errors=True)
    try:
        run.mkdir(parents=True, exist_ok=True)
        write_yaml(path, resolved)
    except OSError as error:
        raise UserError(f"cannot make the run folder {run}: {error.strerror}") from error
    return resolved


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
