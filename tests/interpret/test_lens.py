"""The logit lens recomputes the final norm's statistics; the tuned lens starts as it, learns, and belongs to one model."""

from __future__ import annotations

import copy
import gzip
import json
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import EXACT, add_noise, error, noisy, shape, tokens
from torch import Tensor

import glassgpt
from glassgpt.config import ModelConfig, UserError
from glassgpt.config.model import MoeConfig
from glassgpt.config.tuning import LoraConfig
from glassgpt.interpret import capture
from glassgpt.interpret.lens import (
    FACTS_FILE,
    WEIGHTS_FILE,
    TunedLens,
    kl_bits,
    lens,
    logit_lens,
    residual_stream,
    train_tuned_lens,
)
from glassgpt.model import GPT, lora

SLOTS: dict[str, dict[str, Any]] = {
    "as GPT-2": {},
    "rms, rope, grouped, swiglu": {"norm": "rms", "position": "rope", "n_kv_head": 2, "mlp": "swiglu", "bias": False},
    "alibi, windows, embedding norm": {
        "position": "alibi",
        "spans": ("full", "window"),
        "window_tokens": 3,
        "embedding_norm": True,
    },
    "capped, head of its own": {"logit_cap": 3.0, "tied_head": False},
    "mixture": {"moe": MoeConfig(experts=4, top_k=2)},
}
slots = pytest.mark.parametrize("slot", SLOTS)


# ---------------------------------------------------------------------- the logit lens


@slots
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_last_row_is_the_model(slot: str, dtype: torch.dtype) -> None:
    model = noisy(shape(**SLOTS[slot]), dtype)
    ids = tokens(model.config, 1)
    residuals, logits = residual_stream(model, ids)
    assert len(residuals) == model.config.n_layer + 1
    assert torch.equal(logits, model(ids)) and torch.equal(logit_lens(model, residuals[-1]), logits)
    found = lens(model, ids[0])
    assert found.kl_bits[-1].eq(0).all()
    wide = logits[0].float() if dtype == torch.bfloat16 else logits[0]
    assert torch.equal(found.probabilities[-1], wide.log_softmax(-1).topk(5).values.exp())


@slots
def test_rows_are_the_model_with_its_later_blocks_taken_out(slot: str) -> None:
    """And so every number of a row is what the definition gives on that model's own logits."""
    model = noisy(shape(**SLOTS[slot]))
    ids = tokens(model.config, 1)[0]
    found = lens(model, ids, k=4)
    output = model(ids[None])[0].log_softmax(-1)
    for row in range(model.config.n_layer + 1):
        cut = copy.deepcopy(model)
        del cut.blocks[row:]
        log_p = cut(ids[None])[0].log_softmax(-1)  # (T, V)
        p = log_p.exp()
        assert torch.equal(found.ids[row], log_p.topk(4).indices)
        assert error(found.probabilities[row], p.topk(4).values) < EXACT
        assert error(found.entropy_bits[row], -(p * p.log2()).sum(-1)) < EXACT
        assert error(found.kl_bits[row], (output.exp() * (output - log_p)).sum(-1) / math.log(2)) < EXACT
        following = [sorted(p[t], reverse=True).index(p[t, ids[t + 1]]) + 1 for t in range(len(ids) - 1)]
        assert found.rank[row].tolist() == [*following, 0]


def test_the_scale_of_the_last_layer_is_wrong_for_the_others() -> None:
    """The mistake of a lens that takes the final norm's statistics from the last layer, as direct attribution must."""
    model = noisy(shape(n_layer=4))
    ids = tokens(model.config, 1)
    with torch.no_grad():
        residuals, _ = residual_stream(model, ids)
        last, norm = residuals[-1], model.norm_f
        mean, scale = last.mean(-1, keepdim=True), (last.var(-1, correction=0, keepdim=True) + model.config.norm_eps).rsqrt()
        off = []
        for residual in residuals:
            frozen = model.logits((residual - mean) * scale * norm.weight + norm.bias)  # type: ignore[operator]
            off.append(float(kl_bits(logit_lens(model, residual).log_softmax(-1), frozen.log_softmax(-1)).mean()))
    assert off[-1] < EXACT
    assert min(off[:-1]) > 0.05 and off[0] > 1


def test_one_row_of_logits_at_a_time() -> None:
    model = noisy(shape(n_layer=6))
    ids = tokens(model.config, 1)[0]
    alive: list[weakref.ref[Any]] = []
    most = 0

    def count(module: Any, inputs: Any, output: Tensor) -> None:
        nonlocal most
        alive.append(weakref.ref(output.untyped_storage()))
        most = max(most, sum(reference() is not None for reference in alive))

    handle = model.head.register_forward_hook(count)
    lens(model, ids)
    handle.remove()
    assert len(alive) == 7 and most <= 3  # the output's, the layer's before until its name is taken again, the new one's


