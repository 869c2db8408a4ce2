"""The norm slot: LayerNorm or RMSNorm."""

from __future__ import annotations

from torch import nn

from glassgpt.config import ModelConfig


def norm(config: ModelConfig, width: int) -> nn.Module:
    """A norm over the last `width` numbers: LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019)."""
    if config.norm == "rms":
        return nn.RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)
