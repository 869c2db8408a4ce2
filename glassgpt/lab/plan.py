"""`glassgpt plan MODEL`: what training takes, by arithmetic alone, and with `--check` how far that is from a real run."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from glassgpt.config import ModelConfig, UserError
from glassgpt.config.plan import Plan
from glassgpt.interpret import cost
from glassgpt.interpret.cost import Setup, TrainingMemory
from glassgpt.interpret.info import resolve
from glassgpt.lab.plan_check import Check, check

TOKENS_PER_PARAMETER = 20
"""Training tokens for each parameter (Hoffmann et al. 2022, table 3: about 20 at every size)."""
TUNING_TOKENS = 1e6
"""With adapters, where no number is given: what a few thousand examples have."""
HEADROOM = 0.1
"""Share of a GPU's memory left to the allocator's gaps, the kernels' own buffers and the framework."""
MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0


@dataclass(frozen=True)
class Estimate:
    """Everything that `glassgpt plan` shows."""

    parameters: int
    active: int
    """Parameters that one token meets, adapters apart."""
    adapters: int
    """Parameters of the adapters, 0 without; they come on top of `parameters`."""
    trained: int
    """Parameters that are trained: the adapters alone where there are some."""
    trained_share: float
    """Of all, adapters included."""
    context_tokens: int
    forward_flops: int
    """A token, as papers count: `cost.forward_flops`."""
    training_flops: int
    """A token: `cost.training_flops`."""
    attention_share: float
    """Of training_flops: what attention between tokens takes."""
    kernel_flops: int
    """A token, as the kernels compute it, hidden pairs too: `cost.step_flops`."""
    kernel_flops_checkpointed: int
    kept: TrainingMemory
    """One rank, all activations kept."""
    checkpointed: TrainingMemory
    """One rank, with `--checkpoint_activations`."""
    inference_weights: int
    """bfloat16."""
    kv_cache: int
    """bfloat16, of as many sequences as a micro-batch has, at their full length."""
    training_tokens: float
    seconds: float
    price: float

    def fits(self, memory: TrainingMemory, gpu_memory_gb: float) -> bool:
        """Whether the peak leaves a GPU its headroom."""
        return memory.peak <= (1 - HEADROOM) * gpu_memory_gb * 1e9


def plan(config: Plan) -> Estimate:
    """Show what training a model takes; returns the same as data.

    Raises UserError when there is no such model, or when its context is shorter than `context_tokens`.
    """
    shape, _ = resolve(config.model)
    found = estimate(shape, config)
    checked = check(shape, config.optimizer, config.lora_rank) if config.check else None
    if config.json:
        print(json.dumps(as_json(found, config) | ({"check": dataclasses.asdict(checked)} if checked else {})))
        return found
    console = Console(highlight=False)
    _show(console, found, shape, config)
    if checked:
        _show_check(console, checked)
    return found


def estimate(shape: ModelConfig, config: Plan) -> Estimate:
    """The arithmetic of a plan. Raises UserError when sequences are longer than the model's context."""
    B, T, rank = config.batch_size, config.context_tokens or shape.context_tokens, config.lora_rank
    if shape.context_tokens < T:
        raise UserError(f"this model's context is {shape.context_tokens} tokens; got context_tokens {T}")
    kernel: cost.Kernel = "blocked" if config.device == "cpu" else "fused"
    setup = Setup(
        batch_size=B,
        context_tokens=T,
        accumulates=config.accumulation_steps > 1,
        precision=config.precision,
        kernel=kernel,
        on_cpu=config.device == "cpu",
        lora_rank=rank,
        optimizer=config.optimizer,
        ranks=config.gpus,
        strategy=config.strategy,
    )
    training = cost.training_flops(shape, T, rank)
    parameters, active = cost.parameters(shape), cost.active_parameters(shape)
    adapters = cost.adapter_parameters(shape, rank)
    trained = adapters if rank else parameters
    tokens = config.training_tokens or (TUNING_TOKENS if rank else float(TOKENS_PER_PARAMETER * active))
    seconds = training * tokens / (config.gpus * config.peak_tflops * 1e12 * config.mfu)
    return Estimate(
        parameters=parameters,
        active=active,
        adapters=adapters,
        trained=trained,
        trained_share=trained / (parameters + adapters),
        context_tokens=T,
        forward_flops=cost.forward_flops(shape, T, rank),
        training_flops=training,
        attention_share=cost.attention_share(shape, T, rank),
        kernel_flops=cost.step_flops(shape, B, T, kernel, lora_rank=rank).total // (B * T),
        kernel_flops_checkpointed=cost.step_flops(shape, B, T, kernel, checkpoint=True, lora_rank=rank).total // (B * T),
        kept=cost.training_memory(shape, setup),
        checkpointed=cost.training_memory(shape, dataclasses.replace(setup, checkpoint=True)),
        inference_weights=2 * parameters,
        kv_cache=2 * cost.cache_numbers(shape, B, T),
        training_tokens=tokens,
        seconds=seconds,
        price=seconds / HOUR * config.gpus * config.price_per_gpu_hour,
    )


