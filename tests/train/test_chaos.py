"""A small run that is killed in every way we know and must end in the same bits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import small

from glassgpt.config import OptimConfig, Pretrain, UserError, preset
from glassgpt.loading import complete_checkpoints
from glassgpt.train import chaos
from glassgpt.train.pretrain import pretrain


def settings(folder: Path, kills: int, steps: int) -> Pretrain:
    return small.settings(
        folder / "chaos",
        small.write_sentences(folder),
        model=preset("tiny", vocab_size=300, dropout=0.1),
        optim=OptimConfig(learning_rate=0.003, warmup_steps=4),
        max_steps=steps,
        save_interval=10,
        chaos=kills,
    )


def survives(config: Pretrain) -> dict[str, object]:
    out = pretrain(config)
    report = json.loads((out / "chaos.json").read_text())
    assert (report["identical"], report["lost_checkpoints"]) == (True, 0)
    ends = [complete_checkpoints(out / name)[-1] for name in ("calm", "stormy")]
    assert {folder.name for folder in ends} == {f"step-{config.max_steps:06d}"}
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes()
    return report


def test_five_kills_one_of_each_kind(tmp_path: Path) -> None:
    report = survives(settings(tmp_path, kills=5, steps=150))
    assert {name.removesuffix(" (too late)") for name in report["kinds"]} == {kind.__name__ for kind in chaos.KINDS}
    assert report["kills"] >= 3


@pytest.mark.slow
def test_a_hundred_kills(tmp_path: Path) -> None:
    report = survives(settings(tmp_path, kills=100, steps=2000))
    assert report["kills"] >= 90


def test_a_loss_of_bits_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What compares the two runs can fail."""

    class Child:
        def __init__(self, *_: object) -> None:
            self.process = self

        def wait(self) -> int:
            return 0

    digests = iter(["a", "b", "a"])
    monkeypatch.setattr(chaos, "Child", Child)
    monkeypatch.setattr(chaos, "digest", lambda run: next(digests))
    with pytest.raises(UserError, match="0 checkpoints lost, weights differ"):
        chaos.chaos(settings(tmp_path, kills=0, steps=10))
    assert json.loads((tmp_path / "chaos" / "chaos.json").read_text())["identical"] is False


def test_chaos_needs_room_and_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="save_interval above 0"):
        pretrain(dataclasses.replace(settings(tmp_path, 1, 10), save_interval=0))
    (tmp_path / "chaos").mkdir(exist_ok=True)
    with pytest.raises(UserError, match="exists already"):
        pretrain(settings(tmp_path, 1, 10))
