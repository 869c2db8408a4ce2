"""Speculative decoding: the same text at temperature 0, the same distribution above it, whoever guesses and however badly."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import scipy.stats
import torch
from exact import noisy
from torch import Tensor

from glassgpt.config import ModelConfig, UserError
from glassgpt.config.generate import Sampling
from glassgpt.generation import engine, proposers, speculative
from glassgpt.generation.engine import Token
from glassgpt.generation.generator import Generator
from glassgpt.generation.plain_runner import TensorScores
from glassgpt.generation.proposers import Lookup, Proposal, Text
from glassgpt.generation.runner import Model
from glassgpt.generation.sampling import distribution, draw, penalised
from glassgpt.generation.speculative import Acceptance, Guesses
from glassgpt.model import GPT

GREEDY = Sampling(temperature=0)
PENALTIES = Sampling(temperature=0, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3)
EXACT = 1e-10


def written(
    model: Model,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling = GREEDY,
    guesses: Guesses | None = None,
    max_new_tokens: int = 100,
    counts: Acceptance | None = None,
    **options: Any,
) -> list[list[Token]]:
    """The tokens of each row: plainly, or by guesses."""
    rows: list[list[Token]] = [[] for _ in prompts]
    generators = [Generator(row) for row in range(len(prompts))]
    if guesses is None:
        tokens = engine.stream(model, prompts, sampling, generators, max_new_tokens, **options)
    else:
        tokens = speculative.stream(
            model, prompts, sampling, generators, max_new_tokens, **options, guesses=guesses, counts=counts
        )
    for token in tokens:
        rows[token.row].append(token)
    return rows


def ids_of(rows: list[list[Token]]) -> list[list[int]]:
    return [[token.id for token in row] for row in rows]


# ---------------------------------------------------------------------- temperature 0: the same text

SHAPES: dict[str, dict[str, Any]] = {
    "learned": {},
    "rope, grouped heads": {"position": "rope", "n_kv_head": 2, "norm": "rms", "mlp": "swiglu"},
    "window": {"position": "rope", "spans": ("window", "full"), "window_tokens": 5},
    "alibi, a window of 2": {"position": "alibi", "spans": ("window",), "window_tokens": 2},
}


def model_of(**changes: Any) -> GPT:
    return noisy(ModelConfig(**{"vocab_size": 13, "context_tokens": 40, "n_layer": 2, "n_head": 4, "width": 16} | changes))


@pytest.fixture(scope="module")
def small() -> GPT:
    """A draft that is right now and then."""
    return model_of(n_layer=1)


def guessers(target: GPT, small: GPT) -> dict[str, Guesses]:
    return {"small": Guesses(small), "itself": Guesses(target), "lookup": Guesses(lookup=2)}


@pytest.mark.parametrize("sampling", [GREEDY, PENALTIES], ids=["greedy", "penalties"])
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_text_is_the_plain_one(shape: str, sampling: Sampling, small: GPT) -> None:
    """With its log-probabilities and alternatives, for any number of proposals, until the context is full."""
    target = model_of(**SHAPES[shape])
    prompts = [[1, 2, 3, 1, 2], [7], list(range(13)) * 2, [5] * 40]
    expected = written(target, prompts, sampling, n_top=3)
    assert [len(row) for row in expected] == [36, 40, 15, 1]
    for name, guesses in guessers(target, small).items():
        for proposals in (1, 5) if name != "itself" else (1, 5, 32):
            counts = Acceptance()
            found = written(target, prompts, sampling, dataclasses.replace(guesses, proposals=proposals), counts=counts, n_top=3)
            assert ids_of(found) == ids_of(expected), (name, proposals)
            for ours, theirs in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
                assert abs(ours.logprob - theirs.logprob) < EXACT
                assert [i for i, _ in ours.top] == [i for i, _ in theirs.top]
            assert counts.tokens == sum(map(len, expected)) == counts.passes + counts.accepted


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_a_draft_that_is_the_model_is_always_right(position: Any) -> None:
    target, counts = model_of(position=position), Acceptance()
    for sampling in (GREEDY, PENALTIES, Sampling(0.7, top_k=5), Sampling(1.2, top_p=0.9, repetition_penalty=1.2)):
        written(target, [[1, 2, 3], [4]], sampling, Guesses(target, proposals=3), max_new_tokens=13, counts=counts)
    assert counts.accepted == counts.proposed
    assert (counts.tokens, counts.passes) == (4 * 2 * 13, 4 * 2 * (1 + 3))  # the first token, then four a pass


def test_a_wrong_guesser_changes_nothing() -> None:
    """One that always says the same, and one whose context is shorter than the text."""
    target = model_of()
    expected = ids_of(written(target, [[1, 2, 3]]))
    short = model_of(context_tokens=9)
    for draft in (model_of(width=8, n_head=1), short):
        counts = Acceptance()
        assert ids_of(written(target, [[1, 2, 3]], GREEDY, Guesses(draft, proposals=4), counts=counts)) == expected
    assert counts.accepted == 0
    assert counts.proposed == 4 + 1 + 1 + 1 + 1 + 1  # after texts of 4 to 9 tokens: as far as its context of 9 reaches


def test_what_is_looked_up() -> None:
    """What followed the newest occurrence of the longest run; it may run into itself."""
    generator = Generator()
    for ids, count, expected in [
        ([1, 2, 3, 4, 9, 2, 3], 3, [4, 9, 2]),
        ([1, 2, 3, 4, 2, 3, 5, 2, 3], 2, [5, 2]),
        ([8, 2, 3, 4, 9, 3, 5, 8, 2, 3], 1, [4]),  # three tokens count for more than the newer one
        ([7, 1, 2, 1, 2], 5, [1, 2, 1, 2, 1]),
        ([1, 2, 3], 4, []),
        ([1], 4, []),
        ([1, 1], 0, []),
    ]:
        for split in range(1, len(ids) + 1):
            assert Lookup(3).propose(Text(ids[:split], ids[split:]), count, generator) == Proposal(expected), ids
    lookup = Lookup(3)
    assert lookup.propose(Text([1, 2, 3], []), 2, generator).ids == []
    assert lookup.propose(Text([1, 2, 3], [1, 2]), 2, generator).ids == [3, 1]


def test_a_quotation_is_looked_up() -> None:
    """A text that repeats itself is written in few passes."""
    target = Table(lambda text: one_hot((text[-1] + 1) % 7, 7), vocab_size=7)
    counts = Acceptance()
    (row,) = ids_of(written(target, [list(range(7))], GREEDY, Guesses(lookup=2, proposals=10), 111, counts))
    assert row == [place % 7 for place in range(111)]
    assert (counts.passes, counts.proposed, counts.accepted) == (1 + 10, 100, 100)


# ---------------------------------------------------------------------- above it: the same distribution

V, LENGTH, DRAWS, MUTANT_DRAWS = 3, 4, 20_000, 1_500


def one_hot(token_id: int, size: int) -> Tensor:
    return 50.0 * torch.nn.functional.one_hot(torch.tensor(token_id), size).double()


class Table:
    """A model whose logits are any function of the text: an engine of its own, so that many draws take little time."""

    def __init__(self, logits: Callable[[tuple[int, ...]], Tensor], vocab_size: int = V) -> None:
        self.config = ModelConfig(vocab_size, context_tokens=400, n_layer=1, n_head=1, width=8)
        self.device = torch.device("cpu")
        self._logits = logits
        self._known: dict[tuple[int, ...], Tensor] = {}

    def start(self, n_ids: int | None = None) -> TableRunner:
        return TableRunner(self)

    def after(self, text: tuple[int, ...]) -> Tensor:
        if text not in self._known:
            self._known[text] = self._logits(text)
        return self._known[text]


class TableRunner:
    def __init__(self, table: Table) -> None:
        self.config, self.device = table.config, table.device
        self._table = table
        self._rows: list[tuple[int, ...]] = []

    @property
    def lengths(self) -> list[int]:
        return list(map(len, self._rows))

    def feed(self, tokens: Sequence[Sequence[int]], every: bool = False) -> TensorScores:
        before = self._rows or [()] * len(tokens)
        self._rows = [(*row, *new) for row, new in zip(before, tokens, strict=True)]
        ends = [range(len(old) + 1 if every else len(row), len(row) + 1) for old, row in zip(before, self._rows, strict=True)]
        return TensorScores(
            torch.stack([self._table.after(row[:end]) for row, of in zip(self._rows, ends, strict=True) for end in of])
        )

    def keep(self, rows: Sequence[int]) -> None:
        self._rows = [self._rows[row] for row in rows]

    def rewind(self, lengths: Sequence[int]) -> None:
        assert all(0 < length <= len(row) for row, length in zip(self._rows, lengths, strict=True))
        self._rows = [row[:length] for row, length in zip(self._rows, lengths, strict=True)]

    def close(self) -> None:
        self._rows = []


def table(seed: int, spread: float = 1.2) -> Table:
    """Random logits after every text."""

    def logits(text: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + int("".join(map(str, text)), V))
        return spread * torch.randn(V, generator=generator, dtype=torch.float64)

    return Table(logits)


TARGET, DRAFT, PROMPT = table(1), table(2, spread=2.0), [1, 2, 1, 0, 1]


def exact_joint(target: Table, sampling: Sampling) -> dict[tuple[int, ...], float]:
    """Probability of every text of LENGTH tokens, by multiplying out."""
    joint = {}
    for text in itertools.product(range(V), repeat=LENGTH):
        chance = 1.0
        for place, token_id in enumerate(text):
            before = (*PROMPT, *text[:place])
            seen = torch.tensor([[i in before for i in range(V)]])
            counts = torch.tensor([[float(text[:place].count(i)) for i in range(V)]])
            chance *= float(distribution(penalised(target.after(before)[None], sampling, seen, counts), sampling)[0, token_id])
        joint[text] = chance
    assert math.isclose(math.fsum(joint.values()), 1)
    return joint


def p_value(sampling: Sampling, guesses: Guesses, draws: int = DRAWS) -> float:
    """Of a chi-square test that the texts drawn have the exact joint distribution; rare texts are counted as one."""
    generator = Generator(7)
    prompts, rows = [PROMPT] * draws, [[] for _ in range(draws)]  # type: ignore[var-annotated]
    for token in speculative.stream(TARGET, prompts, sampling, [generator] * draws, LENGTH, guesses=guesses):
        rows[token.row].append(token.id)
    found = Counter(map(tuple, rows))
    joint = exact_joint(TARGET, sampling)
    if any(joint[text] == 0 for text in found):
        return 0.0  # something impossible was written
    common = [text for text, chance in joint.items() if chance * draws >= 5]
    rest = draws - sum(found[text] for text in common)
    observed, expected = [found[text] for text in common], [joint[text] * draws for text in common]
    left = draws - math.fsum(expected)
    if left >= 5:
        observed, expected = [*observed, rest], [*expected, left]
    scale = sum(observed) / math.fsum(expected)
    return float(scipy.stats.chisquare(observed, [number * scale for number in expected]).pvalue)


EVERYTHING = Sampling(0.9, top_k=2, top_p=0.95, min_p=0.02, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.3)
SAMPLINGS = {
    "plain": Sampling(),
    "temperature": Sampling(1.7),
    "top-k": Sampling(0.8, top_k=2),
    "top-p": Sampling(top_p=0.8),
    "min-p": Sampling(min_p=0.2),
    "penalties": dataclasses.replace(EVERYTHING, top_k=0, top_p=1.0, min_p=0.0),
    "everything": EVERYTHING,
}
WHO = {"draft": Guesses(DRAFT, proposals=2), "lookup": Guesses(lookup=2, proposals=2)}


def test_the_joint_distribution_is_that_of_plain_sampling() -> None:
    """Of four tokens: one from the prompt, then two guesses and what comes after them. Four times the draws of the mutants."""
    assert p_value(SAMPLINGS["temperature"], WHO["draft"], 4 * MUTANT_DRAWS) > 0.001


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "who", "proposals"),
    [(name, who, n) for name in SAMPLINGS for who in WHO for n in ((1, 2, 3) if name == "plain" else (2,))],
)
def test_for_every_sampling_and_guesser(name: str, who: str, proposals: int) -> None:
    assert p_value(SAMPLINGS[name], dataclasses.replace(WHO[who], proposals=proposals)) > 0.001


def from_p(p: Callable[[int], Tensor], guess: Proposal, generator: Generator) -> list[int]:
    """A refused guess gives way to a draw from p itself, not from what p has more than q."""
    kept = true_checked(p, guess, generator)[:-1]
    return [*kept, *draw(p(len(kept))[None], [generator]).tolist()]


def always(p: Callable[[int], Tensor], guess: Proposal, generator: Generator) -> list[int]:
    """Every guess is accepted."""
    return [*guess.ids, *draw(p(len(guess.ids))[None], [generator]).tolist()]


def by_p_alone(p: Callable[[int], Tensor], guess: Proposal, generator: Generator) -> list[int]:
    """A guess is accepted with probability p(x), as if it had been certain, but replaced as if it had not."""
    for place, token_id in enumerate(guess.ids):
        if generator.uniform() >= float(p(place)[token_id]):
            assert guess.probabilities is not None
            more = (p(place) - guess.probabilities[place]).clamp(min=0)
            return [*guess.ids[:place], *draw(more[None], [generator]).tolist()]
    return always(p, guess, generator)


true_checked = speculative.checked


@pytest.mark.parametrize("mutant", [from_p, always, by_p_alone])
def test_a_wrong_rule_is_noticed(monkeypatch: pytest.MonkeyPatch, mutant: Any) -> None:
    monkeypatch.setattr(speculative, "checked", mutant)
    assert p_value(SAMPLINGS["temperature"], WHO["draft"], MUTANT_DRAWS) < 1e-6


def test_guesses_without_their_penalties_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the check of place j, the j guesses before it are part of the text."""
    forgetful = lambda scores, sampling, text, guesses: proposers.after_penalties(scores, sampling, text, ())  # noqa: E731
    monkeypatch.setattr(speculative, "after_penalties", forgetful)
    strong = dataclasses.replace(EVERYTHING, frequency_penalty=1.5)
    assert p_value(strong, WHO["draft"], 1_000) < 1e-6


