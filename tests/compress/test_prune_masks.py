"""Which weights become zero: by brute force, in the right number, and staying zero through training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from exact import noisy, shape, tokens
from torch import Tensor

from glassgpt.compress import masks
from glassgpt.config import OptimConfig, UserError
from glassgpt.config.model import MoeConfig
from glassgpt.config.tuning import LoraConfig
from glassgpt.interpret.hooks import capture
from glassgpt.model import GPT, lora
from glassgpt.train import optim

SLOTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "modern": {"position": "rope", "mlp": "swiglu", "norm": "rms", "n_kv_head": 2, "qk_norm": True, "bias": False},
    "mixture": {"mlp": "swiglu", "moe": MoeConfig(3, 2, shared=1, expert_width=8)},
}
INPUTS = {"attn.qkv": "norm_1", "attn.out": "attn.z", "mlp.up": "norm_2", "mlp.gate": "norm_2", "mlp.down": "mlp.hidden"}


def weights_of(model: GPT) -> dict[str, Tensor]:
    return {name: linear.weight.detach() for name, linear in masks.matrices(model.blocks).items()}


def brute_force(scores: Tensor, groups: list[list[tuple[int, int]]], removed: int) -> Tensor:
    """Scores (N, K) to a mask, group by group of places, with Python's own sort."""
    mask = torch.ones_like(scores, dtype=torch.bool)
    for group in groups:
        for place in sorted(group, key=lambda at: float(scores[at]))[:removed]:
            mask[place] = False
    return mask


@pytest.mark.parametrize("removed", [0, 1, 5, 12])
def test_the_lowest_of_each_group(removed: int) -> None:
    scores = torch.rand(3, 12, generator=torch.Generator().manual_seed(0))
    whole = [[(n, k) for n in range(3) for k in range(12)]]
    rows = [[(n, k) for k in range(12)] for n in range(3)]
    fours = [[(n, first + k) for k in range(4)] for n in range(3) for first in (0, 4, 8)]
    assert torch.equal(masks.kept(scores, 36, removed), brute_force(scores, whole, removed))
    assert torch.equal(masks.kept(scores, 12, removed), brute_force(scores, rows, removed))
    assert torch.equal(masks.kept(scores, 4, min(removed, 4)), brute_force(scores, fours, min(removed, 4)))
    if removed == 5:
        assert not torch.equal(masks.kept(scores, 12, 5), masks.kept(scores, 36, 15))  # rows are not the whole


def test_equal_scores_still_give_the_exact_number() -> None:
    assert masks.kept(torch.ones(2, 8), 8, 3).int().tolist() == [[0, 0, 0, 1, 1, 1, 1, 1]] * 2


@pytest.mark.parametrize("slots", SLOTS.values(), ids=list(SLOTS))
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.97])
def test_magnitude_takes_the_smallest_of_each_matrix(slots: dict[str, Any], sparsity: float) -> None:
    model = noisy(shape(**slots))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks.prune_magnitude(model, sparsity)
    pruned = {f"blocks.{name}.weight" for name in masks.matrices(model.blocks)}
    for name, after in model.named_parameters():
        was = before[name]
        gone = round(sparsity * was.numel()) if name in pruned else 0
        assert int((after == 0).sum()) == gone, name
        smallest = was.abs().flatten().sort().values
        assert torch.equal(after, torch.where(was.abs() >= smallest[gone], was, 0.0)), name
    assert not any("router" in name for name in pruned)


