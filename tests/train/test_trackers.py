"""The log, sent elsewhere: only to what is named, with its numbers."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import small

from glassgpt.cli import main
from glassgpt.config import Pretrain, UserError
from glassgpt.train.pretrain import pretrain
from glassgpt.train.run import Trackers, read_log


@pytest.fixture
def config(text: Path, tmp_path: Path) -> Pretrain:
    """A run of six steps."""
    return small.settings(tmp_path / "run", text, max_steps=6, eval_interval=3)


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
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio", reason="trackio is not installed (extra `track`)")
    run = pretrain(dataclasses.replace(config, track=("trackio",)))
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "glassgpt.db")) as database:
        rows = database.execute("select step, metrics from metrics order by step").fetchall()
    found = [(step, json.loads(metrics)) for step, metrics in rows]
    assert [(step, metrics["loss"]) for step, metrics in found] == [(entry["step"], entry["loss"]) for entry in read_log(run)]
    assert all("sample" not in metrics for _, metrics in found)


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
