"""Heads: what each one writes, what it looks at, and that a name is given to what the tokens decide, not to the place alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact import error, noisy, random, shape, tokens
from torch import Tensor

from glassgpt.config import ModelConfig, UserError
from glassgpt.config.model import MoeConfig
from glassgpt.config.tuning import LoraConfig
from glassgpt.generation.cache import KVCache
from glassgpt.interpret import capture, edit
from glassgpt.interpret.heads import (
    HeadScore,
    duplicate_score,
    head_class,
    head_outputs,
    head_scores,
    induction_score,
    longest_probe,
    pattern_distance,
    pattern_entropy,
    previous_score,
    rollout,
    usual_scores,
    value_weighted,
)
from glassgpt.model import GPT, lora
from glassgpt.text import Tokenizer

BAR = 1e-12
T, LAYERS, H = 10, 3, 4
SLOTS: dict[str, dict[str, Any]] = {
    "default": {},
    "grouped, no biases": {"position": "rope", "norm": "rms", "mlp": "swiglu", "bias": False, "n_kv_head": 2, "tied_head": False},
    "one key head, wide": {"position": "alibi", "n_kv_head": 1, "attention_width": 24, "embedding_norm": True, "logit_cap": 3.0},
    "normed, experts": {"position": "none", "qk_norm": True, "qkv_bias": False, "moe": MoeConfig(experts=4)},
    "spans": {"position": "relative", "spans": ("window", "strided", "full"), "window_tokens": 3, "attention_scale": 0.5},
}
every_slot = pytest.mark.parametrize("slot", [*SLOTS, "adapters"])


def model_of(slot: str) -> GPT:
    """A random model with noise on everything; adapters beside the output matrices alone are noisy too."""
    model = noisy(shape(**SLOTS.get(slot, {})))
    if slot == "adapters":
        lora.add(model, LoraConfig(rank=2, targets=("out",)), seed=0)
        for number, parameter in enumerate(lora.adapters(model).values()):
            parameter.data = random(*parameter.shape, seed=number)
    return model


@torch.no_grad()
def seen_of(model: GPT, ids: Tensor) -> dict[str, Tensor]:
    with capture(model, "blocks.*.attn.*") as seen:
        model(ids)
    return {name.removeprefix("blocks."): tensor for name, tensor in seen.items()}


def bias_of(model: GPT, layer: int) -> Tensor | float:
    out = model.blocks[layer].attn.out
    bias = getattr(out, "base", out).bias
    return 0.0 if bias is None else bias.detach()


# ---------------------------------------------------------------------- what heads write


@every_slot
def test_heads_and_the_bias_add_up_to_attention(slot: str) -> None:
    model = model_of(slot)
    seen = seen_of(model, tokens(model.config, length=T))
    for layer in range(LAYERS):
        outputs = head_outputs(model, layer, seen[f"{layer}.attn.z"]).detach()
        assert outputs.shape == (3, T, H, model.config.width)
        assert error(outputs.sum(dim=2) + bias_of(model, layer), seen[f"{layer}.attn.out"]) < BAR
        if model.config.bias:
            assert error(outputs.sum(dim=2), seen[f"{layer}.attn.out"]) > 1e-3  # mutant: the bias left out


@every_slot
def test_a_head_that_is_zeroed_takes_its_output_away(slot: str) -> None:
    model, layer = model_of(slot), 1
    ids = tokens(model.config, length=T)
    before = seen_of(model, ids)
    outputs = head_outputs(model, layer, before["1.attn.z"]).detach()
    for head in range(H):
        with edit(model, {f"blocks.{layer}.attn.z": without(head)}):
            after = seen_of(model, ids)
        assert error(before["1.attn.out"] - after["1.attn.out"], outputs[:, :, head]) < BAR
    W = model.config.head_width
    if model.config.width == H * W:  # mutant: a slice of the attention's output is not what a head writes
        sliced = torch.zeros_like(outputs[:, :, 0])
        sliced[..., :W] = before["1.attn.out"][..., :W]
        assert error(sliced, outputs[:, :, 0]) > 1e-3


def without(head: int) -> Callable[[Tensor], Tensor]:
    def zero(z: Tensor) -> Tensor:
        z = z.clone()
        z[:, head] = 0
        return z

    return zero


def test_adapters_count_while_they_are_on() -> None:
    model = model_of("adapters")
    z = random(2, H, T, 4)
    on = head_outputs(model, 0, z).detach()
    with lora.disabled(model):
        off = head_outputs(model, 0, z).detach()
    assert error(on, off) > 1e-3
    plain = model.blocks[0].attn.out.base.weight.detach()
    assert error(off.sum(2), z.transpose(1, 2).flatten(2) @ plain.T) < BAR
    assert error(head_outputs(lora.merge(model), 0, z).detach(), on) < BAR


@every_slot
def test_values_are_weighed_by_what_they_write(slot: str) -> None:
    """Against one query, key and head at a time; the vectors whose norms these are add up to what the head writes."""
    model = model_of(slot)
    seen = seen_of(model, tokens(model.config, batch=2, length=T))
    pattern, v = seen["2.attn.pattern"], seen["2.attn.v"]
    found = value_weighted(model, 2, pattern, v).detach()
    out = model.blocks[2].attn.out
    matrix = (out.merged() if slot == "adapters" else out.weight).detach()
    W, share = model.config.head_width, H // model.config.kv_heads
    written = torch.zeros(2, H, T, T, model.config.width, dtype=torch.float64)
    for h in range(H):
        of_key = v[:, h // share] @ matrix[:, h * W : (h + 1) * W].T  # (B, S, D)
        written[:, h] = pattern[:, h].unsqueeze(-1) * of_key.unsqueeze(1)
    assert error(found, written.norm(dim=-1)) < BAR
    assert error(written.sum(dim=3).transpose(1, 2), head_outputs(model, 2, seen["2.attn.z"]).detach()) < BAR
    if 1 < share < H:  # mutant: heads of keys dealt out in turn
        tiled = head_outputs(model, 2, v.repeat(1, share, 1, 1)).detach().norm(dim=-1).transpose(1, 2).unsqueeze(2)
        assert error(found, pattern * tiled) > 1e-3


def test_what_does_not_fit_is_refused() -> None:
    model = model_of("grouped, no biases")
    with pytest.raises(UserError, match=r"layer must be between 0 and 2; got 3"):
        head_outputs(model, 3, random(1, H, T, 4))
    with pytest.raises(UserError, match=r"z of layer 0 must be \(B, 4, T, 4\); got \(1, 10, 4, 4\)"):
        head_outputs(model, 0, random(1, T, H, 4))
    cache = KVCache(model.config)
    with torch.no_grad():
        model(tokens(model.config, length=T), cache)
        with capture(model, "blocks.0.attn.*") as seen:
            model(tokens(model.config, length=2), cache)
    pattern, v = seen["blocks.0.attn.pattern"], seen["blocks.0.attn.v"]
    with pytest.raises(UserError, match=r"v of layer 0 must be \(B, 2, 12, W\); got \(3, 2, 2, 4\).*without a cache"):
        value_weighted(model, 0, pattern, v)
    with pytest.raises(UserError, match=r"2 queries and 12 keys \(capture without a cache\)"):
        rollout([pattern])


# ---------------------------------------------------------------------- the pattern


@every_slot
def test_patterns_are_causal_distributions(slot: str) -> None:
    model = model_of(slot)
    seen = seen_of(model, tokens(model.config, length=T))
    for layer in range(LAYERS):
        pattern = seen[f"{layer}.attn.pattern"]
        assert error(pattern.sum(dim=-1), torch.ones(3, H, T, dtype=torch.float64)) < BAR
        assert bool((pattern.triu(1) == 0).all())


def looking(*keys: int) -> Tensor:
    """A pattern (1, 1, T, T) in which query i sees key keys[i] alone."""
    return torch.nn.functional.one_hot(torch.tensor(keys), len(keys)).double()[None, None]


def test_entropy_in_bits() -> None:
    even = torch.ones(T, T, dtype=torch.float64).tril()
    even = (even / even.sum(-1, keepdim=True)).expand(2, 3, T, T)  # query i sees i + 1 keys alike: query 0 counts with 0 bits
    expected = sum(math.log2(i + 1) for i in range(T)) / T
    assert error(pattern_entropy(even), torch.full((2, 3), expected, dtype=torch.float64)) < BAR
    assert float(pattern_entropy(looking(0, 0, 2))) == 0  # 0 log 0 is 0
    mixed = torch.tensor([[1.0, 0.0], [0.25, 0.75]], dtype=torch.float64)[None, None]
    assert float(pattern_entropy(mixed)) == pytest.approx((0.5 + 0.75 * math.log2(4 / 3)) / 2, abs=BAR)
    assert pattern_entropy(mixed.bfloat16()).dtype == torch.float32


def test_distance_in_tokens() -> None:
    assert float(pattern_distance(looking(0, 0, 0, 3))) == pytest.approx(3 / 4, abs=BAR)
    last = looking(0, 0, 1, 1)[:, :, 2:]  # two queries after two cached ones
    assert float(pattern_distance(last)) == pytest.approx(1.5, abs=BAR)


def mean_of_places(pattern: Tensor, places: list[tuple[int, int]]) -> Tensor:
    """The measures as their definitions say them, place by place."""
    return torch.stack([pattern[:, :, query, key] for query, key in places]).mean(dim=0)


@pytest.mark.parametrize("start", [0, 1])
def test_scores_are_means_over_their_places(start: int) -> None:
    n = 5
    pattern = random(2, H, start + 2 * n, start + 2 * n).exp().tril()
    previous = [(i, i - 1) for i in range(1, start + 2 * n)]
    duplicate = [(start + n + i, start + i) for i in range(n)]
    induction = [(start + n + i, start + i + 1) for i in range(n - 1)]
    assert error(previous_score(pattern), mean_of_places(pattern, previous)) < BAR
    assert error(duplicate_score(pattern, n, start), mean_of_places(pattern, duplicate)) < BAR
    assert error(induction_score(pattern, n, start), mean_of_places(pattern, induction)) < BAR
    assert error(induction_score(pattern, n, 1 - start), mean_of_places(pattern, induction)) > 1e-3  # mutant: one place off


def test_rollout_multiplies_the_layers() -> None:
    patterns = [random(2, H, T, T, seed=seed).tril().exp().tril() for seed in range(3)]
    patterns = [pattern / pattern.sum(-1, keepdim=True) for pattern in patterns]
    found = rollout(patterns)
    for row in range(2):
        total = torch.eye(T, dtype=torch.float64)
        for layer, pattern in enumerate(patterns):
            mean = sum((pattern[row, head] for head in range(H)), torch.zeros(T, T, dtype=torch.float64)) / H
            total = (0.5 * mean + 0.5 * torch.eye(T, dtype=torch.float64)) @ total
            assert error(found[layer][row], total) < BAR
    assert error(found[-1].sum(-1), torch.ones(2, T, dtype=torch.float64)) < BAR
    assert error(rollout(patterns[::-1])[-1], found[-1]) > 1e-3  # mutant: the first layer last
    assert rollout([]) == []


# ---------------------------------------------------------------------- scores


def ids_given(model: GPT, **arguments: Any) -> tuple[list[HeadScore], list[Tensor]]:
    """The scores, and the ids that the model was given for them."""
    given: list[Tensor] = []
    handle = model.token_embedding.register_forward_hook(lambda module, inputs, output: given.append(inputs[0]))
    scores = head_scores(model, **arguments)
    handle.remove()
    return scores, given


@pytest.mark.parametrize("bos", [None, 0, 7, 30])
def test_the_probe_is_what_it_says(bos: int | None) -> None:
    _, (probe, control) = ids_given(noisy(shape()), tokens=10, rows=50, bos=bos, n_ids=29)
    start = int(bos is not None)
    assert probe.shape == control.shape == (50, start + 20)
    if bos is not None:
        assert bool((probe[:, 0] == bos).all()) and bool((control[:, 0] == bos).all())
    assert torch.equal(probe[:, start : start + 10], probe[:, start + 10 :])
    assert torch.equal(probe[:, : start + 10], control[:, : start + 10])
    assert all(len(set(row)) == start + 20 for row in control.tolist())  # with bos: it is not drawn
    assert set(control[:, start:].flatten().tolist()) == set(range(29)) - {bos}  # every id that may be drawn is


@pytest.mark.parametrize("bos", [None, 3])
@every_slot
def test_scores_of_every_slot(slot: str, bos: int | None) -> None:
    """Each score again from its definition, on the ids that the model was given."""
    model, n, start = model_of(slot), 6, int(bos is not None)
    scores, (probe, control) = ids_given(model, tokens=n, rows=3, bos=bos)
    assert [(score.layer, score.head) for score in scores] == [(layer, head) for layer in range(LAYERS) for head in range(H)]
    places = {
        "previous": [(i, i - 1) for i in range(1, start + 2 * n)],
        "duplicate": [(start + n + i, start + i) for i in range(n)],
        "induction": [(start + n + i, start + i + 1) for i in range(n - 1)],
    }
    for suffix, ids in (("", probe), ("_control", control)):
        seen = seen_of(model, ids)
        for score in scores:
            pattern = seen[f"{score.layer}.attn.pattern"][:, score.head : score.head + 1]
            for name, where in places.items():
                expected = float(mean_of_places(pattern, where).mean())
                assert getattr(score, name + suffix) == pytest.approx(expected, abs=BAR), (score, name)
            if not suffix:
                assert score.entropy_bits == pytest.approx(float(pattern_entropy(pattern).mean()), abs=BAR)
                assert score.distance_tokens == pytest.approx(float(pattern_distance(pattern).mean()), abs=BAR)


def test_scores_follow_from_the_seed_alone() -> None:
    model = noisy(shape())
    first = head_scores(model, tokens=6)
    torch.manual_seed(5)
    assert head_scores(model, tokens=6) == first
    assert head_scores(model, tokens=6, seed=1) != first


def test_measuring_leaves_no_graph_and_no_hooks() -> None:
    model = noisy(shape())
    head_scores(model, tokens=6)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "a probe of 25 tokens needs 50 different ids and a context of 50; the model has 31 ids to draw from and a"
             " context of 24: use tokens 12 or fewer"),
        ({"tokens": 12, "bos": 1}, "needs 24 different ids and a context of 25; .* context of 24: use tokens 11 or fewer"),
        ({"tokens": 11, "n_ids": 20}, "20 ids to draw from .*: use tokens 10 or fewer"),
        ({"tokens": 10, "n_ids": 20, "bos": 19}, "the model has 19 ids to draw from .*: use tokens 9 or fewer"),
        ({"tokens": 3, "n_ids": 5}, "this model is too small for the probe"),
        ({"tokens": 2}, "tokens must be at least 3, .*; got 2"),
        ({"rows": 0}, "rows must be at least 1; got 0"),
        ({"n_ids": 32}, "n_ids must be between 1 and the vocabulary's 31; got 32"),
        ({"n_ids": 0}, "n_ids must be between 1 and the vocabulary's 31; got 0"),
        ({"bos": 31}, "bos must be between 0 and 30; got 31"),
        ({"seed": -1}, "seed must be between"),
    ],
)  # fmt: skip
def test_what_has_no_room_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        head_scores(noisy(shape()), **arguments)


@pytest.mark.parametrize("arguments", [{}, {"bos": 1}, {"n_ids": 20}, {"n_ids": 20, "bos": 19}, {"n_ids": 20, "bos": 20}])
def test_the_longest_probe_is_one_and_no_longer_one_is(arguments: dict[str, Any]) -> None:
    model = noisy(shape())
    longest = longest_probe(model, **arguments)
    head_scores(model, tokens=longest, rows=1, **arguments)
    with pytest.raises(UserError, match=f"use tokens {longest} or fewer"):
        head_scores(model, tokens=longest + 1, rows=1, **arguments)


@pytest.mark.parametrize(("context_tokens", "probed"), [(64, 25), (24, 11)])
def test_the_usual_probe_has_the_room_that_there_is(tokenizer: Tokenizer, context_tokens: int, probed: int) -> None:
    """After the token that ends texts; of 25 tokens, or fewer where the context is short; of the tokenizer's ids alone."""
    config = ModelConfig(tokenizer.vocab_size + 20, context_tokens, n_layer=1, n_head=2, width=8)
    expected = {"tokens": probed, "bos": tokenizer.end_id, "n_ids": tokenizer.vocab_size, "seed": 3}
    assert usual_scores(noisy(config), tokenizer, seed=3) == head_scores(noisy(config), **expected)
    with pytest.raises(UserError, match=r"needs 6 different ids and a context of 7; .*this model is too small for the probe"):
        usual_scores(noisy(dataclasses.replace(config, context_tokens=6)), tokenizer)


