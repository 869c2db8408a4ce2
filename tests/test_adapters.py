"""Adapters by name: `load`, `info`, `export` and `merge` of a folder that holds low-rank matrices and the name of their base."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

import glassgpt
from glassgpt.cli import main
from glassgpt.config import ModelConfig, OptimConfig, UserError
from glassgpt.config.folder import ADAPTER_CONFIG_FILE
from glassgpt.config.generate import Sampling
from glassgpt.config.hub import Export, Merge
from glassgpt.config.model import MoeConfig
from glassgpt.config.tuning import LoraConfig
from glassgpt.exporting import export, merge
from glassgpt.generation import complete
from glassgpt.loading import find, find_config, load
from glassgpt.model import GPT, lora, weights
from glassgpt.text import Tokenizer
from glassgpt.train import checkpoint, optim
from glassgpt.train.parallel import Ranks

SHAPE = ModelConfig(vocab_size=300, context_tokens=32, n_layer=2, n_head=2, width=16)
MODERN = ModelConfig(
    300, 32, 2, 4, 16, position="rope", norm="rms", mlp="swiglu", bias=False, n_kv_head=2, tied_head=False
)  # fmt: skip
SHARED_EXPERTS = ModelConfig(300, 32, 2, 2, 16, moe=MoeConfig(4, 2, shared=1))
BAR = 1e-4  # of logits up to 5 in float32; measured 1.3e-5 at most
SHAPES = {"GPT-2": SHAPE, "Llama": MODERN, "no architecture's": SHARED_EXPERTS}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        yield


def random_model(config: ModelConfig = SHAPE, seed: int = 0) -> GPT:
    """Noise in every parameter, also in biases and norms."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def with_adapters(model: GPT, seed: int = 0) -> GPT:
    """Numbers in A and B alike."""
    lora.add(model, LoraConfig(rank=2, alpha=5.0), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in lora.adapters(model).values():
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found = model(torch.arange(24).view(2, 12))
    return found if isinstance(found, Tensor) else found.logits


def same(a: GPT, b: GPT) -> bool:
    """Bit for bit."""
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def base_folder(folder: Path, tokenizer: Tokenizer, config: ModelConfig = SHAPE) -> Path:
    folder.mkdir(parents=True)
    weights.save(random_model(config), folder)
    tokenizer.save(folder)
    return folder


def adapter_folder(folder: Path, base: str | Path, model: GPT | None = None, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    lora.save_adapter(with_adapters(model or random_model(), seed), folder, str(base))
    return folder


@pytest.fixture
def base(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    return base_folder(tmp_path / "base", tokenizer)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return adapter_folder(tmp_path / "adapter", base)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rename_base(adapter: Path, name: object) -> Path:
    path = adapter / ADAPTER_CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))
    return adapter


# ---------------------------------------------------------------------- load


@pytest.mark.parametrize("name", SHAPES)
def test_an_adapter_loads_as_the_sum(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A plain model, of the tuned one's logits; with `merge=False`, the tuned one bit for bit. The base keeps its bytes."""
    base = base_folder(tmp_path / "base", tokenizer, SHAPES[name])
    before = bytes_of(base)
    tuned = with_adapters(random_model(SHAPES[name]))
    (tmp_path / "adapter").mkdir()
    lora.save_adapter(tuned, tmp_path / "adapter", str(base))
    model, text = load(tmp_path / "adapter")
    assert lora.adapters(model) == {} and type(model) is GPT and not model.training
    assert model.state_dict().keys() == random_model(SHAPES[name]).state_dict().keys()
    assert difference(logits(model), logits(tuned)) < BAR
    assert difference(logits(model), logits(random_model(SHAPES[name]))) > 0.1
    assert text.sha256 == tokenizer.sha256
    apart, _ = load(tmp_path / "adapter", merge=False)
    assert same(apart, tuned)
    with lora.disabled(apart):
        assert torch.equal(logits(apart), logits(load(base)[0]))
    assert bytes_of(base) == before


def test_the_sum_is_made_in_the_precision_that_is_asked_for(base: Path, tmp_path: Path) -> None:
    """Not in that of a base stored in half as many digits."""
    weights.save(random_model(), base, torch.bfloat16)
    tuned = with_adapters(load(base)[0])
    (tmp_path / "adapter").mkdir()
    lora.save_adapter(tuned, tmp_path / "adapter", str(base))
    assert difference(logits(load(tmp_path / "adapter")[0]), logits(tuned)) < BAR
    wide, _ = load(tmp_path / "adapter", dtype=torch.float64)
    assert difference(logits(wide), logits(tuned.double())) < 1e-12
    stored, _ = load(tmp_path / "adapter", dtype=None)
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
    assert torch.equal(stored.blocks[1].mlp.up.weight, wide.blocks[1].mlp.up.weight.bfloat16())


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_an_adapter_of_peft_upon_an_export(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The base is the folder that `transformers` opened."""
    ours = base_folder(tmp_path / "ours", tokenizer, SHAPES[name])
    hf = export(Export(str(ours), str(tmp_path / "hf")))
    oracle = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    targets = ["c_attn", "c_fc"] if name == "GPT-2" else ["q_proj", "v_proj", "down_proj"]
    options = {"fan_in_fan_out": name == "GPT-2", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    tuned = peft.get_peft_model(oracle, peft.LoraConfig(r=4, lora_alpha=3, target_modules=targets, **options)).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    model, text = load(tmp_path / "adapter")
    assert difference(logits(model), logits(tuned)) < BAR
    assert difference(logits(model), logits(random_model(SHAPES[name]))) > 0.1
    assert text.sha256 == tokenizer.sha256
    ours_again = adapter_folder(tmp_path / "again", hf, random_model(SHAPES[name]))
    with_ours = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32), ours_again
    ).eval()
    assert difference(logits(with_ours), logits(load(ours_again)[0])) < BAR


def test_a_run_whose_checkpoints_hold_adapters_alone(base: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The newest complete one, with the tokenizer that it brings."""
    run, tuned = tmp_path / "run", {}
    for step in (1, 2, 3):
        tuned[step] = with_adapters(random_model(), seed=step)
        optimizers = optim.build(tuned[step], OptimConfig())
        ranks = Ranks(torch.device("cpu"))
        checkpoint.save(run, step, tuned[step], optimizers, tokenizer, {"loss": 1.0}, ranks, base=str(base))
    (run / "checkpoints" / "step-000003" / lora.ADAPTER_FILE).write_bytes(b"half")
    assert find(run).folder.name == "step-000002" and find(run).base is not None
    assert not list(run.rglob("model*"))
    assert difference(logits(load(run)[0]), logits(tuned[2])) < BAR
    resumed = with_adapters(random_model(), seed=7)
    assert checkpoint.restore(find(run).folder, resumed, optim.build(resumed, OptimConfig())) == 2
    assert same(resumed, tuned[2])


@pytest.mark.parametrize("how", ["absolute", "beside", "above", "current", "home", "run"])
def test_where_the_base_is_looked_for(how: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"beside": "adapter/its base", "current": "here/base", "home": "me/base", "run": "run/checkpoints/step-000001"}
    folder = base_folder(tmp_path / places.get(how, "base"), tokenizer)
    if how == "run":
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        (folder / "complete.json").write_text(json.dumps({"step": 1, "files": sizes}))
    (tmp_path / "here").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    name = {"beside": "its base", "above": "../base", "current": "base", "home": "~/base", "run": "../run"}.get(how, str(folder))
    (tmp_path / "adapter").mkdir(exist_ok=True)
    lora.save_adapter(with_adapters(random_model()), tmp_path / "adapter", name)
    found = find(tmp_path / "adapter").stored()
    assert found.folder.resolve() == folder
    assert difference(logits(load(os.path.relpath(tmp_path / "adapter"))[0]), logits(with_adapters(random_model()))) < BAR


def test_a_bundled_base(tmp_path: Path) -> None:
    plain, tokenizer = load("storyteller")
    folder = adapter_folder(tmp_path / "adapter", "storyteller", load("storyteller")[0])
    model, text = load(folder)
    assert text.sha256 == tokenizer.sha256
    assert difference(logits(model), logits(plain)) > 0.1
    assert find_config(folder) == find_config("storyteller")


def test_a_base_from_the_hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the cache as `glassgpt download` leaves it; none is fetched."""
    import huggingface_hub

    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    repo = cache / "models--acme--base"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    shutil.copytree(export(Export(str(base), str(tmp_path / "hf"))), repo / "snapshots" / ("0" * 40))
    monkeypatch.setattr(
        "glassgpt.loading._snapshot",
        lambda name, **options: Path(huggingface_hub.snapshot_download(name, cache_dir=str(cache), **options)),
    )
    folder = adapter_folder(tmp_path / "adapter", "acme/base")
    assert difference(logits(load(folder)[0]), logits(with_adapters(random_model()))) < BAR


def test_an_adapter_upon_an_adapter(adapter: Path, tmp_path: Path) -> None:
    """Tuned once more from what was tuned: the lower one is in the weights."""
    lower, _ = load(adapter)
    upper = adapter_folder(tmp_path / "upper", "../adapter", load(adapter)[0], seed=4)
    expected = with_adapters(lower, seed=4)
    assert difference(logits(load(upper)[0]), logits(expected)) < BAR
    assert same(load(upper, merge=False)[0], expected)
    assert find(upper).stored().folder == tmp_path / "adapter" / tmp_path / "base"
    assert find_config(upper) == find_config(tmp_path / "base")


def test_the_tokenizer_of_the_adapter_goes_before_the_bases(adapter: Path, base: Path, tokenizer: Tokenizer) -> None:
    other = Tokenizer.train(["quite another text, with other words in it\n"] * 20, 290)
    other.save(adapter)
    assert load(adapter)[1].sha256 == other.sha256 != tokenizer.sha256
    (adapter / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"adapter/tokenizer.json: cannot read the tokenizer"):  # not silently the base's
        load(adapter)


# ---------------------------------------------------------------------- what goes wrong


def test_a_base_that_is_nowhere(adapter: Path) -> None:
    path = adapter / ADAPTER_CONFIG_FILE
    for name in ("nowhere", "../nowhere", "/no/where", "acme/nowhere", "two words"):
        with pytest.raises(UserError, match=f"names the base '{name}': no model '{name}'") as caught:
            load(rename_base(adapter, name))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    for empty in ("", " ", None):
        with pytest.raises(UserError, match="base_model_name_or_path is empty"):
            load(rename_base(adapter, empty))


@pytest.mark.parametrize("name", [".", "../adapter", "../other"])
def test_an_adapter_that_leads_back_to_itself(name: str, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(rename_base(adapter, "../adapter"), tmp_path / "other")
    rename_base(adapter, name)
    with pytest.raises(UserError, match="base_model_name_or_path leads back to this adapter"):
        find(adapter)


def test_another_base(adapter: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Every tensor that does not fit is named, and the base."""
    base_folder(tmp_path / "wide", tokenizer, ModelConfig(300, 32, 2, 2, 24))
    with pytest.raises(UserError, match=r"does not fit the model; it was made for \.\./wide") as caught:
        load(rename_base(adapter, "../wide"))
    message = str(caught.value)
    assert "h.0.attn.c_attn.lora_A.weight: torch.float32, shape (2, 16); expected numbers of shape (2, 24)" in message
    assert len(message.splitlines()) == 1 + 2 * 2 * 4


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        (lora.ADAPTER_FILE, b"\x10\0\0\0\0\0\0\0{}", "adapter_model.safetensors: truncated or not a weights file"),
        (lora.ADAPTER_FILE, None, "no weights of the adapter; looked for adapter_model.safetensors"),
        (ADAPTER_CONFIG_FILE, b"{", "adapter_config.json: cannot read"),
        (ADAPTER_CONFIG_FILE, b"\xff\xfe", "adapter_config.json: cannot read"),
        (ADAPTER_CONFIG_FILE, b"[]", "adapter_config.json: expected a JSON object"),
        (ADAPTER_CONFIG_FILE, b"{}", "adapter_config.json: peft_type = '' cannot be represented; expected 'LORA'"),
    ],
)
def test_damaged_files(file: str, content: bytes | None, said: str, adapter: Path) -> None:
    (adapter / file).unlink()
    if content is not None:
        (adapter / file).write_bytes(content)
    with pytest.raises(UserError, match=said):
        load(adapter)


# ---------------------------------------------------------------------- commands


def test_generation_is_the_tuned_models(adapter: Path, tmp_path: Path) -> None:
    """As of the merged folder, token for token."""
    merged = merge(Merge(str(adapter), str(tmp_path / "merged")))
    base = find(adapter).stored().folder
    texts = []
    for folder in (adapter, merged, base):
        (written,) = complete(*load(folder), ["the cat"], Sampling(temperature=0), max_new_tokens=8, seed=0)
        texts.append(written.text)
    assert texts[0] == texts[1] != texts[2]


def test_info_reads_the_bases_headers_alone(adapter: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_config(adapter) == find_config(base)
    assert main(["info", str(adapter), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["stored"] and shown["parameters"] == sum(p.numel() for p in random_model().parameters())


@pytest.mark.parametrize("to", ["glassgpt", "hf"])
def test_merge_writes_a_plain_model(to: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(adapter), "--out-dir", str(tmp_path / "merged"), "--to", to]) == 0
    shown = capsys.readouterr().out
    assert "largest change of a logit by merging: " in shown
    change = float(shown.split("merging: ")[1].split(",")[0])
    assert 0 < change < 1e-4
    found = find(tmp_path / "merged")
    assert found.base is None and found.is_hf == (to == "hf")
    assert same(load(tmp_path / "merged")[0], load(adapter)[0])
    assert not (tmp_path / "merged" / ADAPTER_CONFIG_FILE).exists()
    if to == "hf":
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        assert difference(logits(theirs), logits(load(adapter)[0])) < BAR


def test_merge_measures_what_it_loses(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 loses more than float32, and a sum that is wrong shows."""

    def told(name: str, **options: Any) -> float:
        merge(Merge(str(adapter), str(tmp_path / name), **options))
        return float(capsys.readouterr().out.split("merging: ")[1].split(",")[0])

    exact, rough = told("exact"), told("rough", dtype="bfloat16")
    assert exact < 1e-4 < 1e-3 < rough
    stored = safetensors.torch.load_file(tmp_path / "rough" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    sum_of = lora.LoraLinear.merged
    monkeypatch.setattr(lora.LoraLinear, "merged", lambda self: sum_of(self) + 1e-2)
    assert told("wrong") > 1e-2


def test_export_of_an_adapter_is_its_sum(adapter: Path, tmp_path: Path) -> None:
    a = export(Export(str(adapter), str(tmp_path / "a"), to="glassgpt"))
    b = merge(Merge(str(adapter), str(tmp_path / "b")))
    assert bytes_of(a) == bytes_of(b)
    gguf = merge(Merge(str(adapter), str(tmp_path / "c"), to="gguf"))
    assert [path.name for path in gguf.iterdir()] == ["model.gguf"]


def test_merge_of_what_is_no_adapter(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(base), "--out-dir", str(tmp_path / "merged")]) == 2
    assert "holds a whole model and no adapter, so there is nothing to merge" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_merge_appears_complete_or_not_at_all(adapter: Path, tmp_path: Path, full_disk: Callable[[int], Any]) -> None:
    before = sorted(tmp_path.iterdir())
    with full_disk(4096), pytest.raises(UserError, match="cannot write"):
        merge(Merge(str(adapter), str(tmp_path / "merged")))
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(UserError, match="never overwritten"):
        merge(Merge(str(adapter), str(tmp_path / "base")))


def test_the_public_name(adapter: Path) -> None:
    assert same(glassgpt.load(adapter)[0], load(adapter)[0])
