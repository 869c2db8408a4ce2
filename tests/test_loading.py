"""Models by name, and `export` as real programs open it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import tokenizers
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel

import glassgpt
from glassgpt.config import ModelConfig, OptimConfig, UserError
from glassgpt.config.hub import Export
from glassgpt.exporting import export
from glassgpt.loading import find_config, load
from glassgpt.model import GPT, weights
from glassgpt.text import Tokenizer
from glassgpt.train import checkpoint, optim
from glassgpt.train.parallel import Ranks

SHAPE = ModelConfig(vocab_size=300, context_tokens=32, n_layer=2, n_head=2, width=16, mlp_width=48, norm_eps=1e-4)
UNTIED = ModelConfig(vocab_size=310, context_tokens=32, n_layer=1, n_head=4, width=16, tied_head=False)
TEXTS = [
    "the cat sat on the mat",
    "  two spaces, a tab\tand\n\n two lines\r\n",
    "Tiếng Việt có nhiều dấu thanh.",
    "日本語 😀 café naïve 𝔘𝔫𝔦",
    "it's 1234567890 don't I'LL",
    "\x00\x01\x7f",
]


def random_model(config: ModelConfig = SHAPE, seed: int = 0) -> GPT:
    """Noise in every parameter, also in biases and norms."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def logits(model: GPT) -> Tensor:
    return model(torch.arange(24).view(2, 12))


