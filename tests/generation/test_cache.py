"""The key/value cache changes nothing but the time: with it, without it, in a padded batch, the logits are the same."""

from __future__ import annotations

import pytest
import torch
from tiny import disturbed, random_ids
from torch import Tensor

from glassgpt.config import ModelConfig, UserError
from glassgpt.generation import KVCache
from glassgpt.generation.cache import GROWTH, as_batch
from glassgpt.model import GPT, fused, plain, use_attention
from glassgpt.model.attention import Attend

CONFIG = ModelConfig(vocab_size=61, context_tokens=300, n_layer=2, n_head=2, width=16)
EXACT = 1e-10
LENGTHS = (9, 30, 1, 17, 30)

both = pytest.mark.parametrize("attend", [plain, fused])


@pytest.fixture(scope="module")
def model() -> GPT:
    return disturbed(CONFIG)


def in_pieces(model: GPT, ids: Tensor, sizes: list[int], cache: KVCache, pad: Tensor | None = None) -> Tensor:
    """Logits of ids (B, T) fed through a cache, so many tokens at a time."""
    assert sum(sizes) == ids.size(1)
    with torch.no_grad():
        return torch.cat([model(piece, cache, pad) for piece in ids.split(sizes, dim=1)], dim=1)


def error(a: Tensor, b: Tensor) -> float:
    assert a.dtype == b.dtype == torch.float64
    return float((a - b).abs().max())


@both
@pytest.mark.parametrize(
    "sizes",
    [[1] * 280, [5, 1, 7, 115, 1, 2, 130, 19], [128, 1, 151], [127, 2, 127, 2, 22], [280]],
    ids=["token by token", "chunks", "at a block's end", "across a block's end", "at once"],
)
def test_cached_is_uncached(model: GPT, attend: Attend, sizes: list[int]) -> None:
    """However a text is cut into calls, also where the cache grows (at 128 and 256), the logits are those of one."""
    use_attention(model, attend)
    ids = random_ids(CONFIG, 3, 280)
    with torch.no_grad():
        expected = model(ids)
    assert error(in_pieces(model, ids, sizes, KVCache(CONFIG)), expected) < EXACT


@both
@pytest.mark.parametrize("sizes", [[49], [30, *[1] * 19], [30, 4, 1, 14]], ids=["no cache", "token by token", "chunks"])
def test_padded_batch_is_each_row_alone(model: GPT, attend: Attend, sizes: list[int]) -> None:
    """Rows of different length, padded on the left, then continued together, have the logits that each has alone."""
    use_attention(model, attend)
    alone = [random_ids(CONFIG, n + 19, seed=n) for n in LENGTHS]
    prompts, pad = as_batch([row[:n].tolist() for n, row in zip(LENGTHS, alone, strict=True)], torch.device("cpu"))
    assert pad is not None
    assert pad.tolist() == [21, 0, 29, 13, 0]
    ids = torch.cat([prompts, torch.stack([row[-19:] for row in alone])], dim=1)
    with torch.no_grad():
        together = model(ids, None, pad) if sizes == [49] else in_pieces(model, ids, sizes, KVCache(CONFIG), pad)
        for row, n in zip(range(len(LENGTHS)), pad.tolist(), strict=True):
            assert error(together[row, n:], model(alone[row][None])[0]) < EXACT


@pytest.mark.parametrize("off", [1, -1])
def test_a_wrong_pad_is_noticed(model: GPT, off: int) -> None:
    """The test above can fail: padding counted wrong by one moves the logits, with a cache and without."""
    row = random_ids(CONFIG, 12)
    ids, pad = as_batch([row.tolist(), [1] * 20], torch.device("cpu"))
    assert pad is not None
    wrong = pad + torch.tensor([off, 0])
    with torch.no_grad():
        expected = model(row[None])[0]
        assert error(model(ids, None, pad)[0, 8:], expected) < EXACT
        assert error(model(ids, None, wrong)[0, 8:], expected) > 1e-6
        assert error(in_pieces(model, ids, [10, 4, 1, 5], KVCache(CONFIG), wrong)[0, 8:], expected) > 1e-6


