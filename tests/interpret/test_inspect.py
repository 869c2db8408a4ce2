"""`glassgpt inspect`: every view shows, draws and prints as JSON the same numbers; wrong input is one line."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from tiny import Run, caller

import glassgpt
from glassgpt import charts
from glassgpt.charts import drawable
from glassgpt.config.inspect import VIEWS as VIEW_NAMES
from glassgpt.interpret.attribution import attribute

PROMPT = "Once upon a time there was a little girl named"
VIETNAMESE = "Trí tuệ nhân tạo 🦕 và"
VIEWS: dict[str, tuple[str, ...]] = {
    "summary": (),
    "attention": ("--attention", "all"),
    "one head": ("--attention", "3.2"),
    "scores": ("--attention", "0.1", "--stage", "scores"),
    "masked": ("--attention", "0.1", "--stage", "masked"),
    "weighted": ("--attention", "5.4", "--stage", "weighted"),
    "rollout": ("--attention", "rollout"),
    "heads": ("--heads",),
    "lens": ("--lens",),
    "neurons": ("--why", "--neurons"),
    "ablate": ("--ablate", "zero"),
    "ablate for a token": ("--ablate", "mean", "--answer", " Mary", "--against", " Tom"),
    "why": ("--why", "--answer", " Mary", "--against", " Tom"),
    "next": ("--next", "--top-k", "5", "--temperature", "0.7"),
    "tree": ("--tree", "--width", "2", "--depth", "2"),
    "trace": ("--trace", "little girl", "--answer", " Mary"),
}


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Run:
    return caller("inspect", capsys)


@pytest.fixture
def numbers(inspect: Run) -> Any:
    def call(*arguments: object) -> dict[str, Any]:
        result = inspect(*arguments, "--json")
        assert result.code == 0, result.err  # long work may tell how far it is
        return strict(result.out)

    return call


def strict(text: str) -> dict[str, Any]:
    """JSON without the numbers that JSON has not."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    found: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return found


# ---------------------------------------------------------------------- every view


