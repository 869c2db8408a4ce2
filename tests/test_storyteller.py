"""The bundled model is what its card says."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import glassgpt
from glassgpt import data
from glassgpt.cli import main
from glassgpt.config import PRESETS, Pretrain
from glassgpt.config.files import read_yaml
from glassgpt.config.generate import Sampling
from glassgpt.loading import ASSETS, bundled, find_config
from glassgpt.train.evaluate import evaluate

FOLDER = ASSETS / "storyteller"
REPOSITORY = Path(__file__).parent.parent


def test_files() -> None:
    assert bundled() == ["induction", "storyteller"]
    assert (FOLDER / "model.safetensors").stat().st_size < 25_000_000
    config, dtypes = find_config("storyteller")
    assert config == PRESETS["storyteller"]
    assert set(dtypes.values()) == {"bfloat16"}
    card = (FOLDER / "README.md").read_text()
    assert "10,183,680" in card
    assert "@@" not in card


def test_info_finds_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "storyteller", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["parameters"], found["parameters_untied"]) == (10_183_680, 12_805_120)


def test_opens_in_transformers_after_export(tmp_path: Path) -> None:
    assert main(["export", "storyteller", str(tmp_path / "hf"), "--dtype", "float32"]) == 0
    model, tokenizer = glassgpt.load("storyteller")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    text = "Once upon a time there was a \"little\" dog, who couldn't sleep -- not even at 12 o'clock."
    ids = tokenizer.encode(text)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")(text)["input_ids"] == ids
    with torch.no_grad():
        ours, expected = model(torch.tensor([ids])), theirs(torch.tensor([ids])).logits
    assert torch.allclose(ours, expected, rtol=0, atol=1e-4)
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))


def test_predicts_text_that_it_has_not_seen(shared: Path, tmp_path: Path) -> None:
    """A few held-out chapters, well below what an untrained model needs (13 bits a token / 3.8 bytes = 3.4)."""
    marked = gzip.decompress((shared / "corpora" / "childrens_books.txt.gz").read_bytes()).decode()
    (tmp_path / "books.txt").write_text(marked)
    parted = data.shards.hold_out(data.documents([str(tmp_path / "books.txt")]), 0.05)
    held_out = [text for split, text in parted if split == "val"]
    (tmp_path / "held-out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in held_out[:5]))
    found = evaluate(glassgpt.Evaluate("storyteller", sources=(str(tmp_path / "held-out.jsonl"),)))
    assert 1.0 < found["bits_per_byte"] < 1.6


def test_writes_words() -> None:
    """At temperature 0.7 nearly all it writes are words of the language: plain ASCII, few repeated runs."""
    model, tokenizer = glassgpt.load("storyteller")
    (completion,) = glassgpt.complete(
        model, tokenizer, ["Once upon a time"], Sampling(temperature=0.7), max_new_tokens=60, seed=0
    )
    words = completion.text.split()
    assert len(words) > 25
    assert completion.text.isascii()
    assert len(set(words)) > len(words) / 3


@pytest.mark.slow
def test_held_out_bits_per_byte_are_those_of_the_card(shared: Path) -> None:
    """All 340 held-out documents, as the recipe's run held them out (minutes)."""
    sources = read_yaml(REPOSITORY / "recipes" / "storyteller.yaml", Pretrain).data.sources
    found = evaluate(
        glassgpt.Evaluate(
            "storyteller",
            sources=tuple(str(shared / "corpora" / Path(source).name) for source in sources),
            holdout_share=0.05,
            precision="bf16",
        )
    )
    assert found["bits_per_byte"] == pytest.approx(1.4132, abs=0.001)
    assert "**1.413 bits per byte**" in (FOLDER / "README.md").read_text()