def as_json(found: Estimate, config: Plan) -> dict[str, Any]:
    """What `--json` prints: the options, and the estimate with whether it fits."""
    values = dataclasses.asdict(found)
    for name, memory in (("kept", found.kept), ("checkpointed", found.checkpointed)):
        values[name]["fits"] = found.fits(memory, config.gpu_memory_gb)
    return dataclasses.asdict(config) | values


# ---------------------------------------------------------------------- tables


def _table(*columns: str) -> Table:
    """A table without a frame; columns whose name starts with > are flush right."""
    named = any(column.strip(">") for column in columns)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim", show_header=named)
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left", no_wrap=True)
    return table


def _show(console: Console, found: Estimate, shape: ModelConfig, config: Plan) -> None:
    active = "" if found.active == found.parameters else f", {found.active:,} of them active"
    console.print(f"[bold]{config.model}[/bold]  {found.parameters:,} parameters{active}")

    if config.lora_rank:
        console.print(
            f"adapters of rank {config.lora_rank}: {found.trained:,} parameters trained, {found.trained_share:.2%} of all"
        )

    console.print("\nFloating-point operations of a token", style="bold")
    table = _table("", "", ">")
    table.add_row("forward", "2 a parameter met, and attention", _flops(found.forward_flops))
    table.add_row(
        "training",
        "no gradient of what is frozen" if found.adapters else "3 x forward, as papers count",
        _flops(found.training_flops),
    )
    table.add_row("of it attention", f"between {found.context_tokens:,} tokens", f"{found.attention_share:.1%}")
    table.add_row("as computed", "hidden pairs and recomputed scores too", _flops(found.kernel_flops))
    table.add_row("with checkpointing", "blocks computed twice", _flops(found.kernel_flops_checkpointed))
    console.print(table)
    _show_memory(console, found, config)

    console.print("\nTime and money", style="bold")
    table = _table("", "", ">")
    assumed = "a million, to scale from" if found.adapters else f"{TOKENS_PER_PARAMETER} for each active parameter"
    of = "as given" if config.training_tokens else assumed
    table.add_row("tokens", of, _count(found.training_tokens))
    table.add_row("operations", "tokens x training", _flops(found.training_flops * found.training_tokens))
    rate = config.gpus * config.peak_tflops * config.mfu
    table.add_row("rate", f"{config.gpus:,} x {config.peak_tflops:g} TFLOP/s x {config.mfu:g}", f"{rate:,.0f} TFLOP/s")
    table.add_row("time", "", _duration(found.seconds), style="bold")
    hours = found.seconds / HOUR * config.gpus
    table.add_row("cost", f"{hours:,.0f} GPU hours x {config.price_per_gpu_hour:g}", f"{found.price:,.0f}", style="bold")
    console.print(table)


