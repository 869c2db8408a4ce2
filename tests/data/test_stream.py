"""Batches as a pure function of seed, step, micro-batch and rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glassgpt.config import UserError
from glassgpt.data import Batch, InOrder, Stream, Windows
from glassgpt.data.stream import PERIOD, _turns, apart

T = 8
# Ids that tell where they come from: two arrays of consecutive numbers, and one too short for a window.
ARRAYS: list[np.ndarray] = [np.arange(203, dtype=np.uint16), np.arange(5), np.arange(1000, 1117, dtype=np.uint16)]


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.ids, b.ids) and torch.equal(a.targets, b.targets)


def single(batch_size: int = 1, accumulation_steps: int = 1, world: int = 1, seed: int = 0) -> Stream:
    """A stream of one domain."""
    return Stream([Windows(ARRAYS, T, (seed,))], [1.0], batch_size, accumulation_steps, world)


def epoch_starts(stream: Stream, epoch: int) -> list[int]:
    """First id of every window of an epoch, in order."""
    length = len(stream.domains[0])
    return [int(stream.batch(step).ids[0, 0]) for step in range(epoch * length, (epoch + 1) * length)]


# ---------------------------------------------------------------------- one domain


def test_a_batch_is_a_pure_function() -> None:
    stream = single(batch_size=3, accumulation_steps=2, seed=5)
    first = stream.batch(4, 1)
    for step in range(100):  # many epochs in between
        stream.batch(step)
    assert same(stream.batch(4, 1), first)
    assert same(single(batch_size=3, accumulation_steps=2, seed=5).batch(4, 1), first)
    assert not same(stream.batch(4, 0), first)
    assert not same(single(batch_size=3, accumulation_steps=2, seed=6).batch(4, 1), first)


def test_targets_are_the_next_ids_of_one_array() -> None:
    stream = single(batch_size=4)
    for step in range(30):
        batch = stream.batch(step)
        assert batch.ids.shape == batch.targets.shape == (4, T)
        assert batch.ids.dtype == batch.targets.dtype == torch.int64
        assert batch.count == 4 * T
        assert torch.equal(batch.targets, batch.ids + 1)  # the arrays count up, so the true next id is one more
        for row in torch.cat([batch.ids, batch.targets[:, -1:]], dim=1).tolist():
            assert row[-1] < 203 or 1000 <= row[0] <= row[-1] < 1117  # never across a border


def test_an_epoch_visits_every_window_once() -> None:
    stream = single(seed=3)
    assert len(stream.domains[0]) == (203 - T) // T + (117 - T) // T
    offsets, orders = set(), []
    for epoch in range(4):
        starts = epoch_starts(stream, epoch)
        offset = min(starts)
        assert 0 <= offset < T
        expected = [offset + T * i for i in range((203 - T) // T)] + [1000 + offset + T * i for i in range((117 - T) // T)]
        assert sorted(starts) == expected
        offsets.add(offset)
        orders.append([(start - offset) // T for start in starts])
    assert len(offsets) > 1
    assert all(order != sorted(order) for order in orders)
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_batches_cross_epochs_without_a_gap() -> None:
    narrow, wide = single(), single(batch_size=5)
    assert len(narrow.domains[0]) % 5  # so that some batch holds the end of one epoch and the start of the next
    rows = torch.cat([wide.batch(step).ids for step in range(20)])
    assert torch.equal(rows, torch.cat([narrow.batch(step).ids for step in range(100)]))


@pytest.mark.parametrize(("world", "accumulation_steps", "batch_size"), [(2, 1, 2), (1, 2, 2), (2, 2, 1), (4, 1, 1), (1, 4, 1)])
def test_ranks_and_micro_batches_part_the_same_batch(world: int, accumulation_steps: int, batch_size: int) -> None:
    for domains, shares in ((single(seed=1).domains, [1.0]), (mixture([0.7, 0.3]).domains, [0.7, 0.3])):
        whole = Stream(domains, shares, batch_size=4)
        parted = Stream(domains, shares, batch_size, accumulation_steps, world)
        for step in (0, 1, 17, 600):
            turns = [(micro, rank) for micro in range(accumulation_steps) for rank in range(world)]
            parts = [parted.batch(step, *turn) for turn in turns]
            assert torch.equal(torch.cat([part.ids for part in parts]), whole.batch(step).ids)
            assert torch.equal(torch.cat([part.targets for part in parts]), whole.batch(step).targets)
            assert [place for turn in turns for place in parted.places(step, *turn)] == whole.places(step)


def test_text_shorter_than_two_contexts_is_refused() -> None:
    assert len(Windows([np.arange(2 * T)], T, (0,))) == 1
    for arrays in ([np.arange(2 * T - 1)], [np.arange(T)] * 9, []):
        with pytest.raises(UserError, match=rf"context {T} needs {2 * T}") as caught:
            Windows(arrays, T, (0,))
        assert f"has {max(map(len, arrays), default=0)} tokens" in str(caught.value)


def test_the_order_of_one_domain_is_fixed_for_good() -> None:
    """A run of an older version continues with the same text: offset and order are drawn from [seed, epoch]."""
    stream = single(seed=3)
    rooms = [(len(array) - T) // T if len(array) > T else 0 for array in ARRAYS]
    windows = [(array, i) for array, room in enumerate(rooms) for i in range(room)]
    for epoch in range(3):
        generator = np.random.default_rng([3, epoch])
        offset = int(generator.integers(T))
        for place, window in enumerate(generator.permutation(len(windows))):
            array, i = windows[window]
            assert stream.places(epoch * len(windows) + place) == [(0, array, offset + i * T)]


# ---------------------------------------------------------------------- several domains

SIZES = (203, 61, 1000)


def mixture(shares: Sequence[float], batch_size: int = 1, end_id: int | None = None) -> Stream:
    """Domain d counts up from 10,000 d."""
    domains = [Windows([np.arange(size) + 10_000 * d], T, (7, d) if d else (7,)) for d, size in enumerate(SIZES[: len(shares)])]
    return Stream(domains, shares, batch_size, end_id=end_id)


SHARES = st.lists(st.floats(0.001, 1), min_size=2, max_size=8)


@settings(max_examples=60, deadline=None)
@given(SHARES)
def test_shares_are_exact_in_every_thousand_and_near_all_along(shares: list[float]) -> None:
    turn, before = _turns(tuple(shares))
    exact = np.array(shares) / sum(shares) * PERIOD
    quota = np.bincount(turn, minlength=len(shares))
    assert (quota >= 1).all() and len(turn) == PERIOD == quota.sum() == 1000
    if (exact >= 1).all():
        assert (np.abs(quota - exact) < 1).all()
    counted = np.vstack([np.zeros(len(shares), int), (turn[:, None] == np.arange(len(shares))).cumsum(0)])
    assert (before == counted).all()
    assert (np.abs(counted - np.arange(PERIOD + 1)[:, None] * quota / PERIOD) <= 2).all()  # spread, not in blocks


def test_rounding_goes_to_the_largest_remainders() -> None:
    for shares, quota in (
        ([1, 1, 1], [334, 333, 333]),
        ([0.0005, 0.9995], [1, 999]),  # never nothing
        ([1e-9, 1e-9, 1], [1, 1, 998]),
        ([2.0006, 3.9991, 4.0003], [200, 400, 400]),
        ([0.1004, 0.1007, 0.7989], [100, 101, 799]),
        ([3, 1], [750, 250]),
    ):
        assert np.bincount(_turns(tuple(shares))[0]).tolist() == quota


@pytest.mark.parametrize("shares", [[0.5, 0.3, 0.2], [0.05, 0.9, 0.05], [6, 3, 1]])
def test_a_mixture_has_its_shares_and_each_domain_its_own_epochs(shares: list[float]) -> None:
    stream = mixture(shares)
    places = [stream.places(number)[0] for number in range(3 * PERIOD)]
    for d, windows in enumerate(stream.domains):
        own = [(place.array, place.start) for place in places if place.domain == d]
        assert len(own) == 3 * PERIOD * shares[d] / sum(shares)
        assert own == [windows.place(number) for number in range(len(own))]  # whatever the shares
        for period in range(3):
            part = places[period * PERIOD : (period + 1) * PERIOD]
            assert sum(place.domain == d for place in part) == PERIOD * shares[d] / sum(shares)
        epochs = [own[first : first + len(windows)] for first in range(0, len(own) - len(windows) + 1, len(windows))]
        assert len(epochs) > 0 and all(len(set(epoch)) == len(windows) for epoch in epochs)


def test_a_mixture_is_a_pure_function_of_the_number() -> None:
    stream, again = mixture([0.6, 0.3, 0.1], 3), mixture([6, 3, 1], 3)
    forwards = [stream.batch(step) for step in range(700)]
    for step in (699, 0, 333, 334, 5, 650):
        assert same(again.batch(step), forwards[step])


def test_no_two_domains_or_epochs_share_an_order() -> None:
    """Also not one domain's first epoch and another's second: seeds are padded with zeros."""
    orders = set()
    for number in range(4):
        windows = Windows(ARRAYS, T, (7, number) if number else (7,))
        for epoch in range(5):
            numbers = range(epoch * len(windows), (epoch + 1) * len(windows))
            orders.add(tuple(windows.place(number) for number in numbers))
    assert len(orders) == 20


def test_rows_come_from_where_places_say() -> None:
    stream = mixture([0.6, 0.3, 0.1], batch_size=5)
    for step in (0, 1, 250):
        batch, places = stream.batch(step), stream.places(step)
        assert batch.ids[:, 0].tolist() == [10_000 * place.domain + place.start for place in places]
        assert torch.equal(batch.targets, batch.ids + 1)
        assert batch.segments is None


# ---------------------------------------------------------------------- documents apart


def test_documents_are_numbered_by_hand() -> None:
    E = 9
    window = torch.tensor([[5, E, 6, 7, E, E, 8], [1, 2, 3, 4, 5, 6, E], [E, 1, 1, 1, 1, E, 2]])
    batch = apart(window, E)
    assert batch.segments is not None
    assert batch.segments.tolist() == [[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1]]
    assert torch.equal(batch.ids, window[:, :-1]) and torch.equal(batch.targets, window[:, 1:])
    assert apart(window, None).segments is None


def test_stream_and_validation_keep_documents_apart() -> None:
    array = np.array([1, 2, 0] * 40, dtype=np.uint16)
    stream = Stream([Windows([array], T, (0,))], [1.0], batch_size=6, end_id=0)
    for batch in (stream.batch(3), *InOrder([array], T, 4, end_id=0)):
        ends = (batch.ids == 0).long()
        for ids, segments in zip(batch.ids.tolist(), torch.as_tensor(batch.segments).tolist(), strict=True):
            assert segments == [sum(i == 0 for i in ids[:t]) for t in range(len(ids))]
        assert ends.any()
    assert all(batch.segments is None for batch in InOrder([array], T, 4))


# ---------------------------------------------------------------------- validation


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("context_tokens", [1, 8, 500])
def test_in_order_covers_each_target_once(context_tokens: int, batch_size: int) -> None:
    batches = InOrder(ARRAYS, context_tokens, batch_size)
    for batch in batches:
        assert torch.equal(batch.targets, batch.ids + 1)
        assert batch.ids.size(0) <= batch_size and batch.ids.size(1) <= context_tokens
    targets = torch.cat([batch.targets.flatten() for batch in batches]).tolist()
    assert targets == [int(token_id) for array in ARRAYS for token_id in array[1:]]


def test_in_order_needs_a_target() -> None:
    for arrays in ([], [np.arange(1)]):
        with pytest.raises(UserError, match="fewer than two tokens"):
            InOrder(arrays, T, 4)
