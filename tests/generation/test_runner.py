"""What a runner promises: rows fed in any pieces, copied, dropped and taken back have the scores of whole forward passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact import noisy
from torch import Tensor

from glassgpt.config import ModelConfig, UserError
from glassgpt.config.generate import Sampling
from glassgpt.config.speculation import MOST_PROPOSALS
from glassgpt.generation import KVCache, engine, runner
from glassgpt.generation.generator import Generator
from glassgpt.generation.plain_runner import PlainRunner, TensorScores
from glassgpt.generation.runner import start
from glassgpt.model import GPT

EXACT = 1e-10
SHAPES: dict[str, dict[str, Any]] = {
    "learned": {},
    "rope, grouped heads": {"position": "rope", "n_kv_head": 2, "norm": "rms", "mlp": "swiglu"},
    "windows": {"position": "rope", "spans": ("window", "full"), "window_tokens": 6},
    "a window of 1": {"position": "alibi", "spans": ("window",), "window_tokens": 1},
}


def model_of(**changes: Any) -> GPT:
    return noisy(ModelConfig(**{"vocab_size": 17, "context_tokens": 60, "n_layer": 2, "n_head": 4, "width": 16} | changes))


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest) -> GPT:
    return model_of(**SHAPES[request.param])


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(17, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def whole(model: GPT, ids: list[int]) -> Tensor:
    """Logits (T, V) of one forward pass without a cache."""
    return model(torch.tensor([ids]))[0]


def error(scores: TensorScores, expected: Tensor) -> float:
    assert scores.logits.shape == expected.shape
    return float((scores.logits - expected).abs().max())


def test_scores_after_the_last_token_and_after_every_one(model: GPT) -> None:
    """Of rows of different length, row after row; then of equally many more tokens."""
    rows, more = [text(9, 1), text(3, 2), text(14, 3)], [text(5, seed) for seed in (4, 5, 6)]
    full = [whole(model, a + b) for a, b in zip(rows, more, strict=True)]
    for every in (False, True):
        plain = PlainRunner(model)
        first = [of[: len(a)] for a, of in zip(rows, full, strict=True)]
        assert error(plain.feed(rows, every), torch.cat([of if every else of[-1:] for of in first])) < EXACT
        rest = [of[len(a) :] for a, of in zip(rows, full, strict=True)]
        assert error(plain.feed(more, every), torch.cat([of if every else of[-1:] for of in rest])) < EXACT
        assert plain.lengths == [14, 8, 19]


def test_best_and_log_total(model: GPT) -> None:
    scores = PlainRunner(model, n_ids=11).feed([text(5), text(7)], every=True)
    assert scores.logits.shape == (12, 11)
    assert scores.best == scores.logits.argmax(-1).tolist()
    assert torch.allclose(torch.tensor(scores.log_total).double(), scores.logits.exp().sum(-1).log().double(), atol=EXACT)
    some = scores.of([3, 0, 3])
    assert some.best == [scores.best[i] for i in (3, 0, 3)]
    assert torch.equal(some.logits, scores.logits[[3, 0, 3]])


@pytest.mark.parametrize("rows", [[2, 0], [1], [1, 1, 2], [0, 1, 2]])
def test_rows_that_stay_or_are_copied(model: GPT, rows: list[int]) -> None:
    texts, more = [text(9, 1), text(3, 2), text(14, 3)], text(6, 4)
    for method in ("keep", "fork"):
        plain = PlainRunner(model)
        plain.feed(texts)
        getattr(plain, method)(rows)
        assert plain.lengths == [len(texts[row]) for row in rows]
        for place in (0, 3):
            scores = plain.feed([more[place : place + 3]] * len(rows), every=True)
            expected = [whole(model, texts[row] + more)[len(texts[row]) :][place : place + 3] for row in rows]
            assert error(scores, torch.cat(expected)) < EXACT


@pytest.mark.parametrize("pieces", [[6], [1] * 6, [2, 4]])
@pytest.mark.parametrize("cut", [1, 3, 6])
def test_tokens_are_taken_back(model: GPT, pieces: list[int], cut: int) -> None:
    """And others fed in their place, over and over; also in a batch with padding, after a row has left it."""
    alone, batch = PlainRunner(model), PlainRunner(model)
    texts = [text(12, 1), text(9, 2), text(20, 3)]
    alone.feed(texts[:1])
    batch.feed(texts)
    batch.keep([0, 1])
    now = texts[:2]
    for turn in range(3):
        new = text(6, 10 + turn)
        for size in pieces:
            piece, new = new[:size], new[size:]
            now = [row + piece for row in now]
            assert error(alone.feed([piece], every=True), whole(model, now[0])[-size:]) < EXACT
            assert error(batch.feed([piece] * 2), torch.stack([whole(model, row)[-1] for row in now])) < EXACT
        now = [row[:-cut] for row in now]
        for plain in (alone, batch):
            plain.rewind([len(row) for row in now][: len(plain.lengths)])
        assert batch.lengths == [len(row) for row in now]


def test_as_many_as_are_ever_guessed(model: GPT) -> None:
    plain = PlainRunner(model)
    plain.feed([text(50)])
    plain.rewind([50 - MOST_PROPOSALS - 1])
    rest = text(4, 9)
    expected = whole(model, text(50)[: 49 - MOST_PROPOSALS] + rest)[-4:]
    assert error(plain.feed([rest], every=True), expected) < EXACT


def test_a_cache_that_takes_back_too_little_is_noticed(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    right = KVCache.rewind
    monkeypatch.setattr(KVCache, "rewind", lambda cache, length: right(cache, length + 1))
    plain = PlainRunner(model)
    plain.feed([text(12)])
    plain.rewind([9])
    if model.config.window_tokens != 1:  # which sees itself alone
        assert error(plain.feed([[1]]), whole(model, [*text(12)[:9], 1])[-1:]) > 1e-6


def test_what_it_cannot_do_is_said() -> None:
    plain = PlainRunner(model_of(spans=("window",), window_tokens=3))
    plain.feed([text(40, 1), text(38, 2)])
    with pytest.raises(ValueError, match="as many tokens as the others"):
        plain.feed([[1], [2, 3]])
    with pytest.raises(ValueError, match="2 rows"):
        plain.feed([[1]])
    with pytest.raises(ValueError, match="different numbers"):
        plain.rewind([39, 38])
    with pytest.raises(ValueError, match=f"at most {MOST_PROPOSALS + 1} positions"):
        plain.rewind([4, 2])
    with pytest.raises(UserError, match="context is 60"):
        PlainRunner(model_of()).feed([text(61)])


def test_a_model_may_bring_its_own_runner() -> None:
    class Other:
        config = model_of().config

        def start(self, n_ids: int | None = None) -> Any:
            return ("mine", n_ids)

    assert start(Other(), 5) == ("mine", 5)  # type: ignore[comparison-overlap]
    assert isinstance(start(model_of()), PlainRunner)


# ---------------------------------------------------------------------- how the engine drives it


class Watched(PlainRunner):
    """Writes down what is asked of it."""

    def __init__(self, model: GPT, n_ids: int | None = None) -> None:
        super().__init__(model, n_ids)
        self.asked: list[Any] = []

    def feed(self, tokens: Any, every: bool = False) -> TensorScores:
        self.asked.append([len(ids) for ids in tokens])
        return super().feed(tokens, every)

    def close(self) -> None:
        self.asked.append("closed")


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[list[int]], list[Any]]]:
    def run(prompts: list[list[int]], sampling: Sampling, limit: int, kind: type = Watched) -> tuple[list[list[int]], list[Any]]:
        made: list[Watched] = []

        def begin(model: GPT, n_ids: int | None) -> Watched:
            made.append(kind(model, n_ids))
            return made[-1]

        monkeypatch.setattr(engine, "start", begin)
        rows: list[list[int]] = [[] for _ in prompts]
        generators = [Generator(row) for row in range(len(prompts))]
        for token in engine.stream(model_of(), prompts, sampling, generators, limit):
            rows[token.row].append(token.id)
        (one,) = made
        return rows, one.asked

    return run


def test_equal_prompts_are_read_once(watched: Any) -> None:
    """And the texts are those of prompts read one by one."""

    class Unable(Watched):
        fork = None  # type: ignore[assignment]

    prompts = [text(4, 1), text(7, 2), text(4, 1), text(4, 1), text(7, 2)]
    for sampling in (Sampling(temperature=0), Sampling(), Sampling(0.9, repetition_penalty=1.3)):
        shared, asked = watched(prompts, sampling, 4)
        assert asked == [[4, 7], [1] * 5, [1] * 5, [1] * 5, "closed"]
        alone, asked = watched(prompts, sampling, 4, Unable)
        assert asked == [[4, 7, 4, 4, 7], [1] * 5, [1] * 5, [1] * 5, "closed"]
        assert shared == alone
    assert len(set(map(tuple, shared))) == 5


def test_it_is_closed_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when nobody takes the tokens to the end."""
    one = Watched(model_of())
    monkeypatch.setattr(engine, "start", lambda model, n_ids: one)
    tokens = engine.stream(model_of(), [[1, 2]], Sampling(), [Generator()], 9)
    next(tokens)
    tokens.close()  # type: ignore[attr-defined]
    assert one.asked == [[2], "closed"]


