"""Causal multi-head self-attention: the written-out maths, the fused kernels, and the module that uses one of them.

B batch, T query positions, S key positions (cached ones included), D width, H heads of queries, G heads of keys and values (H for
MHA, 1 for MQA), W head width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.config import ModelConfig
from glassgpt.config.model import Span
from glassgpt.model.norm import norm
from glassgpt.model.position import distances, turned

BLOCK_QUERIES = 128
"""Queries in a block of `blocked`: 128 was the fastest of 64 to 1,024 at contexts 256 and 1,024."""

Attend = Callable[..., Tensor]
"""attend(q (B, H, T, W), k, v (B, G, S, W), mask, dropout, scale) -> (B, H, T, W). `mask`, (1 or B, 1 or H, T, S), says which
keys are seen (bool) or what is added to their scores (numbers); None is plain causal, or a single query. `scale` None is 1/√W."""


class LayerCache(Protocol):
    """What the network needs of a key/value cache; `glassgpt.generation.cache` has the real one."""

    @property
    def length(self) -> int:
        """Positions before this forward pass."""
        ...

    def held(self, layer: int) -> int:
        """How many of them a layer still holds: the newest."""
        ...

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, G, T, W) to a layer and return the keys and values that it holds with them (B, G, S, W)."""
        ...


class Routes:
    """Where the routers of one forward pass leave their logits, layer by layer: each (N, experts)."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []
        self._is_open = True

    def add(self, scores: Tensor) -> None:
        """A layer's, while the pass lasts: activations that are computed again would keep a second graph alive."""
        if self._is_open:
            self.logits.append(scores)

    def close(self) -> None:
        """The pass is over."""
        self._is_open = False


@dataclass(frozen=True, eq=False)
class Where:
    """What every layer is told of the tokens' places, made once a forward pass."""

    masks: dict[Span, Tensor | None] = field(default_factory=lambda: dict.fromkeys(("full", "window", "strided")))
    """For each span that some layer has."""
    rotation: Tensor | None = None
    """Cosines and sines for queries and keys, (2, 1 or B, 1, T, W)."""
    routes: Routes | None = None
    """Filled by routers, if given."""


def visible(
    T: int,
    S: int,
    pad: Tensor | None,
    segments: Tensor | None,
    device: torch.device,
    span: Span = "full",
    window_tokens: int = 0,
) -> Tensor | None:
    """Which keys each query may see, (1 or B, 1, T, S) bool; None stands for plain causal or a single query that sees all.

    The T queries are the last T of the S positions. `pad` (B,) counts the left-padding positions of each row; they are
    seen by nobody but themselves (a row of attention that sees nothing would be NaN). `segments` (B, T = S) numbers the
    documents that share a row: a token sees its own document alone.
    """
    if pad is None and segments is None and T in (1, S) and (span == "full" or window_tokens >= S):
        return None
    back = distances(T, S, device)
    seen = back >= 0
    if span != "full":
        near = back < window_tokens
        seen = seen & (near if span == "window" else near | (back % window_tokens == 0))
    seen = seen.view(1, 1, T, S)
    if pad is not None:
        key = torch.arange(S, device=device)
        seen = seen & ((key >= pad.view(-1, 1, 1, 1)) | (back == 0))  # (B, 1, T, S)
    if segments is not None:
        seen = seen & (segments.unsqueeze(2) == segments.unsqueeze(1)).unsqueeze(1)  # (B, 1, T, S)
    return seen


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores (B, H, T, S) with -inf where a key is not seen, or with a bias added."""
    if mask is None:
        T, S = scores.shape[-2:]
        mask = torch.ones(T, S, dtype=torch.bool, device=scores.device).tril(S - T)
    return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    scale: float | None = None,
    tap: Callable[[str, Tensor], Tensor] = lambda name, x: x,
) -> Tensor:
    """softmax(q kᵀ / √W) v, written out: the specification (Vaswani et al. 2017, eq. 1). `tap` sees what lies between."""
    k, v = _for_every_head(q, k, v)
    scores = tap("scores", q @ k.transpose(-2, -1) * _scale(q, scale))  # (B, H, T, S)
    pattern = tap("pattern", tap("masked", masked(scores, mask)).softmax(dim=-1).to(v.dtype))
    return F.dropout(pattern, dropout) @ v  # (B, H, T, W)


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scale: float | None = None) -> Tensor:
    """The same by PyTorch's kernels, which never hold the whole (B, H, T, S) pattern."""
    causal = mask is None and q.size(-2) > 1
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=q.size(1) != k.size(1)
    )


def flexible(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scale: float | None = None) -> Tensor:
    """The same by FlexAttention, which skips the blocks that a mask leaves empty: for sparse spans on a GPU.

    Fast only when it is compiled, which takes half a minute on a CPU: nothing chooses it by itself.
    """
    if mask is None or dropout or q.device.type != "cuda":  # nothing is sparse, or nothing is compiled
        return fused(q, k, v, mask, dropout, scale)
    return _skipping(q, k, v, mask, scale, _flex())


