"""Parameter groups, the schedule, one AdamW step written out, and state that goes round."""

from __future__ import annotations

import math

import pytest
import safetensors.torch
import torch

from glassgpt.config import OptimConfig, preset
from glassgpt.model import GPT
from glassgpt.train import optim
from glassgpt.train.loss import token_loss
from glassgpt.train.muon import Muon

SHAPE = preset("tiny", vocab_size=300)
BOTH = pytest.mark.parametrize("name", ["adamw", "muon"])


def a_model(tied: bool = True, dtype: torch.dtype = torch.float32) -> GPT:
    torch.manual_seed(0)
    return GPT(preset("tiny", vocab_size=300, tied_head=tied)).to(dtype)


def set_gradients(model: GPT, step: int) -> None:
    ids = torch.randint(300, (4, 17), generator=torch.Generator().manual_seed(step))
    model.zero_grad(set_to_none=True)
    loss = token_loss(model(ids[:, :-1]), ids[:, 1:])
    (loss.sum / loss.count).backward()


# ---------------------------------------------------------------------- groups


@BOTH
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_one_group(name: str, tied: bool) -> None:
    model = a_model(tied)
    optimizers = optim.build(model, OptimConfig(optimizer=name, weight_decay=0.3))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(parameter) for parameter in model.parameters()}
    assert held.count(id(model.head.weight)) == 1
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    for parameter_name, parameter in model.named_parameters():
        undecayed = parameter_name.endswith(".bias") or ".norm" in f".{parameter_name}"
        assert decay[id(parameter)] == (0.0 if undecayed else 0.3), parameter_name


