"""`glassgpt quantize` as a command: what it writes, prints, measures and refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import exact
import pytest
import tiny
import torch
import torch.nn.functional as F

import glassgpt
from glassgpt.compress import sensitivity
from glassgpt.compress.quality import Yardstick
from glassgpt.compress.quantize import quantize
from glassgpt.config import ModelConfig, UserError
from glassgpt.config.quantize import Quantize, Recipe
from glassgpt.model import GPT, weights
from glassgpt.model.quantised import quantised_modules, recipe_of, round_to_nearest, targets
from glassgpt.text import Tokenizer

TEXT = "the cat sat on the mat, the other cat sat there too. "


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> tiny.Run:
    return tiny.caller("quantize", capsys)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A noisy model in bfloat16, of 280 ids and two layers of width 32."""
    folder = tmp_path_factory.mktemp("plain") / "m"
    folder.mkdir()
    tokenizer = Tokenizer.train([TEXT] * 4, 280)
    config = ModelConfig(tokenizer.vocab_size, 24, 2, 2, 32)
    weights.save(exact.noisy(config, torch.bfloat16, size=0.1), folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 40)
    return path


@pytest.mark.parametrize(("bits", "head", "group"), [(8, 8, 32), (4, 8, 16), (4, 4, 0)])
def test_writes_what_it_says(model: Path, tmp_path: Path, call: tiny.Run, bits: int, head: int, group: int) -> None:
    out = tmp_path / "small"
    found = call(model, "--out_dir", out, "--bits", bits, "--head_bits", head, "--group", group, "--json")
    assert found.code == 0, found.err
    said = json.loads(found.out)
    (plain, tokenizer), (small, again) = (glassgpt.load(path, dtype=torch.float64) for path in (model, out))
    assert tokenizer.sha256 == again.sha256
    for name, module in quantised_modules(small):
        kind = head if name == "token_embedding" else bits
        expected = round_to_nearest(targets(plain)[name].get_parameter("weight"), kind, group or None)
        assert torch.equal(module.quantised.codes, expected.codes) and torch.equal(module.quantised.scales, expected.scales)
    for name, parameter in small.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name))
    stored = {
        t.dtype for name, t in weights.read_file(out / "model.safetensors").items() if name.endswith(("norm_f.weight", "bias"))
    }
    assert stored == {torch.bfloat16}
    recipe = recipe_of(small)
    assert recipe is not None and said["recipe"] == json.loads((out / "model.json").read_text())["quantisation"]
    assert (recipe.group, recipe.method, recipe.calibration_tokens, recipe.activation_bits) == (group or None, "rtn", 0, 16)
    numbers = sum(p.numel() for p in plain.parameters())
    assert said["before"]["bytes"] == 2 * numbers
    header = 8 + int.from_bytes((out / "model.safetensors").read_bytes()[:8], "little")
    assert said["after"]["bytes"] == (out / "model.safetensors").stat().st_size - header
    assert said["after"]["bytes"] < (0.66 if bits == 8 else 0.56) * said["before"]["bytes"]


def test_gptq_and_kept_matrices_and_eight_bit_activations(model: Path, text: Path, tmp_path: Path, call: tiny.Run) -> None:
    out = tmp_path / "small"
    options = ("--method", "gptq", "--calibration", text, "--calibration_tokens", 240, "--keep", "blocks.0", "down", "--bits", 4)
    found = call(model, "--out_dir", out, *options, "--activations", 8, "--group", 16, "--text", text, "--text_tokens", 120)
    assert found.code == 0, found.err
    small, _ = glassgpt.load(out)
    recipe = recipe_of(small)
    assert recipe is not None and (recipe.method, recipe.activation_bits, recipe.calibration_tokens) == ("gptq", 8, 240)
    names = {"token_embedding": 8, "blocks.1.attn.qkv": 4, "blocks.1.attn.out": 4, "blocks.1.mlp.up": 4}
    assert recipe.matrices == names and {name for name, _ in quantised_modules(small)} == {*names}
    assert "4 matrices as int4/16 and int8/16 by gptq (calibrated on 240 tokens); 8-bit activations; not quantised: " in found.out
    kept = "blocks.0.attn.qkv, blocks.0.attn.out, blocks.0.mlp.up, blocks.0.mlp.down, blocks.1.mlp.down"
    assert kept in found.out and "Measured on 120 tokens." in found.out
    assert max(map(len, found.out.splitlines()[:3])) <= 80


