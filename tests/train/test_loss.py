"""The token loss against arithmetic done by hand, and the fused one against it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glassgpt.config import preset
from glassgpt.model import GPT
from glassgpt.model.gpt import capped
from glassgpt.train import loss
from glassgpt.train.loss import IGNORE, Scored, head_loss, token_loss

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
    found = token_loss(torch.tensor(LOGITS, dtype=torch.float64), torch.tensor([targets]))
    assert found.sum.dtype == torch.float64
    assert found.sum.item() == pytest.approx(total, rel=0, abs=1e-15)
    assert (found.count.item(), found.count.dtype) == (count, torch.int64)


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
    found = token_loss(logits, targets).sum
    exact = token_loss(logits.double(), targets).sum.item()
    assert found.dtype == torch.float32
    assert abs(found.item() - exact) < 1e-3
    in_half = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert abs(in_half.item() - exact) > 1e-2  # what summing in half precision would have lost


# ---------------------------------------------------------------------- the head and the loss in one

B, T, D, V = 3, 7, 5, 11
Numbers = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def numbers(ignored: str = "some", dtype: torch.dtype = torch.float64) -> Numbers:
    """hidden, weight, targets."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (3 * torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((B, T, D), (V, D)))
    targets = torch.randint(V, (B, T), generator=generator)
    if ignored == "some":
        targets[torch.rand(B, T, generator=generator) < 0.3] = IGNORE
    elif ignored == "all":
        targets[:] = IGNORE
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def gradients(total: torch.Tensor, *of: torch.Tensor) -> list[torch.Tensor]:
    return [total.detach(), *torch.autograd.grad(total, of, retain_graph=True)]


@pytest.mark.parametrize("positions", [1, 2, 20, 21, 22, 1000])  # in a chunk; there are 21
@pytest.mark.parametrize("in_piece", [1, 3, 1000])  # of a chunk
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_head_loss_is_the_plain_loss(positions: int, in_piece: int, ignored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_LOGITS", positions * V + V - 1)
    monkeypatch.setattr(loss, "PIECE_LOGITS", in_piece * V)
    hidden, weight, targets = numbers(ignored)
    plain, ours = token_loss(hidden @ weight.T, targets), head_loss(hidden, weight, targets)
    assert torch.equal(plain.count, ours.count) and ours.sum.dtype == torch.float64
    for factor in (1.0, -0.37):  # what comes after the loss scales its gradients
        pairs = zip(gradients(plain.sum * factor, hidden, weight), gradients(ours.sum * factor, hidden, weight), strict=True)
        for a, b in pairs:
            assert (a - b).abs().max() < 1e-12
            assert ignored == "all" or b.abs().max() > 1e-2


CAP = 4.0


@pytest.mark.parametrize("positions", [2, 21])  # in a chunk; there are 21
@pytest.mark.parametrize("in_piece", [3, 1000])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_capped_head_loss_is_the_plain_loss_of_capped_logits(
    positions: int, in_piece: int, ignored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK_LOGITS", positions * V + V - 1)
    monkeypatch.setattr(loss, "PIECE_LOGITS", in_piece * V)
    hidden, weight, targets = numbers(ignored)
    logits = hidden @ weight.T
    assert logits.abs().max() > 2 * CAP  # so that the cap does something
    found = gradients(head_loss(hidden, weight, targets, CAP).sum, hidden, weight)
    for a, b in zip(gradients(token_loss(CAP * (logits / CAP).tanh(), targets).sum, hidden, weight), found, strict=True):
        assert (a - b).abs().max() < 1e-12
    if ignored != "all":
        slopeless = gradients(token_loss(logits + (capped(logits, CAP) - logits).detach(), targets).sum, hidden, weight)
        for wrong in (slopeless, gradients(head_loss(hidden, weight, targets, CAP + 0.1).sum, hidden, weight)):
            assert (wrong[1] - found[1]).abs().max() > 1e-3 and (wrong[2] - found[2]).abs().max() > 1e-3


def test_capped_head_loss_passes_gradcheck_and_a_wide_cap_is_none() -> None:
    hidden, weight, targets = numbers()
    assert torch.autograd.gradcheck(lambda h, w: head_loss(h, w, targets, CAP).sum, (hidden, weight))
    wide, none = (gradients(head_loss(hidden, weight, targets, cap).sum, hidden, weight) for cap in (1e8, None))
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(wide, none, strict=True))


def test_capped_head_loss_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 4 * V)
    hidden, weight, targets = numbers(dtype=torch.float32)
    exact = gradients(token_loss(capped(hidden @ weight.T, CAP), targets).sum, hidden, weight)
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(head_loss(hidden, weight, targets, CAP).sum, hidden, weight)
    for a, b in zip(exact, ours, strict=True):
        assert b.dtype == torch.float32 and (a - b).abs().max() < 0.02 * a.abs().max()


def test_head_loss_when_one_side_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 4 * V)
    hidden, weight, targets = numbers()
    whole = gradients(head_loss(hidden, weight, targets).sum, hidden, weight)
    fixed = weight.detach()
    assert torch.equal(gradients(head_loss(hidden, fixed, targets).sum, hidden)[1], whole[1])
    assert torch.equal(gradients(head_loss(hidden.detach(), weight, targets).sum, weight)[1], whole[2])
    with torch.no_grad():
        assert torch.equal(head_loss(hidden, weight, targets).sum, whole[0])


def test_head_loss_of_large_scores_is_finite() -> None:
    hidden, weight, targets = numbers("none", torch.float32)
    total, *rest = gradients(head_loss(hidden * 1e3, weight, targets).sum, hidden, weight)
    assert total.isfinite() and all(gradient.isfinite().all() for gradient in rest)


def test_head_loss_under_autocast_is_close_to_the_plain_loss_under_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 4 * V)
    hidden, weight, targets = numbers(dtype=torch.float32)
    exact = gradients(token_loss(hidden @ weight.T, targets).sum, hidden, weight)
    with torch.autocast("cpu", torch.bfloat16):
        plain = gradients(token_loss(hidden @ weight.T, targets).sum, hidden, weight)
        ours = gradients(head_loss(hidden, weight, targets).sum, hidden, weight)
    assert [x.dtype for x in ours] == [torch.float32] * 3
    for a, b, c in zip(exact, plain, ours, strict=True):
        scale = a.abs().max()
        assert (c - b).abs().max() < 0.02 * scale
        assert (c - a).abs().max() < 0.02 * scale
        assert not torch.equal(c, a)  # the products were in bfloat16


class Largest(TorchDispatchMode):
    """Notes the most elements that any operation's result has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_all_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 4 * V)
    hidden, weight, targets = numbers()
    with Largest() as ours:
        head_loss(hidden, weight, targets).sum.backward()
    with Largest() as plain:
        token_loss(hidden @ weight.T, targets).sum.backward()
    assert plain.elements == B * T * V
    assert ours.elements == B * T * D  # the gradient of `hidden`; a chunk has 4 * V = 44


def test_scored_is_the_models_loss() -> None:
    torch.manual_seed(0)
    for tied, cap in ((True, None), (False, None), (True, 0.5)):
        model = GPT(preset("tiny", vocab_size=300, tied_head=tied, logit_cap=cap)).double()
        ids = torch.randint(300, (2, 17))
        plain = torch.autograd.grad(token_loss(model(ids[:, :-1]), ids[:, 1:]).sum, list(model.parameters()))
        ours = torch.autograd.grad(Scored(model)(ids[:, :-1], ids[:, 1:]), list(model.parameters()))
        for a, b in zip(plain, ours, strict=True):
            assert (a - b).abs().max() < 1e-11
