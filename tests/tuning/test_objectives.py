"""Each loss by hand, against its closed form with gradients, and against trl's own trainers; and mistakes that must be noticed.

A check returns the largest error of a function in `objectives`, values and gradients; what it must notice is patched in there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from glassgpt.model.gpt import capped
from glassgpt.train.loss import IGNORE
from glassgpt.tuning import objectives
from glassgpt.tuning.objectives import (
    adapted_beta,
    bradley_terry,
    clipped_policy,
    clipped_value,
    dpo,
    gae,
    group_advantages,
    grpo_weights,
    implicit_rewards,
    ipo,
    k3,
    kto,
    token_logprobs,
    token_logprobs_entropy,
    token_rewards,
    whiten,
)

EXACT = 1e-12
NOTICED = 1e-3


def row(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).requires_grad_()


def by_hand(found: Tensor, expected: Any) -> None:
    assert found.dtype == torch.float64
    assert (found - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-14


def gap(*pairs: tuple[Tensor, Tensor]) -> float:
    assert all(a.shape == b.shape and a.dtype == b.dtype == torch.float64 for a, b in pairs)
    return max((a - b).detach().abs().max().item() for a, b in pairs)


def slopes(total: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    """Gradients, zero where there is none."""
    return torch.autograd.grad(total, of, retain_graph=True, allow_unused=True, materialize_grads=True)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ---------------------------------------------------------------------- by hand


def test_bradley_terry_by_hand() -> None:
    # σ(ln 3) = 3/4, σ(0) = 1/2, σ(-ln 3) = 1/4
    by_hand(bradley_terry(row(math.log(3), 5, 1), row(0, 5, 1 + math.log(3))), [math.log(4 / 3), math.log(2), math.log(4)])


@pytest.mark.parametrize("difference", [-1e4, -104.0, 104.0, 1e4])
def test_bradley_terry_is_finite_where_the_logarithm_of_sigma_is_not(difference: float) -> None:
    better = torch.tensor([difference], requires_grad=True)
    loss = bradley_terry(better, torch.zeros(1))
    (slope,) = torch.autograd.grad(loss.sum(), better)
    assert loss.item() == pytest.approx(max(-difference, 0.0)) and slope.item() == pytest.approx(-float(difference < 0))
    if difference < 0:
        assert better.sigmoid().log().isinf()


def test_dpo_by_hand() -> None:
    # the better answer gained 2 nats, the worse lost 1: margin 3 beta
    arguments = (row(-3), row(-7), row(-5), row(-6))
    by_hand(dpo(*arguments, beta=math.log(3) / 3), [math.log(4 / 3)])
    by_hand(dpo(*arguments, beta=math.log(3) / 3, label_smoothing=0.25), [0.75 * math.log(4 / 3) + 0.25 * math.log(4)])
    by_hand(dpo(row(-5), row(-6), row(-5), row(-6), beta=0.1), [math.log(2)])  # the model is its reference
    by_hand(implicit_rewards(row(-3, -7), row(-5, -6), 0.5), [1.0, -0.5])


def test_smoothed_dpo_is_least_where_the_margin_has_the_odds_of_a_right_label() -> None:
    better = random(1)
    margin = row(math.log(0.9 / 0.1) / 0.5)
    (slope,) = slopes(dpo(better, better.detach() - margin, row(0), row(0), 0.5, 0.1).sum(), better)
    assert abs(slope.item()) < 1e-15


def test_ipo_by_hand() -> None:
    # margin per token (-1 + 1.5) - (-2 + 2.25) = 0.25, goal 1 / (2 * 0.4) = 1.25
    by_hand(ipo(row(-1), row(-2), row(-1.5), row(-2.25), beta=0.4), [1.0])
    by_hand(ipo(row(-1), row(-2), row(-2), row(-1.75), beta=0.4), [0.0])


def test_kto_by_hand() -> None:
    # gains 2 and -1 beside a drift of 1: σ(-beta (2 - 1)), σ(-beta (1 + 1))
    logp, reference, good = row(-3, -7), row(-5, -6), torch.tensor([True, False])
    by_hand(kto(logp, reference, good, row(1)[0], math.log(3)), [0.25, 0.1])
    by_hand(kto(logp, reference, good, row(1)[0], math.log(3), 4.0, 0.5), [1.0, 0.05])
    by_hand(kto(logp, reference, good, row(-9)[0], math.log(3)), [0.1, 0.25])  # a drift below 0 is 0


def test_gae_by_hand() -> None:
    # δ = (0.9 * 0.6 - 0.5, 0.9 * 0.7 - 0.6, 1 - 0.7) = (0.04, 0.03, 0.3), each weighing 0.9 * 0.8 = 0.72 less one token earlier
    rewards, values = row(5, 0, 0, 1, 5)[None], row(7, 0.5, 0.6, 0.7, 7)[None]
    advantages, returns = gae(rewards, values, torch.tensor([[False, True, True, True, False]]), 0.9, 0.8)
    by_hand(advantages, [[0, 0.04 + 0.72 * (0.03 + 0.72 * 0.3), 0.03 + 0.72 * 0.3, 0.3, 0]])
    by_hand(returns, [[0, 0.71712, 0.846, 1, 0]])


def test_token_rewards_by_hand() -> None:
    is_token = torch.tensor([[False, True, True, False], [True, False, False, False], [True, True, True, True], [False] * 4])
    kl = torch.tensor([[9, 1, -2, math.nan], [3, 9, 9, 9], [0, 1, 2, 3], [9, 9, 9, 9]], dtype=torch.float64)
    expected = [[0, -0.5, 1 + 2, 0], [-1.5 + 4, 0, 0, 0], [0, -0.5, -1, -1.5 + 6], [0, 0, 0, 0]]
    by_hand(token_rewards(row(2, 4, 6, 8), kl, is_token, 0.5), expected)


def test_clipped_policy_by_hand() -> None:
    # ratios 1.5, 0.5, 1.5, 0.5, 1 with gains +2, +2, -2, -2, 3; clip 0.2
    ratio, gains = row(1.5, 0.5, 1.5, 0.5, 1.0), row(2, 2, -2, -2, 3)
    logp = (row(-1, -2, -3, -4, -5) + ratio.log()).requires_grad_()
    loss, is_clipped = clipped_policy(logp, row(-1, -2, -3, -4, -5), gains, 0.2)
    by_hand(loss.detach(), [-1.2 * 2, -0.5 * 2, 1.5 * 2, 0.8 * 2, -3])
    assert is_clipped.tolist() == [True, False, False, True, False]
    by_hand(slopes(loss.sum(), logp)[0], [0, -0.5 * 2, 1.5 * 2, 0, -3])


def test_clipped_value_by_hand() -> None:
    # all returns 1, all old values 0, clip 0.2: beyond the clip towards it, within, beyond the clip away from it
    values = row(0.5, 0.1, -0.5).requires_grad_()
    loss = clipped_value(values, torch.zeros_like(values), torch.ones_like(values), 0.2)
    by_hand(loss.detach(), [0.5 * 0.8**2, 0.5 * 0.9**2, 0.5 * 1.5**2])
    by_hand(slopes(loss.sum(), values)[0], [0, -0.9, -1.5])


def test_k3_by_hand() -> None:
    logp = row(0.0, -1.0).requires_grad_()
    found = k3(logp, row(math.log(2), -1.0))
    by_hand(found.detach(), [2 - math.log(2) - 1, 0])
    by_hand(slopes(found.sum(), logp)[0], [1 - 2, 0])


def test_group_advantages_by_hand() -> None:
    # deviations of a sample: sqrt((1 + 0 + 1) / 2) = 1, and 0
    rewards = torch.tensor([[1, 2, 3], [0.1, 0.1, 0.1]], dtype=torch.float64)
    by_hand(group_advantages(rewards, "none"), [[-1, 0, 1], [0, 0, 0]])
    by_hand(group_advantages(rewards, "group"), [[-1 / 1.0001, 0, 1 / 1.0001], [0, 0, 0]])


def test_grpo_weights_by_hand() -> None:
    is_token = torch.tensor([[False, True, True, True], [True, False, False, False], [False] * 4])

    def weights(average: Any) -> Tensor:
        return grpo_weights(is_token, average, 5, tokens_in_step=10, answers_in_step=4, dtype=torch.float64)

    by_hand(weights("constant"), [[0, 1 / 20, 1 / 20, 1 / 20], [1 / 20, 0, 0, 0], [0] * 4])
    by_hand(weights("token"), [[0, 0.1, 0.1, 0.1], [0.1, 0, 0, 0], [0] * 4])
    by_hand(weights("sequence"), [[0, 1 / 12, 1 / 12, 1 / 12], [1 / 4, 0, 0, 0], [0] * 4])


def test_adapted_beta_by_hand() -> None:
    assert adapted_beta(0.1, 6.6, 6.0, 500) == pytest.approx(0.1 * (1 + 0.1 * 0.05), rel=1e-15)
    assert adapted_beta(0.1, 60.0, 6.0, 500) == pytest.approx(0.1 * (1 + 0.2 * 0.05), rel=1e-15)
    assert adapted_beta(0.1, -6.0, 6.0, 500, horizon=1000) == pytest.approx(0.1 * (1 - 0.2 * 0.5), rel=1e-15)
    assert adapted_beta(0.1, 6.0, 6.0, 500) == 0.1


def test_whiten_by_hand() -> None:
    by_hand(whiten(row(1, 3), 2.0, 4.0 - 1e-8), [-0.5, 0.5])
    values = random(3, 50).detach() * 7 + 3
    found = whiten(values, values.mean(), values.var(correction=0))
    assert abs(found.mean().item()) < 1e-12 and abs(found.std(correction=0).item() - 1) < 1e-9
    assert whiten(torch.ones(3), 1.0, 0.0).tolist() == [0, 0, 0]


# ---------------------------------------------------------------------- properties


@pytest.mark.parametrize("count", [2, 3, 5, 7, 8])
@pytest.mark.parametrize("scale", ["none", "group"])
def test_equal_rewards_give_exactly_nothing(count: int, scale: Any) -> None:
    rewards = torch.rand(1000, 1, generator=torch.Generator().manual_seed(0)).expand(1000, count).contiguous()
    assert not group_advantages(rewards, scale).any()
    if count in (3, 5, 7):
        assert (rewards - rewards.mean(dim=1, keepdim=True)).any()  # which the plain difference does not give


def test_k3_in_float32_is_never_negative_and_has_all_digits() -> None:
    logp = torch.zeros(10_000)
    reference = 1e-4 * torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    exact = k3(logp.double(), reference.double())
    assert (k3(logp, reference) >= 0).all()
    difference = reference - logp
    assert ((k3(logp, reference) - exact).abs() / exact).median() < 1e-2
    textbook = difference.exp() - difference - 1
    assert (textbook < 0).sum() > 100 and ((textbook - exact).abs() / exact).median() > 0.5


def test_what_k3_and_k1_are_in_the_mean() -> None:
    """Over all words of a small vocabulary: the value, and what each does as a loss and as a reward."""
    logits, reference = random(9), random(9, seed=1).detach().log_softmax(0)
    log_p = logits.log_softmax(0)
    p = log_p.exp()
    k1 = log_p - reference
    (slope,) = slopes((p * k1).sum(), logits)  # of KL(model || reference)
    (slope_back,) = slopes(-(reference.exp() * log_p).sum(), logits)  # of KL(reference || model)

    estimate = objectives.k3(log_p, reference)
    assert (estimate >= 0).all() and (k1 < 0).any()
    assert abs((p * estimate).sum() - (p * k1).sum()) < 1e-15
    as_loss = [slopes((p.detach() * estimator).sum(), logits)[0] for estimator in (estimate, k1)]
    as_reward = slopes((p.detach() * k1.detach() * log_p).sum(), logits)[0]
    assert gap((as_loss[0], slope_back), (as_loss[1], torch.zeros_like(slope)), (as_reward, slope)) < 1e-15
    assert (slope - slope_back).abs().max() > 1e-2  # which are not the same
    biased = slopes((p.detach() * estimate.detach() * log_p).sum(), logits)[0]
    assert (biased - slope).abs().max() > 1e-2

    for old in (log_p.detach(), random(9, seed=2).detach().log_softmax(0)):  # samples of the model, and of another
        weighted = objectives.k3(log_p, reference, old)
        mean = (old.exp() * weighted).sum()
        assert abs(mean - (p * k1).sum()) < 1e-15 and gap((slopes(mean, logits)[0], slope)) < 1e-15


def test_gae_between_its_extremes() -> None:
    rewards, values, is_token = gae_case()
    advantages, returns = gae(rewards, values, is_token, 0.9, 1.0)
    one_step, _ = gae(rewards, values, is_token, 0.9, 0.0)
    for b, positions in enumerate(is_token):
        run = positions.nonzero().squeeze(1).tolist()
        for t in run:
            later = run[run.index(t) :]
            discounted = sum(0.9 ** (s - t) * rewards[b, s].item() for s in later)
            assert returns[b, t].item() == pytest.approx(discounted, abs=EXACT)
            assert advantages[b, t].item() == pytest.approx(discounted - values[b, t].item(), abs=EXACT)
            following = values[b, t + 1].item() if t != run[-1] else 0.0
            error = rewards[b, t].item() + 0.9 * following - values[b, t].item()
            assert one_step[b, t].item() == pytest.approx(error, abs=EXACT)


def test_right_values_leave_no_advantage() -> None:
    rewards, _, is_token = gae_case()
    _, returns = gae(rewards, torch.zeros_like(rewards), is_token, 0.9, 1.0)
    assert gae(rewards, returns, is_token, 0.9, 0.7)[0].abs().max() < EXACT


@pytest.mark.parametrize("average", ["constant", "token", "sequence"])
def test_weights_of_micro_batches_are_those_of_the_step(average: Any) -> None:
    is_token = gae_case()[2]
    counts = (9, int(is_token.sum()), len(is_token))
    parts = [grpo_weights(part, average, *counts) for part in is_token.split(3)]
    assert torch.equal(torch.cat(parts), grpo_weights(is_token, average, *counts))
    with_tokens = is_token.any(dim=1).sum().item()
    total = {"constant": counts[1] / (9 * counts[2]), "token": 1.0, "sequence": with_tokens / counts[2]}[average]
    assert torch.cat(parts).sum().item() == pytest.approx(total, rel=1e-6)


def test_nothing_that_was_before_the_update_gets_a_gradient() -> None:
    a, b, c, d = (random(3, 4, seed=seed) for seed in range(4))
    everything = (a, b, c, d)
    good = a > 0
    for found, moves in [
        (dpo(a, b, c, d, 0.5, 0.1), "ab"),
        (ipo(a, b, c, d, 0.5), "ab"),
        (kto(a, c, good, d.mean() + 3, 0.5), "a"),
        (k3(a, c), "a"),
        (k3(a, c, d), "a"),
        (clipped_policy(a, c, d, 0.2)[0], "a"),
        (clipped_value(a, c, d, 0.2), "a"),
        (bradley_terry(a, b), "ab"),
    ]:
        got = [name for name, slope in zip("abcd", slopes(found.sum(), *everything), strict=True) if slope.any()]
        assert got == list(moves)
    for constant in (
        *gae(a, b, good, 0.9, 0.9),
        token_rewards(a[:, 0], b, good, 0.1),
        group_advantages(a, "group"),
        implicit_rewards(a, b, 0.1),
    ):
        assert not constant.requires_grad


# ---------------------------------------------------------------------- closed forms, with gradients

Check = Callable[[], float]


def each(function: Callable[..., Any], *columns: Tensor) -> Tensor:
    """A function of plain numbers at every place of tensors of one shape."""
    numbers = [function(*place) for place in zip(*(column.flatten().tolist() for column in columns), strict=True)]
    return torch.tensor(numbers, dtype=torch.float64).view(columns[0].shape)


def check_bradley_terry() -> float:
    a, b = random(50), random(50, seed=1)
    loss = objectives.bradley_terry(a, b)
    slope_a, slope_b = slopes(loss.sum(), a, b)
    slope = each(lambda a, b: -sigmoid(b - a), a, b)
    return gap((loss, each(lambda a, b: -log_sigmoid(a - b), a, b)), (slope_a, slope), (slope_b, -slope))


def check_dpo() -> float:
    beta, smooth = 0.7, 0.2
    a, b, c, d = (random(50, seed=seed) for seed in range(4))
    loss = objectives.dpo(a, b, c, d, beta, smooth)

    def expected(a: float, b: float, c: float, d: float) -> float:
        x = beta * (a - b - (c - d))
        return -(1 - smooth) * log_sigmoid(x) - smooth * log_sigmoid(-x)

    def slope(a: float, b: float, c: float, d: float) -> float:
        return beta * (sigmoid(beta * (a - b - (c - d))) - (1 - smooth))

    slope_a, slope_b = slopes(loss.sum(), a, b)
    expected_slope = each(slope, a, b, c, d)
    return gap((loss, each(expected, a, b, c, d)), (slope_a, expected_slope), (slope_b, -expected_slope))


def check_ipo() -> float:
    a, b, c, d = (random(50, seed=seed) for seed in range(4))
    loss = objectives.ipo(a, b, c, d, 0.3)
    slope_a, slope_b = slopes(loss.sum(), a, b)
    slope = each(lambda a, b, c, d: 2 * (a - c - b + d - 0.5 / 0.3), a, b, c, d)
    return gap(
        (loss, each(lambda *x: (x[0] - x[2] - x[1] + x[3] - 0.5 / 0.3) ** 2, a, b, c, d)), (slope_a, slope), (slope_b, -slope)
    )


def check_kto() -> float:
    a, b = random(50), random(50, seed=1)
    good = torch.arange(50) % 3 == 0
    errors = []
    for kl in (row(0.8)[0].requires_grad_(), row(-0.8)[0].requires_grad_()):
        z = max(kl.item(), 0.0)
        loss = objectives.kto(a, b, good, kl, 0.7, 1.5, 0.5)
        # λ - v, as the paper writes it
        value = each(lambda a, b, g, z=z: (1.5 if g else 0.5) * (1 - sigmoid((1 if g else -1) * 0.7 * (a - b - z))), a, b, good)
        rise = each(lambda a, b, z=z: 0.7 * sigmoid(0.7 * (a - b - z)) * sigmoid(-0.7 * (a - b - z)), a, b)
        slope, of_kl = slopes(loss.sum(), a, kl)
        errors.append(gap((loss, value), (slope, torch.where(good, -1.5, 0.5) * rise), (of_kl, torch.zeros_like(of_kl))))
    return max(errors)


def gae_case() -> tuple[Tensor, Tensor, Tensor]:
    """rewards, values (6, 9), garbage outside the answers, and is_token: instruction, answer, padding of every length."""
    rewards, values = random(6, 9, seed=3).detach(), random(6, 9, seed=4).detach()
    first, end = torch.tensor([[0], [2], [0], [4], [8], [3]]), torch.tensor([[9], [6], [3], [9], [9], [3]])
    is_token = (torch.arange(9) >= first) & (torch.arange(9) < end)
    rewards[~is_token], values[~is_token] = 50.0, 70.0
    return rewards, values, is_token


def check_gae() -> float:
    rewards, values, is_token = gae_case()
    expected = torch.zeros_like(rewards)
    for b, t in is_token.nonzero().tolist():
        end = t + int(is_token[b, t:].sum())
        for s in range(t, end):  # Σ (discount lam)^k δ
            following = values[b, s + 1] if s + 1 < end else 0.0
            expected[b, t] += (0.9 * 0.8) ** (s - t) * (rewards[b, s] + 0.9 * following - values[b, s])
    advantages, returns = objectives.gae(rewards, values, is_token, 0.9, 0.8)
    return gap((advantages, expected), (returns, torch.where(is_token, expected + values, 0.0)))


def check_token_rewards() -> float:
    _, kl, is_token = gae_case()
    scores = random(6).detach()
    expected = torch.zeros_like(kl)
    for b, t in is_token.nonzero().tolist():
        is_last = t + 1 == is_token.size(1) or not is_token[b, t + 1]
        expected[b, t] = -0.3 * kl[b, t] + (scores[b] if is_last else 0.0)
    return gap((objectives.token_rewards(scores, kl, is_token, 0.3), expected))


def check_clipped_policy() -> float:
    logp, old, gains = random(20, 30, scale=0.5), random(20, 30, seed=1, scale=0.5), random(20, 30, seed=2)

    def is_cut(logp: float, old: float, gain: float) -> bool:
        return math.exp(logp - old) > 1.2 if gain > 0 else math.exp(logp - old) < 0.8

    def expected(logp: float, old: float, gain: float) -> float:
        return -gain * ((1.2 if gain > 0 else 0.8) if is_cut(logp, old, gain) else math.exp(logp - old))

    loss, is_clipped = objectives.clipped_policy(logp, old, gains, 0.2)
    cut = each(is_cut, logp, old, gains)
    slope, of_gains = slopes(loss.sum(), logp, gains)
    values = each(expected, logp, old, gains)
    return gap((loss, values), (is_clipped.double(), cut), (slope, values * (1 - cut)), (of_gains, torch.zeros_like(of_gains)))


def check_clipped_value() -> float:
    values, old, returns = random(20, 30), random(20, 30, seed=1), random(20, 30, seed=2)

    def expected(value: float, old: float, goal: float) -> tuple[float, float]:
        near = min(max(value, old - 0.2), old + 0.2)
        plain, held = 0.5 * (value - goal) ** 2, 0.5 * (near - goal) ** 2
        return (held, 0.0 if near != value else near - goal) if held > plain else (plain, value - goal)

    loss = objectives.clipped_value(values, old, returns, 0.2)
    places = (values, old, returns)
    slope, of_returns = slopes(loss.sum(), values, returns)
    return gap(
        (loss, each(lambda *x: expected(*x)[0], *places)),
        (slope, each(lambda *x: expected(*x)[1], *places)),
        (of_returns, torch.zeros_like(of_returns)),
    )


def check_k3() -> float:
    a, b = random(50), random(50, seed=1)
    old = random(50, seed=2)
    found, weighted = objectives.k3(a, b), objectives.k3(a, b, old)

    def with_ratio(a: float, b: float, old: float) -> float:
        return math.exp(a - old) * (math.exp(b - a) - (b - a) - 1)

    return gap(
        (found, each(lambda a, b: math.exp(b - a) - (b - a) - 1, a, b)),
        (slopes(found.sum(), a)[0], each(lambda a, b: 1 - math.exp(b - a), a, b)),
        (weighted, each(with_ratio, a, b, old)),
        (slopes(weighted.sum(), a)[0], each(lambda a, b, old: math.exp(a - old) * (a - b), a, b, old)),
    )


def check_group_advantages() -> float:
    rewards = random(6, 4).detach()
    means = [sum(group) / 4 for group in rewards.tolist()]
    spread = [math.sqrt(sum((x - m) ** 2 for x in group) / 3) for group, m in zip(rewards.tolist(), means, strict=True)]
    centred = rewards - row(*means)[:, None]
    return gap(
        (objectives.group_advantages(rewards, "none"), centred),
        (objectives.group_advantages(rewards, "group"), centred / (row(*spread)[:, None] + 1e-4)),
    )


def check_adapted_beta() -> float:
    ratios = torch.linspace(-1, 3, 41, dtype=torch.float64).tolist()
    expected = [0.5 * (1 + max(-0.2, min(0.2, ratio - 1)) * 200 / 400) for ratio in ratios]
    return max(abs(objectives.adapted_beta(0.5, 3.0 * x, 3.0, 200, 400) - y) for x, y in zip(ratios, expected, strict=True))


# ---------------------------------------------------------------------- log-probabilities

B, T, D, V, CAP, HEAT = 3, 7, 5, 11, 4.0, 0.7


def head_case(ignored: str = "some") -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = random(B, T, D, scale=3), random(V, D, seed=1, scale=3)
    targets = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(2))
    if ignored == "some":
        targets[:, :2] = targets[1, 4:] = IGNORE
    elif ignored == "all":
        targets[:] = IGNORE
    return hidden, weight, targets


def plain_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None, temperature: float
) -> tuple[Tensor, Tensor]:
    log_p = (capped(hidden @ weight.T, cap) / temperature).log_softmax(-1)
    found = log_p.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    learns = targets != IGNORE
    return torch.where(learns, found, 0.0), torch.where(learns, -(log_p.exp() * log_p).sum(-1), 0.0)


def check_token_logprobs(ignored: str = "some") -> float:
    hidden, weight, targets = head_case(ignored)
    errors = []
    for cap, temperature in ((None, 1.0), (CAP, 1.0), (None, HEAT), (CAP, HEAT)):
        pull = random(B, T, seed=5)  # what comes after them
        ours = objectives.token_logprobs(hidden, weight, targets, cap, temperature)
        plain, _ = plain_logprobs(hidden, weight, targets, cap, temperature)
        pairs = zip(slopes((ours * pull).sum(), hidden, weight), slopes((plain * pull).sum(), hidden, weight), strict=True)
        errors.append(gap((ours, plain), *pairs))
    return max(errors)


@pytest.mark.parametrize("positions", [1, 2, 13, 21, 1000])  # in a chunk; 13 or 21 have a target
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_token_logprobs_are_the_plain_ones(positions: int, ignored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "CHUNK_LOGITS", positions * V + V - 1)
    assert check_token_logprobs(ignored) < EXACT


@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_entropy_comes_without_gradient_and_changes_nothing(ignored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "CHUNK_LOGITS", 2 * V)
    hidden, weight, targets = head_case(ignored)
    logps, entropy = token_logprobs_entropy(hidden, weight, targets, CAP, HEAT)
    assert gap((entropy, plain_logprobs(hidden, weight, targets, CAP, HEAT)[1].detach())) < EXACT
    assert not slopes(entropy.sum() + 0 * logps.sum(), hidden, weight)[0].any()
    assert torch.equal(logps, token_logprobs(hidden, weight, targets, CAP, HEAT))


def test_token_logprobs_pass_gradcheck_without_a_graph_and_with_one_side_frozen() -> None:
    hidden, weight, targets = head_case()
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, targets, CAP, HEAT), (hidden, weight))
    with torch.no_grad():
        without = token_logprobs(hidden, weight, targets)
    assert not without.requires_grad and torch.equal(without, token_logprobs(hidden, weight, targets))
    both = slopes(token_logprobs(hidden, weight, targets).sum(), hidden, weight)
    assert torch.equal(slopes(token_logprobs(hidden, weight.detach(), targets).sum(), hidden)[0], both[0])
    assert torch.equal(slopes(token_logprobs(hidden.detach(), weight, targets).sum(), weight)[0], both[1])


@pytest.mark.parametrize("autocast", [True, False])
def test_token_logprobs_in_bfloat16_are_summed_in_float32(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator).requires_grad_() for shape in ((4, 64, 16), (200, 16)))
    targets = torch.randint(200, (4, 64), generator=generator)
    exact = plain_logprobs(hidden.double(), weight.double(), targets, None, 1.0)[0]
    expected = slopes(exact.sum(), weight)[0]

    def error(positions: int, head: Tensor) -> float:
        """Of the weight's gradient, with so many positions in a chunk."""
        monkeypatch.setattr(objectives, "CHUNK_LOGITS", positions * 200)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = token_logprobs(hidden if autocast else hidden.bfloat16(), head, targets)
        assert found.dtype == torch.float32
        assert (found - exact).abs().max() < 0.1 and abs((found - exact).mean()) < 0.01
        return float((slopes(found.sum(), weight)[0] - expected).norm() / expected.norm())

    assert error(256, weight) < 0.01
    assert error(1, weight) < 1.1 * error(256, weight)  # a sum of 256 gradients, as good as one product
    assert error(1, weight.bfloat16()) > 1.4 * error(256, weight)  # which in half precision it is not