# ---------------------------------------------------------------------- names


@torch.no_grad()
def looking_back(*back: int) -> GPT:
    """A model of one layer in which head h looks back[h] tokens back, whatever stands there."""
    config = ModelConfig(31, context_tokens=24, n_layer=1, n_head=len(back), width=4 * len(back), position="per_head")
    model = noisy(config)
    model.blocks[0].attn.qkv.weight.zero_()
    model.blocks[0].attn.qkv.bias.zero_()
    weight = torch.zeros(24, len(back))
    weight[list(back), range(len(back))] = 60.0
    model.position_embedding.weight.copy_(weight)  # (distances, H)
    return model


def test_a_head_that_copies_by_place_alone_is_no_induction_head() -> None:
    """It has the full score, and the same on the control: without that column it would pass."""
    n = 10
    previous, induction, duplicate, self_ = head_scores(looking_back(1, n - 1, n, 0), tokens=n)
    assert induction.induction == pytest.approx(1, abs=1e-9) and induction.induction_control == pytest.approx(1, abs=1e-9)
    assert duplicate.duplicate == pytest.approx(1, abs=1e-9) and duplicate.duplicate_control == pytest.approx(1, abs=1e-9)
    assert [head_class(score) for score in (induction, duplicate, self_)] == ["none"] * 3
    assert previous.previous == pytest.approx(1, abs=1e-9)
    assert head_class(previous) == "previous-token"  # place alone is what makes one
    assert previous.distance_tokens == pytest.approx((2 * n - 1) / (2 * n), abs=1e-9)


