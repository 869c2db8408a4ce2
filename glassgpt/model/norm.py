"""The norm slot: LayerNorm or RMSNorm."""

from __future__ import annotations

from torch import Tensor, nn

from glassgpt.config import ModelConfig


class RMSNorm(nn.RMSNorm):
    """In the precision of its weight, also where autocast hands it less."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def norm(config: ModelConfig, width: int) -> nn.Module:
    """A norm over the last `width` numbers: LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019)."""
    if config.norm == "rms":
        return RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)
