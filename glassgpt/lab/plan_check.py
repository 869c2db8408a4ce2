"""`glassgpt plan --check`: a few real steps of a small model, beside what `interpret.cost` says of them.

Memory is measured in a process of its own for each row. On a CPU it is what the operating system counts: the most pages that the
process has held (VmHWM), above what it held after a warm-up step of a tiny model, which loads the libraries and their kernels.
There glibc is told, by MALLOC_MMAP_THRESHOLD_, to map every block of 64 KiB or more by itself and to give it back when it is
freed: so pages are live tensors and the kernels' own buffers, and not what an allocator keeps for later. oneDNN, which
multiplies bfloat16, is told to keep no compiled kernels: it compiles one for every number of rows, and a mixture's experts get
another number each time. On a GPU it is the most that PyTorch's allocator had handed out.
Operations are counted by `torch.utils.flop_counter.FlopCounterMode`.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from glassgpt.config import ModelConfig, OptimConfig, ParallelConfig, UserError
from glassgpt.config.errors import first_line
from glassgpt.config.files import from_plain, to_plain
from glassgpt.config.tuning import LoraConfig
from glassgpt.interpret import cost
from glassgpt.interpret.cost import Precision, Setup
from glassgpt.loading import pick_device
from glassgpt.model import GPT, lora, plain, use_attention
from glassgpt.train import machine, optim, parallel
from glassgpt.train.loss import Scored

BATCH_SIZE, CONTEXT_TOKENS = 8, 256
STEPS = 2
"""The second has the optimiser's state from its start."""
LAW_TOKENS = (128, 256, 512, 1024)
LAW_REPEATS, LAW_SECONDS = 5, 0.2
MEASURED_WITH = {"MALLOC_MMAP_THRESHOLD_": "65536", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "LRU_CACHE_CAPACITY": "1"}
"""Environment of the processes that measure."""


@dataclass(frozen=True)
class MemoryRow:
    """Peak of a training step, bytes."""

    precision: Precision
    checkpoint: bool
    micro_batches: int
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class FlopsRow:
    """Floating-point operations of one pass or step."""

    name: str
    predicted: int
    counted: int

    @property
    def error(self) -> float:
        return self.predicted / self.counted - 1


@dataclass(frozen=True)
class LawRow:
    """Attention of all layers on one sequence, forward."""

    context_tokens: int
    predicted: int
    counted: int
    seconds: float


@dataclass(frozen=True)
class Check:
    """What `--check` found."""

    shape: dict[str, Any]
    """The small model's configuration."""
    batch_size: int
    context_tokens: int
    memory: tuple[MemoryRow, ...]
    flops: tuple[FlopsRow, ...]
    law: tuple[LawRow, ...]


def check(config: ModelConfig, optimizer: Literal["adamw", "muon"] = "adamw", lora_rank: int = 0) -> Check:
    """Train a small model of the same make for a few steps, in every way; tell predicted and measured side by side.

    With a rank, its adapters alone.

    Raises UserError when a process ends before its time.
    """
    shape = small(config)
    device = pick_device("auto")
    precisions: tuple[Precision, ...] = ("fp32", "bf16") if machine.multiplies_bf16(device) else ("fp32",)
    ways = [(p, c, m) for p in precisions for c, m in ((False, 2), (True, 1))]
    return Check(
        shape=to_plain(shape),
        batch_size=BATCH_SIZE,
        context_tokens=CONTEXT_TOKENS,
        memory=tuple(
            memory_row(shape, p, checkpoint=c, micro_batches=m, optimizer=optimizer, device=device, lora_rank=lora_rank)
            for p, c, m in ways
        ),
        flops=flops_rows(shape, lora_rank=lora_rank),
        law=attention_law(shape),
    )