@torch.no_grad()
def test_a_head_that_looks_for_its_own_token() -> None:
    """Queries and keys are the token, in all heads alike: each token sees itself, and in a repeat its double as well."""
    config = ModelConfig(31, context_tokens=24, n_layer=1, n_head=1, width=32, position="none")
    model = noisy(config)
    model.token_embedding.weight.copy_(torch.eye(31, 32))
    qkv = model.blocks[0].attn.qkv
    qkv.weight.zero_()
    qkv.bias.zero_()
    qkv.weight[:32], qkv.weight[32:64] = 30 * torch.eye(32), 30 * torch.eye(32)
    (score,) = head_scores(model, tokens=10)
    assert score.duplicate == pytest.approx(0.5, abs=1e-6)
    assert score.duplicate_control < 1e-6
    assert head_class(score) == "duplicate-token"  # though a half is all that it can have


NOTHING = HeadScore(0, 0, 1.0, 1.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 1.0, 1.0)


@pytest.mark.parametrize(
    ("scores", "name"),
    [
        ({}, "none"),
        ({"induction": 0.9, "induction_control": 0.04}, "induction"),
        ({"induction": 0.4, "induction_control": 0.1}, "induction"),
        ({"induction": 0.39, "induction_control": 0.0}, "none"),  # not high
        ({"induction": 0.9, "induction_control": 0.3}, "none"),  # high, but not far above the control
        ({"duplicate": 0.9, "duplicate_control": 0.04}, "duplicate-token"),
        ({"duplicate": 0.9, "duplicate_control": 0.9}, "none"),
        ({"previous": 0.9, "previous_control": 0.9}, "previous-token"),
        ({"previous": 0.9, "previous_control": 0.2}, "none"),  # only in a repeat: no previous-token head
        ({"previous": 0.2, "previous_control": 0.9}, "none"),
        ({"previous": 0.5, "previous_control": 0.9, "induction": 0.8}, "induction"),  # the higher one
    ],
)
def test_names(scores: dict[str, float], name: str) -> None:
    assert head_class(dataclasses.replace(NOTHING, **scores)) == name
