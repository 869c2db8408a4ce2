"""From logits to a token, against formulas written out in plain Python, `transformers`, and counted draws."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, reject, settings
from hypothesis import strategies as st
from scipy import stats
from tiny import disturbed
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from glassgpt.config import ModelConfig, UserError
from glassgpt.config.generate import Sampling
from glassgpt.generation import distribution, draw, stream
from glassgpt.generation import sampling as sampling_module
from glassgpt.generation.generator import Generator
from glassgpt.generation.sampling import entropy, penalised

INF = math.inf
TIE = 1e-9  # how near to a threshold two orders of summation may disagree
DRAWS = 20_000

# ---------------------------------------------------------------------- the same, written out

values = st.sampled_from([-INF, -1e4, 0.0, 0.5, 0.5, 2.0, 1e4]) | st.floats(-1e4, 1e4).map(lambda x: round(x, 3))
logit_lists = st.lists(values | st.floats(-5, 5).map(lambda x: round(x, 3)), min_size=1, max_size=12).filter(
    lambda logits: max(logits) > -INF
)
temperatures = st.sampled_from([1e-300, 1e-50, 1e-3, 1.0, 1e5, 1e300]) | st.floats(0.1, 10)
shares = st.sampled_from([1e-9, 0.25, 0.5, 1.0]) | st.floats(0.01, 1)


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / math.fsum(weights) for weight in weights]


class UndecidedError(Exception):
    """A probability is so near to a threshold that rounding decides."""


def naive(logits: list[float], sampling: Sampling) -> list[float]:
    """What `distribution` promises, one token at a time. Raises UndecidedError."""
    if sampling.temperature == 0:
        return [float(token == logits.index(max(logits))) for token in range(len(logits))]
    scaled = [(logit - max(logits)) / sampling.temperature for logit in logits]
    if sampling.top_k:
        kth = sorted(scaled, reverse=True)[min(sampling.top_k, len(scaled)) - 1]
        scaled = [x if x >= kth else -INF for x in scaled]
    p = softmax(scaled)
    if sampling.top_p < 1:
        kept: set[int] = set()
        for token in sorted(range(len(p)), key=lambda token: -scaled[token]):  # stable: of equals the first goes first
            mass = math.fsum(p[token] for token in kept)
            if kept and abs(mass - sampling.top_p) < TIE:
                raise UndecidedError
            if mass < sampling.top_p:
                kept.add(token)
        p = [p[token] if token in kept else 0.0 for token in range(len(p))]
    if sampling.min_p > 0:
        least = sampling.min_p * max(p)
        if sampling.min_p < 1 and any(abs(x - least) < TIE * least for x in p):
            raise UndecidedError
        p = [x if x >= least else 0.0 for x in p]
    return [x / math.fsum(p) for x in p]


def row(logits: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([logits], dtype=dtype)


@settings(max_examples=300, deadline=None)
@given(logit_lists, temperatures | st.just(0.0), st.integers(0, 14), shares, st.just(0.0) | shares)
@example([0.0, -INF, 0.0], 1e300, 0, 1.0, 0.0)
@example([1e4, -1e4], 1e-300, 2, 0.5, 0.5)
def test_distribution_is_the_written_out_one(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    sampling = Sampling(temperature, top_k, top_p, min_p)
    try:
        expected = naive(logits, sampling)
    except UndecidedError:
        reject()
    assert distribution(row(logits), sampling)[0].tolist() == pytest.approx(expected, abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(
    logit_lists,
    temperatures | st.just(0.0),
    st.integers(0, 14),
    shares,
    st.just(0.0) | shares,
    st.sampled_from([torch.float32, torch.float64]),
)
@example([0.0, -INF, 0.0], 1e300, 0, 1.0, 0.0, torch.float32)
@example([0.0, -1.0, 0.0], 1e-50, 0, 1.0, 0.0, torch.float32)
def test_always_a_distribution(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, dtype: torch.dtype
) -> None:
    """Whatever the settings: no NaN, sum 1, the likeliest token is possible, and more likely stays more likely."""
    p = distribution(row(logits, dtype), Sampling(temperature, top_k, top_p, min_p))[0]
    assert p.dtype == dtype
    assert float(p.sum()) == pytest.approx(1, abs=1e-6 if dtype == torch.float32 else 1e-12)
    assert bool((p >= 0).all())
    assert p[logits.index(max(logits))] > 0
    assert all(p[i] == 0 for i, logit in enumerate(logits) if logit == -INF)
    in_order = p[torch.tensor(logits).argsort(descending=True, stable=True)]
    assert bool((in_order[:-1] >= in_order[1:]).all())


@given(logit_lists)
def test_temperature_zero_is_argmax(logits: list[float]) -> None:
    """All of it on the first of the largest, to the last bit; filters change nothing."""
    for sampling in (Sampling(temperature=0), Sampling(temperature=0, top_k=1, top_p=0.01, min_p=1)):
        p = distribution(row(logits), sampling)[0]
        assert p.tolist() == [float(token == logits.index(max(logits))) for token in range(len(logits))]
        assert int(draw(p[None], [Generator()])) == logits.index(max(logits))


@settings(deadline=None)
@given(logit_lists, temperatures, temperatures)
def test_entropy_grows_with_temperature(logits: list[float], one: float, other: float) -> None:
    cold, hot = sorted((one, other))
    low, high = (entropy(distribution(row(logits), Sampling(temperature=t)).log()) for t in (cold, hot))
    assert float(low) <= float(high) + 1e-9
    assert float(low) >= -1e-12
    assert float(high) <= math.log(len(logits)) + 1e-9


def test_entropy_by_hand() -> None:
    """ln 4 for four equals, 0 for a certainty, and -Σ p ln p."""
    assert float(entropy(row([3.0] * 4))) == pytest.approx(math.log(4), abs=1e-12)
    assert float(entropy(row([0.0, -INF]))) == 0
    p = [0.5, 0.3, 0.2]
    expected = -sum(x * math.log(x) for x in p)
    assert float(entropy(row([math.log(x) for x in p]))) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(logit_lists, shares)
def test_top_p_keeps_the_smallest_set(logits: list[float], top_p: float) -> None:
    """The tokens kept weigh at least p together; without the lightest of them they would not."""
    p = softmax(logits)
    kept = [x for x, left in zip(p, distribution(row(logits), Sampling(top_p=top_p))[0].tolist(), strict=True) if left]
    assert math.fsum(kept) >= top_p - TIE
    if top_p < 1:
        assert math.fsum(kept) - min(kept) < top_p + TIE


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.25, 1), (0.2500001, 2), (0.5, 2), (0.75, 3), (0.75001, 4), (1.0, 4), (1e-12, 1)],
)
def test_top_p_at_its_edge(top_p: float, kept: int) -> None:
    """Four equal tokens of 1/4 (exact in binary): mass that is exactly p is enough, and the first ones are taken."""
    assert distribution(row([0.0] * 4), Sampling(top_p=top_p))[0].tolist() == [1 / kept] * kept + [0] * (4 - kept)


def test_top_k_keeps_all_that_tie_with_the_kth() -> None:
    assert distribution(row([1.0, 0.0, 0.0, -1.0]), Sampling(top_k=2))[0].gt(0).tolist() == [True, True, True, False]


# ---------------------------------------------------------------------- transformers as the oracle


def logits_and_ids(rows: int = 4, vocabulary: int = 50) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    return logits, torch.randint(vocabulary, (rows, 9), generator=generator)


@pytest.mark.parametrize("temperature", [0.3, 0.8, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 7, 500])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.3])
def test_filters_are_those_of_transformers(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits, ids = logits_and_ids()
    oracle = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        oracle.append(TopKLogitsWarper(top_k))
    oracle += [TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)]
    expected = oracle(ids, logits).softmax(-1)
    ours = distribution(logits, Sampling(temperature, top_k, top_p, min_p))
    assert torch.allclose(ours, expected, rtol=0, atol=1e-12)
    assert torch.equal(ours > 0, expected > 0)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits, ids = logits_and_ids()
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    assert seen.logical_and(logits > 0).any()
    assert seen.logical_and(logits < 0).any()
    ours = penalised(logits, Sampling(repetition_penalty=penalty), seen, torch.zeros_like(logits))
    assert torch.allclose(ours, RepetitionPenaltyLogitsProcessor(penalty)(ids, logits), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("presence", "frequency"), [(0.7, 0.0), (0.0, 0.4), (-1.1, 0.6), (0.0, 0.0)])
def test_presence_and_frequency_by_their_formula(presence: float, frequency: float) -> None:
    """logit - count * frequency - (count > 0) * presence, counts being those of the text written so far."""
    logits, ids = logits_and_ids()
    written = torch.zeros_like(logits)
    for r, tokens in enumerate(ids.tolist()):
        for token, count in Counter(tokens).items():
            written[r, token] = count
    assert written.max() > 1
    sampling = Sampling(presence_penalty=presence, frequency_penalty=frequency)
    ours = penalised(logits, sampling, torch.ones_like(logits, dtype=torch.bool), written).tolist()
    for r, tokens in enumerate(ids.tolist()):
        counts = Counter(tokens)
        for token in range(logits.size(1)):
            expected = float(logits[r, token]) - counts[token] * frequency - (counts[token] > 0) * presence
            assert ours[r][token] == pytest.approx(expected, abs=1e-12)


def test_penalties_keep_the_impossible_impossible() -> None:
    sampling = Sampling(repetition_penalty=2, presence_penalty=-1, frequency_penalty=-1)
    everything = torch.ones(1, 2, dtype=torch.bool)
    assert penalised(row([-INF, 1.0]), sampling, everything, torch.ones(1, 2)).tolist() == [[-INF, 2.5]]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, math.nan, INF]),
        ("top_k", [-1]),
        ("top_p", [0, -0.5, 1.5, math.nan]),
        ("min_p", [-0.1, 1.1, math.nan]),
        ("repetition_penalty", [0, -1, 1e-40, 1e40, math.nan]),
        ("presence_penalty", [math.nan, INF, 1e300]),
        ("frequency_penalty", [math.nan, -INF, -1e300]),
    ],
)
def test_settings_without_meaning_are_refused(name: str, values: list[float]) -> None:
    for value in values:
        with pytest.raises(UserError, match=f"^{name} must be .*; got {re.escape(str(value))}$"):
            Sampling(**{name: value})  # type: ignore[arg-type]


# ---------------------------------------------------------------------- drawing


def pretend_random(monkeypatch: pytest.MonkeyPatch, number: float) -> None:
    """Make `draw` find this number in every generator."""
    monkeypatch.setattr(Generator, "uniform", lambda self: number)


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.0, 1e-30, 1e-8, 0.1, 0.3, 1.0]), min_size=1, max_size=9).filter(any), st.data())
def test_draw_inverts_the_cumulative_distribution(weights: list[float], data: st.DataObject) -> None:
    """The token drawn at u is the one whose stretch of [0, total) holds u * total: also at 0, at borders, near 1."""
    p = row(weights) / sum(weights)
    ends = p.cumsum(-1)[0].tolist()
    borders = [end / ends[-1] for end in ends if end < ends[-1]]
    number = data.draw(st.sampled_from([0.0, 1 - 2**-53, *borders]) | st.floats(0, 1, exclude_max=True))
    with pytest.MonkeyPatch.context() as patch:
        pretend_random(patch, number)
        drawn = int(draw(p, [Generator()]))
    assert weights[drawn] > 0
    point = number * ends[-1]
    assert point < ends[drawn] or number == 1 - 2**-53
    assert drawn == 0 or ends[drawn - 1] <= point


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53, 1.0])
def test_draw_never_takes_what_is_impossible(monkeypatch: pytest.MonkeyPatch, number: float) -> None:
    """Zeros at both ends and thousands of float32 roundings between; 1.0 is what a float32 device may round u to."""
    pretend_random(monkeypatch, number)
    weights = torch.cat([torch.zeros(5), torch.linspace(1e-9, 1e-3, 3000), torch.zeros(5)])
    drawn = int(draw((weights / weights.sum())[None], [Generator()]))
    assert drawn == (5 if number == 0 else 3004)


def test_rows_have_their_own_randomness() -> None:
    """A row's draws depend on its own generator only, wherever it stands in the batch."""
    p = torch.full((3, 1000), 1e-3)

    def seeds(*numbers: int) -> list[Generator]:
        return [Generator(number) for number in numbers]

    one, two, three = draw(p, seeds(1, 2, 3)).tolist()
    assert draw(p, seeds(3, 1, 2)).tolist() == [three, one, two]
    assert draw(p[:1], seeds(2)).tolist() == [two]
    assert len({one, two, three}) == 3


