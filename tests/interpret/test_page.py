"""The page of `glassgpt inspect --html` without a browser: its numbers, its data, its words."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import exact
import numpy as np
import pytest
import torch

from glassgpt.config import UserError
from glassgpt.config.model import MoeConfig
from glassgpt.config.tuning import LoraConfig
from glassgpt.interpret.page.html import LANGUAGES, SCRIPTS, page, payload
from glassgpt.interpret.page.report import SCORED_TOKENS, Report, collect
from glassgpt.interpret.page.weight_stats import BINS
from glassgpt.model import GPT, lora
from glassgpt.text import Tokenizer

PROMPT = "the cat sat. Tiếng Việt 😀"
SHAPE: dict[str, Any] = {"vocab_size": 300, "context_tokens": 80}
SLOTS: dict[str, dict[str, Any]] = {
    "gpt": {},
    "llama": {"position": "rope", "norm": "rms", "mlp": "swiglu", "bias": False, "n_kv_head": 2, "tied_head": False},
    "bloom": {"position": "alibi", "embedding_norm": True},
    "mixture": {"moe": MoeConfig(experts=3, shared=1), "spans": ("full", "window"), "window_tokens": 4},
    "capped": {"logit_cap": 5.0, "position": "relative", "mlp": "relu2", "qk_norm": True},
    "rows": {"vocab_size": 320},
}
FOLDER = Path(__file__).resolve().parents[2] / "glassgpt" / "interpret" / "page"


def model_of(slot: str = "gpt") -> GPT:
    return exact.noisy(exact.shape(**SHAPE | SLOTS[slot]), torch.float32, size=0.1)


@pytest.fixture(scope="session")
def report(tokenizer: Tokenizer) -> Report:
    return collect(model_of(), tokenizer, PROMPT, name="tiny")


def unpacked(packed: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed["data"]), dtype="<" + packed["kind"])


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize("slot", SLOTS)
def test_numbers_are_the_models_own(slot: str, tokenizer: Tokenizer) -> None:
    model = model_of(slot)
    steps: list[tuple[int, int]] = []
    found = collect(model, tokenizer, PROMPT, name=slot, progress=lambda done, total: steps.append((done, total)))
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    with torch.no_grad():
        logits = model(ids)[0]
    assert steps == [(done, len(steps)) for done in range(1, len(steps) + 1)]
    torch.testing.assert_close(found.logits, logits[-1, :300], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.pattern.sum(-1), torch.ones(3, 4, ids.size(1)), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.masked.softmax(-1), found.pattern, atol=1e-5, rtol=0)
    assert [piece.id for piece in found.tokens] == ids[0].tolist()
    assert (found.target, found.against) == tuple(logits[-1, :300].topk(2).indices.tolist())
    for attribution in found.attributions:
        assert abs(attribution.total - attribution.logit) < 1e-3
        assert math.isclose(sum(part.value for part in attribution.parts), attribution.total, abs_tol=1e-5)
    assert sum(stats.count for stats in found.weights) == found.anatomy.parameters
    assert {stats.tied_to for stats in found.weights} - {None} == ({"token_embedding.weight"} if slot != "llama" else set())
    assert found.slabs.shape[:2] == (3, 8 if slot == "llama" else 12)
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["target"] == found.target
    assert "\N{REPLACEMENT CHARACTER}" not in page(found)


def test_weights_are_counted_and_measured(report: Report) -> None:
    model = model_of()
    stats = {stats.name: stats for stats in report.weights}["blocks.1.mlp.up.weight"]
    weight = model.blocks[1].mlp.up.weight.detach().double()
    expected = (weight.mean(), weight.std(correction=0), weight.min(), weight.max())
    for found, real in zip((stats.mean, stats.std, stats.min, stats.max), expected, strict=True):
        assert math.isclose(found, float(real), abs_tol=1e-6)
    inside = ((weight - weight.mean()).abs() < stats.std * 4 / (BINS / 2)).sum()  # the two bars in the middle
    assert len(stats.histogram) == BINS and sum(stats.histogram) == weight.numel()
    assert abs(sum(stats.histogram[BINS // 2 - 1 : BINS // 2 + 1]) - int(inside)) <= 1
    K = model.blocks[2].attn.qkv.weight.detach().view(12, 4, 16)[4 + 1]  # head 1's keys, (W, D)
    torch.testing.assert_close(report.slabs[2, 4 + 1], K.abs(), atol=1e-6, rtol=0)  # small enough to be shown number by number
    assert not torch.allclose(report.slabs[2, 4 + 1], K.T.reshape(4, 16).abs(), atol=1e-2)


def test_a_tensor_of_equal_numbers_is_one_bar(tokenizer: Tokenizer) -> None:
    found = collect(GPT(exact.shape(**SHAPE)).eval(), tokenizer, PROMPT, name="new")
    norm = next(stats for stats in found.weights if stats.name == "norm_f.weight")
    assert (norm.std, max(norm.histogram), sum(norm.histogram)) == (0.0, 16, 16)


def test_long_prompts_keep_the_pattern_alone(tokenizer: Tokenizer) -> None:
    prompt = "the cat " * 36
    found = collect(model_of(), tokenizer, prompt, name="tiny")
    assert SCORED_TOKENS < len(found.tokens) == found.pattern.size(-1)
    assert found.scores is found.masked is payload(found)["scores"] is None


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "the prompt is empty"),
        ("x" * 257, {}, "the prompt has 257 tokens and the page shows 256 at most; shorten it"),
        ("x" * 81, {}, "context is 80 tokens; got 81"),
        ("the", {"target": 5, "against": 5}, "target and against are the same token, 5"),
        ("the", {"target": 300}, r"token id 300 is outside the vocabulary \(0 to 299\)"),
        ("the", {"against": -1}, "token id -1 is outside the vocabulary"),
    ],
)
def test_mistakes_are_named(tokenizer: Tokenizer, prompt: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        collect(model_of("rows"), tokenizer, prompt, name="tiny", **options)


def test_target_and_against_can_be_chosen(tokenizer: Tokenizer, report: Report) -> None:
    best = report.target
    chosen = [
        collect(model_of(), tokenizer, PROMPT, name="tiny", **options)
        for options in ({"target": 7}, {"against": best}, {"target": 7, "against": 9})
    ]
    assert [(x.target, x.against) for x in chosen] == [(7, best), (report.against, best), (7, 9)]


# ---------------------------------------------------------------------- data


def test_arrays_come_back_as_they_were(report: Report) -> None:
    data = payload(report)
    T = len(report.tokens)
    pattern = unpacked(data["pattern"]).reshape(3, 4, -1)
    place = 0
    for query in range(T):  # row after row of the lower triangle
        row = torch.from_numpy(pattern[..., place : place + query + 1].astype(np.float32))
        torch.testing.assert_close(row, report.pattern[..., query, : query + 1], atol=5e-4, rtol=0)
        place += query + 1
    assert place == pattern.shape[-1]
    columns = pattern[..., 1:3].astype(np.float32)  # were it column after column, this would be (1, 0) and (2, 0)
    assert not np.allclose(columns, report.pattern[..., 1:3, 0], atol=1e-2)
    assert np.array_equal(unpacked(data["logits"]), report.logits.numpy())
    assert np.array_equal(unpacked(data["lens"]["ids"]), report.lens.ids.flatten().numpy())
    scores = unpacked(data["scores"]).reshape(report.scores.shape).astype(np.float32)
    assert np.allclose(scores, report.scores, rtol=1e-3, atol=1e-3)
    slabs = unpacked(data["slabs"]).reshape(report.slabs.shape) / 255 * np.array(data["slabs"]["largest"]).reshape(-1, 1, 1, 1)
    assert np.abs(slabs - report.slabs.numpy()).max() <= max(data["slabs"]["largest"]) / 255 / 2 + 1e-6


def test_every_token_that_is_shown_has_its_text(report: Report) -> None:
    data = payload(report)
    shown = {*unpacked(data["lens"]["ids"]).tolist(), *data["likeliest"], report.target, report.against}
    assert {str(token_id) for token_id in shown} <= set(data["labels"])
    assert data["likeliest"] == [token.id for token in report.next_tokens]


def embedded(text: str, name: str) -> Any:
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_one_file_without_network(report: Report) -> None:
    text = page(report)
    assert "default-src 'none'" in text
    links = re.findall(r"https?://[^\s\"'`)]+|(?:src|href)=\"(?!#|data:,)[^\"]*|@import|url\(", text)
    assert set(links) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert embedded(text, "report") == json.loads(json.dumps(payload(report)))
    assert set(embedded(text, "words")) == set(LANGUAGES)
    assert not re.search(r"\$(title|style|words|report|script)\b", text)


def test_a_prompt_cannot_leave_its_place(tokenizer: Tokenizer) -> None:
    prompt = "</script><script>x()</script><!-- $report"
    text = page(collect(model_of(), tokenizer, prompt, name="<b>&"))
    assert embedded(text, "report")["prompt"] == prompt
    assert "<script>x()" not in text and "<!-- $" not in text and "<title>&lt;b&gt;&amp;</title>" in text


def test_size_for_twelve_layers_of_twelve_heads(shared: Path) -> None:
    words = Tokenizer.load(shared / "tokenizer")
    # GPT-2 small but for its width, of which the page holds no more than this
    shape = exact.shape(vocab_size=50257, context_tokens=128, n_layer=12, n_head=12, width=96)
    found = collect(GPT(shape).eval(), words, " the" * 64, name="wide")
    assert found.slabs.shape == (12, 36, 8, 64) and found.scores is not None
    assert len(page(found).encode()) < 5e6


# ---------------------------------------------------------------------- words


def words() -> dict[str, dict[str, str]]:
    return {language: json.loads((FOLDER / f"{language}.json").read_text(encoding="utf-8")) for language in LANGUAGES}


def test_languages_have_the_same_keys_and_blanks() -> None:
    english, vietnamese = words().values()
    assert list(english) == list(vietnamese)
    for key, text in english.items():
        assert text.strip() and vietnamese[key].strip(), key
        assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", vietnamese[key])), key


def unused(keys: list[str], source: str) -> list[str]:
    """Keys that no source names: whole, or as a prefix before ${…}."""
    prefixes = tuple(re.findall(r"[\"`]([a-z.]+\.)\$\{", source))
    return [key for key in keys if f'"{key}"' not in source and not key.startswith(prefixes)]


def test_every_key_is_used_and_every_used_key_is_there() -> None:
    keys = list(words()["en"])
    source = "".join((FOLDER / name).read_text(encoding="utf-8") for name in ("index.html", *(f"{name}.js" for name in SCRIPTS)))
    assert unused(keys, source) == []
    assert unused(["nowhere.named"], source) == ["nowhere.named"]
    used = re.findall(r'data-i18n(?:-label)?="([\w.]+)"|\b(?:t|tile|sentence)\("([\w.]+)"', source)
    assert len(used) > 60 and {a or b for a, b in used} <= set(keys)


def test_every_file_of_the_page_is_in_it(report: Report) -> None:
    assert {path.stem for path in FOLDER.glob("*.js")} == set(SCRIPTS)
    assert {path.name for path in FOLDER.glob("*.*") if path.suffix != ".py"} - {f"{name}.js" for name in SCRIPTS} == {
        "index.html",
        "style.css",
        *(f"{language}.json" for language in LANGUAGES),
    }
    assert dataclasses.is_dataclass(report)


def test_parts_of_characters_are_told_from_text(tokenizer: Tokenizer) -> None:
    found = collect(model_of(), tokenizer, "c3 é", name="tiny")
    whole, part = tokenizer.encode("c")[0], tokenizer.encode("é")[0]
    assert (found.labels[whole], found.labels[part]) == ("c", "c3")  # only the second is a byte
    assert part in found.fragments and whole not in found.fragments


def test_broken_weights_are_named(tokenizer: Tokenizer) -> None:
    model = model_of()
    with torch.no_grad():
        model.norm_f.weight[0] = float("nan")
    with pytest.raises(UserError, match="not all finite"):
        collect(model, tokenizer, PROMPT, name="tiny")


def test_a_broken_weight_that_the_prompt_does_not_use_is_named(tokenizer: Tokenizer) -> None:
    model = model_of()
    with torch.no_grad():
        model.position_embedding.weight[70, 0] = float("nan")
    with pytest.raises(UserError, match=r"the numbers of position_embedding\.weight are not all finite"):
        collect(model, tokenizer, PROMPT, name="tiny")


def test_adapters_are_added_up(tokenizer: Tokenizer) -> None:
    """An adapter beside its matrix, the two in one, and (what must be told from them) the matrix alone."""
    model, base = model_of(), model_of()
    lora.add(model, LoraConfig(rank=2, targets=("qkv", "up")), seed=0)
    with torch.no_grad():
        for number in lora.adapters(model).values():
            number += 0.3
    beside = collect(model, tokenizer, PROMPT, name="tiny")
    merged = collect(lora.merge(model), tokenizer, PROMPT, name="tiny")
    alone = collect(base, tokenizer, PROMPT, name="tiny")
    assert [stats.name for stats in beside.weights] == [stats.name for stats in alone.weights]
    assert sum(stats.count for stats in beside.weights) == beside.anatomy.parameters
    assert [stats.std for stats in beside.weights] == pytest.approx([stats.std for stats in merged.weights], abs=1e-6)
    torch.testing.assert_close(beside.slabs, merged.slabs, atol=1e-6, rtol=0)
    assert (beside.slabs - alone.slabs).abs().max() > 0.01


def test_heads_without_room_for_their_test_have_no_scores(tokenizer: Tokenizer) -> None:
    found = collect(exact.noisy(exact.shape(vocab_size=300, context_tokens=5), torch.float32), tokenizer, "the", name="short")
    assert found.heads == () and found.as_json()["heads"] == []
