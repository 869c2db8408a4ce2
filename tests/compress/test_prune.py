"""`glassgpt prune`: what it writes, recovers, measures, draws and refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from exact import noisy
from tiny import Run, caller

from glassgpt.compress import masks, prune_curve, prune_speed
from glassgpt.compress.recovery import recover
from glassgpt.compress.windows import bits_per_byte, windows
from glassgpt.config import DataConfig, Pretrain, UserError, preset
from glassgpt.config.files import CONFIG_FILE, read_yaml
from glassgpt.config.prune import Prune
from glassgpt.loading import complete_checkpoints, load
from glassgpt.model import weights
from glassgpt.text import Tokenizer
from glassgpt.train.pretrain import pretrain
from glassgpt.train.runs import read_log

STORY = "the cat sat on the mat, and then the other cat sat there too; a ship came in with {} sails, and {} rats.\n"
FEW = ("--calibration_tokens", 160)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return caller("prune", capsys)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty short documents."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("<|endoftext|>".join("".join(STORY.format(n, n + k) for k in range(4)) for n in range(60)))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A tiny random model in bfloat16."""
    folder = tmp_path_factory.mktemp("model")
    weights.save(noisy(preset("tiny", vocab_size=tokenizer.vocab_size, n_head=4), torch.float32, 0.1), folder, torch.bfloat16)
    tokenizer.save(folder)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def test_sparsity_0_writes_the_same_bits(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    for method in ("magnitude", "wanda"):
        out = tmp_path / method
        said = run(model, "--out_dir", out, "--method", method, "--sparsity", 0, "--calibration", text, *FEW, "--repeats", 0)
        assert said.code == 0, said.err
        for name, tensor in tensors(out).items():
            assert torch.equal(tensor, tensors(model)[name]) and tensor.dtype == torch.bfloat16, name
        assert (out / "model.json").read_text() == (model / "model.json").read_text()


def test_half_of_the_weights(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = run(model, "--out_dir", out, "--calibration", text, "--text", text, "--text_tokens", 320, "--repeats", 1, *FEW)
    assert said.code == 0, said.err
    assert masks.zero_share(load(out)[0]) == 0.5
    assert "50.0%" in said.out and "the file is as large and the model as fast" in said.out.replace("\n", " ")
    assert max(map(len, said.out.splitlines())) <= 100
    assert (out / "model.safetensors").stat().st_size == (model / "model.safetensors").stat().st_size


def test_the_numbers_are_those_of_what_was_written(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = (
        "--method",
        "structured",
        "--heads",
        2,
        "--mlp_share",
        0.25,
        "--calibration",
        text,
        *FEW,
        "--text",
        text,
        "--repeats",
        2,
    )
    said = run(model, "--out_dir", out, *given, "--text_tokens", 640, "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    small, tokenizer = load(out)
    assert (small.config.n_head, small.config.attention_width, small.config.mlp_width) == (2, 8, 48)
    before, after = found["stages"]
    assert (before["name"], after["name"]) == ("before", "pruned") and found["text_tokens"] == 640
    assert after["parameters"] == sum(p.numel() for p in small.parameters()) < before["parameters"]
    assert after["bytes"] == 2 * after["parameters"] and before["bytes"] == 2 * before["parameters"]
    held_out = windows([str(text)], "val", 1.0, tokenizer, 32, 640, 0)
    assert after["bits_per_byte"] == pytest.approx(bits_per_byte(small, held_out, tokenizer), abs=1e-6)
    assert before["bits_per_byte"] == pytest.approx(bits_per_byte(load(model)[0], held_out, tokenizer), abs=1e-6)
    assert all(stage["speed"]["generate"] > 0 and stage["speed"]["forward"] > 0 for stage in found["stages"])


@pytest.mark.parametrize("method", ["magnitude", "structured"])
def test_recovery_learns_and_keeps_zeros(run: Run, model: Path, text: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "out"
    how = ("--sparsity", 0.75) if method == "magnitude" else ("--mlp_share", 0.5, "--calibration", text, *FEW)
    given = ("--method", method, *how, "--text", text, "--text_tokens", 640, "--holdout_share", 0.1, "--repeats", 0)
    recovery = ("--recover_steps", 12, "--sources", text, "--batch_size", 4, "--learning_rate", 0.01)
    said = run(model, "--out_dir", out, *given, *recovery, "--json")
    assert said.code == 0, said.err
    before, pruned, recovered = json.loads(said.out)["stages"]
    assert recovered["bits_per_byte"] < pruned["bits_per_byte"] - 0.1
    assert (recovered["zero_share"], recovered["parameters"]) == (pruned["zero_share"], pruned["parameters"])
    was, now = load(tmp_path / "out-recovery" / "pruned")[0], load(out)[0]
    for (name, a), b in zip(was.named_parameters(), now.parameters(), strict=True):
        assert not torch.equal(a, b), name
        if method == "magnitude" and a.ndim == 2 and name.startswith("blocks."):
            assert torch.equal(a == 0, b == 0), name
    assert pruned["zero_share"] == (0.75 if method == "magnitude" else 0) and before["zero_share"] == 0
    assert len(read_log(tmp_path / "out-recovery" / "run")) == 12
    assert next(iter(tensors(out).values())).dtype == torch.bfloat16


def test_a_resumed_recovery_still_keeps_zeros(model: Path, text: Path, tmp_path: Path) -> None:
    """Half of the steps, then the rest from the checkpoint: the weights of an uninterrupted run."""
    config = Prune(str(model), str(tmp_path / "out"), "magnitude", 0.5, recover_steps=4, sources=(str(text),), batch_size=2)
    folder = tmp_path / "out-recovery" / "pruned"
    folder.mkdir(parents=True)
    pruned, tokenizer = load(model)
    masks.prune_magnitude(pruned, 0.5)
    weights.save(pruned, folder)
    tokenizer.save(folder)
    whole = recover(config)
    again = dataclasses.replace(read_yaml(whole / CONFIG_FILE, Pretrain), out_dir=str(tmp_path / "again"), save_interval=2)
    pretrain(again)
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-000004")
    pretrain(dataclasses.replace(again, resume=True))
    finished, expected = load(tmp_path / "again")[0], load(whole)[0]
    assert all(torch.equal(a, b) for a, b in zip(finished.parameters(), expected.parameters(), strict=True))
    assert masks.zero_share(finished) == 0.5


def test_the_curve(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    png, svg = tmp_path / "curve.png", tmp_path / "curve.svg"
    given = ("--curve", 0.25, 0.75, "--text", text, "--text_tokens", 320, "--calibration", text, *FEW)
    said = run(model, *given, "--png", png, "--svg", svg, "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    points = {(point["method"], point["sparsity"]): point for point in found["points"]}
    assert not found["left_out"] and len(points) == len(found["points"])
    by = [f"{name}, by {compared}" for name in ("magnitude", "wanda") for compared in ("matrix", "row")]
    both = [(name, share) for name in (*by, "channels", "heads", "heads and channels") for share in (0.25, 0.75)]
    assert set(points) == {*both, ("magnitude 2:4", 0.5), ("wanda 2:4", 0.5)}
    for (name, share), point in points.items():
        part = {"channels": 2 / 3, "heads": 1 / 3}.get(name, 1.0)  # of 12 D², attention holds 4 D²
        assert point["removed"] == pytest.approx(part * share, abs=1e-9), name
        assert math.isfinite(point["bits_per_byte"]) and point["bits_per_byte"] != found["intact"]
    loaded, tokenizer = load(model)
    masks.prune_magnitude(loaded, 0.75)
    held_out = windows([str(text)], "val", 1.0, tokenizer, 32, 320, 0)
    assert points["magnitude, by matrix", 0.75]["bits_per_byte"] == pytest.approx(
        bits_per_byte(loaded, held_out, tokenizer), abs=1e-6
    )
    assert png.read_bytes().startswith(b"\x89PNG") and "<svg" in svg.read_text()[:500]


def test_the_curve_says_what_it_left_out(run: Run, text: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    shape = preset("tiny", vocab_size=tokenizer.vocab_size, position="alibi", mlp_width=30)
    weights.save(noisy(shape, torch.float32), tmp_path)
    tokenizer.save(tmp_path)
    said = run(tmp_path, "--curve", 0.5, "--text", text, "--text_tokens", 64)
    assert said.code == 0 and "left out: wanda and structured" in said.out and "multiple of 4 weights" in said.out
    assert max(map(len, said.out.splitlines())) <= 130
    given = ("--calibration", text, *FEW, "--json")
    found = json.loads(run(tmp_path, "--curve", 0.5, "--text", text, "--text_tokens", 64, *given).out)
    assert {point["method"].partition(",")[0] for point in found["points"]} == {"magnitude", "wanda", "channels"}
    fours, heads = found["left_out"]
    assert "multiple of 4 weights" in fours and "position alibi is bound" in heads


def test_windows_are_apart_and_of_the_split(text: Path, tokenizer: Tokenizer) -> None:
    def texts(split: str, seed: int = 0) -> str:
        ids = windows([str(text)], split, 0.3, tokenizer, 16, 20_000, seed)
        return tokenizer.decode(ids.flatten().tolist())

    marks = {split: {n for n in range(60) if f"with {n} sails" in texts(split)} for split in ("train", "val")}
    assert len(marks["train"]) > len(marks["val"]) > 3 and not marks["train"] & marks["val"]
    few = windows([str(text)], "train", 0.3, tokenizer, 16, 160, 0)
    assert few.shape == (10, 17) and torch.equal(few, windows([str(text)], "train", 0.3, tokenizer, 16, 160, 0))
    assert not torch.equal(few, windows([str(text)], "train", 0.3, tokenizer, 16, 160, 1))
    assert windows([str(text)], "val", 1.0, tokenizer, 10**6, 100, 0).size(0) == 1  # shorter than the context: as it is


def test_speed_is_of_each_model_in_turn(model: Path) -> None:
    one, _ = load(model)
    asked: list[int] = []
    one.register_forward_pre_hook(lambda *_: asked.append(1))
    other, _ = load(model)
    other.register_forward_pre_hook(lambda *_: asked.append(2))
    found = prune_speed.speeds([one, other], 3)
    assert asked == [1, 2] * 4 and len(found) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sparsity", 1.2), "sparsity must be at least 0 and below 1; got 1.2"),
        (("--sparsity", 1), "below 1; got 1.0"),
        (("--sparsity", -0.1), "at least 0"),
        (("--method", "wanda"), "wanda decides by what it sees on text; give --calibration FILES"),
        (("--method", "structured", "--heads", 1), "structured decides by"),
        (("--method", "structured", "--calibration", "x"), "structured takes nothing out"),
        (("--method", "structured", "--heads", 1, "--sparsity", 0.5), "--pattern and --compared are for magnitude and wanda"),
        (("--method", "structured", "--heads", -1), "heads must be at least 0"),
        (("--method", "structured", "--mlp_share", 1.0), "mlp_share must be at least 0 and below 1"),
        (("--method", "magnitude", "--heads", 1), "--heads and --mlp_share are for --method structured"),
        (("--method", "magnitude", "--pattern", "2:4", "--sparsity", 0.4), "is a sparsity of 0.5; got --sparsity 0.4"),
        (("--method", "magnitude", "--pattern", "2:4", "--compared", "row"), "ranks every four weights by themselves"),
        (("--method", "magnitude", "--recover_steps", 5), "--recover_steps trains on text; give --sources"),
        (("--method", "magnitude", "--svg", "a.svg"), "--svg and --png draw --curve"),
        (("--method", "magnitude", "--holdout_share", 0), "holdout_share must be above 0"),
        (("--method", "magnitude", "--learning_rate", 0), "learning_rate must be positive"),
        (("--curve", 0.5, "--text", "x"), "--curve writes no model"),
    ],
)
def test_what_does_not_fit_together_is_refused(run: Run, tmp_path: Path, arguments: tuple[Any, ...], message: str) -> None:
    said = run("nowhere", "--out_dir", tmp_path / "out", *arguments)
    assert said.code == 2 and message in said.err and said.err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--out_dir DIR is missing"),
        (("--curve", 0.5), "--curve measures a loss; give --text"),
        (("--curve", 0.5, 0.5, "--text", "x"), "each sparsity once"),
        (("--curve", 1.0, "--text", "x"), "curve must be at least 0 and below 1"),
        (("--curve", 0.5, "--text", "x", "--png", "a.svg"), "--png writes .png files"),
    ],
)
def test_a_curve_or_a_model_is_refused_when_it_lacks_something(run: Run, arguments: tuple[Any, ...], message: str) -> None:
    said = run("nowhere", *arguments)
    assert said.code == 2 and message in said.err and said.err.count("\n") == 1


def test_an_optimizers_numbers_are_not_the_models(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    """A run's checkpoint has them beside the weights."""
    trained = tmp_path / "run"
    pretrain(
        Pretrain(
            out_dir=str(trained), start=str(model), data=DataConfig((str(text),), holdout_share=0.1), max_steps=1, batch_size=2
        )
    )
    (checkpoint,) = complete_checkpoints(trained)
    others = sorted(file.name for file in checkpoint.glob("*.safetensors"))
    assert len(others) > 1 and "model.safetensors" in others
    said = run(trained, "--out_dir", tmp_path / "out", "--method", "magnitude", "--repeats", 0, "--json")
    assert said.code == 0, said.err
    before, after = json.loads(said.out)["stages"]
    assert before["bytes"] == after["bytes"] == 4 * before["parameters"]


def test_a_recovery_that_cannot_begin_leaves_nothing(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    """Text that is not there is told first; what only training finds is taken back, so the command can be given again."""
    short = tmp_path / "short.txt"
    short.write_text("the cat")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").touch()
    given = ("--out_dir", tmp_path / "out", "--method", "magnitude", "--repeats", 0, "--recover_steps", 1, "--batch_size", 2)
    for sources in (tmp_path / "none.txt", tmp_path / "empty", short):
        said = run(model, *given, "--sources", sources)
        assert said.code == 2 and said.err, sources
        assert not (tmp_path / "out-recovery").exists() and not (tmp_path / "out").exists(), sources
    assert run(model, *given, "--sources", text).code == 0


def test_a_point_of_the_curve_that_cannot_be_is_left_out(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    given = ("--curve", 0.5, 0.9999999, "--text", text, "--text_tokens", 64, "--calibration", text, *FEW, "--json")
    said = run(model, *given, "--png", tmp_path / "a.png")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert {point["sparsity"] for point in found["points"] if point["method"] != "heads"} == {0.5}
    assert (
        "magnitude, by row at 0.9999999: sparsity 0.9999999 leaves none of the 16 weights of a row; give less"
        in found["left_out"]
    )
    assert any(reason.startswith("channels at 0.9999999: mlp_share 0.9999999 leaves none of the") for reason in found["left_out"])


def test_what_only_the_model_can_refuse(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    out, shares = tmp_path / "out", ("--method", "structured", "--calibration", text)
    assert "one at least must stay; got --heads 4" in run(model, "--out_dir", out, *shares, "--heads", 4).err
    assert "no such file" in run(model, "--out_dir", out, "--calibration", tmp_path / "none").err
    none = run(model, "--out_dir", out, "--method", "magnitude", "--sparsity", 0.9999999).err
    assert "sparsity 0.9999999 leaves none of the" in none
    assert (
        "takes out none of the 64 channels of blocks.0.mlp; give 0.0156"
        in run(model, "--out_dir", out, *shares, "--mlp_share", 0.001).err
    )
    assert not out.exists()
    out.mkdir()
    assert "exists already and is never overwritten" in run(model, "--out_dir", out, "--method", "magnitude").err
    (tmp_path / "new-recovery").mkdir()
    recovery = ("--recover_steps", 1, "--sources", text)
    said = run(model, "--out_dir", tmp_path / "new", "--method", "magnitude", *recovery)
    assert said.code == 2 and "new-recovery exists already" in said.err and not (tmp_path / "new").exists()


def test_keeping_zeros_needs_a_start() -> None:
    with pytest.raises(UserError, match="keep_zeros needs --start"):
        Pretrain(keep_zeros=True)


def test_a_curve_is_drawn_with_one_line_a_method() -> None:
    points = [prune_curve.Point(name, share, share, 2 + share) for name in ("magnitude", "wanda") for share in (0.1, 0.5)]
    axes = prune_curve.draw(prune_curve.Curve("m", 10, 10, 1.9, points, [])).axes[0]
    assert [line.get_label() for line in axes.lines] == ["magnitude", "wanda", "as it was: 1.900"]
    assert list(axes.lines[1].get_ydata()) == [2.1, 2.5]
