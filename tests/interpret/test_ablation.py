"""Ablation: values come from where they should; every part in turn equals a hooked run for each; a head is its own output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact import error, noisy, shape, tokens
from torch import Tensor

from glassgpt.config import UserError
from glassgpt.config.model import MoeConfig
from glassgpt.generation.cache import KVCache
from glassgpt.interpret import capture, rerun
from glassgpt.interpret.ablation import HOWS, How, ablate, ablation_sweep
from glassgpt.interpret.patching import logit_difference
from glassgpt.model import GPT

T, EXACT = 7, 1e-12
SLOTS: dict[str, dict[str, Any]] = {
    "default": {},
    "modern": {"position": "rope", "norm": "rms", "mlp": "swiglu", "bias": False, "n_kv_head": 2, "tied_head": False},
    "windows": {"position": "alibi", "spans": ("full", "window"), "window_tokens": 3, "logit_cap": 5.0},
    "experts": {"moe": MoeConfig(experts=4, top_k=2, shared=1)},
}


def made(slot: str = "default") -> GPT:
    return noisy(shape(**SLOTS[slot]))


@torch.no_grad()
def seen_of(model: GPT, ids: Tensor, name: str) -> Tensor:
    with capture(model, name) as seen:
        model(ids)
    return seen[name]


@pytest.mark.parametrize("head", range(4))
@torch.no_grad()
def test_zeroing_a_head_takes_away_its_own_output(head: int) -> None:
    model = made()
    ids = tokens(model.config, 2, T)
    z, before = seen_of(model, ids, "blocks.1.attn.z"), seen_of(model, ids, "blocks.1.attn")
    W = model.config.head_width
    own = z[:, head] @ model.blocks[1].attn.out.weight[:, head * W : (head + 1) * W].T  # (B, T, D)
    with ablate(model, {"blocks.1.attn.z": [head]}):
        after = seen_of(model, ids, "blocks.1.attn")
    assert error(before - after, own) < EXACT
    # a slice of the attention's output is not a head
    wrong = torch.zeros_like(before)
    wrong[..., head * W : (head + 1) * W] = before[..., head * W : (head + 1) * W]
    assert error(before - after, wrong) > 1e-3


def expected(how: How, was: Tensor, row: int, shift: int) -> Tensor:
    """What takes the place of head outputs (H, T, W) of a row; `was` (R, H, T, W)."""
    kinds = {
        "zero": torch.zeros_like(was[0]),
        "mean": was.mean((0, 2), keepdim=True)[0].expand_as(was[0]),
        "position_mean": was.mean(0),
        "resample": was[(row + shift) % len(was)],
    }
    return kinds[how]


@pytest.mark.parametrize("how", HOWS)
@torch.no_grad()
def test_values_come_from_where_they_should(how: How) -> None:
    model = made()
    ids = tokens(model.config, 4, T)
    was, untouched = seen_of(model, ids, "blocks.1.attn.z"), seen_of(model, ids, "blocks.0.attn.z")
    with ablate(model, {"blocks.1.attn.z": [0, 2]}, how, ids, seed=3):
        now, below = seen_of(model, ids, "blocks.1.attn.z"), seen_of(model, ids, "blocks.0.attn.z")
    shift = int(torch.randint(1, 4, (), generator=torch.Generator().manual_seed(3)))
    for row in range(4):
        value = expected(how, was, row, shift)
        assert error(now[row, [0, 2]], value[[0, 2]]) < EXACT
        assert torch.equal(now[row, [1, 3]], was[row, [1, 3]])
        assert error(value[[0, 2]], was[row, [0, 2]]) > 1e-3
    assert torch.equal(below, untouched)
    assert torch.equal(seen_of(model, ids, "blocks.1.attn.z"), was)  # nothing is left


def test_resampling_depends_on_the_seed_alone() -> None:
    model = made()
    ids = tokens(model.config, 5, T)

    def logits(seed: int) -> Tensor:
        with torch.no_grad(), ablate(model, {"blocks.0.mlp": None}, "resample", ids, seed):
            return model(ids)

    assert torch.equal(logits(0), logits(0))
    assert len({float(logits(seed).sum()) for seed in range(8)}) > 1


@torch.no_grad()
def test_neurons_whole_parts_and_patterns_of_names() -> None:
    model = made()
    ids = tokens(model.config, 2, T)
    with ablate(model, {"blocks.*.mlp.hidden": [5], "blocks.2.attn": None}):
        hidden = [seen_of(model, ids, f"blocks.{layer}.mlp.hidden") for layer in range(3)]
        assert all(torch.all(x[..., 5] == 0) and torch.all(x[..., 4] != 0) for x in hidden)
        assert torch.all(seen_of(model, ids, "blocks.2.attn") == 0)
    with ablate(model, {"blocks.*.attn.z": None}, "mean", ids), pytest.raises(ZeroDivisionError):
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_the_mean_serves_texts_of_any_length_and_experts() -> None:
    model = made("experts")
    ids = tokens(model.config, 4, T)
    name = "blocks.1.mlp.experts.0.hidden"
    mean = seen_of(model, ids, name).mean(0)
    with ablate(model, {name: None}, "mean", ids):
        now = seen_of(model, tokens(model.config, 3, T + 5, seed=9), name)
    assert error(now, mean.expand_as(now)) < EXACT


# ---------------------------------------------------------------------- every part in turn


@torch.no_grad()
def by_hooks(model: GPT, ids: Tensor, how: How, reference: Tensor, by_loss: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Intact, (L, H) and (L,): a whole run of all texts for each part."""

    def score() -> Tensor:
        logits = model(ids)
        if not by_loss:
            return logit_difference(3, 5)(logits[:, -1]).mean()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def ablated(part: dict[str, Any]) -> Tensor:
        with ablate(model, part, how, reference, seed=1):
            return score()

    L, H = model.config.n_layer, model.config.n_head
    heads = [ablated({f"blocks.{layer}.attn.z": [head]}) for layer in range(L) for head in range(H)]
    mlps = [ablated({f"blocks.{layer}.mlp": None}) for layer in range(L)]
    return score(), torch.stack(heads).view(L, H), torch.stack(mlps)