def _show_memory(console: Console, found: Estimate, config: Plan) -> None:
    ranks = f"one of {config.gpus:,} GPUs ({config.strategy})" if config.gpus > 1 else "one GPU"
    title = f"Memory of {ranks}, {config.batch_size:,} x {found.context_tokens:,} tokens, {config.precision}"
    console.print(f"\n{title}", style="bold")
    both = (found.kept, found.checkpointed)
    table = _table("to train", "", ">all kept", ">checkpointing")
    rows = [
        ("weights", "float32, with the adapters" if found.adapters else "float32", "weights"),
        ("gradients", "of the adapters" if found.adapters else "float32", "gradients"),
        (f"{'AdamW' if config.optimizer == 'adamw' else 'Muon'}'s state", "float32", "optimizer"),
        ("activations", "kept for the backward pass", "activations"),
        ("exchange", "gathered weights, buckets", "exchange"),
        ("at the loss", "a chunk of logits", "loss"),
        ("first gradients", "when the backward pass begins", "backward"),
        ("at the step", "Muon's matrices", "step"),
    ]
    for name, what, field in rows:
        if any(getattr(memory, field) for memory in both):
            table.add_row(name, what, *(decimal(getattr(memory, field)) for memory in both))
    table.add_row("peak", "not all at the same time", *(decimal(memory.peak) for memory in both), style="bold")
    verdicts = ("fits" if found.fits(memory, config.gpu_memory_gb) else "too much" for memory in both)
    table.add_row(f"for {config.gpu_memory_gb:g} GB", f"{HEADROOM:.0%} left free", *verdicts, style="bold")
    console.print(table)
    console.print()
    table = _table("to generate", "", ">bfloat16")
    table.add_row("weights", "adapters merged" if found.adapters else "", decimal(found.inference_weights))
    table.add_row("keys and values", f"{config.batch_size:,} x {found.context_tokens:,} tokens", decimal(found.kv_cache))
    console.print(table)


def _show_check(console: Console, found: Check) -> None:
    console.print("\nChecked on this machine", style="bold")
    shape = found.shape
    console.print(
        f"{shape['n_layer']} layers of width {shape['width']}, vocabulary {shape['vocab_size']:,}, {found.batch_size} x"
        f" {found.context_tokens} tokens, everything else as the model's",
        style="dim",
    )
    table = _table("peak memory of a step", ">predicted", ">measured", ">error")
    for row in found.memory:
        what = f"{row.precision}, {row.micro_batches} micro-batch{'es' if row.micro_batches > 1 else ''}"
        what += ", checkpointing" if row.checkpoint else ""
        table.add_row(what, decimal(row.predicted), decimal(row.measured), f"{row.error:+.1%}")
    console.print(table)
    console.print()
    table = _table("operations of a step", ">predicted", ">counted", ">error")
    for flops in found.flops:
        table.add_row(flops.name, f"{flops.predicted:,}", f"{flops.counted:,}", f"{flops.error:+.1%}")
    console.print(table)
    console.print()
    table = _table("attention: 4 L T² D", ">predicted", ">counted", ">growth", ">CPU time", ">growth")
    for before, law in zip((None, *found.law), found.law, strict=False):
        growth = [f"{law.counted / before.counted:.1f}x", f"{law.seconds / before.seconds:.1f}x"] if before else ["", ""]
        counts = [f"{count / 1e6:,.1f} M" for count in (law.predicted, law.counted)]
        table.add_row(f"T = {law.context_tokens:,}", *counts, growth[0], f"{1000 * law.seconds:.1f} ms", growth[1])
    console.print(table)


def _flops(value: float) -> str:
    """With the prefix that leaves one to three digits before the point."""
    for prefix in ("", "k", "M", "G", "T", "P", "E", "Z"):
        if value < 1000:
            return f"{value:.3g} {prefix}FLOP"
        value /= 1000
    return f"{value * 1e21:.3g} FLOP"


def _count(value: float) -> str:
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:,.0f}"


def _duration(seconds: float) -> str:
    if seconds >= 2 * DAY:
        return f"{seconds / DAY:,.1f} days"
    if seconds < 2 * MINUTE:
        return f"{seconds:.1f} seconds"
    return f"{seconds / HOUR:,.1f} hours" if seconds >= 2 * HOUR else f"{seconds / MINUTE:,.1f} minutes"