@both
def test_what_stands_in_the_padding_does_not_matter(model: GPT, attend: Attend) -> None:
    use_attention(model, attend)
    ids, pad = as_batch([[5, 6, 7], [1] * 9], torch.device("cpu"))
    other = ids.clone()
    other[0, :6] = random_ids(CONFIG, 6)
    with torch.no_grad():
        assert error(model(ids, None, pad)[0, 6:], model(other, None, pad)[0, 6:]) < EXACT


def test_equal_lengths_need_no_padding() -> None:
    ids, pad = as_batch([[1, 2], [3, 4]], torch.device("cpu"))
    assert ids.tolist() == [[1, 2], [3, 4]]
    assert pad is None


@both
@pytest.mark.parametrize(("rows", "drop"), [([2, 0], 5), ([0], 13), ([2], 5), ([0, 1, 2], 0), ([2, 2], 0)])
def test_keep(model: GPT, attend: Attend, rows: list[int], drop: int) -> None:
    """Rows that stay, in any order and without padding that is common to them, go on as they would alone."""
    use_attention(model, attend)
    lengths, more = (7, 20, 15), 120  # so many that the cache grows again after `keep`
    alone = [random_ids(CONFIG, n + more, seed=n) for n in lengths]
    ids, pad = as_batch([row[:n].tolist() for n, row in zip(lengths, alone, strict=True)], torch.device("cpu"))
    assert pad is not None
    cache = KVCache(CONFIG)
    with torch.no_grad():
        model(ids, cache, pad)
        cache.keep(torch.tensor(rows), drop)
        assert cache.length == 20 - drop
        rest = torch.stack([alone[row][-more:] for row in rows])
        logits = in_pieces(model, rest, [1, 1, 3, 115], cache, pad[rows] - drop)
        for place, row in enumerate(rows):
            assert error(logits[place], model(alone[row][None])[0, -more:]) < EXACT


def test_nbytes_counts_what_is_held(model: GPT) -> None:
    """2 (keys, values) * layers * rows * positions * width * 8 bytes; positions come in blocks, up to the context."""
    cache = KVCache(CONFIG)
    assert cache.nbytes == 0
    per_position = 2 * CONFIG.n_layer * 3 * CONFIG.width * 8
    steps = [(5, GROWTH), (123, GROWTH), (1, 2 * GROWTH), (128, 300), (43, 300)]  # (tokens fed, positions held after)
    for tokens, positions in steps:
        with torch.no_grad():
            model(random_ids(CONFIG, 3, tokens), cache)
        assert cache.nbytes == per_position * positions
    assert cache.length == 300
    cache.keep(torch.tensor([1]), drop=50)
    assert cache.nbytes == per_position // 3 * 250


def test_a_full_cache_says_both_numbers(model: GPT) -> None:
    cache = KVCache(CONFIG)
    with torch.no_grad():
        model(random_ids(CONFIG, 1, 299), cache)
        with pytest.raises(UserError, match="context is 300 tokens; got 301"):
            model(random_ids(CONFIG, 1, 2), cache)
        model(random_ids(CONFIG, 1, 1), cache)  # a refused call leaves the cache as it was


def test_two_texts_share_one_model(model: GPT) -> None:
    """State is passed in: two caches used in turn do not disturb each other."""
    first, second = random_ids(CONFIG, 1, 12, seed=3), random_ids(CONFIG, 1, 12, seed=4)
    caches = KVCache(CONFIG), KVCache(CONFIG)
    with torch.no_grad():
        in_turn = [(model(first[:, t : t + 1], caches[0]), model(second[:, t : t + 1], caches[1])) for t in range(12)]
        assert error(torch.cat([one for one, _ in in_turn], 1), model(first)) < EXACT
        assert error(torch.cat([two for _, two in in_turn], 1), model(second)) < EXACT
