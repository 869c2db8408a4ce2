"""The hand-built induction model: its published numbers, its bundled copy, and its words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

import glassgpt
from glassgpt.cli import main
from glassgpt.config.generate import Sampling
from glassgpt.generation import complete
from glassgpt.interpret import capture, edit
from glassgpt.interpret.heads import (
    duplicate_score,
    head_class,
    head_outputs,
    head_scores,
    induction_score,
    longest_probe,
    previous_score,
)
from glassgpt.interpret.induction import VOCABULARY, WORDS, induction_model, induction_tokenizer, save_induction
from glassgpt.loading import ASSETS, bundled
from glassgpt.model import GPT
from glassgpt.text import Tokenizer

FOLDER = ASSETS / "induction"
N, ROWS = 20, 64  # tokens repeated, sequences


@pytest.fixture(scope="module")
def model() -> GPT:
    return induction_model()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return induction_tokenizer()


def sequences(start: int, repeated: bool) -> Tensor:
    """20 different words and the same again, or 20 others in an order of their own: (64, start + 40)."""
    generator = torch.Generator().manual_seed(0)

    def drawn() -> Tensor:
        return torch.stack([1 + torch.randperm(23, generator=generator)[:N] for _ in range(ROWS)])

    first = drawn()
    return torch.cat((torch.zeros(ROWS, start, dtype=torch.long), first, first if repeated else drawn()), dim=1)


@torch.no_grad()
def run(model: GPT, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both layers' patterns (B, 1, T, T), and logits."""
    with capture(model, "blocks.*.attn.pattern") as seen:
        logits = model(ids)
    return seen["blocks.0.attn.pattern"], seen["blocks.1.attn.pattern"], logits


def accuracy(logits: Tensor, ids: Tensor) -> float:
    """Share of the second half's tokens, but its first, that are the likeliest."""
    right = logits[:, -N:-1].argmax(-1) == ids[:, -N + 1 :]
    return float(right.double().mean())


# ---------------------------------------------------------------------- the published numbers


def test_without_a_beginning(model: GPT) -> None:
    ids = sequences(0, repeated=True)
    first, second, logits = run(model, ids)
    assert float(previous_score(first).mean()) == pytest.approx(1, abs=1e-12)
    assert float(induction_score(first, N).mean()) == pytest.approx(0, abs=1e-12)
    assert float(induction_score(second, N).mean()) == pytest.approx(18.5 / 19, abs=1e-12)  # 0.97368
    assert float(duplicate_score(second, N).mean()) == pytest.approx(0.5 / N, abs=1e-12)
    split = second[:, 0, N, :2]  # the first token is its own predecessor, so two places match the first query
    assert float((split - 0.5).abs().max()) < 1e-12
    assert 18 / 19 <= accuracy(logits, ids) <= 1
    assert bool((logits[:, N + 1 : -1].argmax(-1) == ids[:, N + 2 :]).all())


def test_with_a_beginning(model: GPT) -> None:
    ids = sequences(1, repeated=True)
    first, second, logits = run(model, ids)
    assert float(previous_score(first).mean()) == pytest.approx(1, abs=1e-12)
    assert float(induction_score(second, N, 1).mean()) == pytest.approx(1, abs=1e-12)
    assert accuracy(logits, ids) == 1


@pytest.mark.parametrize("start", [0, 1])
def test_the_control_is_low(model: GPT, start: int) -> None:
    _, second, logits = run(model, sequences(start, repeated=False))
    assert 0.03 < float(induction_score(second, N, start).mean()) < 0.06
    assert accuracy(logits, sequences(start, repeated=False)) < 0.1


@pytest.mark.parametrize("start", [0, 1])
def test_without_the_previous_token_head_nothing_is_found(model: GPT, start: int) -> None:
    ids = sequences(start, repeated=True)
    with edit(model, {"blocks.0.attn.z": torch.zeros_like}):
        _, second, logits = run(model, ids)
    even = sum(1 / (start + N + i + 1) for i in range(N - 1)) / (N - 1)
    assert float(induction_score(second, N, start).mean()) == pytest.approx(even, abs=1e-12)  # 0.035: attention is even
    assert accuracy(logits, ids) == 0
    assert accuracy(run(model, ids)[2], ids) > 0.9  # the edit is gone


@pytest.mark.parametrize("bos", [None, 0])
def test_patterns_are_causal_distributions(model: GPT, bos: int | None) -> None:
    for pattern in run(model, sequences(int(bos is not None), repeated=True))[:2]:
        assert float((pattern.sum(-1) - 1).abs().max()) < 1e-12
        assert bool((pattern.triu(1) == 0).all())