def test_the_expected_number_accepted_is_the_overlap() -> None:
    """sum(min(p, q)), place by place: no rule can accept more."""
    p, q = (torch.tensor(row, dtype=torch.float64) for row in ([0.5, 0.3, 0.2, 0.0], [0.2, 0.1, 0.3, 0.4]))
    generator = Generator(3)
    accepted = 0
    for _ in range(4_000):
        guess = Proposal(draw(q[None], [generator]).tolist(), q[None])
        accepted += len(speculative.checked(lambda place: p, guess, generator)) - 1
    assert abs(accepted / 4_000 - 0.5) < 4 * math.sqrt(0.25 / 4_000)


def test_p_equal_to_q_up_to_rounding() -> None:
    """A guess that is refused by rounding alone leaves nothing that p has more: it gives way to a draw from p."""
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([[0.5, 0.5, 0.25]])
    found = speculative.checked(lambda place: p, Proposal([2], q), Generator(0))
    assert found in ([0], [1])


# ---------------------------------------------------------------------- the rest


def test_equal_seeds_equal_text(small: GPT) -> None:
    """And a row's text does not depend on the others."""
    target, prompts = model_of(), [[1, 2], [3], [1, 2]]
    for guesses in (Guesses(small), Guesses(lookup=2)):
        first = written(target, prompts, Sampling(), guesses)
        assert ids_of(first) == ids_of(written(target, prompts, Sampling(), guesses))
        assert ids_of(first)[:1] == ids_of(written(target, prompts[:1], Sampling(), guesses))
        assert ids_of(first)[0] != ids_of(first)[2]


