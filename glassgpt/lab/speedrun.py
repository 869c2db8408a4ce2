"""`glassgpt lab speedrun`: the time to a loss. nanoGPT's recipe sets the loss, ours is timed until it is as good."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from glassgpt import charts
from glassgpt.config import ModelConfig, OptimConfig, UserError
from glassgpt.config.bench import Speedrun
from glassgpt.data import documents
from glassgpt.loading import pick_device
from glassgpt.model import GPT, fused, use_attention
from glassgpt.train import machine, optim
from glassgpt.train.loss import Scored, token_loss

HELD_OUT_SHARE = 0.1
POINTS = 8


@dataclass(frozen=True)
class Recipe:
    """How one side trains."""

    model: ModelConfig
    optim: OptimConfig
    max_steps: int
    batch_size: int
    ours: bool = True
    """Attention in blocks, chunked head loss, kept memory, precision by measuring; otherwise plain PyTorch in float32."""


NANO_CPU = Recipe(
    ModelConfig(vocab_size=65, context_tokens=64, n_layer=4, n_head=4, width=128, dropout=0.0),
    OptimConfig(learning_rate=1e-3, warmup_steps=100, beta2=0.99, final_share=0.1),
    max_steps=2000,
    batch_size=12,
    ours=False,
)
"""nanoGPT's README, "I only have a macbook": characters of tiny shakespeare on a CPU."""
NANO_GPU = Recipe(
    ModelConfig(vocab_size=65, context_tokens=256, n_layer=6, n_head=6, width=384, dropout=0.2),
    OptimConfig(learning_rate=1e-3, warmup_steps=100, beta2=0.99, final_share=0.1),
    max_steps=5000,
    batch_size=64,
    ours=False,
)
"""nanoGPT's config/train_shakespeare_char.py; here in float32 and eager on any device, as nanoGPT computes on a CPU."""
OURS_CPU = Recipe(
    NANO_CPU.model,
    OptimConfig(optimizer="muon", learning_rate=1.5e-2, momentum=0.9, schedule="linear", final_share=0.0, warmup_steps=0),
    max_steps=330,
    batch_size=16,
)
OURS_GPU = Recipe(
    dataclasses.replace(NANO_GPU.model, dropout=0.0),
    OptimConfig(optimizer="muon", learning_rate=1e-2, momentum=0.9, schedule="linear", final_share=0.0, warmup_steps=0),
    max_steps=100,
    batch_size=16,
)
RECIPES = {"cpu": (NANO_CPU, OURS_CPU), "gpu": (NANO_GPU, OURS_GPU)}


@dataclass(frozen=True)
class Outcome:
    """One training run."""

    seed: int
    steps: int
    tokens: int
    seconds: float
    """In training steps: neither building the model nor measuring it."""
    val_loss: float
    """Nats per character of the whole held-out tenth."""
    curve: tuple[tuple[float, float], ...]
    """(seconds, held-out loss)."""


@dataclass(frozen=True)
class Result:
    """Pairs of runs, one for each seed, and ours with one trick less each."""

    config: Speedrun
    baseline: list[Outcome]
    ours: list[Outcome]
    without: dict[str, Outcome]

    def speedups(self) -> list[float]:
        """How many times sooner ours ended, by seed. Says nothing where ours did not reach the loss; see `reached`."""
        return [theirs.seconds / mine.seconds for theirs, mine in zip(self.baseline, self.ours, strict=True)]

    def reached(self) -> list[bool]:
        """Whether ours ended at or below the baseline's loss, by seed."""
        return [mine.val_loss <= theirs.val_loss for theirs, mine in zip(self.baseline, self.ours, strict=True)]


