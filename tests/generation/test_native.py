"""The native engine: the network's logits over all that it has kernels for, and the same bits however its rows are put together.

Each check is a function of an instruction set, so that the last tests can run it on kernels that were made wrong on purpose.
"""

from __future__ import annotations

import copy
import functools
import gc
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from exact import noisy, shape, tokens
from tiny import few_merges, random_ids
from torch import Tensor, nn

from glassgpt.config import ModelConfig, UserError
from glassgpt.config.generate import Sampling
from glassgpt.config.model import MoeConfig, RopeConfig
from glassgpt.config.quantize import Recipe
from glassgpt.generation import Token, complete, stream
from glassgpt.generation.generator import Generator
from glassgpt.generation.native import NativeModel, Unavailable
from glassgpt.generation.runner import Scores
from glassgpt.model import GPT
from glassgpt.model.quantised import Codes, dequantised, put, round_to_nearest, targets

PAGE = 64
"""Positions that lie together in the engine's cache."""
TINY: dict[str, Any] = {"vocab_size": 131, "context_tokens": 2 * PAGE + 12, "width": 64, "n_layer": 2}
MODERN: dict[str, Any] = {
    "position": "rope",
    "norm": "rms",
    "mlp": "swiglu",
    "n_kv_head": 2,
    "bias": False,
    "qk_norm": True,
    "tied_head": False,
}
YARN = RopeConfig(scaling="yarn", factor=4.0, original_tokens=32)
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "modern": MODERN,
    "one head of keys": MODERN | {"n_kv_head": 1, "n_head": 8},
    "yarn": MODERN | {"rope": YARN},
    **{position: {"position": position} for position in ("alibi", "relative", "per_head", "sinusoidal", "none")},
    "window": {"spans": ("full", "window"), "window_tokens": 16},
    "a window of 1, rope": {"spans": ("window",), "window_tokens": 1, "position": "rope"},
    "strided": {"spans": ("strided", "window"), "window_tokens": 8, "position": "alibi"},
    "capped": {"logit_cap": 5.0, "mlp": "relu2", "embedding_norm": True, "attention_scale": 0.7, "attention_width": 32},
    "bias of queries alone": MODERN | {"qkv_bias": True, "norm": "layer", "mlp_width": 72},
    "odd": {"width": 39, "n_head": 3, "vocab_size": 77, "mlp_width": 50},
    "odd heads": {"width": 15, "n_head": 5, "n_kv_head": 1, "vocab_size": 64, "mlp_width": 1, "n_layer": 1},
    "wide heads": {"n_head": 1, "attention_width": 80, "vocab_size": 1},
}

# ---------------------------------------------------------------------- the engine under test


@functools.cache
def model_of(name: str = "plain", **changes: Any) -> GPT:
    return noisy(shape(**{**TINY, **SHAPES[name], **changes}), torch.float32, 0.1).eval()


def packed(
    model: GPT, kernels: str, precision: str = "float32", cache: str = "auto", activations: int = 16, threads: int = 1
) -> NativeModel:
    options: dict[str, Any] = {"precision": precision, "cache": cache, "activations": activations, "threads": threads}
    return NativeModel(model, kernels=kernels, **options)


def whole(native: NativeModel, ids: Tensor) -> Tensor:
    """Logits (B, T, V) of texts (B, T) by one pass."""
    scores = native.start().feed(ids.tolist(), every=True)
    return scores.logits.view(*ids.shape, -1).clone()


# ---------------------------------------------------------------------- the numbers


def rounded(x: Tensor, precision: str, activations: int) -> Tensor:
    """What matrices read, each row (..., K) as the engine rounds it."""
    if precision == "float32":
        return x
    if precision == "bfloat16":
        return x.bfloat16().to(x.dtype)
    steps = 127 if activations == 8 else 127 * 128 + 63  # 16 bits are two bytes, of which the low one goes from -64 to 63
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / steps
    return (x / scale).round() * scale


def quantised(model: GPT, bits: int, group: int | None, exact_names: Sequence[str] = ()) -> GPT:
    """A copy whose matrices, but those of `exact_names`, are quantised."""
    model = copy.deepcopy(model)
    weights = {name: module.get_parameter("weight") for name, module in targets(model).items() if name not in exact_names}
    codes = {
        name: round_to_nearest(weight, bits, group if weight.size(1) % (group or 1) == 0 else None)
        for name, weight in weights.items()
    }
    return put(model, codes, Recipe(dict.fromkeys(codes, bits), group))