def test_a_head_zeroed_takes_its_output_away(model: GPT) -> None:
    ids = sequences(1, repeated=True)
    for layer in range(2):
        with torch.no_grad(), capture(model, f"blocks.{layer}.attn.*") as seen:
            model(ids)
        z, out = seen[f"blocks.{layer}.attn.z"], seen[f"blocks.{layer}.attn.out"]
        assert float((head_outputs(model, layer, z).detach()[:, :, 0] - out).abs().max()) < 1e-12
        assert float(out.abs().max()) > 1


@pytest.mark.parametrize("bos", [None, 0])
def test_its_heads_are_named(model: GPT, bos: int | None) -> None:
    n = longest_probe(model, bos)
    assert n == (12 if bos is None else 11)
    first, second = head_scores(model, tokens=n, bos=bos)
    assert [head_class(first), head_class(second)] == ["previous-token", "induction"]
    assert (first.previous, first.previous_control) == (pytest.approx(1, abs=1e-12), pytest.approx(1, abs=1e-12))
    assert first.entropy_bits == pytest.approx(0, abs=1e-12)
    assert second.induction == pytest.approx(1 if bos == 0 else (n - 1.5) / (n - 1), abs=1e-12)
    even = sum(1 / (int(bos is not None) + n + i + 1) for i in range(n - 1)) / (n - 1)
    assert second.induction_control == pytest.approx(even, abs=1e-12)  # no earlier time: attention is even


# ---------------------------------------------------------------------- the bundled copy


def test_the_bundled_files_are_this_model(tmp_path: Path) -> None:
    assert "induction" in bundled()
    save_induction(tmp_path)
    for name in ("model.json", "tokenizer.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((FOLDER / name).read_text()), name
    found = safetensors.torch.load_file(FOLDER / "model.safetensors")
    expected = {name: parameter.detach().float() for name, parameter in induction_model().named_parameters()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == torch.float32 for name in found)


def test_the_bundled_model_does_the_same_in_float32(tokenizer: Tokenizer) -> None:
    bundled_model, bundled_tokenizer = glassgpt.load("induction")
    assert bundled_tokenizer.sha256 == tokenizer.sha256
    first, second = head_scores(bundled_model, tokens=11, bos=0)
    assert (first.previous, second.induction) == (pytest.approx(1, abs=1e-6), pytest.approx(1, abs=1e-6))
    assert [head_class(first), head_class(second)] == ["previous-token", "induction"]


def test_the_card_says_what_is_there(model: GPT) -> None:
    card = (FOLDER / "README.md").read_text()
    numbers = torch.cat([parameter.flatten() for parameter in model.parameters()])
    gains = sum(int((parameter != 0).sum()) for name, parameter in model.named_parameters() if "norm" in name)
    assert f"| {len(numbers):,}, of which {int((numbers != 0).sum()):,} are not zero ({gains} are gains" in card
    assert ", ".join(WORDS[:-1]) in " ".join(card.split())


def test_it_writes_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "induction", "cat dog moon river cat", "--temperature", "0", "--max_new_tokens", "6"]) == 0
    assert capsys.readouterr().out == "cat dog moon river cat dog moon river cat dog moon\n"


def test_what_comes_next_is_likely_at_temperature_1(model: GPT, tokenizer: Tokenizer) -> None:
    (found,) = complete(model, tokenizer, ["one two three one"], Sampling(temperature=1.0), max_new_tokens=1, seed=0, n_top=2)
    ((best, logprob), (_, second)) = found.tokens[0].top
    assert tokenizer.decode([best]) == " two"
    assert torch.tensor([logprob, second]).exp().tolist() == [pytest.approx(0.99, abs=0.005), pytest.approx(0.0004, abs=2e-4)]


# ---------------------------------------------------------------------- words


def test_the_vocabulary(model: GPT, tokenizer: Tokenizer) -> None:
    assert len(set(VOCABULARY)) == 24 == tokenizer.vocab_size == model.config.vocab_size
    assert (tokenizer.begin_id, tokenizer.end_id, tokenizer.special_tokens) == (0, None, ["<s>"])
    text = "".join(f" {word}" for word in WORDS)
    assert tokenizer.encode(text) == list(range(1, 23))
    assert tokenizer.decode(range(1, 23)) == text
    assert tokenizer.byte_lengths()[:3] == [0, 4, 4]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cat dog", ["cat", "dog"]),
        ("  Cat\n\tDOG ", ["cat", "dog"]),
        ("cat, zebra dog", ["cat", "?", "?", "dog"]),
        ("mèo", ["?"]),
        ("me\u0300o", ["?"]),  # the same in two code points: one unknown word too
        ("?", ["?"]),
        ("<s> cat", ["?", "?", "?", "cat"]),  # text cannot write the token that begins texts
        ("😀", ["?"]),
        ("", []),
    ],
)
def test_every_text_has_ids(tokenizer: Tokenizer, text: str, words: list[str]) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == "".join(f" {word}" for word in words)
    assert tokenizer.encode_start(text) == [0, *ids]
