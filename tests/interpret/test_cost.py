"""The arithmetic of `interpret.cost` against the network itself: parameters, counted operations, the cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from saved import KERNELS, saved_bytes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from glassgpt.config import PRESETS, ModelConfig, OptimConfig, ParallelConfig, preset
from glassgpt.config.model import MoeConfig
from glassgpt.config.tuning import LoraConfig
from glassgpt.generation.cache import KVCache
from glassgpt.interpret import cost
from glassgpt.interpret.cost import Kernel, Setup
from glassgpt.model import GPT, lora, plain, use_attention
from glassgpt.train import loss, optim, parallel
from glassgpt.train.loss import Scored

SLOTS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "rms": {"norm": "rms"},
    "rope": {"position": "rope"},
    "none": {"position": "none", "tied_head": False},
    "sinusoidal": {"position": "sinusoidal", "embedding_norm": True},
    "alibi": {"position": "alibi", "spans": ("full", "window"), "window_tokens": 8},
    "relative": {"position": "relative"},
    "per_head": {"position": "per_head", "spans": ("full", "strided"), "window_tokens": 8},
    "gqa": {"n_kv_head": 2},
    "mqa, wide heads": {"n_kv_head": 1, "attention_width": 64, "position": "rope"},
    "qk_norm": {"qk_norm": True, "n_kv_head": 2},
    "swiglu": {"mlp": "swiglu", "bias": False},
    "relu2": {"mlp": "relu2", "qkv_bias": False},
    "spans": {"spans": ("full", "window", "strided"), "window_tokens": 8},
    "mixture": {"moe": MoeConfig(experts=4)},
    "mixture, shared": {"mlp": "swiglu", "moe": MoeConfig(experts=5, top_k=1, shared=1, normalise=False)},
    "modern": {"norm": "rms", "position": "rope", "n_kv_head": 2, "mlp": "swiglu", "qk_norm": True, "bias": False},
}
"""A configuration for each slot, to be laid over `shape`'s."""


def shape(name: str, **changes: Any) -> ModelConfig:
    base = {"vocab_size": 64, "context_tokens": 200, "n_layer": 3, "n_head": 4, "width": 32}
    return ModelConfig(**{**base, **SLOTS[name], **changes})


# ---------------------------------------------------------------------- parameters


def on_meta(config: ModelConfig) -> GPT:
    with torch.device("meta"):
        return GPT(config)


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith(("moe", "sparse", "modern"))])
def test_presets_count_as_the_network_does(name: str) -> None:
    model = on_meta(dataclasses.replace(PRESETS[name], n_layer=1))
    assert cost.parameters(model.config) == sum(p.numel() for p in model.parameters())
    assert cost.block_parameters(model.config) == sum(p.numel() for p in model.blocks[0].parameters())
    layers = PRESETS[name].n_layer - 1
    assert cost.parameters(PRESETS[name]) == cost.parameters(model.config) + layers * cost.block_parameters(model.config)


@pytest.mark.parametrize("name", SLOTS)
def test_every_slot_counts_as_the_network_does(name: str) -> None:
    model = on_meta(shape(name))
    assert cost.parameters(model.config) == sum(p.numel() for p in model.parameters())
    in_blocks = {name: p for name, p in model.blocks[0].named_parameters() if p.ndim == 2}
    assert cost.matrix_entries(model.config) == sum(p.numel() for p in in_blocks.values())
    assert cost.muon_entries(model.config) == sum(p.numel() for name, p in in_blocks.items() if "router" not in name)


@pytest.mark.parametrize("name", SLOTS)
def test_adapters_count_as_the_network_does(name: str) -> None:
    """Beside every matrix of the blocks but a router's."""
    model = GPT(shape(name))
    trained = lora.add(model, LoraConfig(rank=3), seed=0)
    assert cost.adapter_parameters(model.config, 3) == sum(p.numel() for p in trained)
    assert cost.parameters(model.config) == sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert cost.adapter_parameters(model.config, 0) == 0


LLAMA = ModelConfig(
    vocab_size=128256, context_tokens=8192, n_layer=32, n_head=32, n_kv_head=8, width=4096, mlp_width=14336, position="rope",
    norm="rms", mlp="swiglu", bias=False, tied_head=False,
)  # fmt: skip
MISTRAL = dataclasses.replace(LLAMA, vocab_size=32000, spans=("window",), window_tokens=4096)
MIXTRAL = dataclasses.replace(LLAMA, vocab_size=32000, moe=MoeConfig(experts=8, top_k=2, expert_width=14336))