@pytest.fixture
def run(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A run folder with the checkpoints of steps 1 and 2, written as training writes them."""
    for step in (1, 2):
        save_step(tmp_path / "run", step, tokenizer)
    return tmp_path / "run"


def save_step(run: Path, step: int, tokenizer: Tokenizer) -> GPT:
    """The model of a step is random with the step as its seed."""
    model = random_model(seed=step)
    optimizers = optim.build(model, OptimConfig())
    checkpoint.save(run, step, model, optimizers, tokenizer, {"loss": 1.0}, Ranks(torch.device("cpu")))
    return model


@pytest.fixture
def ours(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A folder of ours."""
    return our_folder(tmp_path / "ours", random_model(), tokenizer)


def our_folder(folder: Path, model: GPT, tokenizer: Tokenizer) -> Path:
    folder.mkdir()
    weights.save(model, folder)
    tokenizer.save(folder)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


# ---------------------------------------------------------------------- load


def test_hugging_face_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """What `transformers` wrote opens with `glassgpt.load`, with the tokenizer beside it."""
    shape = {"vocab_size": 300, "n_positions": 32, "n_layer": 2, "n_head": 2, "n_embd": 16}
    theirs = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    model, text = glassgpt.load(str(tmp_path), dtype=None)
    assert not model.training
    assert text.sha256 == tokenizer.sha256
    ids = torch.tensor([text.encode("the cat sat there")])
    with torch.no_grad():
        assert float((model(ids) - theirs(ids).logits).abs().max()) < 1e-10
    assert {p.dtype for p in load(tmp_path)[0].parameters()} == {torch.float32}
    assert {p.dtype for p in load(tmp_path, dtype=torch.bfloat16)[0].parameters()} == {torch.bfloat16}


def test_run_folder_gives_the_newest_checkpoint(run: Path) -> None:
    model, _ = load(run)
    assert torch.equal(logits(model), logits(random_model(seed=2)))
    model, _ = load(run / "checkpoints" / "step-000001")  # an older one by its own name
    assert torch.equal(logits(model), logits(random_model(seed=1)))


def test_newest_is_by_number(run: Path, tokenizer: Tokenizer) -> None:
    """Step 1000000 is newer than step 999999, though its name sorts before it."""
    for step in (999_999, 1_000_000):
        save_step(run, step, tokenizer)
    assert torch.equal(logits(load(run)[0]), logits(random_model(seed=1_000_000)))


def without_its_last_file(folder: Path) -> None:
    (folder / "complete.json").unlink()


def half_of_the_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def not_renamed_yet(folder: Path) -> None:
    folder.rename(folder.with_name(f".tmp-{folder.name}-123"))


def broken_complete_file(folder: Path) -> None:
    (folder / "complete.json").write_text('{"step": 3, "fil')


@pytest.mark.parametrize(
    "damage", [without_its_last_file, half_of_the_weights, without_weights, not_renamed_yet, broken_complete_file]
)
def test_half_written_checkpoint_is_ignored(damage: Callable[[Path], None], run: Path, tokenizer: Tokenizer) -> None:
    """A newer checkpoint that a crash or a cut copy left incomplete gives way to the one before."""
    save_step(run, 3, tokenizer)
    damage(run / "checkpoints" / "step-000003")
    assert torch.equal(logits(load(run)[0]), logits(random_model(seed=2)))


def test_run_without_a_complete_checkpoint(run: Path) -> None:
    for folder in (run / "checkpoints").iterdir():
        without_its_last_file(folder)
    with pytest.raises(UserError, match="no complete checkpoint yet"):
        load(run)


def test_folder_without_model(tmp_path: Path) -> None:
    """The message lists what was looked for."""
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert all(name in str(caught.value) for name in ("model.json", "config.json", "checkpoints/step-*"))


def test_file_instead_of_folder(ours: Path) -> None:
    with pytest.raises(UserError, match="give the folder"):
        load(ours / "model.safetensors")


def test_unknown_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it looked (here, bundled, the hub's cache) and the command that would fetch it."""
    import huggingface_hub.constants

    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load("acme/nowhere")
    message = str(caught.value)
    assert "\n" not in message
    assert "'acme/nowhere'" in message
    assert str(tmp_path) in message
    assert "bundled model" in message
    assert huggingface_hub.constants.HF_HUB_CACHE in message
    assert "glassgpt download acme/nowhere" in message
    with pytest.raises(UserError, match="gpt2-xl is also a preset"):
        load("gpt2-xl")


@pytest.mark.parametrize("name", ["a/b/c", "two words", "x" * 300, "Once upon a time. " * 300, "nul\0byte"])
def test_name_that_nothing_can_have(name: str) -> None:
    """Not a hub id, longer than a file name may be: still one UserError."""
    with pytest.raises(UserError, match="no model"):
        load(name)


def test_tokenizer_of_another_size(ours: Path) -> None:
    """Ids that the model does not have would be out of its embedding."""
    Tokenizer.train([*TEXTS, "the cat sat on the mat, and then another cat sat there too. "] * 5, 310).save(ours)
    with pytest.raises(UserError, match="310 ids, the model 300"):
        load(ours)


def test_tokenizer_missing(ours: Path) -> None:
    (ours / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer found"):
        load(ours)


def test_device_that_is_not_there(ours: Path) -> None:
    with pytest.raises(UserError, match="device 'toaster' is not one of auto, cpu, cuda, mps"):
        load(ours, device="toaster")


def test_find_config_reads_headers_only(ours: Path) -> None:
    """Shape and stored types are known although the weights themselves are cut off."""
    config, dtypes = find_config(ours)
    assert config == SHAPE
    assert set(dtypes.values()) == {"float32"}
    assert set(dtypes) == {name for name, _ in random_model().named_parameters()}


# ---------------------------------------------------------------------- export


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("config", [SHAPE, UNTIED])
def test_transformers_opens_an_export(
    config: ModelConfig, dtype: torch.dtype, tolerance: float, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Real `transformers`: weights, logits, token ids of several texts, decoding, and where to stop."""
    model = random_model(config).to(dtype)
    folder = export(Export(str(our_folder(tmp_path / "ours", model, tokenizer)), str(tmp_path / "hf")))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert same({name: p.detach() for name, p in theirs.named_parameters()}, weights.hf_tensors(model))
    ids = torch.randint(300, (3, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids)
        assert float((theirs(ids).logits - expected).abs().max() / expected.abs().max()) < tolerance
    text = AutoTokenizer.from_pretrained(folder)
    for sample in TEXTS:
        assert text(sample)["input_ids"] == tokenizer.encode(sample)
        assert text.decode(tokenizer.encode(sample), clean_up_tokenization_spaces=False) == sample
    assert text(TEXTS)["input_ids"] == tokenizer.encode_batch(TEXTS)
    assert text.eos_token_id == tokenizer.end_id
    assert text.model_max_length == config.context_tokens
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.eos_token_id, generation.bos_token_id) == (tokenizer.end_id, tokenizer.end_id)


def test_export_load_export_is_bit_exact(run: Path, tmp_path: Path) -> None:
    """A run exported, the export exported again: equal tensors, equal tokenizer, equal configuration."""
    first = export(Export(str(run), str(tmp_path / "first")))
    second = export(Export(str(first), str(tmp_path / "second")))
    assert same(tensors(first), tensors(second))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (first / name).read_text() == (second / name).read_text()
    assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in second.iterdir())
    model, _ = load(first)
    assert torch.equal(logits(model), logits(random_model(seed=2)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_export_dtype(dtype: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The asked precision is written, config.json says so; as-is keeps what is stored."""
    model = random_model().double()
    ours = our_folder(tmp_path / "ours", model, tokenizer)
    asked = getattr(torch, dtype)
    folder = export(Export(str(ours), str(tmp_path / dtype), dtype=dtype))
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    assert same(tensors(folder), weights.hf_tensors(model, asked))
    assert {t.dtype for t in tensors(folder).values()} == {asked}
    kept = export(Export(str(folder), str(tmp_path / "kept")))
    assert same(tensors(folder), tensors(kept))


def test_export_never_overwrites(ours: Path, tmp_path: Path) -> None:
    target = tmp_path / "there"
    target.mkdir()
    (target / "precious").write_text("1")
    with pytest.raises(UserError, match="never overwritten"):
        export(Export(str(ours), str(target)))
    assert [path.name for path in target.iterdir()] == ["precious"]


def test_export_appears_complete_or_not_at_all(ours: Path, tmp_path: Path, full_disk: Callable[[int], object]) -> None:
    """The disk fills up in the middle of the weights: an error, and nothing is left."""
    before = sorted(tmp_path.iterdir())
    with full_disk(4096), pytest.raises(UserError, match="cannot write"):
        export(Export(str(ours), str(tmp_path / "new")))
    assert sorted(tmp_path.iterdir()) == before


def test_export_without_end_of_text(tmp_path: Path, ours: Path) -> None:
    """A tokenizer without an end-of-text token exports without naming one."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(ours / "tokenizer.json"))
    folder = export(Export(str(ours), str(tmp_path / "hf")))
    assert not (folder / "generation_config.json").exists()
    assert AutoTokenizer.from_pretrained(folder)("hello")["input_ids"] == load(ours)[1].encode("hello")
    assert AutoModelForCausalLM.from_pretrained(folder).config.eos_token_id is None


def test_moved_run_still_loads(run: Path, tmp_path: Path) -> None:
    """Nothing in a run depends on where it is."""
    shutil.copytree(run, tmp_path / "elsewhere")
    shutil.rmtree(run)
    assert torch.equal(logits(load(tmp_path / "elsewhere")[0]), logits(random_model(seed=2)))


def test_the_token_that_begins_texts_is_exported(tmp_path: Path) -> None:
    """Not the one that ends them, where a vocabulary has both."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "<s>": 1, "</s>": 2}, []))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    weights.save(GPT(dataclasses.replace(SHAPE, vocab_size=3)), tmp_path)
    Tokenizer(backend).save(tmp_path)
    out = export(Export(str(tmp_path), str(tmp_path / "out")))
    for name in ("config.json", "generation_config.json"):
        values = json.loads((out / name).read_text())
        assert (values["bos_token_id"], values["eos_token_id"]) == (1, 2), name
    facts = json.loads((out / "tokenizer_config.json").read_text())
    assert (facts["bos_token"], facts["eos_token"]) == ("<s>", "</s>")
