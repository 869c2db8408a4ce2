"""Folders in and out: what `transformers` writes is read exactly, and what cannot be read is refused in words."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
from oracle import add_noise, random_ids
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from glassgpt.config import ModelConfig, UserError
from glassgpt.config.folder import CONFIG_FILE, WEIGHTS_FILE
from glassgpt.model import GPT, weights
from glassgpt.model.families import read_hf

LOGITS = 1e-10


def hugging_face(**changes: object) -> GPT2LMHeadModel:
    """A tiny GPT-2 of theirs with noise in every parameter, in float64; its settings are all unusual."""
    shape = {"vocab_size": 61, "n_positions": 16, "n_layer": 2, "n_head": 2, "n_embd": 8, "layer_norm_epsilon": 1e-3}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **shape | changes)).double().eval()
    add_noise(model, 0.3)
    return model


@pytest.fixture(scope="module")
def theirs() -> GPT2LMHeadModel:
    return hugging_face()


@pytest.fixture
def folder(theirs: GPT2LMHeadModel, tmp_path: Path) -> Path:
    """What `save_pretrained` writes."""
    theirs.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def logit_error(ours: GPT, theirs: GPT2LMHeadModel) -> float:
    ids = random_ids(ours.config)
    with torch.no_grad():
        return float((ours.eval()(ids) - theirs(ids).logits).abs().max())


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


# ---------------------------------------------------------------------- every way in which such a model is written


def whole(model: GPT2LMHeadModel, folder: Path) -> None:
    model.save_pretrained(folder)


def without_prefix(model: GPT2LMHeadModel, folder: Path) -> None:
    model.transformer.save_pretrained(folder)
    assert all(not name.startswith("transformer.") for name in weights.read_file(folder / "model.safetensors"))


def shards(model: GPT2LMHeadModel, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) >= 2
    assert not (folder / "model.safetensors").exists()


def pickled(model: GPT2LMHeadModel, folder: Path) -> None:
    """As `transformers` did until 4.x: the state dict, tied head included."""
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def pickled_before_zip(model: GPT2LMHeadModel, folder: Path) -> None:
    """The layout of the published gpt2's pytorch_model.bin."""
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def pickled_shards(model: GPT2LMHeadModel, folder: Path) -> None:
    model.config.save_pretrained(folder)
    huggingface_hub.save_torch_state_dict(
        model.state_dict(),
        folder,
        safe_serialization=False,
        max_shard_size="10KB",
        filename_pattern="pytorch_model{suffix}.bin",
    )
    assert len(list(folder.glob("pytorch_model-*-of-*.bin"))) >= 2
    assert (folder / "pytorch_model.bin.index.json").is_file()


def mask_buffers(model: GPT2LMHeadModel, folder: Path) -> None:
    """As the published gpt2's model.safetensors: no prefix, and each layer's causal mask among the tensors."""
    without_prefix(model, folder)

    def add(tensors: dict[str, Tensor]) -> None:
        for layer in range(model.config.n_layer):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    change_tensors(folder, add)


def head_stored(model: GPT2LMHeadModel, folder: Path) -> None:
    model.save_pretrained(folder)
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}))


def head_instead_of_embedding(model: GPT2LMHeadModel, folder: Path) -> None:
    """`safetensors` keeps one name of a shared tensor: the alphabetically first."""
    model.config.save_pretrained(folder)
    safetensors.torch.save_model(model, str(folder / "model.safetensors"))
    stored = weights.read_file(folder / "model.safetensors")
    assert "lm_head.weight" in stored
    assert "transformer.wte.weight" not in stored


WRITERS = [
    whole,
    without_prefix,
    shards,
    pickled,
    pickled_before_zip,
    pickled_shards,
    mask_buffers,
    head_stored,
    head_instead_of_embedding,
]


@pytest.mark.parametrize("write", WRITERS)
def test_logits_of_what_they_write(write: Callable[..., None], theirs: GPT2LMHeadModel, tmp_path: Path) -> None:
    """Every layout of the same model gives its logits, in float64, and the head stays tied."""
    write(theirs, tmp_path)
    ours = weights.load_hf(tmp_path)
    assert ours.head.weight is ours.token_embedding.weight
    assert {p.dtype for p in ours.parameters()} == {torch.float64}
    assert logit_error(ours, theirs) < LOGITS