@pytest.mark.parametrize(
    ("config", "published", "active"),
    [
        (PRESETS["gpt2"], 124_439_808, 124_439_808),
        (PRESETS["gpt2-xl"], 1_557_611_200, 1_557_611_200),
        (PRESETS["gpt3-175b"], 174_604_259_328, 174_604_259_328),
        (LLAMA, 8_030_261_248, 8_030_261_248),
        (MISTRAL, 7_241_732_096, 7_241_732_096),
        (MIXTRAL, 46_702_792_704, 12_879_925_248),  # Jiang et al. 2024: 47 B, of which a token meets 13 B
    ],
    ids=["gpt2", "gpt2-xl", "gpt3-175b", "llama", "mistral", "mixtral"],
)
def test_published_counts(config: ModelConfig, published: int, active: int) -> None:
    assert (cost.parameters(config), cost.active_parameters(config)) == (published, active)


def test_active_is_what_a_token_meets() -> None:
    """The parameters that get a gradient from a single token."""
    config = shape("mixture, shared")
    model = GPT(config)
    model(torch.zeros(1, 1, dtype=torch.long)).sum().backward()
    met = sum(p.numel() for p in model.parameters() if p.grad is not None and p.grad.any())
    idle = sum(p.numel() for p in model.blocks[0].mlp.experts[0].parameters())
    total = sum(p.numel() for p in model.parameters())
    untouched = config.n_layer * (config.moe.experts - config.moe.top_k) * idle
    assert cost.active_parameters(config) == total - untouched
    reached = {name.split(".")[4] for name, p in model.named_parameters() if "blocks.0.mlp.experts" in name and p.grad.any()}
    assert len(reached) == config.moe.top_k
    assert met <= cost.active_parameters(config)


# ---------------------------------------------------------------------- operations

# The counter knows a GPU's fused attention and not a CPU's: its own formulas for the one are given to the other.
aten = torch.ops.aten
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v),
}


def counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)


def counted_step(config: ModelConfig, B: int, T: int, kernel: str, checkpoint: bool, lora_rank: int = 0) -> int:
    model = GPT(config)
    if lora_rank:
        lora.add(model, LoraConfig(rank=lora_rank), seed=0)
    use_attention(model, KERNELS[kernel])
    ranks = parallel.Ranks(torch.device("cpu"))
    trained = parallel.spread(Scored(model), ParallelConfig(), ranks, compiled=False, checkpoint_activations=checkpoint)
    ids, targets = torch.randint(config.vocab_size, (2, B, T))
    with counter() as found:
        trained(ids, targets).backward()
    return found.get_total_flops()


