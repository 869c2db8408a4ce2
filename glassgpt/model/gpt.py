"""The network: the file to read first.

As configured by default it is GPT-2 as published (Radford et al. 2019): token and learned position embeddings, pre-norm blocks of
causal attention and a tanh-GELU MLP, a final norm and a head that is the token embedding again. Each part is a slot that the
configuration fills when the network is built: `position.py`, `attention.py`, `norm.py`, `mlp.py`.
A few `nn.Identity` modules are taps: they give a name to a tensor that no other module returns, for `interpret.hooks` to see.

B batch, T positions of this call, S positions with the cached ones, D width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from glassgpt.config import ModelConfig, UserError
from glassgpt.config.model import Span
from glassgpt.model.attention import Attention, LayerCache, Routes, Where, masked, visible
from glassgpt.model.mlp import mlp
from glassgpt.model.norm import norm
from glassgpt.model.position import POSITIONS, Learned, PerHead, Relative

INIT_STD = 0.02


class Block(nn.Module):
    """Pre-norm residual block:

    x ──┬───────────────── + ──┬──────────────── + ──>
        └─ norm_1 ─ attn ──┘   └─ norm_2 ─ mlp ──┘
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norm_1 = norm(config, config.width)
        self.attn = Attention(config, layer)
        self.resid_mid = nn.Identity()
        self.norm_2 = norm(config, config.width)
        self.mlp = mlp(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, where: Where, cache: LayerCache | None = None) -> Tensor:
        x = self.resid_mid(x + self.drop(self.attn(self.norm_1(x), where, cache)))
        return x + self.drop(self.mlp(self.norm_2(x), where))


class GPT(nn.Module):
    """`GPT(config)(ids)` -> logits (B, T, V). Knows nothing of text, losses, devices or files."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = embedding(config.vocab_size, config.width)
        self.position_embedding = POSITIONS[config.position](config)
        self.embedding_norm = norm(config, config.width) if config.embedding_norm else nn.Identity()
        self.drop = nn.Dropout(config.dropout)
        self.embed = nn.Identity()
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm_f = norm(config, config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.tie()
        initialise(self)

    def tie(self) -> None:
        """Make the head the token embedding matrix itself, if the configuration says so."""
        if self.config.tied_head:
            self.head.weight = self.token_embedding.weight

    def hidden(
        self,
        ids: Tensor,
        cache: LayerCache | None = None,
        pad: Tensor | None = None,
        segments: Tensor | None = None,
        routes: Routes | None = None,
    ) -> Tensor:
        """Token ids (B, T) to the final-norm output (B, T, D).

        `cache` holds the positions before these; `pad` (B,) counts left-padding positions per row, from position 0.
        `segments` (B, T), without a cache, numbers the documents that share a row, in order: each is computed as if it
        stood alone. Routers leave their logits in `routes`. Raises UserError when the sequence is longer than the context.
        """
        x, where = self.enter(ids, cache, pad, segments, routes)
        for block in self.blocks:
            x = block(x, where, cache)
        if routes is not None:
            routes.close()
        return self.norm_f(x)

    def enter(
        self,
        ids: Tensor,
        cache: LayerCache | None = None,
        pad: Tensor | None = None,
        segments: Tensor | None = None,
        routes: Routes | None = None,
    ) -> tuple[Tensor, Where]:
        """Token ids (B, T) to the residual stream before the first block (B, T, D), and what blocks need to know of places."""
        start = cache.length if cache is not None else 0
        if start + ids.size(1) > self.config.context_tokens:
            raise UserError(
                f"context is {self.config.context_tokens} tokens; got {start + ids.size(1)}"
                " (shorten the input or raise context_tokens)"
            )
        positions = _positions(ids, start, pad, segments)  # (T,) or (B, T)
        x = self.position_embedding.add(self.token_embedding(ids), positions)  # (B, T, D)
        where = Where(
            self._masks(ids, cache, pad, segments, x.dtype), self.position_embedding.rotation(positions, x.dtype), routes
        )
        return self.embed(self.drop(self.embedding_norm(x))), where

    def logits(self, hidden: Tensor) -> Tensor:
        """What `hidden` gave, (..., D), to logits (..., V)."""
        return capped(self.head(hidden), self.config.logit_cap)

    def forward(self, ids: Tensor, cache: LayerCache | None = None, pad: Tensor | None = None) -> Tensor:
        """Token ids (B, T) to logits (B, T, V); arguments as in `hidden`."""
        return self.logits(self.hidden(ids, cache, pad))

    def _masks(
        self, ids: Tensor, cache: LayerCache | None, pad: Tensor | None, segments: Tensor | None, dtype: torch.dtype
    ) -> dict[Span, Tensor | None]:
        """A mask for each span that some layer has: what it sees, and the scores' bias if positions are one."""
        T, start, masks = ids.size(1), cache.length if cache is not None else 0, {}
        for span in dict.fromkeys(self.config.spans[: self.config.n_layer]):
            layer = self.config.spans.index(span)
            held = cache.held(layer) if cache is not None else 0  # what lies before is out of this layer's sight
            gone = pad if pad is None else (pad - (start - held)).clamp(min=0)
            seen = visible(T, held + T, gone, segments, ids.device, span, self.config.window_tokens or 0)
            bias = self.position_embedding.bias(T, held + T, ids.device, dtype)  # (H, T, S)
            masks[span] = seen if bias is None else masked(bias.unsqueeze(0), seen)  # (1 or B, 1 or H, T, S)
        return masks


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Logits that stay between -cap and cap, and almost as they are near 0."""
    return logits if cap is None else cap * (logits / cap).tanh()


def _positions(ids: Tensor, start: int, pad: Tensor | None, segments: Tensor | None) -> Tensor:
    """Of each token in its own text: (T,), or (B, T) where rows differ."""
    positions = torch.arange(start, start + ids.size(1), device=ids.device)  # (T,)
    if pad is not None:
        positions = (positions - pad.view(-1, 1)).clamp(min=0)  # (B, T)
    if segments is not None:
        first = torch.ones_like(segments, dtype=torch.bool)
        first[:, 1:] = segments[:, 1:] != segments[:, :-1]
        positions = positions - (positions * first).cummax(dim=1).values  # (B, T): each document counts from 0
    return positions


def embedding(count: int, width: int) -> nn.Embedding:
    """`nn.Embedding`, which on the meta device would draw its numbers first, and import a second's worth for that."""
    weight = torch.empty(count, width)
    return nn.Embedding(count, width, _weight=weight if weight.is_meta else None)


@torch.no_grad()
def initialise(model: GPT) -> None:
    """GPT-2's start, as `transformers` has it: N(0, 0.02) matrices and embeddings, zero biases.

    The matrices that write to the residual stream are scaled by 1/√(2L): there are 2L of them, so its variance does not
    grow with depth (Radford et al. 2019, §2.3).
    """
    if model.token_embedding.weight.is_meta:
        return  # shapes without numbers: random draws would do nothing, after a second of importing what they need
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding | Learned | Relative | PerHead):
            nn.init.normal_(module.weight, std=INIT_STD)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name.endswith(("attn.out.weight", "down.weight")):
            nn.init.normal_(parameter, std=INIT_STD / math.sqrt(2 * model.config.n_layer))
