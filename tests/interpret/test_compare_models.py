"""Two models side by side: exact zeros for a model and itself, hand-made differences where they were made, clear refusals."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import EXACT, add_noise, error, noisy, random, shape, tokens

from glassgpt.config import UserError
from glassgpt.config.model import MoeConfig
from glassgpt.config.tuning import LoraConfig
from glassgpt.interpret import capture
from glassgpt.interpret.compare import Comparison, check_tokenizers, compare, parameter_differences
from glassgpt.interpret.next_token import logits_of, surprises
from glassgpt.model import GPT, lora
from glassgpt.text import Tokenizer

SLOTS: dict[str, dict[str, Any]] = {
    "as GPT-2": {},
    "rms, rope, grouped, swiglu": {"norm": "rms", "position": "rope", "n_kv_head": 2, "mlp": "swiglu", "bias": False},
    "alibi, windows, capped": {"position": "alibi", "spans": ("full", "window"), "window_tokens": 3, "logit_cap": 3.0},
    "mixture": {"moe": MoeConfig(experts=4, top_k=2), "tied_head": False},
}


def of(a: GPT, b: GPT) -> Comparison:
    return compare(a, b, tokens(a.config, 1)[0])


def changed(model: GPT, part: str, size: float = 0.05) -> GPT:
    """The same model with noise on one part."""
    other = copy.deepcopy(model)
    add_noise(other.get_submodule(part), size)
    return other


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slot", SLOTS)
def test_a_model_and_itself_differ_in_nothing(slot: str, dtype: torch.dtype) -> None:
    model = noisy(shape(**SLOTS[slot]), dtype)
    for other in (model, copy.deepcopy(model)):
        found = of(model, other)
        assert found.residual_relative is not None and found.pattern_distance is not None and found.residual_cosine is not None
        for zeros in (found.kl_bits, found.residual_relative, found.pattern_distance):
            assert zeros.eq(0).all()
        assert found.residual_cosine.shape == (4, 24) and float((found.residual_cosine - 1).abs().max()) < EXACT
        assert torch.equal(found.a.ids, found.b.ids) and found.a.surprises == found.b.surprises
        assert len(found.parameters) == len(list(model.parameters()))
        assert all(row.difference == row.relative == 0 for row in found.parameters)


@pytest.mark.parametrize("slot", SLOTS)
def test_every_number_from_its_definition(slot: str) -> None:
    a = noisy(shape(**SLOTS[slot]))
    b = changed(changed(a, "blocks.1"), "token_embedding", 0.01)
    ids = tokens(a.config, 1)[0]
    found = compare(a, b, ids, k=3)
    p, q = logits_of(a, ids).softmax(-1), logits_of(b, ids).softmax(-1)
    assert error(found.kl_bits, (p * (p.log2() - q.log2())).sum(-1)) < EXACT
    assert error(compare(b, a, ids).kl_bits, found.kl_bits) > 1e-4  # KL has a direction
    for side, share, model in ((found.a, p, a), (found.b, q, b)):
        assert torch.equal(side.ids, share.topk(3).indices) and error(side.probabilities, share.topk(3).values) < EXACT
        for one, other in zip(side.surprises[1:], surprises(logits_of(model, ids), ids)[1:], strict=True):
            assert one is not None and other is not None and one.rank == other.rank
            assert one.surprisal_bits == pytest.approx(other.surprisal_bits, abs=EXACT)
    streams, patterns = [], []
    for model in (a, b):
        with torch.no_grad(), capture(model, ["embed", "blocks.*", "blocks.*.attn.pattern"]) as seen:
            model(ids[None])
        streams.append(torch.cat([seen["embed"], *(seen[f"blocks.{layer}"] for layer in range(3))]))
        patterns.append(torch.cat([seen[f"blocks.{layer}.attn.pattern"] for layer in range(3)]))
    x, y = streams
    assert found.residual_relative is not None and found.residual_cosine is not None and found.pattern_distance is not None
    assert error(found.residual_relative, (x - y).pow(2).sum(-1).sqrt() / x.pow(2).sum(-1).sqrt()) < EXACT
    assert error(found.residual_cosine, (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))) < EXACT
    x, y = patterns
    assert error(found.pattern_distance, torch.maximum(x - y, torch.zeros_like(x)).sum(-1)) < EXACT
    assert found.pattern_distance.shape == (3, 4, 24) and found.pattern_distance[:, :, 0].eq(0).all()


def test_a_change_shows_where_it_was_made() -> None:
    a = noisy(shape())
    found = of(a, changed(a, "blocks.1.mlp.up"))
    assert found.residual_relative is not None and found.pattern_distance is not None
    assert found.residual_relative[:2].eq(0).all() and bool(found.residual_relative[2:].gt(1e-4).all())
    assert found.pattern_distance[:2].eq(0).all() and bool(found.pattern_distance[2, :, 1:].gt(0).all())
    changed_names = [row.name for row in found.parameters if row.difference]
    assert (
        sorted(changed_names)
        == ["blocks.1.mlp.up.bias", "blocks.1.mlp.up.weight"]
        == sorted(row.name for row in found.parameters[:2])
    )
    assert bool(found.kl_bits.gt(0).all())


def test_parameters_by_hand() -> None:
    a = noisy(shape())
    b = copy.deepcopy(a)
    with torch.no_grad():
        b.norm_f.weight.mul_(3)
        a.norm_f.bias.zero_()
        b.blocks[0].attn.out.weight.mul_(1.5)
    rows = parameter_differences(a, b)
    assert [row.name for row in rows[:3]] == ["norm_f.bias", "norm_f.weight", "blocks.0.attn.out.weight"]
    assert [row.relative for row in rows[:3]] == [math.inf, pytest.approx(2), pytest.approx(0.5)]
    assert rows[1].difference == pytest.approx(2 * a.norm_f.weight.norm().item())
    assert [row.relative for row in parameter_differences(b, a)][:1] == [1.0]


def test_adapters_count_as_part_of_their_matrix() -> None:
    """And a model with adapters is the same as the one that they were added up in."""
    a = noisy(shape())
    adapted = copy.deepcopy(a)
    lora.add(adapted, LoraConfig(rank=2, targets=("qkv", "down")), seed=0)
    assert all(row.difference == 0 for row in parameter_differences(a, adapted))  # B starts at 0
    with torch.no_grad():
        for name, p in lora.adapters(adapted).items():
            p.copy_(0.1 * random(*p.shape, seed=len(name)))
    rows = of(a, adapted).parameters
    assert len(rows) == len(list(a.parameters()))
    moved = {row.name for row in rows if row.difference}
    assert moved == {f"blocks.{layer}.{part}.weight" for layer in range(3) for part in ("attn.qkv", "mlp.down")}
    linear = adapted.get_submodule("blocks.0.attn.qkv")
    assert isinstance(linear, lora.LoraLinear)
    update = linear.scale * linear.lora_b.weight @ linear.lora_a.weight
    (row,) = (row for row in rows if row.name == "blocks.0.attn.qkv.weight")
    assert row.relative == pytest.approx((update.norm() / linear.base.weight.norm()).item(), abs=EXACT)
    linear.is_on = False
    (row,) = (row for row in parameter_differences(a, adapted) if row.name == "blocks.0.attn.qkv.weight")
    assert row.difference == 0


def test_short_floats_against_long_ones() -> None:
    a = noisy(shape(), torch.float32)
    found = of(a, copy.deepcopy(a).bfloat16())
    assert found.residual_relative is not None and found.pattern_distance is not None
    assert 1e-4 < float(found.residual_relative.mean()) < 0.1 and 0 < float(found.kl_bits.mean()) < 0.5
    assert all(1e-4 < row.relative < 4e-3 for row in found.parameters)  # bfloat16 has 8 bits: at most 2**-8 off
    assert found.kl_bits.dtype == torch.float32


def test_models_of_different_shape() -> None:
    a = noisy(shape())
    deeper = of(a, noisy(shape(n_layer=4)))
    assert deeper.residual_relative is None and deeper.residual_cosine is None and deeper.pattern_distance is None
    wider = of(a, noisy(shape(width=24)))
    assert wider.residual_relative is None and wider.pattern_distance is not None  # as many heads
    fewer = of(a, noisy(shape(n_head=2)))
    assert fewer.residual_relative is not None and fewer.pattern_distance is None
    assert deeper.parameters and all(row.name != "token_embedding.weight" for row in wider.parameters)
    gated = of(a, noisy(shape(mlp="swiglu")))
    assert {row.name for row in gated.parameters} < {name for name, _ in a.named_parameters()}


def test_other_vocabularies_are_refused(tokenizer: Tokenizer) -> None:
    a = noisy(shape())
    with pytest.raises(UserError, match="they have 31 and 32 of them"):
        compare(a, noisy(shape(vocab_size=32)), torch.zeros(3, dtype=torch.long))
    check_tokenizers(tokenizer, tokenizer)
    other = Tokenizer.train(["other words, and other words again. "] * 9, 300)
    with pytest.raises(UserError, match=r"id \d+ is '.+' to one tokenizer and '.*' to the other"):
        check_tokenizers(tokenizer, other)
    shorter = Tokenizer.train([], 257)
    with pytest.raises(UserError, match="to the other"):
        check_tokenizers(tokenizer, shorter)


def test_the_same_vocabulary_in_two_kinds_of_file(shared: Path, tmp_path: Path) -> None:
    merges = Tokenizer.load(shared / "tokenizer")
    merges.save(tmp_path)
    check_tokenizers(merges, Tokenizer.load(tmp_path))


@pytest.mark.parametrize(("length", "k", "message"), [(0, 5, "got 0 tokens"), (3, 0, "k = 0"), (25, 5, "context is 24 tokens")])
def test_texts_that_cannot_be_compared(length: int, k: int, message: str) -> None:
    a = noisy(shape())
    with pytest.raises(UserError, match=message):
        compare(a, a, torch.zeros(length, dtype=torch.long), k)


def test_one_token() -> None:
    a = noisy(shape())
    found = compare(a, a, torch.zeros(1, dtype=torch.long), k=99)
    assert found.a.ids.shape == (1, 31) and found.a.surprises == [None] and found.kl_bits.tolist() == [0]


def test_rows_of_the_vocabulary_without_a_token_do_not_count() -> None:
    """One tokenizer, one model with more rows than tokens and one without: the same network says the same."""
    padded, ids = noisy(shape(tied_head=False)), tokens(shape(vocab_size=20), 1)[0]
    exactly = GPT(shape(tied_head=False, vocab_size=20)).double().eval()
    parameters = padded.state_dict()
    parameters |= {name: parameters[name][:20] for name in ("head.weight", "token_embedding.weight")}
    exactly.load_state_dict(parameters)
    found = compare(padded, exactly, ids, n_ids=20)
    assert float(found.kl_bits.abs().max()) < EXACT
    assert error(found.a.probabilities, found.b.probabilities) < EXACT