def test_a_wide_k_is_the_vocabulary_and_one_token_is_enough() -> None:
    model = noisy(shape())
    found = lens(model, tokens(model.config, 1)[0, :1], k=100)
    assert found.ids.shape == (4, 1, 31) and found.rank.tolist() == [[0]] * 4
    assert float((found.probabilities.sum(-1) - 1).abs().max()) < EXACT


@pytest.mark.parametrize(("length", "k", "message"), [(0, 5, "got 0 tokens"), (3, 0, "k = 0"), (25, 5, "context is 24 tokens")])
def test_what_no_lens_can_look_at(length: int, k: int, message: str) -> None:
    model = noisy(shape(context_tokens=24))
    with pytest.raises(UserError, match=message):
        lens(model, torch.zeros(length, dtype=torch.long), k)


# ---------------------------------------------------------------------- the tuned lens


def settled(config: ModelConfig, dtype: torch.dtype = torch.float32) -> GPT:
    """A random model whose layers speak in different tongues, not so loud that nothing is ever likely."""
    return noisy(config, dtype, size=0.15)


def random_batches(config: ModelConfig) -> Iterator[Tensor]:
    draw = torch.Generator().manual_seed(5)
    while True:
        yield torch.randint(config.vocab_size, (8, 16), generator=draw)


def held_out_bits(model: GPT, rows: Tensor, tuned: TunedLens | None) -> list[float]:
    """Mean KL of every row of the lens on texts (B, T)."""
    return torch.stack([lens(model, ids, tuned=tuned).kl_bits.mean(1) for ids in rows]).mean(0).tolist()


@slots
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_untrained_lens_is_the_logit_lens(slot: str, dtype: torch.dtype) -> None:
    model = noisy(shape(**SLOTS[slot]), dtype)
    ids = tokens(model.config, 1)[0]
    plain, tuned = lens(model, ids), lens(model, ids, tuned=TunedLens(model))
    assert all(torch.equal(a, b) for a, b in zip(vars(plain).values(), vars(tuned).values(), strict=True))


@slots
def test_training_brings_every_layer_nearer_on_text_that_it_has_not_seen(slot: str) -> None:
    model = settled(shape(**SLOTS[slot]))
    before = {name: p.clone() for name, p in model.named_parameters()}
    seen: list[tuple[int, int]] = []
    tuned = train_tuned_lens(
        model, random_batches(model.config), steps=60, learning_rate=1e-2, progress=lambda done, total: seen.append((done, total))
    )
    held_out = tokens(model.config, 6, seed=77)
    logit, trained = held_out_bits(model, held_out, None), held_out_bits(model, held_out, tuned)
    assert trained[-1] == logit[-1] == 0
    assert all(after < 0.8 * bits for after, bits in zip(trained[:-1], logit[:-1], strict=True)), (logit, trained)
    assert seen == [(step, 60) for step in range(1, 61)]
    assert len(tuned.history_bits) == 60 and all(len(row) == model.config.n_layer for row in tuned.history_bits)
    assert all(last < first for first, last in zip(tuned.history_bits[0], tuned.history_bits[-1], strict=True))
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_the_gradient_leads_to_the_output_and_not_away() -> None:
    """The mistake of KL(layer || output), whose gradient is another one."""
    model = settled(shape(), torch.float64)
    ids = next(random_batches(model.config))
    tuned = train_tuned_lens(model, [ids], steps=1, learning_rate=0.0)
    with torch.no_grad():
        residuals, logits = residual_stream(model, ids)
        output, layer = logits.log_softmax(-1), logit_lens(model, residuals[0]).log_softmax(-1)
    forward, backward = float(kl_bits(output, layer).mean()), float(kl_bits(layer, output).mean())
    assert tuned.history_bits[0][0] == pytest.approx(forward, abs=EXACT)
    assert abs(forward - backward) > 1e-3
    step = 1e-6
    tuned.maps[0].bias.data[3] += step
    with torch.no_grad():
        moved = kl_bits(output, logit_lens(model, tuned(0, residuals[0])).log_softmax(-1)).mean()
    assert float(tuned.maps[0].bias.grad[3]) == pytest.approx((float(moved) - forward) / step, rel=1e-3)


