"""Direct logit attribution sums to the logit in every architecture, and each way of getting it wrong does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact import add_noise, noisy, shape, tokens
from torch import Tensor

from glassgpt.config import UserError
from glassgpt.config.model import MoeConfig
from glassgpt.config.tuning import LoraConfig
from glassgpt.interpret import capture, edit
from glassgpt.interpret.attribution import (
    Attribution,
    attribute,
    frozen_norm,
    head_attribution,
    residual_norms,
    residual_shares,
    unembedding,
)
from glassgpt.model import GPT, lora

MODERN: dict[str, Any] = {"position": "rope", "n_kv_head": 2, "norm": "rms", "mlp": "swiglu", "bias": False, "qk_norm": True}
SLOTS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "untied": {"tied_head": False},
    "no biases": {"bias": False},
    "modern": MODERN,
    "rms with biases": {"norm": "rms"},
    "alibi": {"position": "alibi"},
    "sinusoidal": {"position": "sinusoidal"},
    "relative": {"position": "relative"},
    "embedding norm": {"position": "alibi", "embedding_norm": True},
    "norm of learned positions": {"embedding_norm": True},
    "wide heads": {"attention_width": 32, "n_kv_head": 1},
    "windows": {"spans": ("full", "window"), "window_tokens": 4},
    "capped": {"logit_cap": 3.0},
    "experts": {"moe": MoeConfig(experts=4, top_k=2, shared=1)},
    "experts not normalised": {**MODERN, "moe": MoeConfig(experts=4, top_k=2, normalise=False)},
}


def model_of(slot: str, dtype: torch.dtype = torch.float64) -> GPT:
    return noisy(shape(**SLOTS[slot]), dtype).requires_grad_(False)


def text(length: int = 10) -> Tensor:
    return tokens(shape(), batch=1, length=length)[0]


def values(attribution: Attribution, *kinds: str) -> list[float]:
    return [part.value for part in attribution.parts if part.kind in kinds]


@pytest.mark.parametrize("neurons", [False, True])
@pytest.mark.parametrize("slot", SLOTS)
def test_the_parts_sum_to_the_logit(slot: str, neurons: bool) -> None:
    model, ids = model_of(slot), text()
    if neurons and model.config.moe.experts:
        with pytest.raises(UserError, match="leave it out to see the experts"):
            attribute(model, ids, 3, neurons=True)
        return
    with capture(model, "head") as seen:
        model(ids.unsqueeze(0))
    logits = seen["head"][0].detach()
    for token, position, against in ((3, -1, None), (5, 4, None), (7, 0, 2)):
        found = attribute(model, ids, token, position, against, neurons)
        expected = float(logits[position, token] - (logits[position, against] if against is not None else 0))
        assert found.logit == pytest.approx(expected, abs=1e-12)
        assert found.total == pytest.approx(found.logit, abs=1e-12)
        assert found.total == sum(part.value for part in found.parts)


@pytest.mark.parametrize("slot", ["gpt2", "modern", "experts"])
def test_in_float32_they_sum_to_the_logit_up_to_rounding(slot: str) -> None:
    found = attribute(model_of(slot, torch.float32), text(), 3)
    size = sum(abs(part.value) for part in found.parts)
    assert found.total != found.logit  # the check can fail
    assert abs(found.total - found.logit) < 1e-6 * size


def test_half_precision_is_read_in_float32() -> None:
    found = attribute(model_of("gpt2", torch.bfloat16), text(), 3)
    assert found.total == pytest.approx(found.logit, abs=0.02 * sum(abs(part.value) for part in found.parts))


def test_there_is_a_part_for_everything_that_writes() -> None:
    def kinds(slot: str, neurons: bool = False) -> dict[str, int]:
        found = [part.kind for part in attribute(model_of(slot), text(), 3, neurons=neurons).parts]
        return {kind: found.count(kind) for kind in found}

    biases = {"attn_bias": 3, "mlp_bias": 3, "norm_bias": 1}
    assert kinds("gpt2") == {"token": 1, "position": 1, "head": 12, "mlp": 3, **biases}
    assert kinds("gpt2", neurons=True) == {"token": 1, "position": 1, "head": 12, "neuron": 3 * 64, **biases}
    assert kinds("modern") == {"token": 1, "head": 12, "mlp": 3}
    assert kinds("sinusoidal") == kinds("gpt2")
    assert kinds("norm of learned positions") == {"embedding": 1, "head": 12, "mlp": 3, **biases}
    assert kinds("experts") == {
        "token": 1, "position": 1, "head": 12, "expert": 6, "shared_expert": 3, "attn_bias": 3, "norm_bias": 1,
    }  # fmt: skip


def test_a_part_is_what_ablating_it_takes_away_in_the_last_layer() -> None:
    """With nothing behind it but the norm, whose scale is held where it was."""
    model, ids = model_of("gpt2"), text()

    def without(name: str, index: int) -> float:
        """The logit, at the plain run's scale, with one head or neuron of the last layer silent."""
        with capture(model, "blocks.2") as plain:
            model(ids.unsqueeze(0))
        reader, constant = frozen_norm(model.norm_f, plain["blocks.2"][0, -1], unembedding(model, 3))
        assert constant is not None

        def silent(x: Tensor) -> Tensor:
            x = x.clone()
            (x[:, index] if name.endswith("z") else x[..., index])[...] = 0
            return x

        with edit(model, {name: silent}), capture(model, "blocks.2") as seen:
            model(ids.unsqueeze(0))
        return float(seen["blocks.2"][0, -1] @ reader + constant)

    parts = {(part.kind, part.index): part.value for part in attribute(model, ids, 3, neurons=True).parts if part.layer == 2}
    logit = attribute(model, ids, 3).logit
    assert logit - without("blocks.2.mlp.hidden", 7) == pytest.approx(parts["neuron", 7], abs=1e-12)
    with edit(model, {"blocks.2.mlp": torch.zeros_like}):  # which would answer to a silent head
        alone = {part.index: part.value for part in attribute(model, ids, 3).parts if part.kind == "head" and part.layer == 2}
        with capture(model, "head") as seen:
            model(ids.unsqueeze(0))
        assert float(seen["head"][0, -1, 3]) - without("blocks.2.attn.z", 1) == pytest.approx(alone[1], abs=1e-12)