# ---------------------------------------------------------------------- counted draws against the exact distribution

CONFIG = ModelConfig(vocab_size=31, context_tokens=8, n_layer=1, n_head=2, width=16)
SETTINGS = [
    Sampling(),
    Sampling(temperature=0.7, top_p=0.85),
    Sampling(temperature=1.6, top_k=12, top_p=0.9, min_p=0.05),
]


def wrong_without_crossing(logits: Tensor, sampling: Sampling) -> Tensor:
    """Drops the token with which the mass reaches p."""
    largest, order = (logits / sampling.temperature).softmax(-1).sort(dim=-1, descending=True)
    kept = (largest.cumsum(-1) < sampling.top_p) | (torch.arange(largest.size(-1)) == 0)
    p = torch.zeros_like(largest).scatter(-1, order, largest * kept)
    return p / p.sum(-1, keepdim=True)


def wrong_order(logits: Tensor, sampling: Sampling) -> Tensor:
    """Top-p before temperature."""
    allowed = distribution(logits, Sampling(top_p=sampling.top_p)) > 0
    return distribution(logits.masked_fill(~allowed, -INF), Sampling(temperature=sampling.temperature))


def wrong_not_renormalised(logits: Tensor, sampling: Sampling) -> Tensor:
    """What top-p takes away goes to the likeliest token."""
    p = (logits / sampling.temperature).softmax(-1) * (distribution(logits, sampling) > 0)
    return p.scatter_add(-1, p.argmax(-1, keepdim=True), 1 - p.sum(-1, keepdim=True))


