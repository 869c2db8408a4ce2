"""A text's random numbers are PyTorch's."""

from __future__ import annotations

import pytest
import torch

from glassgpt.generation import Generator


@pytest.mark.parametrize("seed", [0, 1, 5489, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 987_654_321_012])
def test_the_numbers_are_those_of_torch(seed: int) -> None:
    """Beyond the 312 that a state of 624 words gives, too."""
    ours, theirs = Generator(seed), torch.Generator().manual_seed(seed)
    for _ in range(1_000):
        number = ours.uniform()
        assert 0 <= number < 1
        assert number == torch.rand((), generator=theirs, dtype=torch.float64).item()


def test_generators_of_one_seed_are_alike_and_apart() -> None:
    one, other, third = Generator(7), Generator(7), Generator(8)
    assert [one.uniform() for _ in range(5)] == [other.uniform() for _ in range(5)] != [third.uniform() for _ in range(5)]
