"""Linear probes: what is linear in the activations is found, a memory for tokens has no selectivity, texts are held out whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact import error, noisy, random, shape, tokens
from torch import Tensor

from glassgpt.config import UserError
from glassgpt.interpret import capture
from glassgpt.interpret.probe import FITS, ProbeResult, probe, probe_layers

METHODS = pytest.mark.parametrize("method", FITS)
TEXTS, LENGTH, TYPES = 24, 40, 300


def places() -> tuple[Tensor, Tensor]:
    """Text and type of each token of 24 texts."""
    types = torch.randint(TYPES, (TEXTS * LENGTH,), generator=torch.Generator().manual_seed(3))
    return torch.arange(TEXTS).repeat_interleave(LENGTH), types


@METHODS
def test_labels_that_are_linear_in_the_activations_are_found(method: Any) -> None:
    texts, types = places()
    features = random(len(texts), 8)
    labels = (features @ random(8, 3, seed=7)).argmax(dim=-1)
    result = probe(features, labels, texts, types, method=method, penalty=1e-5)
    assert result.accuracy > (0.98 if method == "logistic" else 0.85)  # least squares has a border of its own
    assert result.control_accuracy < result.majority_accuracy + 0.1 < 0.6
    assert result.selectivity == result.accuracy - result.control_accuracy
    assert (result.classes, result.train_tokens, result.test_tokens) == (3, 18 * LENGTH, 6 * LENGTH)


@METHODS
def test_two_sides_of_a_plane_with_a_gap_are_told_apart_exactly(method: Any) -> None:
    texts, types = places()
    features = random(len(texts), 8)
    features[:, 0] = features[:, 0].sign() * (1 + features[:, 0].abs())
    result = probe(100 + 5 * features, (features[:, 0] > 0).long(), texts, types, method=method)
    assert (result.accuracy, result.train_accuracy) == (1, 1)
    assert result.control_accuracy < 0.65


@METHODS
def test_a_probe_that_knows_tokens_by_heart_has_no_selectivity(method: Any) -> None:
    """One number for each type learns any label that goes with the type, the control's as well as the real one."""
    texts, types = places()
    types = types % 40
    by_heart = F.one_hot(types, 40).double()
    labels = (types * 7 + types // 3) % 2
    memory = probe(by_heart, labels, texts, types, method=method)
    assert memory.accuracy == memory.control_accuracy == 1
    assert memory.selectivity == 0
    seen = torch.cat((labels.unsqueeze(1) + 0.1 * random(len(texts), 1), random(len(texts), 4)), dim=1)
    assert probe(seen, labels, texts, types, method=method).selectivity > 0.3


@METHODS
def test_noise_is_not_found(method: Any) -> None:
    texts, types = places()
    labels = torch.randint(2, (len(texts),), generator=torch.Generator().manual_seed(4))
    result = probe(random(len(texts), 8), labels, texts, types, method=method)
    assert abs(result.accuracy - 0.5) < 0.1
    assert abs(result.selectivity) < 0.15


def test_texts_are_held_out_whole() -> None:
    """Activations that tell the text, and labels that go with the text: nothing of that helps with a new text."""
    texts, types = places()
    labels = torch.randint(2, (TEXTS,), generator=torch.Generator().manual_seed(4))[texts]
    result = probe(F.one_hot(texts, TEXTS).double(), labels, texts, types)
    assert result.train_accuracy == 1
    assert result.accuracy in (result.majority_accuracy, 1 - result.majority_accuracy)
    leaky = probe(F.one_hot(texts, TEXTS).double(), labels, torch.arange(len(texts)), types)  # each token its own text
    assert leaky.accuracy == 1


def test_the_fits_are_what_they_say() -> None:
    x = torch.cat((random(200, 3), torch.ones(200, 1).double()), dim=1)
    goal = F.one_hot((x[:, :2].sum(dim=1) + 0.5 * random(200, seed=9) > 0).long(), 2).double()
    ridge = FITS["least_squares"](x, goal, 0.1)
    penalty = torch.tensor([0.1, 0.1, 0.1, 0], dtype=torch.float64).unsqueeze(1)
    assert error(x.T @ (x @ ridge - goal) / 200 + penalty * ridge, torch.zeros(4, 2).double()) < 1e-12
    softmax = FITS["logistic"](x, goal, 0.1)
    gradient = x.T @ ((x @ softmax).softmax(dim=-1) - goal) / 200 + penalty * softmax
    assert error(gradient, torch.zeros(4, 2).double()) < 1e-5
    assert error(softmax, ridge) > 0.1


def test_tokens_without_a_label_do_not_count() -> None:
    texts, types = places()
    features = random(len(texts), 8)
    labels = (features[:, 0] > 0).long()
    left_out = torch.arange(len(texts)) % 3 == 0
    with_gaps = probe(features, labels.masked_fill(left_out, -100), texts, types)
    assert with_gaps == probe(features[~left_out], labels[~left_out], texts[~left_out], types[~left_out])


def test_layers_of_a_model_are_swept() -> None:
    """The label is made of the activation after block 1, so that layer says most."""
    model = noisy(shape(), torch.float32)
    texts = list(tokens(shape(), batch=20, length=16))
    with capture(model, "blocks.1") as seen, torch.no_grad():
        model(torch.stack(texts))
    labels = list((seen["blocks.1"] @ random(16).float() > 0).long())
    calls: list[tuple[int, int]] = []
    found = probe_layers(model, texts, labels, progress=lambda done, total: calls.append((done, total)))
    assert [name for name, _ in found] == ["embed", "blocks.0", "blocks.1", "blocks.2"]
    accuracy = {name: result.accuracy for name, result in found}
    assert max(accuracy, key=lambda name: accuracy[name]) == "blocks.1"
    assert accuracy["blocks.1"] > 0.95
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    ((name, alone),) = probe_layers(model, texts, labels, names=["blocks.1"], seed=0)
    numbers = torch.arange(20).repeat_interleave(16)
    expected = probe(seen["blocks.1"].flatten(0, 1), torch.cat(labels), numbers, torch.cat(texts))
    assert name == "blocks.1"
    assert alone.accuracy == pytest.approx(expected.accuracy, abs=0.02)
    assert isinstance(alone, ProbeResult)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.zeros(3)}, r"labels, texts and types \(N,\) each; got \(960, 8\), \(3,\)"),
        ({"labels": torch.zeros(960)}, "fewer than two classes"),
        ({"labels": -torch.ones(960)}, "at least 2 texts with labels; got 0"),
        ({"texts": torch.zeros(960)}, "at least 2 texts with labels; got 1"),
        ({"method": "logistik"}, "did you mean 'logistic'"),
        ({"penalty": 0.0}, "penalty must be above 0"),
        ({"test_share": 1.0}, "test_share between 0 and 1; got 0.001 and 1.0"),
    ],
)
def test_what_cannot_be_probed_is_refused(changes: dict[str, Any], message: str) -> None:
    texts, types = places()
    given: dict[str, Any] = {"features": random(960, 8), "labels": types % 2, "texts": texts, "types": types}
    with pytest.raises(UserError, match=message):
        probe(**{**given, **changes})


def test_a_sweep_needs_a_label_for_each_token() -> None:
    model = noisy(shape(), torch.float32)
    for texts, labels in (([], []), ([torch.arange(4)], [torch.arange(3)])):
        with pytest.raises(UserError, match="a label for each of their tokens"):
            probe_layers(model, texts, labels)
    with pytest.raises(UserError, match="not one activation with a vector for each token"):
        probe_layers(model, [torch.arange(4)], [torch.arange(4)], names=["blocks.0.attn.z"])