def first_tokens(sampling: Sampling, generators: list[Generator]) -> tuple[list[float], list[int]]:
    """Exact probabilities of the token after a prompt, and how often the engine wrote each."""
    model = disturbed(CONFIG)
    prompt = [3, 1, 4]
    with torch.no_grad():
        logits = model(torch.tensor([prompt]))[0, -1].tolist()
    drawn = Counter(token.id for token in stream(model, [prompt] * DRAWS, sampling, generators, 1))
    return naive(logits, sampling), [drawn[token] for token in range(CONFIG.vocab_size)]


def one_generator() -> list[Generator]:
    return [Generator(0)] * DRAWS


def fit(exact: list[float], counts: list[int]) -> float:
    """p-value of the chi-square test; 0 when something impossible was drawn."""
    possible = [token for token, p in enumerate(exact) if p > 0]
    if sum(counts[token] for token in possible) < DRAWS:
        return 0.0
    expected = [exact[token] * DRAWS for token in possible]
    assert min(expected) > 5  # or the test would not be one
    return float(stats.chisquare([counts[token] for token in possible], expected).pvalue)


@pytest.mark.parametrize("sampling", SETTINGS)
def test_draws_follow_the_exact_distribution(sampling: Sampling) -> None:
    """20,000 tokens from one generator, through prefill and sampling."""
    assert fit(*first_tokens(sampling, one_generator())) > 1e-3


def test_draws_of_neighbouring_seeds_follow_it_too() -> None:
    """The first tokens of 20,000 texts with seeds 0, 1, 2 ...: seeds that differ by one are independent."""
    generators = [Generator(seed) for seed in range(DRAWS)]
    assert fit(*first_tokens(SETTINGS[1], generators)) > 1e-3


@pytest.mark.parametrize("wrong", [wrong_without_crossing, wrong_order, wrong_not_renormalised])
def test_a_wrong_top_p_is_noticed(monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Tensor, Sampling], Tensor]) -> None:
    """The test above can fail: with each of these in the engine's place for `distribution` the p-value is nil."""
    monkeypatch.setattr(sampling_module, "distribution", wrong)
    assert fit(*first_tokens(SETTINGS[1], one_generator())) < 1e-6