def speedrun(config: Speedrun) -> Result:
    """Train the pairs, baseline first, print how many times sooner ours was; writes speedrun.json and a chart.

    Raises UserError for an unreadable text or one with too few characters.
    """
    out, device, told = Path(config.out_dir), pick_device(config.device), Console(stderr=True)
    theirs, mine = RECIPES[config.recipe]
    train, held_out, vocabulary = characters(config.source, theirs.model.context_tokens)
    theirs, mine = (dataclasses.replace(r, model=dataclasses.replace(r.model, vocab_size=vocabulary)) for r in (theirs, mine))
    baseline, ours = [], []
    machine.keep_freed_memory()
    for seed in config.seeds:
        baseline.append(run(theirs, train, held_out, seed, device, stop=config.baseline_steps))
        told.print(f"seed {seed}: baseline {_line(baseline[-1])}", highlight=False)
        ours.append(run(mine, train, held_out, seed, device))
        told.print(f"seed {seed}: ours     {_line(ours[-1])}", highlight=False)
    without = {}
    for trick, recipe in (ablations(mine, theirs) if config.ablate else {}).items():
        without[trick] = run(recipe, train, held_out, config.seeds[0], device)
        told.print(f"without {trick}: {_line(without[trick])}", highlight=False)
    result = Result(config, baseline, ours, without)
    out.mkdir(parents=True, exist_ok=True)
    plain = asdict(result) | {"speedups": result.speedups(), "reached": result.reached()}
    (out / "speedrun.json").write_text(json.dumps(plain, indent=1))
    chart(result, out)
    if config.json:
        print(json.dumps(plain))
    else:
        _show(result, out)
    return result


def ablations(mine: Recipe, theirs: Recipe) -> dict[str, Recipe]:
    """Ours with one thing as the baseline has it, by what is missing then."""
    change = dataclasses.replace
    return {
        "Muon (AdamW at the baseline's rate)": change(mine, optim=change(mine.optim, optimizer="adamw", learning_rate=1e-3)),
        "Muon (AdamW at 5e-3)": change(mine, optim=change(mine.optim, optimizer="adamw", learning_rate=5e-3)),
        "the high rate (1e-3)": change(mine, optim=change(mine.optim, learning_rate=1e-3)),
        "the fall to zero (cosine to a tenth)": change(mine, optim=change(mine.optim, schedule="cosine", final_share=0.1)),
        "starting at full rate (20 steps of warm-up)": change(mine, optim=change(mine.optim, warmup_steps=20)),
        "the shorter momentum (0.95)": change(mine, optim=change(mine.optim, momentum=0.95)),
        "its batch (the baseline's, as many tokens)": change(
            mine, batch_size=theirs.batch_size, max_steps=mine.max_steps * mine.batch_size // theirs.batch_size
        ),
        "fast attention, loss and precision": change(mine, ours=False),
    }


def characters(source: str, context_tokens: int) -> tuple[Tensor, Tensor, int]:
    """(training ids, held-out ids, characters in use) of a text: its first nine tenths and its last, as nanoGPT parts it."""
    text = "".join(documents([source]))
    symbols = sorted(set(text))
    if len(text) * HELD_OUT_SHARE <= context_tokens + 1:
        raise UserError(f"{source} has {len(text)} characters; a tenth of it must be longer than the context, {context_tokens}")
    place = {symbol: number for number, symbol in enumerate(symbols)}
    ids = torch.from_numpy(np.array([place[symbol] for symbol in text]))
    cut = int(len(ids) * (1 - HELD_OUT_SHARE))
    return ids[:cut], ids[cut:], len(symbols)