@torch.no_grad()
def oracle(model: GPT, precision: str, activations: int) -> GPT:
    """The network in float64 with the engine's matrices, which round what they read as the engine does."""
    if precision.startswith("int"):
        plain = dequantised(quantised(model, int(precision[3:]), 32 if precision == "int4" else None))
    else:
        plain = copy.deepcopy(model)
    plain = plain.double()
    for module in plain.modules():
        if isinstance(module, nn.Linear | nn.Embedding) and precision == "bfloat16":
            module.weight.copy_(module.weight.bfloat16())
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, given: (rounded(given[0], precision, activations),))
    return plain


@functools.cache
def expected(name: str, precision: str = "float32", activations: int = 16) -> Tensor:
    model = oracle(model_of(name), precision, activations)
    with torch.no_grad():
        return model(tokens(model.config))


def difference(found: Tensor, want: Tensor) -> float:
    """The largest, over the largest logit where that is above 1."""
    assert found.shape == want.shape and found.dtype == torch.float32
    return float((found - want).abs().max() / want.abs().max().clamp(min=1))


def check_numbers(kernels: str, name: str = "plain") -> None:
    """Every format of matrices, keys and values in float32: but for single roundings that fall the other way, float32's error.

    Rounding to 16 bits is so fine that some of a row's numbers always fall the other way.
    """
    ids = tokens(model_of(name).config)
    for precision, activations in (("bfloat16", 16), ("int8", 16), ("int8", 8), ("int4", 16), ("int4", 8)):
        want = expected(name, precision, activations)
        found = whole(packed(model_of(name), kernels, precision, "float32", activations), ids)
        errors = (found - want).abs().amax(-1).flatten() / want.abs().max().clamp(min=1)
        fine = precision != "bfloat16" and activations == 16
        assert errors.median() < (2e-4 if fine else 1e-6), (precision, activations)
        assert errors.max() < (1e-3 if fine else 3e-2), (precision, activations)


def check_cache(kernels: str, name: str = "plain") -> None:
    """Keys and values in fewer bits."""
    ids = tokens(model_of(name).config)
    for precision, cache, middle, most in (
        ("float32", "bfloat16", 5e-3, 1e-2),
        ("float32", "int8", 1e-2, 2e-2),
        ("bfloat16", "int8", 1e-2, 3e-2),
        ("int8", "int8", 1e-2, 2e-2),
        ("int4", "bfloat16", 5e-3, 1e-2),
    ):
        want = expected(name, precision)
        errors = (whole(packed(model_of(name), kernels, precision, cache), ids) - want).abs().amax(-1) / want.abs().max()
        assert errors.median() < middle and errors.max() < most, (precision, cache)


def check_shape(kernels: str, name: str) -> None:
    """In float32, by one pass, and one token at a time from the second on; then with coded matrices."""
    ids = tokens(model_of(name).config)
    native = packed(model_of(name), kernels)
    assert difference(whole(native, ids), expected(name)) < 1e-5
    runner = native.start()
    steps = [runner.feed(row.tolist()).logits.clone() for row in ids.T.unsqueeze(2)]
    assert difference(torch.stack(steps, dim=1), expected(name)) < 1e-5
    assert difference(whole(packed(model_of(name), kernels, "int8", "float32"), ids), expected(name, "int8")) < 1e-3


def test_every_format(kernels: str) -> None:
    check_numbers(kernels)
    check_numbers(kernels, "modern")
    check_numbers(kernels, "odd")


def test_every_cache(kernels: str) -> None:
    check_cache(kernels)
    check_cache(kernels, "modern")
    check_cache(kernels, "odd")


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape(kernels: str, name: str) -> None:
    check_shape(kernels, name)


def test_a_real_vocabulary(kernels: str) -> None:
    model = noisy(shape(vocab_size=50257, width=16, n_layer=1), torch.float32, 0.3)
    ids = tokens(model.config, 2, 5)
    with torch.no_grad():
        want = copy.deepcopy(model).double()(ids)
    for precision, most in (("float32", 1e-5), ("int8", 2e-2)):
        scores = packed(model, kernels, precision).start().feed(ids.tolist(), every=True)
        assert difference(scores.logits.view_as(want), want) < most
        check_scores(scores)