def test_quality_is_counted_right(model: Path, text: Path, tmp_path: Path) -> None:
    config = Quantize(
        str(model), str(tmp_path / "small"), bits=4, head_bits=4, group=16, text=(str(text),), text_tokens=240, json=True
    )
    found = quantize(config)
    assert not isinstance(found, sensitivity.Sensitivity)
    (plain, tokenizer), (small, _) = (glassgpt.load(path) for path in (model, tmp_path / "small"))
    from glassgpt.compress.windows import windows

    ids = windows([str(text)], "val", 1.0, tokenizer, 24, 240, 0)
    nats, same, choices = [0.0, 0.0], 0, []
    for row in ids:
        with torch.no_grad():
            both = [one(row[None, :-1])[0] for one in (plain, small)]
        for place, logits in enumerate(both):
            nats[place] += float(F.cross_entropy(logits, row[1:], reduction="sum"))
        choices += [(int(a), int(b)) for a, b in zip(both[0].argmax(-1), both[1].argmax(-1), strict=True)]
    same = sum(a == b for a, b in choices)
    read = sum(tokenizer.byte_lengths()[i] for i in ids[:, 1:].flatten().tolist())
    for stage, total in ((found.before, nats[0]), (found.after, nats[1])):
        assert stage.quality is not None and stage.quality.tokens == 240
        assert abs(stage.quality.bits_per_byte - total / math.log(2) / read) <= 1e-6
    assert found.before.quality is not None and found.before.quality.equal_greedy == 1.0
    assert found.after.quality is not None and found.after.quality.equal_greedy == same / 240 < 1


