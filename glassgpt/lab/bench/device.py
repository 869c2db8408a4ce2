"""`glassgpt bench device`: the same model on every device and in both precisions of this machine."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table

from glassgpt.config import OptimConfig, UserError, preset
from glassgpt.config.bench import BenchDevice
from glassgpt.config.generate import Sampling
from glassgpt.generation import stream
from glassgpt.generation.generator import Generator
from glassgpt.model import GPT, fused, use_attention
from glassgpt.train import machine, optim
from glassgpt.train.loss import Scored


@dataclass(frozen=True)
class Row:
    """One device in one precision; rates in tokens a second."""

    device: str
    precision: str
    forward: float
    training: float
    """A whole step: forward, backward, clipping, AdamW."""
    generation: float
    """Decoding one text greedily with the cache."""


def bench_device(config: BenchDevice) -> list[Row]:
    """Measure and print a row for the CPU and the GPU, if there is one, in float32 and, where multiplied in hardware, bf16."""
    shape = preset(config.preset, dropout=0.0)
    if max(config.context_tokens, config.new_tokens + 1) > shape.context_tokens:
        raise UserError(f"context_tokens and new_tokens must fit in the context of {config.preset}, {shape.context_tokens}")
    names = ["cpu", *(["cuda"] if torch.cuda.is_available() else []), *(["mps"] if torch.backends.mps.is_available() else [])]
    machine.keep_freed_memory()
    rows = []
    for name in names:
        device = torch.device(name)
        for precision in ("fp32", "bf16") if machine.multiplies_bf16(device) else ("fp32",):
            torch.manual_seed(0)
            rows.append(_measure(GPT(shape).to(device), precision, config))
    _show(rows, config)
    return rows


def _measure(model: GPT, precision: str, config: BenchDevice) -> Row:
    device = next(model.parameters()).device
    ids = torch.randint(model.config.vocab_size, (config.batch_size, config.context_tokens + 1), device=device)
    scored, low_precision = Scored(model), machine.autocast(device, precision)
    optimizers = optim.build(model, OptimConfig())

    def forward() -> None:
        with torch.no_grad(), low_precision:
            scored(ids[:, :-1], ids[:, 1:]).item()

    def train() -> None:
        with low_precision:
            loss = scored(ids[:, :-1], ids[:, 1:])
        (loss / ids[:, 1:].numel()).backward()
        optim.clip(model, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def generate() -> None:
        with low_precision:
            for _ in stream(model, [[0]], Sampling(temperature=0), [Generator()], config.new_tokens):
                pass

    use_attention(model, machine.attend_by(device))
    tokens = config.batch_size * config.context_tokens
    forward_rate = tokens / _seconds(forward, device, config.repeats)
    training_rate = tokens / _seconds(train, device, config.repeats)
    use_attention(model, fused)
    model.eval()
    generation_rate = config.new_tokens / _seconds(generate, device, config.repeats)
    return Row(device.type, precision, forward_rate, training_rate, generation_rate)


def _seconds(work: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Median time, after one turn to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _show(rows: list[Row], config: BenchDevice) -> None:
    if config.json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    title = f"{config.preset}, tokens a second ({config.batch_size} x {config.context_tokens}; generation one text)"
    table = Table("device", "precision", title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("forward", "training", "generation"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row.device, row.precision, *(f"{rate:,.1f}" for rate in (row.forward, row.training, row.generation)))
    console = Console()
    console.print(table)
    if all(row.device == "cpu" for row in rows):
        console.print("no GPU was found on this machine", style="dim")
