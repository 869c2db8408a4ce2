"""The demo, with a small model and a moment of training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glassgpt.cli import main
from glassgpt.config import preset
from glassgpt.model import GPT, weights
from glassgpt.text import Tokenizer


def test_demo_shows_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer = Tokenizer.train(["once upon a time there lived a cat by the sea"], 300)
    torch.manual_seed(0)
    weights.save(GPT(preset("tiny", vocab_size=tokenizer.vocab_size, context_tokens=128)), folder)
    tokenizer.save(folder)
    monkeypatch.setenv("COLUMNS", "80")
    out = tmp_path / "demo"
    (out / "training").mkdir(parents=True)
    arguments = ["demo", "--model", str(folder), "--out-dir", str(out), "--train-seconds", "1"]
    assert main(arguments) == 2  # somebody's folder is not deleted
    assert "not an earlier demo's run" in capsys.readouterr().err
    (out / ".glassgpt-demo").touch()
    (out / "training" / "left-over").touch()
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for expected in ("124,439,808", "163,037,184", "temperature 0.1", "temperature 1.5", "bits per byte", "Try next"):
        assert expected in shown
    for picture in ("next-token.svg", "next-token.png", "training/loss.svg", "training/loss.png"):
        assert (out / picture).stat().st_size > 5000
    assert not (out / "training" / "left-over").exists()
