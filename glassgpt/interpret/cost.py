"""Arithmetic of a network from its configuration alone: parameters, pairs of tokens, floating-point operations, bytes.

L layers, D width, H heads of queries, G of keys and values, W head width, F hidden width, E experts, k of them for each token,
V vocabulary; B sequences of T tokens, N = B * T; adapters of rank r (0: none) beside every matrix of the blocks but a router's,
which freeze all else. Nothing here is measured: `glassgpt plan --check` and the tests do that.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from glassgpt.config import ModelConfig
from glassgpt.model.attention import BLOCK_QUERIES
from glassgpt.model.position import BUCKETS

Kernel = Literal["plain", "fused", "blocked"]
"""Attention written out, PyTorch's fused one (a GPU's), or in blocks of queries (a CPU's)."""
Precision = Literal["fp32", "bf16"]
"""Of the products: bf16 is autocast; the weights are float32 either way."""
CHUNK_LOGITS = 2**26
"""Logits that `train.loss.head_loss` holds at once (tests/interpret/test_cost.py compares the two numbers)."""
PIECE_LOGITS = 2**20
"""Of those, the ones that a CPU turns into gradients at a time."""

# ---------------------------------------------------------------------- parameters


def block_entries(config: ModelConfig) -> int:
    """Entries of one block's matrices that a token meets: of a mixture, the router and the experts that it goes to."""
    if not config.moe.experts:
        return attention_entries(config) + mlp_entries(config, config.hidden_width)
    active = config.moe.top_k + config.moe.shared
    router = config.width * config.moe.experts
    return attention_entries(config) + router + active * mlp_entries(config, config.expert_width)


def attention_entries(config: ModelConfig) -> int:
    """Entries of D x (H + 2G)W, which makes q, k and v, and of HW x D."""
    return _qkv_entries(config) + config.n_head * config.head_width * config.width


def _qkv_entries(config: ModelConfig) -> int:
    return config.width * (config.n_head + 2 * config.kv_heads) * config.head_width


def mlp_entries(config: ModelConfig, hidden_width: int) -> int:
    """Entries of one MLP's matrices."""
    return (3 if config.mlp == "swiglu" else 2) * config.width * hidden_width


def parameters(config: ModelConfig) -> int:
    """All parameters, a tied head's once: what `sum(p.numel() for p in GPT(config).parameters())` counts."""
    D, V, T, H = config.width, config.vocab_size, config.context_tokens, config.n_head
    positions = {"learned": T * D, "relative": BUCKETS * H, "per_head": T * H}.get(config.position, 0)
    norms = (2 if config.embedding_norm else 1) * _norm_parameters(config, D)
    return (1 if config.tied_head else 2) * V * D + positions + norms + config.n_layer * block_parameters(config)


def block_parameters(config: ModelConfig) -> int:
    """Parameters of one block, every expert's among them."""
    D, W, H, G, moe = config.width, config.head_width, config.n_head, config.kv_heads, config.moe
    attention = attention_entries(config) + config.bias * D + config.has_qkv_bias * (H + 2 * G) * W
    attention += 2 * _norm_parameters(config, W) if config.qk_norm else 0
    if moe.experts:
        mlp = D * moe.experts + (moe.experts + moe.shared) * _mlp_parameters(config, config.expert_width)
    else:
        mlp = _mlp_parameters(config, config.hidden_width)
    return attention + mlp + 2 * _norm_parameters(config, D)


def active_parameters(config: ModelConfig) -> int:
    """Parameters that one token meets: all of them, but for the experts of a mixture that it does not go to."""
    if not config.moe.experts:
        return parameters(config)
    idle = config.moe.experts - config.moe.top_k
    return parameters(config) - config.n_layer * idle * _mlp_parameters(config, config.expert_width)


def adapted(config: ModelConfig) -> Counter[tuple[int, int]]:
    """Shapes (out, in) of one block's matrices that have an adapter beside them, and how often each is there."""
    D, W, H, G = config.width, config.head_width, config.n_head, config.kv_heads
    experts = config.moe.experts + config.moe.shared
    F = config.expert_width if experts else config.hidden_width
    found = Counter({((H + 2 * G) * W, D): 1})
    found[D, H * W] += 1
    found[F, D] += (2 if config.mlp == "swiglu" else 1) * max(1, experts)
    found[D, F] += max(1, experts)
    return found


def adapter_parameters(config: ModelConfig, rank: int) -> int:
    """Parameters of all adapters: (in + out) * r beside every matrix."""
    return config.n_layer * _adapter_entries(config, rank)


def _adapter_entries(config: ModelConfig, rank: int) -> int:
    return rank * sum(count * (rows + columns) for (rows, columns), count in adapted(config).items())


def _adapter_entries_met(config: ModelConfig, rank: int) -> int:
    """Of one block's adapters those that a token meets: not those of experts that it does not go to."""
    idle = config.moe.experts - config.moe.top_k if config.moe.experts else 0
    matrices = 3 if config.mlp == "swiglu" else 2
    return _adapter_entries(config, rank) - idle * matrices * rank * (config.width + config.expert_width)


def _mlp_parameters(config: ModelConfig, hidden_width: int) -> int:
    biases = (2 if config.mlp == "swiglu" else 1) * hidden_width + config.width
    return mlp_entries(config, hidden_width) + config.bias * biases


def _norm_parameters(config: ModelConfig, width: int) -> int:
    return 2 * width if config.norm == "layer" and config.bias else width


# ---------------------------------------------------------------------- floating-point operations


def keys_seen(config: ModelConfig, layer: int, context_tokens: int) -> int:
    """Keys that the last of `context_tokens` tokens sees in a layer."""
    span, window, T = config.span(layer), config.window_tokens or 0, context_tokens
    if span == "full" or window >= T:
        return T
    return window if span == "window" else window + (T - 1) // window


def training_flops(config: ModelConfig, context_tokens: int, lora_rank: int = 0) -> int:
    """Floating-point operations of training on one token: 6 a matrix entry, 12 * H * W for each key in reach.

    The usual count (Chowdhery et al. 2022, appendix B): both passes, attention as if it were not causal, no recomputation.
    Beside adapters a matrix takes 4: no gradient of itself, only that of what went in.
    """
    matrices = config.n_layer * block_entries(config) + config.vocab_size * config.width
    trained = config.n_layer * _adapter_entries_met(config, lora_rank)
    return (4 if lora_rank else 6) * matrices + 6 * trained + 3 * _attention_of_a_token(config, context_tokens)


def forward_flops(config: ModelConfig, context_tokens: int, lora_rank: int = 0) -> int:
    """The forward pass of that: 2 a matrix entry, and attention."""
    matrices = config.n_layer * block_entries(config) + config.vocab_size * config.width
    adapters = config.n_layer * _adapter_entries_met(config, lora_rank)
    return 2 * (matrices + adapters) + _attention_of_a_token(config, context_tokens)


def attention_share(config: ModelConfig, context_tokens: int, lora_rank: int = 0) -> float:
    """Share of `training_flops` that attention between tokens takes."""
    return 3 * _attention_of_a_token(config, context_tokens) / training_flops(config, context_tokens, lora_rank)


def _attention_of_a_token(config: ModelConfig, context_tokens: int) -> int:
    reach = sum(keys_seen(config, layer, context_tokens) for layer in range(config.n_layer))
    return 4 * config.n_head * config.head_width * reach


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one training step on B sequences of T tokens, as the kernels compute it."""

    forward: int
    """Blocks and logits."""
    backward: int
    """Gradients of all that, the loss's own two products included (`head_loss` makes them in the forward pass)."""
    recomputed: int
    """What checkpointing computes a second time."""

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.recomputed


def step_flops(
    config: ModelConfig, batch_size: int, context_tokens: int, kernel: Kernel, *, checkpoint: bool = False, lora_rank: int = 0
) -> Flops:
    """What `torch.utils.flop_counter.FlopCounterMode` counts in a training step: matrix products, 2 for each multiply-add.

    A matrix of n entries costs a token 2n, and 4n in the backward pass. Attention costs 4 * H * W for each pair of query and key
    that is multiplied: the scores and the weighted sum. The kernels multiply hidden pairs too, and hide them afterwards: T * T
    of them whatever the span (`blocked`: up to the end of each block of queries). The backward pass takes twice that, and the
    fused one half as much again, as it makes the scores anew (Dao 2023, §3.1).
    Checkpointing computes every block again, but for the dense MLP's last product, from which no gradient needs anything.
    Beside adapters, 6 an entry, a frozen matrix costs 2n in the backward pass, and nothing there in the first block's qkv, below
    which nothing is trained.
    """
    N, T, L, r = batch_size * context_tokens, context_tokens, config.n_layer, lora_rank
    kernel = _kernel(config, kernel, lora_rank)
    matrices, adapters = 2 * N * block_entries(config), 2 * N * _adapter_entries_met(config, r)
    pairs = 4 * batch_size * config.n_head * config.head_width * _pairs(T, kernel)
    logits = 2 * N * config.vocab_size * config.width
    needless = 0 if config.moe.experts else 2 * N * config.width * (r or config.hidden_width)
    back = 5 * pairs // 2 if kernel == "fused" else 2 * pairs
    back += matrices + 2 * adapters if r else 2 * matrices
    lowest = 2 * N * (_qkv_entries(config) + r * config.width) if r else 0
    return Flops(
        forward=L * (matrices + adapters + pairs) + logits,
        backward=L * back - lowest + (1 if r else 2) * logits,
        recomputed=L * (matrices + adapters + pairs - needless) if checkpoint else 0,
    )


def attention_flops(config: ModelConfig, batch_size: int, context_tokens: int, kernel: Kernel) -> int:
    """The part of the forward pass that grows with T²: 4 * B * L * H * W * T * T, for D = H * W the law O(L * T² * D)."""
    return 4 * batch_size * config.n_layer * config.n_head * config.head_width * _pairs(context_tokens, _kernel(config, kernel))


def _pairs(T: int, kernel: Kernel) -> int:
    """Pairs of query and key that are multiplied."""
    return sum(rows * end for rows, end in _query_blocks(T)) if kernel == "blocked" else T * T


def _query_blocks(T: int) -> list[tuple[int, int]]:
    """Of each block of `blocked`: its queries, and the keys up to its end."""
    return [(min(BLOCK_QUERIES, T - start), min(start + BLOCK_QUERIES, T)) for start in range(0, T, BLOCK_QUERIES)]


def _kernel(config: ModelConfig, kernel: Kernel, lora_rank: int = 0) -> Kernel:
    """A bias of the scores that learns needs the gradient of the scores, which only the written-out maths gives."""
    return "plain" if _bias(config, lora_rank) == "learns" else kernel


def _bias(config: ModelConfig, lora_rank: int) -> Literal["none", "fixed", "learns"]:
    """What positions add to the scores; beside adapters it is frozen."""
    if config.position in ("relative", "per_head"):
        return "fixed" if lora_rank else "learns"
    return "fixed" if config.position == "alibi" else "none"


# ---------------------------------------------------------------------- bytes


def cache_numbers(config: ModelConfig, batch_size: int, context_tokens: int) -> int:
    """Numbers of a `KVCache` at its fullest: 2 * B * G * W for each position that a layer holds; a window holds no more."""
    held = 0
    for layer in range(config.n_layer):
        windowed = config.span(layer) == "window"
        held += min(context_tokens, config.window_tokens or 0) if windowed else context_tokens
    return 2 * batch_size * config.kv_heads * config.head_width * held


def activation_bytes(
    config: ModelConfig,
    batch_size: int,
    context_tokens: int,
    precision: Precision = "fp32",
    kernel: Kernel = "fused",
    lora_rank: int = 0,
) -> int:
    """Bytes that autograd keeps from a forward pass and its loss for the backward pass, without dropout.

    That of the blocks (`block_activation_bytes`, `mlp_activation_bytes`), and around them

        16 * N     token ids and targets; 8 * T positions where they are learned
        4 * N * D  input of norm_f, with what the norm keeps
        4 * N * D  gradient of the hidden states, which `head_loss` makes in the forward pass
        4 * V * D  gradient of the head, likewise; no logits are kept

    and what layers share: the rotation's cosines and sines, the bias of the scores. Held against the tensors that autograd saves
    on a CPU, which keeps a little more of RMSNorm than a GPU does.
    Beside adapters the embedding and the head are frozen: of all that around, only norm_f's input and the gradient of the hidden
    states are kept.
    Not in here: dropout's masks, and the (B, H, T, T) patterns that a CPU keeps when attention drops out.
    """
    B, T, N, D, V = batch_size, context_tokens, batch_size * context_tokens, config.width, config.vocab_size
    blocks = sum(block_activation_bytes(config, layer, B, T, precision, kernel, lora_rank) for layer in range(config.n_layer))
    ends = _norm_kept(config, N, D, lora_rank) + 4 * N * D
    if not lora_rank:
        ends += 16 * N + 8 * T * (config.position == "learned") + _norm_kept(config, N, D) * config.embedding_norm + 4 * V * D
    shared, masks = 0, len(set(config.spans[: config.n_layer]))
    if config.position == "rope":
        shared += 8 * T * config.head_width if precision == "fp32" else 0
    if _bias(config, lora_rank) == "learns":
        shared += masks * (8 + 1) * T * T  # where each number came from, and which are hidden
    if _bias(config, lora_rank) == "fixed" and kernel == "fused" and precision == "fp32":
        shared += masks * 4 * config.n_head * T * T
    if config.moe.experts:  # the routers' losses: softmax, choices, log-sum-exp
        shared += config.n_layer * N * (8 * config.moe.experts + 8 * config.moe.top_k + 4)
    return blocks + ends + shared


def block_activation_bytes(
    config: ModelConfig,
    layer: int,
    batch_size: int,
    context_tokens: int,
    precision: Precision,
    kernel: Kernel,
    lora_rank: int = 0,
) -> int:
    """Bytes that one block keeps, s for each number of a product (4, or 2 in bf16) and 4 for the residual stream:

        4 * N * D   input of norm_1, with what the norm keeps; likewise of norm_2
        s * N * D   input of attn.qkv: norm_1's output
        ...         attention (`_attention_kept`)
        s * N * HW  attention's result, the input of attn.out
        ...         the MLP with its input: norm_2's output

    and in bf16 the 2-byte copies of the matrices that were multiplied.

    An adapter keeps the input of its matrix, which the frozen matrix itself no longer needs, and s * N * r, its low-rank product.
    Below the first block nothing is trained: its norm_1 keeps nothing, and no gradient needs the matrix of its qkv.
    """
    B, T, N, D, s, r = batch_size, context_tokens, batch_size * context_tokens, config.width, _size(precision), lora_rank
    is_lowest = bool(r) and layer == 0
    kept = (1 if is_lowest else 2) * _norm_kept(config, N, D, r) + s * N * D
    kept += _attention_kept(config, layer, B, T, precision, kernel, r) + s * N * config.n_head * config.head_width
    if config.moe.experts:
        kept += _mixture_kept(config, N, precision, r)
    else:
        kept += _inputs(config, precision) * s * N * D + mlp_activation_bytes(config, N, config.hidden_width, precision)
    kept += s * r * _adapted_rows(config, N)
    if precision == "bf16":
        kept += 2 * (matrix_entries(config) + _adapter_entries(config, r) - is_lowest * (_qkv_entries(config) + r * D))
    return kept


def _adapted_rows(config: ModelConfig, N: int) -> int:
    """Rows that one block's adapters take, one after the other."""
    experts = config.moe.top_k + config.moe.shared if config.moe.experts else 1
    return N * (2 + (3 if config.mlp == "swiglu" else 2) * experts)


def matrix_entries(config: ModelConfig) -> int:
    """Entries of all matrices of one block."""
    if not config.moe.experts:
        return block_entries(config)
    experts = config.moe.experts + config.moe.shared
    return attention_entries(config) + config.width * config.moe.experts + experts * mlp_entries(config, config.expert_width)


def mlp_activation_bytes(config: ModelConfig, rows: int, hidden_width: int, precision: Precision) -> int:
    """Of an MLP of F hidden numbers on `rows` tokens, without its input: what goes into the activation and what comes out.

    SwiGLU keeps four: the gate, its SiLU, what passes and the product.
    """
    return _size(precision) * rows * hidden_width * (4 if config.mlp == "swiglu" else 2)


def _norm_kept(config: ModelConfig, rows: int, width: int, lora_rank: int = 0) -> int:
    """Of a float32 norm: its input, and LayerNorm's mean and 1 / deviation, or RMSNorm's 1 / root and, for the gradient of its
    weight, the scaled input."""
    return 4 * rows * ((1 if lora_rank else 2) * width + 1 if config.norm == "rms" else width + 2)


def _attention_kept(config: ModelConfig, layer: int, B: int, T: int, precision: Precision, kernel: Kernel, lora_rank: int) -> int:
    """Bytes kept between attn.qkv and attn.out."""
    N, W, H, G, s = B * T, config.head_width, config.n_head, config.kv_heads, _size(precision)
    qkv, turned = s * N * (H + 2 * G) * W, config.position == "rope"
    narrow = precision == "bf16"
    bias = _bias(config, lora_rank)
    learned, biased = bias == "learns", bias == "fixed"
    hides = keys_seen(config, layer, T) < T
    kept = 4 * N * (H + G) * (2 if config.norm == "layer" else 1) * config.qk_norm
    if config.qk_norm and config.norm == "rms":
        kept += 4 * N * (H + G) * W * (narrow + (not lora_rank))  # in bf16 the input in float32; the scaled input
    if turned and narrow:
        kept += 2 * 2 * s * T * W  # cosines and sines, once for q and once for k
    holds_qkv = config.qk_norm and not (narrow and config.norm == "rms")  # the norm's input is a view of it
    if kernel == "fused" and not learned:
        kept += qkv  # v is a view of it
        kept += s * N * (H + G) * W * (turned or config.qk_norm)  # q and k are new tensors then
        kept += 4 * N * H  # log of the softmax's denominator: from it the pattern is made again
        # q's order of axes is another then, and so is the result's; and an adapter makes its input float32 first, then a copy
        kept += s * N * H * W * (config.qk_norm or bool(lora_rank and narrow))
        if biased:
            return kept + (s * H * T * T if narrow else 0)
        return kept + (s * T * T if hides else 0)
    kept += qkv * holds_qkv
    if kernel == "blocked" and not learned:
        return kept + 4 * s * N * H * W + s * B * H * _pairs(T, "blocked")  # q, k, v, the result; the patterns
    if kernel != "plain":  # PyTorch's own written-out maths, which computes in float32
        return kept + 3 * 4 * N * H * W + 4 * B * H * T * T
    kept += 3 * s * N * H * W + s * B * H * T * T
    if learned or biased:
        return kept + (4 * B * H * T * T if narrow else 0)  # the bias is float32
    return kept + T * T


def _mixture_kept(config: ModelConfig, N: int, precision: Precision, lora_rank: int) -> int:
    """Of the router and the experts, which together take N * k tokens, wherever they go."""
    D, s, moe, inputs = config.width, _size(precision), config.moe, _inputs(config, precision)
    reads_input = not lora_rank or (moe.shared > 0 and precision == "fp32")  # the router, for its gradient, or a shared expert
    router = s * N * D * reads_input + 4 * N * moe.experts + 8 * N * moe.top_k + 4 * N * (1 + moe.top_k) * moe.normalise
    gathered = 2 * 8 + 4 + inputs * s * D + s * D + 4 * D  # indices, weight, input, output before and after its weight
    expert = N * moe.top_k * gathered + mlp_activation_bytes(config, N * moe.top_k, config.expert_width, precision)
    own = (inputs if precision == "bf16" else 0) * s * N * D  # in float32 the input is the router's
    shared = moe.shared * (own + mlp_activation_bytes(config, N, config.expert_width, precision))
    return router + expert + shared


def _inputs(config: ModelConfig, precision: Precision) -> int:
    """How often an MLP keeps its input: autocast makes a copy for each of the two maps of SwiGLU."""
    return 2 if config.mlp == "swiglu" and precision == "bf16" else 1


def _size(precision: Precision) -> int:
    return 2 if precision == "bf16" else 4


@dataclass(frozen=True)
class Setup:
    """How `glassgpt pretrain` or a stage of tuning trains, as far as memory depends on it."""

    batch_size: int = 1
    """Sequences of a micro-batch on one rank."""
    context_tokens: int = 1024
    """Tokens of each."""
    accumulates: bool = False
    """Whether a step has several micro-batches: then gradients are there already when activations are at their most."""
    precision: Precision = "bf16"
    kernel: Kernel = "fused"
    on_cpu: bool = False
    """There `head_loss` takes a chunk of logits apart in pieces."""
    checkpoint: bool = False
    """Keep each block's input alone, and compute the rest again."""
    lora_rank: int = 0
    """Of the adapters beside all matrices of the blocks, which alone are trained then, by AdamW; 0 trains all weights."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    ranks: int = 1
    strategy: Literal["ddp", "fsdp"] = "ddp"


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one rank. The peak is less than their sum: not all of them are there at the same time."""

    weights: int
    """float32, adapters among them."""
    gradients: int
    """float32, of what is trained."""
    optimizer: int
    """AdamW's two moments, or Muon's momentum for the blocks' matrices: float32."""
    activations: int
    """What the backward pass needs (`activation_bytes`), with the gradient of a head that is trained."""
    exchange: int
    """ddp: the buckets, a second copy of the gradients; fsdp: gathered weights and the gradients of a block under way."""
    loss: int
    """On top of the activations while the loss is computed."""
    backward: int
    """On top of the activations when the backward pass begins."""
    step: int
    """On top of weights, gradients and state while the optimiser steps."""
    peak: int
    """The most at any time."""


def training_memory(config: ModelConfig, setup: Setup) -> TrainingMemory:
    """Bytes that a training step takes, as the sum of its tensors: the allocator's gaps and the framework itself come on top.

    The peak is the largest of four moments: the loss (its chunk of logits beside all activations), the start of the backward
    pass (the last block's gradients beside them), its end (all gradients beside the first block's activations) and the
    optimiser's step. Gradients of earlier micro-batches are held through the first two; those of a single one only appear as
    activations go.
    ddp holds everything on every rank. fsdp divides weights, gradients and state by the ranks, but for the gradients of several
    micro-batches, which stay whole until they are exchanged.
    Adapters lie whole on every rank. Gradients and state are theirs alone: the backward pass ends without that of an embedding.
    """
    r, sharded = setup.lora_rank, setup.ranks > 1 and setup.strategy == "fsdp" and not setup.lora_rank
    P, trained = parameters(config), adapter_parameters(config, r) if r else parameters(config)
    share = setup.ranks if sharded else 1
    muon = config.n_layer * muon_entries(config) if setup.optimizer == "muon" and not r else 0
    weights, state = -(-4 * (P + trained * bool(r)) // share), -(-(8 * trained - 4 * muon) // share)
    gradients = 4 * trained if setup.accumulates else -(-4 * trained // share)
    block, blocks = 4 * block_parameters(config), 4 * config.n_layer * block_parameters(config)
    exchange = 4 * P - blocks + min(blocks, 2 * block) + 2 * block if sharded else 4 * P if setup.ranks > 1 and not r else 0
    activations, loss, backward = _passes(config, setup)
    step = muon_bytes(config) if muon else 0
    passes = weights + state + exchange + gradients * setup.accumulates + activations + max(loss, backward)
    N, D, embedding = setup.batch_size * setup.context_tokens, config.width, 0 if r else 4 * config.vocab_size * config.width
    first = block_activation_bytes(config, 0, setup.batch_size, setup.context_tokens, setup.precision, setup.kernel, r)
    end = max(first + 8 * N * D, embedding)
    peak = max(passes, weights + state + exchange + gradients + max(end, step))
    return TrainingMemory(weights, gradients, state, activations, exchange, loss, backward, step, peak)


def _passes(config: ModelConfig, setup: Setup) -> tuple[int, int, int]:
    """Activations, and on top of them: while the loss is computed, and when the backward pass begins."""
    B, T, precision, kernel, r = setup.batch_size, setup.context_tokens, setup.precision, setup.kernel, setup.lora_rank
    N, D, V, s = B * T, config.width, config.vocab_size, _size(precision)
    narrow = precision == "bf16"
    kept = activation_bytes(config, B, T, precision, kernel, r)
    copies, again = 0, 0  # bf16 copies of the trained matrices while the forward pass lasts; a block computed again
    if setup.checkpoint:
        blocks = [block_activation_bytes(config, layer, B, T, precision, kernel, r) for layer in range(config.n_layer)]
        kept += 4 * config.n_layer * N * D - sum(blocks)
        trained = _adapter_entries(config, r) if r else matrix_entries(config)
        copies, again = (2 * config.n_layer * trained if narrow else 0), max(blocks)
    chunk = min(N, max(1, CHUNK_LOGITS // V))
    piece = min(chunk, max(1, PIECE_LOGITS // V)) if setup.on_cpu else chunk
    in_float32 = 4 * piece * V if narrow else 0
    product = s * chunk * D if r else s * V * D  # gradient of the hidden states, or of the head
    if setup.on_cpu and narrow and not r:
        product += 4 * V * D  # a CPU adds bf16 to float32 by way of a copy
    loss = 4 * N * D + s * chunk * V + max(in_float32, product) + copies  # the hidden states, logits, what is made of them
    if narrow:
        loss += 2 * N * D + 2 * V * D  # copies of hidden states and head
    mixture = bool(config.moe.experts)
    rows, F = (N * config.moe.top_k // config.moe.experts, config.expert_width) if mixture else (N, config.hidden_width)
    if r:  # beside the residual stream's gradients those of the MLP's input, by way of the matrix and of its adapter
        return kept, loss, again + 8 * N * D + s * rows * F * (3 if narrow else 2)
    head = 4 * V * D + 4 * N * D
    below = 8 * N * D + s * rows * F * (2 if config.mlp == "swiglu" else 1) + (6 if narrow else 4) * D * F
    return kept, loss, again + max(head, below - 4 * V * D * (not config.tied_head))


def muon_entries(config: ModelConfig) -> int:
    """Entries of one block's matrices that Muon steps: all but a router's."""
    return matrix_entries(config) - config.width * config.moe.experts


def muon_bytes(config: ModelConfig) -> int:
    """What Muon's step needs: its momentum looked ahead, float32, and for the most numerous matrices of one shape, which it
    orthogonalises together (q, k and v parted), a float32 stack, two bf16 ones and two of their Gram matrices."""
    D, A, stacks = config.width, config.n_head * config.head_width, Counter[tuple[int, int]]()
    stacks[config.kv_heads * config.head_width, D] += config.n_head // config.kv_heads + 2
    stacks[D, A] += 1
    experts = config.moe.experts + config.moe.shared
    F = config.expert_width if experts else config.hidden_width
    stacks[F, D] += (2 if config.mlp == "swiglu" else 1) * max(1, experts)
    stacks[D, F] += max(1, experts)
    largest = max(count * (8 * rows * columns + 4 * min(rows, columns) ** 2) for (rows, columns), count in stacks.items())
    return config.n_layer * (4 * muon_entries(config) + largest)
