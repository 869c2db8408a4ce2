"""The graphs that `glassgpt bench generate` writes for ONNX Runtime and OpenVINO give `transformers`' greedy tokens."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glassgpt.config import preset
from glassgpt.lab.bench.generate import process
from glassgpt.lab.bench.generate.peers import gpt2_files, onnxruntime, openvino
from glassgpt.lab.bench.generate.phases import Phase
from glassgpt.lab.bench.generate.random_weights import write_weights
from glassgpt.lab.bench.generate.systems import System

PEERS = {"onnxruntime": onnxruntime, "openvino": openvino}
VOCABULARY = 101
Folder = tuple[Path, Any]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A tiny GPT-2 with noise on every parameter: its folder and the model of `transformers`."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": None}
    shape = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=64, **ends)
    model = transformers.GPT2LMHeadModel(shape).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder)
    return folder, model


def ids_of(model: Any, prompts: torch.Tensor, new_tokens: int) -> list[list[int]]:
    """Greedy tokens of the plain model, the whole row read again for each."""
    rows = prompts
    with torch.inference_mode():
        for _ in range(new_tokens):
            rows = torch.cat([rows, model(rows).logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return rows[:, prompts.size(1) :].tolist()


def prepared(peer: str, variant: str, folder: Path, files: Path) -> Any:
    if PEERS[peer].missing():
        pytest.skip(f"{peer} is not installed")
    files.mkdir(exist_ok=True)
    PEERS[peer].prepare(folder, files, variant)
    return PEERS[peer].System(files, variant, 1)


def prompts_of(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("peer", PEERS)
def test_float32_writes_what_transformers_writes(peer: str, gpt2: Folder, tmp_path: Path) -> None:
    folder, model = gpt2
    system = prepared(peer, "float32", folder, tmp_path)
    for rows, length in ((3, 7), (1, 1), (3, 5)):  # a later call starts from an empty cache, with other shapes too
        prompts, stamps = prompts_of(rows, length), []
        written = system.generate(prompts.tolist(), 20, lambda: stamps.append(0))  # noqa: B023
        assert written == ids_of(model, prompts, 20)
        assert len(stamps) == 20


LEAST = {"bfloat16": 0.9, "int8": 0.9, "int4": 0.4}  # 4 bits cost such a small model much; by chance it would be 0.01


@pytest.mark.parametrize(
    ("peer", "variant"),
    [(peer, variant) for peer, module in PEERS.items() for variant in module.VARIANTS if variant != "float32"],
)
def test_fewer_bits_mostly_agree(peer: str, variant: str, gpt2: Folder, tmp_path: Path) -> None:
    folder, model = gpt2
    system = prepared(peer, variant, folder, tmp_path)
    prompts = prompts_of(200, 7)
    written = np.array(system.generate(prompts.tolist(), 2, lambda: None))  # (200, 2)
    assert (written[:, :1] == ids_of(model, prompts, 1)).mean() >= LEAST[variant.split("-")[0]]
    longer = torch.cat([prompts, torch.from_numpy(written[:, :1])], dim=1)
    assert (written[:, 1:] == ids_of(model, longer, 1)).mean() >= LEAST[variant.split("-")[0]]  # through its cache


def drop_positions(read: Any) -> None:
    read.tensors["wpe.weight"][:] = 0


def swap_query_and_key(read: Any) -> None:
    weight = read.tensors["h.1.attn.c_attn.weight"]
    weight[:] = np.concatenate([weight[:, 64:128], weight[:, :64], weight[:, 128:]], axis=1)


def forget_last_norm(read: Any) -> None:
    read.tensors["ln_f.bias"][:] = 0


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("change", [drop_positions, swap_query_and_key, forget_last_norm])
def test_the_comparison_sees_a_wrong_model(
    peer: str, change: Callable[[Any], None], gpt2: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = gpt2
    read_gpt2 = gpt2_files.read_gpt2

    def read_wrongly(hf_folder: Path) -> gpt2_files.GPT2:
        read = read_gpt2(hf_folder)
        change(read)
        return read

    monkeypatch.setattr(gpt2_files, "read_gpt2", read_wrongly)
    prompts = prompts_of(3, 7)
    assert prepared(peer, "float32", folder, tmp_path).generate(prompts.tolist(), 20, lambda: None) != ids_of(model, prompts, 20)


def test_quantised_matrices_are_near_the_given_ones() -> None:
    if openvino.missing():
        pytest.skip("openvino is not installed")
    from glassgpt.lab.bench.generate.peers.openvino_graph import packed, quantise

    groups = np.random.default_rng(0).normal(size=(3, 2, 32)).astype(np.float32)
    for bits, codes_a_side in ((8, 127), (4, 7)):
        codes, scales = quantise(groups, bits)
        assert np.abs(codes).max() == codes_a_side
        assert (np.abs(codes * scales.astype(np.float32) - groups) <= 0.51 * scales.astype(np.float32)).all()
    byte = int(packed(np.array([[[1, -2]]], np.int8)).data.view(np.uint8).item())
    assert (byte & 15, byte >> 4) == (1, -2 & 15)


def test_only_what_is_read_is_kept(gpt2: Folder, tmp_path: Path) -> None:
    prepared("onnxruntime", "int4", gpt2[0], tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "model.onnx.data"]


@pytest.mark.parametrize(("peer", "variant"), [("xllamacpp", "f16"), ("ctranslate2", "float32")])
def test_rows_do_not_share_a_context(peer: str, variant: str, tmp_path: Path) -> None:
    """8 rows that need more tokens together than the model's context are written to the end; a worker refuses fewer."""
    pytest.importorskip(peer, reason=f"{peer} is not installed")
    shape, system = preset("tiny", context_tokens=128), System(peer, variant)
    hf_folder, files = tmp_path / "hf", tmp_path / "files"
    hf_folder.mkdir()
    files.mkdir()
    write_weights(shape, 0, hf_folder)
    process.prepare(system, hf_folder, files, 1, tmp_path / "log")
    worker = process.Worker(system, files, 1, tmp_path / "log")
    try:
        for rows in (1, 8, 1):
            phase = Phase("decode", rows, 60, 60)
            answer = worker.generate(phase.prompts(shape.vocab_size, 0), phase.new_tokens, phase.warm_tokens)
            assert [len(row) for row in answer["ids"]] == [60] * rows
    finally:
        worker.close()


@pytest.mark.parametrize("peer", PEERS)
def test_it_says_what_to_install(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PEERS[peer], "find_spec", lambda name: None)
    assert PEERS[peer].missing().startswith("pip install ") and peer in PEERS[peer].missing()
    monkeypatch.setattr(PEERS[peer], "find_spec", find_spec if find_spec(peer) else lambda name: True)
    assert PEERS[peer].missing() is None
