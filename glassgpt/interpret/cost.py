"""Arithmetic of a network from its configuration alone: matrix entries, pairs of tokens, floating-point operations.

L layers, D width, H heads of queries, G of keys and values, W head width, F hidden width, V vocabulary, T context.
"""

from __future__ import annotations

from glassgpt.config import ModelConfig


def block_entries(config: ModelConfig) -> int:
    """Entries of one block's matrices that a token meets: of a mixture, the router and the experts that it goes to."""
    D, W, G, H = config.width, config.head_width, config.kv_heads, config.n_head
    attention = D * (H + 2 * G) * W + H * W * D
    matrices = 3 if config.mlp == "swiglu" else 2
    if not config.moe.experts:
        return attention + matrices * D * config.hidden_width
    active = config.moe.top_k + config.moe.shared
    return attention + D * config.moe.experts + active * matrices * D * config.expert_width


def keys_seen(config: ModelConfig, layer: int, context_tokens: int) -> int:
    """Keys that the last of `context_tokens` tokens sees in a layer."""
    span, window, T = config.span(layer), config.window_tokens or 0, context_tokens
    if span == "full" or window >= T:
        return T
    return window if span == "window" else window + (T - 1) // window


def training_flops(config: ModelConfig, context_tokens: int) -> int:
    """Floating-point operations of training on one token: 6 a matrix entry, 12 * H * W for each key in reach.

    The usual count (Chowdhery et al. 2022, appendix B): both passes, attention as if it were not causal, no recomputation.
    """
    matrices = config.n_layer * block_entries(config) + config.vocab_size * config.width
    reach = sum(keys_seen(config, layer, context_tokens) for layer in range(config.n_layer))
    return 6 * matrices + 12 * config.n_head * config.head_width * reach
