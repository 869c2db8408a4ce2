"""GPTQ against the closed form that its algorithm stands for, against every possible choice of codes, and through a network."""

from __future__ import annotations

import itertools
from typing import Any

import exact
import pytest
import torch
from torch import Tensor

from glassgpt.compress import gptq as module
from glassgpt.compress.gptq import gptq, quantise_by_layers, read_by
from glassgpt.config import ModelConfig
from glassgpt.config.model import MoeConfig
from glassgpt.config.quantize import Recipe
from glassgpt.model import GPT
from glassgpt.model.quantised import HIGHEST, LOWEST, ZERO, Codes, put, quantised_modules, round_to_nearest, targets


def problem(N: int, K: int, tokens: int = 200, seed: int = 3) -> tuple[Tensor, Tensor]:
    """A matrix (N, K) whose numbers float32 holds, and XᵀX of inputs that go together."""
    mixed = exact.random(tokens, K, seed=seed) @ (torch.eye(K, dtype=torch.float64) + 0.5 * exact.random(K, K, seed=seed + 1))
    return exact.random(N, K).float().double(), mixed.T @ mixed


def output_error(weight: Tensor, codes: Codes, hessian: Tensor) -> Tensor:
    """Of each row, (N,)."""
    E = weight - codes.dequantised().double()
    return ((E @ hessian) * E).sum(dim=1)


def step_by_step(weight: Tensor, hessian: Tensor, bits: int, group: int | None) -> Tensor:
    """Codes by the definition: after each column the others are the least-squares best for the ones already rounded."""
    N, K = weight.shape
    scales = round_to_nearest(weight, bits, group, hessian.diagonal()).scales.double().repeat_interleave(group or K, dim=1)
    order = hessian.diagonal().argsort(descending=True, stable=True).tolist()
    steps = torch.zeros(N, K, dtype=torch.float64)
    for place, k in enumerate(order):
        past, left = order[:place], order[place:]
        moved = weight.clone()
        if past:
            error = weight[:, past] - steps[:, past] * scales[:, past]
            moved[:, left] += error @ hessian[past][:, left] @ torch.linalg.inv(hessian[left][:, left])
        steps[:, k] = (moved[:, k] / scales[:, k]).round().clamp(LOWEST[bits], HIGHEST[bits])
    return (steps + ZERO[bits]).to(torch.uint8)


@pytest.mark.parametrize(("bits", "group"), [(4, None), (4, 4), (8, 4), (8, None)])
@pytest.mark.parametrize("block", [1, 5, 128])
def test_codes_are_those_of_the_definition(bits: int, group: int | None, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "ROWS", 7)
    weight, hessian = problem(16, 12)
    found = gptq(weight, hessian, bits, group, damping=0.0)
    assert torch.equal(found.codes, step_by_step(weight, hessian, bits, group))
    assert not torch.equal(found.codes, round_to_nearest(weight, bits, group, hessian.diagonal()).codes)


def test_the_definition_sees_a_wrong_correction(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(16, 12)
    right = gptq(weight, hessian, 4, 4, damping=0.0).codes
    for wrong in (lambda H: torch.eye(12, dtype=torch.float64), lambda H: torch.linalg.cholesky(H, upper=True)):
        monkeypatch.setattr(module, "_inverse_factor", lambda H, damping, wrong=wrong: wrong(H))
        assert not torch.equal(gptq(weight, hessian, 4, 4).codes, right)
    monkeypatch.undo()
    assert not torch.equal(gptq(weight, hessian, 4, 4, damping=1.0).codes, right)


def test_two_columns_against_every_choice() -> None:
    """The last column is the best there is for the first; nothing beats the best of all 256 pairs, and it is mostly found."""
    weight, hessian = problem(50, 2)
    found = gptq(weight, hessian, 4, None, damping=0.0)
    errors = output_error(weight, found, hessian)
    every = torch.tensor(list(itertools.product(range(16), repeat=2)), dtype=torch.uint8)  # (256, 2)
    first, last = hessian.diagonal().argsort(descending=True).tolist()
    best_found = 0
    for n in range(50):
        row = Codes(every, found.scales[n].expand(256, 1), 4, None)
        all_errors = output_error(weight[n].expand(256, 2), row, hessian)
        same_first = every[:, first] == found.codes[n, first]
        assert abs(float(errors[n] - all_errors[same_first].min())) <= 1e-9
        assert abs(int(every[same_first][all_errors[same_first].argmin()][last]) - int(found.codes[n, last])) == 0
        best_found += float(errors[n] - all_errors.min()) <= 1e-9
    assert 25 <= best_found <= 50


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 8), (4, 8), (4, None)])
def test_outputs_are_nearer_than_by_rounding(bits: int, group: int | None) -> None:
    weight, hessian = problem(64, 32)
    ours = output_error(weight, gptq(weight, hessian, bits, group), hessian)
    for importance in (None, hessian.diagonal()):
        plain = output_error(weight, round_to_nearest(weight, bits, group, importance), hessian)
        assert float(ours.sum()) < 0.7 * float(plain.sum())
    diagonal = torch.diag(hessian.diagonal())  # inputs that have nothing to do with one another leave nothing to make good
    assert torch.equal(gptq(weight, diagonal, bits, group).codes, round_to_nearest(weight, bits, group, hessian.diagonal()).codes)


