"""The distillation loss against arithmetic done by hand and PyTorch's own, its gradients, and the mistakes that it could make."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from glassgpt.compress import matching
from glassgpt.compress.matching import Blend, copied_layers, hidden_loss, matched_layers, soft_head_loss, soft_loss
from glassgpt.model.gpt import capped
from glassgpt.train.loss import IGNORE

B, T, D, WIDE, V = 3, 7, 5, 6, 11
ALPHA, TEMPERATURE = 0.3, 2.5
EXACT = 1e-12
VISIBLE = 1e-2
"""What a mistake must make as difference, at least."""


def draw(*shape: int, seed: int = 0, size: float = 2.0) -> Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_targets(ignored: str = "some") -> Tensor:
    targets = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(3))
    if ignored != "none":
        targets[:, 2:4] = IGNORE
    if ignored == "all":
        targets[:] = IGNORE
    return targets


def test_two_tokens_by_hand() -> None:
    """At T = 2 the teacher expects (3/4, 1/4), the student (1/2, 1/2); the second position counts for nothing."""
    logits = torch.zeros(1, 2, 2, dtype=torch.float64)
    teacher = torch.tensor([[[2 * math.log(3), 0.0], [9.0, -9.0]]], dtype=torch.float64)
    found = soft_loss(logits, teacher, torch.tensor([[1, IGNORE]]), 0.3, 2.0)
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert found.divergence.item() == pytest.approx(divergence, rel=0, abs=1e-15)
    assert found.nats.item() == pytest.approx(math.log(2), rel=0, abs=1e-15)
    assert found.sum.item() == pytest.approx(0.3 * 4 * divergence + 0.7 * math.log(2), rel=0, abs=1e-15)


@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_it_is_kl_div_and_cross_entropy(ignored: str) -> None:
    logits, teacher, targets = draw(B, T, V), draw(B, T, V, seed=1), some_targets(ignored)
    counted = targets != IGNORE
    own, its = ((x[counted] / TEMPERATURE).log_softmax(-1) for x in (logits, teacher))
    divergence = F.kl_div(own, its, reduction="sum", log_target=True)  # of the second from the first: KL(teacher || student)
    nats = F.cross_entropy(logits[counted], targets[counted], reduction="sum")
    found = soft_loss(logits, teacher, targets, ALPHA, TEMPERATURE)
    expected = (ALPHA * TEMPERATURE**2 * divergence + (1 - ALPHA) * nats, divergence, nats)
    for ours, theirs in zip((found.sum, found.divergence, found.nats), expected, strict=True):
        assert abs(ours - theirs) < EXACT


def test_the_gradient_is_the_difference_of_expectations_times_the_temperature() -> None:
    """Hinton et al., eq. 2, times T^2: alpha T (q - p) + (1 - alpha)(softmax - one-hot), 0 where nothing is supervised."""
    logits, teacher, targets = draw(B, T, V).requires_grad_(), draw(B, T, V, seed=1), some_targets()
    (found,) = torch.autograd.grad(soft_loss(logits, teacher, targets, ALPHA, TEMPERATURE).sum, logits)
    q, p = ((x.detach() / TEMPERATURE).softmax(-1) for x in (logits, teacher))
    hard = logits.detach().softmax(-1) - F.one_hot(targets.clamp(min=0), V)
    expected = (ALPHA * TEMPERATURE * (q - p) + (1 - ALPHA) * hard) * (targets != IGNORE).unsqueeze(-1)
    assert (found - expected).abs().max() < EXACT
    assert found[:, 2:4].abs().max() == 0 and found[:, 4:].abs().max() > VISIBLE


def mistaken(logits: Tensor, teacher: Tensor, targets: Tensor, mistake: str) -> Tensor:
    """The distillation loss with one mistake in it."""
    T_, p, q = TEMPERATURE, (teacher / TEMPERATURE).log_softmax(-1), (logits / TEMPERATURE).log_softmax(-1)
    if mistake == "swapped":
        p, q = q, p
    counts = torch.ones_like(targets) if mistake == "borders" else targets != IGNORE
    divergence = ((p.exp() * (p - q)).sum(-1) * counts).sum()
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    factor = {"no square": 1.0, "T": T_}.get(mistake, T_**2)
    return ALPHA * factor * divergence + (1 - ALPHA) * nats


@pytest.mark.parametrize("mistake", ["none", "no square", "T", "swapped", "borders"])
def test_mistakes_are_seen(mistake: str) -> None:
    logits, teacher, targets = draw(B, T, V).requires_grad_(), draw(B, T, V, seed=1), some_targets()
    found, other = soft_loss(logits, teacher, targets, ALPHA, TEMPERATURE).sum, mistaken(logits, teacher, targets, mistake)
    slopes = [torch.autograd.grad(loss, logits)[0] for loss in (found, other)]
    apart = [float((found - other).abs().detach()), float((slopes[0] - slopes[1]).abs().max())]
    assert max(apart) < EXACT if mistake == "none" else min(apart) > VISIBLE


# ---------------------------------------------------------------------- the heads and the loss in one


def heads() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, the teacher's hidden, the teacher's weight; the teacher is wider."""
    hidden, weight = draw(B, T, D).requires_grad_(), draw(V, D, seed=1).requires_grad_()
    return hidden, weight, draw(B, T, WIDE, seed=2), draw(V, WIDE, seed=4)