@pytest.mark.parametrize("write", [whole, shards, pickled])
def test_untied_head(write: Callable[..., None], tmp_path: Path) -> None:
    """With `tie_word_embeddings` false the head is a matrix of its own."""
    model = hugging_face(tie_word_embeddings=False)
    write(model, tmp_path)
    ours = weights.load_hf(tmp_path)
    assert not ours.config.tied_head
    assert not torch.equal(ours.head.weight, ours.token_embedding.weight)
    assert logit_error(ours, model) < LOGITS


@pytest.mark.parametrize("changes", [{"n_inner": 24}, {"activation_function": "gelu_pytorch_tanh"}, {"n_head": 4}])
def test_settings_are_honoured(changes: dict[str, object], theirs: GPT2LMHeadModel, tmp_path: Path) -> None:
    """A setting read from config.json has the effect that it has for them."""
    model = hugging_face(**changes)
    model.save_pretrained(tmp_path)
    assert logit_error(weights.load_hf(tmp_path), model) < LOGITS


def test_the_comparison_would_notice(folder: Path, theirs: GPT2LMHeadModel) -> None:
    """A wrong epsilon, a wrong number of heads, a transposed square matrix: each is far outside the tolerance."""
    change_config(folder, layer_norm_epsilon=1e-5)
    assert logit_error(weights.load_hf(folder), theirs) > 1e-4
    change_config(folder, layer_norm_epsilon=1e-3, n_head=4)
    assert logit_error(weights.load_hf(folder), theirs) > 1e-4
    change_config(folder, n_head=2)
    name = "transformer.h.0.attn.c_proj.weight"
    change_tensors(folder, lambda t: t.update({name: t[name].t().contiguous()}))
    assert logit_error(weights.load_hf(folder), theirs) > 1e-4