def test_held_out_documents_are_not_calibrated_on(
    model: Path, tmp_path: Path, call: tiny.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glassgpt.compress import quantize as module

    asked = []
    real = module.windows
    monkeypatch.setattr(module, "windows", lambda *arguments: asked.append(arguments[1:3]) or real(*arguments))
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": f"{TEXT} number {n}. " * 3}) + "\n" for n in range(60)))
    options = ("--method", "gptq", "--calibration", file, "--text", file, "--holdout_share", 0.3, "--text_tokens", 48)
    found = call(model, "--out_dir", tmp_path / "small", *options, "--calibration_tokens", 48)
    assert found.code == 0, found.err
    assert sorted(asked) == [("train", 0.3), ("val", 0.3)]


# ---------------------------------------------------------------------- sensitivity


def test_sensitivity_quantises_one_part_at_a_time(model: Path, text: Path, tmp_path: Path, call: tiny.Run) -> None:
    options = ("--sensitivity", "--text", text, "--text_tokens", 120, "--bits", 4, "--group", 16)
    found = call(model, *options, "--json", "--svg", tmp_path / "a.svg", "--png", tmp_path / "a.png")
    assert found.code == 0, found.err
    said = json.loads(found.out)
    plain, tokenizer = glassgpt.load(model)
    names = list(targets(plain))
    assert [part["name"] for part in said["parts"]] == [*names, sensitivity.ALL]
    from glassgpt.compress.windows import windows

    ids = windows([str(text)], "val", 1.0, tokenizer, 24, 120, 0)
    yardstick = Yardstick(plain, ids, torch.tensor(tokenizer.byte_lengths()))
    for part in said["parts"]:
        changed, _ = glassgpt.load(model)
        members = names if part["name"] == sensitivity.ALL else [part["name"]]
        with torch.no_grad():
            for name in members:
                weight = targets(changed)[name].get_parameter("weight")
                weight.copy_(round_to_nearest(weight, 4, 16).dequantised())
        expected = yardstick.measure(changed)
        assert abs(part["quality"]["bits_per_byte"] - expected.bits_per_byte) <= 1e-7
        assert part["quality"]["equal_greedy"] == expected.equal_greedy
        assert part["numbers"] == sum(targets(plain)[name].get_parameter("weight").numel() for name in members)
    assert len({part["quality"]["bits_per_byte"] for part in said["parts"]}) == len(said["parts"])
    assert "blocks.1.mlp.down" in (tmp_path / "a.svg").read_text() and (tmp_path / "a.png").stat().st_size > 1000
    table = call(model, *options, "--each", "kind").out
    assert [line.split()[0] for line in table.splitlines()[-6:]] == ["token_embedding", "qkv", "out", "up", "down", "all"]


def test_parts() -> None:
    names = ["token_embedding", "blocks.0.attn.qkv", "blocks.0.mlp.experts.1.up", "blocks.1.attn.qkv", "head"]
    assert list(sensitivity.parts_of(names, "layer")) == ["token_embedding", "blocks.0", "blocks.1", "head", sensitivity.ALL]
    assert sensitivity.parts_of(names, "kind")["qkv"] == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert sensitivity.parts_of(names, "matrix")["head"] == ["head"]


# ---------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--out_dir DIR is missing"),
        (("--out_dir", "x", "--method", "gptq"), "give --calibration FILES, or use --method rtn"),
        (("--out_dir", "x", "--calibration", "f"), "rtn looks at no text; leave --calibration out"),
        (("--out_dir", "x", "--svg", "a.svg"), "--svg and --png draw what --sensitivity measures"),
        (("--sensitivity",), "--sensitivity measures a loss; give --text FILES"),
        (("--sensitivity", "--text", "f", "--out_dir", "x"), "--sensitivity writes no model; leave --out_dir out"),
        (("--sensitivity", "--text", "f", "--method", "gptq", "--calibration", "f"), "leave --method and --calibration out"),
        (("--sensitivity", "--text", "f", "--svg", "a.png"), "--svg must end in .svg; got a.png"),
        (("--out_dir", "x", "--group", "-1"), "group must be at least 0; got -1"),
        (("--out_dir", "x", "--group", "48"), "group is 48, which does not divide the 32 inputs of token_embedding; use 32 or 0"),
        (("--out_dir", "x", "--holdout_share", "0"), "holdout_share must be above 0 and at most 1"),
        (("--out_dir", "x", "--keep", "qvk"), "keep names qvk, which this model has not (did you mean 'qkv'?); it has"),
        (("--out_dir", "x", "--keep", "blocks", "token_embedding"), "none is left to quantise"),
        (("--out_dir", "x", "--text", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_one_line_for_what_is_wrong(
    options: tuple[str, ...], message: str, model: Path, tmp_path: Path, call: tiny.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = call(model, *options)
    assert found.code == 2 and message in found.err.replace("\n", " "), found.err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("bits", [True, 8.0, "8", None, 3, [8]])
def test_bits_are_4_or_8_and_the_whole_key_is_named(bits: object) -> None:
    with pytest.raises(UserError, match=r"^quantisation\.matrices\.blocks\.0\.mlp\.up must have 4 or 8 bits; got "):
        Recipe({"blocks.0.mlp.up": bits})


def test_not_twice_and_not_over_a_folder(model: Path, tmp_path: Path, call: tiny.Run) -> None:
    assert call(model, "--out_dir", tmp_path / "a").code == 0
    again = call(tmp_path / "a", "--out_dir", tmp_path / "b")
    assert again.code == 2 and "is quantised already" in again.err and not (tmp_path / "b").exists()
    over = call(model, "--out_dir", tmp_path / "a")
    assert over.code == 2 and "exists already" in over.err
    first = call(model, "--out_dir", tmp_path / "a", "--text", "nowhere.txt")  # before the text is read
    assert first.code == 2 and "exists already" in first.err


def test_numbers_that_are_not_finite_leave_nothing_behind(model: Path, tmp_path: Path, call: tiny.Run) -> None:
    broken, tokenizer = glassgpt.load(model)
    with torch.no_grad():
        broken.blocks[1].mlp.get_parameter("up.weight")[0, 0] = torch.inf
    (tmp_path / "m").mkdir()
    weights.save(broken, tmp_path / "m")
    tokenizer.save(tmp_path / "m")
    found = call(tmp_path / "m", "--out_dir", tmp_path / "x")
    assert found.code == 2 and "blocks.1.mlp.up: the matrix has numbers that are not finite" in found.err.replace("\n", " ")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


# ---------------------------------------------------------------------- after it


def test_commands_open_it(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = tmp_path / "small"
    assert tiny.caller("quantize", capsys)(model, "--out_dir", small, "--group", 16, "--activations", 8).code == 0
    written = tiny.caller("generate", capsys)(small, "the cat", "--temperature", 0, "--max_new_tokens", 5)
    assert written.code == 0, written.err
    evaluated = tiny.caller("evaluate", capsys)(small, "--sources", text, "--json")
    assert evaluated.code == 0 and json.loads(evaluated.out)["bits_per_byte"] > 0
    facts = tiny.caller("info", capsys)(small, "--json")
    said = json.loads(facts.out)
    plain: GPT = glassgpt.load(small, plain=True)[0]
    assert said["parameters"] == sum(p.numel() for p in plain.parameters())
    assert {tensor["dtype"] for tensor in said["tensors"]} == {"bfloat16", "int8/16"}
    assert "int8/16" in tiny.caller("info", capsys)(small).out
    seen = tiny.caller("inspect", capsys)(small, "--prompt", "the cat sat", "--json")
    assert seen.code == 0 and json.loads(seen.out)["parameters"] == said["parameters"]


@pytest.mark.parametrize("to", ["glassgpt", "hf"])
def test_an_export_as_it_is_has_the_same_logits(model: Path, tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]) -> None:
    small, plain = tmp_path / "small", tmp_path / "plain"
    assert tiny.caller("quantize", capsys)(model, "--out_dir", small, "--bits", 4, "--group", 16).code == 0
    assert tiny.caller("export", capsys)(small, plain, "--to", to).code == 0
    (quantised, _), (exported, _) = glassgpt.load(small), glassgpt.load(plain, dtype=None)
    ids = exact.tokens(exported.config)
    assert {parameter.dtype for parameter in exported.parameters()} == {torch.float32} and recipe_of(exported) is None
    with torch.no_grad():
        assert torch.equal(exported(ids), quantised(ids))
        rounded = exported.bfloat16().float()
        assert not torch.equal(rounded(ids), quantised(ids))


def test_training_starts_from_the_numbers_that_the_codes_stand_for(model: Path, tmp_path: Path) -> None:
    quantize(Quantize(str(model), str(tmp_path / "small"), bits=4, group=16, json=True))
    from glassgpt.config.pretrain import Pretrain
    from glassgpt.train import checkpoint

    plain, _ = glassgpt.load(tmp_path / "small", plain=True)
    fresh = GPT(plain.config)
    checkpoint.put(fresh, plain)
    ids = exact.tokens(plain.config)
    assert torch.equal(fresh.eval()(ids), glassgpt.load(tmp_path / "small")[0](ids))
    assert Pretrain().start is None
    with pytest.raises(UserError, match="is quantised already"):
        quantize(Quantize(str(tmp_path / "small"), str(tmp_path / "b")))
