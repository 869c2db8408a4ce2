"""What this machine offers a training run: arithmetic and allocator."""

from __future__ import annotations

import contextlib
import ctypes
import sys

import torch

SMALLEST_BF16_WIDTH = 256
"""Below this width casting costs more than bfloat16 products save (measured: docs/log.md)."""


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def autocast(device: torch.device, precision: str, width: int) -> contextlib.AbstractContextManager[object]:
    """The forward pass's arithmetic: bfloat16 products where asked for, or where `auto` finds them faster."""
    fast = multiplies_bf16(device) and (width >= SMALLEST_BF16_WIDTH or device.type == "cuda")
    if precision == "bf16" or (precision == "auto" and fast):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


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