def test_a_text_ends_where_it_should(small: GPT) -> None:
    """Nothing comes after the token that ends, though more was guessed right; `max_new_tokens` are kept."""
    target = model_of()
    (whole,) = ids_of(written(target, [[1, 2]]))
    for end in set(whole):
        for guesses in guessers(target, small).values():
            found = written(target, [[1, 2]], GREEDY, guesses, ends=lambda token, end=end: token.id == end)
            assert ids_of(found) == [whole[: whole.index(end) + 1]]
    for limit in range(1, 12):
        assert ids_of(written(target, [[1, 2]], GREEDY, Guesses(target, proposals=5), limit)) == [whole[:limit]]


def test_a_broken_draft_is_named() -> None:
    """NaN would pass every comparison."""
    damaged = model_of(n_layer=1)
    damaged.norm_f.weight.data[0] = math.nan
    for target, draft in ((model_of(), damaged), (damaged, model_of())):
        for sampling in (GREEDY, Sampling()):
            with pytest.raises(UserError, match="not numbers"):
                written(target, [[1, 2]], sampling, Guesses(draft))


def test_ids_without_a_token_are_never_guessed() -> None:
    """A draft and a model with spare rows, different numbers of them."""
    target, draft = model_of(vocab_size=16), model_of(vocab_size=20, n_layer=1)
    for sampling in (GREEDY, Sampling()):
        (row,) = ids_of(written(target, [[1, 2]], sampling, Guesses(draft), n_ids=13))
        assert max(row) < 13
    expected = ids_of(written(target, [[1, 2]], GREEDY, n_ids=13))
    assert ids_of(written(target, [[1, 2]], GREEDY, Guesses(draft), n_ids=13)) == expected


def test_vocabularies_of_different_size_are_refused() -> None:
    with pytest.raises(UserError, match=r"13 .* 20"):
        written(model_of(), [[1, 2]], GREEDY, Guesses(model_of(vocab_size=20)))