def check_stored(kernels: str) -> None:
    """A model that is quantised already goes in as it is: other groups, negative scales, some matrices left in floats."""
    model = model_of(width=128, mlp_width=192)
    ids = tokens(model.config)
    for bits, group in ((8, None), (8, 32), (8, 64), (4, None), (4, 32), (4, 64), (4, 8)):
        stored = quantised(model, bits, group, exact_names=("blocks.1.mlp.down",))
        codes: Codes = stored.blocks[0].mlp.up.quantised
        assert codes.scales.size(1) == (1 if group is None else 128 // group)
        assert (bits == 4) == bool((codes.scales < 0).any())
        with torch.no_grad():
            want = dequantised(stored).double()(ids)
        native = packed(stored, kernels, "as-is", "float32")
        assert native.precision == f"int{bits}"
        assert difference(whole(native, ids), want) < 1e-3, (bits, group)
        assert torch.equal(
            whole(packed(stored, kernels, "float32", "float32"), ids), whole(native, ids)
        )  # for the matrix in floats


def test_quantised_models(kernels: str) -> None:
    check_stored(kernels)


def test_groups_that_do_not_fit(portable: str) -> None:
    with pytest.raises(Unavailable, match="groups of a multiple of 8; the model has 4"):
        packed(quantised(model_of(), 8, 4), portable, "as-is")


def test_a_model_in_bfloat16(portable: str) -> None:
    """As it is, without being named."""
    model = copy.deepcopy(model_of()).bfloat16()
    native = NativeModel(model, kernels=portable)
    assert (native.precision, native.cache) == ("bfloat16", "bfloat16")
    ids = tokens(model.config)
    with torch.no_grad():
        want = copy.deepcopy(model).double()(ids)
    assert difference(whole(native, ids), want) < 2e-2


# ---------------------------------------------------------------------- the same bits

FORMATS = [
    ("float32", "float32", 16),
    ("bfloat16", "bfloat16", 16),
    ("int8", "int8", 16),
    ("int8", "bfloat16", 8),
    ("int4", "float32", 16),
    ("int4", "int8", 8),
]


def check_bits(kernels: str, name: str = "modern") -> None:
    """A text alone, read by one thread in one pass, has the bits it has in any batch, in any pieces, by any number of threads."""
    model = model_of(name)
    ids = tokens(model.config, 5, 108)  # 540 tokens: more than the 512 that go through the layers together
    for format_ in FORMATS:
        native = packed(model, kernels, *format_)
        want = torch.stack([whole(native, text[None])[0] for text in ids])
        assert torch.equal(whole(native, ids), want), format_
        for threads in (2, 5):
            several = packed(model, kernels, *format_, threads=threads)
            assert torch.equal(whole(several, ids.flip(0)).flip(0), want), (format_, threads)
        for pieces in ([1] * 12, [63, 1, 1, 3, 4, 5], [7, 70, 2, 2]):
            for used, rows in ((native, [2]), (several, [0, 4, 1])):
                runner, at = used.start(), 0
                for size in pieces:
                    logits = runner.feed(ids[rows, at : at + size].tolist(), every=True).logits
                    assert torch.equal(logits, want[rows, at : at + size].flatten(0, 1)), (format_, pieces, rows)
                    at += size


def test_the_same_bits(kernels: str) -> None:
    check_bits(kernels)


def test_texts_of_different_length(kernels: str) -> None:
    """Side by side, some with nothing to add; logits of the last tokens alone are the same as of all."""
    native, ids = packed(model_of(), kernels, threads=2), tokens(model_of().config, 4)
    want = whole(native, ids)
    runner = native.start()
    lengths = [0, 0, 0, 0]
    for counts in ([1, 9, 64, 130], [1, 0, 3, 1], [0, 70, 0, 0], [5, 1, 0, 9]):
        fed = [text[done : done + n].tolist() for text, done, n in zip(ids, lengths, counts, strict=True)]
        lengths = [done + n for done, n in zip(lengths, counts, strict=True)]
        scores = runner.feed(fed)
        assert runner.lengths == lengths
        assert torch.equal(scores.logits, torch.stack([want[i, lengths[i] - 1] for i in range(4) if counts[i]]))


def test_a_long_prompt(kernels: str) -> None:
    """Cut into parts of 512 tokens by the engine, it ends as one that is read in other pieces."""
    model = model_of(context_tokens=700, width=16, vocab_size=33)
    native = packed(model, kernels, "int8")
    (text,) = tokens(model.config, 1).tolist()
    want = whole(native, torch.tensor([text]))[0]
    for pieces in ([690, 9, 1], [100, 500, 100], [511, 1, 1, 187]):
        runner, at = native.start(), 0
        for size in pieces:
            at += size
            assert torch.equal(runner.feed([text[at - size : at]]).logits[0], want[at - 1])


# ---------------------------------------------------------------------- rows that are copied, dropped, cut


def pages(native: NativeModel) -> int:
    """Pages of keys and values that are held."""
    model, unit = native.config, {"float32": 4, "bfloat16": 2}[native.cache]
    wide = -(-model.head_width // 16) * 16
    page = model.n_layer * model.kv_heads * PAGE * unit * (-(-model.head_width // 4) * 4 + wide)
    count, rest = divmod(native.lib.glass_cache_bytes(native.engine), page)
    assert rest == 0
    return count


def fresh(native: NativeModel, text: Sequence[int]) -> Tensor:
    """Logits (V,) after the last token of a text that is read anew."""
    return native.start().feed([list(text)]).logits[0].clone()


def check_copies(kernels: str) -> None:
    """Copies share the pages of what they have in common; what one goes on to write, no other sees."""
    native = packed(model_of(), kernels)
    text = tokens(native.config, 1)[0].tolist()
    runner = native.start()
    runner.feed([text[:100], text[:30]])
    assert pages(native) == 2 + 1
    runner.fork([0, 0, 1, 0])
    assert (pages(native), runner.lengths) == (3, [100, 100, 30, 100])
    rows = [text[:100], text[:100], text[:30], text[:100]]
    for step in range(3):
        new = [[(7 * row + step) % 131] for row in range(4)]
        rows = [row + token for row, token in zip(rows, new, strict=True)]
        logits = runner.feed(new).logits
        assert torch.equal(logits, torch.stack([fresh(native, row) for row in rows]))
    assert pages(native) == 1 + 3 + 1  # the full page is shared
    runner.keep([3, 1])
    assert (pages(native), runner.lengths) == (3, [103, 103])
    logits = runner.feed([[5], [6]]).logits
    assert torch.equal(logits, torch.stack([fresh(native, rows[3] + [5]), fresh(native, rows[1] + [6])]))
    runner.close()
    assert pages(native) == 0


def check_rewind(kernels: str) -> None:
    """Cut to any length and gone on with otherwise: a fresh text's bits; a copy that was made before keeps what is cut."""
    native = packed(model_of("modern"), kernels, "int8")
    one, other = tokens(native.config, 2, 130, seed=5).tolist()
    runner = native.start()
    runner.feed([one])
    runner.fork([0, 0])
    for length in (129, 128, 127, 65, 64, 63, 1, 0):
        runner.rewind([length, 130])
        assert runner.lengths == [length, 130]
        new = other[length : length + 5]
        assert torch.equal(runner.feed([new, []]).logits[0], fresh(native, one[:length] + new))
        runner.rewind([length, 130])
        runner.feed([one[length:130], []])
    assert torch.equal(runner.feed([[3], [3]]).logits, fresh(native, [*one, 3]).expand(2, -1))


def test_copies(kernels: str) -> None:
    check_copies(kernels)


def test_rewinding(kernels: str) -> None:
    check_rewind(kernels)


def test_two_texts_with_one_model(portable: str) -> None:
    """Runners do not see one another; closing one leaves the other; memory is given back when one is forgotten."""
    native = packed(model_of(), portable)
    text = tokens(native.config, 1)[0].tolist()
    one, two = native.start(), native.start()
    one.feed([text[:70]])
    two.feed([text[:9], text[:5]])
    one.close()
    assert torch.equal(two.feed([text[9:10], text[5:6]]).logits[0], fresh(native, text[:10]))
    assert pages(native) == 2
    del two
    assert pages(native) == 0


# ---------------------------------------------------------------------- the likeliest, and the sum


def check_scores(scores: Scores) -> None:
    rows = scores.logits.tolist()
    assert scores.best == [row.index(max(row)) for row in rows]
    assert torch.allclose(torch.tensor(scores.log_total).double(), scores.logits.double().logsumexp(-1), rtol=0, atol=1e-5)


def check_best(kernels: str) -> None:
    """The first of equals, among all or the first `n_ids`, over a vocabulary that is looked through in blocks of 4096."""
    model = copy.deepcopy(model_of(vocab_size=9000, width=16, n_layer=1))
    with torch.no_grad():
        weight = model.token_embedding.weight
        weight *= 8
        for first in (1500, 3000, 4500, 6000, 7500):
            weight[first : first + 1500] = weight[:1500]  # each logit six times
    ids = tokens(model.config, 2, 20)
    for threads in (1, 3):
        native = packed(model, kernels, threads=threads)
        want = whole(native, ids)
        assert max(want.argmax(-1).flatten().tolist()) < 1500 or not torch.equal(want[..., :1500], want[..., 7500:])
        for n_ids in (9000, 8999, 4097, 4096, 1501, 64, 5, 1):
            scores = native.start(n_ids).feed(ids.tolist(), every=True)
            assert torch.equal(scores.logits, want.flatten(0, 1)[:, :n_ids])
            check_scores(scores)


def test_best_and_total(kernels: str) -> None:
    check_best(kernels)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("place", ["norm_f", "blocks.0.mlp.up", "token_embedding"])
def test_weights_that_are_no_numbers(kernels: str, precision: str, place: str) -> None:
    """Are seen in the sum, and said to the user, whether the likeliest or any token is taken."""
    model = copy.deepcopy(model_of(tied_head=False))
    with torch.no_grad():
        getattr(model.get_submodule(place), "bias" if place.endswith("up") else "weight").view(-1)[0] = torch.nan
    if precision == "int8" and place == "token_embedding":
        with pytest.raises(UserError, match="not finite; it cannot be quantised"):
            packed(model, kernels, precision)
        return
    native = packed(model, kernels, precision, threads=2)
    scores = native.start().feed([[0, 1]])
    assert all(map(math.isnan, scores.log_total))
    assert 0 <= scores.best[0] < native.config.vocab_size
    for sampling in (Sampling(temperature=0), Sampling(), Sampling(repetition_penalty=1.2)):
        with pytest.raises(UserError, match="the model's logits are not numbers"):
            list(stream(native, [[0]], sampling, [Generator()], 3))


def test_one_logit_that_is_no_number(portable: str) -> None:
    """Counts only where it can be drawn."""
    model = copy.deepcopy(model_of(tied_head=False))
    with torch.no_grad():
        model.head.weight[100, 0] = torch.nan
    native = packed(model, portable)
    assert math.isnan(native.start().feed([[1]]).log_total[0])
    check_scores(native.start(100).feed([[1]]))


# ---------------------------------------------------------------------- texts


def written(model: GPT | NativeModel, prompts: list[list[int]], sampling: Sampling, **options: Any) -> list[Token]:
    generators = [Generator(seed) for seed in range(len(prompts))]
    return list(stream(model, prompts, sampling, generators, 25, **options))


def check_texts(kernels: str) -> None:
    """The plain runner's tokens, and its log-probabilities: greedy and drawn, with penalties, ends, and fewer ids than logits."""
    config = shape(vocab_size=131, context_tokens=40, qk_norm=True)
    model = noisy(config, torch.float32)
    native = packed(model, kernels, threads=2)
    prompts = [(random_ids(config, n, seed=n) % 100).tolist() for n in (9, 2, 30, 9, 9)]
    for sampling in (
        Sampling(temperature=0),
        Sampling(),
        Sampling(temperature=0.8, top_k=20, top_p=0.9),
        Sampling(temperature=0, repetition_penalty=1.3),
        Sampling(presence_penalty=0.5, frequency_penalty=0.3),
    ):
        for options in ({"n_top": 3}, {"n_ids": 100, "n_top": 2}, {"ends": lambda token: token.id % 7 == 0}):
            plain, found = written(model, prompts, sampling, **options), written(native, prompts, sampling, **options)
            assert [(token.row, token.id) for token in found] == [(token.row, token.id) for token in plain]
            for one, other in zip(found, plain, strict=True):
                assert abs(one.logprob - other.logprob) < 1e-5
                assert [token_id for token_id, _ in one.top] == [token_id for token_id, _ in other.top]
                assert all(abs(a - b) < 1e-5 for (_, a), (_, b) in zip(one.top, other.top, strict=True))
    assert pages(native) == 0  # nothing is left behind


def test_texts(kernels: str) -> None:
    check_texts(kernels)


def test_stop_texts(portable: str) -> None:
    tokenizer = few_merges()
    model = noisy(ModelConfig(tokenizer.vocab_size, context_tokens=60, n_layer=2, n_head=2, width=16), torch.float32)
    native = packed(model, portable)
    prompts = ["the cat", "Một chú mèo", "the cat"]
    (plain, *_) = complete(model, tokenizer, prompts, Sampling(), max_new_tokens=40, seed=3)
    stop = plain.text[8:10]
    results = [complete(one, tokenizer, prompts, Sampling(), max_new_tokens=40, seed=3, stop=[stop]) for one in (model, native)]
    assert "stop" in [completion.finish_reason for completion in results[0]]
    assert [(c.text, c.finish_reason) for c in results[1]] == [(c.text, c.finish_reason) for c in results[0]]


def test_up_and_gate_must_be_stored_alike(portable: str) -> None:
    """They read the same rows, made ready once; kept in floats one of them would read the other's codes."""
    for kept in ("gate", "up"):
        model = quantised(copy.deepcopy(model_of("modern")), 8, None, exact_names=(f"blocks.1.mlp.{kept}",))
        before = model.blocks[0].attn.qkv.quantised.codes.clone()
        with pytest.raises(Unavailable, match="up and gate"):
            NativeModel(model, kernels=portable, release=True)
        assert torch.equal(model.blocks[0].attn.qkv.quantised.codes, before)  # nothing was given back before it was known


def test_a_closed_runner_starts_afresh(portable: str) -> None:
    runner = packed(model_of(), portable).start()
    want = runner.feed([[1]]).logits.clone()
    runner.close()
    assert torch.equal(runner.feed([[1]]).logits, want)


def test_a_runner_may_outlive_its_engine(portable: str) -> None:
    """In a cycle Python ends the engine first."""

    class Holder:
        pass

    holder: Any = Holder()
    holder.model, holder.me = packed(model_of(), portable), holder
    holder.runner = holder.model.start()
    holder.runner.feed([[1, 2, 3]])
    finalizer = holder.model.finalizer
    del holder
    gc.collect()
    assert not finalizer.alive


@pytest.mark.parametrize(("name", "value"), [("cache", "int4"), ("precision", "int3"), ("activations", 4)])
def test_what_is_no_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{name} must be one of"):
        NativeModel(model_of(), **{name: value})


def test_memory_is_released(portable: str) -> None:
    """With `release` the model's own weights are given up on the way; what was packed is the same."""
    model = copy.deepcopy(model_of(vocab_size=5000))
    ids = tokens(model.config, 1)
    want = whole(packed(model, portable), ids)
    native = NativeModel(model, kernels=portable, threads=1, release=True)
    assert torch.equal(whole(native, ids), want)
    assert not torch.equal(model.token_embedding.weight, model_of(vocab_size=5000).token_embedding.weight)


# ---------------------------------------------------------------------- what it does not do


def test_what_it_cannot_do_is_said(portable: str) -> None:
    with pytest.raises(Unavailable, match="no mixtures of experts"):
        packed(noisy(shape(moe=MoeConfig(experts=2, top_k=1)), torch.float32), portable)
    for dtype in (torch.float64, torch.float16):
        with pytest.raises(Unavailable, match=f"does not compute in {str(dtype)[6:]}"):
            NativeModel(copy.deepcopy(model_of()).to(dtype))
    model = copy.deepcopy(model_of())

    class Other(nn.Linear):
        """Such as an adapter beside a matrix."""

    model.blocks[1].mlp.up = Other(64, 256)
    with pytest.raises(Unavailable, match="does not compute Other; merge adapters first"):
        NativeModel(model)
    with pytest.raises(UserError, match=f"no kernels sse9 for this machine; there are: .*{portable}"):
        NativeModel(model_of(), kernels="sse9")
    runner = packed(model_of(), portable).start()
    with pytest.raises(UserError, match="context is 140 tokens; got 141"):
        runner.feed([[1] * 141])
    runner.feed([[1] * 140])
    with pytest.raises(UserError, match="context is 140 tokens; got 141"):
        runner.feed([[1]])
    runner.rewind([139])
    with pytest.raises(RuntimeError, match="token 131 is not in the vocabulary of 131"):
        runner.feed([[131]])
    with pytest.raises(RuntimeError, match="a sequence of 139 cannot be cut to 140"):
        runner.rewind([140])


# ---------------------------------------------------------------------- kernels that are wrong on purpose

ALIBI, MODEL, WINDOW, PLAIN = (functools.partial(check_shape, name=name) for name in ("alibi", "modern", "window", "plain"))
MUTANTS: dict[str, tuple[str, str, str, Callable[[str], None]]] = {
    "zero point 127": ("simd.h", "& 255) - 128)", "& 255) - 127)", check_numbers),
    "high byte times 127": ("kernels.cpp", "all(128.0f), to_float(sum[2 * r", "all(127.0f), to_float(sum[2 * r", check_numbers),
    "short floats cut off": ("kernels.h", "bits + 0x7fff + ((bits >> 16) & 1)", "bits", check_numbers),
    "scale of another column": ("kernels.cpp", "2 * (column + c * L)", "2 * (c * L)", check_numbers),
    "halves of bytes changed": (
        "matrix.cpp",
        "small(n, k) | small(n, k + 4) << 4",
        "small(n, k + 4) | small(n, k) << 4",
        check_numbers,
    ),
    "row with another scale": ("engine.cpp", "to.scale.data() + r,", "to.scale.data() + r / 2,", check_numbers),
    "a column's first scale": ("matrix.cpp", "row_scales[n * groups + g]", "row_scales[n * groups]", check_stored),
    "a key that is to come": ("kernels.cpp", "int i = query.position + 1; i < end", "int i = query.position + 2; i < end", PLAIN),
    "a window too wide": ("engine.cpp", "position - window + 1", "position - window", WINDOW),
    "distances from the other end": ("kernels.cpp", "query.bias[query.position - i]", "query.bias[i]", ALIBI),
    "turned the other way": ("engine.cpp", "a * cosine[i] - b * sine[i]", "a * cosine[i] + b * sine[i]", MODEL),
    "heads in another order": ("engine.cpp", "h = g * per_head + i % per_head", "h = g + shape.kv_heads * (i % per_head)", MODEL),
    "scales of keys for values": (
        "kernels.cpp",
        "[page] + cache.value_scale_offset",
        "[page] + cache.key_scale_offset",
        check_cache,
    ),
    "a copy writes into the shared page": ("cache.h", "use_count() > 1", "use_count() > 99", check_copies),
    "a cut drops the last page": ("cache.h", "(positions + kPage - 1) / kPage", "positions / kPage", check_rewind),
    "many rows read another's inputs": (
        "kernels.cpp",
        "tile(p, column, rows, first + row,",
        "tile(p, column, rows, first,",
        check_bits,
    ),
    "all are taken for strangers": (
        "engine.cpp",
        "strangers = different.insert(token.sequence).second",
        "strangers = true",
        check_bits,
    ),
    "a page is cut too short": (
        "kernels.cpp",
        "? last + 1 - page * kPage : kPage",
        "? last - page * kPage : kPage",
        PLAIN,
    ),
    "a panel that nobody makes": (
        "team.h",
        "while (first(seen) < last(seen))",
        "while (first(seen) + 1 < last(seen))",
        check_bits,
    ),
    "the last of equals": ("engine.cpp", "row[b].maximum > top->maximum", "row[b].maximum >= top->maximum", check_best),
    "sums of blocks as they are": ("engine.cpp", "std::exp(row[b].maximum - top->maximum)", "1.0f", check_best),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_kernels_are_noticed(name: str, noticed: Callable[..., None]) -> None:
    noticed(*MUTANTS[name])