@pytest.mark.parametrize("name", SLOTS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_step_is_counted_exactly(name: str, kernel: Kernel) -> None:
    """160 tokens are two blocks of `blocked`; a mixture sends each token to top_k experts, wherever they are."""
    config, B, T = shape(name), 2, 160
    for checkpoint in (False, True):
        expected = cost.step_flops(config, B, T, kernel, checkpoint=checkpoint)
        assert expected.total == counted_step(config, B, T, kernel, checkpoint)


@pytest.mark.parametrize("name", SLOTS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_step_with_adapters_is_counted_exactly(name: str, kernel: Kernel) -> None:
    """No gradient of a frozen matrix, none at all below the first block; a bias of the scores that is frozen frees the kernel."""
    config, B, T = shape(name), 2, 160
    for checkpoint in (False, True):
        expected = cost.step_flops(config, B, T, kernel, checkpoint=checkpoint, lora_rank=4)
        assert expected.total == counted_step(config, B, T, kernel, checkpoint, lora_rank=4)


@pytest.mark.parametrize("name", ["gpt2", "spans", "mixture", "modern"])
def test_a_forward_pass_is_counted_exactly(name: str) -> None:
    config = shape(name)
    model = GPT(config)
    use_attention(model, plain)
    with torch.no_grad(), counter() as found:
        model(torch.zeros(2, 50, dtype=torch.long))
    assert cost.step_flops(config, 2, 50, "plain").forward == found.get_total_flops()


def test_attention_grows_with_the_square() -> None:
    config = shape("gpt2")
    at = [cost.attention_flops(config, 1, T, "plain") for T in (64, 128, 256)]
    assert at == [4 * config.n_layer * T * T * config.width for T in (64, 128, 256)]
    assert at[2] == 4 * at[1] == 16 * at[0]
    assert cost.attention_flops(config, 1, 1024, "blocked") < 0.6 * cost.attention_flops(config, 1, 1024, "plain")


def test_the_usual_count_is_the_step_of_a_full_span() -> None:
    """Where every key is in reach, 6 a matrix entry + 12 * H * W * T is what the written-out maths computes."""
    for name in ("gpt2", "gqa", "modern", "mixture"):
        config = shape(name)
        assert cost.step_flops(config, 1, 100, "plain").total == 100 * cost.training_flops(config, 100)
    assert cost.training_flops(shape("spans"), 100) < cost.training_flops(shape("gpt2"), 100)


@pytest.mark.parametrize("name", ["gpt2", "gqa", "modern", "mixture, shared"])
def test_the_usual_count_with_adapters(name: str) -> None:
    """It is the step's, but for the first block's qkv, from which nothing goes on downwards."""
    config, r = shape(name), 4
    step = cost.step_flops(config, 1, 100, "plain", lora_rank=r)
    lowest = 2 * config.width * ((config.n_head + 2 * config.kv_heads) * config.head_width + r)
    assert step.total == 100 * (cost.training_flops(config, 100, r) - lowest)
    assert step.forward == 100 * cost.forward_flops(config, 100, r)
    assert 3 * cost.forward_flops(config, 100) == cost.training_flops(config, 100)


# ---------------------------------------------------------------------- bytes


@pytest.mark.parametrize("name", ["gpt2", "gqa", "mqa, wide heads", "spans", "alibi"])
def test_the_cache_is_as_large_as_counted(name: str) -> None:
    config = shape(name, context_tokens=128)
    model, cache = GPT(config), KVCache(config)
    with torch.no_grad():
        for part in torch.zeros(2, 128, dtype=torch.long).split(60, dim=1):
            model(part, cache)
    assert cache.nbytes == 4 * cost.cache_numbers(config, 2, 128)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # RMSNorm of a bf16 query: slower, not wrong
@pytest.mark.parametrize("name", SLOTS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_autograd_keeps(name: str, kernel: Kernel, precision: cost.Precision) -> None:
    config, B, T = shape(name), 2, 160
    expected, measured = cost.activation_bytes(config, B, T, precision, kernel), saved_bytes(config, B, T, kernel, precision)
    # exact, but for the few scalars of the routers' losses
    assert 0 <= measured - expected <= (100 if config.moe.experts else 0)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("name", SLOTS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_beside_adapters_are_what_autograd_keeps(name: str, kernel: Kernel, precision: cost.Precision) -> None:
    config, B, T = shape(name), 2, 160
    for rank in (1, 6):
        expected = cost.activation_bytes(config, B, T, precision, kernel, rank)
        measured = saved_bytes(config, B, T, kernel, precision, rank)
        assert 0 <= measured - expected <= (100 if config.moe.experts else 0)


def test_usual_mistakes_about_adapters_would_be_seen() -> None:
    """What is counted wrongly most easily is far from what autograd keeps, which the test above meets to the byte."""
    config, B, T, r = shape("gpt2"), 2, 160, 4
    N, D, L = B * T, config.width, config.n_layer
    measured = saved_bytes(config, B, T, "fused", "fp32", r)
    right = cost.activation_bytes(config, B, T, "fp32", "fused", r)
    mistakes = {
        "all as if everything were trained": cost.activation_bytes(config, B, T, "fp32", "fused"),
        "a gradient of the head": right + 4 * config.vocab_size * D,
        "low-rank products forgotten": right - L * 4 * 4 * N * r,
        "only one input kept for up and qkv": right - L * 4 * N * D,
        "norm_1 of the first block as of any other": right + 4 * N * (D + 2),
        "ids kept for the embedding's gradient": right + 16 * N,
    }
    assert right == measured
    assert [name for name, wrong in mistakes.items() if wrong == measured] == []


def test_chunks_are_those_of_the_loss() -> None:
    assert (cost.CHUNK_LOGITS, cost.PIECE_LOGITS) == (loss.CHUNK_LOGITS, loss.PIECE_LOGITS)


def test_fsdp_divides_and_ddp_does_not() -> None:
    config = PRESETS["gpt2"]
    whole = 4 * cost.parameters(config)
    ddp = cost.training_memory(config, Setup(ranks=4, strategy="ddp"))
    fsdp = cost.training_memory(config, Setup(ranks=4, strategy="fsdp"))
    assert (ddp.weights, ddp.gradients, ddp.optimizer, ddp.exchange) == (whole, whole, 2 * whole, whole)
    assert (fsdp.weights, fsdp.gradients, fsdp.optimizer) == (whole // 4, whole // 4, whole // 2)
    assert fsdp.exchange == whole - (12 - 4) * 4 * cost.block_parameters(config)
    assert cost.training_memory(config, Setup(ranks=4, strategy="fsdp", accumulates=True)).gradients == whole


def test_more_of_anything_takes_more() -> None:
    config = preset("gpt2", dropout=0.0)
    base = Setup(batch_size=2, precision="bf16")
    peak = cost.training_memory(config, base).peak
    assert cost.training_memory(config, dataclasses.replace(base, batch_size=4)).peak > peak
    assert cost.training_memory(config, dataclasses.replace(base, accumulates=True)).peak > peak
    assert cost.training_memory(config, dataclasses.replace(base, precision="fp32")).peak > peak
    assert cost.training_memory(config, dataclasses.replace(base, kernel="plain")).peak > peak
    assert cost.training_memory(config, dataclasses.replace(base, checkpoint=True)).peak < peak
    muon = cost.training_memory(config, dataclasses.replace(base, optimizer="muon"))
    assert muon.optimizer == 8 * cost.parameters(config) - 4 * 12 * cost.muon_entries(config)


class Made(TorchDispatchMode):
    """The shapes of all that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(x.shape) for x in (out if isinstance(out, tuple | list) else (out,)) if isinstance(x, Tensor)}
        return out


@pytest.mark.parametrize("name", ["gpt2", "modern", "mixture, shared"])
def test_state_is_that_of_the_adapters_alone(name: str) -> None:
    """A real step: gradients, state and weights as they lie in memory; and no tensor as large as the embedding is ever made."""
    config, r = shape(name, vocab_size=700), 4
    model = GPT(config)
    ids, targets = torch.randint(config.vocab_size, (2, 2, 40))
    with Made() as before:
        Scored(model)(ids, targets).backward()
    assert (config.vocab_size, config.width) in before.shapes  # where everything is trained
    model.zero_grad()
    lora.add(model, LoraConfig(rank=r), seed=0)
    steppers = optim.build(model, OptimConfig())
    with Made() as made:
        Scored(model)(ids, targets).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    for stepper in steppers:
        stepper.step()
    state = sum(t.nbytes for t in optim.state(model, steppers).values() if t.ndim)
    memory = cost.training_memory(config, Setup(2, 40, precision="fp32", lora_rank=r))
    assert memory.weights == sum(p.nbytes for p in model.parameters())
    assert (memory.gradients, memory.optimizer) == (sum(g.nbytes for g in gradients), state)
    assert (config.vocab_size, config.width) not in made.shapes
    whole = cost.training_memory(config, Setup(2, 40, precision="fp32"))
    assert memory.optimizer < whole.optimizer / 2 and memory.gradients < whole.gradients / 2  # counted for frozen weights


def test_adapters_lie_whole_on_every_rank() -> None:
    config = PRESETS["gpt2"]
    one = cost.training_memory(config, Setup(lora_rank=8))
    for strategy in ("ddp", "fsdp"):
        assert cost.training_memory(config, Setup(lora_rank=8, ranks=4, strategy=strategy)) == one  # type: ignore[arg-type]


def test_more_of_an_adapter_takes_more() -> None:
    config = preset("gpt2", dropout=0.0)
    base = Setup(batch_size=2, precision="fp32", lora_rank=8)
    found = cost.training_memory(config, base)
    assert found.peak < cost.training_memory(config, dataclasses.replace(base, lora_rank=0)).peak
    assert cost.training_memory(config, dataclasses.replace(base, lora_rank=16)).peak > found.peak
    assert cost.training_memory(config, dataclasses.replace(base, checkpoint=True)).peak < found.peak
    several = cost.training_memory(config, dataclasses.replace(base, accumulates=True))
    assert several.peak == found.peak + found.gradients
