"""Properties of the network that need no oracle."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from oracle import SMALL, add_noise, random_ids

from glassgpt.config import PRESETS, ModelConfig, UserError, preset
from glassgpt.model import GPT, blocked, fused, plain, use_attention
from glassgpt.model.attention import visible


def disturbed(config: ModelConfig) -> GPT:
    torch.manual_seed(0)
    model = GPT(config).double().eval()
    add_noise(model, 0.3)
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (7, 7), (1, 9), (3, 9), (64, 64)])
@pytest.mark.parametrize("padded", [False, True])
def test_fused_attention_is_the_written_out_one(dtype: torch.dtype, T: int, S: int, padded: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, n, 8, generator=generator, dtype=dtype) for n in (T, S, S))
    pad = torch.tensor([0, 1, min(2, S - 1)]) if padded else None
    seen = visible(T, S, pad, None, q.device)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert torch.allclose(plain(q, k, v, seen, 0.0), fused(q, k, v, seen, 0.0), rtol=0, atol=tolerance)


def test_attention_by_hand() -> None:
    """Two positions, one head of width 1: the second query weighs both values by softmax([q2 k1, q2 k2])."""
    q, k, v = (torch.tensor(values, dtype=torch.float64).view(1, 1, 2, 1) for values in ([1, 2], [3, 4], [5, 7]))
    weight = 1 / (1 + math.exp(2 * 4 - 2 * 3))
    expected = [5.0, weight * 5 + (1 - weight) * 7]
    assert plain(q, k, v, None, 0.0).flatten().tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("attend", [plain, fused, blocked])
@pytest.mark.parametrize("t", [0, 5, SMALL.context_tokens - 1])
def test_no_position_sees_the_future(attend: object, t: int) -> None:
    """Changing token t leaves the logits before it unchanged to the last bit, and changes those from it on."""
    model = disturbed(SMALL)
    use_attention(model, attend)  # type: ignore[arg-type]
    ids = random_ids(SMALL)
    changed = ids.clone()
    changed[:, t] = (changed[:, t] + 1) % SMALL.vocab_size
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before[:, :t], after[:, :t])
    assert bool((before[:, t:] != after[:, t:]).any(-1).all())


def test_initialisation_as_published() -> None:
    """N(0, 0.02), residual projections smaller by 1/sqrt(2L), zero biases, unit norms."""
    config = preset("nano", n_layer=8)
    torch.manual_seed(0)
    for name, parameter in GPT(config).named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight"))))
        elif name.endswith("bias"):
            assert not parameter.any()
        else:
            scale = 0.02 / math.sqrt(2 * 8) if name.endswith(("attn.out.weight", "mlp.down.weight")) else 0.02
            assert float(parameter.detach().std()) == pytest.approx(scale, rel=0.03), name


def test_head_is_the_embedding_when_tied() -> None:
    tied, untied = GPT(SMALL), GPT(dataclasses.replace(SMALL, tied_head=False))
    assert tied.head.weight is tied.token_embedding.weight
    assert untied.head.weight is not untied.token_embedding.weight
    count = [sum(p.numel() for p in model.parameters()) for model in (tied, untied)]
    assert count[1] - count[0] == SMALL.vocab_size * SMALL.width


def test_dropout_acts_in_training_only() -> None:
    model = GPT(dataclasses.replace(SMALL, dropout=0.5)).double()
    ids = random_ids(SMALL)
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_everything_is_made_on_the_device_of_the_input() -> None:
    """A forward pass on the meta device touches no other device: a stray CPU tensor would raise."""
    with torch.device("meta"):
        model = GPT(SMALL)
        ids = torch.zeros(2, 5, dtype=torch.long)
        pad = torch.zeros(2, dtype=torch.long)
    use_attention(model, plain)
    assert model(ids).shape == (2, 5, SMALL.vocab_size)
    assert model(ids, pad=pad).device.type == "meta"


def test_a_compiled_model_gives_the_same_logits() -> None:
    model = disturbed(SMALL)
    ids = random_ids(SMALL)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(ids), model(ids), rtol=0, atol=1e-10)


def test_longer_than_the_context_says_both_numbers() -> None:
    with pytest.raises(UserError, match=r"context is 24 tokens; got 25"):
        GPT(SMALL)(torch.zeros(1, 25, dtype=torch.long))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"n_head": 5}, r"width 32 / n_head 5 leaves 2"),
        ({"n_layer": 0}, r"n_layer must be at least 1; got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\); got 1.0"),
        ({"norm_eps": 0.0}, r"norm_eps must be positive"),
        ({"mlp_width": 0}, r"mlp_width must be at least 1"),
    ],
)
def test_contradictions_fail_at_construction(fields: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        dataclasses.replace(SMALL, **fields)  # type: ignore[arg-type]


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean 'gpt2-medium'"):
        preset("gpt2-meduim")


@pytest.mark.parametrize(
    ("name", "tied", "count"),
    [
        ("gpt2", True, 124_439_808),
        ("gpt2", False, 163_037_184),
        ("gpt2-medium", True, 354_823_168),
        ("gpt2-large", True, 774_030_080),
        ("gpt2-xl", True, 1_557_611_200),
        ("distilgpt2", True, 81_912_576),
    ],
)
def test_published_parameter_counts(name: str, tied: bool, count: int) -> None:
    with torch.device("meta"):
        model = GPT(preset(name, tied_head=tied))
    assert sum(p.numel() for p in model.parameters()) == count


def test_every_preset_builds_without_memory() -> None:
    for name, config in PRESETS.items():
        with torch.device("meta"):
            model = GPT(config)
        assert {p.device.type for p in model.parameters()} == {"meta"}, name
