"""Causal multi-head self-attention: the written-out maths, the fused kernel, and the module that uses one of them.

B batch, T query positions, S key positions (cached ones included), D width, H heads, W head width (D = H * W).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.config import ModelConfig

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


class LayerCache(Protocol):
    """What attention needs of a key/value cache; `glassgpt.generation.cache` has the real one."""

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, H, T, W) to a layer and return all keys and values so far (B, H, S, W)."""
        ...

    @property
    def length(self) -> int:
        """Positions held before this forward pass."""
        ...


def visible(T: int, S: int, pad: Tensor | None, device: torch.device) -> Tensor | None:
    """Which keys each query may see, (1 or B, 1, T, S) bool; None stands for plain causal or a single query.

    The T queries are the last T of the S positions. `pad` (B,) counts the left-padding positions of each row; they are
    seen by nobody but themselves (a row of attention that sees nothing would be NaN).
    """
    if pad is None and T in (1, S):
        return None
    query = torch.arange(S - T, S, device=device).view(T, 1)
    key = torch.arange(S, device=device).view(1, S)
    seen = (key <= query).view(1, 1, T, S)
    if pad is not None:
        seen = seen & ((key >= pad.view(-1, 1, 1, 1)) | (key == query))  # (B, 1, T, S)
    return seen


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, dropout: float) -> Tensor:
    """softmax(q kᵀ / √W) v, written out: the specification (Vaswani et al. 2017, eq. 1)."""
    T, S = q.size(-2), k.size(-2)
    if seen is None:
        seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, T, S)
    pattern = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    return F.dropout(pattern, dropout) @ v  # (B, H, T, W)


def fused(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, dropout: float) -> Tensor:
    """The same by PyTorch's kernels, which never hold the whole (B, H, T, S) pattern."""
    causal = seen is None and q.size(-2) > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout, is_causal=causal)


class Attention(nn.Module):
    """One fused D x 3D matrix makes queries, keys and values; heads attend; one D x D matrix mixes them."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.attend: Attend = fused
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, seen: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, W) each
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, H, S, W)
        z = self.attend(q, k, v, seen, self.dropout if self.training else 0.0)  # (B, H, T, W)
        return self.out(z.transpose(1, 2).reshape(B, T, D))


def use_attention(model: nn.Module, attend: Attend) -> None:
    """Make every attention layer of `model` compute with `plain` or `fused`."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = attend
