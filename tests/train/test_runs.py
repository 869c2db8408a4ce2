"""`glassgpt runs` over real runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import small

from glassgpt.cli import main
from glassgpt.train.pretrain import pretrain


@pytest.fixture(scope="module")
def place(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, steps in (("a", 4), ("deep/b", 8)):
        pretrain(small.settings(folder / "all" / name, text, max_steps=steps, eval_interval=2))
    return folder


def test_every_run_at_any_depth(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(place / "all"), "--json"]) == 0
    found = {run["name"]: run for run in json.loads(capsys.readouterr().out)}
    assert found.keys() == {"a", "deep/b"}
    log = [json.loads(line) for line in (place / "all/deep/b/log.jsonl").read_text().splitlines()]
    run = found["deep/b"]
    assert run["state"] == "done"
    assert run["tokens"] == 8 * 2 * 32
    assert run["loss"] == log[-1]["loss"]
    assert run["best_val_loss"] == min(entry["val_loss"] for entry in log if "val_loss" in entry)
    assert [tokens for tokens, _ in run["curve"]] == [128, 256, 384, 512]


def test_table_and_chart(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chart = place / "chart.svg"
    assert main(["runs", str(place / "all" / "a"), str(place / "all" / "deep"), "--chart", str(chart)]) == 0
    out = capsys.readouterr().out
    assert "done" in out and "bits/byte" in out
    assert max(map(len, out.splitlines()[:3])) <= 80
    assert "<svg" in chart.read_text()


def test_a_run_that_was_stopped(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "half"
    run.mkdir()
    whole = place / "all" / "a"
    (run / "config.yaml").write_text((whole / "config.yaml").read_text())
    (run / "log.jsonl").write_text("".join((whole / "log.jsonl").read_text().splitlines(keepends=True)[:3]))
    assert main(["runs", str(run)]) == 0
    assert "3/4" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_nothing_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["runs", name]) == 2
    assert "no such folder" in (err := capsys.readouterr().err) or "no training run in" in err


def test_a_chart_must_be_a_picture(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(place / "all"), "--chart", "x.pdf.txt"]) == 2
    assert "ends in .svg or .png" in capsys.readouterr().err


def test_one_damaged_run_hides_no_other(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(place / "all", tmp_path / "all")
    (tmp_path / "all" / "a" / "config.yaml").write_text("max_stepz: 3\n")
    assert main(["runs", str(tmp_path / "all"), "--json"]) == 0
    said = capsys.readouterr()
    assert [run["name"] for run in json.loads(said.out)] == ["deep/b"]
    assert said.err.startswith("left out: ") and "max_stepz" in said.err
