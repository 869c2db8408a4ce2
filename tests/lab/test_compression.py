"""`glassgpt lab compression`: the front, the labels, the variants, what is measured, and what is refused."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import exact
import pytest
import tiny
import torch

import glassgpt
from glassgpt.cli import main
from glassgpt.compress import masks
from glassgpt.compress.quality import Quality, Yardstick
from glassgpt.compress.windows import windows
from glassgpt.config import ModelConfig, UserError
from glassgpt.config.compression import Compression
from glassgpt.config.compute import Compute
from glassgpt.config.folder import WEIGHTS_FILE
from glassgpt.generation import native
from glassgpt.lab.compression import compression as module
from glassgpt.lab.compression import labels, report, speed, variants
from glassgpt.lab.compression.compression import Result, Variant, assembled
from glassgpt.lab.compression.labels import POINT, Box, place
from glassgpt.lab.compression.pareto import dominates, front
from glassgpt.model import GPT, weights
from glassgpt.model.quantised import quantised_modules, recipe_of, round_to_nearest, targets
from glassgpt.text import Tokenizer

TEXT = "the cat sat on the mat, the other cat sat there too. "
Point = Sequence[float]


def saved(folder: Path, model: GPT, tokenizer: Tokenizer) -> Path:
    folder.mkdir()
    weights.save(model, folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def tokens() -> Tokenizer:
    return Tokenizer.train([TEXT] * 4, 280)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokens: Tokenizer) -> Path:
    """A noisy model in bfloat16, of 280 ids, and two layers of two heads and width 32."""
    config = ModelConfig(tokens.vocab_size, 24, 2, 2, 32)
    return saved(tmp_path_factory.mktemp("plain") / "m", exact.noisy(config, torch.bfloat16, size=0.1), tokens)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 40)
    return path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], model: Path, text: Path) -> tiny.Run:
    """`glassgpt lab compression` of the model on the text, with little of everything."""

    def run(*arguments: object, of: Path = model) -> tiny.Result:
        few = ("--text_tokens", 96, "--calibration_tokens", 96, "--new_tokens", 4, "--prompt_tokens", 3, "--repeats", 2)
        code = main(["lab", "compression", str(of), "--text", str(text), *map(str, (*few, *arguments))])
        return tiny.Result(code, *capsys.readouterr())

    return run


# ---------------------------------------------------------------------- the front


def by_definition(points: Sequence[Point]) -> list[bool]:
    """On the front: every other point is equal, or loses to this one in at least one number."""
    return [all(tuple(q) == tuple(p) or any(b > a for a, b in zip(p, q, strict=True)) for q in points) for p in points]


def clouds() -> list[list[tuple[int, ...]]]:
    """Small whole numbers, so that there are ties in one number, in two, and equal points."""
    draw = random.Random(0)
    return [[tuple(draw.randint(1, 4) for _ in range(size)) for _ in range(draw.randint(1, 9))] for size in (1, 2, 3) * 100]


def test_the_front_is_what_nothing_beats() -> None:
    for points in clouds():
        found = front(points)
        assert found == by_definition(points) and any(found)
        shuffled = list(zip(points, found, strict=True))
        random.Random(1).shuffle(shuffled)
        assert front([point for point, _ in shuffled]) == [is_on for _, is_on in shuffled]
    assert front([(1, 2), (1, 2), (2, 1), (1, 3)]) == [True, True, True, False]
    assert front([]) == []


def test_the_check_of_the_front_sees_mistakes() -> None:
    def all_better(a: Point, b: Point) -> bool:  # a tie in one number saves
        return all(x < y for x, y in zip(a, b, strict=True))

    def nowhere_worse(a: Point, b: Point) -> bool:  # equal points beat each other
        return all(x <= y for x, y in zip(a, b, strict=True))

    def first_two(a: Point, b: Point) -> bool:  # a number is forgotten
        return dominates(a[:2], b[:2])

    for mutant in (all_better, nowhere_worse, first_two):

        def wrong(points: Sequence[Point], mutant: Callable[[Point, Point], bool] = mutant) -> list[bool]:
            return [not any(mutant(q, p) for q in points[:i] + points[i + 1 :]) for i, p in enumerate(points)]  # type: ignore[operator]

        assert any(wrong(points) != by_definition(points) for points in clouds())


def test_a_margin_makes_near_numbers_equal() -> None:
    margins = (0, 0, 0.05)
    assert front([(10, 2, 1.00), (10, 2.1, 0.96)], margins) == [True, False]  # worse, and not noticeably faster
    assert front([(10, 2, 1.00), (10, 2.1, 0.95)], margins) == [True, True]
    assert front([(10, 2, 1.04), (10, 2, 1.00)], margins) == [True, True]
    assert front([(10, 2, 1.06), (10, 2, 1.00)], margins) == [False, True]
    draw = random.Random(2)
    for _ in range(300):
        points = [(draw.randint(1, 3), draw.randint(1, 3), draw.uniform(1, 1.2)) for _ in range(8)]
        assert any(front(points, margins))
        assert front(points, (0, 0, 0)) == front(points)


# ---------------------------------------------------------------------- labels

ROOM = Box(0, 0, 600, 400)


def crowds() -> list[list[tuple[float, float]]]:
    """Points of which many lie upon another."""
    draw = random.Random(3)
    corners = [(20.0, 20.0), (580.0, 380.0), (20.0, 380.0), (580.0, 20.0)]
    return [
        corners + [(draw.gauss(x, 12), draw.gauss(y, 12)) for x, y in ((200, 150), (400, 250), (590, 200)) for _ in range(4)]
        for _ in range(20)
    ]


def overlapping(boxes: Sequence[Box]) -> int:
    return sum(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_names_are_upon_nothing() -> None:
    taken = [Box(150, 300, 300, 390)]
    for points in crowds():
        sizes = [(40 + 5 * (number % 8), 11.0) for number in range(len(points))]
        boxes = place(points, sizes, ROOM, taken)
        marks = [Box(x - POINT, y - POINT, x + POINT, y + POINT) for x, y in points]
        assert overlapping(boxes) == 0
        assert not any(box.overlaps(other) for box in boxes for other in [*marks, *taken])
        assert all(box.is_inside(ROOM) for box in boxes)
        assert [
            (box.right - box.left, box.top - box.bottom) == pytest.approx(size) for box, size in zip(boxes, sizes, strict=True)
        ]
        naive = [next(labels.around(point, size)) for point, size in zip(points, sizes, strict=True)]
        assert overlapping(naive) > 0 and not all(box.is_inside(ROOM) for box in naive)  # what there was to avoid


def test_without_room_a_name_stands_to_the_right() -> None:
    (box,) = place([(5, 5)], [(100, 10)], Box(0, 0, 50, 50), [])
    assert box.left > 5 and box.middle[1] == pytest.approx(5)


def variant(name: str, size: float, bits: float, rate: float = 100.0, spread: float = 0.01, is_on_front: bool = False) -> Variant:
    return Variant(name, 10, round(size * 1e6), Quality(bits, 0.99, 960), "native", "int8", rate, spread, is_on_front)


def result(*found: Variant) -> Result:
    return Result({"model": "m", "repeats": 3}, Quality(2.0, 1.0, 960), 1, 3, 8, 0.05, list(found), {})


def test_the_chart_has_every_name_once_and_none_upon_another() -> None:
    near = [variant(f"int8-number-{n}", 10 + 0.02 * n, 2.0 + 1e-5 * n, is_on_front=n == 0) for n in range(9)]
    found = result(*near, variant("$dear$", 40, 2.0), variant("small", 5, 3.1, 900), variant("better", 20, 1.9))
    figure = report.draw(found)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    texts = [text for text in axes.texts if text.get_text()]
    assert sorted(text.get_text() for text in texts) == sorted(
        [r"\$dear\$", *(one.name for one in found.variants if one.name != "$dear$")]
    )
    boxes = [text.get_window_extent() for text in texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 for box in boxes)
    ticks = [label.get_text() for label in axes.get_yticklabels()]
    assert ticks[0] == "1.8000\n(-10 %)" and "2.0000\n(the original)" in ticks and ticks[-1] == "4.0000\n(+100 %)"


def test_the_line_goes_down_at_what_is_best_in_two_numbers() -> None:
    assert report.staircase([40, 10, 5, 20, 10, 10], [0, 2, 7, 2, 1, 1]) == [(5, 7), (10, 7), (10, 1), (40, 1), (40, 0)]
    assert report.staircase([3], [1]) == [(3, 1)]


def test_one_variant_can_be_drawn() -> None:
    assert len(report.draw(result(variant("alone", 5, 2.0))).axes) == 2


# ---------------------------------------------------------------------- variants


def test_patterns() -> None:
    assert variants.named(["*"]) == list(variants.NAMES) and len(set(variants.NAMES)) == len(variants.NAMES)
    assert variants.named(["*-gptq", "float32"]) == ["float32", "int8-row-gptq", "int8-gptq", "int4-gptq", "int4-head4-gptq"]
    assert [name for name in variants.NAMES if variants.is_calibrated(name)] == [
        *("int8-row-gptq", "int8-gptq", "int4-gptq", "int4-head4-gptq", "wanda-50", "wanda-2:4", "structured")
    ]
    with pytest.raises(UserError, match=r"no variant 'int4-gtpq' \(did you mean 'int4-gptq'\?\)"):
        variants.named(["int8", "int4-gtpq"])


def made(name: str, model: Path, text: Path) -> tuple[GPT, GPT]:
    plain, tokenizer = glassgpt.load(model)
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    config = Compression(str(model), (str(text),), calibration=(str(text),), calibration_tokens=96)
    small = variants.made(name, config, plain, tokenizer)
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())  # stays as it is
    return plain, small


@pytest.mark.parametrize("name", variants.QUANTISED)
def test_quantised_variants_are_what_their_names_say(name: str, model: Path, text: Path) -> None:
    plain, small = made(name, model, text)
    recipe = recipe_of(small)
    assert recipe is not None
    bits, head = (8, 8) if name.startswith("int8") else (4, 4 if "head4" in name else 8)
    assert set(recipe.matrices) == set(targets(plain))
    assert {its for matrix, its in recipe.matrices.items() if matrix != "token_embedding"} == {bits}
    assert recipe.matrices["token_embedding"] == head
    assert recipe.group == (None if "row" in name else 32)
    assert recipe.activation_bits == (8 if name.endswith("a8") else 16)
    assert recipe.method == ("gptq" if "gptq" in name else "rtn") and recipe.calibration_tokens == (96 if "gptq" in name else 0)
    same = []
    for matrix, found in quantised_modules(small):
        weight = targets(plain)[matrix].get_parameter("weight")
        same.append(torch.equal(found.quantised.codes, round_to_nearest(weight, found.matrix.bits, recipe.group).codes))
    assert all(same) if "gptq" not in name else not all(same)


@pytest.mark.parametrize("name", ["magnitude-50", "magnitude-2:4", "wanda-50", "wanda-2:4"])
def test_half_of_the_weights_are_zero(name: str, model: Path, text: Path) -> None:
    _, small = made(name, model, text)
    assert masks.zero_share(small) == 0.5
    fours = [linear.weight.view(-1, 4) == 0 for linear in masks.matrices(small.blocks).values()]
    assert all((four.sum(dim=1) == 2).all() for four in fours) == name.endswith("2:4")


def test_structured_takes_a_head_and_a_quarter_of_the_channels(model: Path, text: Path) -> None:
    plain, small = made("structured", model, text)
    assert (plain.config.n_head, plain.config.hidden_width) == (2, 128)
    assert (small.config.n_head, small.config.hidden_width) == (1, 96)


# ---------------------------------------------------------------------- speed


def test_models_of_equal_work_share_their_turns(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Compute(engine="plain")
    one, other = speed.opened(model, plain, "cpu"), speed.opened(model, plain, "cpu")
    third = one._replace(work="other")
    assert one.work == other.work and (one.engine, one.precision) == ("plain", "bfloat16")
    asked: list[Any] = []
    monkeypatch.setattr(speed, "decode_rate", lambda model, *_: asked.append(model) or float(len(asked)))
    found = speed.rates({"a": one, "b": other, "c": third}, [1], 4, 2)
    a, b, c = one.model, other.model, third.model
    assert asked == [a, b, c, b, c, a, c, a, b]  # who begins changes; the first turn does not count
    assert found == {"a": [4.0, 6.0, 8.0, 9.0], "b": [4.0, 6.0, 8.0, 9.0], "c": [5.0, 7.0]}


def test_work_is_the_shape_and_the_formats(model: Path, text: Path, tmp_path: Path, tokens: Tokenizer) -> None:
    def work(name: str) -> str:
        folder = tmp_path / name
        _, small = made(name, model, text)
        folder.mkdir()
        weights.save(small, folder, variants.stored_dtype(name))
        tokens.save(folder)
        return speed.opened(folder, Compute(engine="plain"), "cpu").work

    different = {
        name: work(name) for name in ("float32", "structured", "int8", "int8-row", "int8-a8", "int4", "int4-a8", "int4-head4")
    }
    different["bfloat16"] = work("bfloat16")
    assert len(set(different.values())) == len(different)
    for name, same in (("int8-gptq", "int8"), ("int4-gptq", "int4"), ("wanda-50", "bfloat16"), ("magnitude-2:4", "bfloat16")):
        assert work(name) == different[same]


def test_the_rate_is_of_the_tokens_after_the_first(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt, _ = glassgpt.load(model)
    clock = iter([100.0, 102.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    assert speed.decode_rate(gpt, [1, 2], 9) == 8 / 2.0


# ---------------------------------------------------------------------- the command


def test_measures_what_was_written(call: tiny.Run, model: Path, text: Path, tmp_path: Path) -> None:
    pictures = ("--png", tmp_path / "a.png", "--svg", tmp_path / "a.svg")
    found = call("--json", *pictures, "--calibration", text, "--extra", model, "--engine", "plain")
    assert found.code == 0, found.err
    said = json.loads(found.out)
    by_name = {one["name"]: one for one in said["variants"]}
    assert list(by_name) == [*variants.NAMES, "m"] and said["left_out"] == {}
    plain, tokenizer = glassgpt.load(model)
    ids = windows([str(text)], "val", 1.0, tokenizer, 24, 96, 0)
    yardstick = Yardstick(plain, ids, torch.tensor(tokenizer.byte_lengths()))
    assert said["original"]["bits_per_byte"] == yardstick.original.bits_per_byte
    for name in ("int8-row", "int4-head4"):
        copy, _ = glassgpt.load(model)
        with torch.no_grad():
            for matrix in targets(copy).values():
                weight = matrix.get_parameter("weight")
                weight.copy_(round_to_nearest(weight, int(name[3]), None if "row" in name else 32).dequantised())
        expected = yardstick.measure(copy)
        assert abs(by_name[name]["quality"]["bits_per_byte"] - expected.bits_per_byte) <= 1e-7
        assert by_name[name]["quality"]["equal_greedy"] == expected.equal_greedy < 1
    numbers = sum(parameter.numel() for parameter in plain.parameters())
    assert abs(by_name["float32"]["bytes"] - by_name["bfloat16"]["bytes"] - 2 * numbers) < 64  # the headers' own lengths
    assert by_name["m"]["bytes"] == by_name["bfloat16"]["bytes"] == (model / WEIGHTS_FILE).stat().st_size
    assert by_name["m"]["quality"] == by_name["bfloat16"]["quality"] == by_name["float32"]["quality"] == said["original"]
    for name in ("magnitude-50", "wanda-2:4"):  # zeros are stored like other numbers
        assert by_name[name]["bytes"] == by_name["bfloat16"]["bytes"] and by_name[name]["parameters"] == numbers
        assert by_name[name]["tokens_per_second"] == by_name["bfloat16"]["tokens_per_second"]
    assert by_name["structured"]["parameters"] < numbers and by_name["structured"]["bytes"] < by_name["bfloat16"]["bytes"]
    assert by_name["int4-head4"]["bytes"] < by_name["int4"]["bytes"] < by_name["int8"]["bytes"] < by_name["bfloat16"]["bytes"]
    assert {one["engine"] for one in said["variants"]} == {"plain"} and any(one["is_on_front"] for one in said["variants"])
    assert (
        not by_name["float32"]["is_on_front"]
        or by_name["float32"]["tokens_per_second"] > by_name["bfloat16"]["tokens_per_second"]
    )
    assert "int4-head4-gptq" in (tmp_path / "a.svg").read_text() and (tmp_path / "a.png").stat().st_size > 10_000


def test_held_out_documents_are_not_calibrated_on(call: tiny.Run, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def noted(*arguments: Any) -> torch.Tensor:
        asked.append((arguments[0], arguments[1], arguments[2], arguments[5], arguments[6]))
        return windows(*arguments)

    for reader in ("lab.compression.compression", "compress.quantize", "compress.prune_curve"):
        monkeypatch.setattr(f"glassgpt.{reader}.windows", noted)
    few = ("--calibration", text, "--holdout_share", 0.3, "--seed", 7, "--variants", "int8-gptq", "structured", "wanda-50")
    found = call(*few, "--calibration_tokens", 48, "--json", "--engine", "plain")
    assert found.code == 0, found.err
    assert asked == [((str(text),), "val", 0.3, 96, 7), *[((str(text),), "train", 0.3, 48, 7)] * 3]


def test_the_front_is_of_the_three_numbers_together() -> None:
    def row(name: str, size: int, bits: float, rate: float) -> tuple[str, module.Written, speed.Ready, list[float]]:
        written = module.Written(Path(name), size, 1, Quality(bits, 1.0, 9))
        return name, written, speed.Ready(None, "plain", "float32", name), [rate, rate, rate + 1]  # type: ignore[arg-type]

    rows = [
        row("large", 40, 1.0, 100),  # as good as `middle`, larger and slower
        row("middle", 20, 1.0, 200),
        row("noise", 20, 1.1, 205),  # worse, and faster by less than the margin
        row("small", 5, 2.0, 50),
        row("quick", 30, 3.0, 900),
    ]
    found = assembled(*({one[0]: one[place] for one in rows} for place in (1, 2, 3)))  # type: ignore[arg-type]
    assert [one.name for one in found if one.is_on_front] == ["middle", "small", "quick"]
    assert [one.tokens_per_second for one in found] == [100, 200, 205, 50, 900]


def test_the_table_fits_a_terminal(call: tiny.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    found = call("--variants", "magnitude-50", "int4-head4-gptq", "float32", "--engine", "plain")
    assert found.code == 0, found.err
    rows = found.out.splitlines()
    assert "equal greedy" in rows[0] and all(len(row) <= 80 and "…" not in row for row in rows[:3])
    assert [row.strip("● ").split()[0] for row in rows[1:3]] == ["float32", "magnitude-50"]
    assert "left out: int4-head4-gptq: decides by text: give --calibration FILES" in found.out
    assert "by PyTorch: all" in found.out


def test_a_noisy_machine_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    report.show(result(variant("calm", 5, 2.0), variant("wild", 6, 2.1, spread=0.5)))
    assert "quartiles more than 25% apart for wild." in capsys.readouterr().out
    report.show(result(variant("calm", 5, 2.0)))
    assert "not quiet" not in capsys.readouterr().out


def test_without_kernels_pytorch_is_measured_and_that_is_said_once(call: tiny.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise native.Unavailable("no C++ compiler found")

    monkeypatch.setattr(native, "kernels", missing)
    monkeypatch.setattr(native, "open_model", missing)
    found = call("--variants", "bfloat16", "int8", "--json")
    assert found.code == 0 and found.err.count("no C++ compiler found") == 1
    assert {one["engine"] for one in json.loads(found.out)["variants"]} == {"plain"}


def test_the_native_engine_is_measured_where_it_can_be_used(call: tiny.Run) -> None:
    try:
        native.kernels()
    except native.Unavailable as error:
        pytest.skip(f"the native engine cannot be compiled: {error}")
    found = json.loads(call("--variants", "float32", "bfloat16", "int4", "int8-a8", "--json").out)["variants"]
    assert [(one["engine"], one["precision"]) for one in found] == [
        *(("native", "float32"), ("native", "bfloat16"), ("native", "int8"), ("native", "int4+8"))
    ]


def test_what_a_model_does_not_allow_is_left_out_with_its_reason(
    call: tiny.Run, tokens: Tokenizer, text: Path, tmp_path: Path
) -> None:
    odd = saved(tmp_path / "odd", exact.noisy(ModelConfig(tokens.vocab_size, 24, 1, 1, 24), torch.float32, size=0.1), tokens)
    found = call("--calibration", text, "--json", "--engine", "plain", of=odd)
    assert found.code == 0, found.err
    said = json.loads(found.out)
    assert "group is 32, which does not divide the 24 inputs" in said["left_out"]["int4"]
    assert "one at least must stay" in said["left_out"]["structured"]
    names = [one["name"] for one in said["variants"]]
    assert names == ["float32", "bfloat16", "int8-row", "int8-row-gptq", "magnitude-50", "magnitude-2:4", "wanda-50", "wanda-2:4"]
    rounded = said["variants"][1]["quality"]["bits_per_byte"]
    assert rounded != said["original"]["bits_per_byte"]  # of float32 weights, bfloat16 is a loss too


def test_extra_models_are_measured_as_they_are_stored(call: tiny.Run, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    assert main(["quantize", str(model), "--out_dir", str(folder), "--bits", "4", "--json"]) == 0
    found = call("--variants", "int4", "--extra", f"{folder}/", model, "--json", "--engine", "plain")
    assert found.code == 0, found.err
    lines = [line for line in found.out.splitlines() if line.startswith("{")]
    said = {one["name"]: one for one in json.loads(lines[-1])["variants"]}
    assert list(said) == ["int4", f"{folder}/", str(model)]  # both folders are called m, so all of the paths are shown
    for key in ("bytes", "quality", "parameters", "precision", "tokens_per_second"):
        assert said["int4"][key] == said[f"{folder}/"][key]


def test_an_extra_model_replaces_no_variant(call: tiny.Run, model: Path, tokens: Tokenizer, tmp_path: Path) -> None:
    other = saved(tmp_path / "bfloat16", exact.noisy(ModelConfig(tokens.vocab_size, 24, 1, 1, 32), torch.float32), tokens)
    found = call("--variants", "bfloat16", "--extra", other, "--json", "--engine", "plain")
    assert found.code == 0, found.err
    assert [one["name"] for one in json.loads(found.out)["variants"]] == ["bfloat16", str(other)]


def test_the_tokens_that_were_timed_are_told(call: tiny.Run) -> None:
    few = ("--variants", "bfloat16", "--engine", "plain", "--new_tokens", 500)
    assert "22 tokens after 3, " in call(*few).out  # a context of 24, and the last token is not read
    said = json.loads(call(*few, "--prompt_tokens", 500, "--json").out)
    assert (said["prompt_tokens"], said["new_tokens"]) == (23, 2)


# ---------------------------------------------------------------------- refused


def test_extra_models_are_looked_at_before_anything_is_made(
    call: tiny.Run, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = saved(tmp_path / "other", exact.noisy(ModelConfig(tokenizer.vocab_size, 24, 1, 1, 32), torch.float32), tokenizer)
    monkeypatch.setattr(module, "write_variants", lambda *_: pytest.fail("made variants first"))
    for extra, message in ((other, "has other tokens than the model"), (tmp_path / "none", "no model")):
        found = call("--variants", "bfloat16", "--extra", extra)
        assert found.code == 2 and message in found.err.replace("\n", " ")


def test_one_line_for_what_is_wrong(
    call: tiny.Run, model: Path, text: Path, tokenizer: Tokenizer, tokens: Tokenizer, tmp_path: Path
) -> None:
    short = saved(tmp_path / "short", exact.noisy(ModelConfig(tokens.vocab_size, 12, 1, 1, 32), torch.float32), tokens)
    other = saved(tmp_path / "other", exact.noisy(ModelConfig(tokenizer.vocab_size, 24, 1, 1, 32), torch.float32), tokenizer)
    small = tmp_path / "small"
    assert main(["quantize", str(model), "--out_dir", str(small), "--json"]) == 0
    for arguments, message in (
        (("--variants", "int5"), "no variant 'int5'"),
        (("--variants", "bfloat16", "--extra", short), "has a context of 12 tokens, and 24 are read at once"),
        (("--variants", "bfloat16", "--extra", other), "has other tokens than the model"),
        (("--variants", "*", "--extra", tmp_path / "none"), "no model"),
        (("--variants", "int4", "--extra", "int4"), "extra int4 is called like a variant; give its whole path, such as ./int4"),
        (("--extra", model, model), "is given twice"),
        (("--variants", "wanda-50"), "no variant can be made: wanda-50: decides by text: give --calibration FILES"),
        (("--png", tmp_path / "a.svg"), "--png writes .png files"),
        (("--new_tokens", 1), "new_tokens must be at least 2; got 1"),
        (("--holdout_share", 0), "holdout_share must be above 0 and at most 1; got 0"),
        (("--repeats", 0), "repeats must be at least 1; got 0"),
    ):
        found = call(*arguments)
        assert found.code == 2 and message in found.err.replace("\n", " "), found.err
    found = call("--variants", "bfloat16", of=small)
    assert found.code == 2 and "is quantised already; give the model that it was made from" in found.err.replace("\n", " ")
    with pytest.raises(UserError, match="give --text FILES"):
        Compression(str(model))
    with pytest.raises(UserError, match="variants is empty"):
        Compression(str(model), (str(text),), variants=())
