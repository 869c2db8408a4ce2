"""`glassgpt evaluate`: windows that count each token once, and numbers that equal their definition."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from glassgpt.cli import main
from glassgpt.config import UserError, preset
from glassgpt.config.evaluate import Evaluate
from glassgpt.model import GPT, weights
from glassgpt.text import Tokenizer
from glassgpt.train.evaluate import evaluate, windows
from glassgpt.train.loss import IGNORE

TEXT = "the cat sat on the mat. " * 9 + "it was a mât, naïve and 🙂."


@pytest.mark.parametrize("n", [2, 7, 8, 9, 17, 40])
@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_token_is_a_target_once(n: int, stride: int, batch_size: int) -> None:
    ids = np.arange(100, 100 + n)
    counted: list[int] = []
    first = True
    for batch in windows(ids, 8, stride, batch_size):
        assert batch.ids.shape == batch.targets.shape
        assert batch.ids.size(0) <= batch_size
        for row, targets in zip(batch.ids, batch.targets, strict=True):
            wanted = targets != IGNORE
            assert torch.equal(targets[wanted], row[wanted] + 1)  # ids count up by one
            if not first:
                assert wanted.sum() <= max(stride, 1) or n - 1 <= 8  # later windows see at least context - stride before
            counted += targets[wanted].tolist()
            first = False
    assert sorted(counted) == list(range(101, 100 + n))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = Tokenizer.train([TEXT], 300)
    torch.manual_seed(0)
    model = GPT(preset("tiny", vocab_size=tokenizer.vocab_size))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    weights.save(model, tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def test_stride_of_one_is_the_definition(folder: Path) -> None:
    """Each token's probability given as many tokens before it as fit, one by one."""
    model, tokenizer = weights.load(folder).eval(), Tokenizer.load(folder)
    ids = [*tokenizer.encode(TEXT), tokenizer.end_id]
    nats = 0.0
    with torch.no_grad():
        for place in range(1, len(ids)):
            before = torch.tensor([ids[max(0, place - 32) : place]])
            nats -= float(model(before)[0, -1].double().log_softmax(-1)[ids[place]])
    config = Evaluate(str(folder), sources=(str(folder / "text.txt"),), stride_tokens=1)
    found = evaluate(config)
    first_bytes = len(tokenizer.token_bytes(ids[0]))
    assert found["tokens"] == len(ids) - 1
    assert found["loss"] == pytest.approx(nats / (len(ids) - 1), abs=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / (len(TEXT.encode()) - first_bytes), abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-5)


def test_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", str(folder), "--sources", str(folder / "text.txt")]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(arguments) == 0
    assert f"{found['bits_per_byte']:.4f} bits per byte" in capsys.readouterr().out
    assert main([*arguments, "--stride-tokens", "33"]) == 2
    assert "stride_tokens is 33 and the context 32" in capsys.readouterr().err


def test_too_little_text() -> None:
    with pytest.raises(UserError, match="fewer than two tokens"):
        next(windows(np.array([1]), 8, 8, 1))
