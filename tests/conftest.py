"""Fixtures for every test: the shared data, a small tokenizer, a fresh Python, a disk that fills up."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from glassgpt.text import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)  # the models are tiny; a second thread waits more than it works, most of all beside xdist


def pytest_configure(config: pytest.Config) -> None:
    """Compile the native kernels, once, before the workers start: a test that looks at stderr would see it being done."""
    if not hasattr(config, "workerinput"):
        from glassgpt.generation import native

        with contextlib.suppress(native.Unavailable):
            native.kernels()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared data folder: GLASSGPT_SHARED_DATA, or `shared/data` beside the repository."""
    folder = Path(os.environ.get("GLASSGPT_SHARED_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"shared data folder not found: {folder} (set GLASSGPT_SHARED_DATA to its path)")
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A byte-level BPE of 300 ids, trained on a few lines of English and Vietnamese."""
    lines = ["the cat sat on the mat, and then the other cat sat there too.\n", "Tiếng Việt có nhiều dấu thanh.\n"]
    return Tokenizer.train(lines * 20, 300)


@pytest.fixture(scope="session")
def start_python() -> Callable[..., subprocess.Popen[str]]:
    """Start a fresh interpreter on source code, in the repository."""

    def start(code: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    return start


@pytest.fixture
def full_disk() -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """`with full_disk(n)`: the operating system refuses to let any file grow beyond n bytes."""

    @contextlib.contextmanager
    def limited(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited
