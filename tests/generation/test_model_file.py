"""A model read straight from its file: the same bits as by way of PyTorch, which is never imported; and what is left to it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from exact import noisy, shape, tokens
from tiny import Run, caller, few_merges
from torch import Tensor

from glassgpt.config import ModelConfig
from glassgpt.config.compute import Compute
from glassgpt.config.model import MoeConfig
from glassgpt.config.quantize import Recipe
from glassgpt.generation import native, opening
from glassgpt.generation.native import packing
from glassgpt.generation.native.model_file import expected, mapped
from glassgpt.generation.opening import open_model
from glassgpt.model import GPT, weights
from glassgpt.model.quantised import parameter_count, put, round_to_nearest, targets

TOKENIZER = few_merges()
MODERN: dict[str, Any] = {"norm": "rms", "mlp": "swiglu", "n_kv_head": 2, "bias": False, "qk_norm": True, "tied_head": False}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "modern, without positions": MODERN | {"position": "none"},
    "biases everywhere": MODERN | {"norm": "layer", "bias": True, "embedding_norm": True},
    "bias of queries alone": {"bias": False, "qkv_bias": True, "mlp": "relu2", "norm": "rms"},
    "no bias of queries": {"qkv_bias": False, "embedding_norm": True, "norm": "rms"},
    "windows": {"spans": ("full", "window"), "window_tokens": 5, "logit_cap": 5.0, "attention_width": 32, "mlp_width": 50},
}


def small(**changes: Any) -> ModelConfig:
    return shape(**{"vocab_size": TOKENIZER.vocab_size, "width": 32, "n_layer": 2} | changes)


def saved(folder: Path, config: ModelConfig, stored: str = "float32") -> Path:
    """A noisy model in a folder, its matrices in these numbers: a dtype, or bits and group."""
    model = noisy(config, torch.float32, 0.1)
    if stored.startswith("int"):
        bits, group = (int(part) if part != "row" else None for part in stored.removeprefix("int").split("/"))
        assert bits is not None
        names = [name for name in targets(model) if "blocks.0.attn.out" not in name]  # one stays as it is
        chosen = {name: bits if name != "token_embedding" else 8 for name in names}
        parameters = {name: module.get_parameter("weight") for name, module in targets(model).items()}
        put(model, {n: round_to_nearest(parameters[n], b, group) for n, b in chosen.items()}, Recipe(chosen, group))
    folder.mkdir()
    weights.save(model, folder, None if stored.startswith("int") else getattr(torch, stored))
    TOKENIZER.save(folder)
    return folder


def logits(model: native.NativeModel, ids: Tensor) -> Tensor:
    return model.start().feed(ids.tolist(), every=True).logits.clone()


# ---------------------------------------------------------------------- the same model


@pytest.mark.parametrize("name", SHAPES)
def test_the_names_and_shapes_are_the_networks(name: str) -> None:
    config = small(**SHAPES[name])
    with torch.device("meta"):
        assert expected(config) == {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}


@pytest.mark.parametrize("pieces", [32, 4096])
@pytest.mark.parametrize(
    ("name", "stored"),
    [
        *((name, "float32") for name in SHAPES),
        ("plain", "bfloat16"),
        *(("plain", f"int{kind}") for kind in ("8/row", "8/16", "4/8")),
    ],
)
def test_the_same_bits(
    name: str, stored: str, pieces: int, portable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read whole, or some rows at a time."""
    monkeypatch.setattr(packing, "ROWS", pieces)
    folder = saved(tmp_path / "m", small(**SHAPES[name]), stored)
    ids = tokens(small(**SHAPES[name]))
    for precision in ("as-is", "float32", "bfloat16"):
        source = native.ModelFile(folder)
        found = native.open_model(source, precision=precision, kernels=portable, threads=1)  # type: ignore[arg-type]
        network = weights.load(folder)
        other = native.open_model(network, precision=precision, kernels=portable, threads=1)  # type: ignore[arg-type]
        assert (found.precision, found.cache, found.nbytes) == (other.precision, other.cache, other.nbytes)
        assert source.parameters == parameter_count(network)
        assert torch.equal(logits(found, ids), logits(other, ids))


HF: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt_neo": {"spans": ("full", "window"), "window_tokens": 5, "qkv_bias": False, "attention_scale": 1.0},
}


