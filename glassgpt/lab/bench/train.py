"""`glassgpt bench train`: a training step here and in `transformers`, each in a process of its own, taking turns."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from glassgpt.config import ModelConfig, OptimConfig, ParallelConfig, UserError, preset
from glassgpt.config.bench import BenchTrain
from glassgpt.interpret.cost import training_flops
from glassgpt.lab.bench.hf_peer import hf_peer
from glassgpt.loading import pick_device
from glassgpt.model import GPT, use_attention
from glassgpt.train import machine, optim, parallel
from glassgpt.train.loss import Scored

SMALL = ModelConfig(vocab_size=8192, context_tokens=256, n_layer=6, n_head=6, width=384, dropout=0.0)
TURN_SECONDS = 3.0
"""A turn is at least one step, and goes on for so long."""
NOISY = 0.25
"""Quartiles further apart than this share of the median: the machine was not quiet enough to compare on."""


@dataclass(frozen=True)
class Timing:
    """What one system's process measured."""

    precision: str
    first_step_seconds: float
    """The first step, with whatever is compiled for it."""
    step_seconds: list[float]
    peak_bytes: int
    """Most memory of the process since its model was built, above what Python and PyTorch held before; of the GPU on one."""
    loss: float
    """Of the first step, before any update: equal weights and batch must give equal losses."""


@dataclass(frozen=True)
class Result:
    """What `bench train` measured."""

    config: BenchTrain
    parameters: int
    vocab_size: int
    threads: int
    flops_per_step: int
    peak_flops: dict[str, float]
    """Measured rate of this machine's matrix product, by precision."""
    timings: dict[str, Timing]

    def rate(self, system: str) -> float:
        """Median tokens a second."""
        return self.config.batch_size * self.config.context_tokens / statistics.median(self.timings[system].step_seconds)

    def mfu(self, system: str) -> float:
        """Share of the measured peak of its precision that the model's own operations reach."""
        timing = self.timings[system]
        return self.flops_per_step / statistics.median(timing.step_seconds) / self.peak_flops[timing.precision]

    def spread(self, system: str) -> float:
        """Distance of the quartiles as a share of the median."""
        seconds = self.timings[system].step_seconds
        if len(seconds) < 3:
            return 0.0
        low, middle, high = statistics.quantiles(seconds, n=4)
        return (high - low) / middle


def bench_train(config: BenchTrain) -> Result:
    """Time training steps on equal weights and tokens. Raises UserError when `transformers` is not installed."""
    shape = SMALL if config.preset == "small" else preset(config.preset, dropout=0.0)
    vocab_size = config.vocab_size or shape.vocab_size
    shape = replace(shape, vocab_size=vocab_size, context_tokens=config.context_tokens)
    device = pick_device(config.device)
    if any(not system.startswith("ours") for system in config.systems):
        hf_peer(None, shape)  # says what is missing before anything is timed
    threads = config.threads or torch.get_num_threads()
    torch.set_num_threads(threads)  # the peak is that of as many threads as the systems get
    precisions = ("fp32", "bf16") if machine.multiplies_bf16(device) else ("fp32",)
    peak = {precision: machine.peak_flops(device, precision) for precision in precisions}
    spawn = get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    told = Console(stderr=True)
    try:
        for system in map(str, config.systems):
            if "bf16" in system and "bf16" not in precisions:
                told.print(f"{system} is left out: this machine does not multiply bfloat16 in hardware", highlight=False)
                continue
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_worker, args=(theirs, system, shape, config, str(device), threads), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes[system] = ours
            told.print(f"{system}: first step took {answer(ours, system)['first']:.1f} s", highlight=False)
        for turn in range(config.repeats):
            for system, pipe in pipes.items():
                pipe.send("step")
                answer(pipe, system)
            if told.is_terminal:
                told.print(f"turn {turn + 1} of {config.repeats}", highlight=False)
        timings = {}
        for system, pipe in pipes.items():
            pipe.send("end")
            timings[system] = Timing(**answer(pipe, system))
    finally:
        for process in processes:
            process.terminate()
    machine.peak_flops.cache_clear()  # measured again, as the machine may not have been quiet
    peak = {precision: max(rate, machine.peak_flops(device, precision)) for precision, rate in peak.items()}
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPT(shape).parameters())
    flops = training_flops(shape, config.context_tokens) * config.batch_size * config.context_tokens
    result = Result(config, parameters, vocab_size, threads, flops, peak, timings)
    _show(result)
    return result


def answer(pipe: Connection, system: str) -> dict[str, Any]:
    try:
        answer = pipe.recv()
    except EOFError:
        raise UserError(
            f"the process of {system} ended, most likely for want of memory; take fewer systems or a smaller batch"
        ) from None
    if isinstance(answer, str):
        raise UserError(f"{system}: {answer}")
    return answer


# ---------------------------------------------------------------------- in the child processes


