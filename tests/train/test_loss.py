"""The token loss against arithmetic done by hand."""

from __future__ import annotations

import math

import pytest
import torch

from glassgpt.train.loss import IGNORE, token_loss

LOGITS = [[[0.0, math.log(3.0)], [0.0, 0.0]]]  # probabilities (1/4, 3/4) and (1/2, 1/2)


@pytest.mark.parametrize(
    ("targets", "total", "count"),
    [
        ([1, 0], math.log(4 / 3) + math.log(2), 2),
        ([0, 1], math.log(4) + math.log(2), 2),
        ([0, IGNORE], math.log(4), 1),
        ([IGNORE, 1], math.log(2), 1),
        ([IGNORE, IGNORE], 0.0, 0),
    ],
)
def test_two_tokens_by_hand(targets: list[int], total: float, count: int) -> None:
    loss = token_loss(torch.tensor(LOGITS, dtype=torch.float64), torch.tensor([targets]))
    assert loss.sum.dtype == torch.float64
    assert loss.sum.item() == pytest.approx(total, rel=0, abs=1e-15)
    assert (loss.count.item(), loss.count.dtype) == (count, torch.int64)


def test_the_gradient_is_probability_minus_one_hot_and_zero_where_ignored() -> None:
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    token_loss(logits, torch.tensor([[1, IGNORE]])).sum.backward()
    assert logits.grad is not None
    assert logits.grad[0, 0].tolist() == pytest.approx([0.25, -0.25], rel=0, abs=1e-15)
    assert logits.grad[0, 1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 64, 50, generator=generator).to(dtype)
    targets = torch.randint(50, (4, 64), generator=generator)
    loss = token_loss(logits, targets).sum
    exact = token_loss(logits.double(), targets).sum.item()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - exact) < 1e-3
    in_half = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert abs(in_half.item() - exact) > 1e-2  # what summing in half precision would have lost
