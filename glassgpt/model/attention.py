"""Causal multi-head self-attention: the written-out maths, the fused kernel, and the module that uses one of them.

B batch, T query positions, S key positions (cached ones included), D width, H heads, W head width (D = H * W).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.config import ModelConfig

BLOCK_QUERIES = 128
"""Queries in a block of `blocked`: 128 was the fastest of 64 to 1,024 at contexts 256 and 1,024."""

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


def visible(T: int, S: int, pad: Tensor | None, segments: Tensor | None, device: torch.device) -> Tensor | None:
    """Which keys each query may see, (1 or B, 1, T, S) bool; None stands for plain causal or a single query.

    The T queries are the last T of the S positions. `pad` (B,) counts the left-padding positions of each row; they are
    seen by nobody but themselves (a row of attention that sees nothing would be NaN). `segments` (B, T = S) numbers the
    documents that share a row: a token sees its own document alone.
    """
    if pad is None and segments is None and T in (1, S):
        return None
    query = torch.arange(S - T, S, device=device).view(T, 1)
    key = torch.arange(S, device=device).view(1, S)
    seen = (key <= query).view(1, 1, T, S)
    if pad is not None:
        seen = seen & ((key >= pad.view(-1, 1, 1, 1)) | (key == query))  # (B, 1, T, S)
    if segments is not None:
        seen = seen & (segments.unsqueeze(2) == segments.unsqueeze(1)).unsqueeze(1)  # (B, 1, T, S)
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


def blocked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, dropout: float) -> Tensor:
    """The same in blocks of queries, each against the keys up to its end: the fast way to train on a CPU.

    Keeps the pattern for the backward pass, B * H * T * T / 2 numbers a layer. Measured in docs/log.md: up to three times as
    fast as `fused` there. With a cache or dropout it is `fused`.
    """
    if dropout or q.size(-2) != k.size(-2):
        return fused(q, k, v, seen, dropout)
    return _Blocked.apply(q, k, v, seen)


class _Blocked(torch.autograd.Function):
    """`plain` with its gradient written out, so that no pass over the pattern is made that the maths does not need."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        B, H, T, W = q.shape
        q, k, v = (x.reshape(B * H, T, W) for x in (q, k, v))
        z = torch.empty_like(v)  # (BH, T, W)
        wants_grad, patterns = any(ctx.needs_input_grad), []
        with torch.autocast(q.device.type, enabled=False):  # the operands have their precision already
            for start, end in _blocks(T):
                later = torch.full((end - start, end), float("-inf"), dtype=q.dtype, device=q.device).triu(start + 1)
                scores = torch.baddbmm(later, q[:, start:end], k[:, :end].mT, alpha=1 / math.sqrt(W))  # (BH, t, s)
                if seen is not None:
                    scores.view(B, H, end - start, end).masked_fill_(~seen[:, :, start:end, :end], float("-inf"))
                pattern = scores.softmax(dim=-1)
                z[:, start:end] = pattern @ v[:, :end]
                if wants_grad:
                    patterns.append(pattern)
        ctx.save_for_backward(q, k, v, z, *patterns)
        return z.view(B, H, T, W)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True, and `patterns` are constants here
            raise NotImplementedError("`blocked` has no second derivative; use_attention(model, plain) has")
        q, k, v, z, *patterns = ctx.saved_tensors
        shape = dz.shape  # (B, H, T, W)
        dz = dz.reshape(z.shape)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        with torch.autocast(q.device.type, enabled=False):
            mean = (dz * z).sum(dim=-1, keepdim=True)  # Σ_s pattern * dpattern, by way of the output
            for (start, end), pattern in zip(_blocks(q.size(1)), patterns, strict=True):
                dz_block = dz[:, start:end]
                dv[:, :end] += pattern.mT @ dz_block
                dscores = torch.baddbmm(mean[:, start:end], dz_block, v[:, :end].mT, beta=-1).mul_(pattern)  # (BH, t, s)
                dq[:, start:end] = dscores @ k[:, :end]
                dk[:, :end] += dscores.mT @ q[:, start:end]
        scale = 1 / math.sqrt(q.size(-1))
        return dq.mul_(scale).view(shape), dk.mul_(scale).view(shape), dv.view(shape), None


def _blocks(T: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK_QUERIES, T)) for start in range(0, T, BLOCK_QUERIES)]


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
    """Make every attention layer of `model` compute with `plain`, `fused` or `blocked`."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = attend