@pytest.mark.parametrize("sparsity", [0.0, 0.4])
@pytest.mark.parametrize("slots", [SLOTS["plain"], SLOTS["modern"]], ids=["plain", "modern"])
def test_wanda_is_its_equation_block_after_block(slots: dict[str, Any], sparsity: float) -> None:
    """|W_nk| * ‖X_k‖ within each row, from a whole forward pass of the model with the blocks below pruned already."""
    model = noisy(shape(**slots))
    ids = tokens(model.config, batch=6)
    expected = copy.deepcopy(model)
    for number, block in enumerate(expected.blocks):
        with torch.no_grad(), capture(expected, f"blocks.{number}.**") as seen:
            expected(ids)
        for name, linear in masks.matrices(block).items():
            x = seen[f"blocks.{number}.{INPUTS[name]}"].detach()
            x = x.transpose(1, 2).flatten(2) if name == "attn.out" else x
            scores = linear.weight.detach().abs() * torch.linalg.vector_norm(x.flatten(0, 1), dim=0)
            rows = [[(n, k) for k in range(scores.size(1))] for n in range(scores.size(0))]
            linear.weight.data *= brute_force(scores, rows, round(sparsity * scores.size(1)))
    told: list[tuple[int, int]] = []
    pruned = copy.deepcopy(model)
    masks.prune_wanda(pruned, ids, sparsity, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    for name, after in weights_of(pruned).items():
        assert torch.equal(after, weights_of(expected)[name]), name
        assert set((after == 0).sum(dim=1).tolist()) == {round(sparsity * after.size(1))}, name
    if not sparsity:
        assert all(torch.equal(a, b) for a, b in zip(pruned.parameters(), model.parameters(), strict=True))


def test_wanda_would_differ_without_its_norms_and_with_the_whole_model_below(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutants: magnitude by rows; statistics of the model before pruning. Each takes other weights."""
    model = noisy(shape())
    ids = tokens(model.config, batch=6)
    right, dense, unit = (copy.deepcopy(model) for _ in range(3))
    masks.prune_wanda(right, ids, 0.4)
    dense_states = masks._through
    with monkeypatch.context() as patch:
        whole = copy.deepcopy(model)
        blocks = {id(block): whole.blocks[number] for number, block in enumerate(dense.blocks)}

        def through(block: Any, states: Any) -> Any:
            dense_states(block, states)
            return dense_states(blocks[id(block)], states)

        patch.setattr(masks, "_through", through)
        masks.prune_wanda(dense, ids, 0.4)
    for linear in masks.matrices(unit.blocks).values():
        linear.weight.data *= masks.kept(linear.weight.detach().abs(), linear.in_features, round(0.4 * linear.in_features))
    for mutant in (dense, unit):
        assert any(not torch.equal(after, weights_of(right)[name]) for name, after in weights_of(mutant).items())
    first = {name for name in weights_of(right) if name.startswith("0.")}
    assert all(torch.equal(weights_of(dense)[name], weights_of(right)[name]) for name in first)


@pytest.mark.parametrize("slots", SLOTS.values(), ids=list(SLOTS))
@pytest.mark.parametrize("how", ["magnitude", "wanda"])
def test_two_of_every_four(slots: dict[str, Any], how: str) -> None:
    model = noisy(shape(**slots))
    before = copy.deepcopy(model)
    if how == "magnitude":
        masks.prune_magnitude(model, 0.9, "2:4")
    else:
        masks.prune_wanda(model, tokens(model.config, batch=6), 0.9, "2:4")
    for name, after in weights_of(model).items():
        fours = after.unflatten(1, (-1, 4))
        assert set((fours == 0).sum(dim=2).flatten().tolist()) == {2}, name
        if how == "magnitude":
            was = weights_of(before)[name].abs().unflatten(1, (-1, 4))
            assert bool((was[fours != 0].view(-1, 2).amin(1) >= was[fours == 0].view(-1, 2).amax(1)).all())
    assert masks.zero_share(model) == 0.5


def test_a_row_that_four_does_not_divide_is_refused() -> None:
    model = noisy(shape(mlp_width=30))
    before = copy.deepcopy(model)
    with pytest.raises(UserError, match=r"rows of a multiple of 4 weights; blocks\.0\.mlp\.down has 30"):
        masks.prune_magnitude(model, 0.5, "2:4")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_adapters_and_dropout_are_refused() -> None:
    with pytest.raises(UserError, match="plain model"):
        masks.prune_magnitude(_adapted(), 0.5)
    dropping = noisy(shape(dropout=0.1)).train()
    with pytest.raises(UserError, match="training mode"):
        masks.prune_wanda(dropping, tokens(dropping.config), 0.5)


def _adapted() -> GPT:
    model = noisy(shape())
    lora.add(model, LoraConfig(rank=2), 0)
    return model


def test_an_expert_that_saw_nothing_is_refused() -> None:
    model = noisy(shape(**SLOTS["mixture"]))
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.router.weight.zero_()  # all scores are equal: the last of three is never among the first two
    with pytest.raises(UserError, match=r"blocks\.0\.mlp\.experts\.\d\.\w+ saw no token"):
        masks.prune_wanda(model, tokens(model.config), 0.5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_zeros_stay_through_training_and_without_the_hook_they_do_not(optimizer: Any) -> None:
    """Muon's steps are orthogonal matrices, in which a gradient's zeros are none: masking gradients would not do."""
    left = {}
    for keeps in (True, False):
        model = noisy(shape(), torch.float32).train()
        masks.prune_magnitude(model, 0.6)
        before = {name: weight.clone() for name, weight in weights_of(model).items()}
        optimizers = optim.build(model, OptimConfig(optimizer=optimizer))
        if keeps:
            optim.keep_zeros(model, optimizers)
        for seed in range(3):
            model(tokens(model.config, seed=seed)).square().mean().backward()
            for one in optimizers:
                one.step()
                one.zero_grad()
        left[keeps] = masks.zero_share(model)
        for name, after in weights_of(model).items():
            assert not torch.equal(after, before[name])  # and the others moved
            assert torch.equal(after == 0, before[name] == 0) == keeps
    assert left[True] == pytest.approx(0.6, abs=1e-3) and left[False] < 0.01


def test_rows_or_the_whole_matrix_as_asked() -> None:
    model = noisy(shape())
    ids = tokens(model.config)
    for how, given in ((masks.prune_magnitude, ()), (masks.prune_wanda, (ids,))):
        by_row, by_matrix = copy.deepcopy(model), copy.deepcopy(model)
        how(by_row, *given, 0.5, None, "row")
        how(by_matrix, *given, 0.5, None, "matrix")
        for name, rows in weights_of(by_row).items():
            counts = (weights_of(by_matrix)[name] == 0).sum(dim=1)
            assert set((rows == 0).sum(dim=1).tolist()) == {rows.size(1) // 2}
            assert len(set(counts.tolist())) > 1 and int(counts.sum()) == rows.numel() // 2