def run(recipe: Recipe, train: Tensor, held_out: Tensor, seed: int, device: torch.device, stop: int | None = None) -> Outcome:
    """Train once; eight losses are measured on the way (the clock stands still meanwhile)."""
    torch.manual_seed(seed)
    model = GPT(recipe.model).to(device)
    use_attention(model, machine.attend_by(device) if recipe.ours else fused)
    precision = machine.faster_precision(recipe.model, recipe.batch_size, device)[0] if recipe.ours else "fp32"
    low_precision, scored = machine.autocast(device, precision), Scored(model)
    optimizers = optim.build(model, recipe.optim)
    B, T = recipe.batch_size, recipe.model.context_tokens
    generator = torch.Generator().manual_seed(seed)
    steps = min(stop or recipe.max_steps, recipe.max_steps)
    seconds, curve = 0.0, []
    for step in range(steps):
        start = time.perf_counter()
        at = torch.randint(len(train) - T, (B, 1), generator=generator)
        window = train[at + torch.arange(T + 1)].to(device)  # (B, T + 1)
        optim.set_rate(optimizers, optim.learning_rate(step, recipe.max_steps, recipe.optim))
        with low_precision:
            ids, targets = window[:, :-1], window[:, 1:]
            loss = scored(ids, targets) if recipe.ours else token_loss(model(ids), targets).sum
        (loss / (B * T)).backward()
        optim.clip(model, recipe.optim.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds += time.perf_counter() - start
        if (step + 1) % max(1, steps // POINTS) == 0 or step + 1 == steps:
            curve.append((seconds, measure(scored, held_out.to(device))))
    return Outcome(seed, steps, steps * B * T, seconds, curve[-1][1], tuple(curve))


@torch.no_grad()
def measure(scored: Scored, held_out: Tensor) -> float:
    """Nats per character over the whole held-out text, in windows of the context, in float32."""
    scored.eval()
    T = scored.model.config.context_tokens
    count = (len(held_out) - 1) // T
    ids, targets = held_out[: count * T].view(count, T), held_out[1 : count * T + 1].view(count, T)
    nats = sum(scored(a, b).item() for a, b in zip(ids.split(64), targets.split(64), strict=True))
    scored.train()
    return nats / (count * T)


def chart(result: Result, out: Path) -> list[Path]:
    """Held-out loss over seconds, both sides, every seed, as `speedrun.svg` and `speedrun.png`."""
    figure, axes = charts.figure()
    for outcomes, color, label in ((result.baseline, "#c8553d", "nanoGPT's recipe"), (result.ours, "#2f5d9b", "ours")):
        for number, outcome in enumerate(outcomes):
            axes.plot(
                *zip(*outcome.curve, strict=True),
                "o-",
                markersize=3,
                linewidth=1.4,
                color=color,
                label=label if not number else None,
            )
    goal = statistics.mean(outcome.val_loss for outcome in result.baseline)
    axes.axhline(goal, color="#888888", linewidth=0.8, linestyle="--")
    middle = sum(axes.get_xlim()) / 2
    axes.annotate(f"the baseline's end: {goal:.3f}", (middle, goal), ha="right", va="bottom", color="#666666")
    axes.set(xlabel="seconds of training", ylabel="held-out loss (nats per character)", title="Time to loss on the same machine")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return charts.save_both(figure, out, "speedrun")


def _line(outcome: Outcome) -> str:
    return f"{outcome.val_loss:.4f} after {outcome.steps:,} steps, {outcome.tokens:,} tokens, {outcome.seconds:.1f} s"


def _show(result: Result, out: Path) -> None:
    table = Table("run", box=None, pad_edge=False)
    for column in ("held-out loss", "steps", "tokens", "seconds", "sooner"):
        table.add_column(column, justify="right")

    def add(name: str, outcome: Outcome, sooner: str) -> None:
        table.add_row(
            name, f"{outcome.val_loss:.4f}", f"{outcome.steps:,}", f"{outcome.tokens:,}", f"{outcome.seconds:.1f}", sooner
        )

    pairs = zip(result.baseline, result.ours, result.speedups(), result.reached(), strict=True)
    for theirs, mine, sooner, reached in pairs:
        add(f"nanoGPT's recipe, seed {theirs.seed}", theirs, "")
        add(f"ours, seed {mine.seed}", mine, f"{sooner:.2f}x" if reached else "not reached")
    for trick, outcome in result.without.items():
        add(f"ours without {trick}", outcome, "")
    console = Console()
    console.print(table)
    if all(result.reached()):
        mean = math.exp(statistics.mean(map(math.log, result.speedups())))
        console.print(f"{mean:.2f}x sooner (geometric mean of {len(result.ours)} seeds)", style="bold", highlight=False)
    console.print(f"wrote {out}/speedrun.json, speedrun.svg, speedrun.png", highlight=False)