@pytest.mark.parametrize("pieces", [64, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HF)
def test_folders_of_hugging_face(
    name: str, dtype: torch.dtype, pieces: int, portable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turned matrices, matrices in three parts, a prefix, buffers that hold no parameter; pieces that end within a part."""
    monkeypatch.setattr(packing, "ROWS", pieces)
    network = noisy(small(width=48, **HF[name]), torch.float32, 0.1)
    weights.save_hf(network, tmp_path, None, dtype)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == name
    path = tmp_path / "model.safetensors"
    buffer = {"transformer.h.0.attn.bias": torch.ones(1, 1, 24, 24)} if name == "gpt2" else {}
    safetensors.torch.save_file(safetensors.torch.load_file(path) | buffer, path)
    ids = tokens(small())
    for precision in ("float32", "bfloat16"):
        options: dict[str, Any] = {"precision": precision, "kernels": portable, "threads": 1}
        found = native.open_model(native.ModelFile(tmp_path, is_hf=True), **options, release=True)
        other = native.open_model(weights.load_hf(tmp_path), **options)
        assert torch.equal(logits(found, ids), logits(other, ids))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not tell what is in memory")
@pytest.mark.parametrize("name", ["ours", *HF])
def test_memory_is_given_back_and_the_file_left_alone(name: str, portable: str, tmp_path: Path) -> None:
    """Of what the file is mapped to nothing but a few pages at its parts' ends stays in memory."""
    config = small(width=256, n_layer=4, **HF.get(name, {}))
    if name == "ours":
        saved(tmp_path / name, config)
    else:
        (tmp_path / name).mkdir()
        weights.save_hf(noisy(config, torch.float32, 0.1), tmp_path / name, None)
    path = tmp_path / name / "model.safetensors"
    before = path.read_bytes()
    for release, share in ((False, (0.9, 1.1)), (True, (0.0, 0.2))):
        file = native.ModelFile(tmp_path / name, name != "ours")
        model = native.open_model(file, kernels=portable, threads=1, release=release)
        resident = [
            int(line.split()[1]) * 1024
            for text in Path("/proc/self/smaps").read_text().split(str(path))[1:]
            for line in text.splitlines()
            if line.startswith("Rss:")
        ]
        assert share[0] <= resident[0] / len(before) <= share[1]
        assert logits(model, tokens(file.config)).isfinite().all()
        del file, model
    assert path.read_bytes() == before


@pytest.mark.parametrize("where", ["named twice", "by no name of the table", "in shards", "of another architecture"])
def test_unusual_folders_of_hugging_face_go_the_long_way(where: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"position": "alibi", "embedding_norm": True} if where == "of another architecture" else {}
    weights.save_hf(noisy(small(**changes), torch.float32, 0.1), tmp_path, None)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    if where == "named twice":
        safetensors.torch.save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}, path)
    elif where == "by no name of the table":
        safetensors.torch.save_file(tensors | {"transformer.extra": torch.ones(3)}, path)
    elif where == "in shards":
        path.rename(tmp_path / "model-00001-of-00001.safetensors")
    with pytest.raises(native.Unfit):
        native.ModelFile(tmp_path, is_hf=True)


# ---------------------------------------------------------------------- without PyTorch

COUNTED = """
import sys
from glassgpt.cli import main
code = main(sys.argv[1:])
torch = sys.modules.get("torch")
print(torch and torch.get_num_threads(), code, file=sys.stderr)
"""
"""Says how many threads PyTorch has if it was imported."""


def test_texts_are_written_without_pytorch(portable: str, tmp_path: Path, start_python: Any) -> None:
    """Drawn, by several rows and in a chat too; the words are those of PyTorch."""
    folder = saved(tmp_path / "m", small(context_tokens=64))
    lines = [
        ("generate", folder, "the cat", "--temperature", 0),
        ("generate", folder, "the cat", "mèo", "--n", 2, "--seed", 3, "--top_k", 30, "--top_p", 0.9, "--min_p", 0.01, "--json"),
        ("generate", folder, "the cat", "--seed", 3, "--stop", "e"),
        ("chat", folder, "--message", "hi", "--seed", 3, "--max_new_tokens", 8, "--json"),
    ]
    for line in lines:
        out, errors = start_python(COUNTED, *line).communicate(timeout=60)
        assert errors == "None 0\n"
        plainly, errors = start_python(COUNTED, *line, "--engine", "plain").communicate(timeout=120)
        assert errors.endswith(" 0\n") and not errors.startswith("None")
        if "--json" in line:
            out, plainly = (json.loads(text) for text in (out, plainly))
            assert out.pop("engine") == "native" and plainly.pop("engine") == "plain"
            assert (out.pop("activations"), out.pop("cache")) == (16, "float32")
        assert out == plainly


