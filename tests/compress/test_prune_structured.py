"""Heads and channels that are taken out: the smaller model is the zeroed large one, and importance is a derivative."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact import errors, noisy, shape, tokens
from torch import Tensor

from glassgpt.compress import structured
from glassgpt.config import ModelConfig, UserError
from glassgpt.config.generate import Sampling
from glassgpt.config.model import MoeConfig
from glassgpt.generation import stream
from glassgpt.interpret.hooks import edit
from glassgpt.model import GPT, weights

EXACT = 1e-12
MIXTURE = MoeConfig(3, 2, shared=1, expert_width=8)
SLOTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no biases": {"bias": False, "tied_head": False},
    "qkv biases alone": {"bias": False, "qkv_bias": True, "attention_scale": 1.0},
    "swiglu, groups, qk norm": {"position": "rope", "mlp": "swiglu", "norm": "rms", "n_kv_head": 2, "qk_norm": True},
    "wide attention": {"attention_width": 32, "position": "rope", "n_kv_head": 2, "mlp_width": 24},
    "mixture": {"moe": MIXTURE},
    "gated mixture": {"mlp": "swiglu", "moe": MIXTURE, "n_kv_head": 4},
    "windows": {"spans": ("full", "window"), "window_tokens": 5, "logit_cap": 3.0},
}


def chosen(config: ModelConfig, heads: int, mlp_share: float, seed: int = 0) -> dict[str, Tensor]:
    """What stays when importance is random: other heads and channels in every layer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        names = dict(GPT(config).named_modules())
    found = {}
    for name in names:
        if name.endswith(".attn"):
            found[name] = torch.rand(config.kv_heads, generator=generator)
        elif name.endswith(".down"):
            width = config.expert_width if config.moe.experts else config.hidden_width
            found[name.removesuffix(".down")] = torch.rand(width, generator=generator)
    return structured.choose(found, heads, mlp_share, config)


@torch.no_grad()
def zeroed(model: GPT, stays: dict[str, Tensor]) -> GPT:
    """A copy in which nothing reads the heads and channels that do not stay."""
    model, config = copy.deepcopy(model), model.config
    for name, places in stays.items():
        module = model.get_submodule(name)
        if name.endswith(".attn"):
            for head in range(config.n_head):
                if head // (config.n_head // config.kv_heads) not in places.tolist():
                    module.out.weight[:, head * config.head_width : (head + 1) * config.head_width] = 0
        else:
            for channel in range(module.down.in_features):
                if channel not in places.tolist():
                    module.down.weight[:, channel] = 0
    return model


@pytest.mark.parametrize("slots", SLOTS.values(), ids=list(SLOTS))
@pytest.mark.parametrize(("heads", "mlp_share"), [(2, 0.0), (0, 0.3), (2, 0.5)])
def test_what_is_gone_is_what_was_zero(slots: dict[str, Any], heads: int, mlp_share: float, tmp_path: Path) -> None:
    model = noisy(shape(**slots))
    config, ids = model.config, tokens(model.config)
    stays = chosen(config, heads, mlp_share)
    small, zero = structured.smaller(model, stays), zeroed(model, stays)
    with torch.no_grad():
        expected = zero(ids)
        assert errors([small(ids)], [expected]) <= EXACT
        assert errors([model(ids)], [expected]) > 1e-2
    assert small.config.n_head == config.n_head - heads and small.config.head_width == config.head_width
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert not small.training and small.config.tied_head == (small.head.weight is small.token_embedding.weight)
    weights.save(small, tmp_path)
    with torch.no_grad():
        assert errors([weights.load(tmp_path)(ids)], [small(ids)]) <= EXACT  # a mixture adds up in another order
    drawn = [
        [token.id for token in stream(one, [ids[0, :7].tolist()], Sampling(temperature=0), [torch.Generator()], 12)]
        for one in (small, zero)
    ]
    assert drawn[0] == drawn[1]  # with a cache of fewer heads


