"""`glassgpt demo`: a GPT-2 at work in two minutes, with nothing but this package."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from glassgpt.config import PRESETS, OptimConfig, Pretrain, UserError, preset
from glassgpt.config.lab import Demo
from glassgpt.interpret.anatomy import Anatomy, anatomy
from glassgpt.lab.temperature import sample as temperature
from glassgpt.loading import find_config, load
from glassgpt.model import GPT
from glassgpt.text import Tokenizer
from glassgpt.train.loss import Scored
from glassgpt.train.pretrain import pretrain
from glassgpt.train.run import read_log

TEMPERATURES = (0.1, 0.7, 1.5)
COMPARED_WITH = "gpt2"
NEW_TOKENS = 60
SHOWN_TOKENS = 10
TRAINED = PRESETS["nano"]
MARK = ".glassgpt-demo"


def demo(config: Demo) -> Path:
    """Show what a model is made of, what it writes, and how one learns; returns the folder of the pictures.

    Raises UserError for an unknown model, or when `out_dir` holds something else than an earlier demo.
    """
    began = time.perf_counter()
    console = Console()
    out = Path(config.out_dir)
    training = out / "training"
    if training.exists() and not (out / MARK).is_file():
        raise UserError(f"{training} is not an earlier demo's run; choose another out_dir")
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()  # what is in here is the demo's to replace
    shutil.rmtree(training, ignore_errors=True)

    model, tokenizer = load(config.model)
    _heading(console, 1, f"What it is made of: {config.model} beside {COMPARED_WITH}")
    _show_parameters(console, config.model)
    _heading(console, 2, "What it writes: one prompt, three temperatures")
    _show_temperatures(console, model, tokenizer, config)
    _heading(console, 3, "What it chooses from: the next token's distribution")
    pictures = [out / "next-token.svg", out / "next-token.png"]
    _show_distribution(console, model, tokenizer, config.prompt)
    for picture in pictures:
        temperature.chart(model, tokenizer, config.prompt, TEMPERATURES, picture)
    _heading(console, 4, f"How it learns: about {config.train_seconds:.0f} s of training on Python's own documentation")
    _train(console, training, config)
    _heading(console, 5, f"Done in {time.perf_counter() - began:.0f} s")
    console.print(
        "Pictures:",
        *(f"  {path}" for path in [*pictures, training / "loss.svg", training / "loss.png"]),
        sep="\n",
        highlight=False,
    )
    console.print(
        "\nTry next:",
        "  glassgpt info gpt2-xl --all",
        f'  glassgpt generate {config.model} "The old clock struck midnight, and" --temperature 0.7 --n 3',
        f'  glassgpt generate {training} "Return the" --logprobs 3',
        "  glassgpt pretrain --out_dir runs/mine --data.sources my-texts/ --max_steps 1000",
        "  glassgpt download gpt2    # where there is a network",
        sep="\n",
        highlight=False,
        soft_wrap=True,
    )
    return out


def _heading(console: Console, number: int, text: str) -> None:
    console.print()
    console.rule(f"[bold]{number}. {escape(text)}", align="left", style="dim")


# ---------------------------------------------------------------------- 1. parameters


def _show_parameters(console: Console, name: str) -> None:
    config, dtypes = find_config(name)
    sides = {name: anatomy(config, dtypes), COMPARED_WITH: anatomy(preset(COMPARED_WITH))}
    table = Table("part", *(f"{side}" for side in sides), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    rows = {side: _by_part(parts) for side, parts in sides.items()}
    for part in next(iter(rows.values())):
        table.add_row(part, *(f"{rows[side][part]:,}" for side in sides))
    table.add_section()
    table.add_row("[bold]parameters", *(f"[bold]{side.parameters:,}" for side in sides.values()))
    table.add_row("with a head of its own", *(f"{side.parameters_untied:,}" for side in sides.values()))
    for label, field in (
        ("layers", "n_layer"),
        ("heads", "n_head"),
        ("width", "width"),
        ("context", "context_tokens"),
        ("vocabulary", "vocab_size"),
    ):
        table.add_row(label, *(f"{getattr(side.config, field):,}" for side in sides.values()), style="dim")
    console.print(table)
    console.print(f"Why two totals: {sides[COMPARED_WITH].reason}", highlight=False)


def _by_part(side: Anatomy) -> dict[str, int]:
    parts: dict[str, int] = {}
    for group in side.groups:
        label = "all blocks" if group.name.startswith("blocks.") else group.name.replace("_", " ")
        parts[label] = parts.get(label, 0) + group.count
    return parts


# ---------------------------------------------------------------------- 2. temperatures


def _show_temperatures(console: Console, model: GPT, tokenizer: Tokenizer, config: Demo) -> None:
    samples = [temperature.sample(model, tokenizer, config.prompt, t, NEW_TOKENS, config.seed) for t in TEMPERATURES]
    for made in samples:
        console.print(f"\n[bold]temperature {made.temperature:g}[/bold]")
        console.print(Text.assemble(config.prompt, (made.completion.text, "cyan")))  # never read as markup
    table = Table("temperature", "choices at each step", "surprise", "repeated 3-token runs", box=None, pad_edge=False)
    for made in samples:
        choices = f"{2**made.entropy_bits:,.1f} (entropy {made.entropy_bits:.2f} bits)"
        table.add_row(f"{made.temperature:g}", choices, f"{made.surprise_bits:.2f} bits", f"{made.repeated_share:.0%}")
    console.print()
    console.print(table)
    console.print("Low: safe and repetitive. High: varied, and soon nonsense. The same weights, the same seed.", style="dim")


# ---------------------------------------------------------------------- 3. distribution


def _show_distribution(console: Console, model: GPT, tokenizer: Tokenizer, prompt: str) -> None:
    table = Table("next token", *(f"temperature {t:g}" for t in TEMPERATURES), box=None, pad_edge=False)
    columns = [temperature.likeliest(model, tokenizer, prompt, t, SHOWN_TOKENS) for t in TEMPERATURES]
    for row in zip(*columns, strict=True):
        table.add_row(Text(repr(row[0][0])), *(f"{'█' * round(12 * p):12} {p:.3f}" for _, p in row))
    console.print(Text(f"after “…{prompt[-50:]}”"))
    console.print(table)


# ---------------------------------------------------------------------- 4. training


def _train(console: Console, run: Path, config: Demo) -> None:
    start = Pretrain(
        out_dir=str(run),
        device="cpu",  # where `_seconds_a_step` has timed it
        model=TRAINED,
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=20),
        eval_interval=0,
        save_interval=0,
        seed=config.seed,
    )
    steps = max(20, int(config.train_seconds / _seconds_a_step(start)))
    pretrain(dataclasses.replace(start, max_steps=steps))
    log = read_log(run)
    first, last = log[0]["loss"], log[-1]
    console.print(
        f"Loss {first:.2f} -> {last['loss']:.2f} nats per token in {steps} steps (guessing: ln {TRAINED.vocab_size} ="
        f" {math.log(TRAINED.vocab_size):.2f}).",
        f"Held-out text: {last['val_loss']:.2f} nats per token, {last['val_bits_per_byte']:.2f} bits per byte.",
        highlight=False,
    )


def _seconds_a_step(config: Pretrain) -> float:
    """Time a few steps of the same shape on random ids, so that the training takes the time it was given."""
    scored = Scored(GPT(config.model))
    ids = torch.randint(config.model.vocab_size, (config.batch_size, config.model.context_tokens))
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        scored(ids, ids).backward()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2] * 1.15  # clipping, optimiser and log on top
