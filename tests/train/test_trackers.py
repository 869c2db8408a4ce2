"""The log, sent elsewhere: only to what is named, with its numbers."""

from __future__ import annotations

import builtins
import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest

from glassgpt.cli import main
from glassgpt.config import DataConfig, Pretrain, UserError, preset
from glassgpt.train.pretrain import pretrain
from glassgpt.train.run import Trackers, read_log


@pytest.fixture
def config(tmp_path: Path) -> Pretrain:
    """A run of six steps."""
    draw = random.Random(0)
    words = "the a cat dog fox hen sat ran saw ate on in under mat log box".split()
    (tmp_path / "text.txt").write_text("".join(" ".join(draw.choices(words, k=8)) + ".\n" for _ in range(100)))
    return Pretrain(
        out_dir=str(tmp_path / "run"),
        model=preset("tiny", vocab_size=280),
        data=DataConfig(sources=(str(tmp_path / "text.txt"),)),
        max_steps=6,
        batch_size=2,
        eval_interval=3,
        device="cpu",
        precision="fp32",
        compile="off",
    )


@pytest.mark.filterwarnings("ignore")  # TensorBoard's own
def test_tensorboard_holds_the_log(config: Pretrain) -> None:
    from tensorboard.backend.event_processing import event_accumulator

    run = pretrain(dataclasses.replace(config, track=("tensorboard",)))
    found = event_accumulator.EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    log = read_log(run)
    for name, steps in (("loss", range(1, 7)), ("lr", range(1, 7)), ("grad_norm", range(1, 7)), ("val_loss", (3, 6))):
        assert [event.step for event in found.Scalars(name)] == list(steps)
        for event in found.Scalars(name):
            assert event.value == pytest.approx(log[event.step - 1][name], rel=1e-6)
    assert "sample" not in found.Tags()["scalars"]  # numbers only


def test_wandb_offline_holds_the_log(config: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed (extra `track`)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = pretrain(dataclasses.replace(config, track=("wandb",)))
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))


def test_trackio_holds_the_log(config: Pretrain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed (extra `track`)")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pretrain(dataclasses.replace(config, track=("trackio",)))
    assert any(path.is_file() for path in (tmp_path / "trackio").rglob("*"))


def test_nothing_is_sent_unless_it_is_named(config: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def no_tracker(name: str, *rest: Any, **named: Any) -> Any:
        assert name.partition(".")[0] not in ("wandb", "trackio", "tensorboard") and name != "torch.utils.tensorboard"
        return imported(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", no_tracker)
    run = pretrain(config)
    assert not (run / "tensorboard").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def missing(asked: str, *rest: Any, **named: Any) -> Any:
        if asked in (name, f"torch.utils.{name}"):
            raise ImportError(asked)
        return imported(asked, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=rf"{name} is not installed; pip install 'glassgpt\[track\]'"):
        Trackers([name], tmp_path, {})


def test_an_unknown_tracker_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["pretrain", "--out_dir", str(tmp_path / "run"), "--track", "mlflow"])
    assert ended.value.code == 2
    assert "mlflow" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("track: [mlflow]\n")
    assert main(["pretrain", "--config", str(tmp_path / "config.yaml"), "--out_dir", str(tmp_path / "run")]) == 2
    assert "track" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