@pytest.mark.parametrize("more", [["--frequency_penalty", "0.5"], ["--logprobs", "2"], ["--lookup", "2"]])
def test_what_needs_tensors_imports_it(more: list[str], portable: str, tmp_path: Path, start_python: Any) -> None:
    folder = saved(tmp_path / "m", small(context_tokens=64))
    line = ("generate", folder, "the cat", "--temperature", 0, *more)
    out, errors = start_python(COUNTED, *line).communicate(timeout=60)
    plainly, _ = start_python(COUNTED, *line, "--engine", "plain").communicate(timeout=60)
    assert (errors, out) == ("1 0\n", plainly)  # the others are the engine's


# ---------------------------------------------------------------------- what is left to PyTorch


@pytest.fixture
def generate(capsys: pytest.CaptureFixture[str]) -> Run:
    return caller("generate", capsys)


def rewritten(change: Callable[[dict[str, Any], bytearray], None]) -> Callable[[Path], None]:
    """Changes the header or the numbers of a file."""

    def rewrite(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
        change(header, body)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # numbers lie where they can be read
        path.write_bytes(struct.pack("<Q", len(text)) + text + body)

    return rewrite


def shorter(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def deep(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 99_992) + b"[" * 99_992)


def no_scale(header: dict[str, Any], body: bytearray) -> None:
    begin, _ = header["blocks.1.mlp.up.scales"]["data_offsets"]
    body[begin : begin + 2] = b"\x00\x00"


def requantised(folder: Path, name: str) -> None:
    """The recipe names something that is no matrix."""
    values = json.loads((folder / "model.json").read_text())
    values["quantisation"]["matrices"][name] = 8
    (folder / "model.json").write_text(json.dumps(values))


DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (shorter, "truncated or not a weights file"),
    "empty": (lambda folder: (folder / "model.safetensors").write_bytes(b"") and None, "truncated or not a weights file"),
    "no file": (lambda folder: (folder / "model.safetensors").unlink(), "no weights found"),
    "no header": (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 99) and None, "not a weights file"),
    "a list": (lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]") and None, "weights"),
    "another name": (rewritten(lambda header, _: header.update(x=header.pop("norm_f.bias"))), "norm_f.bias is missing"),
    "a scale of 0": (rewritten(no_scale), "blocks.1.mlp.up.scales has numbers that are no scales"),
    "a recipe for a vector": (
        lambda folder: requantised(folder, "norm_f"),
        "names norm_f, which this network has not",
    ),
    "a recipe for positions": (
        lambda folder: requantised(folder, "position_embedding"),
        "names position_embedding, which this network has not",
    ),
    "a deep header": (deep, "weights"),
    "broken places": (
        rewritten(lambda header, _: header["norm_f.bias"].update(data_offsets=[0.0, 128.0])),
        "truncated or not a weights file",
    ),
    "another shape": (
        rewritten(lambda header, _: header["norm_f.bias"].update(shape=[4, 8])),
        "norm_f.bias is torch.float32 (4, 8), expected numbers (32,)",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_gets_one_line(name: str, generate: Run, portable: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", small(), "int8/16")
    damage, said = DAMAGED[name]
    damage(folder)
    with pytest.raises(native.Unfit):
        native.open_model(native.ModelFile(folder), threads=1)
    result = generate(folder, "the cat", "--temperature", 0)
    assert (result.code, result.out) == (2, "")
    assert said in result.err and result.err.count("\n") == 1


@pytest.mark.parametrize(
    "changes",
    [{"position": "rope"}, {"position": "alibi"}, {"spans": ("strided",), "window_tokens": 4}, {"moe": MoeConfig(4, 2)}],
)
def test_other_networks_go_the_long_way(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", small(**changes))
    with pytest.raises(native.Unfit):
        native.ModelFile(folder)


def test_other_numbers_go_the_long_way(portable: str, tmp_path: Path) -> None:
    with pytest.raises(native.Unfit):
        native.ModelFile(saved(tmp_path / "double", small(), "float64"))
    half = native.ModelFile(saved(tmp_path / "half", small(), "float16"))
    with pytest.raises(native.Unfit):
        native.open_model(half, kernels=portable)  # it does not compute in them
    assert native.open_model(half, precision="float32", kernels=portable).precision == "float32"


def test_other_wishes_go_the_long_way(portable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding, PyTorch itself, an accelerator that may be there."""
    found = opening.find(saved(tmp_path / "m", small()))
    opened = opening._from_file(found, "cpu", Compute(cache="int8", threads=1), False)
    assert opened is not None and opened.used == {"engine": "native", "precision": "float32", "activations": 16, "cache": "int8"}
    for device, wish in [
        ("cuda", {}),
        ("cpu", {"engine": "plain"}),
        ("cpu", {"precision": "int8"}),
        ("cpu", {"precision": "float64"}),
    ]:
        assert opening._from_file(found, device, Compute(**wish), False) is None  # type: ignore[arg-type]
    for there in (True, False):
        monkeypatch.setattr(opening, "_may_have_gpu", lambda there=there: there)
        assert (opening._from_file(found, "auto", Compute(), False) is None) == there
        assert opening._from_file(found, "cpu", Compute(), False) is not None


def test_mistakes_are_told_either_way(generate: Run, portable: str, tmp_path: Path) -> None:
    plain, coded = saved(tmp_path / "plain", small()), saved(tmp_path / "coded", small(), "int8/16")
    for folder, wish, said in [
        (plain, ["--activations", 8], "--activations 8 is for weights of 8 or 4 bits"),
        (coded, ["--precision", "int4"], "the model is quantised already (int8); leave out --precision int4"),
    ]:
        result = generate(folder, "the cat", *wish)
        assert (result.code, result.out, result.err.count("\n")) == (2, "", 1) and said in result.err


def test_a_quantised_draft_stays_as_it_is(portable: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", small(), "int8/16")
    for precision in ("float32", "bfloat16", "int8"):
        opened = open_model(str(folder), "cpu", Compute(precision=precision), is_draft=True)  # type: ignore[arg-type]
        assert opened.used == {"engine": "native", "precision": "int8", "activations": 16, "cache": "bfloat16"}


def test_both_ways_tell_the_same(portable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stored in ("float32", "bfloat16", "int8/row", "int4/8"):
        folder = saved(tmp_path / stored.replace("/", "-"), small(), stored)
        for compute in (Compute(), Compute(precision="bfloat16"), Compute(cache="int8")):
            short = open_model(str(folder), "cpu", compute)
            with monkeypatch.context() as patch:
                patch.setattr(opening, "_from_file", lambda *_: None)
                long = open_model(str(folder), "cpu", compute)
            assert (short.used, short.parameters) == (long.used, long.parameters)
            assert torch.equal(*(logits(one.model, tokens(small())) for one in (short, long)))  # type: ignore[arg-type]


def test_a_recipe_of_nothing_is_none(portable: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", small())
    values = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(values | {"quantisation": {"version": 1, "matrices": {}}}))
    assert open_model(str(folder), "cpu", Compute()).used["precision"] == "float32"
    assert open_model(str(folder), "cpu", Compute(precision="int8")).used["precision"] == "int8"


def test_floats_are_no_codes(portable: str) -> None:
    """Rows of another kind than the matrix leave it empty, so they are refused."""
    model = native.open_model(noisy(small(), torch.float32), kernels=portable, threads=1)
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    assert model.lib.glass_matrix_fill_codes(model.engine, 0, 0, 0, 32, codes.data_ptr(), codes.data_ptr()) < 0
    assert b"cannot be filled with codes" in model.lib.glass_error()


def test_places_in_a_file_must_fit(tmp_path: Path) -> None:
    """Tensors that overlap, leave holes, lie askew or reach beyond the end."""
    folder = saved(tmp_path / "m", small())
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    assert mapped(path)

    def moved(by: int) -> None:
        def change(header: dict[str, Any], body: bytearray) -> None:
            header["norm_f.weight"]["data_offsets"] = [place + by for place in header["norm_f.weight"]["data_offsets"]]

        path.write_bytes(whole)
        rewritten(change)(folder)

    moved(0)
    assert mapped(path)
    for by in (-4, 4, 1, 10**9, -(10**9)):
        moved(by)
        with pytest.raises(native.Unfit, match=r"place of|numbers of"):
            mapped(path)