@pytest.mark.parametrize("flags", VIEWS.values(), ids=VIEWS)
def test_every_view_shows_draws_and_tells(inspect: Run, tmp_path: Path, flags: tuple[str, ...]) -> None:
    shown = inspect("storyteller", "--prompt", PROMPT, *flags, "--png", tmp_path / "view.png", "--svg", tmp_path / "view.svg")
    assert shown.code == 0 and shown.err.count("picture: ") == 2
    assert max(map(len, shown.out.splitlines())) <= 80  # fits a terminal
    assert "\x1b" not in shown.out  # no colours off a terminal
    assert (tmp_path / "view.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "view.svg").read_text(encoding="utf-8").startswith("<?xml")
    told = inspect("storyteller", "--prompt", PROMPT, *flags, "--json")
    assert told.code == 0 and told.err == ""
    assert strict(told.out)["model"] == "storyteller"


@pytest.mark.parametrize("flags", VIEWS.values(), ids=VIEWS)
def test_vietnamese_and_emoji_show_whole(inspect: Run, tmp_path: Path, flags: tuple[str, ...]) -> None:
    flags = tuple("tạo" if flag == "little girl" else flag for flag in flags)
    result = inspect("storyteller", "--prompt", VIETNAMESE, *flags, "--png", tmp_path / "view.png")
    assert result.code == 0, result.err
    assert "\N{REPLACEMENT CHARACTER}" not in result.out
    assert "Glyph" not in result.err


def test_the_summary_says_what_the_model_says(numbers: Any) -> None:
    model, tokenizer = glassgpt.load("storyteller")
    ids = torch.tensor(tokenizer.encode(PROMPT))
    log_p = model(ids[None])[0].detach().log_softmax(-1)
    found = numbers("storyteller", "--prompt", PROMPT)
    assert [token["id"] for token in found["tokens"]] == ids.tolist()
    for place, token in enumerate(found["tokens"][1:], start=1):
        assert token["surprisal_bits"] == pytest.approx(float(-log_p[place - 1, ids[place]]) / 0.6931472, abs=1e-4)
        assert token["rank"] == 1 + int((log_p[place - 1] > log_p[place - 1, ids[place]]).sum())
    best = log_p[-1].topk(10)
    assert [x["id"] for x in found["next"]] == best.indices.tolist()
    assert [x["probability"] for x in found["next"]] == pytest.approx(best.values.exp().tolist(), abs=1e-5)
    parts = [part for part in attribute(model, ids, int(best.indices[0])).parts if part.kind == "head"]
    strongest = max(parts, key=lambda part: abs(part.value))
    assert (found["strongest_heads"][0]["layer"], found["strongest_heads"][0]["head"]) == (strongest.layer, strongest.index)


def test_attention_is_the_models(numbers: Any) -> None:
    model, tokenizer = glassgpt.load("storyteller")
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    with glassgpt.capture(model, "blocks.3.attn.*") as seen, torch.no_grad():
        model(ids)
    pattern = seen["blocks.3.attn.pattern"][0, 2]
    head = numbers("storyteller", "--prompt", PROMPT, "--attention", "3.2")
    assert torch.allclose(torch.tensor(head["pattern"]), pattern, atol=1e-6)
    assert head["place"] == int(pattern[-1].argmax()) and head["weight"] == pytest.approx(float(pattern[-1].max()), abs=1e-6)
    assert head["last_looks_at"] == head["tokens"][head["place"]]
    scores = numbers("storyteller", "--prompt", PROMPT, "--attention", "3.2", "--stage", "scores")["scores"]
    assert torch.allclose(torch.tensor(scores), seen["blocks.3.attn.scores"][0, 2], atol=1e-5)
    masked = numbers("storyteller", "--prompt", PROMPT, "--attention", "3.2", "--stage", "masked")["masked"]
    assert masked[0][1] is None and masked[1][:2] == pytest.approx(scores[1][:2], abs=1e-6)
    rolled = torch.tensor(numbers("storyteller", "--prompt", PROMPT, "--attention", "rollout")["rollout"])
    assert torch.allclose(rolled.sum(-1), torch.ones(len(rolled)), atol=1e-5)


def test_what_was_expected_is_what_the_token_before_foretold(numbers: Any) -> None:
    model, tokenizer = glassgpt.load("storyteller")
    best = model(torch.tensor([tokenizer.encode(PROMPT)]))[0].argmax(-1).tolist()
    expected = [token["expected"] for token in numbers("storyteller", "--prompt", PROMPT)["tokens"]]
    assert expected[0] is None
    assert [text.replace("·", " ") for text in expected[1:]] == [tokenizer.decode([i]) for i in best[:-1]]


def test_the_next_token_is_drawn_from_what_is_listed(numbers: Any) -> None:
    """Also with penalties: entropy and the number of tokens that can be drawn are those of the listed probabilities."""
    flags = ("--next", "--top", "8192", "--top-p", "0.7", "--temperature", "0.8", "--repetition-penalty", "5")
    found = numbers("storyteller", "--prompt", "Lily Lily Lily and", *flags)
    p = torch.tensor([token["probability"] for token in found["tokens"]], dtype=torch.float64)
    assert len(p) == found["vocabulary"] and float(p.sum()) == pytest.approx(1, abs=1e-6)
    assert found["can_be_drawn"] == int((p > 0).sum()) < 8192
    assert found["entropy_bits_drawn"] == pytest.approx(float(torch.special.entr(p).sum()) / 0.6931472, abs=1e-6)
    assert found["entropy_bits"] > found["entropy_bits_drawn"]


def test_ablation_is_what_an_edit_does(numbers: Any, inspect: Run, tmp_path: Path) -> None:
    model, tokenizer = glassgpt.load("storyteller", dtype=torch.float64)
    ids = torch.tensor([tokenizer.encode(PROMPT)])

    def loss() -> float:
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:])) / math.log(2)

    found = numbers("storyteller", "--prompt", PROMPT, "--ablate", "zero", "--dtype", "float64")
    assert found["intact"] == pytest.approx(loss(), abs=1e-9)
    with glassgpt.edit(model, {"blocks.2.attn.z": lambda z: z * torch.tensor([1, 1, 0, 1, 1]).view(-1, 1, 1)}):
        assert found["heads"][2][2] == pytest.approx(loss() - found["intact"], abs=1e-9)
    with glassgpt.edit(model, {"blocks.4.mlp": torch.zeros_like}):
        assert found["mlps"][4] == pytest.approx(loss() - found["intact"], abs=1e-9)
    text = tmp_path / "text.txt"
    text.write_text("Tom had a red ball. He liked to play with the ball in the park with his friend Lily. " * 100)
    resampled = inspect("storyteller", "--prompt", PROMPT, "--ablate", "resample", "--source", text)
    assert resampled.code == 0 and "what it does in another text" in resampled.out