class Largest(TorchDispatchMode):
    """Notes the most elements that any operation's result has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def kept(function: Callable[..., Tensor], *given_tensors: Tensor) -> tuple[int, Tensor]:
    """Bytes of the storages that autograd keeps for a function's backward pass, each once, those given apart; and its result."""
    given = {tensor.untyped_storage().data_ptr() for tensor in given_tensors}
    storages: dict[int, torch.UntypedStorage] = {}  # holding them keeps their addresses from being used again

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function(*given_tensors)
    return sum(storage.nbytes() for address, storage in storages.items() if address not in given), result


def test_all_logits_never_exist_nor_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    words = 1000
    monkeypatch.setattr(objectives, "CHUNK_LOGITS", 4 * words)
    hidden, weight = random(B, T, D), random(words, D, seed=1)
    targets = torch.randint(words, (B, T), generator=torch.Generator().manual_seed(2))
    with Largest() as ours:
        few, found = kept(lambda *x: token_logprobs(*x, CAP, HEAT), hidden, weight, targets)
        found.sum().backward()
    with Largest() as plain:
        many, found = kept(lambda *x: plain_logprobs(*x, CAP, HEAT)[0], hidden, weight, targets)
        found.sum().backward()
    assert plain.elements == B * T * words and many > 8 * B * T * words
    assert ours.elements == words * D == 5 * words  # the weight's gradient; a chunk has 4 * words
    assert few <= 8 * (B * T * D + 4 * B * T)  # rows of `hidden` and some indices


