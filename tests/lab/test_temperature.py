"""The numbers that say what temperature changes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from glassgpt.config import preset
from glassgpt.interpret.next_token import logits_of
from glassgpt.lab.temperature import sample as temperature
from glassgpt.model import GPT
from glassgpt.text import Tokenizer

PROMPT = "the cat sat"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat and the dog sat on the log"] * 3, 300)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    torch.manual_seed(0)
    model = GPT(preset("tiny", vocab_size=tokenizer.vocab_size)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def test_temperature_changes_heights_and_never_the_order(model: GPT, tokenizer: Tokenizer) -> None:
    shown = {t: temperature.likeliest(model, tokenizer, PROMPT, t, 8) for t in (0.1, 0.7, 1.0, 1.5)}
    assert len({tuple(token for token, _ in rows) for rows in shown.values()}) == 1
    first = [rows[0][1] for rows in shown.values()]
    assert first == sorted(first, reverse=True)
    logits = logits_of(model, tokenizer.encode(PROMPT))[-1]
    expected = (logits / 0.7).softmax(-1).sort(descending=True).values[:8].tolist()
    assert [p for _, p in shown[0.7]] == pytest.approx(expected, abs=1e-6)


def test_measures_of_a_sample(model: GPT, tokenizer: Tokenizer) -> None:
    made = temperature.sample(model, tokenizer, PROMPT, 0.7, 12, seed=1)
    ids = tokenizer.encode(PROMPT)
    bits, surprise = [], []
    for token in made.completion.tokens:  # step by step, from the definition
        log_p = logits_of(model, ids)[-1].double().log_softmax(-1)
        p = (logits_of(model, ids)[-1].double() / 0.7).softmax(-1)
        bits.append(float(-(p * p.log2()).sum()))
        surprise.append(-float(log_p[token.id]) / math.log(2))
        ids.append(token.id)
    assert len(bits) == 12
    assert made.entropy_bits == pytest.approx(sum(bits) / 12, abs=1e-4)
    assert made.surprise_bits == pytest.approx(sum(surprise) / 12, abs=1e-4)


def test_hotter_means_more_choices(model: GPT, tokenizer: Tokenizer) -> None:
    entropies = [temperature.sample(model, tokenizer, PROMPT, t, 12, seed=1).entropy_bits for t in (0.0, 0.1, 0.7, 1.5)]
    assert entropies[0] == 0
    assert entropies == sorted(entropies)


def test_chart_is_drawn(model: GPT, tokenizer: Tokenizer, tmp_path: Path) -> None:
    temperature.chart(model, tokenizer, PROMPT, (0.1, 0.7, 1.5), tmp_path / "chart.svg", count=5)
    svg = (tmp_path / "chart.svg").read_text()
    assert svg.rstrip().endswith("</svg>")
    temperature.chart(model, tokenizer, PROMPT, (0.1, 0.7, 1.5), tmp_path / "chart.png", count=5)
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
