"""Measures of texts by hand, the 3-gram judge by hand and by its sums, a judge with other tokens, and a small sweep."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from glassgpt.cli import main
from glassgpt.config import UserError, preset
from glassgpt.config.generate import Sampling
from glassgpt.config.temperature import Temperature
from glassgpt.lab import reference
from glassgpt.lab import text_measures as measure
from glassgpt.lab.temperature import cells as temperature_cells
from glassgpt.lab.temperature import pictures as temperature_pictures
from glassgpt.lab.temperature import report as temperature_report
from glassgpt.lab.temperature import sweep as lab
from glassgpt.lab.temperature.cells import Cell, Limits, Measures, Result, Written, limits_of, measures_of
from glassgpt.lab.temperature.ngram import Ngram
from glassgpt.loading import load
from glassgpt.model import GPT
from glassgpt.model.weights import save
from glassgpt.text import Tokenizer

EXACT = 1e-12
LINE = "the cat sat on the mat and the old dog sat on a big log by the red hen"


# ---------------------------------------------------------------------- measures by hand


@pytest.mark.parametrize(
    ("ids", "share"), [([], 0), ([1, 2], 0), ([1, 2, 3, 4], 0), ([1, 2, 3, 1, 2, 3], 1 / 4), ([7] * 10, 7 / 8)]
)
def test_repeated_share_by_hand(ids: list[int], share: float) -> None:
    assert measure.repeated_share(ids) == pytest.approx(share, abs=EXACT)


def test_repeats_say_where() -> None:
    assert measure.repeats([1, 2, 1, 2, 1], 2) == [False, False, True, True]


@pytest.mark.parametrize(
    ("texts", "n", "share"),
    [
        ([[1, 2, 1, 2]], 1, 2 / 4),
        ([[1, 2, 1, 2]], 2, 2 / 3),  # 12, 21, 12
        ([[1, 2, 3], [1, 2, 4]], 2, 3 / 4),  # over both texts, and no run crosses from one to the other
        ([[1, 2, 3], [1, 2, 4]], 3, 1),
        ([[1], []], 2, 0),
    ],
)
def test_distinct_by_hand(texts: list[list[int]], n: int, share: float) -> None:
    assert measure.distinct(texts, n) == pytest.approx(share, abs=EXACT)


def test_self_bleu_of_equal_and_of_foreign_texts() -> None:
    assert measure.self_bleu([[1, 2, 3, 4, 5]] * 3) == pytest.approx(1, abs=EXACT)
    assert measure.self_bleu([[1, 2, 3, 4, 5]]) == 0
    # nothing in common: every order has 0.1 matches in place of 0
    expected = math.prod(0.1 / count for count in (5, 4, 3, 2)) ** (1 / 4)
    assert measure.self_bleu([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]) == pytest.approx(expected, abs=EXACT)


def test_self_bleu_by_hand() -> None:
    texts = [[1, 1, 2, 3], [1, 2, 3], [1, 1, 1, 4]]
    # text 0: 1-grams 1,1,2,3 all matched (1 twice in text 2); 2-grams 11, 12, 23 all matched; references of 3 and 4: no penalty
    # text 1: 1, 2, 3 and 12, 23 are in text 0; the closest reference has 4 items
    # text 2: 1 at most twice elsewhere, 4 nowhere: 2 of 4; 2-grams 11, 11, 14: one of three
    expected = [1.0, math.exp(1 - 4 / 3), math.sqrt((2 / 4) * (1 / 3))]
    assert measure.self_bleu(texts, n=2) == pytest.approx(sum(expected) / 3, abs=EXACT)


def slow_self_bleu(texts: Sequence[Sequence[int]], n: int) -> float:
    """The definition, one text against each of the others."""
    total = 0.0
    for i, text in enumerate(texts):
        others = [other for j, other in enumerate(texts) if j != i]
        log = 0.0
        for order in range(1, n + 1):
            runs = measure.ngrams(text, order)
            allowed = {run: max(measure.ngrams(other, order).count(run) for other in others) for run in set(runs)}
            matches = sum(min(runs.count(run), most) for run, most in allowed.items())
            log += math.log((matches or 0.1) / max(1, len(runs))) / n
        closest = min((abs(len(other) - len(text)), len(other)) for other in others)[1]
        total += math.exp(log) * (1 if len(text) > closest else math.exp(1 - closest / len(text)))
    return total / len(texts)


def test_self_bleu_is_its_definition_and_clipping_matters() -> None:
    draw = random.Random(0)
    texts = [[draw.randrange(3) for _ in range(draw.randint(4, 9))] for _ in range(6)]
    found = measure.self_bleu(texts, 3)
    assert found == pytest.approx(slow_self_bleu(texts, 3), abs=EXACT)
    # mutant: a text that may be its own reference
    assert abs(measure.self_bleu([*texts, *texts], 3) - found) > 1e-2


def test_words_and_bytes_by_hand() -> None:
    assert measure.words("Don't, Nước-mắm 3 times; x_y") == ["don't", "nước-mắm", "times", "x", "y"]
    assert measure.unknown_share("the cet sat", {"the", "sat"}) == pytest.approx(1 / 3, abs=EXACT)
    assert measure.unknown_share("!!! 17", {"the"}) == 1
    assert measure.invalid_share(b"") == 0
    assert measure.invalid_share("ế".encode() + b"\xff") == pytest.approx(1 / 4, abs=EXACT)
    assert measure.invalid_share(b"ab" + "ế".encode()[:2]) == 0, "a character that the end cuts off"
    assert measure.invalid_share("ế".encode()[:2] + b"ab") == pytest.approx(2 / 4, abs=EXACT)


def test_windows_by_hand() -> None:
    assert measure.window_means([1, 2, 3, 6], 2) == [1.5, 2.5, 4.5]
    assert measure.window_means([1, 2], 5) == [1.5]
    assert measure.window_means([], 5) == []
    assert measure.first_above([0, 0, 5, 5, 0], 2, 4.9) == 2
    assert measure.first_above([0, 0, 5, 5, 0], 2, 5.0) is None


# ---------------------------------------------------------------------- judges


def test_kneser_ney_by_hand() -> None:
    model = Ngram([[0, 1, 0, 1, 2]], vocab_size=4, order=2)
    # pairs: 01 twice, 10 and 12 once; ids by how many different ones they follow: 0, 1, 2 once each, so D = 1/2 for want of twos
    single = (1 - 0.5) / 3 + 0.5 * 3 / 3 / 4
    assert model.probability([], 0) == pytest.approx(single, abs=EXACT)
    assert model.probability([], 3) == pytest.approx(0.5 / 4, abs=EXACT)
    # pairs: two seen once, one twice: D = 2 / (2 + 2 * 1)
    assert model.probability([0], 1) == pytest.approx((2 - 0.5) / 2 + 0.5 * 1 / 2 * single, abs=EXACT)
    assert model.probability([1], 1) == pytest.approx(0.5 * 2 / 2 * single, abs=EXACT)
    assert model.probability([3], 1) == pytest.approx(single, abs=EXACT), "nothing is known of what follows 3"
    assert model.bits([0], [1, 2]) == pytest.approx(
        [-math.log2(model.probability([0], 1)), -math.log2(model.probability([1], 2))]
    )


def test_probabilities_of_the_ngram_model_sum_to_one() -> None:
    draw = random.Random(1)
    texts = [[draw.choice([0, 0, 1, 2, 3, 4]) for _ in range(40)] for _ in range(5)]
    model = Ngram(texts, vocab_size=7)
    for before in ([], [0], [6], [0, 0], [1, 2], [6, 0], [0, 6], [5, 4, 3]):
        assert sum(model.probability(before, token) for token in range(7)) == pytest.approx(1, abs=EXACT), before
    assert model.probability([9, 1, 2], 3) == model.probability([1, 2], 3), "only two ids back"


@pytest.fixture(scope="module")
def words_tokenizer() -> Tokenizer:
    return Tokenizer.train([LINE] * 3, 300)


def noisy(tokenizer: Tokenizer, **changes: object) -> GPT:
    torch.manual_seed(0)
    model = GPT(preset("tiny", vocab_size=tokenizer.vocab_size, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def test_a_second_model_with_the_same_tokens_gives_their_bits(words_tokenizer: Tokenizer) -> None:
    model = noisy(words_tokenizer)
    ids = words_tokenizer.encode(LINE)
    found = lab.second_judge(model, words_tokenizer, words_tokenizer)(ids[:4], ids[4:])
    own, _ = lab.measured(model, ids[:4], ids[4:], Sampling(), words_tokenizer.vocab_size)
    assert found == pytest.approx(own, abs=1e-5)


def test_a_second_model_with_other_tokens_gives_the_same_total(words_tokenizer: Tokenizer) -> None:
    of_bytes = Tokenizer.train(["x"], 257)
    second = noisy(of_bytes, context_tokens=128)
    ids = words_tokenizer.encode(LINE)
    found = lab.second_judge(second, of_bytes, words_tokenizer)(ids[:4], ids[4:])
    before, data = words_tokenizer.decode_bytes(ids[:4]), words_tokenizer.decode_bytes(ids)
    each = {byte: of_bytes.encode_bytes(bytes([byte]))[0] for byte in data}
    log_p = second(torch.tensor([[each[byte] for byte in data]]))[0].log_softmax(-1).detach()
    bits = [-float(log_p[i - 1, each[data[i]]]) / math.log(2) for i in range(len(before), len(data))]
    assert sum(found) == pytest.approx(sum(bits), rel=1e-5)
    first = len(words_tokenizer.token_bytes(ids[4]))
    assert found[0] == pytest.approx(sum(bits[:first]), rel=1e-4), "each token has the bits of its own bytes"
    with pytest.raises(UserError, match="context is 32 tokens"):
        lab.second_judge(noisy(of_bytes), of_bytes, words_tokenizer)(ids[:4], ids[4:])


# ---------------------------------------------------------------------- cells


def written(ids: list[int], judge_bits: list[float] | None = None, own: float = 3.0) -> Written:
    return Written(ids, bytes(97 + i % 26 for i in ids), [own] * len(ids), [2.0] * len(ids), judge_bits)


def test_measures_of_a_cell_by_hand() -> None:
    texts = [written(list(range(20)), [4.0] * 20), written([1, 2] * 10, [1.0] * 20, own=1.0)]
    found = measures_of(texts, None, Limits(repeats=0.5, judge_bits=3.9))
    assert (found.entropy_bits, found.own_perplexity) == (2, pytest.approx(4))
    assert found.judge_perplexity == pytest.approx(2**2.5)
    assert found.repeated_3 == pytest.approx((0 + 16 / 18) / 2)
    assert (found.loop_share, found.loop_token, found.chaos_share, found.chaos_token) == (0.5, 0, 0.5, 0)
    assert found.unknown_words is None
    assert measures_of(texts, {"x"}, None).unknown_words == 1
    assert measures_of(texts, None, None).loop_share is None


def test_real_text_rarely_breaks_down_by_its_own_limits() -> None:
    draw = random.Random(0)
    real = [written([draw.randrange(50) for _ in range(40)], [draw.random() for _ in range(40)]) for _ in range(100)]
    limits = limits_of(real)
    assert limits is not None
    found = measures_of(real, None, limits)
    assert found.chaos_share == pytest.approx(0.05, abs=0.011)
    assert limits_of([]) is None


def result_of(cells: Sequence[Measures], real: Sequence[Measures], factor: float = 2.0) -> Result:
    config = {"model": "m", "factor": factor, "top_p": [1.0], "temperatures": list(range(len(cells)))}
    config |= {"samples": 1, "new_tokens": 8, "seed": 0, "out_dir": "x"}
    made = [Cell(float(i), 1.0, each, ["text"]) for i, each in enumerate(cells)]
    return Result(config, ["a prompt"], "judge", made, list(real), None)


def measures(repeated: float, perplexity: float, unknown: float) -> Measures:
    numbers = {"repeated_3": repeated, "judge_perplexity": perplexity, "unknown_words": unknown}
    return Measures(**dict.fromkeys(Measures.__dataclass_fields__, 0.5) | numbers)


def test_usable_is_inside_the_widened_band() -> None:
    real = [measures(0.02, 100, 0.03), measures(0.04, 120, 0.05)]
    cells = [
        measures(0.08, 60, 0.01),
        measures(0.1, 60, 0.01),  # repeats more than twice 0.04 and a hundredth
        measures(0.0, 49, 0.01),  # too predictable: below half of 100
        measures(0.0, 241, 0.01),
        measures(0.0, 60, 0.12),
        measures(0.0, 240, 0.11),
    ]
    result = result_of(cells, real)
    fails = [result.fails(cell) for cell in result.cells]
    assert fails == [[], ["repeated_3"], ["judge_perplexity"], ["judge_perplexity"], ["unknown_words"], []]
    assert result.usable(1.0) == [0, 5]
    assert len(result.criteria()) == 3 and "at most 0.09" in result.criteria()[0]
    assert result_of(cells, real, factor=1.0).usable(1.0) == [], "mutant: a band that is not widened"
    assert "Nothing" not in temperature_report.verdicts(result)[0]
    assert "no reference" in temperature_report.verdicts(result_of(cells, []))[0].lower()


# ---------------------------------------------------------------------- the reference and a sweep


def test_known_and_measured_documents_are_not_the_same(tmp_path: Path, words_tokenizer: Tokenizer) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("<|endoftext|>".join(f"{chr(97 + n // 26)}{chr(97 + n % 26)} " * 30 for n in range(30)))
    found = reference.read([str(path)], 1.0, words_tokenizer, 4, 8, seed=0)
    known = {words_tokenizer.decode(ids).split()[1] for ids in found.known}
    measured = {words_tokenizer.decode([*before, *ids]).split()[1] for before, ids in found.pieces}
    assert len(known) == 15 and len(measured) == 15 and not known & measured
    assert all(len(before) == 4 and len(ids) == 8 for before, ids in found.pieces)
    with pytest.raises(UserError, match="no document has"):
        reference.read([str(path)], 1.0, words_tokenizer, 400, 800, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, words_tokenizer: Tokenizer) -> Path:
    """A saved model of random numbers, and text of its vocabulary."""
    path = tmp_path_factory.mktemp("model")
    save(noisy(words_tokenizer, context_tokens=48), path)
    words_tokenizer.save(path)
    draw = random.Random(0)
    lines = [" ".join(draw.choice(LINE.split()) for _ in range(60)) for _ in range(30)]
    (path / "real.txt").write_text("<|endoftext|>".join(lines))
    (path / "prompts.txt").write_text("the cat\n\nthe old dog\n")
    return path


def test_a_small_sweep(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["lab", "temperature", str(folder), "--temperatures", "0", "1", "10", "--top_p", "0.5", "1", "--new_tokens", "12"]
    arguments += ["--prompt_file", str(folder / "prompts.txt"), "--groups", "3", "--device", "cpu"]
    out = tmp_path / "out"
    assert main([*arguments, "--reference", str(folder / "real.txt"), "--out_dir", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "results.json").read_text())
    assert found["prompts"] == ["the cat", "the old dog"]
    cells = {(cell["top_p"], cell["temperature"]): cell["measures"] for cell in found["cells"]}
    assert len(cells) == 6 and len(found["real"]) == 3
    for top_p in (0.5, 1):
        entropies = [cells[top_p, t]["entropy_bits"] for t in (0, 1, 10)]
        assert entropies == sorted(entropies) and entropies[0] == 0
    assert cells[1, 10]["entropy_bits"] > cells[0.5, 10]["entropy_bits"]
    assert all(group["entropy_bits"] is None and group["judge_perplexity"] > 1 for group in found["real"])
    names = {path.name for path in out.iterdir()}
    assert names >= {"results.json", "cells.csv", "report.md", "temperature-curves.svg", "temperature-maps.png"}
    rows = list(csv.DictReader((out / "cells.csv").read_text().splitlines()))
    assert len(rows) == 6 + 3 and rows[-1]["temperature"] == "real text"
    assert "Usable" in (out / "report.md").read_text()

    again = tmp_path / "again"
    assert main([*arguments, "--out_dir", str(again)]) == 0  # without real text and without a judge
    said = capsys.readouterr().out
    assert "Nobody" not in said and "No judge" in said and "No reference" in said
    plain = json.loads((again / "results.json").read_text())
    assert plain["usable"] is None and plain["cells"][0]["measures"]["judge_perplexity"] is None
    texts = [[cell["texts"] for cell in each["cells"]] for each in (found, plain)]
    assert texts[0] == texts[1], "the seed decides the texts"


def test_a_second_model_judges(folder: Path, words_tokenizer: Tokenizer) -> None:
    judge, name = lab.make_judge(Temperature(second=str(folder)), "cpu", words_tokenizer, None)
    assert judge is not None and name == str(folder)
    model, _ = load(folder)
    ids = words_tokenizer.encode("the old dog sat")
    text = lab.priced(model, words_tokenizer, ids[:2], ids[2:], Sampling(), judge)
    assert text.judge_bits == pytest.approx(text.own_bits, rel=1e-4)
    assert lab.make_judge(Temperature(), "cpu", words_tokenizer, None) == (None, "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--temperatures", "-1"], "temperature must be at least 0"),
        (["--top_p", "0"], "top_p must be above 0"),
        (["--new_tokens", "60"], "do not fit a context of 48"),
        (["--prompt_file", "nowhere.txt"], "cannot read the prompt file nowhere.txt"),
        (["--temperatures", "1", "1"], "temperatures must name"),
        (["--reference", "nowhere.txt"], "nowhere.txt: no such file"),
    ],
)
def test_mistakes_are_one_line(folder: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    usual = ["--new_tokens", "8", "--prompt_file", str(folder / "prompts.txt"), "--device", "cpu"]
    assert main(["lab", "temperature", str(folder), *usual, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_what_the_font_lacks_is_a_box() -> None:
    assert temperature_pictures.printable("cà phê\x00中") == "cà phê□□"


def test_every_measure_has_a_heading() -> None:
    assert set(temperature_cells.COLUMNS) == set(temperature_cells.MEASURES)
    assert set(temperature_pictures.MAPPED) <= set(temperature_cells.MEASURES)


def test_judge_type_is_what_ngrams_give() -> None:
    judge: Callable[[Sequence[int], Sequence[int]], list[float]] = Ngram([[1, 2, 3]], 5).bits
    assert len(judge([1], [2, 3])) == 2