# ---------------------------------------------------------------------- mistakes

CHECKS: dict[str, Check] = {
    "bradley_terry": check_bradley_terry,
    "dpo": check_dpo,
    "ipo": check_ipo,
    "kto": check_kto,
    "gae": check_gae,
    "token_rewards": check_token_rewards,
    "clipped_policy": check_clipped_policy,
    "clipped_value": check_clipped_value,
    "k3": check_k3,
    "group_advantages": check_group_advantages,
    "adapted_beta": check_adapted_beta,
    "token_logprobs": check_token_logprobs,
}


def gae_past_the_end(rewards: Tensor, values: Tensor, is_token: Tensor, discount: float, lam: float) -> tuple[Tensor, Tensor]:
    """What follows the last token has the value that the head gives it."""
    delta = rewards + discount * F.pad(values[:, 1:], (0, 1)) - values
    return gae_of(delta * is_token, values, is_token, discount * lam)


def gae_through_padding(rewards: Tensor, values: Tensor, is_token: Tensor, discount: float, lam: float) -> tuple[Tensor, Tensor]:
    """The sum begins at the end of the row."""
    values = values * is_token
    delta = rewards + discount * F.pad(values[:, 1:], (0, 1)) - values
    return gae_of(delta, values, is_token, discount * lam)