def test_inputs_that_never_come() -> None:
    weight, hessian = problem(8, 8)
    hessian[3], hessian[:, 3] = 0.0, 0.0
    plain = round_to_nearest(weight, 4, None, hessian.diagonal())
    assert torch.equal(gptq(weight, hessian, 4, None, damping=0.0).codes[:, 3], plain.codes[:, 3])
    nothing = torch.zeros(8, 8, dtype=torch.float64)
    assert torch.equal(gptq(weight, nothing, 4, 4).codes, round_to_nearest(weight, 4, 4).codes)


# ---------------------------------------------------------------------- through a network

SLOTS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied, grouped, rotary, gated": {
        "tied_head": False, "n_kv_head": 2, "position": "rope", "mlp": "swiglu", "mlp_width": 48, "norm": "rms", "bias": False
    },
    "experts": {"moe": MoeConfig(experts=3, top_k=1, expert_width=16)},
}  # fmt: skip


def recipe(model: GPT, bits: int = 4) -> Recipe:
    return Recipe(dict.fromkeys(targets(model), bits), 8, "gptq", 480)


@pytest.mark.parametrize("slot", SLOTS)
def test_each_matrix_reads_what_the_quantised_ones_before_it_give(slot: str) -> None:
    config = exact.shape(**SLOTS[slot])
    ids, original = exact.tokens(config, batch=20), exact.noisy(config)
    done: list[tuple[int, int]] = []
    with torch.no_grad():
        small = quantise_by_layers(exact.noisy(config), ids, recipe(original), lambda *count: done.append(count))
    names = list(targets(original))
    assert done == [(n, len(names)) for n in range(1, len(names) + 1)]
    found = {name: linear.quantised for name, linear in quantised_modules(small)}
    assert set(found) == set(names)
    for place, name in enumerate(names):
        if name == "token_embedding":
            continue
        before = put(exact.noisy(config), {other: found[other] for other in names[:place]}, recipe(original))
        linear = before.get_submodule(name)
        with torch.no_grad(), read_by(linear) as read:
            before.hidden(ids) if name != "head" else before(ids)
        expected = gptq(linear.get_parameter("weight"), read, 4, 8)
        assert float((expected.codes != found[name].codes).double().mean()) <= 0.01, name  # ties of rounding errors may differ
    weight = original.token_embedding.weight.detach()
    hidden = original.hidden(ids).detach().flatten(0, 1)
    by_head = gptq(weight, hidden.T @ hidden, 4, 8) if config.tied_head else round_to_nearest(weight, 4, 8)
    assert float((by_head.codes != found["token_embedding"].codes).double().mean()) <= 0.01


def test_logits_are_nearer_than_by_rounding() -> None:
    config: ModelConfig = exact.shape(n_layer=2, width=32)
    ids, original = exact.tokens(config, batch=40), exact.noisy(config, size=0.1)
    plain = exact.noisy(config, size=0.1)
    codes = {name: round_to_nearest(module.get_parameter("weight"), 4, 8) for name, module in targets(plain).items()}
    with torch.no_grad():
        put(plain, codes, recipe(plain))
        ours = quantise_by_layers(exact.noisy(config, size=0.1), ids, recipe(original))
        by_gptq, by_rounding = ((model(ids) - original(ids)).square().mean() for model in (ours, plain))
    assert float(by_gptq) < 0.8 * float(by_rounding)


def test_inputs_are_added_up() -> None:
    linear, x = torch.nn.Linear(4, 2).double(), exact.random(3, 5, 4)
    with torch.no_grad(), read_by(linear) as read:
        linear(x), linear(x[:1])
    linear(x)
    rows = torch.cat([x.flatten(0, 1), x[0]])
    assert exact.error(read, sum(torch.outer(row, row) for row in rows)) <= 1e-12  # type: ignore[arg-type]
