"""What this machine offers a training run: arithmetic, compiler, allocator, and how much of it is used."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from glassgpt.config import ModelConfig
from glassgpt.model import GPT, blocked, fused, use_attention

Precision = Literal["fp32", "bf16"]
TURNS = 6
COMPILE_SECONDS = 15.0
"""Wait for compiled blocks on two CPU cores (measured: 8 to 15 s)."""
COMPILE_GAIN = 0.07
"""Share of a step that they save (measured: 5 to 10 %)."""


def eager() -> contextlib.AbstractContextManager[object]:
    """What was compiled computes uncompiled in here, so that other shapes are not compiled for. Where nothing was, saying so
    would first import the compiler: a second and a half."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """The forward pass's arithmetic for `fp32` or `bf16`."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def attend_by(device: torch.device) -> Callable[..., torch.Tensor]:
    """The attention that trains fastest on a device."""
    return blocked if device.type == "cpu" else fused


def faster_precision(config: ModelConfig, batch_size: int, device: torch.device) -> tuple[Precision, float]:
    """`fp32` or `bf16`, whichever computes a block and its gradient in less time here, and those seconds.

    One block is timed because all are alike. Where bfloat16 is not multiplied in hardware it is not tried; on a GPU where it
    is, float32 is not.
    """
    tried: tuple[Precision, ...] = ("fp32", "bf16") if multiplies_bf16(device) else ("fp32",)
    if device.type != "cpu" or len(tried) == 1:
        return tried[-1], _block_seconds(config, batch_size, device, tried[-1:])[tried[-1]]
    times = _block_seconds(config, batch_size, device, tried)
    best = min(times, key=lambda precision: times[precision])
    return best, times[best]


def _block_seconds(
    config: ModelConfig, batch_size: int, device: torch.device, tried: tuple[Precision, ...]
) -> dict[Precision, float]:
    """The best of several turns of each, in turn, so that a moment of other load meets both."""
    with torch.random.fork_rng():
        model = GPT(dataclasses.replace(config, n_layer=1, vocab_size=1)).to(device)
    ids = torch.zeros(batch_size, config.context_tokens, dtype=torch.long, device=device)
    use_attention(model, attend_by(device))
    best = dict.fromkeys(tried, math.inf)
    for turn in range(TURNS + 1):
        for precision in tried:
            start = time.perf_counter()
            with autocast(device, precision):
                y = model.hidden(ids)
            y.sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:  # the first warms up
                best[precision] = min(best[precision], time.perf_counter() - start)
    return best


def pays_to_compile(block_seconds: float, config: ModelConfig, micro_batches: int, device: torch.device) -> bool:
    """Whether compiling wins back its own wait over a run of so many micro-batches, by what it was measured to save."""
    run_seconds = 1.3 * block_seconds * config.n_layer * micro_batches  # a third more for embedding, head and optimiser
    return run_seconds * COMPILE_GAIN > 2 * COMPILE_SECONDS and has_compiler(device)


@functools.cache
def peak_flops(device: torch.device, precision: str) -> float:
    """The rate of this machine's matrix product in FLOP/s: the best of two dozen, 1024 x 1024 (8192 x 8192 on a GPU)."""
    size = 1024 if device.type == "cpu" else 8192
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(24):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held so far: of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):  # Linux; there getrusage counts the parent's memory too
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def keep_freed_memory() -> None:
    """Tell glibc to keep the large blocks that every step frees and asks for again.

    By default each one is mapped anew and its pages zeroed by the kernel; keeping them made a step of a 10 M model 1.15x
    as fast here. Other C libraries are left alone.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def has_compiler(device: torch.device) -> bool:
    """Whether `torch.compile` can work: on a CPU it needs a C++ compiler, on a GPU Triton."""
    try:
        if device.type == "cpu":
            from torch._inductor.cpp_builder import get_cpp_compiler

            return bool(get_cpp_compiler())
        from torch.utils._triton import has_triton

        return has_triton()
    except Exception:  # whatever the search for one raises, there is none
        return False