def gae_of(delta: Tensor, values: Tensor, is_token: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    later, found = torch.zeros_like(delta[:, 0]), []
    for t in reversed(range(delta.size(1))):
        later = delta[:, t] + decay * later
        found.append(later)
    advantages = torch.stack(found[::-1], dim=1) * is_token
    return advantages, advantages + values * is_token


def ratio_clipped_first(logp: Tensor, old: Tensor, gains: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """The minimum of the ratios, not of the gains: the wrong side where an advantage is negative."""
    ratio = (logp - old.detach()).exp()
    loss = -torch.minimum(ratio, ratio.clamp(1 - clip, 1 + clip)) * gains.detach()
    return loss, clipped_policy(logp, old, gains, clip)[1]


def with_policy(loss: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def wrong(logp: Tensor, old: Tensor, gains: Tensor, clip: float) -> tuple[Tensor, Tensor]:
        return loss((logp - old.detach()).exp(), gains.detach(), clip), clipped_policy(logp, old, gains, clip)[1]

    return wrong


def policy_with_live_advantages(logp: Tensor, old: Tensor, gains: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    ratio = (logp - old.detach()).exp()
    return -torch.minimum(ratio * gains, ratio.clamp(1 - clip, 1 + clip) * gains), clipped_policy(logp, old, gains, clip)[1]


def values_with(combine: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def wrong(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
        old, returns = old.detach(), returns.detach()
        near = old + (values - old).clamp(-clip, clip)
        return 0.5 * combine((values - returns).square(), (near - returns).square())

    return wrong


def live_kl(
    logp: Tensor, reference: Tensor, good: Tensor, kl: Tensor, beta: float, good_weight: float, bad_weight: float
) -> Tensor:
    gain = (logp - reference.detach() - kl.clamp(min=0)) * torch.where(good, 1.0, -1.0)
    return torch.where(good, good_weight, bad_weight) * torch.sigmoid(-beta * gain)


def kto_of(change: Callable[..., tuple[Any, ...]]) -> Callable[..., Tensor]:
    return lambda *arguments: kto(*change(*arguments))


def ratio_or_1(logp: Tensor, old: Tensor | None) -> Tensor:
    return torch.ones_like(logp) if old is None else (logp - old.detach()).exp()


def of_estimate(estimate: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda logp, reference, old=None: estimate(logp, reference) * ratio_or_1(logp, old)


def spread_of(correction: int, epsilon: float = 1e-4) -> Callable[..., Tensor]:
    def wrong(rewards: Tensor, scale: str) -> Tensor:
        centred = rewards - rewards.mean(dim=1, keepdim=True)
        return centred if scale == "none" else centred / (rewards.std(dim=1, keepdim=True, correction=correction) + epsilon)

    return wrong


def score_at(columns: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def wrong(scores: Tensor, kl: Tensor, is_token: Tensor, beta: float) -> Tensor:
        return torch.where(is_token, -beta * kl, 0.0) + scores[:, None] * columns(is_token)

    return wrong


MUTANTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "bradley_terry: the worse first": ("bradley_terry", lambda a, b: bradley_terry(b, a)),
    "bradley_terry: no logarithm": ("bradley_terry", lambda a, b: 1 - torch.sigmoid(a - b)),
    "dpo: references swapped": ("dpo", lambda a, b, c, d, *rest: dpo(a, b, d, c, *rest)),
    "dpo: references added": ("dpo", lambda a, b, c, d, *rest: dpo(a, b, -c, -d, *rest)),
    "dpo: no reference": ("dpo", lambda a, b, c, d, *rest: dpo(a, b, 0 * c, 0 * d, *rest)),
    "dpo: smoothing subtracted": (
        "dpo",
        lambda a, b, c, d, beta, s=0.0: (1 - s) * dpo(a, b, c, d, beta) - s * dpo(b, a, d, c, beta),
    ),
    "dpo: smoothing forgotten": ("dpo", lambda a, b, c, d, beta, s=0.0: dpo(a, b, c, d, beta)),
    "dpo: beta after the logarithm": ("dpo", lambda a, b, c, d, beta, s=0.0: beta * dpo(a, b, c, d, 1.0, s)),
    "ipo: goal 1 / beta": ("ipo", lambda a, b, c, d, beta: ipo(a, b, c, d, beta / 2)),
    "ipo: references swapped": ("ipo", lambda a, b, c, d, beta: ipo(a, b, d, c, beta)),
    "ipo: beta times the margin": ("ipo", lambda a, b, c, d, beta: ipo(beta * a, beta * b, beta * c, beta * d, beta)),
    "kto: drift added": ("kto", kto_of(lambda a, b, g, kl, *rest: (a, b, g, -kl, *rest))),
    "kto: drift below 0": ("kto", lambda a, b, g, kl, *rest: kto(a, b + kl.detach(), g, 0 * kl, *rest)),
    "kto: a gradient through the drift": ("kto", live_kl),
    "kto: weights swapped": ("kto", kto_of(lambda a, b, g, kl, beta, x, y: (a, b, g, kl, beta, y, x))),
    "kto: labels swapped": ("kto", kto_of(lambda a, b, g, kl, beta, x, y: (a, b, ~g, kl, beta, y, x))),
    "gae: a value after the end": ("gae", gae_past_the_end),
    "gae: through the padding": ("gae", gae_through_padding),
    "gae: lambda forgotten": ("gae", lambda r, v, m, discount, lam: gae(r, v, m, discount, 1.0)),
    "gae: discount forgotten": ("gae", lambda r, v, m, discount, lam: gae(r, v, m, 1.0, lam * discount)),
    "gae: returns are not whole": ("gae", lambda *x: (gae(*x)[0], gae(*x)[0])),
    "token_rewards: score at the end of the row": ("token_rewards", score_at(lambda m: torch.arange(m.size(1)) == m.size(1) - 1)),
    "token_rewards: score on every token": ("token_rewards", score_at(lambda m: m)),
    "token_rewards: drift rewarded": ("token_rewards", lambda s, kl, m, beta: token_rewards(s, -kl, m, beta)),
    "clipped_policy: the lesser ratio": ("clipped_policy", ratio_clipped_first),
    "clipped_policy: maximum": (
        "clipped_policy",
        with_policy(lambda r, gains, clip: -torch.maximum(r * gains, r.clamp(1 - clip, 1 + clip) * gains)),
    ),
    "clipped_policy: always clipped": (
        "clipped_policy",
        with_policy(lambda r, gains, clip: -r.clamp(1 - clip, 1 + clip) * gains),
    ),
    "clipped_policy: never clipped": ("clipped_policy", with_policy(lambda r, gains, clip: -r * gains)),
    "clipped_policy: wrong sign": ("clipped_policy", lambda *x: (-clipped_policy(*x)[0], clipped_policy(*x)[1])),
    "clipped_policy: a gradient to the advantages": ("clipped_policy", policy_with_live_advantages),
    "clipped_policy: counted on both sides": (
        "clipped_policy",
        lambda a, b, g, clip: (clipped_policy(a, b, g, clip)[0], ((a - b).exp() - 1).abs() > clip),
    ),
    "clipped_value: minimum": ("clipped_value", values_with(torch.minimum)),
    "clipped_value: never clipped": ("clipped_value", values_with(lambda plain, held: plain)),
    "clipped_value: always clipped": ("clipped_value", values_with(lambda plain, held: held)),
    "clipped_value: no half": ("clipped_value", lambda *x: 2 * clipped_value(*x)),
    "k3: k1": ("k3", of_estimate(lambda logp, reference: logp - reference.detach())),
    "k3: k2": ("k3", of_estimate(lambda logp, reference: 0.5 * (logp - reference.detach()).square())),
    "k3: the other way round": ("k3", of_estimate(lambda logp, reference: k3(-logp, -reference))),
    "k3: no gradient": ("k3", of_estimate(lambda logp, reference: k3(logp.detach(), reference) + 0 * logp)),
    "k3: a ratio without gradient": (
        "k3",
        lambda logp, reference, old=None: k3(logp, reference) * ratio_or_1(logp, old).detach(),
    ),
    "k3: the ratio's inverse": ("k3", lambda logp, reference, old=None: k3(logp, reference) / ratio_or_1(logp, old)),
    "group_advantages: deviation of a population": ("group_advantages", spread_of(0)),
    "group_advantages: mean of all groups": (
        "group_advantages",
        lambda r, scale: group_advantages(r.view(1, -1), scale).view_as(r),
    ),
    "group_advantages: scaled all the same": ("group_advantages", lambda r, scale: group_advantages(r, "group")),
    "adapted_beta: error not cut": (
        "adapted_beta",
        lambda beta, kl, goal, n, horizon: beta * (1 + (kl / goal - 1) * n / horizon),
    ),
    "adapted_beta: wrong way": (
        "adapted_beta",
        lambda beta, kl, goal, n, horizon: adapted_beta(beta, 2 * goal - kl, goal, n, horizon),
    ),
    "token_logprobs: temperature before the cap": (
        "token_logprobs",
        lambda h, w, t, cap=None, heat=1.0: token_logprobs(h / heat, w, t, cap),
    ),
    "token_logprobs: temperature forgotten": ("token_logprobs", lambda h, w, t, cap=None, heat=1.0: token_logprobs(h, w, t, cap)),
    "token_logprobs: cap forgotten": (
        "token_logprobs",
        lambda h, w, t, cap=None, heat=1.0: token_logprobs(h, w, t, None, heat),
    ),
    "token_logprobs: one late": ("token_logprobs", lambda h, w, t, *rest: token_logprobs(h.roll(1, dims=1), w, t, *rest)),
    "token_logprobs: padding counts": ("token_logprobs", lambda h, w, t, *rest: token_logprobs(h, w, t.clamp(min=0), *rest)),
    "token_logprobs: no gradient to the weight": (
        "token_logprobs",
        lambda h, w, t, *rest: token_logprobs(h, w.detach(), t, *rest) + 0 * w.sum(),
    ),
}


@pytest.mark.parametrize("name", CHECKS)
def test_closed_forms(name: str) -> None:
    assert CHECKS[name]() < EXACT


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mistake_is_noticed(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wrong = MUTANTS[mutant]
    monkeypatch.setattr(objectives, name, wrong)
    assert CHECKS[name]() > NOTICED


# ---------------------------------------------------------------------- trl's trainers

WORDS, WIDTH, BETA = 12, 6, 0.3


class Bigram(nn.Module):
    """A language model whose next word depends on the last alone, in plain float64 and with the outputs that trl asks for."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(random(WORDS, WIDTH, seed=seed, scale=0.7).detach())
        self.weight = nn.Parameter(random(WORDS, WIDTH, seed=seed + 1, scale=0.7).detach())

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Any) -> Any:
        from trl.trainer.utils import FusedCausalLMOutput

        logits = self.embedding[input_ids[:, :-1]] @ self.weight.T
        log_p = logits.log_softmax(-1)
        learns = labels[:, 1:] != IGNORE
        found = log_p.gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return FusedCausalLMOutput(
            log_probs=torch.where(learns, found, 0.0),
            entropy=-(log_p.exp() * log_p).sum(-1),
            mean_logits=logits.mean(-1),
            is_top1=logits.argmax(-1) == labels[:, 1:],
        )

    def logps(self, ids: Tensor, is_answer: Tensor) -> Tensor:
        """(B, T - 1), by our own function."""
        targets = torch.where(is_answer[:, 1:].bool(), ids[:, 1:], IGNORE)
        return objectives.token_logprobs(self.embedding[ids[:, :-1]], self.weight, targets)


@dataclass
class Trl:
    dpo: Any
    kto: Any
    grpo: Any
    reference: Any


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trl]:
    """trl's own trainers, each with a small random GPT-2."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        from datasets import Dataset
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
        from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer

        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w0")

        def gpt2(seed: int) -> Any:
            torch.manual_seed(seed)
            shape = {"n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 1}
            model = GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, **shape))
            for parameter in model.parameters():
                parameter.data += 0.3 * torch.randn_like(parameter)
            return model

        def arguments(config: Any, **more: Any) -> dict[str, Any]:
            folder = str(tmp_path_factory.mktemp("trl"))
            told = config(
                folder, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, beta=BETA, disable_dropout=True, **more
            )
            return {"args": told, "processing_class": tokenizer}

        pair = Dataset.from_list([{"prompt": "w2", "chosen": " w4 w5", "rejected": " w7"}])
        judged = Dataset.from_list([{"prompt": "w2", "completion": " w4", "label": label} for label in (True, False)])
        asked = Dataset.from_list([{"prompt": "w2 w3"}])
        grpo = arguments(GRPOConfig, per_device_train_batch_size=8, num_generations=4, max_completion_length=6) | {
            "train_dataset": asked
        }
        grpo["args"].beta = 0.0  # or it looks for a reference model in files
        reference = gpt2(1)
        yield Trl(
            DPOTrainer(gpt2(0), reference, train_dataset=pair, **arguments(DPOConfig)),
            KTOTrainer(gpt2(0), gpt2(1), train_dataset=judged, **arguments(KTOConfig, per_device_train_batch_size=2)),
            GRPOTrainer(gpt2(0), lambda completions, worth, **_: worth, **grpo),
            reference,
        )


uses_trl = pytest.mark.filterwarnings("ignore")  # trl's and its libraries', of what they will rename


def texts(count: int, seed: int) -> dict[str, Tensor]:
    """Instructions of 1 to 4 words, answers of 1 to 5, padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORDS, (count, 9), generator=generator)
    first = torch.randint(1, 5, (count, 1), generator=generator)
    end = first + torch.randint(1, 6, (count, 1), generator=generator)
    end[0], first[0] = 9, 2
    place = torch.arange(9)
    return {
        "input_ids": ids,
        "attention_mask": (place < end).long(),
        "completion_mask": ((place >= first) & (place < end)).long(),
    }


def compare(theirs: Tensor, ours: Tensor, model: nn.Module) -> float:
    """Value and gradients."""
    parameters = tuple(model.parameters())
    return gap((theirs, ours), *zip(slopes(theirs, *parameters), slopes(ours, *parameters), strict=True))


def dpo_error(trl: Trl, loss_type: str, smoothing: float = 0.0) -> float:
    trainer, model, reference = trl.dpo, Bigram(0), Bigram(7)
    batch = texts(8 if smoothing == 0 else 2, seed=1)  # better answers, then worse ones
    batch["input_ids"][len(batch["input_ids"]) // 2 :, 0] = batch["input_ids"][: len(batch["input_ids"]) // 2, 0]
    trainer.ref_model, trainer.loss_types, trainer.label_smoothing = reference, [loss_type], smoothing
    theirs = trainer.compute_loss(model, batch)

    lengths = batch["completion_mask"].sum(1)

    def halves(model: Bigram) -> tuple[Tensor, ...]:
        found = model.logps(batch["input_ids"], batch["completion_mask"]).sum(1)
        return (found / lengths if loss_type == "ipo" else found).chunk(2)

    with torch.no_grad():
        before = halves(reference)
    if loss_type == "ipo":
        losses = objectives.ipo(*halves(model), *before, BETA)
    else:
        losses = objectives.dpo(*halves(model), *before, BETA, smoothing)
    return compare(theirs, losses.mean(), model)


def kto_error(trl: Trl) -> float:
    """With a drift above 0 and one below it."""
    errors, drifts = [], []
    for seeds in ((0, 7), (7, 0)):
        trainer, (model, reference) = trl.kto, map(Bigram, seeds)
        batch = texts(6, seed=2)
        mismatched = texts(6, seed=3)
        batch |= {f"KL_{name}": value for name, value in mismatched.items()}
        batch["label"] = torch.tensor([True, False, False, True, False, True])
        trainer.ref_model, trainer.desirable_weight, trainer.undesirable_weight = reference, 1.5, 0.5
        theirs = trainer.compute_loss(model, batch)

        logp = model.logps(batch["input_ids"], batch["completion_mask"]).sum(1)
        before = reference.logps(batch["input_ids"], batch["completion_mask"]).sum(1)
        other = [some.logps(mismatched["input_ids"], mismatched["completion_mask"]).sum(1) for some in (model, reference)]
        drift = (other[0] - other[1]).mean()
        drifts.append(drift.item())
        errors.append(compare(theirs, objectives.kto(logp, before, batch["label"], drift, BETA, 1.5, 0.5).mean(), model))
    assert min(drifts) < -0.1 and max(drifts) > 0.1
    return max(errors)


AVERAGES = {"grpo": "sequence", "dr_grpo": "constant", "dapo": "token", "bnpo": "token"}


def grpo_error(trl: Trl, loss_type: str, micro_batches: int = 2, beta: float = BETA, as_published: bool = True) -> float:
    """Answers of one step in micro-batches of 4, with words clipped on either side; the divergence as published or weighted."""
    trainer, model, reference = trl.grpo, Bigram(0), Bigram(7)
    count, instruction = 4 * micro_batches, 3
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 7, (count, 1), generator=generator)
    step = {
        "prompt_ids": torch.randint(WORDS, (count, instruction), generator=generator),
        "prompt_mask": torch.ones(count, instruction, dtype=torch.long),
        "completion_ids": torch.randint(WORDS, (count, 6), generator=generator),
        "completion_mask": (torch.arange(6) < lengths).long(),
        "advantages": row(1.5, -0.7, 0.4, -1.1, -2, 0.3, 0.9, -0.2)[:count],
    }
    ids = torch.cat([step["prompt_ids"], step["completion_ids"]], dim=1)
    is_answer = torch.cat([0 * step["prompt_mask"], step["completion_mask"]], dim=1)
    is_token = is_answer[:, 1:].bool()
    logp, start = (some.logps(ids, is_answer) for some in (model, reference))
    old = (logp + random(*logp.shape, seed=8, scale=0.4)).detach() * is_token
    step |= {"old_per_token_logps": old[:, instruction - 1 :], "ref_per_token_logps": start.detach()[:, instruction - 1 :]}

    trainer.loss_type, trainer.beta, trainer.max_completion_length = loss_type, beta, 9
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = micro_batches
    trainer.args.use_bias_correction_kl = not as_published
    trainer.model.train()
    trainer._metrics["train"].clear()
    theirs = torch.stack(
        [
            trainer.compute_loss(
                model, {name: value[part : part + 4] for name, value in step.items()} | {"num_items_in_batch": tokens}
            )
            for tokens in [step["completion_mask"].sum()]
            for part in range(0, count, 4)
        ]
    ).sum()

    loss, is_clipped = objectives.clipped_policy(logp, old, step["advantages"][:, None], 0.2)
    loss = loss + beta * objectives.k3(logp, start, None if as_published else old)
    weights = objectives.grpo_weights(is_token, AVERAGES[loss_type], 9, int(is_token.sum()), count, logp.dtype)
    up, down = (is_clipped & is_token & (step["advantages"][:, None] * sign > 0) for sign in (1, -1))
    assert up.any() and down.any()
    if micro_batches == 1:
        (share,) = trainer._metrics["train"]["clip_ratio/region_mean"]
        assert share == pytest.approx(((is_clipped & is_token).sum() / is_token.sum()).item(), abs=1e-6)
    return compare(theirs, (weights * loss).sum(), model)


TRL_CHECKS: dict[str, Callable[[Trl], float]] = {
    "dpo": lambda trl: dpo_error(trl, "sigmoid"),
    "dpo, smoothed": lambda trl: dpo_error(trl, "aot", 0.2),  # of one pair, where there is nothing to sort; "sigmoid" has none
    "ipo": lambda trl: dpo_error(trl, "ipo"),
    "kto": kto_error,
    "grpo": lambda trl: grpo_error(trl, "grpo"),
    "dr_grpo": lambda trl: grpo_error(trl, "dr_grpo"),
    "dapo": lambda trl: grpo_error(trl, "dapo"),
    "bnpo": lambda trl: grpo_error(trl, "bnpo", micro_batches=1),
    "grpo without reference": lambda trl: grpo_error(trl, "grpo", beta=0.0),
    "dapo, ratio in the divergence": lambda trl: grpo_error(trl, "dapo", as_published=False),
}


@uses_trl
@pytest.mark.parametrize("name", TRL_CHECKS)
def test_losses_and_gradients_are_those_of_trl(name: str, trl: Trl) -> None:
    assert TRL_CHECKS[name](trl) < EXACT


@uses_trl
@pytest.mark.parametrize("scale", ["none", "group"])
def test_advantages_are_those_of_trl(scale: Any, trl: Trl) -> None:
    """Two prompts, four answers sampled to each by trl, and what its reward function says of them."""
    worth = torch.tensor([[0.0, 1.0, 0.25, -3.0], [0.1, 0.1, 0.7, 0.1]])
    trl.grpo.scale_rewards, trl.grpo.beta = scale, 0.0
    rows = [{"prompt": prompt, "worth": x} for prompt, some in zip(("w2 w3", "w4"), worth.tolist(), strict=True) for x in some]
    theirs = trl.grpo._generate_and_score_completions(rows)["advantages"].view(2, 4)
    assert (objectives.group_advantages(worth, scale) - theirs).abs().max() < 1e-6
    if scale == "group":
        assert (spread_of(0)(worth, scale) - theirs).abs().max() > 0.1
        assert (spread_of(1, 0.0)(worth, scale) - theirs).abs().max() > 1e-5


@uses_trl
def test_a_real_gpt2_has_trls_loss_in_float32(trl: Trl) -> None:
    """Through trl's own head, which sums in float32 whatever the model's precision."""
    model, batch = trl.dpo.model, texts(8, seed=4)
    trl.dpo.ref_model, trl.dpo.loss_types = trl.reference, ["sigmoid"]
    theirs = trl.dpo.compute_loss(model, batch)

    def halves(model: Any) -> tuple[Tensor, ...]:
        hidden = model.transformer(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        targets = torch.where(batch["completion_mask"].bool(), batch["input_ids"], IGNORE)
        return token_logprobs(hidden[:, :-1], model.lm_head.weight, targets[:, 1:]).sum(1).chunk(2)

    with torch.no_grad():
        before = halves(trl.reference)
    ours = dpo(*halves(model), *before, BETA).mean()
    parameters = tuple(model.parameters())
    pairs = [(theirs, ours), *zip(slopes(theirs, *parameters), slopes(ours, *parameters), strict=True)]
    assert max((a - b).detach().abs().max().item() for a, b in pairs) < 1e-5
    assert max(b.detach().abs().max().item() for _, b in pairs) > 0.1


def mean_over_tokens(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return token_logprobs(hidden, weight, targets) / (targets != IGNORE).sum(1, keepdim=True)


def sum_over_tokens(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return token_logprobs(hidden, weight, targets) * (targets != IGNORE).sum(1, keepdim=True)


def weighed(change: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Weights changed by what they are of: weights, is_token, tokens of the step."""
    return lambda is_token, *rest: change(grpo_weights(is_token, *rest), is_token, rest[2])


TRL_MUTANTS: dict[str, tuple[str, str, Callable[..., Any]]] = {
    name: (name.partition(":")[0], function, wrong)
    for name, function, wrong in [
        ("dpo: references swapped", "dpo", MUTANTS["dpo: references swapped"][1]),
        ("dpo: means of the tokens", "token_logprobs", mean_over_tokens),
        ("dpo: one late", "token_logprobs", MUTANTS["token_logprobs: one late"][1]),
        ("dpo: padding and instruction count", "token_logprobs", MUTANTS["token_logprobs: padding counts"][1]),
        ("dpo, smoothed: smoothing subtracted", "dpo", MUTANTS["dpo: smoothing subtracted"][1]),
        ("dpo, smoothed: smoothing forgotten", "dpo", MUTANTS["dpo: smoothing forgotten"][1]),
        ("ipo: sums of the tokens", "token_logprobs", sum_over_tokens),
        ("ipo: goal 1 / beta", "ipo", MUTANTS["ipo: goal 1 / beta"][1]),
        ("kto: drift added", "kto", MUTANTS["kto: drift added"][1]),
        ("kto: drift below 0", "kto", MUTANTS["kto: drift below 0"][1]),
        ("kto: a gradient through the drift", "kto", live_kl),
        ("kto: weights swapped", "kto", MUTANTS["kto: weights swapped"][1]),
        ("grpo: k1", "k3", MUTANTS["k3: k1"][1]),
        ("grpo: k3 the other way round", "k3", MUTANTS["k3: the other way round"][1]),
        ("grpo: k3 without gradient", "k3", MUTANTS["k3: no gradient"][1]),
        ("dapo, ratio in the divergence: as published", "k3", lambda logp, reference, old: k3(logp, reference)),
        ("dapo, ratio in the divergence: no gradient to it", "k3", MUTANTS["k3: a ratio without gradient"][1]),
        ("grpo: the lesser ratio", "clipped_policy", ratio_clipped_first),
        ("grpo: maximum", "clipped_policy", MUTANTS["clipped_policy: maximum"][1]),
        ("grpo: never clipped", "clipped_policy", MUTANTS["clipped_policy: never clipped"][1]),
        ("grpo: by all tokens", "grpo_weights", weighed(lambda w, m, tokens: m / tokens)),
        ("grpo: by answers alone", "grpo_weights", weighed(lambda w, m, tokens: w * m.sum(1, keepdim=True))),
        ("dr_grpo: by the longest answer", "grpo_weights", weighed(lambda w, m, tokens: w * 9 / m.sum(1).max())),
        ("dr_grpo: padding counts", "grpo_weights", weighed(lambda w, m, tokens: w.max().expand_as(w) + 0 * w)),
        ("dapo: by each answer", "grpo_weights", weighed(lambda w, m, tokens: m / m.sum(1, keepdim=True) / len(m))),
        (
            "dapo: by the micro-batch's tokens",
            "grpo_weights",
            weighed(lambda w, m, tokens: torch.cat([part / part.sum() / 2 for part in m.double().split(4)])),
        ),
    ]
}


@uses_trl
@pytest.mark.parametrize("mutant", TRL_MUTANTS)
def test_a_mistake_is_not_trls(mutant: str, trl: Trl, monkeypatch: pytest.MonkeyPatch) -> None:
    name, function, wrong = TRL_MUTANTS[mutant]
    monkeypatch.setattr(objectives, function, wrong)
    assert TRL_CHECKS[name](trl) > NOTICED


def test_as_a_reward_k1_pulls_along_the_divergence_and_k3_does_not() -> None:
    """The policy gradient E[∇log p · penalty], summed over a vocabulary of five, beside the divergence's own gradient."""
    draw, cosines = torch.Generator().manual_seed(0), []
    for _ in range(100):
        first, shift = torch.randn(2, 5, generator=draw, dtype=torch.float64)
        logits = first.requires_grad_()
        start, logp = (first.detach() + 0.3 * shift).log_softmax(0), logits.log_softmax(0)
        (true,) = torch.autograd.grad((logp.exp() * (logp - start)).sum(), logits, retain_graph=True)
        found = {}
        for name, penalty in (("k1", logp - start), ("k3", objectives.k3(logp, start))):
            (found[name],) = torch.autograd.grad((logp.exp().detach() * penalty.detach() * logp).sum(), logits, retain_graph=True)
        torch.testing.assert_close(found["k1"], true, rtol=0, atol=1e-14)
        cosines.append(torch.cosine_similarity(found["k3"], true, dim=0).item())
    assert abs(sum(cosines) / 100) < 0.3 and min(cosines) < -0.5
