"""GPT-2 as published (Radford et al. 2019): the file to read first.

Token and learned position embeddings, pre-norm blocks of causal attention and a tanh-GELU MLP, a final norm and a head
that is the token embedding again.

B batch, T positions of this call, S positions with the cached ones, D width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from glassgpt.config import ModelConfig, UserError
from glassgpt.model.attention import Attention, LayerCache, visible

INIT_STD = 0.02


class MLP(nn.Module):
    """Two linear maps with a tanh-approximated GELU between them, position by position."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.hidden_width)
        self.act = nn.GELU(approximate="tanh")
        self.down = nn.Linear(config.hidden_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    """Pre-norm residual block:

    x ──┬───────────────── + ──┬──────────────── + ──>
        └─ norm_1 ─ attn ──┘   └─ norm_2 ─ mlp ──┘
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = Attention(config, layer)
        self.norm_2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, seen: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        x = x + self.drop(self.attn(self.norm_1(x), seen, cache))
        return x + self.drop(self.mlp(self.norm_2(x)))


class GPT(nn.Module):
    """`GPT(config)(ids)` -> logits (B, T, V). Knows nothing of text, losses, devices or files."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = embedding(config.vocab_size, config.width)
        self.position_embedding = embedding(config.context_tokens, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm_f = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.tie()
        initialise(self)

    def tie(self) -> None:
        """Make the head the token embedding matrix itself, if the configuration says so."""
        if self.config.tied_head:
            self.head.weight = self.token_embedding.weight

    def hidden(
        self, ids: Tensor, cache: LayerCache | None = None, pad: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """Token ids (B, T) to the final-norm output (B, T, D).

        `cache` holds the positions before these; `pad` (B,) counts left-padding positions per row, from position 0.
        `segments` (B, T), without a cache, numbers the documents that share a row, in order: each is computed as if it
        stood alone. Raises UserError when the sequence is longer than the context.
        """
        T = ids.size(1)
        start = cache.length if cache is not None else 0
        if start + T > self.config.context_tokens:
            raise UserError(
                f"context is {self.config.context_tokens} tokens; got {start + T} (shorten the input or raise context_tokens)"
            )
        positions = torch.arange(start, start + T, device=ids.device)  # (T,)
        if pad is not None:
            positions = (positions - pad.view(-1, 1)).clamp(min=0)  # (B, T)
        if segments is not None:
            first = torch.ones_like(segments, dtype=torch.bool)
            first[:, 1:] = segments[:, 1:] != segments[:, :-1]
            positions = positions - (positions * first).cummax(dim=1).values  # (B, T): each document counts from 0
        seen = visible(T, start + T, pad, segments, ids.device)
        x = self.drop(self.token_embedding(ids) + self.position_embedding(positions))  # (B, T, D)
        for block in self.blocks:
            x = block(x, seen, cache)
        return self.norm_f(x)

    def forward(self, ids: Tensor, cache: LayerCache | None = None, pad: Tensor | None = None) -> Tensor:
        """Token ids (B, T) to logits (B, T, V); arguments as in `hidden`."""
        return self.head(self.hidden(ids, cache, pad))


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
    if model.norm_f.weight.is_meta:
        return  # shapes without numbers: random draws would do nothing, after a second of importing what they need
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=INIT_STD)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name.endswith(("attn.out.weight", "mlp.down.weight")):
            nn.init.normal_(parameter, std=INIT_STD / math.sqrt(2 * model.config.n_layer))