@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize("how", HOWS)
def test_a_sweep_equals_a_run_for_each_part(slot: str, how: How, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rerun, "PIECE_TOKENS", 50)
    model = made(slot)
    ids, reference = tokens(model.config, 3, T), tokens(model.config, 4, T + 2, seed=8)
    for metric in (None, logit_difference(3, 5)):
        found = ablation_sweep(model, ids, how, metric, reference, seed=1)
        intact, heads, mlps = by_hooks(model, ids, how, reference, metric is None)
        assert abs(found.intact - float(intact)) < EXACT
        assert error(found.heads, heads) < EXACT
        assert error(found.mlps, mlps) < EXACT
        assert error(found.heads, heads.flip(1)) > 1e-3


def test_texts_are_their_own_reference_and_progress_is_told() -> None:
    model = made()
    ids = tokens(model.config, 3, T)
    told: list[tuple[int, int]] = []
    found = ablation_sweep(model, ids, "resample", progress=lambda done, total: told.append((done, total)))
    assert torch.equal(found.heads, ablation_sweep(model, ids, "resample", reference=ids).heads)
    parts = model.config.n_layer * (model.config.n_head + 1)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert {total for _, total in told} == {3 * parts}
    assert told[-1][0] == 3 * parts


def test_progress_is_told_within_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rerun, "PIECE_TOKENS", 1)  # a head at a time
    model = made()
    told: list[tuple[int, int]] = []
    ablation_sweep(model, tokens(model.config, 1, T), "zero", progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 15) for done in (0, 3, 6, 9, 12, 12, 15)]


