"""Pretraining: text in, run folder out. One flat function, to be read from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from glassgpt import data
from glassgpt.config import DataConfig, Pretrain, UserError
from glassgpt.config.files import read_yaml, write_yaml
from glassgpt.config.generate import Sampling
from glassgpt.generation import complete
from glassgpt.loading import complete_checkpoints, pick_device
from glassgpt.model import GPT, plain, use_attention
from glassgpt.text import Tokenizer
from glassgpt.train import checkpoint, machine, optim
from glassgpt.train.evaluate import measure
from glassgpt.train.loss import token_loss
from glassgpt.train.run import LOG_FILE, Log, Progress, plot_loss

CONFIG_FILE = "config.yaml"
TOKENIZER_FILE = "tokenizer.json"
SHARDS = "shards"
SAMPLING = Sampling(temperature=0.8)
SAMPLE_TOKENS = 48
FIXED_ON_RESUME = ("model", "data", "optim", "max_steps", "batch_size", "accumulation_steps", "seed", "precision")


def pretrain(config: Pretrain) -> Path:
    """Train from random weights; returns the run folder.

    Raises UserError for input that cannot be trained on, for a folder that holds another run, and for a loss that is no
    longer finite.
    """
    run = Path(config.out_dir)
    open_run(run, config)
    machine.keep_freed_memory()
    device = pick_device(config.device)
    tokenizer, shards = prepare(run, config.data, config.model.vocab_size)
    shape = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)

    torch.manual_seed(config.seed)
    model = GPT(shape).to(device)
    if config.compile and device.type == "cpu":
        use_attention(model, plain)  # the compiler fuses it into fewer passes than the CPU's SDPA takes: docs/log.md
    trained = torch.compile(model) if config.compile else model
    optimizers = optim.build(model, config.optim)
    stream = data.Stream(
        shards.tokens("train"), shape.context_tokens, config.batch_size, config.accumulation_steps, seed=config.seed
    )
    held_out = data.in_order(shards.tokens("val"), shape.context_tokens, config.batch_size)
    byte_lengths = torch.tensor(tokenizer.byte_lengths(), device=device)
    low_precision = machine.autocast(device, config.precision, shape.width)

    saved = complete_checkpoints(run)
    step = checkpoint.restore(saved[-1], model, optimizers) if saved else 0
    log = Log(run, step)
    with contextlib.closing(log), Progress(run.name, config.max_steps, step) as progress:
        parameters = sum(p.numel() for p in model.parameters())
        step_tokens = config.batch_size * config.accumulation_steps * shape.context_tokens
        progress.say(
            f"{parameters:,} parameters on {device}; {shards.count('train'):,} training tokens, {shards.count('val'):,} held out;"
            f" {step_tokens:,} tokens a step"
        )
        while step < config.max_steps:
            began = time.perf_counter()
            torch.manual_seed(config.seed * 1_000_003 + step)  # dropout of a step depends on the step alone
            rate = optim.learning_rate(step, config.max_steps, config.optim)
            optim.set_rate(optimizers, rate)
            batches = [stream.batch(step, micro) for micro in range(config.accumulation_steps)]
            count = sum(batch.count for batch in batches)
            total = 0.0
            for batch in batches:
                with low_precision:
                    logits = trained(batch.ids.to(device))  # (B, T, V)
                loss = token_loss(logits, batch.targets.to(device)).sum / count
                loss.backward()
                total += loss.item()
            norm = optim.clip(model, config.optim.grad_clip)
            if not (math.isfinite(total) and math.isfinite(norm)):
                # the weights of a checkpoint written by the step before are the ones that have just failed
                good = [folder for folder in saved if folder.name != f"step-{step:06d}"] if not math.isfinite(total) else saved
                raise UserError(
                    f"step {step + 1}: loss {total}, gradient norm {norm}: training has diverged; this step was not applied."
                    f" Last good checkpoint: {good[-1] if good else 'none'}"
                    f" (try a lower optim.learning_rate, now {config.optim.learning_rate})"
                )
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1

            seconds = time.perf_counter() - began
            entry: dict[str, Any] = {"step": step, "loss": total, "grad_norm": norm, "lr": rate, "tokens": count}
            entry["seconds"] = round(seconds, 4)
            last = step == config.max_steps
            if last or (config.eval_interval and step % config.eval_interval == 0):
                apart = 1 if last else -(-len(held_out) // config.eval_batches)
                measured = measure(model, held_out[::apart], byte_lengths, low_precision)
                entry |= {f"val_{name}": value for name, value in measured.items()}
                said = f"held-out loss {measured['loss']:.4f}, {measured['bits_per_byte']:.4f} bits per byte"
                progress.say(f"step {step}: {said}")
            if last or (config.sample_interval and step % config.sample_interval == 0):
                entry["sample"] = sample(model, tokenizer, config)
                progress.say(f"step {step}: {config.sample_prompt}{entry['sample']}")
            log.write(entry)
            progress.update(step, total, count / seconds)
            if last or (config.save_interval and step % config.save_interval == 0):
                facts = {key: value for key, value in entry.items() if key.startswith("val_")}
                saved.append(checkpoint.save(run, step, model, optimizers, tokenizer, facts))
                checkpoint.prune(run, config.keep_checkpoints)
                plot_loss(run)
    return run


def sample(model: GPT, tokenizer: Tokenizer, config: Pretrain) -> str:
    """A short text of the model as it is now. Draws from a generator of its own, so training is not disturbed."""
    model.eval()
    prompts, tokens = [config.sample_prompt], SAMPLE_TOKENS
    (completion,) = complete(model, tokenizer, prompts, SAMPLING, max_new_tokens=tokens, seed=config.seed, drop_oldest=True)
    model.train()
    return completion.text


def open_run(run: Path, config: Pretrain) -> None:
    """Make the run folder and write the resolved configuration, or check that a resumed one asks for the same run."""
    path = run / CONFIG_FILE
    if config.resume and not path.exists():
        raise UserError(f"nothing to resume: {run} holds no run (no {path})")
    if config.resume:
        before = read_yaml(path, Pretrain)
        for name in FIXED_ON_RESUME:
            if getattr(before, name) != getattr(config, name):
                raise UserError(
                    f"{run} was started with {name} = {getattr(before, name)}; resuming asks for {getattr(config, name)}."
                    " Leave it as it was, or start a new run in another out_dir"
                )
        return
    if path.exists() and (run / LOG_FILE).exists():
        raise UserError(f"{run} holds a run already; continue it with --resume, or choose another out_dir")
    if path.exists():  # a start that failed before its first step: what it prepared may be of other sources
        (run / TOKENIZER_FILE).unlink(missing_ok=True)
        shutil.rmtree(run / SHARDS, ignore_errors=True)
    elif run.exists() and any(run.iterdir()):
        raise UserError(f"{run} is not empty and holds no run; choose another out_dir")
    try:
        run.mkdir(parents=True, exist_ok=True)
        write_yaml(path, config)
    except OSError as error:
        raise UserError(f"cannot make the run folder {run}: {error.strerror}") from error


def prepare(run: Path, config: DataConfig, vocab_size: int) -> tuple[Tokenizer, data.shards.Shards]:
    """The run's tokenizer and shards: read if they are there, made from the sources if not."""
    if (run / TOKENIZER_FILE).exists() and (run / SHARDS).exists():
        tokenizer = Tokenizer.load(run)
        return tokenizer, data.shards.read(run / SHARDS, tokenizer)
    documents = list(data.documents(config.sources))
    if not documents:
        raise UserError(f"the corpus is empty: no text in {', '.join(config.sources)}")
    if config.tokenizer is not None:
        tokenizer = Tokenizer.load(config.tokenizer)
    else:
        training, _ = data.shards.hold_out(documents, config.holdout_share)
        tokenizer = Tokenizer.train(training, vocab_size)
    tokenizer.save(run)
    return tokenizer, data.shards.write(run / SHARDS, documents, tokenizer, config.holdout_share)
