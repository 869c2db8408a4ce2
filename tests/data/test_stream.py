"""Batches as a pure function of seed, step, micro-batch and rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from glassgpt.config import UserError
from glassgpt.data import Batch, Stream, in_order

T = 8
# Ids that tell where they come from: two arrays of consecutive numbers, and one too short for a window.
ARRAYS: list[np.ndarray] = [np.arange(203, dtype=np.uint16), np.arange(5), np.arange(1000, 1117, dtype=np.uint16)]


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.ids, b.ids) and torch.equal(a.targets, b.targets)


def epoch_starts(stream: Stream, epoch: int) -> list[int]:
    """First id of every window of an epoch, in order."""
    steps = range(epoch * len(stream), (epoch + 1) * len(stream))
    return [int(stream.batch(step).ids[0, 0]) for step in steps]


def test_a_batch_is_a_pure_function() -> None:
    stream = Stream(ARRAYS, T, batch_size=3, accumulation_steps=2, seed=5)
    first = stream.batch(4, 1)
    for step in range(100):  # many epochs in between
        stream.batch(step)
    assert same(stream.batch(4, 1), first)
    assert same(Stream(ARRAYS, T, batch_size=3, accumulation_steps=2, seed=5).batch(4, 1), first)
    assert not same(stream.batch(4, 0), first)
    assert not same(Stream(ARRAYS, T, batch_size=3, accumulation_steps=2, seed=6).batch(4, 1), first)


def test_targets_are_the_next_ids_of_one_array() -> None:
    stream = Stream(ARRAYS, T, batch_size=4)
    for step in range(30):
        batch = stream.batch(step)
        assert batch.ids.shape == batch.targets.shape == (4, T)
        assert batch.ids.dtype == batch.targets.dtype == torch.int64
        assert batch.count == 4 * T
        assert torch.equal(batch.targets, batch.ids + 1)  # the arrays count up, so the true next id is one more
        for row in torch.cat([batch.ids, batch.targets[:, -1:]], dim=1).tolist():
            assert row[-1] < 203 or 1000 <= row[0] <= row[-1] < 1117  # never across a border


def test_an_epoch_visits_every_window_once() -> None:
    stream = Stream(ARRAYS, T, batch_size=1, seed=3)
    assert len(stream) == (203 - T) // T + (117 - T) // T
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
    single, wide = Stream(ARRAYS, T, batch_size=1), Stream(ARRAYS, T, batch_size=5)
    assert len(single) % 5  # so that some batch holds the end of one epoch and the start of the next
    rows = torch.cat([wide.batch(step).ids for step in range(20)])
    assert torch.equal(rows, torch.cat([single.batch(step).ids for step in range(100)]))


@pytest.mark.parametrize(("world", "accumulation_steps", "batch_size"), [(2, 1, 2), (1, 2, 2), (2, 2, 1), (4, 1, 1), (1, 4, 1)])
def test_ranks_and_micro_batches_part_the_same_batch(world: int, accumulation_steps: int, batch_size: int) -> None:
    whole = Stream(ARRAYS, T, batch_size=4, seed=1)
    parted = Stream(ARRAYS, T, batch_size, accumulation_steps, world, seed=1)
    for step in (0, 1, 17):
        parts = [parted.batch(step, micro, rank) for micro in range(accumulation_steps) for rank in range(world)]
        assert torch.equal(torch.cat([part.ids for part in parts]), whole.batch(step).ids)
        assert torch.equal(torch.cat([part.targets for part in parts]), whole.batch(step).targets)


def test_text_shorter_than_two_contexts_is_refused() -> None:
    assert len(Stream([np.arange(2 * T)], T, batch_size=1)) == 1
    for arrays in ([np.arange(2 * T - 1)], [np.arange(T)] * 9, []):
        with pytest.raises(UserError, match=rf"context {T} needs {2 * T}") as caught:
            Stream(arrays, T, batch_size=1)
        assert f"has {max(map(len, arrays), default=0)} tokens" in str(caught.value)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("context_tokens", [1, 8, 500])
def test_in_order_covers_each_target_once(context_tokens: int, batch_size: int) -> None:
    batches = in_order(ARRAYS, context_tokens, batch_size)
    for batch in batches:
        assert torch.equal(batch.targets, batch.ids + 1)
        assert batch.ids.size(0) <= batch_size and batch.ids.size(1) <= context_tokens
    targets = torch.cat([batch.targets.flatten() for batch in batches]).tolist()
    assert targets == [int(token_id) for array in ARRAYS for token_id in array[1:]]


def test_in_order_needs_a_target() -> None:
    for arrays in ([], [np.arange(1)]):
        with pytest.raises(UserError, match="fewer than two tokens"):
            in_order(arrays, T, 4)