@pytest.mark.parametrize(
    ("parts", "arguments", "message"),
    [
        ({"blocks.1.attn.z": [4]}, {}, "blocks.1.attn.z has heads 0 to 3; got 4"),
        ({"blocks.1.mlp.hidden": [-1]}, {}, "blocks.1.mlp.hidden has numbers 0 to 63; got -1"),
        ({"blocks.9.mlp": None}, {}, "no activation 'blocks.9.mlp'"),
        ({"blocks.1.mlp": None}, {"how": "median"}, "unknown ablation 'median'; expected zero, mean"),
        ({"blocks.1.mlp": None}, {"how": "mean"}, r"takes values from reference ids \(R, T\); got none"),
        ({"blocks.1.mlp": None}, {"how": "mean", "reference": torch.ones(3, dtype=torch.long)}, r"got shape \(3,\)"),
        ({"blocks.1.mlp": None}, {"how": "resample", "reference": torch.ones(1, 9, dtype=torch.long)}, "at least 2 rows"),
        ({"blocks.1.mlp": None}, {"how": "position_mean", "reference": torch.ones(2, 3, dtype=torch.long)}, "too different"),
    ],
)
def test_refusals(parts: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    model = made()
    with pytest.raises(UserError, match=message), ablate(model, parts, **arguments):
        model(tokens(model.config, 2, T))


@pytest.mark.parametrize("how", HOWS)
@torch.no_grad()
def test_values_of_positions_are_refused_with_a_cache(how: How) -> None:
    """Steps count their positions from the cache's end: they would get the values of the text's start."""
    model = made()
    ids = tokens(model.config, 2, T)
    with ablate(model, {"blocks.1.mlp": None}, how, ids):
        whole, cache = model(ids), KVCache(model.config)
        if how in ("zero", "mean"):
            assert error(torch.cat([model(part, cache) for part in ids.split([T - 2, 2], dim=1)], dim=1), whole) < EXACT
        else:
            with pytest.raises(UserError, match="for passes without a cache; run the whole text at once, or ablate by mean"):
                model(ids[:, :-2], cache)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model(ids, KVCache(model.config))


@pytest.mark.parametrize(
    ("ids", "how", "message"),
    [
        (torch.ones(3, 1, dtype=torch.long), "zero", "a loss needs texts of at least 2 tokens, .*; got 1"),
        (torch.ones(0, 7, dtype=torch.long), "zero", r"expected at least 1 text of token ids, shape \(B, T\); got \(0, 7\)"),
        (torch.ones(7, dtype=torch.long), "mean", r"shape \(B, T\); got \(7,\)"),
        (torch.full((1, 7), 31), "mean", "token ids must be between 0 and 30"),
    ],
)
def test_texts_that_cannot_be_swept_are_refused(ids: Tensor, how: How, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ablation_sweep(made(), ids, how)


def test_one_token_is_enough_for_a_metric() -> None:
    model = made()
    found = ablation_sweep(model, tokens(model.config, 3, 1), "zero", logit_difference(3, 5))
    assert torch.all(found.heads.isfinite())


@pytest.mark.parametrize(
    ("reference", "message"),
    [(torch.ones(0, 7, dtype=torch.long), r"got shape \(0, 7\)"), (torch.full((1, 7), 31), "token ids must be between 0 and 30")],
)
def test_a_reference_that_gives_no_values_is_refused(reference: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message), ablate(made(), {"blocks.1.mlp": None}, "mean", reference):
        pass


def test_dropout_on_the_reference_is_refused() -> None:
    model = noisy(shape(dropout=0.1)).train()
    with (
        pytest.raises(UserError, match="drops activations at random"),
        ablate(model, {"blocks.1.mlp": None}, "mean", tokens(model.config, 2, T)),
    ):
        pass


def test_a_short_reference_is_refused_in_a_sweep() -> None:
    model = made()
    with pytest.raises(UserError, match="the reference has 3 tokens a row and the texts 7"):
        ablation_sweep(model, tokens(model.config, 2, T), "resample", reference=tokens(model.config, 2, 3))
