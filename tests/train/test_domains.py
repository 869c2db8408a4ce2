"""Several domains in one run, one run after another, documents kept apart, activations computed again."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import small
import torch
from small import identical

import glassgpt
from glassgpt.config import DataConfig, Pretrain, UserError, preset
from glassgpt.data import Corpus, corpus
from glassgpt.loading import complete_checkpoints
from glassgpt.model import GPT
from glassgpt.text import Tokenizer
from glassgpt.train import ledger
from glassgpt.train.loss import token_loss
from glassgpt.train.pretrain import pretrain
from glassgpt.train.run import read_log

WORDS = {
    "cats": "the a cat kitten sat ran saw ate on in under mat box red old new and then but so".split(),
    "ships": "every ship sails over seven stormy seas with brave crew beneath white canvas towards harbour lights".split(),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two files of 200 documents each, of different words."""
    folder, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    paths = {}
    for name, words in WORDS.items():
        paths[name] = folder / f"{name}.jsonl"
        lines = [json.dumps({"text": " ".join(draw.choices(words, k=draw.randint(3, 12))) + ".\n"}) for _ in range(200)]
        paths[name].write_text("\n".join(lines))
    return paths


settings = functools.partial(small.settings, max_steps=12, batch_size=4, eval_interval=6, save_interval=6)


def again_from_the_middle(run: Path, copy: Path, config: Pretrain) -> Path:
    """The run without its last checkpoint, taken up again elsewhere."""
    shutil.copytree(run, copy)
    shutil.rmtree(complete_checkpoints(copy)[-1])
    assert len(complete_checkpoints(copy)) == 1
    return pretrain(dataclasses.replace(config, out_dir=str(copy), resume=True))


def seen(run: Path, config: Pretrain) -> Counter[str]:
    """Windows that the run has trained on, by domain."""
    texts: Corpus = corpus.read(run / "shards", Tokenizer.load(run))
    stream = texts.stream(32, config.batch_size, config.accumulation_steps, 1, config.seed, None)
    places = [place for step in range(250) for place in stream.places(step)]  # a period of the mixture
    return Counter(texts.trained[place.domain].name for place in places)


# ---------------------------------------------------------------------- mixtures


def test_weights_mix_domains_and_each_is_measured(texts: dict[str, Path], tmp_path: Path) -> None:
    config = settings(tmp_path / "run", *texts.values(), data={"weights": (3.0, 1.0)})
    run = pretrain(config)
    assert seen(run, config) == {"cats": 750, "ships": 250}
    measured = [entry for entry in read_log(run) if "val_loss" in entry]
    assert [entry["step"] for entry in measured] == [6, 12]
    for entry in measured:
        parts = entry["domains"]
        assert list(parts) == ["cats", "ships"]
        tokens = sum(part["tokens"] for part in parts.values())
        assert entry["val_tokens"] == tokens
        assert entry["val_loss"] == pytest.approx(sum(p["loss"] * p["tokens"] for p in parts.values()) / tokens, rel=1e-12)
        low, high = sorted(part["bits_per_byte"] for part in parts.values())
        assert low < entry["val_bits_per_byte"] < high
    (row,) = ledger.read(run)
    assert row == {"after": "run", "domains": measured[-1]["domains"]}
    assert identical(run, again_from_the_middle(run, tmp_path / "copy" / "run", config))


def test_without_weights_sources_are_one_domain(texts: dict[str, Path], tmp_path: Path) -> None:
    run = pretrain(settings(tmp_path / "run", *texts.values(), max_steps=2))
    assert "domains" not in read_log(run)[-1]
    assert list(ledger.read(run)[0]["domains"]) == ["cats+1"]


# ---------------------------------------------------------------------- documents kept apart


def test_masked_documents_cost_what_they_cost_alone(texts: dict[str, Path], tmp_path: Path) -> None:
    """The loss of the first step, document by document; the end token belongs to the document that it ends."""
    config = settings(tmp_path / "run", texts["cats"], data={"mask_documents": True}, max_steps=1)
    run = pretrain(config)
    tokenizer = Tokenizer.load(run)
    batch = corpus.read(run / "shards", tokenizer).stream(32, 4, 1, 1, config.seed, None).batch(0)
    torch.manual_seed(config.seed)
    model = GPT(preset("tiny", vocab_size=tokenizer.vocab_size))
    nats, documents = 0.0, 0
    for ids, targets in zip(batch.ids, batch.targets, strict=True):
        ends = [place + 1 for place in range(31) if ids[place] == tokenizer.end_id]
        for first, last in zip([0, *ends], [*ends, 32], strict=True):
            documents += 1
            nats += token_loss(model(ids[None, first:last]), targets[None, first:last]).sum.item()
    assert documents > 8
    assert read_log(run)[0]["loss"] == pytest.approx(nats / batch.count, abs=1e-5)
    plain = pretrain(settings(tmp_path / "plain", texts["cats"], max_steps=1))
    assert abs(read_log(plain)[0]["loss"] - read_log(run)[0]["loss"]) > 1e-5
    whole = config.max_steps - 1
    assert abs(read_log(plain)[whole]["val_loss"] - read_log(run)[whole]["val_loss"]) > 1e-5  # validation keeps them apart too