def test_neurons_are_parts_of_their_mlp(numbers: Any) -> None:
    found = numbers("storyteller", "--prompt", PROMPT, "--why", "--neurons", "--top", "9999", "--dtype", "float64")
    by_layer = [0.0] * 6
    for neuron in found["neurons"]:
        by_layer[neuron["layer"]] += neuron["value"]
    assert by_layer == pytest.approx([part["value"] for part in found["parts"] if part["kind"] == "mlp"], abs=1e-9)


def test_the_parts_of_why_sum_to_the_logit(numbers: Any) -> None:
    found = numbers("storyteller", "--prompt", PROMPT, "--why", "--answer", " Mary", "--dtype", "float64")
    model, tokenizer = glassgpt.load("storyteller", dtype=torch.float64)
    ids = tokenizer.encode(PROMPT)
    logits = model(torch.tensor([ids]))[0, :, tokenizer.encode(" Mary")[0]].tolist()
    assert found["logit"] == pytest.approx(logits[-1], abs=1e-9)
    assert sum(part["value"] for part in found["parts"]) == pytest.approx(logits[-1], abs=1e-9)
    at = numbers("storyteller", "--prompt", PROMPT, "--why", "--answer", " Mary", "--position", "3", "--dtype", "float64")
    assert at["logit"] == pytest.approx(logits[3], abs=1e-9)


def test_the_induction_model_is_seen_for_what_it_is(numbers: Any, inspect: Run) -> None:
    found = numbers("induction", "--heads")["heads"]
    assert [head["class"] for head in found] == ["previous-token", "induction"]
    assert "induction" in inspect("induction", "--heads").out


def test_patching(inspect: Run, numbers: Any, tmp_path: Path) -> None:
    a, b = "The boy was named Tom. His mom said to", "The boy was named Sam. His mom said to"
    flags = ("storyteller", "--patch", a, b, "--answer", " Tom", "--against", " Sam")
    found = numbers(*flags)
    share = torch.tensor(found["recovered"])
    assert share.shape == (7, len(found["columns"])) and found["rows"][-1] == "end"
    assert float(share[-1, -1]) == pytest.approx(1, abs=1e-4)  # the last state of the last token is all that is read
    assert any("/" in column for column in found["columns"])
    before = next(place for place, column in enumerate(found["columns"]) if "/" in column)
    assert float(share[:, :before].abs().max()) < 1e-4  # nothing differs before the first difference
    assert found["clean_logit_difference"] > 1 > -1 > found["corrupted_logit_difference"]
    shown = inspect(*flags, "--svg", tmp_path / "patch.svg")
    assert shown.code == 0 and "…" not in shown.out  # every number is whole
    assert re.search(r"·Tom/·Sam +100 ", shown.out) and re.search(r"·to +0 .* 100$", shown.out, re.MULTILINE)
    for what, columns in (("heads", 5), ("attn", len(found["columns"])), ("mlp", len(found["columns"]))):
        assert torch.tensor(numbers(*flags, "--patch-what", what)["recovered"]).shape == (6, columns)


def test_columns_are_no_markup(inspect: Run) -> None:
    result = inspect("storyteller", "--patch", "a[ b", "a] b", "--answer", " b", "--against", " a")
    assert result.code == 0 and "[/]" in result.out


def test_tracing_finds_the_part_in_a_vocabulary_of_words(numbers: Any) -> None:
    found = numbers("induction", "--prompt", "Cat dog", "--trace", "Cat", "--answer", "dog", "--noise-samples", "2")
    assert found["subject"] == [1] and found["tokens"][1].endswith("*")


def test_comparing_a_model_with_itself_finds_nothing(inspect: Run, numbers: Any, tmp_path: Path) -> None:
    found = numbers("--compare", "storyteller", "storyteller", "--prompt", PROMPT)
    assert max(place["kl_bits"] for place in found["places"]) == 0
    result = inspect("--compare", "storyteller", "storyteller", "--prompt", PROMPT, "--png", tmp_path / "compare.png")
    assert result.code == 0 and (tmp_path / "compare.png").is_file()


def test_two_models_in_one_view(inspect: Run, numbers: Any, tmp_path: Path) -> None:
    flags = ("--compare", "storyteller", "storyteller", "--prompt", PROMPT, "--why", "--answer", " Mary")
    both = numbers(*flags)
    assert both["a"] == both["b"] == numbers("storyteller", *flags[3:])
    result = inspect(*flags, "--png", tmp_path / "why.png")
    assert result.code == 0 and "A: storyteller" in result.out and "B: storyteller" in result.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["why-a.png", "why-b.png"]


