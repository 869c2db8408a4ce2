"""Which engine computes and in which numbers, who guesses, and what `generate` and `chat` say of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import noisy
from tiny import Run, caller, few_merges
from torch import Tensor

from glassgpt.config import ModelConfig, UserError
from glassgpt.config.compute import Compute
from glassgpt.config.speculation import MOST_PROPOSALS, Speculation
from glassgpt.generation import native, opening
from glassgpt.generation.backend import backend, plain, precision_of
from glassgpt.generation.opening import open_guesses, open_model, same_tokens
from glassgpt.generation.plain_runner import PlainRunner
from glassgpt.model import GPT, weights
from glassgpt.model.quantised import quantised_modules, round_to_nearest
from glassgpt.text import Tokenizer

TOKENIZER = few_merges()
CONFIG = ModelConfig(TOKENIZER.vocab_size, context_tokens=48, n_layer=2, n_head=2, width=32)
PLAIN = ("--engine", "plain")


def saved(model: GPT, folder: Path, tokenizer: Tokenizer = TOKENIZER) -> Path:
    folder.mkdir()
    weights.save(model, folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(noisy(CONFIG, torch.float32), tmp_path_factory.mktemp("models") / "large")


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = ModelConfig(TOKENIZER.vocab_size, context_tokens=48, n_layer=1, n_head=2, width=16)
    return saved(noisy(small, torch.float32), tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def generate(capsys: pytest.CaptureFixture[str]) -> Run:
    return caller("generate", capsys)


@pytest.fixture
def chat(capsys: pytest.CaptureFixture[str]) -> Run:
    return caller("chat", capsys)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(*_: object, **__: object) -> None:
        raise native.Unavailable("no C++ compiler found")

    monkeypatch.setattr(native, "open_model", unavailable)


class Fake:
    """Stands for the native engine: PyTorch under another name, which remembers how it was opened."""

    def __init__(self, model: GPT | native.ModelFile, **asked: Any) -> None:
        if isinstance(model, native.ModelFile):
            raise native.Unfit("a network is needed")
        self.config, self.asked = model.config, asked
        self.precision, self.activations, self.cache = asked["precision"], asked["activations"], asked["cache"]
        self.stored = precision_of(model)
        self._model = model.float()

    def start(self, n_ids: int | None = None) -> PlainRunner:
        return PlainRunner(self._model, n_ids)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "open_model", Fake)


def told(result: Any) -> dict[str, Any]:
    assert (result.code, result.err) == (0, "")
    return dict(json.loads(result.out))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(20)[None]).double()


# ---------------------------------------------------------------------- engines


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_pytorch_computes_and_says_so_once(generate: Run, model: Path) -> None:
    flags = ("the cat", "--temperature", 0, "--seed", 1, "--json")
    result = generate(model, *flags)
    assert result.err == "note: no C++ compiler found; computing with PyTorch, which is slower\n"
    assert json.loads(result.out) == told(generate(model, *flags, *PLAIN))  # who wants PyTorch is told nothing
    assert json.loads(result.out)["engine"] == "plain"
    for wish in (["--engine", "native"], ["--activations", 8, "--precision", "int8"], ["--cache", "int8"]):
        result = generate(model, *flags, *wish)
        assert (result.code, result.out) == (2, "")
        assert result.err == "glassgpt generate: error: the native engine cannot be used: no C++ compiler found\n"


@pytest.mark.usefixtures("fake")
def test_the_native_engine_gets_what_was_asked_for(generate: Run, chat: Run, model: Path) -> None:
    opened = open_model(str(model), "cpu", Compute(precision="int4", activations=8, cache="bfloat16", threads=3))
    assert isinstance(opened.model, Fake)
    asked = {"precision": "int4", "activations": 8, "cache": "bfloat16", "threads": 3, "release": True}
    assert opened.model.asked == asked
    assert opened.used == {"engine": "native", "precision": "int4", "activations": 8, "cache": "bfloat16"}
    assert opened.parameters == sum(p.numel() for p in GPT(CONFIG).parameters())
    flags = ("--temperature", 0, "--json")
    found = told(generate(model, "the cat", *flags))
    assert found["engine"] == "native"
    assert found["completions"] == told(generate(model, "the cat", *flags, *PLAIN))["completions"]
    assert told(chat(model, "--message", "hi", *flags))["engine"] == "native"
    assert told(chat(model, "--message", "hi", *flags, *PLAIN))["engine"] == "plain"
    assert told(generate(model, "the cat", *flags, "--dtype", "float64"))["precision"] == "float64"  # it has no float64


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16", "float64"])
def test_weights_reach_it_as_they_are_stored(stored: str) -> None:
    """But it computes in float32, as PyTorch does here."""
    found = backend(noisy(CONFIG, getattr(torch, stored)), Compute())
    assert isinstance(found, Fake)
    assert (found.stored, found.asked["precision"]) == (stored, "float32")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64])
def test_pytorch_computes_in_float32_unless_told(stored: torch.dtype) -> None:
    as_is = plain(noisy(CONFIG, stored), Compute())
    assert precision_of(as_is) == "float32"
    assert float((logits(as_is) - logits(noisy(CONFIG, stored).float())).abs().max()) == 0
    for name in ("bfloat16", "float64"):
        assert precision_of(plain(noisy(CONFIG, stored), Compute(precision=name))) == name  # type: ignore[arg-type]


@pytest.mark.parametrize(("precision", "bits", "group"), [("int8", 8, None), ("int4", 4, 32)])
def test_pytorch_rounds_to_fewer_bits(precision: Any, bits: int, group: int | None) -> None:
    """Every matrix, and nothing else."""
    found = backend(noisy(CONFIG, torch.float32), Compute(engine="plain", precision=precision))
    assert isinstance(found, GPT)
    expected = noisy(CONFIG, torch.float32)
    names = [name for name, _ in quantised_modules(found)]
    assert len(names) == 1 + 2 * 4
    for name in names:
        weight = expected.get_submodule(name).get_parameter("weight")
        weight.data.copy_(round_to_nearest(weight, bits, group).dequantised())
    assert float((logits(found) - logits(expected)).abs().max()) < 1e-5
    assert precision_of(found) == precision
    with pytest.raises(UserError, match=rf"quantised already \({precision}\); leave out --precision int8"):
        backend(found, Compute(precision="int8"))


def test_options_that_contradict_each_other() -> None:
    for wrong, said in [
        ({"engine": "plain", "activations": 8}, "native engine's"),
        ({"engine": "plain", "cache": "int8"}, "native engine's"),
        ({"engine": "native", "precision": "float64"}, "no float64"),
        ({"engine": "other"}, "engine must be one of auto, plain, native"),
        ({"threads": 0}, "threads must be at least 1"),
    ]:
        with pytest.raises(UserError, match=said):
            Compute(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="leave them out"):
        backend(noisy(CONFIG), Compute(precision="float64", cache="int8"))
    with pytest.raises(UserError, match="computes on a CPU"):
        backend(GPT(CONFIG).to("meta"), Compute(engine="native"))
    assert Compute().with_dtype("bfloat16") == Compute(precision="bfloat16").with_dtype("bfloat16")
    assert Compute(precision="int8").with_dtype(None).precision == "int8"
    with pytest.raises(UserError, match="--dtype is the older name of --precision; got float32 and int8"):
        Compute(precision="int8").with_dtype("float32")


# ---------------------------------------------------------------------- guesses


def test_guesses_make_the_same_greedy_text(generate: Run, chat: Run, model: Path, draft: Path) -> None:
    """With the acceptance in the JSON; stop texts, several prompts and streaming work the same."""
    flags = ("--precision", "float64", "--temperature", 0, "--seed", 1, "--max-new-tokens", 20)
    prompts = ("the cat", "mèo", "7")
    expected = told(generate(model, *prompts, *flags, "--json", "--stop", "e", "the", "--n", 2))
    for who in (["--draft", draft], ["--draft", model], ["--lookup", 2], ["--lookup", 3, "--proposals", 9]):
        found = told(generate(model, *prompts, *flags, "--json", "--stop", "e", "the", "--n", 2, *who))
        counts = found.pop("speculation")
        assert found == expected
        assert counts["tokens"] == sum(len(completion["ids"]) for completion in expected["completions"])
        assert counts["passes"] + counts["accepted"] >= counts["tokens"]
        assert counts["draft"] == (str(who[1]) if who[0] == "--draft" else None)
        assert counts["acceptance"] == counts["accepted"] / counts["proposed"]
        assert generate(model, "the cat", *flags, *who) == generate(model, "the cat", *flags)
        assert chat(model, "--message", "a", "b", *flags, *who) == chat(model, "--message", "a", "b", *flags)
        answer = told(chat(model, "--message", "a", *flags, *who, "--json"))
        assert answer["speculation"]["passes"] >= 1
    assert "speculation" not in expected


def test_a_draft_with_other_tokens_is_refused(generate: Run, model: Path, tmp_path: Path) -> None:
    other = Tokenizer.train(["a different text, with other pairs"] * 9, TOKENIZER.vocab_size)
    assert other.vocab_size == TOKENIZER.vocab_size and not same_tokens(TOKENIZER, other)
    stranger = saved(noisy(CONFIG, torch.float32), tmp_path / "stranger", other)
    result = generate(model, "a", *PLAIN, "--draft", stranger)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert f"the draft {stranger} has another tokenizer" in result.err


def test_mistakes(generate: Run, model: Path) -> None:
    for wrong, said in [
        (["--proposals", 0], f"proposals must be between 1 and {MOST_PROPOSALS}; got 0"),
        (["--proposals", 33], f"proposals must be between 1 and {MOST_PROPOSALS}; got 33"),
        (["--lookup", -1], "lookup must be at least 0; got -1"),
        (["--lookup", 2, "--draft", model], "give --draft MODEL or --lookup N, not both"),
        (["--draft", "no-such-model"], "no model 'no-such-model'"),
    ]:
        result = generate(model, "a", *PLAIN, *wrong)
        assert (result.code, result.out) == (2, "")
        assert said in result.err
        assert result.err.count("\n") == 1


def test_nobody_guesses_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "open_model", lambda *_: pytest.fail("nothing is to be opened"))
    assert open_guesses(Speculation(), TOKENIZER, "cpu", Compute()) is None
    found = open_guesses(Speculation(lookup=4, proposals=7), TOKENIZER, "cpu", Compute())
    assert found is not None
    assert (found.draft, found.lookup, found.proposals) == (None, 4, 7)


def test_a_check_of_vocabulary_sizes_alone_would_not_do() -> None:
    """The mutant of `same_tokens`."""
    sizes: Callable[[Tokenizer, Tokenizer], bool] = lambda one, other: one.vocab_size == other.vocab_size  # noqa: E731
    other = Tokenizer.train(["a different text, with other pairs"] * 9, TOKENIZER.vocab_size)
    assert sizes(TOKENIZER, other) != same_tokens(TOKENIZER, other)