def test_old_config_names(folder: Path, theirs: GPT2LMHeadModel) -> None:
    """Fields that older files lack have their published defaults; `n_ctx` stands in for `n_positions`."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for name in ("n_positions", "n_inner", "tie_word_embeddings", "activation_function", "add_cross_attention"):
        del values[name]
    path.write_text(json.dumps(values | {"n_ctx": 16}))
    assert logit_error(weights.load_hf(folder), theirs) < LOGITS


# ---------------------------------------------------------------------- what cannot be read


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        weights.load_hf(folder)
    return str(caught.value)


def test_one_message_names_every_tensor_that_does_not_fit(folder: Path) -> None:
    """Missing, unexpected and mis-shaped tensors come together, with expected and given shapes."""

    def break_three(tensors: dict[str, Tensor]) -> None:
        del tensors["transformer.h.1.mlp.c_fc.weight"]
        tensors["transformer.h.0.ln_1.weight"] = torch.ones(9, dtype=torch.float64)
        tensors["transformer.h.0.attn.q_norm.weight"] = torch.ones(4, dtype=torch.float64)

    change_tensors(folder, break_three)
    heading, *lines = refusal(folder).splitlines()
    assert str(folder) in heading
    assert sorted(line.strip() for line in lines) == [
        "h.0.attn.q_norm.weight: unexpected, shape (4,)",
        "h.0.ln_1.weight: shape (9,), expected (8,)",
        "h.1.mlp.c_fc.weight: missing, expected shape (8, 32)",
    ]


def test_a_layer_too_many_is_not_dropped(folder: Path) -> None:
    """A file of two layers with a configuration of one is refused: nothing is ignored silently."""
    change_config(folder, n_layer=1)
    message = refusal(folder)
    assert message.count("unexpected") == 12
    assert "h.1.attn.c_attn.weight: unexpected, shape (8, 24)" in message


def test_tied_head_that_differs(folder: Path) -> None:
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1e-12}))
    message = refusal(folder)
    assert "lm_head.weight differs from wte.weight" in message
    change_config(folder, tie_word_embeddings=False)  # what the message advises
    assert not weights.load_hf(folder).config.tied_head


def test_missing_shard(theirs: GPT2LMHeadModel, tmp_path: Path) -> None:
    shards(theirs, tmp_path)
    absent = min(tmp_path.glob("model-*.safetensors"))
    absent.unlink()
    message = refusal(tmp_path)
    assert absent.name in message
    assert "model.safetensors.index.json" in message


def test_index_that_is_none(theirs: GPT2LMHeadModel, tmp_path: Path) -> None:
    shards(theirs, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {}}')
    assert "weight_map" in refusal(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_safetensors(folder: Path, share: float) -> None:
    """A download cut anywhere is named, when loading and when only the header is asked for."""
    path = folder / "model.safetensors"
    os.truncate(path, int(path.stat().st_size * share))
    assert f"{path}: truncated" in refusal(folder)
    with pytest.raises(UserError, match="truncated"):
        weights.stored_dtypes(read_hf(folder)[1], folder, is_hf=True)


@pytest.mark.parametrize("write", [pickled, pickled_before_zip])
def test_truncated_pickle(write: Callable[..., None], theirs: GPT2LMHeadModel, tmp_path: Path) -> None:
    """A pickle cut at any of many places is refused with its name, whatever the unpickler makes of the rest."""
    write(theirs, tmp_path)
    path = tmp_path / "pytorch_model.bin"
    content = path.read_bytes()
    for cut in [*range(1, 600, 13), *range(600, len(content) - 1, len(content) // 20)]:
        path.write_bytes(content[:cut])
        assert str(path) in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_pointer_instead_of_weights(name: str, folder: Path) -> None:
    """A clone without git-lfs holds small text files in place of the weights."""
    (folder / "model.safetensors").unlink()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548118077\n")
    message = refusal(folder)
    assert str(folder / name) in message
    assert "download" in message


@pytest.mark.parametrize("content", [{"state_dict": {"wte.weight": torch.ones(2)}, "epoch": 3}, torch.ones(2)])
def test_pickle_of_something_else(content: object, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    assert "expected names and tensors" in refusal(folder)


class Attack:
    """Unpickled without care, it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_does_not_run(zipped: bool, theirs: GPT2LMHeadModel, folder: Path, tmp_path: Path) -> None:
    """The attack works on an unguarded reader, so its failure here is our doing."""
    (folder / "model.safetensors").unlink()
    path, target = folder / "pytorch_model.bin", tmp_path / "attacked"
    state = theirs.state_dict() | {"transformer.h.0.attn.bias": Attack(target)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    torch.load(path, weights_only=False)
    assert target.is_dir()
    target.rmdir()
    assert "running code from a file is refused" in refusal(folder)
    assert not target.exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activation_function", "relu"),
        ("scale_attn_by_inverse_layer_idx", True),
        ("scale_attn_weights", False),
        ("add_cross_attention", True),
        ("model_type", "falcon"),
    ],
)
def test_unsupported_field_is_named(field: str, value: object, folder: Path) -> None:
    change_config(folder, **{field: value})
    message = refusal(folder)
    assert str(folder / "config.json") in message
    assert field in message
    assert repr(value) in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot read"),
        ("[]", "expected a JSON object"),
        ('{"model_type": "gpt2", "vocab_size": 61}', "'n_layer' is missing"),
        ('{"model_type": "gpt2", "vocab_size": "61", "n_layer": 2, "n_head": 2, "n_embd": 8}', "vocab_size must"),
        ('{"model_type": "gpt2", "vocab_size": 61, "n_layer": 2, "n_head": 3, "n_embd": 8}', "n_head must divide"),
    ],
)
def test_broken_config(text: str, said: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    message = refusal(folder)
    assert str(folder / "config.json") in message
    assert said in message


def test_no_weights(folder: Path) -> None:
    """What was looked for is listed."""
    (folder / "model.safetensors").unlink()
    message = refusal(folder)
    assert all(name in message for name in weights.HF_WEIGHTS_FILES)


# ---------------------------------------------------------------------- our own folders


def random_model(config: ModelConfig, dtype: torch.dtype) -> GPT:
    torch.manual_seed(3)
    model = GPT(config)
    add_noise(model, 0.3)
    return model.to(dtype)


def same_bits(one: GPT, other: GPT) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return one.config == other.config and all(
        n == m and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for (n, a), (m, b) in pairs
    )


TINY = ModelConfig(vocab_size=61, context_tokens=16, n_layer=2, n_head=2, width=8, mlp_width=24, dropout=0.1)
UNTIED = ModelConfig(vocab_size=61, context_tokens=16, n_layer=1, n_head=1, width=8, norm_eps=1e-6, tied_head=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [TINY, UNTIED])
def test_round_trip_is_bit_exact(config: ModelConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    """Configuration, tie and every bit come back, from our folder and from one in their layout."""
    model = random_model(config, dtype)
    weights.save(model, tmp_path)
    again = weights.load(tmp_path)
    assert same_bits(model, again)
    assert (again.head.weight is again.token_embedding.weight) == config.tied_head
    (tmp_path / "hf").mkdir()
    weights.save_hf(model, tmp_path / "hf", end_id=None)
    assert same_bits(model, weights.load_hf(tmp_path / "hf"))


def test_save_in_another_precision(tmp_path: Path) -> None:
    model = random_model(TINY, torch.float32)
    weights.save(model, tmp_path, torch.bfloat16)
    assert same_bits(weights.load(tmp_path), model.to(torch.bfloat16))


def test_tied_head_is_stored_once(tmp_path: Path) -> None:
    weights.save(random_model(TINY, torch.float32), tmp_path)
    stored = safetensors.torch.load_file(tmp_path / WEIGHTS_FILE)
    assert "token_embedding.weight" in stored
    assert "head.weight" not in stored


def test_our_folder_refuses_what_does_not_fit(tmp_path: Path) -> None:
    """The same single message as for their folders, and the file's name for a broken configuration."""
    weights.save(random_model(TINY, torch.float32), tmp_path)
    change_tensors(tmp_path, lambda t: t.update(extra=t.pop("norm_f.bias")))
    with pytest.raises(UserError) as caught:
        weights.load(tmp_path)
    assert "norm_f.bias: missing, expected shape (8,)" in str(caught.value)
    assert "extra: unexpected, shape (8,)" in str(caught.value)
    path = tmp_path / CONFIG_FILE
    path.write_text(path.read_text().replace("n_head", "n_haed"))
    with pytest.raises(UserError, match=r"model\.json: unknown key 'n_haed' \(did you mean 'n_head'\?\)"):
        weights.load(tmp_path)


# ---------------------------------------------------------------------- precision without reading the weights


def test_stored_dtypes(theirs: GPT2LMHeadModel, tmp_path: Path) -> None:
    """Each parameter's stored type by our names, from whole files and shards, ours and theirs; nothing for pickles."""

    def dtypes(folder: Path) -> dict[str, str]:
        return weights.stored_dtypes(read_hf(folder)[1], folder, is_hf=True)

    names = [name for name, _ in weights.load_hf(written(theirs, tmp_path / "whole", whole)).named_parameters()]
    assert dtypes(tmp_path / "whole") == dict.fromkeys(names, "float64")
    assert dtypes(written(theirs, tmp_path / "shards", shards)) == dict.fromkeys(names, "float64")
    assert dtypes(written(theirs, tmp_path / "pickled", pickled)) == {}
    shutil.copy(tmp_path / "whole" / "model.safetensors", tmp_path / "whole" / "model.fp16.safetensors")  # not loaded
    change_tensors(tmp_path / "whole", lambda t: t.update({k: v.bfloat16() for k, v in t.items() if "wte" in k}))
    assert dtypes(tmp_path / "whole") == dict.fromkeys(names, "float64") | {"token_embedding.weight": "bfloat16"}
    weights.save(random_model(TINY, torch.float16), tmp_path)
    assert set(weights.stored_dtypes(TINY, tmp_path, is_hf=False).values()) == {"float16"}


def written(model: GPT2LMHeadModel, folder: Path, write: Callable[..., None]) -> Path:
    folder.mkdir()
    write(model, folder)
    return folder