def test_a_trained_model_on_real_text(shared: Path) -> None:
    """A few steps on a few sentences bring every layer of the storyteller nearer on others."""
    model, tokenizer = glassgpt.load("storyteller")
    with gzip.open(shared / "corpora" / "childrens_books.txt.gz", "rt", encoding="utf-8") as file:
        ids = torch.tensor(tokenizer.encode(file.read(12_000)))
    rows = ids[: len(ids) // 32 * 32].view(-1, 32)
    tuned = train_tuned_lens(model, rows[:-4].split(4), steps=12)
    logit, trained = held_out_bits(model, rows[-4:], None), held_out_bits(model, rows[-4:], tuned)
    assert all(after < 0.9 * bits for after, bits in zip(trained[:-1], logit[:-1], strict=True)), (logit, trained)


def test_a_batch_too_few() -> None:
    model = settled(shape())
    with pytest.raises(UserError, match="ran out after 2 of 3 steps; give more text, or fewer steps"):
        train_tuned_lens(model, [tokens(model.config)] * 2, steps=3)


# ---------------------------------------------------------------------- files


@pytest.fixture
def model() -> GPT:
    return settled(shape())


@pytest.fixture
def saved(model: GPT, tmp_path: Path) -> Path:
    train_tuned_lens(model, random_batches(model.config), steps=3).save(tmp_path / "lens")
    return tmp_path / "lens"


def test_save_and_load(model: GPT, tmp_path: Path) -> None:
    tuned = train_tuned_lens(model, random_batches(model.config), steps=3)
    tuned.save(tmp_path / "lens")
    again = TunedLens.load(tmp_path / "lens", model)
    assert again.history_bits == tuned.history_bits and again.facts == tuned.facts
    assert all(torch.equal(a, b) and bool(a.any()) for a, b in zip(again.parameters(), tuned.parameters(), strict=True))
    for dtype in (torch.float64, torch.bfloat16):  # the same model in other floats
        TunedLens.load(tmp_path / "lens", copy.deepcopy(model).to(dtype))
    with pytest.raises(UserError, match="exists already"):
        tuned.save(tmp_path / "lens")


def other_models(model: GPT) -> Iterator[GPT]:
    yield settled(shape(n_layer=2))
    yield settled(shape(width=20))
    tuned = copy.deepcopy(model)
    add_noise(tuned.blocks[1].mlp, 0.02)
    yield tuned
    adapted = copy.deepcopy(model)
    lora.add(adapted, LoraConfig(rank=2), seed=0)
    yield adapted


def test_a_lens_of_another_model_is_refused(model: GPT, saved: Path) -> None:
    for other in other_models(model):
        with pytest.raises(UserError, match="was trained on 3 layers of width 16") as raised:
            TunedLens.load(saved, other)
        assert "\n" not in str(raised.value) and f"{other.config.n_layer} layers of width {other.config.width}" in str(
            raised.value
        )
        with pytest.raises(UserError, match="Train one on this model"):
            lens(other, tokens(other.config, 1)[0], tuned=TunedLens(model))


def test_damaged_files_are_told(model: GPT, saved: Path, tmp_path: Path) -> None:
    facts = (saved / FACTS_FILE).read_text()
    with pytest.raises(UserError, match="not a tuned lens"):
        TunedLens.load(tmp_path / "nowhere", model)
    for damaged in ("{", "[]", json.dumps({"n_layer": 3})):
        (saved / FACTS_FILE).write_text(damaged)
        with pytest.raises(UserError, match="not a tuned lens"):
            TunedLens.load(saved, model)
    (saved / FACTS_FILE).write_text(facts)
    whole = (saved / WEIGHTS_FILE).read_bytes()
    (saved / WEIGHTS_FILE).write_bytes(whole[:100])
    with pytest.raises(UserError, match=WEIGHTS_FILE):
        TunedLens.load(saved, model)
    (saved / WEIGHTS_FILE).write_bytes(whole.replace(b"maps.0.bias", b"maps.9.bias"))
    with pytest.raises(UserError, match="not the maps of this lens"):
        TunedLens.load(saved, model)


def test_hooks_are_gone_afterwards(model: GPT) -> None:
    lens(model, tokens(model.config, 1)[0])
    assert not any(module._forward_hooks for module in model.modules())
    with capture(model, "embed") as seen:
        lens(model, tokens(model.config, 1)[0])
    assert seen["embed"].shape == (1, 24, 16)


def test_rows_of_the_vocabulary_without_a_token_do_not_count() -> None:
    """Some models have more rows than their tokenizer tokens: what is left is as if the others were not there."""
    model, ids = noisy(shape(tied_head=False)), tokens(shape(vocab_size=20), 1)[0]
    model.requires_grad_(False)
    found = lens(model, ids, 20, n_ids=20)
    residuals, _ = residual_stream(model, ids[None])
    for row, residual in enumerate(residuals):
        p = logit_lens(model, residual)[0, :, :20].softmax(-1)
        assert error(found.probabilities[row], p.gather(-1, found.ids[row])) < EXACT
        assert error(found.probabilities[row].sum(-1), torch.ones(len(ids)).double()) < EXACT
    assert int(found.ids.max()) < 20 and int(found.rank.max()) <= 20
    assert float(lens(model, ids, 20).probabilities.sum(-1).max()) < 0.999