@pytest.mark.parametrize("positions", [1, 4, 21, 1000])  # in a chunk; there are 21
@pytest.mark.parametrize("in_piece", [1, 3, 1000])  # of a chunk
@pytest.mark.parametrize(
    ("ignored", "caps"), [("none", (None, None)), ("some", (None, None)), ("all", (None, None)), ("some", (4.0, 3.0))]
)
@pytest.mark.parametrize(("alpha", "temperature"), [(ALPHA, TEMPERATURE), (1.0, 1.0), (0.0, 2.0)])
def test_soft_head_loss_is_the_plain_loss(
    positions: int,
    in_piece: int,
    ignored: str,
    caps: tuple[float | None, float | None],
    alpha: float,
    temperature: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(matching, "CHUNK_LOGITS", positions * V + V - 1)
    monkeypatch.setattr(matching, "PIECE_LOGITS", in_piece * V)
    hidden, weight, teacher_hidden, teacher_weight = heads()
    targets = some_targets(ignored)
    logits, teacher_logits = capped(hidden @ weight.T, caps[0]), capped(teacher_hidden @ teacher_weight.T, caps[1])
    plain = soft_loss(logits, teacher_logits, targets, alpha, temperature)
    ours = soft_head_loss(hidden, weight, teacher_hidden, teacher_weight, targets, Blend(alpha, temperature, *caps))
    for factor in (1.0, -0.37):  # what comes after the loss scales its gradients
        pairs = [
            (plain.sum, ours.sum),
            (plain.divergence, ours.divergence),
            (plain.nats, ours.nats),
            *zip(*(torch.autograd.grad(x.sum * factor, (hidden, weight), retain_graph=True) for x in (plain, ours)), strict=True),
        ]
        for a, b in pairs:
            assert (a - b).abs().max() < 1e-11
        assert ignored == "all" or pairs[-1][1].abs().max() > VISIBLE
    assert not ours.divergence.requires_grad and not ours.nats.requires_grad


def test_soft_head_loss_passes_gradcheck() -> None:
    hidden, weight, teacher_hidden, teacher_weight = heads()
    targets = some_targets()

    def total(hidden: Tensor, weight: Tensor) -> Tensor:
        return soft_head_loss(hidden, weight, teacher_hidden, teacher_weight, targets, Blend(ALPHA, TEMPERATURE, 4.0, 3.0)).sum

    assert torch.autograd.gradcheck(total, (hidden, weight), eps=1e-6, atol=1e-7)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(total(hidden, weight), hidden, create_graph=True)


def test_the_teacher_gets_no_gradient() -> None:
    hidden, weight, *its = heads()
    for tensor in its:
        tensor.requires_grad_()
    soft_head_loss(hidden, weight, its[0], its[1], some_targets(), Blend(ALPHA, TEMPERATURE)).sum.backward()
    soft_loss(hidden @ weight.T, its[0] @ its[1].T, some_targets(), ALPHA, TEMPERATURE).sum.backward()
    hidden_loss(draw(B, T, WIDE).requires_grad_(), its[0], some_targets(), "mse").backward()
    assert its[0].grad is None and its[1].grad is None
    assert hidden.grad is not None and weight.grad is not None


def test_without_gradients_it_is_the_same_number() -> None:
    parts, blend = heads(), Blend(ALPHA, TEMPERATURE, 4.0)
    with torch.no_grad():
        silent = soft_head_loss(*parts, some_targets(), blend)
    assert torch.equal(silent.sum, soft_head_loss(*parts, some_targets(), blend).sum.detach())


def test_bfloat16_is_summed_in_float32() -> None:
    parts, blend = [part.detach().float() for part in heads()], Blend(ALPHA, TEMPERATURE)
    exact = soft_head_loss(*heads(), some_targets(), blend).sum.item()
    with torch.autocast("cpu", torch.bfloat16):
        found = soft_head_loss(*parts, some_targets(), blend).sum
    assert found.dtype == torch.float32 and found.item() == pytest.approx(exact, rel=0.02)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation has made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


def test_a_chunk_of_logits_is_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "CHUNK_LOGITS", 16 * 100)
    parts = [draw(4, 64, 3).requires_grad_(), draw(100, 3, seed=1).requires_grad_(), draw(4, 64, 2, seed=2), draw(100, 2, seed=3)]
    targets = torch.randint(100, (4, 64), generator=torch.Generator().manual_seed(0))
    with Largest() as ours:
        soft_head_loss(*parts, targets, Blend(ALPHA, TEMPERATURE)).sum.backward()
    with Largest() as plain:
        soft_loss(parts[0] @ parts[1].T, parts[2] @ parts[3].T, targets, ALPHA, TEMPERATURE).sum.backward()
    assert ours.numbers == 16 * 100 and plain.numbers == 4 * 64 * 100