def test_heads_as_a_picture() -> None:
    model, ids = model_of("modern"), text()
    picture = head_attribution(model, ids, 3, position=5, against=4)
    parts = [part for part in attribute(model, ids, 3, 5, 4).parts if part.kind == "head"]
    assert picture.shape == (3, 4)
    assert all(float(picture[part.layer, part.index]) == pytest.approx(part.value, rel=1e-6) for part in parts)


def test_an_adapter_counts_when_it_is_on() -> None:
    model, ids = model_of("gpt2"), text()
    plain = attribute(model, ids, 3)
    lora.add(model, LoraConfig(rank=2, targets=("out", "down")), seed=0)
    model.double()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            add_noise(torch.nn.ParameterList([parameter]))
    tuned = attribute(model, ids, 3)
    assert tuned.total == pytest.approx(tuned.logit, abs=1e-12)
    assert abs(tuned.total - plain.total) > 0.1
    with lora.disabled(model):
        assert attribute(model, ids, 3).total == pytest.approx(plain.total, abs=1e-12)


# ---------------------------------------------------------------------- ways to get it wrong


def test_leaving_a_bias_out_is_noticed() -> None:
    found = attribute(model_of("gpt2"), text(), 3)
    for kind in ("norm_bias", "attn_bias", "mlp_bias", "position"):
        assert abs(found.logit - (found.total - sum(values(found, kind)))) > 0.05, kind


def test_a_scale_of_its_own_for_each_part_is_noticed() -> None:
    """What recomputing the final norm for each part would give."""
    model, ids = model_of("gpt2"), text()
    with capture(model, ["embed", "blocks.*.attn", "blocks.*.mlp", "head"]) as seen:
        model(ids.unsqueeze(0))
    logit = float(seen.pop("head")[0, -1, 3])
    reader = unembedding(model, 3)
    wrong = sum(float((model.norm_f(x[0, -1]) - model.norm_f.bias) @ reader) for x in seen.values())
    assert abs(wrong + float(model.norm_f.bias @ reader) - logit) > 0.1


def test_forgetting_that_layer_norm_takes_the_mean_away_is_noticed() -> None:
    model, ids = model_of("gpt2"), text()
    with capture(model, ["blocks.2", "head"]) as seen:
        model(ids.unsqueeze(0))
    x, reader = seen["blocks.2"][0, -1], unembedding(model, 3)
    direction, constant = frozen_norm(model.norm_f, x, reader)
    assert constant is not None
    assert float(x @ direction + constant) == pytest.approx(float(seen["head"][0, -1, 3]), abs=1e-12)
    off_centre = reader * model.norm_f.weight * (x.var(correction=0) + 1e-5).rsqrt()
    assert abs(float(x @ off_centre + constant - seen["head"][0, -1, 3])) > 0.1


# ---------------------------------------------------------------------- the residual stream


@pytest.mark.parametrize("slot", ["gpt2", "modern", "experts"])
def test_norms_and_shares_of_the_residual_stream(slot: str) -> None:
    model, ids = model_of(slot), text()
    norms, shares = residual_norms(model, ids), residual_shares(model, ids)
    with capture(model, ["embed", "blocks.*", "blocks.*.attn", "blocks.*.mlp"]) as seen:
        model(ids.unsqueeze(0))
    last = seen["blocks.2"][0]
    assert norms.shape == shares.shape == (7, 10)
    assert torch.allclose(norms[0], seen["embed"][0].norm(dim=-1), atol=1e-12, rtol=0)
    assert torch.allclose(norms[-1], last.norm(dim=-1), atol=1e-12, rtol=0)
    assert torch.allclose(shares.sum(dim=0), torch.ones(10).double(), atol=1e-12, rtol=0)
    for row, name in ((3, "blocks.1.attn"), (6, "blocks.2.mlp")):
        expected = (seen[name][0] * last).sum(dim=-1) / last.square().sum(dim=-1)
        assert torch.allclose(shares[row], expected, atol=1e-12, rtol=0)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token": 31}, "between 0 and 30; got 31"),
        ({"token": 3, "against": -1}, "between 0 and 30; got -1"),
        ({"token": 3, "position": 10}, "position 10 is not in a text of 10 tokens; give 0 to 9"),
        ({"token": 3, "ids": torch.tensor([[1, 2]])}, r"expected the token ids of one text, shape \(T,\); got \(1, 2\)"),
        ({"token": 3, "ids": torch.tensor([1, 31])}, "must be between 0 and 30; got 1 to 31"),
        ({"token": 3, "ids": torch.arange(25)}, "context is 24 tokens; got 25"),
    ],
)
def test_what_cannot_be_attributed_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        attribute(model_of("gpt2"), **{"ids": text(), **changes})


def test_dropout_is_refused() -> None:
    model = noisy(shape(dropout=0.1)).train()
    with pytest.raises(UserError, match=r"call model\.eval"):
        attribute(model, text(), 3)
