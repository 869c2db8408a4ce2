"""`glassgpt lab speedrun` with recipes cut short."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from glassgpt.cli import main
from glassgpt.config import ModelConfig, OptimConfig, UserError
from glassgpt.lab import speedrun
from glassgpt.lab.speedrun import NANO_CPU, NANO_GPU, Outcome, Recipe
from glassgpt.model import GPT
from glassgpt.train.loss import Scored, token_loss

TEXT = "the quick brown fox jumps over the lazy dog; " * 200


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_the_baseline_is_nanogpts() -> None:
    """README of karpathy/nanoGPT and its config/train_shakespeare_char.py; 804,096 parameters, without biases."""
    with torch.device("meta"):
        model = GPT(NANO_CPU.model)
    weights = sum(p.numel() for name, p in model.named_parameters() if not name.endswith("bias"))
    assert weights == 804_096
    assert (NANO_CPU.max_steps, NANO_CPU.batch_size, NANO_CPU.model.context_tokens) == (2000, 12, 64)
    assert (NANO_GPU.max_steps, NANO_GPU.batch_size) == (5000, 64)
    assert (NANO_GPU.model.context_tokens, NANO_GPU.model.dropout) == (256, 0.2)


def test_a_pair_of_runs(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ModelConfig(vocab_size=65, context_tokens=16, n_layer=1, n_head=2, width=32, dropout=0.0)
    theirs = Recipe(tiny, OptimConfig(warmup_steps=2), max_steps=12, batch_size=4, ours=False)
    mine = Recipe(tiny, OptimConfig(optimizer="muon", learning_rate=1e-2, warmup_steps=2), max_steps=40, batch_size=4)
    monkeypatch.setitem(speedrun.RECIPES, "cpu", (theirs, mine))
    out = tmp_path / "out"
    arguments = ["lab", "speedrun", "--source", str(text), "--out_dir", str(out), "--seeds", "0", "1", "--ablate", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "speedrun.json").read_text())
    assert [run["seed"] for run in found["baseline"]] == [run["seed"] for run in found["ours"]] == [0, 1]
    assert found["reached"] == [True, True]  # 40 steps of Muon against 12 of AdamW
    assert all(run["tokens"] == 12 * 4 * 16 for run in found["baseline"])
    assert len(found["without"]) == len(speedrun.ablations(mine, theirs))
    assert (out / "speedrun.svg").stat().st_size > 1000


def test_not_reached_is_said(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ModelConfig(vocab_size=65, context_tokens=16, n_layer=1, n_head=2, width=32, dropout=0.0)
    long = Recipe(tiny, OptimConfig(learning_rate=1e-2, warmup_steps=2), max_steps=30, batch_size=4, ours=False)
    monkeypatch.setitem(speedrun.RECIPES, "cpu", (long, dataclasses.replace(long, max_steps=1, ours=True)))
    assert main(["lab", "speedrun", "--source", str(text), "--out_dir", str(tmp_path / "out"), "--seeds", "0"]) == 0
    out = capsys.readouterr().out
    assert "not reached" in out
    assert "x sooner" not in out


def test_a_curve_does_not_depend_on_our_kernels() -> None:
    """Ours and plain PyTorch train to the same losses from the same seed: the tricks change the time alone."""
    torch.manual_seed(0)
    train, held_out = torch.randint(65, (5000,)), torch.randint(65, (500,))
    recipe = dataclasses.replace(NANO_CPU, max_steps=5, batch_size=2)
    plain = speedrun.run(recipe, train, held_out, 0, torch.device("cpu"))
    fast = speedrun.run(dataclasses.replace(recipe, ours=True), train, held_out, 0, torch.device("cpu"))
    assert abs(plain.val_loss - fast.val_loss) < 1e-3  # the faster precision may be bf16
    assert [len(outcome.curve) for outcome in (plain, fast)] == [5, 5]


def test_measure_is_the_plain_mean() -> None:
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(NANO_CPU.model, context_tokens=16))
    held_out = torch.randint(65, (100,))
    rows = held_out[:96].view(6, 16)
    wanted = token_loss(model(rows), held_out[1:97].view(6, 16)).sum.item() / 96
    assert speedrun.measure(Scored(model), held_out) == pytest.approx(wanted, abs=1e-6)


def test_the_split_is_nanogpts(text: Path) -> None:
    train, held_out, vocabulary = speedrun.characters(str(text), 64)
    joined = "".join(sorted(set(TEXT.strip("\n"))))
    assert vocabulary == len(joined)
    assert len(train) == int(0.9 * (len(train) + len(held_out)))
    assert "".join(joined[i] for i in held_out.tolist()) == TEXT.strip("\n")[len(train) :]


def test_a_short_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("too short")
    with pytest.raises(UserError, match="a tenth of it must be longer than the context, 64"):
        speedrun.characters(str(path), 64)


def test_speedups_by_seed() -> None:
    def outcome(seconds: float, loss: float) -> Outcome:
        return Outcome(0, 1, 1, seconds, loss, ((seconds, loss),))

    result = speedrun.Result(None, [outcome(10, 2.0), outcome(9, 2.0)], [outcome(2, 1.9), outcome(3, 2.1)], {})  # type: ignore[arg-type]
    assert result.speedups() == [5, 3]
    assert result.reached() == [True, False]