def _worker(pipe: Connection, system: str, shape: ModelConfig, config: BenchTrain, device_name: str, threads: int) -> None:
    """One system: says when it is ready, makes a step when asked, tells what it measured at the end."""
    sys.stdout = sys.stderr
    try:
        torch.set_num_threads(threads)
        device = torch.device(device_name)
        before = 0 if device.type == "cuda" else machine.memory_bytes(device)
        step, precision = (_ours if system.startswith("ours") else _theirs)(system, shape, config, device)
        start = time.perf_counter()
        loss = step()
        first = time.perf_counter() - start
        step()
        pipe.send({"first": first})
        seconds = []
        while pipe.recv() == "step":
            step()  # the caches are the previous system's
            end = time.perf_counter() + TURN_SECONDS
            while (start := time.perf_counter()) < end:
                step()
                seconds.append(time.perf_counter() - start)
            pipe.send({})
        peak = machine.memory_bytes(device) - before
        pipe.send(asdict(Timing(precision, first, seconds, peak, loss)))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def _tokens(shape: ModelConfig, config: BenchTrain, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(shape.vocab_size, (config.batch_size, config.context_tokens + 1), generator=generator).to(device)


def _model(shape: ModelConfig) -> GPT:
    torch.manual_seed(0)
    return GPT(shape)


def _ours(system: str, shape: ModelConfig, config: BenchTrain, device: torch.device) -> tuple[Callable[[], float], str]:
    """A step as `pretrain` makes it."""
    machine.keep_freed_memory()
    model = _model(shape).to(device)
    use_attention(model, machine.attend_by(device))
    micro = config.micro_batch_size or config.batch_size
    precision, _ = machine.faster_precision(shape, micro, device)
    compiled = system.endswith("compiled")
    trained = parallel.spread(
        Scored(model), ParallelConfig(), parallel.Ranks(device), compiled=compiled, checkpoint_activations=False
    )
    optimizers = optim.build(model, OptimConfig())
    tokens = _tokens(shape, config, device)
    low_precision = machine.autocast(device, precision)

    def step() -> float:
        total = 0.0
        for part in tokens.split(micro):
            with low_precision:
                loss = trained(part[:, :-1], part[:, 1:])
            (loss / tokens[:, 1:].numel()).backward()
            total += loss.item()
        optim.clip(model, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return total / tokens[:, 1:].numel()

    return step, precision


def _theirs(system: str, shape: ModelConfig, config: BenchTrain, device: torch.device) -> tuple[Callable[[], float], str]:
    """The same step with `transformers`' GPT-2 in its default attention and loss, PyTorch's AdamW, autocast for bf16."""
    precision, _, compiled = system.partition("-")
    model = hf_peer(_model(shape), shape).train().to(device)
    trained = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = _tokens(shape, config, device)
    micro = config.micro_batch_size or config.batch_size
    parts = len(tokens) // micro
    low_precision = machine.autocast(device, precision)

    def step() -> float:
        total = 0.0
        for part in tokens.split(micro):
            with low_precision:
                loss = trained(input_ids=part[:, :-1], labels=part[:, :-1], shift_labels=part[:, 1:].contiguous()).loss
            (loss / parts).backward()
            total += loss.item() / parts
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step, precision


# ---------------------------------------------------------------------- table


def _show(result: Result) -> None:
    systems = list(result.timings)
    peers = [system for system in systems if not system.startswith("ours")]
    ours = [system for system in systems if system.startswith("ours")]
    ratio = max(map(result.rate, ours)) / max(map(result.rate, peers)) if ours and peers else None
    if result.config.json:
        rows = {s: {"tokens_per_second": result.rate(s), "mfu": result.mfu(s), "spread": result.spread(s)} for s in systems}
        print(json.dumps(asdict(result) | {"systems": rows, "ratio_to_best_peer": ratio}))
        return
    config = result.config
    title = (
        f"{config.preset}, {result.parameters / 1e6:.1f} M parameters, {config.batch_size} x {config.context_tokens} tokens,"
        f" vocabulary {result.vocab_size:,}, {result.threads} threads"
    )
    table = Table("system", title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("precision", "tokens/s", "MFU", "spread", "first step", "memory"):
        table.add_column(column, justify="right")
    for system in systems:
        timing = result.timings[system]
        table.add_row(
            system if system in ours else f"transformers {system}",
            timing.precision,
            f"{result.rate(system):,.0f}",
            f"{result.mfu(system):.0%}",
            f"{result.spread(system):.0%}",
            f"{timing.first_step_seconds:.1f} s",
            f"{timing.peak_bytes / 1e9:.2f} GB",
        )
    console = Console()
    console.print(table)
    peaks = ", ".join(f"{value / 1e9:,.0f} GFLOP/s in {precision}" for precision, value in result.peak_flops.items())
    console.print(f"medians of {config.repeats} turns; matrix product of this machine: {peaks}", highlight=False)
    if ratio is not None:
        best = max(peers, key=result.rate)
        console.print(f"{ratio:.2f}x the best peer ({best})", highlight=False, style="bold")
    if any(result.spread(system) > NOISY for system in systems):
        console.print(f"the machine was not quiet (quartiles more than {NOISY:.0%} apart): run it again", style="yellow")
