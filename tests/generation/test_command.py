"""`glassgpt generate` as people run it: text, JSON, flags, files, and one clear line for every mistake."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import VIETNAMESE, Result, Run, caller, disturbed, few_merges, scripted

from glassgpt import load
from glassgpt.cli import main
from glassgpt.config import ModelConfig
from glassgpt.config.generate import Sampling
from glassgpt.generation import complete
from glassgpt.model import GPT, weights

TOKENIZER = few_merges()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`glassgpt generate ...` in this process."""
    return caller("generate", capsys)


def saved(model: GPT, folder: Path) -> Path:
    folder.mkdir()
    weights.save(model, folder)
    TOKENIZER.save(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model of 24 tokens of context."""
    config = ModelConfig(TOKENIZER.vocab_size, context_tokens=24, n_layer=2, n_head=2, width=16)
    return saved(disturbed(config), tmp_path_factory.mktemp("models") / "random")


@pytest.fixture(scope="module")
def storyteller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that writes one Vietnamese text."""
    script = scripted(TOKENIZER, TOKENIZER.encode(VIETNAMESE + "<|endoftext|>", allow_special=True))
    return saved(script, tmp_path_factory.mktemp("models") / "scripted")


def in_json(result: Result) -> dict[str, Any]:
    assert (result.code, result.err) == (0, "")
    return dict(json.loads(result.out))


def texts(result: Result) -> list[str]:
    return [completion["text"] for completion in in_json(result)["completions"]]


# ---------------------------------------------------------------------- what is printed


def test_one_text_is_the_prompt_and_its_continuation(run: Run, storyteller: Path) -> None:
    assert run(storyteller, "7", "--temperature", 0) == (0, f"7{VIETNAMESE}\n", "")


def test_several_texts_are_numbered_with_their_reasons(run: Run, storyteller: Path) -> None:
    """In the order of the prompts; the scripted model goes by positions, so both prompts have one token."""
    result = run(storyteller, "7", "8", "--temperature", 0, "--stop", ", thế", "--max-new-tokens", 100)
    assert result == (0, "--- 1/2 (stop)\n7Chào buổi sáng\n--- 2/2 (stop)\n8Chào buổi sáng\n", "")


def test_it_is_streamed(storyteller: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal gets every piece when it is known, each one whole characters."""
    pieces: list[str] = []
    screen = SimpleNamespace(write=pieces.append, flush=lambda: pieces.append("|"), isatty=lambda: False)
    monkeypatch.setattr(sys, "stdout", screen)
    assert main(["generate", str(storyteller), "7", "--temperature", "0"]) == 0
    assert "".join(pieces).replace("|", "") == f"7{VIETNAMESE}\n"
    assert pieces[:6] == ["7", "|", "C", "|", "h", "|"]
    assert not any("�" in piece for piece in pieces)


def test_a_terminal_shows_the_prompt_in_bold(storyteller: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", screen)
    assert main(["generate", str(storyteller), "7", "--temperature", "0", "--stop", " "]) == 0
    assert screen.getvalue() == "\x1b[1m7\x1b[0mChào\n"


def test_json_says_everything(run: Run, model: Path) -> None:
    """The same numbers as from the library, and enough to make the same texts again."""
    flags = ("--seed", 3, "--n", 2, "--top-k", 50, "--max-new-tokens", 6, "--stop", "zz", "--device", "cpu")
    answer = in_json(run(model, "the cat", "mèo", *flags, "--json", "--logprobs", 2))
    assert (answer["model"], answer["seed"]) == (str(model), 3)
    assert answer["sampling"] == vars(Sampling(temperature=0.8, top_k=50))
    gpt, tokenizer = load(model)
    expected = complete(
        gpt, tokenizer, ["the cat", "mèo"], Sampling(0.8, 50), max_new_tokens=6, seed=3, n=2, stop=["zz"], n_top=2
    )
    assert len(answer["completions"]) == 4
    for ours, theirs in zip(answer["completions"], expected, strict=True):
        assert (ours["prompt"], ours["text"]) == (theirs.prompt, theirs.text)
        assert ours["finish_reason"] == theirs.finish_reason == "length"
        assert ours["ids"] == [token.id for token in theirs.tokens]
        for token, t in zip(ours["tokens"], theirs.tokens, strict=True):
            assert (token["id"], token["token"]) == (t.id, tokenizer.decode([t.id]))
            assert token["logprob"] == pytest.approx(t.logprob, abs=1e-5)
            assert [(top["id"], top["token"]) for top in token["top"]] == [(i, tokenizer.decode([i])) for i, _ in t.top]


def test_json_has_tokens_only_when_asked(run: Run, model: Path) -> None:
    (completion,) = in_json(run(model, "the cat", "--json"))["completions"]
    assert set(completion) == {"prompt", "text", "finish_reason", "ids"}
    (completion,) = in_json(run(model, "the cat", "--json", "--logprobs", 0))["completions"]
    assert set(completion["tokens"][0]) == {"id", "token", "logprob"}


def test_log_probabilities_as_a_table(run: Run, model: Path) -> None:
    """Tokens and prompts are shown as they are, also those that look like markup to the printer of tables."""
    result = run(model, "a[/b] :cat: [red]", "--logprobs", 3, "--max-new-tokens", 4, "--seed", 0)
    assert (result.code, result.err) == (0, "")
    assert "'a[/b] :cat: [red]'" in result.out
    rows = [line for line in result.out.splitlines() if line.startswith("│")]
    assert len(rows) >= 4
    plain = in_json(run(model, "a[/b] :cat: [red]", "--logprobs", 3, "--max-new-tokens", 4, "--seed", 0, "--json"))
    for token in plain["completions"][0]["tokens"]:
        assert f"{token['logprob']:.3f}" in result.out


# ---------------------------------------------------------------------- seeds, prompts, flags


def test_seeds(run: Run, model: Path) -> None:
    """The seed that was drawn is told, and makes the same texts again."""
    first = run(model, "the cat", "--n", 3, "--json")
    again = run(model, "the cat", "--n", 3, "--json", "--seed", in_json(first)["seed"])
    assert first == again
    assert len(set(texts(first))) == 3
    assert texts(run(model, "the cat", "--n", 3, "--json", "--seed", 1)) != texts(first)
    assert run(model, "the cat", "--json", "--seed", 10**25).code == 0


@pytest.mark.parametrize("place", ["file", "stdin"])
def test_prompt_from_a_file(run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """As it is, with its line ends; after the prompts of the command line."""
    data = "Chào\nbạn\n".encode()
    (tmp_path / "prompt.txt").write_bytes(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    name = tmp_path / "prompt.txt" if place == "file" else "-"
    flags = ("--max-new-tokens", 3, "--seed", 0, "--json")
    assert [c["prompt"] for c in in_json(run(model, "one", "--prompt-file", name, *flags))["completions"]] == [
        "one",
        "Chào\nbạn\n",
    ]


def test_flags_with_either_line(run: Run, model: Path) -> None:
    flags = {"max-new-tokens": 5, "top-k": 40, "top-p": 0.9, "min-p": 0.01, "repetition-penalty": 1.1}
    dashes = [part for name, value in flags.items() for part in (f"--{name}", value)]
    lines = [part for name, value in flags.items() for part in (f"--{name.replace('-', '_')}", value)]
    result = run(model, "the cat", "--seed", 1, "--json", *dashes)
    assert result == run(model, "the cat", "--seed", 1, "--json", *lines)
    assert in_json(result)["sampling"]["repetition_penalty"] == 1.1


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_greedy_in_every_arithmetic(run: Run, model: Path, dtype: str) -> None:
    result = in_json(run(model, "the cat", "--temperature", 0, "--max-new-tokens", 1, "--dtype", dtype, "--json"))
    with torch.no_grad():
        expected = load(model, dtype=torch.float64)[0](torch.tensor([TOKENIZER.encode("the cat")]))[0, -1]
    assert float(expected.max() - expected[result["completions"][0]["ids"][0]]) < (0.1 if dtype == "bfloat16" else 1e-5)


def test_reasons(run: Run, model: Path, storyteller: Path) -> None:
    def reason(*arguments: object) -> str:
        return str(in_json(run(*arguments, "--temperature", 0, "--json"))["completions"][0]["finish_reason"])

    assert reason(storyteller, "7") == "end"
    assert reason(storyteller, "7", "--ignore-end", "--max-new-tokens", 500) == "context"
    assert reason(storyteller, "7", "--stop", "nope", "mèo") == "stop"
    assert reason(storyteller, "7", "--max-new-tokens", 5) == "length"


def test_the_oldest_tokens_are_dropped_when_asked_for(run: Run, model: Path) -> None:
    """A prompt of 40 tokens is continued as its end is, which leaves room to write; all of it is shown."""
    flags = ("--temperature", 0, "--json")
    assert texts(run(model, "7" * 40, "--overflow", "drop-oldest", *flags)) == texts(run(model, "7" * 12, *flags))
    assert run(model, "7" * 40, "--overflow", "drop-oldest").out.startswith("7" * 40)


def test_a_configuration_file(run: Run, model: Path, tmp_path: Path) -> None:
    """Gives what the command line does not, down to the model and the prompts; the command line wins."""
    path = tmp_path / "generate.yaml"
    path.write_text(
        f"model: {model}\nprompt: [the cat, mèo]\nmax-new-tokens: 4\nseed: 7\njson: true\n"
        "sampling: {temperature: 1.5, top_k: 30}\n"
    )
    answer = in_json(run("--config", path))
    assert [len(completion["ids"]) for completion in answer["completions"]] == [4, 4]
    assert answer["sampling"] == vars(Sampling(temperature=1.5, top_k=30))
    flags = (model, "the cat", "mèo", "--max-new-tokens", 4, "--seed", 7, "--temperature", 1.5, "--top-k", 30, "--json")
    assert answer == in_json(run(*flags))
    other = in_json(run("--config", path, "--temperature", 0.5, "--seed", 8, "--max_new_tokens", 2))
    assert (other["seed"], other["sampling"]["temperature"], other["sampling"]["top_k"]) == (8, 0.5, 30)
    assert [len(completion["ids"]) for completion in other["completions"]] == [2, 2]


# ---------------------------------------------------------------------- mistakes


def one_line(result: Result) -> str:
    """The error: exit code 2 and exactly one line on stderr, nothing on stdout."""
    assert result.code == 2
    assert result.out == ""
    assert result.err.endswith("\n")
    assert result.err.count("\n") == 1
    assert result.err.startswith("glassgpt generate: error: ")
    return result.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([""], ["prompt is empty"]),
        ([], ["prompt is empty"]),
        (["a", ""], ["prompt is empty"]),
        (["a", "--temperature", "-0.5"], ["temperature", "at least 0", "-0.5"]),
        (["a", "--temperature", "nan"], ["temperature", "at least 0", "nan"]),
        (["a", "--temperature", "inf"], ["temperature", "inf"]),
        (["a", "--top-p", "0"], ["top_p", "above 0 and at most 1", "got 0"]),
        (["a", "--top_p", "1.5"], ["top_p", "above 0 and at most 1", "got 1.5"]),
        (["a", "--top-k", "-1"], ["top_k", "at least 0", "-1"]),
        (["a", "--min-p", "2"], ["min_p", "between 0 and 1"]),
        (["a", "--repetition-penalty", "0"], ["repetition_penalty", "between 0.01 and 100"]),
        (["a", "--presence-penalty", "1e300"], ["presence_penalty", "between -100 and 100"]),
        (["a", "--n", "0"], ["n must be at least 1", "got 0"]),
        (["a", "--max-new-tokens", "0"], ["max_new_tokens must be at least 1"]),
        (["a", "--logprobs", "-1"], ["logprobs must be at least 0"]),
        (["a", "--stop", ""], ["stop text is empty"]),
        (["7" * 33], ["33 tokens", "context is 24", "--overflow drop-oldest"]),
        (["a", "7" * 33, "--json"], ["33 tokens", "context is 24"]),
        (["a", "--device", "nowhere"], ["device 'nowhere'"]),
        (["a", "--prompt-file", "no/such/file"], ["no/such/file", "No such file"]),
        (["a", "--prompt-file", "/"], ["prompt file /", "directory"]),
        (["a", "--config", "no/such.yaml"], ["no/such.yaml"]),
    ],
)
def test_a_mistake_is_one_line(run: Run, model: Path, arguments: list[str], said: list[str]) -> None:
    error = one_line(run(model, *arguments))
    assert all(part in error for part in said), error


def test_unknown_model(run: Run) -> None:
    error = one_line(run("no-such-model", "a"))
    assert "no model 'no-such-model'" in error
    assert "glassgpt download no-such-model" in error


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_new_token: 3", ["'max_new_token'", "did you mean 'max_new_tokens'"]),
        ("sampling: {temprature: 1}", ["'sampling.temprature'", "did you mean 'temperature'"]),
        ("sampling: {temperature: -1}", ["temperature must be at least 0"]),
        ("n: many", ["n must be int", "'many'"]),
        ("overflow: wrap", ["overflow must be one of error, drop-oldest"]),
    ],
)
def test_a_mistake_in_the_file_is_one_line(run: Run, model: Path, tmp_path: Path, text: str, said: list[str]) -> None:
    path = tmp_path / "generate.yaml"
    path.write_text(text)
    error = one_line(run(model, "a", "--config", path))
    assert all(part in error for part in [str(path), *said]), error


def test_a_prompt_file_that_is_not_utf8(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(b"caf\xe9")
    assert "not UTF-8 at byte 3" in one_line(run(model, "--prompt-file", tmp_path / "prompt"))
    (tmp_path / "prompt").write_bytes(b"")
    assert "prompt is empty" in one_line(run(model, "--prompt-file", tmp_path / "prompt"))


def test_a_misspelt_flag_is_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the parser, which names the nearest."""
    with pytest.raises(SystemExit) as stopped:
        main(["generate", str(model), "a", "--temprature", "1"])
    assert stopped.value.code == 2
    assert "--temperature" in capsys.readouterr().err


# ---------------------------------------------------------------------- true processes


def process(root: Path, *arguments: str | bytes, stdin: bytes = b"", **environment: str) -> Result:
    done = subprocess.run(
        [sys.executable, "-m", "glassgpt", "generate", *arguments],
        input=stdin,
        capture_output=True,
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        timeout=300,
        check=False,
    )
    assert b"Traceback" not in done.stderr
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


def test_a_process_writes_utf8_and_reads_stdin(root: Path, storyteller: Path) -> None:
    result = process(root, str(storyteller), "--prompt-file", "-", "--temperature", "0", stdin=b"7")
    assert result == (0, f"7{VIETNAMESE}\n", "")


def test_bytes_of_the_shell_that_are_not_utf8(root: Path, model: Path) -> None:
    error = one_line(process(root, str(model), b"caf\xe9"))
    assert "not UTF-8" in error
    assert r"b'caf\xe9'" in error


def test_a_terminal_without_vietnamese(root: Path, storyteller: Path) -> None:
    """Shows ? for what it cannot show; the text goes on."""
    result = process(root, str(storyteller), "7", "--temperature", "0", PYTHONIOENCODING="ascii")
    assert result == (0, "7" + VIETNAMESE.encode("ascii", "replace").decode() + "\n", "")
