"""Documents that share a window: each is computed as if it stood alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from oracle import SMALL, add_noise
from torch import Tensor

from glassgpt.data.stream import apart
from glassgpt.model import GPT, attention, blocked, fused, plain, use_attention

LENGTHS = [(5, 1, 9, 9), (24,), (1,) * 24, (7, 8, 8, 1), (12, 12)]
"""Documents of each row; 7, 8 and 9 lie around the blocks' ends."""
SEGMENTS = torch.tensor([[number for number, n in enumerate(row) for _ in range(n)] for row in LENGTHS])
T = SMALL.context_tokens
CONFIG = dataclasses.replace(SMALL, n_layer=2)


@pytest.fixture(params=[plain, fused, blocked], ids=lambda attend: attend.__name__)
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> GPT:
    """With noise on every parameter, and blocks so small that documents cross them."""
    monkeypatch.setattr(attention, "BLOCK_QUERIES", 8)
    torch.manual_seed(0)
    made = GPT(CONFIG).double()
    add_noise(made, 0.3)
    use_attention(made, request.param)
    return made


def random(seed: int = 0) -> tuple[Tensor, Tensor]:
    """ids (B, T), and a weight for each hidden state (B, T, D)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(CONFIG.vocab_size, (len(LENGTHS), T), generator=generator)
    return ids, torch.randn(len(LENGTHS), T, CONFIG.width, generator=generator, dtype=torch.float64)


def gradients(model: GPT, loss: Tensor) -> list[Tensor]:
    named = [parameter for name, parameter in model.named_parameters() if not name.startswith("head")]
    return list(torch.autograd.grad(loss, named))


def test_packed_documents_are_as_if_alone(model: GPT) -> None:
    ids, weight = random()
    packed = model.hidden(ids, segments=SEGMENTS)
    alone = torch.empty_like(packed)
    for row, lengths in enumerate(LENGTHS):
        for part in torch.arange(T).split(list(lengths)):
            alone[row, part] = model.hidden(ids[row : row + 1, part])[0]
    assert torch.allclose(packed, alone, rtol=0, atol=1e-10)
    for x, y in zip(gradients(model, (packed * weight).sum()), gradients(model, (alone * weight).sum()), strict=True):
        assert torch.allclose(x, y, rtol=0, atol=1e-10 * max(1.0, float(y.abs().max())))
    assert not torch.allclose(packed, model.hidden(ids), rtol=0, atol=0.1)


def test_only_the_borders_matter(model: GPT) -> None:
    """Numbers may start anywhere and leave some out; one document is a plain sequence."""
    ids, _ = random()
    numbered = torch.tensor([0, 3])[:, None] + 5 * SEGMENTS[:2]
    assert torch.equal(model.hidden(ids[:2], segments=numbered), model.hidden(ids[:2], segments=SEGMENTS[:2]))
    one = torch.full_like(ids, 4)
    assert torch.allclose(model.hidden(ids, segments=one), model.hidden(ids), rtol=0, atol=1e-12)


def test_a_window_that_starts_and_ends_within_documents(model: GPT) -> None:
    """As the stream cuts it: what is left of the first document counts from position 0."""
    E = 0
    text = torch.arange(1, 60) % 9 + 1
    text[[3, 14, 15, 30]] = E
    window = text[1 : T + 2].unsqueeze(0)
    batch = apart(window, E)
    found = model.hidden(batch.ids, segments=batch.segments)[0]
    begins, parts = 0, []
    for t in range(T):
        if batch.ids[0, t] == E or t == T - 1:
            parts.append(model.hidden(batch.ids[:, begins : t + 1])[0])
            begins = t + 1
    assert [len(part) for part in parts] == [3, 11, 1, 9]
    assert torch.allclose(found, torch.cat(parts), rtol=0, atol=1e-10)


@pytest.mark.parametrize("t", [0, 5, 8, T - 1])
def test_a_token_changes_its_own_document_alone(model: GPT, t: int) -> None:
    ids, _ = random()
    changed = ids.clone()
    changed[:, t] = (changed[:, t] + 1) % CONFIG.vocab_size
    with torch.no_grad():
        before, after = model.hidden(ids, segments=SEGMENTS), model.hidden(changed, segments=SEGMENTS)
    own = (SEGMENTS[:, t : t + 1] == SEGMENTS) & (torch.arange(T) >= t)
    assert torch.equal(before[~own], after[~own])  # to the last bit
    assert bool((before[own] != after[own]).any(-1).all())


def test_no_gradient_crosses_a_border(model: GPT) -> None:
    ids, weight = random()
    kept: list[Any] = []
    handle = model.token_embedding.register_forward_hook(lambda module, given, made: kept.append(made) or made)
    packed = model.hidden(ids, segments=SEGMENTS)
    handle.remove()
    (grad,) = torch.autograd.grad((packed * weight)[:, 6].sum(), kept)  # one position of each row
    own = (SEGMENTS[:, 6:7] == SEGMENTS) & (torch.arange(T) <= 6)
    assert not grad[~own].any() and bool(grad[own].any(-1).all())
