"""Patching against one hooked run for each cell: equal on every slot; the identities that patching must keep; clear refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact import error, noisy, shape, tokens
from torch import Tensor

from glassgpt.config import UserError
from glassgpt.config.model import MoeConfig
from glassgpt.config.tuning import LoraConfig
from glassgpt.interpret import capture, edit, rerun
from glassgpt.interpret.patching import KINDS, Sweep, log_probability, logit_difference, patch_sweep, probability
from glassgpt.interpret.tracing import causal_trace
from glassgpt.model import GPT, lora

T, EXACT = 7, 1e-12
SLOTS: dict[str, dict[str, Any]] = {
    "default": {},
    "modern": {"position": "rope", "norm": "rms", "mlp": "swiglu", "bias": False, "n_kv_head": 2, "qk_norm": True},
    "alibi, cap": {"position": "alibi", "embedding_norm": True, "mlp": "relu2", "logit_cap": 5.0, "tied_head": False},
    "windows": {"position": "relative", "spans": ("full", "window", "strided"), "window_tokens": 3},
    "window alone": {"position": "rope", "spans": ("window",), "window_tokens": 2, "n_kv_head": 1},
    "experts": {"mlp": "swiglu", "moe": MoeConfig(experts=4, top_k=2, shared=1)},
    "other width": {"attention_width": 24, "attention_scale": 0.7},
}
METRIC = logit_difference(3, 5)
NAMES = {"attn": "attn", "mlp": "mlp", "heads": "attn.z", "head_positions": "attn.z"}


def made(slot: str) -> GPT:
    return noisy(shape(**SLOTS[slot]))


def prompts(model: GPT, different: int = 2) -> tuple[Tensor, Tensor]:
    """Two prompts (T,) that are the same before position `different`, and differ there and at the next but one."""
    (clean,) = tokens(model.config, 1, T)
    corrupted = clean.clone()
    for position in (different, different + 2):
        corrupted[position] = (clean[position] + 1) % model.config.vocab_size
    return clean, corrupted


@torch.no_grad()
def by_hooks(model: GPT, clean: Tensor, corrupted: Tensor, kind: str, off_by: int = 0) -> Tensor:
    """The straightforward way: a whole run for each cell."""
    L, H = model.config.n_layer, model.config.n_head
    streams = ["embed", *(f"blocks.{layer}" for layer in range(L))]
    sites = streams if kind == "residual" else [f"blocks.{layer}.{NAMES[kind]}" for layer in range(L)]
    with capture(model, sites) as seen:
        model(clean.unsqueeze(0))
    cells = {"heads": [(h, slice(None)) for h in range(H)], "head_positions": [(h, t) for h in range(H) for t in range(T)]}
    found = []
    for site in sites:
        for head, position in cells.get(kind, [(slice(None), t) for t in range(T)]):  # type: ignore[list-item]
            place = (0, head, position) if "z" in site else (0, position)
            source = (0, position + off_by) if off_by and position + off_by < T else place

            def patched(x: Tensor, site: str = site, place: Any = place, source: Any = source) -> Tensor:
                x = x.clone()
                x[place] = seen[site][source]
                return x

            with edit(model, {site: patched}):
                found.append(METRIC(model(corrupted.unsqueeze(0))[:, -1]))
    return torch.cat(found).view(len(sites), *((H, T) if kind == "head_positions" else (-1,)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slot", SLOTS)
def test_equal_to_one_hooked_run_a_cell(slot: str, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rerun, "PIECE_TOKENS", 40)  # so that there are several pieces
    monkeypatch.setattr(rerun, "HEAD_TOKENS", 3)
    model = made(slot)
    clean, corrupted = prompts(model)
    found = patch_sweep(model, clean, corrupted, METRIC, kind)
    assert error(found.values, by_hooks(model, clean, corrupted, kind)) < EXACT
    assert found.values[..., -1].std() > 1e-3  # not the same everywhere


def test_the_first_token_may_differ_and_adapters_may_be_there() -> None:
    model = made("default")
    lora.add(model, LoraConfig(rank=2), seed=0)
    with torch.no_grad():
        for name, parameter in lora.adapters(model).items():
            parameter.add_(0.1 if "lora_b" in name else 0.0)
    clean, corrupted = prompts(model, different=0)
    for kind in ("residual", "heads"):
        found = patch_sweep(model.double(), clean, corrupted, METRIC, kind)  # type: ignore[arg-type]
        assert error(found.values, by_hooks(model, clean, corrupted, kind)) < EXACT


def test_the_comparison_sees_a_position_off_by_one() -> None:
    model = made("default")
    clean, corrupted = prompts(model)
    right = patch_sweep(model, clean, corrupted, METRIC).values
    assert error(right, by_hooks(model, clean, corrupted, "residual", off_by=1)) > 1e-3


@pytest.mark.parametrize("slot", SLOTS)
def test_what_patching_must_keep(slot: str) -> None:
    model = made(slot)
    clean, corrupted = prompts(model)
    found = patch_sweep(model, clean, corrupted, METRIC)
    with torch.no_grad():
        logits = {name: model(ids.unsqueeze(0))[:, -1] for name, ids in (("clean", clean), ("corrupted", corrupted))}
    assert abs(found.clean - float(METRIC(logits["clean"]))) < EXACT
    assert abs(found.corrupted - float(METRIC(logits["corrupted"]))) < EXACT
    assert abs(float(found.values[-1, -1]) - found.clean) < EXACT  # the last state is all that the logits are made of
    assert float((found.values[:, :2] - found.corrupted).abs().max()) < EXACT  # the prompts are the same up to there
    assert float((found.values[-1, :-1] - found.corrupted).abs().max()) < EXACT  # no block is left to read these states
    assert error(found.recovered, (found.values - found.corrupted) / (found.clean - found.corrupted)) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_patched_with_itself_does_not_change(kind: Any) -> None:
    model = made("default")
    clean, _ = prompts(model)
    found = patch_sweep(model, clean, clean.clone(), METRIC, kind)
    assert torch.all(found.values == found.corrupted)
    with pytest.raises(UserError, match=r"both prompts have the metric .* nothing to recover"):
        _ = found.recovered


@pytest.mark.parametrize("slot", SLOTS)
@torch.no_grad()
def test_all_positions_of_the_residual_give_the_clean_logits(slot: str) -> None:
    model = made(slot)
    clean, corrupted = (ids.unsqueeze(0) for ids in prompts(model))
    for site in ("embed", "blocks.0", "blocks.2"):
        with capture(model, site) as seen:
            expected = model(clean)
        state = seen[site]
        with edit(model, {site: lambda x, state=state: state}):  # type: ignore[misc]
            assert torch.equal(model(corrupted), expected)
        assert error(model(corrupted), expected) > 1e-3


def test_metrics_by_hand() -> None:
    logits = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert logit_difference(2, 0)(logits).tolist() == [3.0, 0.0]
    e = logits.exp()
    assert error(probability(1)(logits), e[:, 1] / e.sum(1)) < EXACT
    assert error(log_probability(1)(logits), (e[:, 1] / e.sum(1)).log()) < EXACT


def test_progress_and_half_precision() -> None:
    model = noisy(shape(), torch.bfloat16)
    clean, corrupted = prompts(model)
    told: list[tuple[int, int]] = []
    found = patch_sweep(model, clean, corrupted, METRIC, progress=lambda done, total: told.append((done, total)))
    assert found.values.dtype == torch.float32
    cells = found.values.numel()
    assert told == [(2 * cells // T, cells), (cells, cells)]  # the prompts are the same at two positions; then all at once


@pytest.mark.parametrize(
    ("clean", "corrupted", "arguments", "message"),
    [
        ([1, 2, 3], [4, 5], {}, r"same number of tokens; clean has 3 \(\[1, 2, 3\]\), corrupted has 2 \(\[4, 5\]\)"),
        ([1] * 30, [2] * 30, {}, "context is 24 tokens; got 30"),
        ([], [], {}, "expected the token ids of one text"),
        ([1, 99], [1, 2], {}, "token ids must be between 0 and 30; got 1 to 99"),
        ([1, 2], [1, -1], {}, "token ids must be between 0 and 30; got -1 to 1"),
        ([1.0, 2.0], [1.0, 3.0], {}, r"expected the token ids of one text, shape \(T,\); got \(2,\) torch.float32"),
        ([[1, 2]], [[1, 3]], {}, r"got \(1, 2\) torch.int64"),
        ([1, 2], [1, 3], {"kind": "neurons"}, "unknown kind 'neurons'; expected residual, attn"),
        ([1, 2], [1, 3], {"metric": log_probability(31)}, "token id 31 is not in the vocabulary; expected 0 to 30"),
        ([1, 2], [1, 3], {"metric": lambda logits: logits.sum()}, "a metric must return one number a row"),
    ],
)
def test_refusals(clean: Any, corrupted: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        patch_sweep(made("default"), torch.tensor(clean), torch.tensor(corrupted), **{"metric": METRIC} | arguments)


def test_dropout_that_is_on_is_refused() -> None:
    model = noisy(shape(dropout=0.1)).train()
    with pytest.raises(UserError, match="the model is in training mode"):
        patch_sweep(model, *prompts(model), METRIC)


# ---------------------------------------------------------------------- causal tracing


@torch.no_grad()
def traced_by_hooks(model: GPT, ids: Tensor, subject: list[int], token: int, std: float, seed: int) -> tuple[Tensor, float]:
    """Restored probabilities (L + 1, T) and the corrupted one, of one sample."""
    streams = ["embed", *(f"blocks.{layer}" for layer in range(model.config.n_layer))]
    noise = torch.zeros(1, len(ids), model.config.width, dtype=torch.float64)
    drawn = torch.randn(len(subject), model.config.width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise[0, subject] = std * drawn
    with capture(model, streams) as seen:
        model(ids.unsqueeze(0))
    clean = dict(seen)

    def chance(site: str | None, position: int) -> float:
        def restored(x: Tensor) -> Tensor:
            x = x.clone()
            x[0, position] = clean[str(site)][0, position]
            return x

        with edit(model, {"token_embedding": lambda x: x + noise} | ({site: restored} if site else {})):
            return float(model(ids.unsqueeze(0))[0, -1].softmax(-1)[token])

    cells = [[chance(site, position) for position in range(len(ids))] for site in streams]
    return torch.tensor(cells, dtype=torch.float64), chance(None, 0)


@pytest.mark.parametrize("slot", ["default", "modern", "alibi, cap"])
def test_causal_trace_equals_hooks(slot: str) -> None:
    model = made(slot)
    ids, _ = prompts(model)
    found = causal_trace(model, ids, [2, 3], token=4, samples=1, seed=5)
    assert found.noise_std == pytest.approx(3 * float(model.token_embedding.weight.detach().std()), abs=EXACT)
    restored, corrupted = traced_by_hooks(model, ids, [2, 3], 4, found.noise_std, 5)
    assert error(found.restored, restored) < EXACT
    assert abs(found.corrupted - corrupted) < EXACT
    assert abs(float(found.restored[-1, -1]) - found.clean) < EXACT
    assert abs(found.clean - found.corrupted) > 1e-4


def test_causal_trace_is_the_mean_of_its_samples() -> None:
    model = made("default")
    ids, _ = prompts(model)
    told: list[int] = []
    several = causal_trace(model, ids, [1], 4, 0.5, samples=3, seed=1, progress=lambda done, total: told.append(total - done))
    again = causal_trace(model, ids, [1], 4, 0.5, samples=3, seed=1)
    one = causal_trace(model, ids, [1], 4, 0.5, samples=1, seed=1)
    assert torch.equal(several.restored, again.restored)
    assert not torch.equal(several.restored, one.restored)
    assert told == [2, 1, 0]
    assert error(several.restored[0, 2:], several.restored[0, 2:] * 0 + several.corrupted) < EXACT  # no noise there to take away
    assert causal_trace(model, ids, [1], 4, noise_std=0.0, samples=1).corrupted == several.clean


@pytest.mark.parametrize("subject", [[], [7], [-1]])
def test_a_subject_outside_the_text_is_refused(subject: list[int]) -> None:
    model = made("default")
    with pytest.raises(UserError, match="the subject must be positions 0 to 6 of the text"):
        causal_trace(model, prompts(model)[0], subject, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "foo"}, "unknown kind 'foo'; expected residual, attn, mlp"),
        ({"kind": "heads"}, "unknown kind 'heads'"),
        ({"noise_std": float("nan")}, "noise_std must be a number from 0 up; got nan"),
        ({"noise_std": float("inf")}, "noise_std must be a number from 0 up; got inf"),
        ({"noise_std": -0.5}, "noise_std must be a number from 0 up; got -0.5"),
        ({"samples": 0}, "samples must be at least 1; got 0"),
        ({"token": 31}, "token id 31 is not in the vocabulary"),
        ({"ids": torch.tensor([1, 99])}, "token ids must be between 0 and 30"),
    ],
)
def test_a_trace_that_cannot_be_made_is_refused(arguments: dict[str, Any], message: str) -> None:
    model = made("default")
    with pytest.raises(UserError, match=message):
        causal_trace(model, **{"ids": prompts(model)[0], "subject": [0], "token": 1} | arguments)


def test_a_sweep_says_what_it_is() -> None:
    assert Sweep("residual", torch.tensor([1.0, 3.0]), 3.0, 1.0).recovered.tolist() == [0.0, 1.0]
