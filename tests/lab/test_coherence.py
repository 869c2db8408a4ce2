"""Loss with the context cut against models whose reach is known, intervals against formulas, words of a prompt by hand."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from glassgpt.cli import main
from glassgpt.config import ModelConfig, preset
from glassgpt.lab import bootstrap
from glassgpt.lab.coherence import coherence, context_loss, topics
from glassgpt.lab.coherence.context_loss import Reach
from glassgpt.model import GPT, weights
from glassgpt.text import Tokenizer

EXACT = 1e-10
C = 24
"""Context of the small models."""
V = 12
SLOTS: dict[str, dict[str, Any]] = {
    "learned": {},
    "rope, swiglu, shared keys": {"position": "rope", "mlp": "swiglu", "norm": "rms", "n_kv_head": 1},
    "alibi, window": {"position": "alibi", "spans": ("full", "window"), "window_tokens": 5},
    "untied, capped": {"tied_head": False, "logit_cap": 3.0},
}


def noisy(**changes: Any) -> GPT:
    """A small GPT in float64 with noise on every parameter."""
    torch.manual_seed(0)
    config = ModelConfig(**{"vocab_size": V, "context_tokens": C, "n_layer": 2, "n_head": 2, "width": 8} | changes)
    model = GPT(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def copying(distance: int) -> GPT:
    """A GPT made by hand: its one head looks `distance` - 1 tokens back and the model says the token found there again.

    So it predicts the token that stood `distance` places before the one to come. Tokens and positions are unit vectors.
    """
    width = V + C
    model = GPT(ModelConfig(vocab_size=V, context_tokens=C, n_layer=1, n_head=1, width=width, tied_head=False)).double().eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.zero_()
    model.token_embedding.weight[:, :V] = torch.eye(V)
    model.position_embedding.weight[:, V:] = torch.eye(C)
    attn = model.blocks[0].attn
    q, k, v = attn.qkv.weight.split(width)
    for place in range(C - distance + 1):
        q[V + place, V + place + distance - 1] = 40.0
    k[V:, V:] = torch.eye(C)
    v[:V, :V] = torch.eye(V)
    attn.out.weight[:V, :V] = 20 * torch.eye(V)
    model.head.weight[:, :V] = 4 * torch.eye(V)
    return model


def periodic(period: int, rows: int = 30) -> torch.Tensor:
    """Rows (N, C + 1), each with its own run of different tokens again and again."""
    draw = random.Random(0)
    runs = [draw.sample(range(V), period) for _ in range(rows)]
    return torch.tensor([(run * (C + 1))[: C + 1] for run in runs])


def drawn(rows: int = 5) -> torch.Tensor:
    return torch.randint(V, (rows, C + 1), generator=torch.Generator().manual_seed(1))


def reach_of(model: GPT, rows: torch.Tensor) -> Reach:
    sizes = context_loss.lengths(C)
    bits = context_loss.cut_bits(model, rows, sizes, batch_tokens=64)
    return context_loss.reach(bits, sizes, range(len(rows)), lambda full: 0.01 * full, 200, 0)


# ---------------------------------------------------------------------- loss with the context cut


@pytest.mark.parametrize("name", SLOTS)
def test_cut_at_full_length_is_the_plain_loss(name: str) -> None:
    model, rows = noisy(**SLOTS[name]), drawn()
    plain = context_loss.position_bits(model, rows, batch=2)
    with torch.no_grad():
        nats = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    assert plain == pytest.approx(nats.view(5, C).numpy() / math.log(2), abs=EXACT)
    cut = context_loss.cut_bits(model, rows, [3, C], batch_tokens=30)
    assert cut[:, 1] == pytest.approx(plain[:, -1], abs=EXACT)
    assert np.abs(cut[:, 0] - plain[:, -1]).max() > 1e-2, "mutant: nothing is cut"


def test_cut_text_is_a_fresh_text() -> None:
    model, rows = noisy(), drawn()
    cut = context_loss.cut_bits(model, rows, [4], batch_tokens=1)[:, 0]
    fresh = context_loss.position_bits(model, rows[:, -5:], batch=9)[:, -1]
    assert cut == pytest.approx(fresh, abs=EXACT)
    # mutant: the same tokens at the positions that they have in the long text
    assert np.abs(not_renumbered(model, rows) - cut).max() > 1e-3


def not_renumbered(model: GPT, rows: torch.Tensor) -> np.ndarray:
    """Bits of the last token after the last four alone, which have the positions C - 4 to C - 1."""
    other = noisy()
    with torch.no_grad():
        other.position_embedding.weight.copy_(model.position_embedding.weight.roll(4 - C, dims=0))
    return context_loss.position_bits(other, rows[:, -5:], batch=9)[:, -1]


def test_a_start_token_stands_before_the_cut_text() -> None:
    model, rows = noisy(), drawn()
    found = context_loss.cut_bits(model, rows, [3], batch_tokens=8, start=[7])[:, 0]
    begun = torch.cat([torch.full((len(rows), 1), 7), rows[:, -4:]], dim=1)
    assert found == pytest.approx(context_loss.position_bits(model, begun, batch=9)[:, -1], abs=EXACT)


@pytest.mark.parametrize(("distance", "tokens"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (11, 16)])
def test_a_copying_model_needs_its_distance(distance: int, tokens: int) -> None:
    assert reach_of(copying(distance), periodic(distance)) == Reach(tokens, tokens, tokens)


def test_a_copying_model_predicts_what_stood_there() -> None:
    rows = periodic(5)
    bits = context_loss.position_bits(copying(5), rows, batch=8)
    assert bits[:, 4:].max() < 0.2, "from the fifth token on it is certain, and right"
    assert bits[:, :3].mean() > 2
    wrong = context_loss.position_bits(copying(4), rows, batch=8)
    assert wrong[:, 4:].mean() > 5, "mutant: a look that is one token short"


def test_a_model_of_the_last_token_alone_has_reach_one() -> None:
    model = noisy()
    with torch.no_grad():
        model.position_embedding.weight.zero_()
        for block in model.blocks:
            block.attn.out.weight.zero_()
            block.attn.out.bias.zero_()
    assert reach_of(model, drawn(20)) == Reach(1, 1, 1)
    assert reach_of(noisy(), drawn(20)).tokens > 1


def test_reach_by_hand() -> None:
    def found(columns: list[float], share: float = 0.01) -> int:
        bits = np.tile(columns, (4, 1))
        return context_loss.reach(bits, [1, 2, 4], [0, 1, 2, 3], lambda full: share * full, 50, 0).tokens

    assert found([3.0, 1.009, 1.0]) == 2
    assert found([3.0, 1.011, 1.0]) == 4
    assert found([0.9, 0.9, 1.0]) == 1, "better than all of the context is near enough"
    assert found([1.0, 2.0, 1.0]) == 4, "and stays there"


def test_reach_has_an_interval_over_documents() -> None:
    bits = np.array([[2.0, 1.0, 1.0]] * 9 + [[2.0, 3.0, 1.0]])  # one document of ten spoils the second column
    found = context_loss.reach(bits, [1, 2, 4], range(10), lambda full: 0.3 * full, 500, 0)
    assert found == Reach(2, 2, 4)
    assert context_loss.reach(bits[:9], [1, 2, 4], range(9), lambda full: 0.3 * full, 500, 0) == Reach(2, 2, 2)


@pytest.mark.parametrize(("most", "expected"), [(1, [1]), (8, [1, 2, 4, 8]), (24, [1, 2, 4, 8, 16, 24])])
def test_lengths(most: int, expected: list[int]) -> None:
    assert context_loss.lengths(most) == expected


def test_buckets() -> None:
    assert context_loss.buckets(24) == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 24)]
    assert context_loss.buckets(1) == [(1, 1)]


# ---------------------------------------------------------------------- intervals


def test_by_position_by_hand() -> None:
    bits = np.array([[4.0, 2.0, 1.0, 3.0], [6.0, 4.0, 3.0, 5.0], [5.0, 3.0, 2.0, 4.0]])
    points = context_loss.by_position(bits, [7, 3, 7], 100, 0)
    assert [(point.low, point.high, point.bits.mean) for point in points] == [(1, 1, 5), (2, 2, 3), (3, 4, 3)]
    assert points[2].bits.low == pytest.approx(2.5) and points[2].bits.high == pytest.approx(4), "documents 7 or 3 alone"


def test_rows_of_one_document_are_added() -> None:
    found = context_loss.by_document(np.array([[1.0, 2.0], [10.0, 20.0], [3.0, 4.0]]), [5, 2, 5])
    assert found.tolist() == [[10, 20], [4, 6]]


def test_intervals_are_those_of_the_formula() -> None:
    sums = np.random.default_rng(0).normal(3, 2, (400, 1))
    (found,) = bootstrap.intervals(sums, np.ones((400, 1)), 4000, 1)
    half = 1.96 * sums.std() / 20
    assert (found.mean - found.low, found.high - found.mean) == pytest.approx((half, half), rel=0.06)
    alike, _ = bootstrap.intervals(np.ones((400, 2)), np.ones((400, 2)), 100, 1)
    assert alike.low == alike.mean == alike.high == 1
    # mutant: tokens of one document taken for independent ones (each document is 4 times the same token)
    (wrong,) = bootstrap.intervals(np.repeat(sums, 4, axis=0), np.ones((1600, 1)), 4000, 1)
    assert (wrong.high - wrong.low) < 0.6 * (found.high - found.low)


def test_resampled_documents_are_as_many_as_there_are() -> None:
    assert bootstrap.weights(7, 50, 0).sum(1).tolist() == [7] * 50


# ---------------------------------------------------------------------- text, topics, attention


def test_stretches_take_turns() -> None:
    ids = [list(range(100, 120)), list(range(200, 205)), list(range(300, 320))]
    rows, document = coherence.stretches(ids, 5, 6, seed=0)
    assert sorted(document[:3]) == [0, 1, 2] and document.count(1) == 1, "the second document has one place only"
    assert all(
        row == list(range(row[0], row[0] + 5)) and row[0] // 100 - 1 == place for row, place in zip(rows, document, strict=True)
    )
    assert len({tuple(row) for row in rows}) == len(rows) == 5
    assert coherence.stretches(ids, 5, 6, seed=0) == (rows, document) != coherence.stretches(ids, 5, 6, seed=1)


def test_words_are_where_their_tokens_are() -> None:
    tokenizer = Tokenizer.train(["x"], 257)  # a token a byte
    ids = tokenizer.encode("ab cà đen 12 x")
    assert topics.placed_words(tokenizer, ids) == [(4, "cà"), (8, "đen"), (16, "x")], "the first may have begun before"
    end = tokenizer.end_id
    assert end is not None
    assert topics.placed_words(tokenizer, [*tokenizer.encode(" a"), end, *tokenizer.encode(" b")]) == [(2, "a"), (5, "b")]


def test_shares_by_hand() -> None:
    texts = [[(1, "whale"), (2, "the"), (3, "ship"), (9, "whale")], [(1, "ship"), (2, "tea"), (12, "cake")]]
    prompts = [frozenset({"whale", "sea"}), frozenset({"tea", "ship"})]
    near, far = topics.shares(texts, prompts, [(1, 8), (9, 16), (17, 32)], frozenset({"the"}), 100, 0)
    assert (near.low, near.high, near.words) == (1, 8, 4)
    assert near.own.mean == pytest.approx(3 / 4), "whale of whale, ship; ship, tea of both"
    assert near.others.mean == pytest.approx(1 / 4), "ship of the first text is in the second prompt"
    assert near.more.mean == pytest.approx(2 / 4)
    assert (far.own.mean, far.others.mean, far.words) == (1 / 2, 0, 2)
    assert topics.shares(texts, prompts, [(17, 32)], frozenset(), 100, 0) == []


def test_common_words_are_of_no_topic() -> None:
    common = topics.common_words([" ".join(["zzz"] * 5 + [chr(97 + n // 26) + chr(97 + n % 26) + "q" for n in range(300)])])
    assert "zzz" in common and len(common) == topics.COMMON_WORDS
    assert not topics.is_content("zzz", common) and not topics.is_content("ab", common) and topics.is_content("whale", common)


def test_uniform_attention_has_the_mean_distance_that_it_must_have() -> None:
    model = noisy()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.zero_()
            block.attn.qkv.bias.zero_()
    found = coherence.attention_distance(model, drawn(3)[:, :9])
    assert np.array(found) == pytest.approx(np.full((2, 2), 8 / 4), abs=EXACT)


def test_the_copying_model_looks_as_far_as_it_must() -> None:
    ((distance,),) = coherence.attention_distance(copying(5), periodic(5)[:2, :C])
    seen = [sum(range(i + 1)) / (i + 1) if i < 4 else 4 for i in range(C)]  # before the fifth token: all alike
    assert distance == pytest.approx(sum(seen) / C, abs=1e-3)


# ---------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of random numbers, and text."""
    path = tmp_path_factory.mktemp("model")
    draw = random.Random(0)
    texts = []
    for _ in range(8):
        words = ["".join(draw.choices("aeioustr", k=4)) for _ in range(60)]
        texts.append(" ".join(draw.choice(words) for _ in range(60)))
    tokenizer = Tokenizer.train(texts, 280)
    torch.manual_seed(0)
    model = GPT(preset("tiny", vocab_size=280))
    weights.save(model, path)
    tokenizer.save(path)
    (path / "text.txt").write_text("<|endoftext|>".join(texts))
    return path