def _skipping(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, flex: Callable[..., Tensor]) -> Tensor:
    """FlexAttention, compiled or not, with a mask or a bias."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, heads = mask.size(0), mask.size(1)  # 1 where all are alike

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        number = mask[b % rows, h % heads, i, j]
        return number if mask.dtype == torch.bool else number > float("-inf")

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score if mask.dtype == torch.bool else score + mask[b % rows, h % heads, i, j]

    seen = create_block_mask(sees, rows if rows > 1 else None, heads if heads > 1 else None, q.size(2), k.size(2), q.device)
    return flex(q, k, v, score_mod=biased, block_mask=seen, scale=scale, enable_gqa=q.size(1) != k.size(1))


@functools.cache
def _flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _for_every_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, G, S, W) repeated for the H / G query heads that share each: (B, H, S, W)."""
    times = q.size(1) // k.size(1)
    return (k, v) if times == 1 else (k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1))


def _scale(q: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(q.size(-1)) if scale is None else scale


def blocked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scale: float | None = None) -> Tensor:
    """The same in blocks of queries, each against the keys up to its end: the fast way to train on a CPU.

    Keeps the pattern for the backward pass, B * H * T * T / 2 numbers a layer. Measured in docs/log.md: up to three times as
    fast as `fused` there. With a cache, dropout or a mask that learns it is `fused`.
    """
    if dropout or q.size(-2) != k.size(-2) or (mask is not None and mask.requires_grad):
        return fused(q, k, v, mask, dropout, scale)
    k, v = _for_every_head(q, k, v)
    return _Blocked.apply(q, k, v, mask, _scale(q, scale))


class _Blocked(torch.autograd.Function):
    """`plain` with its gradient written out, so that no pass over the pattern is made that the maths does not need."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        B, H, T, W = q.shape
        q, k, v = (x.reshape(B * H, T, W) for x in (q, k, v))
        z = torch.empty_like(v)  # (BH, T, W)
        wants_grad, patterns = any(ctx.needs_input_grad), []
        with torch.autocast(q.device.type, enabled=False):  # the operands have their precision already
            for start, end in _blocks(T):
                later = torch.full((end - start, end), float("-inf"), dtype=q.dtype, device=q.device).triu(start + 1)
                scores = torch.baddbmm(later, q[:, start:end], k[:, :end].mT, alpha=scale)  # (BH, t, s)
                if mask is not None:
                    per_head, part = scores.view(B, H, end - start, end), mask[:, :, start:end, :end]
                    per_head.masked_fill_(~part, float("-inf")) if part.dtype == torch.bool else per_head.add_(part)
                pattern = scores.softmax(dim=-1)
                z[:, start:end] = pattern @ v[:, :end]
                if wants_grad:
                    patterns.append(pattern)
        ctx.save_for_backward(q, k, v, z, *patterns)
        ctx.scale = scale
        return z.view(B, H, T, W)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
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
        return dq.mul_(ctx.scale).view(shape), dk.mul_(ctx.scale).view(shape), dv.view(shape), None, None


def _blocks(T: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK_QUERIES, T)) for start in range(0, T, BLOCK_QUERIES)]


class Attention(nn.Module):
    """One fused matrix makes queries, keys and values, D x (H + 2G)W; heads attend; one HW x D matrix mixes them."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.span = layer, config.span(layer)
        self.heads = (config.n_head, config.kv_heads, config.kv_heads)
        self.head_width, self.scale = config.head_width, config.attention_scale
        self.dropout = config.dropout
        self.attend: Attend = fused
        self.qkv = nn.Linear(config.width, sum(self.heads) * config.head_width, bias=config.has_qkv_bias)
        self.q_norm = norm(config, config.head_width) if config.qk_norm else nn.Identity()
        self.k_norm = norm(config, config.head_width) if config.qk_norm else nn.Identity()
        self.q, self.k, self.v, self.z = (nn.Identity() for _ in range(4))  # taps
        self.scores, self.masked, self.pattern = (nn.Identity() for _ in range(3))  # taps that only `tapped` passes through
        self.out = nn.Linear(config.n_head * config.head_width, config.width, bias=config.bias)

    def forward(self, x: Tensor, where: Where, cache: LayerCache | None = None) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, sum(self.heads), self.head_width).transpose(1, 2)  # (B, H + 2G, T, W)
        q, k, v = qkv.split(self.heads, dim=1)  # (B, H, T, W), (B, G, T, W) twice
        q, k = turned(self.q_norm(q), where.rotation), turned(self.k_norm(k), where.rotation)
        q, k, v = self.q(q.to(v.dtype)), self.k(k.to(v.dtype)), self.v(v)  # a norm may have made them float32
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, G, S, W)
        z = self.attend(q, k, v, where.masks[self.span], self.dropout if self.training else 0.0, self.scale)  # (B, H, T, W)
        return self.out(self.z(z).transpose(1, 2).flatten(2))

    def tapped(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scale: float | None = None) -> Tensor:
        """`plain` by way of this layer's taps: an `attend` for those who want to see the pattern."""
        return plain(q, k, v, mask, dropout, scale, lambda name, x: getattr(self, name)(x))


def use_attention(model: nn.Module, attend: Attend) -> None:
    """Make every attention layer of `model` compute with `plain`, `fused`, `blocked` or `flexible`."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = attend