def test_long_prompts_have_pictures_of_a_size(inspect: Run, tmp_path: Path) -> None:
    for flags in (("--attention", "1.1"), ("--lens",)):
        result = inspect("storyteller", "--prompt", "a b " * 150, *flags, "--png", tmp_path / "long.png")
        assert result.code == 0, result.err
        width, height = (int.from_bytes((tmp_path / "long.png").read_bytes()[at : at + 4], "big") for at in (16, 20))
        assert max(width, height) < 4000


def test_dollars_are_no_mathematics(tmp_path: Path) -> None:
    figure, axes = charts.figure()
    charts.label_axis(axes.xaxis, ["$$", "$_$", r"$\foo$", "plain"])
    axes.set_title(charts.drawable("$a$ less $$"))
    axes.set_yscale("log")
    with pytest.MonkeyPatch.context() as patch:  # texts as text, to be read
        patch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
        charts.save(figure, tmp_path / "a.png", tmp_path / "a.svg")
    drawn = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert all(f">{text}<" in drawn for text in ("$$", "$_$", r"$\foo$", "plain", "$a$ less $$"))
    assert "mathdefault" not in re.sub(r"<!--.*?-->", "", drawn, flags=re.DOTALL)  # a log axis has powers, not their source


def test_lens_and_autoencoder_are_trained_once(inspect: Run, numbers: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Tom had a red ball. He liked to play with the ball in the park with his friend Lily. " * 200)
    lens = ("storyteller", "--prompt", PROMPT, "--lens", "--tuned-lens", tmp_path / "lens")
    first = numbers(*lens, "--source", text, "--steps", "3")
    assert first["lens"] == "tuned" and numbers(*lens) == first
    sae = ("storyteller", "--prompt", PROMPT, "--sae", tmp_path / "sae")
    first = numbers(*sae, "--source", text, "--steps", "5", "--sae-features", "64", "--sae-at", "blocks.1")
    assert first["activation"] == "blocks.1" and first["report"]["l0"] <= 32 and first["features"][0]["contexts"]
    again = numbers(*sae)
    assert [x["codes"] for x in again["features"]] == [x["codes"] for x in first["features"]] and again["report"] is None
    for wrong, message in (
        (("--sae-at", "blocks.0"), "was trained with --sae-at blocks.1, not blocks.0; name another folder"),
        (("--sae-features", "128"), "was trained with --sae-features 64, not 128"),
        (("--sae-kind", "l1"), "was trained with --sae-kind topk, not l1"),
    ):
        refused = inspect(*sae, *wrong)
        assert refused.code == 2 and message in refused.err
    refused = inspect("induction", "--prompt", "cat dog", "--sae", tmp_path / "sae")
    assert refused.code == 2 and "this sparse autoencoder is for another model" in refused.err
    shown = inspect(*sae, "--png", tmp_path / "sae.png")
    assert shown.code == 0 and "--source TEXT adds" in shown.out and (tmp_path / "sae.png").is_file()


def test_a_page_is_one_file(inspect: Run, tmp_path: Path) -> None:
    result = inspect("storyteller", "--prompt", PROMPT, "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert result.code == 0 and str(tmp_path / "page.html") in result.out
    assert page.startswith("<!doctype html>") and "http://" not in re.sub(r"http://www\.w3\.org/\S+", "", page)
    assert len(page) < 5e6


def test_characters_without_a_shape_are_written_as_numbers() -> None:
    assert drawable("ộ·↵ 中 🦕 $") == r"ộ·↵ U+4E2D U+1F995 \$"


# ---------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to read; give --prompt"),
        (("--prompt", "a", "--prompt-file", "b"), "give --prompt or --prompt-file, not both"),
        (("--prompt-file", "/nowhere/x.txt"), "cannot read the prompt file /nowhere/x.txt: No such file"),
        (("--prompt", "x " * 600), "the prompt has 1200 tokens and the context is 512; shorten it"),
        (("--prompt", "a", "--lens", "--why"), "one view at a time; got --lens and --why"),
        (("--prompt", "a", "--html", "x.html", "--lens"), "--html writes every view"),
        (("--prompt", "a", "--html", "/nowhere/x.html"), "the folder /nowhere does not exist"),
        (
            ("--prompt", "a", "--attention", "9.1"),
            "LAYER.HEAD, here from 0.0 to 5.4, all or rollout; got '9.1'",
        ),
        (("--prompt", "a", "--attention", "x"), "--attention takes LAYER.HEAD"),
        (("--prompt", "a", "--why", "--position", "5"), "--position 5 is outside the prompt, which has 1 tokens (0 to 0)"),
        (("--prompt", "a", "--why", "--answer", "Rumpelstiltskin"), "--answer 'Rumpelstiltskin' must be one token"),
        (("--prompt", "a", "--why", "--answer", ""), "--answer '' must be one token of this vocabulary; it is 0: nothing"),
        (
            ("--prompt", "a", "--lens", "--against", " b"),
            "--against is for the summary, --html, --why, --patch, --ablate; --lens does not",
        ),
        (("--prompt", "a", "--html", "x.html", "--png", "y.png"), "--png is for the summary"),
        (("--prompt", "a", "--tree", "--position", "0"), "--position is for --why, --next; --tree does not use it"),
        (("--prompt", "a", "--lens", "--temperature", "2"), "how to sample is for the summary, --next, --tree; --lens does not"),
        (
            ("--prompt", "a", "--next", "--presence-penalty", "1"),
            "penalties count tokens that were written",
        ),
        (("--prompt", "a", "--lens", "--steps", "3"), "say where it is to be with --tuned-lens FOLDER"),
        (("--prompt", "a", "--attention", "all", "--stage", "scores"), "--stage scores is of one head"),
        (("--prompt", "a", "--lens", "--png", "/tmp"), "/tmp is a folder; give the name of a file in it"),
        (("--prompt", "a", "--lens", "--png", "a.svg"), "--png writes .png files; got a.svg"),
        (("--patch", "", "", "--answer", " a", "--against", " b"), "--patch needs two prompts, and one is empty"),
        (("--patch", "a b", "a"), "--patch needs two next tokens to tell apart"),
        (("--patch", "a b", "a", "--answer", " a", "--against", " b"), "the same number of tokens; got 2: a|·b; 1: a"),
        (("--prompt", "a", "--ablate", "zero"), "a loss needs texts of at least 2 tokens"),
        (("--prompt", "a b", "--ablate", "resample"), "takes values from another text; give it with --source TEXT"),
        (("--prompt", "a b", "--ablate", "zero", "--against", " b"), "--against needs --answer"),
        (("--prompt", "a", "--next", "--neurons"), "--neurons is for --why; --next does not use it"),
        (("--prompt", "a", "--trace", "a"), "--trace needs --answer"),
        (("--prompt", "a", "--trace", "zebra", "--answer", " b"), "--trace 'zebra' is not a part of the prompt"),
        (("--prompt", "a", "--sae", "/nowhere/sae"), "--sae /nowhere/sae: nothing there yet; to train it, give --source TEXT"),
        (("--prompt", "a", "--lens", "--tuned-lens", "/nowhere/lens"), "--tuned-lens /nowhere/lens: nothing there yet"),
        (("--prompt", "a", "--tuned-lens", "x"), "--tuned-lens is for --lens; the summary does not use it"),
        (("--prompt", "a", "--top", "0"), "top must be at least 1; got 0"),
        (("--prompt", "a", "--next", "--top-p", "0"), "top_p must be above 0"),
        (("--prompt", "a", "--tree", "--width", "100"), "a tree of width 100 and depth 3"),
    ],
)
def test_a_mistake_is_one_line(inspect: Run, arguments: tuple[str, ...], message: str) -> None:
    result = inspect("storyteller", *arguments)
    assert result.code == 2 and result.out == ""
    assert result.err.startswith("glassgpt inspect: error: ") and message in result.err
    assert result.err.count("\n") == 1


def test_compare_names_its_models_itself(inspect: Run) -> None:
    result = inspect("storyteller", "--compare", "storyteller", "induction", "--prompt", "a")
    assert result.code == 2 and "--compare names its two models itself; leave out 'storyteller'" in result.err
    result = inspect("--compare", "storyteller", "induction", "--prompt", "a")
    assert result.code == 2 and result.err.count("\n") == 1


def test_the_example_of_the_page_runs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (root / "docs/inspect.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, {})
    missed, shape = capsys.readouterr().out.splitlines()
    assert abs(float(missed)) < 1e-4 and shape == "torch.Size([7, 10])"


def test_every_view_is_in_the_docs(root: Path) -> None:
    page = (root / "docs/inspect.md").read_text(encoding="utf-8")
    assert [view for view in (*VIEW_NAMES, "compare") if f"`--{view}" not in page] == []