SMALL = ["--windows", "8", "--targets", "12", "--prompts", "4", "--prompt_tokens", "8", "--new_tokens", "16", "--resamples", "50"]


def test_a_small_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["lab", "coherence", str(folder), "--source", str(folder / "text.txt"), "--device", "cpu", *SMALL]
    assert main([*arguments, "--out_dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "How far back the model really looks" in said and "Content words" in said
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["sizes"] == [1, 2, 4, 8, 16, 32] and found["gain"][-1]["mean"] == 0
    assert len(found["positions"]) == 6 and len(found["distance_tokens"]) == 2
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"results.json", "position.csv", "cut.csv", "report.md", "coherence.svg", "coherence.png"}
    assert len((tmp_path / "out" / "cut.csv").read_text().splitlines()) == 7
    assert "| 32 |" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--context_tokens", "33"], "the model has 32"),
        (["--new_tokens", "30"], "do not fit the model's context of 32"),
        (["--prompts", "1"], "prompts must be 0 or at least 2"),
        (["--source", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--source", "SHORT"], "0 document(s) have more than 32 tokens"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("a cat")
    given = [str(tmp_path / "short.txt") if each == "SHORT" else each for each in arguments]
    usual = [str(folder), "--source", str(folder / "text.txt"), "--device", "cpu", *SMALL]
    assert main(["lab", "coherence", *usual, *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