@pytest.mark.parametrize("mutant", ["keys", "values", "columns", "order", "channels"])
def test_parity_sees_what_is_taken_wrongly(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = noisy(shape(**SLOTS["swiglu, groups, qk norm"]))
    config, ids = model.config, tokens(model.config)
    stays = chosen(config, 2, 0.3)
    expected = zeroed(model, stays)
    rows_of = structured._head_places
    W = config.head_width

    def wrong(groups: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
        rows, columns = rows_of(groups, config)
        if mutant == "keys":
            rows[2 * W : 3 * W] = (rows[2 * W : 3 * W] - config.n_head * W + W) % (2 * W) + config.n_head * W
        if mutant == "values":
            rows[3 * W :] = rows[2 * W : 3 * W]
        if mutant == "columns":
            columns = (columns + W) % (config.n_head * W)
        if mutant == "order":
            rows[: 2 * W] = rows[: 2 * W].roll(W)
        return rows, columns

    if mutant == "channels":
        stays = {name: places if name.endswith(".attn") else places - places.min() for name, places in stays.items()}
        stays["blocks.0.mlp"] = torch.arange(len(stays["blocks.0.mlp"]))
    monkeypatch.setattr(structured, "_head_places", wrong)
    with torch.no_grad():
        assert errors([structured.smaller(model, stays)(ids)], [expected(ids)]) > 1e-3


@pytest.mark.parametrize("slots", [SLOTS[name] for name in ("plain", "wide attention", "gated mixture")])
def test_importance_is_the_derivative_by_a_gate(slots: dict[str, Any]) -> None:
    """A gate on every head group and channel in turn, moved up and down a little: central differences of each window's loss."""
    model = noisy(shape(**slots, n_layer=1))
    ids = tokens(model.config, batch=2, length=9)
    found = structured.importance(model, ids)
    assert set(found) == {name for name, module in model.named_modules() if name.endswith(".attn") or hasattr(module, "down")}
    share, step = model.config.n_head // model.config.kv_heads, 1e-5

    def gated(name: str, place: int, gate: float) -> list[float]:
        def change(x: Tensor) -> Tensor:
            factor = torch.ones(x.size(1) if name.endswith(".z") else x.size(-1), dtype=x.dtype)
            places = slice(place * share, (place + 1) * share) if name.endswith(".z") else place
            factor[places] = gate
            return x * (factor.view(-1, 1, 1) if name.endswith(".z") else factor)

        with torch.no_grad(), edit(model, {name: change}):
            return [float(F.cross_entropy(model(row[None, :-1])[0], row[1:])) for row in ids]

    for module, values in found.items():
        tap = f"{module}.z" if module.endswith(".attn") else f"{module}.hidden"
        for place in range(0, len(values), 1 if module.endswith(".attn") else 3):
            pairs = zip(gated(tap, place, 1 + step), gated(tap, place, 1 - step), strict=True)
            expected = sum(abs(up - down) / (2 * step) for up, down in pairs) / 2
            assert float(values[place]) == pytest.approx(expected, abs=1e-8), (module, place)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_least_important_go() -> None:
    config = shape(n_kv_head=2, mlp_width=10)
    found = {"blocks.0.attn": torch.tensor([3.0, 1.0]), "blocks.0.mlp": torch.tensor([5.0, 0, 9, 1, 8, 2, 7, 3, 6, 4])}
    stays = structured.choose(found, 2, 0.35, config)  # 3.5 of ten channels, rounded to even: 4
    assert {name: places.tolist() for name, places in stays.items()} == {
        "blocks.0.attn": [0],
        "blocks.0.mlp": [0, 2, 4, 6, 8, 9][:6],
    }
    assert structured.choose(found, 0, 0.0, config) == {}


def test_nothing_taken_changes_no_bit() -> None:
    model = noisy(shape())
    same = structured.smaller(model, {})
    assert same.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("slots", "heads", "mlp_share", "message"),
    [
        ({}, 4, 0.0, "has 4 heads and one at least must stay; got --heads 4"),
        ({}, 9, 0.0, "one at least must stay"),
        (
            {"n_kv_head": 2},
            1,
            0.0,
            "2 query heads share .* and leave together; --heads must be a multiple of 2",
        ),
        ({"n_kv_head": 1}, 2, 0.0, "4 query heads share"),
        ({"position": "alibi"}, 1, 0.0, "position alibi is bound to the number of a head"),
        ({"position": "relative"}, 1, 0.0, "position relative is bound"),
        ({"position": "per_head"}, 1, 0.0, "position per_head is bound"),
        ({"mlp_width": 3}, 0, 0.9, "mlp_share 0.9 leaves none of the 3 channels of blocks.0.mlp"),
    ],
)
def test_what_cannot_be_taken_is_refused(slots: dict[str, Any], heads: int, mlp_share: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        chosen(shape(**slots), heads, mlp_share)


@pytest.mark.parametrize("position", structured.BOUND)
def test_channels_leave_where_heads_cannot(position: Any) -> None:
    model = noisy(shape(position=position))
    stays, ids = chosen(model.config, 0, 0.5), tokens(model.config)
    with torch.no_grad():
        assert errors([structured.smaller(model, stays)(ids)], [zeroed(model, stays)(ids)]) <= EXACT