def test_the_greedy_loop_touches_no_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a runner computes itself is not computed again: one logit a row is all that is read of (B, V)."""

    class Frugal(torch.Tensor):
        """Refuses every operation over the vocabulary but one number of each row."""

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            assert function.__name__ in ("gather", "__get__", "size", "dim"), function.__name__
            with torch._C.DisableTorchFunctionSubclass():
                return function(*arguments, **(options or {}))

    class Native(PlainRunner):
        def feed(self, tokens: Any, every: bool = False) -> TensorScores:
            scores = super().feed(tokens, every)
            assert scores.best and scores.log_total  # computed here
            scores.logits = scores.logits.as_subclass(Frugal)
            return scores

    monkeypatch.setattr(engine, "start", lambda model, n_ids: Native(model, n_ids))

    def write(sampling: Sampling, n_top: int = 0) -> list[engine.Token]:
        return list(engine.stream(model_of(), [[1, 2], [3]], sampling, [Generator()] * 2, 5, n_top=n_top))

    found = write(Sampling(temperature=0))
    for other in ((Sampling(), 0), (Sampling(temperature=0, presence_penalty=1), 0), (Sampling(temperature=0), 1)):
        with pytest.raises(AssertionError, match=r"^\w+\b"):
            write(*other)
    monkeypatch.setattr(engine, "start", runner.start)
    assert [token.id for token in found] == [token.id for token in write(Sampling(temperature=0))]


def test_a_caller_may_change_its_mode_between_two_tokens() -> None:
    """What a penalty counts is written in place, at every token in the mode of whoever asks for it."""
    sampling = Sampling(temperature=1.0, repetition_penalty=1.2, presence_penalty=0.5)

    def written(modes: list[bool]) -> list[int]:
        tokens = engine.stream(model_of(), [[1, 2], [3]], sampling, [Generator(i) for i in range(2)], 3)
        found = []
        for mode in modes * 2:
            with torch.inference_mode(mode):
                found.append(next(tokens).id)
        return found

    assert written([True, False, True]) == written([False, False, False]) == written([False, True, True])
