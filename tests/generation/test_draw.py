"""Tokens drawn by the kernels: the one that `sampling.distribution` gives, in float64, at every point of its cumulative sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact import noisy, shape
from torch import Tensor

from glassgpt.config.generate import Sampling
from glassgpt.generation import Generator
from glassgpt.generation.native import NativeModel
from glassgpt.generation.plain_runner import TensorScores
from glassgpt.generation.sampling import distribution

NEAR = 2e-6
"""Of float32's roundings: what is decided by less than this may be decided otherwise."""
RULES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "cold": {"temperature": 0.2},
    "hot": {"temperature": 3.0},
    "top-k": {"top_k": 7},
    "most of them": {"top_k": 40},
    "one": {"top_k": 1},
    "top-p": {"top_p": 0.9},
    "a small p": {"top_p": 0.03},
    "min-p": {"min_p": 0.1},
    "all": {"temperature": 0.8, "top_k": 20, "top_p": 0.7, "min_p": 0.05},
    "all, flat": {"temperature": 2.0, "top_k": 50, "top_p": 0.95, "min_p": 0.02},
}


def drawer(kernels: str) -> Callable[[Tensor, Sampling, float], int]:
    """draw(logits (V,) float32, rules, point) by the kernels."""
    model = NativeModel(noisy(shape(n_layer=1), torch.float32), kernels=kernels, threads=1)

    def draw(logits: Tensor, sampling: Sampling, point: float) -> int:
        assert logits.dtype == torch.float32 and logits.is_contiguous()
        best, rules = int(logits.argmax()), (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        return int(model.lib.glass_draw(model.engine, logits.data_ptr(), len(logits), best, *rules, point))

    return draw


def logits_of(count: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(count, generator=torch.Generator().manual_seed(seed))


def is_settled(logits: Tensor, sampling: Sampling) -> bool:
    """Whether no token is in or out by a rounding alone."""
    wide = Sampling(temperature=sampling.temperature, top_k=sampling.top_k)
    p = distribution(logits.double()[None], wide)[0].sort(descending=True).values
    p = p[p > 0]
    ahead = p.cumsum(0)[:-1]  # of the second, the third ...
    by_p = sampling.top_p == 1 or bool((ahead - sampling.top_p).abs().gt(NEAR).all())
    return by_p and (sampling.min_p == 0 or bool((p / p[0] - sampling.min_p).abs().gt(NEAR).all()))


def check_points(kernels: str, logits: Tensor, sampling: Sampling) -> None:
    """In the middle of each token's stretch, just inside both its ends, and nothing that is left out."""
    assert is_settled(logits, sampling)
    draw = drawer(kernels)
    p = distribution(logits.double()[None], sampling)[0]
    ends = p.cumsum(0)
    for token_id in p.nonzero().flatten().tolist():
        begin, end = float(ends[token_id] - p[token_id]), float(ends[token_id])
        if end - begin > 4 * NEAR:
            for point in (begin + NEAR, (begin + end) / 2, end - NEAR):
                assert draw(logits, sampling, point) == token_id
    possible = p.nonzero().flatten().tolist()
    assert draw(logits, sampling, 0.0) in possible
    assert draw(logits, sampling, 1 - 2**-53) in possible


def check_rules(kernels: str) -> None:
    for seed, (count, rules) in enumerate([(count, rules) for count in (1, 5, 63, 64, 65, 300) for rules in RULES.values()]):
        check_points(kernels, logits_of(count, seed), Sampling(**rules))


def test_every_rule(kernels: str) -> None:
    check_rules(kernels)


def check_ties(kernels: str) -> None:
    """All that tie with the k-th stay; of a nucleus the earlier ones."""
    logits = torch.tensor([1.0, 2.0, 2.0, 0.0, 2.0, 1.0, 1.0, -1.0] * 20)
    for rules in ({"top_k": 61}, {"top_k": 60}, {"top_p": 0.3}, {"top_p": 0.801}, {"top_k": 70, "top_p": 0.5}):
        check_points(kernels, logits, Sampling(**rules))  # type: ignore[arg-type]


def test_p_is_not_shortened(portable: str) -> None:
    """0.001 of a thousand equal ones is one of them; in float32 it would be a little more."""
    draw = drawer(portable)
    assert {draw(torch.zeros(1_000), Sampling(top_p=0.001), step / 50) for step in range(50)} == {0}


def test_scores_that_were_copied(portable: str) -> None:
    """Each place draws from its own row, with rules that no C number holds."""
    model = NativeModel(noisy(shape(), torch.float32), kernels=portable, threads=1)
    scores = model.start().feed([[1], [2], [3]])
    for places in ([0, 1, 2], [2, 0, 2, 1]):
        some, sampling = scores.of(places), Sampling(top_k=2**32 + 1, top_p=0.9)
        expected = TensorScores(some.logits.clone()).draw(sampling, [Generator(seed) for seed in range(len(places))])
        assert some.draw(sampling, [Generator(seed) for seed in range(len(places))]) == expected
        assert some.logits_of([5] * len(places)) == some.logits[:, 5].tolist()


def test_ties(kernels: str) -> None:
    check_ties(kernels)


@pytest.mark.parametrize(
    "rules", [{}, {"top_k": 1}, {"top_k": 40}, {"top_k": 50_000}, {"top_p": 0.9}, {"top_k": 200, "min_p": 0.2}]
)
def test_a_real_vocabulary(rules: dict[str, Any], portable: str) -> None:
    """A thousand points of 50,257 tokens."""
    logits, sampling, draw = logits_of(50_257, spread=3.0), Sampling(**rules), drawer(portable)
    p = distribution(logits.double()[None], sampling)[0]
    ends = p.cumsum(0)
    points = torch.rand(1_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.searchsorted(ends, points * ends[-1], right=True)
    is_clear = ((ends[wanted] - points).abs() > 1e-5) & ((ends[wanted] - p[wanted] - points).abs() > 1e-5)
    found = torch.tensor([draw(logits, sampling, float(point)) for point in points])
    assert bool((p[found] > 0).all())
    assert torch.equal(found[is_clear], wanted[is_clear]) and int(is_clear.sum()) > 400


@pytest.mark.parametrize("rules", RULES)
def test_what_is_impossible_stays_so(rules: str, kernels: str) -> None:
    """-inf is never drawn, and takes no place among the k likeliest."""
    logits = logits_of(90, 5)
    logits[::3] = -torch.inf
    check_points(kernels, logits, Sampling(**RULES[rules]))
    few = torch.full((90,), -torch.inf)
    few[[7, 70]] = torch.tensor([1.0, 1.5])
    draw = drawer(kernels)
    assert {draw(few, Sampling(**RULES[rules]), step / 16) for step in range(16)} <= {7, 70}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [[0], [3, 66, 89], list(range(90))])
@pytest.mark.parametrize("rules", RULES)
def test_numbers_that_are_none_end_nothing(value: float, where: list[int], rules: str, portable: str) -> None:
    """Some id comes out; that the logits are none is told by their sum."""
    logits = logits_of(90, 6)
    logits[where] = value
    draw = drawer(portable)
    assert all(0 <= draw(logits, Sampling(**RULES[rules]), step / 8) < 90 for step in range(8))


def test_extreme_temperatures(kernels: str) -> None:
    logits, draw = logits_of(50, 7), drawer(kernels)
    for point in (0.0, 0.5, 1 - 2**-53):
        assert (
            draw(logits, Sampling(temperature=1e-300), point)
            == draw(logits, Sampling(temperature=1e-9), point)
            == logits.argmax()
        )
    assert draw(logits, Sampling(temperature=1e300), 0.505) == 25  # all alike


def test_fewer_ids_than_logits(portable: str) -> None:
    """What lies after them, in the row's padding, is never read."""
    logits = torch.cat([logits_of(70), torch.full((20,), 50.0)])
    model = NativeModel(noisy(shape(n_layer=1), torch.float32), kernels=portable, threads=1)
    best, draw = int(logits[:70].argmax()), drawer(portable)
    for step in range(64):
        drawn = model.lib.glass_draw(model.engine, logits.data_ptr(), 70, best, 1.0, 0, 1.0, 0.0, step / 64)
        assert 0 <= drawn < 70
        assert drawn == draw(logits[:70].clone(), Sampling(), step / 64)


@pytest.mark.parametrize("start", range(0, 65, 13))
def test_the_address_changes_no_token(start: int, kernels: str) -> None:
    room, draw = torch.zeros(400), drawer(kernels)
    logits = room[start : start + 300]
    logits.copy_(logits_of(300, 9))
    assert draw(logits, Sampling(top_p=0.9), 0.4) == draw(logits.clone(), Sampling(top_p=0.9), 0.4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_of_files(dtype: torch.dtype, portable: str) -> None:
    """Turned or not, all of float16's and of bfloat16's numbers; those that can be no scale are counted."""
    model = NativeModel(noisy(shape(n_layer=1), torch.float32), kernels=portable, threads=1)
    stored = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(-1, 64)[:, :37]
    stored = stored.contiguous()
    rows, columns = stored.shape
    wide = stored.float()
    useless = int((~wide.isfinite() | (wide == 0)).sum())
    number = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[dtype]
    for expected, *steps in ((wide, rows, columns, columns, 1), (wide.T, columns, rows, 1, columns)):
        to = torch.empty(steps[:2])
        assert model.lib.glass_floats(number, stored.data_ptr(), *steps, to.data_ptr()) == useless
        assert torch.equal(to.nan_to_num(5.0), expected.nan_to_num(5.0))


# ---------------------------------------------------------------------- rules that are wrong on purpose

KEPT = "shares[i] < sampling.min_p) shares[i] = 0;"
MUTANTS: dict[str, tuple[str, str, str, Callable[[str], None]]] = {
    "without the token that crosses p": ("draw.cpp", "while (last + 1 < end", "while (last + 2 < end", check_rules),
    "one token too many": ("draw.cpp", "return left[k - 1];", "return left[std::min<size_t>(k, left.size() - 1)];", check_rules),
    "temperature forgotten": ("kernels.cpp", "largest) / temperature));", "largest)));", check_rules),
    "all for k": ("draw.cpp", "sampling.top_k > 0 && sampling.top_k < n", "sampling.top_k > n", check_rules),
    "ties fall to the later": ("draw.cpp", "id < other.id", "id > other.id", check_ties),
    "min-p of half the likeliest": ("draw.cpp", KEPT, KEPT.replace("min_p)", "min_p / 2)"), check_rules),
    "sums of before": ("draw.cpp", "const double wanted = point * total;", "const double wanted = point * n;", check_rules),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_rules_are_noticed(name: str, noticed: Callable[..., None]) -> None:
    noticed(*MUTANTS[name])
