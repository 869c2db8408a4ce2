"""What the tests of the slots share: float64 for oracles that insist on float32, random models, and comparisons."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glassgpt.config import ModelConfig
from glassgpt.model import GPT

SHAPE: dict[str, Any] = {"vocab_size": 31, "context_tokens": 24, "n_layer": 3, "n_head": 4, "width": 16}
EXACT = 1e-10


def shape(**changes: Any) -> ModelConfig:
    """Three layers of four heads of four numbers."""
    return ModelConfig(**SHAPE | changes)


@torch.no_grad()
def noisy(config: ModelConfig, dtype: torch.dtype = torch.float64, size: float = 0.3) -> GPT:
    """A random model with noise on every parameter, so that no bias is zero and no norm is one."""
    torch.manual_seed(0)
    model = GPT(config).double().eval()
    add_noise(model, size)
    return model.to(dtype)


@torch.no_grad()
def add_noise(module: nn.Module, size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter += size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def random(*of: int, seed: int = 2) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(of, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(config: ModelConfig, batch: int = 3, length: int | None = None, seed: int = 2) -> Tensor:
    """Token ids (B, T)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length or config.context_tokens), generator=generator)


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, of numbers in float64."""
    assert found.dtype == expected.dtype == torch.float64 and found.shape == expected.shape
    return float((found - expected).detach().abs().max())


def errors(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of any pair, each over its own largest number where that is above 1."""
    pairs = list(zip(found, expected, strict=True))
    assert pairs
    return max(error(a, b) / max(1.0, float(b.detach().abs().max())) for a, b in pairs)


@contextlib.contextmanager
def float64_throughout() -> Iterator[None]:
    """`transformers` computes angles and routers in float32 on purpose; in here what it calls float32 is float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(Tensor, "float", lambda self: self.double())
        yield
