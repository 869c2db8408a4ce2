"""Steering: the stream moves by exactly the vector, in the cache's steps too, where it should; and the text moves with it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pytest
import torch
from exact import error, noisy, shape, tokens
from torch import Tensor

import glassgpt
from glassgpt.config import UserError
from glassgpt.config.generate import Sampling
from glassgpt.generation import complete
from glassgpt.generation.cache import KVCache
from glassgpt.interpret import capture
from glassgpt.interpret.steering import steer, steering_vector
from glassgpt.model import GPT

T, EXACT = 9, 1e-12


def made() -> GPT:
    return noisy(shape())


def vector(model: GPT) -> Tensor:
    return torch.linspace(-1, 2, model.config.width, dtype=torch.float64)


@torch.no_grad()
def stream(model: GPT, ids: Tensor, layer: int) -> Tensor:
    with capture(model, f"blocks.{layer}") as seen:
        model(ids)
    return seen[f"blocks.{layer}"]


@pytest.mark.parametrize("layer", range(3))
@torch.no_grad()
def test_the_stream_moves_by_the_vector(layer: int) -> None:
    model = made()
    ids, push = tokens(model.config, 2, T), vector(model)
    before = stream(model, ids, layer)
    with steer(model, layer, push, 2.5):
        assert torch.equal(stream(model, ids, layer), before + 2.5 * push)
    with steer(model, layer, push, 2.5, positions=[0, 4]):
        moved = stream(model, ids, layer) - before
    assert error(moved[:, [0, 4]], (2.5 * push).expand(2, 2, -1)) < EXACT
    assert torch.all(moved[:, [1, 2, 3, 5, 6, 7, 8]] == 0)
    assert torch.equal(stream(model, ids, layer), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("positions", [None, [1, 5, 7]])
@torch.no_grad()
def test_scale_0_changes_not_a_bit(positions: list[int] | None) -> None:
    model = made()
    ids = tokens(model.config, 2, T)
    expected = model(ids)
    with steer(model, 1, vector(model), 0.0, positions):
        assert torch.equal(model(ids), expected)


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("positions", [None, [1, 5, 7]])
@torch.no_grad()
def test_the_same_with_a_cache(layer: int, positions: list[int] | None) -> None:
    """Positions count from the start of the text in every step; the last layer's too, after which the cache is longer."""
    model = made()
    ids = tokens(model.config, 2, T)
    plain = model(ids)
    with steer(model, layer, vector(model), 1.5, positions):
        expected = model(ids)
        cache = KVCache(model.config)
        steps = torch.cat([model(part, cache) for part in ids.split([4, 1, 1, 2, 1], dim=1)], dim=1)
    assert error(steps, expected) < 1e-10
    assert error(plain, expected) > 1e-3


@torch.no_grad()
def test_the_vector_by_hand() -> None:
    model = made()
    prompts = [tokens(model.config, 1, length, seed=length)[0] for length in (3, 5, 4)]
    streams = [stream(model, ids.unsqueeze(0), 1)[0] for ids in prompts]
    found = steering_vector(model, 1, prompts[:2], prompts[2:])
    assert error(found, (streams[0][-1] + streams[1][-1]) / 2 - streams[2][-1]) < EXACT
    found = steering_vector(model, 1, prompts[:2], prompts[2:], position=None)
    assert error(found, (streams[0].mean(0) + streams[1].mean(0)) / 2 - streams[2].mean(0)) < EXACT
    assert error(steering_vector(model, 1, prompts[:1], prompts[2:], 0), streams[0][0] - streams[2][0]) < EXACT


def test_a_text_is_pushed_where_it_should_go() -> None:
    """The difference of texts about a dog and about a cat makes a story's animal more of the one and less of the other."""
    model, tokenizer = glassgpt.load("storyteller")
    pairs = ["The {} ran in the garden. The", "A little {} was sleeping. The", "Lily has a {}. She loves her"]

    def ids(text: str) -> Tensor:
        return torch.tensor(tokenizer.encode(text))

    push = steering_vector(model, 3, [ids(p.format("dog")) for p in pairs], [ids(p.format("cat")) for p in pairs])
    dog, cat = (tokenizer.encode(word)[0] for word in (" dog", " cat"))
    prompt = ids("Once upon a time there was a little").unsqueeze(0)

    @torch.no_grad()
    def gap(scale: float) -> float:
        with steer(model, 3, push, scale):
            log_p = model(prompt)[0, -1].log_softmax(-1)
        return float(log_p[dog] - log_p[cat])

    assert gap(-2.0) < gap(0.0) - 0.5 < gap(0.0) + 0.5 < gap(2.0)

    def text(scale: float | None) -> str:
        with contextlib.nullcontext() if scale is None else steer(model, 3, push, scale):
            start = "Once upon a time there was a little"
            (found,) = complete(model, tokenizer, [start], Sampling(temperature=0), max_new_tokens=12, seed=0)
        return found.text

    assert text(0.0) == text(None)
    assert text(8.0) != text(None)


@pytest.mark.parametrize(
    ("layer", "width", "message"),
    [
        (3, 16, "no layer 3: the model has 0 to 2"),
        (-1, 16, "no layer -1"),
        (1, 8, r"must be \(16,\), the model's width; got \(8,\)"),
    ],
)
def test_refusals(layer: int, width: int, message: str) -> None:
    with pytest.raises(UserError, match=message), steer(made(), layer, torch.zeros(width)):
        pass


def test_prompts_that_give_no_vector_are_refused() -> None:
    model = made()
    ids = tokens(model.config, 1, 3)[0]
    with pytest.raises(UserError, match="got 1 wanted and 0 unwanted"):
        steering_vector(model, 0, [ids], [])
    with pytest.raises(UserError, match="position 3 is not in a text of 3 tokens"):
        steering_vector(model, 0, [ids], [ids], position=3)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([torch.tensor([1, 99])], "token ids must be between 0 and 30; got 1 to 99"),
        ([torch.tensor([[1, 2]])], r"expected the token ids of one text, shape \(T,\); got \(1, 2\)"),
        (torch.tensor([1, 2]), r"expected the token ids of one text, shape \(T,\); got \(\)"),
    ],
)
@pytest.mark.parametrize("position", [-1, None])
def test_prompts_that_the_model_cannot_take_are_refused(prompts: Sequence[Tensor], position: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        steering_vector(made(), 0, prompts, prompts, position)


def test_prompts_may_be_the_rows_of_a_tensor() -> None:
    model = made()
    rows = tokens(model.config, 2, 3)
    assert torch.equal(steering_vector(model, 0, rows, rows[:1]), steering_vector(model, 0, list(rows), [rows[0]]))  # type: ignore[arg-type]


def test_dropout_that_is_on_is_refused() -> None:
    model = noisy(shape(dropout=0.1)).train()
    ids = tokens(model.config, 1, 3)[0]
    with pytest.raises(UserError, match="the model is in training mode"):
        steering_vector(model, 0, [ids], [ids])


@pytest.mark.parametrize("positions", [[-1], [2, -3], [0.5]])
def test_positions_that_are_never_reached_are_refused(positions: list[int]) -> None:
    model = made()
    with (
        pytest.raises(UserError, match=r"positions must be whole numbers from 0 up, .*; got \["),
        steer(model, 0, vector(model), positions=positions),
    ):
        pass


@torch.no_grad()
def test_no_position_and_one_beyond_the_text_change_nothing_yet() -> None:
    model = made()
    ids = tokens(model.config, 1, T)
    expected = model(ids)
    for positions in ([], [99]):
        with steer(model, 0, vector(model), positions=positions):
            assert torch.equal(model(ids), expected)