def test_muon_has_exactly_the_block_matrices() -> None:
    model = a_model(tied=False)
    adamw, muon = optim.build(model, OptimConfig(optimizer="muon"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = {names[id(parameter)] for group in muon.param_groups for parameter in group["params"]}
    matrices = ("attn.qkv", "attn.out", "mlp.up", "mlp.down")
    assert held == {f"blocks.{layer}.{matrix}.weight" for layer in range(SHAPE.n_layer) for matrix in matrices}
    assert (type(adamw), type(muon)) == (torch.optim.AdamW, Muon)


# ---------------------------------------------------------------------- schedule


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_schedule_in_closed_form(schedule: str) -> None:
    config = OptimConfig(learning_rate=0.02, schedule=schedule, final_share=0.1, warmup_steps=10)
    rates = [optim.learning_rate(step, 111, config) for step in range(111)]
    assert rates[0] == pytest.approx(0.002, rel=1e-12)
    assert rates[4] == pytest.approx(0.01, rel=1e-12)
    assert rates[9] == rates[10] == pytest.approx(0.02, rel=1e-12)  # end of warm-up
    quarter = 0.5 * (1 + math.sqrt(0.5)) if schedule == "cosine" else 0.75
    assert rates[35] == pytest.approx(0.02 * (0.1 + 0.9 * quarter), rel=1e-12)  # step 10 + 100 / 4
    assert rates[60] == pytest.approx(0.02 * 0.55, rel=1e-12)
    assert rates[110] == pytest.approx(0.002, rel=1e-12)  # the last step
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_schedule_at_its_edges() -> None:
    none = OptimConfig(learning_rate=0.5, warmup_steps=0, final_share=0.0)
    assert optim.learning_rate(0, 10, none) == 0.5
    assert optim.learning_rate(9, 10, none) == pytest.approx(0.0, abs=1e-15)
    assert optim.learning_rate(0, 1, none) == 0.5
    longer = OptimConfig(learning_rate=0.5, warmup_steps=100)
    assert optim.learning_rate(9, 10, longer) == pytest.approx(0.05, rel=1e-12)


@BOTH
def test_set_rate_reaches_every_group(name: str) -> None:
    optimizers = optim.build(a_model(), OptimConfig(optimizer=name))
    optim.set_rate(optimizers, 0.123)
    assert {group["lr"] for optimizer in optimizers for group in optimizer.param_groups} == {0.123}


# ---------------------------------------------------------------------- steps


@pytest.mark.parametrize(("parameter_name", "decay"), [("blocks.0.attn.qkv.weight", 0.1), ("blocks.1.norm_2.bias", 0.0)])
def test_adamw_steps_written_out(parameter_name: str, decay: float) -> None:
    """Loshchilov & Hutter 2019, algorithm 2, in float64."""
    config = OptimConfig(weight_decay=0.1, beta1=0.8, beta2=0.9)
    model = a_model(dtype=torch.float64)
    parameter = dict(model.named_parameters())[parameter_name]
    (adamw,) = optim.build(model, config)
    expected, m, v = parameter.detach().clone(), torch.zeros_like(parameter), torch.zeros_like(parameter)
    for t, rate in enumerate((0.01, 0.03, 0.002), 1):
        set_gradients(model, t)
        assert parameter.grad is not None
        g = parameter.grad.clone()
        optim.set_rate([adamw], rate)
        adamw.step()
        m = 0.8 * m + 0.2 * g
        v = 0.9 * v + 0.1 * g * g
        direction = (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-8)
        expected = expected * (1 - rate * decay) - rate * direction
        assert torch.allclose(parameter.detach(), expected, rtol=0, atol=1e-12)


def test_muon_steps_are_orthogonal_and_as_large_as_adamws() -> None:
    """Liu et al. 2025, eq. 4: an orthogonalised step scaled by 0.2 √max(A, B) has AdamW's usual RMS of about 0.2."""
    model = a_model()
    weight = model.blocks[0].mlp.up.weight
    before = weight.detach().clone()
    optimizers = optim.build(model, OptimConfig(optimizer="muon", weight_decay=0.0))
    optim.set_rate(optimizers, 1.0)
    weight.grad = torch.randn(weight.shape) * 1e-3
    optimizers[1].step()
    step = before - weight.detach()
    values = torch.linalg.svdvals(step) / (0.2 * math.sqrt(max(step.shape)))
    assert values.max() < 1.3 and values.min() > 0.5  # Newton-Schulz brings singular values near 1, not to 1
    assert 0.1 < step.square().mean().sqrt() < 0.3


@BOTH
def test_state_goes_round_and_continues_identically(name: str) -> None:
    config = OptimConfig(optimizer=name, learning_rate=0.01)
    model = a_model()
    optimizers = optim.build(model, config)

    def step(model: GPT, optimizers: list[torch.optim.Optimizer], number: int) -> None:
        set_gradients(model, number)
        for optimizer in optimizers:
            optimizer.step()

    for number in range(3):
        step(model, optimizers, number)
    state = optim.state(model, optimizers)
    assert {key.rsplit(":", 1)[0] for key in state} == dict(model.named_parameters()).keys()
    stored = safetensors.torch.save(state)

    other = a_model()
    other.load_state_dict(model.state_dict())
    restored, forgetful = optim.build(other, config), optim.build(a_model(), config)
    optim.set_state(other, restored, safetensors.torch.load(stored))
    for number in range(3, 6):
        step(model, optimizers, number)
        step(other, restored, number)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))

    start = safetensors.torch.load(stored)  # and without its state an optimiser goes elsewhere
    third = a_model()
    third.load_state_dict(other.state_dict())
    assert start and not any(optimizer.state for optimizer in forgetful)
    fresh = optim.build(third, config)
    step(third, fresh, 6)
    step(model, optimizers, 6)
    assert not torch.equal(third.blocks[0].mlp.up.weight, model.blocks[0].mlp.up.weight)


# ---------------------------------------------------------------------- clipping


def test_clipping_in_closed_form() -> None:
    model = a_model(dtype=torch.float64)
    set_gradients(model, 0)
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))

    def now() -> list[torch.Tensor]:
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    for limit in (0.0, norm * 1.01):  # off, and not reached
        assert optim.clip(model, limit) == pytest.approx(norm, rel=1e-12)
        assert all(torch.equal(a, b) for a, b in zip(now(), gradients, strict=True))
    assert optim.clip(model, norm / 4) == pytest.approx(norm, rel=1e-12)
    for clipped, gradient in zip(now(), gradients, strict=True):
        assert torch.allclose(clipped, gradient / 4, rtol=1e-5, atol=1e-15)  # torch adds 1e-6 to the norm