def small(config: ModelConfig) -> ModelConfig:
    """The same slots in a few layers of width 256 at most: proportions stay, so that every term of the arithmetic is there."""
    heads = min(8, config.n_head)
    group = min(heads, config.n_head // config.kv_heads)
    while heads % group:
        group -= 1
    head_width = max(2, min(256, config.width) // heads // 2 * 2)
    width = heads * head_width
    moe = config.moe
    if moe.experts:
        experts = min(8, moe.experts)
        moe = dataclasses.replace(moe, experts=experts, top_k=min(moe.top_k, experts), shared=min(moe.shared, 2))
        moe = dataclasses.replace(moe, expert_width=max(8, config.expert_width * width // config.width))
    return dataclasses.replace(
        config,
        vocab_size=min(8192, config.vocab_size),
        context_tokens=CONTEXT_TOKENS,
        n_layer=min(4, config.n_layer),
        n_head=heads,
        n_kv_head=heads // group,
        width=width,
        attention_width=None,
        mlp_width=max(8, config.hidden_width * width // config.width),
        window_tokens=CONTEXT_TOKENS // 4 if config.window_tokens else None,
        dropout=0.0,
        moe=moe,
    )


# ---------------------------------------------------------------------- memory


def memory_row(
    shape: ModelConfig,
    precision: Precision,
    *,
    checkpoint: bool,
    micro_batches: int,
    optimizer: Literal["adamw", "muon"],
    device: torch.device,
    lora_rank: int = 0,
) -> MemoryRow:
    """The predicted and the measured peak of one way to train."""
    setup = Setup(
        batch_size=BATCH_SIZE,
        context_tokens=CONTEXT_TOKENS,
        accumulates=micro_batches > 1,
        precision=precision,
        kernel="blocked" if device.type == "cpu" else "fused",
        on_cpu=device.type == "cpu",
        checkpoint=checkpoint,
        optimizer=optimizer,
        lora_rank=lora_rank,
    )
    predicted = cost.training_memory(shape, setup).peak
    measured = measure(shape, setup, micro_batches, device)
    return MemoryRow(precision, checkpoint, micro_batches, predicted, measured)


def measure(shape: ModelConfig, setup: Setup, micro_batches: int, device: torch.device) -> int:
    """Peak bytes of training `shape`, in a fresh process. Raises UserError when that ends before its time."""
    task = {"shape": to_plain(shape), "setup": dataclasses.asdict(setup), "micro_batches": micro_batches, "device": str(device)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "glassgpt.lab.plan_check"],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | MEASURED_WITH,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"the process that measures memory ended: {lines[-1]}")
    return int(done.stdout)


def _measured(task: dict[str, Any]) -> int:
    """In the child: warm up, then train and tell the peak."""
    shape, setup, device = from_plain(ModelConfig, task["shape"]), Setup(**task["setup"]), torch.device(task["device"])
    tiny = dataclasses.replace(shape, n_layer=1, vocab_size=64)
    few = dataclasses.replace(setup, batch_size=1, context_tokens=min(16, setup.context_tokens))
    _train(tiny, few, 1, device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        before = machine.memory_bytes(device)
        with suppress(OSError, StopIteration):  # Linux can forget the peak so far; elsewhere that is the start
            Path("/proc/self/clear_refs").write_text("5")
            lines = Path("/proc/self/status").read_text().splitlines()
            before = int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) * 1024
    _train(shape, setup, task["micro_batches"], device)
    return machine.memory_bytes(device) - before


def _train(shape: ModelConfig, setup: Setup, micro_batches: int, device: torch.device) -> None:
    """Steps as `pretrain` makes them, or with adapters as `sft` does, on random tokens."""
    torch.manual_seed(0)
    model = _model(shape, setup.lora_rank).to(device)
    use_attention(model, machine.attend_by(device))
    trained = parallel.spread(
        Scored(model), ParallelConfig(), parallel.Ranks(device), compiled=False, checkpoint_activations=setup.checkpoint
    )
    optimizers = optim.build(model, OptimConfig(optimizer=setup.optimizer))
    for _ in range(STEPS):
        for _ in range(micro_batches):
            ids, targets = torch.randint(shape.vocab_size, (2, setup.batch_size, setup.context_tokens), device=device)
            with machine.autocast(device, setup.precision):
                loss = trained(ids, targets)
            (loss / ids.numel() / micro_batches).backward()
        optim.clip(model, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def _model(shape: ModelConfig, lora_rank: int) -> GPT:
    model = GPT(shape)
    if lora_rank:
        lora.add(model, LoraConfig(rank=lora_rank), seed=0)
    return model


# ---------------------------------------------------------------------- floating-point operations


def flops_rows(shape: ModelConfig, batch_size: int = 2, lora_rank: int = 0) -> tuple[FlopsRow, ...]:
    """Forward pass, step and step with checkpointing, predicted and counted, for a CPU's attention in blocks."""
    device, T, rows = torch.device("cpu"), shape.context_tokens, []
    for checkpoint in (False, True):
        expected = cost.step_flops(shape, batch_size, T, "blocked", checkpoint=checkpoint, lora_rank=lora_rank)
        model = _model(shape, lora_rank)
        use_attention(model, machine.attend_by(device))
        trained = parallel.spread(
            Scored(model), ParallelConfig(), parallel.Ranks(device), compiled=False, checkpoint_activations=checkpoint
        )
        ids, targets = torch.randint(shape.vocab_size, (2, batch_size, T))
        if not checkpoint:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model(ids)
            rows.append(FlopsRow("forward", expected.forward, counter.get_total_flops()))
        with FlopCounterMode(display=False) as counter:
            trained(ids, targets).backward()
        name = "training, checkpointing" if checkpoint else "training"
        rows.append(FlopsRow(name, expected.total, counter.get_total_flops()))
    return tuple(rows)


def attention_law(shape: ModelConfig) -> tuple[LawRow, ...]:
    """Written-out attention of all layers on one sequence of several lengths: operations, and the best of a few times.

    Time of the processor, not of the clock, so that other work on the machine counts less.
    """
    rows = []
    for T in LAW_TOKENS:
        q, k, v = (torch.randn(1, heads, T, shape.head_width) for heads in (shape.n_head, shape.kv_heads, shape.kv_heads))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            for _ in range(shape.n_layer):
                plain(q, k, v, None, 0.0)
        taken: list[float] = []
        while len(taken) < LAW_REPEATS or sum(taken) < LAW_SECONDS:
            start = time.process_time()
            for _ in range(shape.n_layer):
                plain(q, k, v, None, 0.0)
            taken.append(time.process_time() - start)
        rows.append(LawRow(T, cost.attention_flops(shape, 1, T, "plain"), counter.get_total_flops(), min(taken)))
    return tuple(rows)


if __name__ == "__main__":
    try:
        print(_measured(json.loads(sys.stdin.read())))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {first_line(error)}")
