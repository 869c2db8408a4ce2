"""How many threads compute where nobody says, and how many are left to PyTorch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

CORES = Path("/sys/devices/system/cpu")


def default_threads() -> int:
    """One for each core that this process may use, as a core's second thread has no units of its own; or OMP_NUM_THREADS, if that
    is fewer."""
    cores = (
        len({_core(number) for number in os.sched_getaffinity(0)}) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(int(wanted), cores) if wanted.isdecimal() and int(wanted) > 0 else cores


def _core(number: int) -> str:
    """Names the core of a processor thread; all its threads have the same."""
    try:
        return (CORES / f"cpu{number}" / "topology" / "thread_siblings_list").read_text()
    except OSError:
        return str(number)


def pytorch() -> Any:
    """PyTorch, with one thread if it had not been imported yet."""
    is_new = "torch" not in sys.modules
    import torch

    if is_new:
        leave_one()
    return torch


def leave_one() -> None:
    """One thread for PyTorch, if it is imported: what is left to it is small, and its idle threads would keep the engine's from
    the cores."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
