"""`export --to gguf`: read back by the `gguf` package's reader, and run by llama.cpp itself."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

import glassgpt
from glassgpt import gguf_writer
from glassgpt.cli import main
from glassgpt.config import ModelConfig, UserError, preset
from glassgpt.config.generate import Sampling
from glassgpt.config.model import MoeConfig, RopeConfig
from glassgpt.generation import complete
from glassgpt.model import GPT, weights
from glassgpt.text import END_OF_TEXT, Tokenizer

LLAMA = {
    "position": "rope",
    "norm": "rms",
    "mlp": "swiglu",
    "bias": False,
    "n_kv_head": 2,
    "tied_head": False,
    "n_head": 4,
    "width": 128,
}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_head": 4, "width": 128},
    "gpt2, untied": {"n_head": 4, "width": 128, "tied_head": False},
    "llama": LLAMA,
    "llama, tied": {**LLAMA, "tied_head": True, "n_kv_head": 4},
    "llama, linear": {**LLAMA, "rope": RopeConfig(scaling="linear", factor=4.0)},
    "llama, yarn": {**LLAMA, "rope": RopeConfig(scaling="yarn", factor=4.0, original_tokens=16)},
    "llama, smooth": {**LLAMA, "rope": RopeConfig(5e5, "smooth", 8.0, 16, fast_turns=4.0)},
    "mixtral": {**LLAMA, "moe": MoeConfig(experts=4, expert_width=96)},
    "qwen2": {**LLAMA, "qkv_bias": True},
    "qwen3": {**LLAMA, "qk_norm": True, "attention_width": 256},
    "qwen3_moe": {**LLAMA, "qk_norm": True, "moe": MoeConfig(experts=4, expert_width=64)},
}


PRINTABLE = ["Ġ", *map(chr, range(33, 127))]


def bytes_tokenizer() -> Tokenizer:
    """A token for each byte, the printable characters first, and one merge, without which llama.cpp takes no file."""
    others = sorted({*pre_tokenizers.ByteLevel.alphabet()} - {*PRINTABLE})
    pieces = [*PRINTABLE, *others, "th", END_OF_TEXT]
    backend = tokenizers.Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [("t", "h")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend)


def disturbed(vocab_size: int, **changes: Any) -> GPT:
    """A model with noise on every parameter, so that likely and unlikely tokens are far apart."""
    config = preset("tiny", vocab_size=vocab_size, context_tokens=64, **changes)
    torch.manual_seed(0)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


# llama.cpp with a file, keys and values and attention in float32, in a process of its own, as it leaves threads behind.
RUN = """
import json, sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.verbosity, params.warmup, params.cpuparams.n_threads = 64, -1, False, 1
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
answer = xllamacpp.Server(params).handle_completions(json.loads(sys.argv[2]))
print(json.dumps(answer), flush=True)
import os
os._exit(0)
"""


def continued(path: Path, prompt: Any, count: int, **more: Any) -> tuple[str, list[tuple[int, float]]]:
    """Greedy text, and (id, log-probability) of each token, by llama.cpp."""
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed (extra `dev`)")
    asked = {"prompt": prompt, "max_tokens": count, "temperature": 0, "logprobs": 1, "ignore_eos": True, **more}
    command = [sys.executable, "-c", RUN, str(path), json.dumps(asked)]
    done = subprocess.run(command, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (choice,) = json.loads(done.stdout.splitlines()[-1])["choices"]
    return choice["text"], [(token["id"], token["logprob"]) for token in choice["logprobs"]["content"]]


@torch.no_grad()
def likeliest(model: GPT, prompt: list[int], count: int, among: int) -> list[tuple[int, float]]:
    """Greedy tokens among the first ids, and their log-probabilities among all."""
    found: list[tuple[int, float]] = []
    for _ in range(count):
        logprobs = model(torch.tensor([[*prompt, *(token_id for token_id, _ in found)]]))[0, -1].log_softmax(-1)
        token_id = int(logprobs[:among].argmax())
        found.append((token_id, float(logprobs[token_id])))
    return found


BYTES = {"logit_bias": [[token_id, False] for token_id in range(len(PRINTABLE), 258)]}
"""Leaves only printable characters: llama.cpp reports no token that is a part of one."""


@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_computes_what_we_do(name: str, tmp_path: Path) -> None:
    model = disturbed(258, **SHAPES[name])
    gguf_writer.write(model, bytes_tokenizer(), tmp_path / "model.gguf", name)
    prompt = [5, 60, 17, 90, 33, 2, 71]
    ours = likeliest(model, prompt, 40, len(PRINTABLE))
    _, theirs = continued(tmp_path / "model.gguf", prompt, 40, **BYTES)
    assert [token_id for token_id, _ in ours] == [token_id for token_id, _ in theirs]
    assert len({token_id for token_id, _ in ours}) > 2 or name == "gpt2"  # tied: it repeats itself
    error = max(abs(a - b) for (_, a), (_, b) in zip(ours, theirs, strict=True))
    print(f"measured {name}: log-probabilities differ by {error:.1e}")
    assert error < (2e-3 if "gpt2" in name else 2e-5)  # its GELU is a table of float16


def test_rows_in_the_wrong_order_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_writer, "_neighbours", lambda weight, heads: weight)
    model = disturbed(258, **LLAMA)
    gguf_writer.write(model, bytes_tokenizer(), tmp_path / "model.gguf", "wrong")
    prompt = [5, 60, 17, 90, 33, 2, 71]
    ((_, ours),) = likeliest(model, prompt, 1, len(PRINTABLE))
    _, ((_, theirs),) = continued(tmp_path / "model.gguf", prompt, 1, **BYTES)
    assert abs(ours - theirs) > 2e-2


@pytest.mark.parametrize("prompt", ["Once upon a time, there was a little", "  Tiếng Việt, 12345 & it's\n\nfun"])
def test_text_goes_in_and_the_same_text_comes_out(prompt: str, tmp_path: Path) -> None:
    """The bundled model: its tokenizer in llama.cpp's hands, greedy text equal to ours."""
    assert main(["export", "storyteller", str(tmp_path / "out"), "--to", "gguf", "--dtype", "float32"]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.gguf"]
    model, tokenizer = glassgpt.load("storyteller")
    (ours,) = complete(model, tokenizer, [prompt], Sampling(temperature=0.0), max_new_tokens=40, seed=0)
    file = tmp_path / "out" / "model.gguf"
    assert continued(file, prompt, 40)[0] == ours.text
    assert continued(file, tokenizer.encode(prompt), 40)[0] == ours.text  # its ids are our ids


# ---------------------------------------------------------------------- what stands in the file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_reader_finds_every_number(dtype: torch.dtype, tokenizer: Tokenizer, tmp_path: Path) -> None:
    import gguf

    model = disturbed(tokenizer.vocab_size + 3, **SHAPES["gpt2"]).to(dtype)
    gguf_writer.write(model, tokenizer, tmp_path / "model.gguf", "a name")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert len(found) == sum(1 for _ in model.named_parameters())
    pairs = {
        "token_embd.weight": model.token_embedding.weight,
        "position_embd.weight": model.position_embedding.weight,
        "blk.1.attn_qkv.weight": model.blocks[1].attn.qkv.weight,
        "blk.0.ffn_down.bias": model.blocks[0].mlp.down.bias,
        "output_norm.weight": model.norm_f.weight,
    }
    for name, parameter in pairs.items():
        tensor, expected = found[name], parameter.detach()
        assert list(tensor.shape) == list(reversed(expected.shape))
        kept = torch.from_numpy(np.array(tensor.data))
        low = expected.ndim == 2 and dtype in (torch.bfloat16, torch.float16)
        kept = kept.view(dtype).view(expected.shape) if low else kept.view(expected.shape)
        assert torch.equal(kept, expected if low else expected.float()), name
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "gpt2" and fields["general.name"] == "a name"
    assert fields["gpt2.context_length"] == 64 and fields["gpt2.attention.head_count"] == 4
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    words = fields["tokenizer.ggml.tokens"]
    assert (
        words[: tokenizer.vocab_size] == tokenizer.pieces() and words[tokenizer.vocab_size] == f"[UNUSED{tokenizer.vocab_size}]"
    )
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.end_id
    assert fields["tokenizer.ggml.token_type"][tokenizer.end_id] == gguf.TokenType.CONTROL


# ---------------------------------------------------------------------- what cannot be written


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mlp": "relu2"}, "has no mlp = relu2"),
        ({**LLAMA, "spans": ("window",), "window_tokens": 8}, "a MistralForCausalLM, which this exporter does not write"),
        (
            {**LLAMA, "qk_norm": True, "spans": ("full", "window"), "window_tokens": 8},
            "llama.cpp has no window_tokens = 8 for Qwen3ForCausalLM",
        ),
        ({"position": "alibi", "embedding_norm": True}, "a BloomForCausalLM, which this exporter does not write"),
        (
            {**LLAMA, "rope": RopeConfig(scaling="yarn", factor=2.0, original_tokens=32, attention_factor=0.5)},
            "yarn with fast_turns 32",
        ),
        ({**LLAMA, "qk_norm": True, "moe": MoeConfig(experts=2, normalise=False)}, "moe.normalise is false"),
    ],
)
def test_what_llama_cpp_does_not_have(changes: dict[str, Any], said: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = GPT(preset("tiny", vocab_size=tokenizer.vocab_size, **changes))
    weights.save(model, tmp_path)
    tokenizer.save(tmp_path)
    with pytest.raises(UserError, match=said):
        glassgpt.export(glassgpt.Export(str(tmp_path), str(tmp_path / "out"), to="gguf"))
    assert not (tmp_path / "out").exists()


def with_cut(pattern: str | None) -> Tokenizer:
    """`bytes_tokenizer`, cut by a regular expression."""
    backend = tokenizers.Tokenizer.from_str(bytes_tokenizer().to_json())
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if pattern is not None:
        steps.insert(0, pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return Tokenizer(backend)


def test_cuts_have_names(tmp_path: Path) -> None:
    config = ModelConfig(vocab_size=258, context_tokens=16, n_layer=1, n_head=1, width=32)
    model = GPT(config)
    for pattern, name in gguf_writer.CUTS.items():
        import gguf

        gguf_writer.write(model, with_cut(pattern), tmp_path / f"{name}.gguf", name)
        field = gguf.GGUFReader(tmp_path / f"{name}.gguf").fields["tokenizer.ggml.pre"]
        assert field.contents() == name
        assert len(continued(tmp_path / f"{name}.gguf", [5, 6], 1)[1]) <= 1  # llama.cpp knows the name
    for unknown in (r"\w+", None):
        with pytest.raises(UserError, match="no name for how this tokenizer cuts text"):
            gguf_writer.write(model, with_cut(unknown), tmp_path / "unknown.gguf", "")
    for lacking in ({"model": {"merges": []}}, {"added_tokens": []}):
        facts = json.loads(bytes_tokenizer().to_json())
        for name, value in lacking.items():
            facts[name] = facts[name] | value if isinstance(value, dict) else value
        facts["model"]["vocab"].pop(END_OF_TEXT, None) if "added_tokens" in lacking else None
        with pytest.raises(UserError, match="merges and an end-of-text token"):
            gguf_writer.write(model, Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(facts))), tmp_path / "lacking.gguf", "")
    word_level = Tokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(UserError, match=r"no plain byte-level BPE \(WordLevel, normalizer None\)"):
        gguf_writer.write(GPT(dataclasses.replace(config, vocab_size=1)), word_level, tmp_path / "words.gguf", "")


def test_without_the_package(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'glassgpt\[export\]'"):
        gguf_writer.write(disturbed(tokenizer.vocab_size), tokenizer, tmp_path / "model.gguf", "")
