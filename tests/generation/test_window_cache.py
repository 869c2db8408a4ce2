"""What a cache holds where layers see a window, and that text written through it is the text of whole forward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import disturbed, few_merges, random_ids

from glassgpt.config import ModelConfig
from glassgpt.config.generate import Sampling
from glassgpt.generation import KVCache, Token, complete, stream
from glassgpt.generation.cache import GROWTH, as_batch
from glassgpt.generation.generator import Generator
from glassgpt.model import GPT

TOKENIZER = few_merges()
WINDOW, T, B = 6, 40, 3
EXACT = 1e-10


def config(**changes: Any) -> ModelConfig:
    """A window, everything, a window; rope; four heads of queries on two of keys and values."""
    values: dict[str, Any] = {"position": "rope", "n_kv_head": 2, "spans": ("window", "full"), "window_tokens": WINDOW}
    return ModelConfig(TOKENIZER.vocab_size, T, 3, 4, 16, **values | changes)


@pytest.fixture(scope="module")
def model() -> GPT:
    return disturbed(config())


PER_POSITION = 2 * B * 2 * 4 * 8  # keys and values, rows, heads, numbers of a head, bytes


def sizes(cache: KVCache) -> list[int]:
    """Bytes of each layer's keys and values, as the allocator has them: of what they are views of, too."""
    pairs = list(zip(cache._k, cache._v, strict=True))
    assert all(k is not None and v is not None for k, v in pairs)
    return [k.untyped_storage().nbytes() + v.untyped_storage().nbytes() for k, v in pairs]  # type: ignore[union-attr]


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[2, 3, 1, 1, 1, 20, 1], [1] * 12, [T], [WINDOW, 1], [WINDOW - 1, 1, 1]])
def test_a_window_holds_no_more_than_the_window(model: GPT, pieces: list[int]) -> None:
    """To the byte, after every call; the full layer holds its context, which is below a block of growth."""
    assert T < GROWTH
    cache, done = KVCache(model.config), 0
    for size in pieces:
        model(random_ids(model.config, B, size), cache)
        done += size
        expected = [PER_POSITION * n for n in (min(done, WINDOW), T, min(done, WINDOW))]
        assert sizes(cache) == expected
        assert cache.nbytes == sum(expected)
        assert [cache.held(layer) for layer in range(3)] == [min(done, WINDOW - 1), done, min(done, WINDOW - 1)]
    assert cache.length == done


@torch.no_grad()
@pytest.mark.parametrize("span", ["full", "strided"])
def test_other_spans_hold_everything(span: Any) -> None:
    model = disturbed(config(spans=(span,), **({"window_tokens": None} if span == "full" else {})))
    cache = KVCache(model.config)
    model(random_ids(model.config, B, T), cache)
    assert sizes(cache) == [PER_POSITION * T] * 3


@torch.no_grad()
@pytest.mark.parametrize(("rows", "drop"), [([2, 0], 4), ([1], 0), ([0, 1, 2], 9), ([2, 2, 0, 1], 11)])
def test_keep_frees_rows_and_positions(model: GPT, rows: list[int], drop: int) -> None:
    """A window has its positions left, unless fewer are left in all; what it holds afterwards goes on as before."""
    cache, length = KVCache(model.config), 13
    ids = random_ids(model.config, B, length)
    model(ids, cache, torch.tensor([drop] * B) if drop else None)
    cache.keep(torch.tensor(rows), drop)
    left = length - drop
    assert cache.length == left
    per_row = PER_POSITION // B * len(rows)
    assert sizes(cache) == [per_row * n for n in (min(left, WINDOW - 1), left, min(left, WINDOW - 1))]
    more = random_ids(model.config, len(rows), 9, seed=5)
    found = torch.cat([model(part, cache) for part in more.split([1, 2, 6], dim=1)], dim=1)
    expected = model(torch.cat([ids[rows, drop:], more], dim=1))[:, left:]
    assert float((found - expected).abs().max()) < EXACT


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 2, 6, T - 1, T, T + 5])
@pytest.mark.parametrize("position", ["rope", "alibi", "relative", "learned"])
def test_windows_of_every_size_with_padding(window: int, position: Any) -> None:
    model = disturbed(config(position=position, window_tokens=window))
    lengths, more = (3, 20, 11), 8
    alone = [random_ids(model.config, n + more, seed=n) for n in lengths]
    ids, pad = as_batch([row[:n].tolist() for n, row in zip(lengths, alone, strict=True)], torch.device("cpu"))
    rest = torch.stack([row[-more:] for row in alone])
    cache = KVCache(model.config)
    found = torch.cat([model(part, cache, pad) for part in (ids, *rest.split([1, 1, 5, 1], dim=1))], dim=1)[:, -more:]
    for row, of in zip(alone, found, strict=True):
        assert float((of - model(row[None])[0, -more:]).abs().max()) < EXACT


# ---------------------------------------------------------------------- text

PROMPTS = ["the cat", "trà, the other mat", "7", "Một chú mèo"]
GREEDY = Sampling(temperature=0)


LENGTHS = (12, 5, 12, 8)


def written(model: GPT, sampling: Sampling) -> list[list[Token]]:
    """Rows of `LENGTHS` tokens, so that the batch shrinks and its padding with it."""
    rows: list[list[Token]] = [[] for _ in PROMPTS]
    generators = [Generator(row) for row in range(len(PROMPTS))]

    def ends(token: Token) -> bool:
        rows[token.row].append(token)
        return len(rows[token.row]) == LENGTHS[token.row]

    for _ in stream(model, [TOKENIZER.encode(prompt) for prompt in PROMPTS], sampling, generators, 12, ends):
        pass
    assert tuple(map(len, rows)) == LENGTHS
    return rows


@torch.no_grad()
def largest_error(model: GPT, rows: list[list[Token]], greedy: bool) -> float:
    """Log-probabilities against whole forward passes without a cache; greedy tokens must be the likeliest."""
    worst = 0.0
    for prompt, tokens in zip(PROMPTS, rows, strict=True):
        ids = TOKENIZER.encode(prompt)
        for token in tokens:
            log_p = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
            worst = max(worst, abs(float(log_p[token.id]) - token.logprob))
            if greedy:
                worst = max(worst, float(log_p.max() - log_p[token.id]))
            ids.append(token.id)
    return worst


@pytest.mark.parametrize("sampling", [GREEDY, Sampling()], ids=["greedy", "drawn"])
def test_text_through_the_cache_is_that_of_whole_passes(model: GPT, sampling: Sampling) -> None:
    """Four prompts of different length as one batch, whose rows end at different steps."""
    rows = written(model, sampling)
    assert max(len(TOKENIZER.encode(p)) + len(tokens) for p, tokens in zip(PROMPTS, rows, strict=True)) > 2 * WINDOW
    assert largest_error(model, rows, sampling is GREEDY) < EXACT


def test_a_cache_that_forgets_too_early_writes_another_text(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVCache, "held", lambda cache, layer: cache.length if layer == 1 else min(cache.length, WINDOW - 2))
    assert largest_error(model, written(model, GREEDY), greedy=True) > 1e-3


def test_complete_writes_the_same(model: GPT) -> None:
    for prompt in PROMPTS[:2]:
        (completion,) = complete(model, TOKENIZER, [prompt], GREEDY, max_new_tokens=12, seed=0, ignore_end=True)
        ids = TOKENIZER.encode(prompt)
        for token in completion.tokens:
            with torch.no_grad():
                assert token.id == int(model(torch.tensor([ids]))[0, -1, : TOKENIZER.vocab_size].argmax())
            ids.append(token.id)
        assert len(completion.tokens) == 12