# ---------------------------------------------------------------------- hidden states


def test_hidden_loss_by_hand() -> None:
    states = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [5.0, 5.0]]], dtype=torch.float64)
    teacher = torch.tensor([[[6.0, 8.0], [0.0, 2.0], [-1.0, 0.0]]], dtype=torch.float64)
    targets = torch.tensor([[1, 0, IGNORE]])
    assert hidden_loss(states, teacher, targets, "mse").item() == (9 + 16) / 2 + (1 + 4) / 2
    assert hidden_loss(states, teacher, targets, "cosine").item() == pytest.approx(0 + 1, rel=0, abs=1e-15)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_hidden_loss_is_pytorchs_and_passes_gradcheck(kind: str) -> None:
    states, teacher, targets = draw(B, T, D).requires_grad_(), draw(B, T, D, seed=1), some_targets()
    counted = targets != IGNORE
    if kind == "mse":
        expected = F.mse_loss(states[counted], teacher[counted], reduction="sum") / D
    else:
        ones = torch.ones(int(counted.sum()))
        expected = F.cosine_embedding_loss(states[counted], teacher[counted], ones, reduction="sum")
    assert abs(hidden_loss(states, teacher, targets, kind) - expected) < EXACT  # type: ignore[arg-type]
    assert abs(hidden_loss(states, teacher, some_targets("none"), kind) - expected) > VISIBLE  # type: ignore[arg-type]
    found: Callable[[Tensor], Tensor] = lambda x: hidden_loss(x, teacher, targets, kind)  # type: ignore[arg-type]  # noqa: E731
    assert torch.autograd.gradcheck(found, (states,), eps=1e-6, atol=1e-7)
    assert hidden_loss(teacher, teacher, targets, kind).abs() < EXACT  # type: ignore[arg-type]


def test_only_the_squared_difference_knows_of_scale() -> None:
    states, teacher, targets = draw(B, T, D), draw(B, T, D, seed=1), some_targets()
    a, b = (hidden_loss(states, scale * teacher, targets, "cosine") for scale in (1, 7))
    assert abs(a - b) < EXACT
    a, b = (hidden_loss(states, scale * teacher, targets, "mse") for scale in (1, 7))
    assert abs(a - b) > VISIBLE


@pytest.mark.parametrize(
    ("student", "teacher", "matched", "copied"),
    [
        (6, 12, [1, 3, 5, 7, 9, 11], [0, 2, 4, 7, 9, 11]),
        (3, 6, [1, 3, 5], [0, 2, 5]),
        (4, 6, [1, 2, 4, 5], [0, 2, 3, 5]),
        (3, 3, [0, 1, 2], [0, 1, 2]),
        (1, 6, [5], [0]),
        (4, 2, [0, 0, 1, 1], [0, 0, 1, 1]),
    ],
)
def test_layers(student: int, teacher: int, matched: list[int], copied: list[int]) -> None:
    assert (matched_layers(student, teacher), copied_layers(student, teacher)) == (matched, copied)