# ---------------------------------------------------------------------- activations


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_computing_activations_again_changes_nothing(texts: dict[str, Path], tmp_path: Path, dropout: float) -> None:
    shape = preset("tiny", vocab_size=300, dropout=dropout)
    runs = [
        pretrain(settings(tmp_path / str(again), texts["cats"], model=shape, checkpoint_activations=again))
        for again in (False, True)
    ]
    a, b = ([(entry["loss"], entry["grad_norm"]) for entry in read_log(run)] for run in runs)
    assert a == b
    assert identical(*runs)


# ---------------------------------------------------------------------- one run after another


@pytest.fixture(scope="module")
def first(texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain(settings(tmp_path_factory.mktemp("chain") / "first", texts["cats"], max_steps=40))


@pytest.mark.parametrize("replay_share", [0.0, 0.25])
def test_a_second_stage(texts: dict[str, Path], first: Path, tmp_path: Path, replay_share: float) -> None:
    data = {"replay_share": replay_share}
    config = settings(
        tmp_path / "second", texts["ships"], data=data, start=str(first), model=preset("tiny", vocab_size=300, dropout=0.1)
    )
    run = pretrain(config)
    assert Tokenizer.load(run).sha256 == Tokenizer.load(first).sha256
    replayed = round(1000 * replay_share)
    assert seen(run, config) == {name: n for name, n in (("cats", replayed), ("ships", 1000 - replayed)) if n}
    before, after = ledger.read(run)
    assert (before["after"], after["after"]) == ("first", "second")
    for row in (before, after):
        assert list(row["domains"]) == ["cats", "ships"]
    # the first stage's own last number on its domain, measured again with the same weights
    own = read_log(first)[-1]["val_loss"]
    assert before["domains"]["cats"]["loss"] == pytest.approx(own, rel=1e-6)
    last = read_log(run)[-1]
    assert after["domains"] == last["domains"]
    assert last["val_loss"] == last["domains"]["ships"]["loss"]  # the best checkpoint is the best on this stage's text
    assert after["domains"]["ships"]["loss"] < before["domains"]["ships"]["loss"]
    assert (run / "forgetting.svg").exists() and (run / "forgetting.png").exists()
    # and it begins from the weights of the first
    weights = glassgpt.load(str(first))[0]
    assert dict(weights.named_parameters()).keys() == dict(glassgpt.load(str(run))[0].named_parameters()).keys()

    copy = again_from_the_middle(run, tmp_path / "copy" / "second", config)
    assert identical(run, copy)
    assert ledger.read(copy) == ledger.read(run)
    fresh = tmp_path / "early" / "second"  # killed before its first checkpoint
    shutil.copytree(run, fresh)
    shutil.rmtree(fresh / "checkpoints")
    pretrain(dataclasses.replace(config, out_dir=str(fresh), resume=True))
    assert identical(run, fresh)


def test_three_stages_remember_the_first(texts: dict[str, Path], first: Path, tmp_path: Path) -> None:
    second = pretrain(settings(tmp_path / "second", texts["ships"], start=str(first), max_steps=2))
    third = pretrain(settings(tmp_path / "third", texts["cats"], data={"replay_share": 0.5}, start=str(second), max_steps=2))
    rows = ledger.read(third)
    assert [row["after"] for row in rows] == ["first", "second", "third"]
    assert [list(row["domains"]) for row in rows] == [["cats", "ships"], ["cats", "ships", "cats-2"], ["cats", "ships", "cats-2"]]
    stages = {
        domain.name: (domain.stage, domain.share > 0) for domain in corpus.read(third / "shards", Tokenizer.load(third)).domains
    }
    assert stages == {"cats": (0, True), "ships": (1, True), "cats-2": (2, True)}


def test_the_shape_is_the_starting_models(texts: dict[str, Path], first: Path, tmp_path: Path) -> None:
    for changes in ({"n_layer": 3}, {"vocab_size": 301}):
        with pytest.raises(UserError, match=r"--start keeps the shape of .*; of --model only model.dropout may be given"):
            pretrain(
                settings(
                    tmp_path / "run", texts["cats"], start=str(first), model=preset("tiny", **({"vocab_size": 300} | changes))
                )
            )


def test_a_published_model_has_nothing_to_replay(texts: dict[str, Path], tmp_path: Path) -> None:
    config = settings(tmp_path / "run", texts["cats"], data={"replay_share": 0.1}, start="storyteller", model=Pretrain().model)
    with pytest.raises(UserError, match="nothing to replay"):
        pretrain(config)


def test_replaying_needs_a_start() -> None:
    with pytest.raises(UserError, match="needs --start RUN"):
        Pretrain(data=DataConfig(replay_share=0.5))
