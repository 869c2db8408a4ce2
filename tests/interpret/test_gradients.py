"""Attributions to input tokens: against a closed form, against autograd, and their sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact import error, noisy, shape, tokens
from torch import Tensor, nn

from glassgpt.config import UserError
from glassgpt.config.model import MoeConfig
from glassgpt.interpret.gradients import gradient_times_input, input_gradients, integrated_gradients
from glassgpt.model import GPT

SLOTS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "modern": {"position": "rope", "n_kv_head": 2, "norm": "rms", "mlp": "swiglu", "bias": False, "qk_norm": True},
    "capped": {"logit_cap": 3.0, "tied_head": False},
    "embedding norm": {"position": "alibi", "embedding_norm": True},
    "windows": {"spans": ("full", "window"), "window_tokens": 4},
}
T = 8


def text() -> Tensor:
    return tokens(shape(), batch=1, length=T)[0]


@torch.no_grad()
def linear_model() -> GPT:
    """Norms that do nothing, heads that look everywhere alike, no MLP: the logit is linear in the embeddings."""
    model = noisy(shape(n_layer=1))
    block = model.blocks[0]
    block.norm_1 = model.norm_f = nn.Identity()
    block.attn.qkv.weight[:32] = 0  # queries and keys
    block.attn.qkv.bias[:32] = 0
    block.mlp.down.weight.zero_()
    return model.requires_grad_(False)


def test_a_linear_model_has_a_closed_form() -> None:
    """Position 5 reads its own embedding, and through values and output a sixth of each embedding up to it."""
    model, ids = linear_model(), text()
    table, head = model.token_embedding.weight, model.head.weight[3] - model.head.weight[4]
    attention = model.blocks[0].attn
    through = attention.qkv.weight[32:].T @ attention.out.weight.T  # (D, D)
    expected = torch.zeros(T, dtype=torch.float64)
    gradient = torch.zeros(T, 16, dtype=torch.float64)
    gradient[:6] = through @ head / 6
    gradient[5] += head
    expected = (table[ids] * gradient).sum(dim=-1)
    assert error(input_gradients(model, ids, 3, 5, 4), gradient) < 1e-12
    assert error(gradient_times_input(model, ids, 3, 5, 4), expected) < 1e-12
    zero = integrated_gradients(model, ids, 3, 5, 4, baseline="zero", steps=1)
    assert error(zero.values, expected) < 1e-12
    assert zero.gap == pytest.approx(0, abs=1e-12)
    mean = integrated_gradients(model, ids, 3, 5, 4, steps=1)
    assert error(mean.values, ((table[ids] - table.mean(dim=0)) * gradient).sum(dim=-1)) < 1e-12
    assert expected.abs().min() == 0  # later tokens
    assert expected[:6].abs().min() > 1e-3


@pytest.mark.parametrize("slot", SLOTS)
def test_gradients_are_those_of_autograd(slot: str) -> None:
    """By the embedding matrix's own gradient: a row that is used once holds its token's."""
    model = noisy(shape(**SLOTS[slot] | {"tied_head": False}))
    ids = torch.arange(3, 3 + T)
    found = input_gradients(model, ids, 7, position=5, against=2)
    assert all(parameter.grad is None for parameter in model.parameters())  # nothing is left behind
    hidden = model.hidden(ids.unsqueeze(0))[0, 5]
    model.head(hidden)[7].sub(model.head(hidden)[2]).backward()
    assert error(found, model.token_embedding.weight.grad[3 : 3 + T]) < 1e-12
    assert found[6:].abs().max() == 0  # causal
    values = gradient_times_input(model, ids, 7, position=5, against=2)
    assert error(values, (found * model.token_embedding.weight.detach()[3 : 3 + T]).sum(dim=-1)) < 1e-12


@pytest.mark.parametrize("baseline", ["mean", "zero"])
@pytest.mark.parametrize("slot", SLOTS)
def test_integrated_gradients_are_complete(slot: str, baseline: Any) -> None:
    model, ids = noisy(shape(**SLOTS[slot])), text()
    calls: list[tuple[int, int]] = []
    found = integrated_gradients(
        model, ids, 3, baseline=baseline, steps=256, batch=100, progress=lambda done, total: calls.append((done, total))
    )
    size = float(found.values.abs().sum())
    steep = baseline == "zero" and slot in ("modern", "embedding norm")  # a norm sees the embedding alone, which grows from zero
    assert abs(found.gap) < (0.05 if steep else 1e-10) * size
    assert float(found.values.sum()) == pytest.approx(found.output - found.baseline_output + found.gap, abs=1e-10)
    logits = model.head(model.hidden(ids.unsqueeze(0)))[0, -1].detach()
    assert found.output == pytest.approx(float(logits[3]), abs=1e-12)
    assert calls == [(100, 256), (200, 256), (256, 256)]


def test_few_steps_and_gradient_times_input_are_not_complete() -> None:
    """So that the check above can fail; and the gap falls with the steps."""
    model, ids = noisy(shape()), text()
    found = [integrated_gradients(model, ids, 3, baseline="zero", steps=steps) for steps in (1, 8, 64)]
    gaps = [abs(one.gap) for one in found]
    assert gaps[0] > 0.05
    assert gaps[0] > gaps[1] > gaps[2]
    simple = float(gradient_times_input(model, ids, 3).sum())
    assert abs(simple - (found[0].output - found[0].baseline_output)) > 0.05


def test_batches_change_nothing_and_inference_mode_is_fine() -> None:
    model, ids = noisy(shape(moe=MoeConfig(experts=4))), text()
    one = integrated_gradients(model, ids, 3, steps=8, batch=1)
    with torch.inference_mode():
        all_at_once = integrated_gradients(model, ids, 3, steps=8, batch=8)
    assert error(one.values, all_at_once.values) < 1e-12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token": 31}, "between 0 and 30; got 31"),
        ({"position": -9}, "position -9 is not in a text of 8 tokens"),
        ({"steps": 0}, "steps and batch must be at least 1; got 0 and 16"),
        ({"baseline": "blank"}, "baseline must be mean or zero; got 'blank'"),
    ],
)
def test_what_cannot_be_attributed_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        integrated_gradients(noisy(shape()), text(), **{"token": 3, **changes})
