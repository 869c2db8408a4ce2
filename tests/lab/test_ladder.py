"""The ladder: rungs are one change apart, intervals are Student's, and a miniature one is climbed, broken off and reported."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import scipy.stats
import torch
from rich.console import Console

from glassgpt.cli import main, parse
from glassgpt.config import ModelConfig, OptimConfig, UserError
from glassgpt.config.files import to_plain
from glassgpt.config.ladder import CHANGES, Ladder, Rung, climb
from glassgpt.data import Batch
from glassgpt.generation import KVCache
from glassgpt.lab import series
from glassgpt.lab.ladder import ladder as lab
from glassgpt.lab.ladder import report as ladder_report
from glassgpt.lab.ladder.compare import (
    ALONE,
    BETTER,
    COUNTING,
    SAME,
    UNDECIDED,
    WORSE,
    Estimate,
    Result,
    Trained,
    compare,
    estimate,
    findings,
    t_quantile,
    verdict,
)
from glassgpt.lab.ladder.speed import Cost, Held, measure
from glassgpt.model import GPT, plain
from glassgpt.train import machine
from glassgpt.train.run import Log, read_log

CPU = torch.device("cpu")
TINY = ModelConfig(vocab_size=300, context_tokens=16, n_layer=2, n_head=2, width=24)
SMALL: dict[str, Any] = {
    "model": TINY, "rungs": ("kernel", "rope", "muon"), "amount": 1024, "batch_size": 4, "seeds": 2, "turns": 1, "device": "cpu",
    "json": True,
}  # fmt: skip


def flat(rung: Rung) -> dict[str, Any]:
    """Every field that decides what a rung is, by its dotted name."""

    def walk(values: dict[str, Any], where: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            yield from walk(value, f"{where}{key}.") if isinstance(value, dict) else [(f"{where}{key}", value)]

    return dict(walk({"model": to_plain(rung.model), "optim": to_plain(rung.optim), "written_out": rung.written_out}, ""))


def counted(shape: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(shape).parameters())


# ---------------------------------------------------------------------- rungs

ONE_THING = {
    "kernel": {"written_out"},
    "rmsnorm": {"model.norm"},
    "rope": {"model.position"},
    "swiglu": {"model.mlp"},
    "gqa": {"model.n_kv_head"},
    "qk-norm": {"model.qk_norm"},
    "untied": {"model.tied_head"},
    "window": {"model.spans", "model.window_tokens"},
    "moe": {"model.moe.experts"},
    "muon": {"optim.optimizer", "optim.learning_rate"},
}


@pytest.mark.parametrize("mode", ["cumulative", "single"])
def test_each_rung_is_one_change_away(mode: Any) -> None:
    config = Ladder(mode=mode)
    rungs = climb(config)
    assert [rung.name for rung in rungs] == ["base", *config.rungs] == list(CHANGES)
    assert set(ONE_THING) == set(config.rungs)
    by_name = {rung.name: rung for rung in rungs}
    for place, rung in enumerate(rungs[1:], 1):
        assert rung.before == (rungs[place - 1].name if mode == "cumulative" else "base")
        here, there = flat(rung), flat(by_name[rung.before])
        assert {key for key in here if here[key] != there[key]} == ONE_THING[rung.name], rung.name
    base = rungs[0].model
    assert (base.norm, base.position, base.mlp, base.kv_heads, base.tied_head) == ("layer", "learned", "gelu", base.n_head, True)


def test_other_orders_and_choices() -> None:
    rungs = climb(Ladder(rungs=("moe", "gqa", "window", "muon"), kv_heads=1, window_tokens=7, experts=4, top_k=1, muon_rate=0.5))
    assert not any(rung.written_out for rung in rungs)  # nothing is timed written out when no rung is about it
    top = rungs[-1]
    assert (top.model.n_kv_head, top.model.window_tokens, top.model.moe.experts, top.model.moe.top_k) == (1, 7, 4, 1)
    assert (top.optim.optimizer, top.optim.learning_rate) == ("muon", 0.5)
    assert rungs[1].model.expert_width == rungs[0].model.hidden_width
    for n_head, shared in ((12, 6), (25, 5), (2, 1), (3, 1)):
        (_, gqa) = climb(Ladder(model=dataclasses.replace(TINY, width=n_head * 4, n_head=n_head), rungs=("gqa",)))
        assert gqa.model.kv_heads == shared


@pytest.mark.parametrize("shape", [Ladder().model, ModelConfig(), dataclasses.replace(TINY, width=320, n_head=5)])
def test_equal_parameters_stay_equal(shape: ModelConfig) -> None:
    rungs = {rung.name: rung.model for rung in climb(Ladder(model=shape, mode="single"))}
    base = counted(rungs["base"])
    assert counted(rungs["swiglu"]) == pytest.approx(base, rel=0.02)
    for name in ("kernel", "muon"):
        assert counted(rungs[name]) == base
    moe = rungs["moe"]
    assert counted(moe) > 1.5 * base
    one_expert = 2 * moe.width * moe.expert_width + moe.expert_width + moe.width  # two matrices, two biases
    idle = moe.n_layer * (moe.moe.experts - moe.moe.top_k) * one_expert
    result = made({"base": (1.0,), "moe": (1.0,)}, Ladder(model=shape, mode="single", rungs=("moe",), seeds=1))
    row = result.rows[1]
    assert (row.parameters, row.active_parameters) == (counted(moe), counted(moe) - idle)
    assert row.active_parameters == pytest.approx(base, rel=0.02)


# ---------------------------------------------------------------------- budgets


def test_one_budget_of_three_kinds() -> None:
    config = Ladder()
    base, *_, moe, muon = climb(config)
    assert {lab.steps(config, rung, 9.9) for rung in (base, moe, muon)} == {400}  # 409,600 tokens of 8 x 128
    seconds = dataclasses.replace(config, budget="seconds", amount=10)
    assert (lab.steps(seconds, base, 0.03), lab.steps(seconds, moe, 0.3)) == (333, 33)
    flops = dataclasses.replace(config, budget="flops", amount=1e12, rungs=("untied", "window"))
    base, untied, window = climb(flops)
    D, L, V, T = 64, 4, 512, 128
    per_token = 6 * (12 * L * D * D + V * D) + 12 * L * T * D
    assert lab.steps(flops, base, 9.9) == lab.steps(flops, untied, 9.9) == int(1e12 // (per_token * 1024))
    assert lab.steps(flops, window, 9.9) == int(1e12 // ((per_token - 12 * 2 * 96 * D) * 1024))  # two layers see 32 of 128
    with pytest.raises(UserError, match=r"rung base: a step takes 0.3 seconds and amount is 0.1; raise it"):
        lab.steps(dataclasses.replace(seconds, amount=0.1), base, 0.3)


def test_runs_that_would_be_equal_are_trained_once() -> None:
    config = Ladder(**SMALL)
    rungs = climb(config)
    costs = {rung.name: Cost("plain", [0.1 if rung.written_out else 0.05], [0.1]) for rung in rungs}
    planned = lab.plan(config, rungs, costs)
    assert [run.out_dir for run in planned["base"]] == ["base-s0", "base-s1"]
    assert planned["kernel"] == planned["base"]
    assert [run.seed for run in planned["rope"]] == [0, 1] and planned["rope"][0].model.position == "rope"
    everything = [run for own in planned.values() for run in own]
    assert {(run.max_steps, run.batch_size, run.optim.warmup_steps) for run in everything} == {(16, 4, 1)}
    assert {(run.precision, run.compile, run.data.sources) for run in everything} == {("fp32", "off", ("embedded",))}
    in_time = lab.plan(dataclasses.replace(config, budget="seconds", amount=2), rungs, costs)
    assert [in_time[name][0].max_steps for name in ("base", "kernel")] == [20, 40]  # the faster kernel gets further
    assert in_time["kernel"][0].out_dir == "kernel-s0"
    other = lab.plan(dataclasses.replace(config, precision="bf16", seed=5), rungs, costs)
    assert (other["rope"][0].out_dir, other["rope"][0].precision) == ("rope-s5", "bf16")


# ---------------------------------------------------------------------- statistics


def made(losses: dict[str, tuple[float, ...]], config: Ladder) -> Result:
    """A report on made-up losses; a step took 0.1 s everywhere."""
    rungs = climb(config)
    costs = {rung.name: Cost("plain", [0.1], [0.01], 1000, 64.0, [1.0]) for rung in rungs}
    runs = {
        name: [Trained(f"{name}-s{seed}", 10, bits, 5000, 1.5) for seed, bits in enumerate(own)] for name, own in losses.items()
    }
    return compare(config, {"device": "cpu", "threads": 1}, rungs, costs, runs)


def test_t_quantiles_in_closed_form() -> None:
    assert t_quantile(1) == pytest.approx(math.tan(math.pi * 0.475), rel=1e-10)  # Cauchy's
    assert t_quantile(2) == pytest.approx(0.95 * math.sqrt(2 / (4 * 0.975 * 0.025)), rel=1e-10)
    assert t_quantile(10**7) == pytest.approx(1.959964, abs=1e-5)  # the normal's


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_intervals_are_scipys(n: int) -> None:
    values = np.random.default_rng(n).normal(3, 0.1, n)
    found = estimate(values.tolist())
    expected = scipy.stats.t.interval(0.95, n - 1, loc=values.mean(), scale=scipy.stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-9)
    assert found.mean == pytest.approx(values.mean(), rel=1e-12) and found.half == pytest.approx(expected[1] - values.mean())


def test_verdicts() -> None:
    for low, high, said in ((-2, -1, BETTER), (1, 2, WORSE), (-1, 1, UNDECIDED), (0, 1, UNDECIDED), (-1, 0, UNDECIDED)):
        assert verdict(Estimate((low + high) / 2, low, high, ())) == said
    assert verdict(estimate([0.5])) == ALONE and verdict(None) == ""


def test_differences_are_paired_by_seed() -> None:
    """Seeds differ by 0.5, the rung by 0.01 in each: only a paired difference sees it."""
    base = (3.0, 3.5, 2.5)
    losses = {"base": base, "rope": tuple(x - d for x, d in zip(base, (0.010, 0.011, 0.009), strict=True))}
    losses["swiglu"] = (2.95, 3.55, 2.45)
    result = made(losses, Ladder(rungs=("rope", "swiglu")))
    _, rope, swiglu = result.rows
    assert rope.difference is not None and rope.difference.mean == pytest.approx(-0.010) and rope.verdict == BETTER
    apart = scipy.stats.ttest_rel(losses["rope"], base).confidence_interval(0.95)
    assert (rope.difference.low, rope.difference.high) == pytest.approx((apart.low, apart.high))
    assert rope.bits_per_byte.low is not None and rope.bits_per_byte.low < 2.5  # unpaired, the two cannot be told apart
    assert swiglu.before == "rope" and swiglu.verdict == UNDECIDED
    assert swiglu.from_base is not None and swiglu.from_base.mean == pytest.approx(sum(losses["swiglu"]) / 3 - 3)
    assert (rope.training_tokens_per_second, rope.decoding_tokens_per_second) == pytest.approx((10_240, 100))
    assert (rope.steps, rope.tokens, rope.seconds, result.held_out_bytes) == (10, 10_240, 1.5, 5000)
    text = " ".join(findings(result))
    assert "Every run had 409,600 tokens; 3 seeds" in text
    assert "Fewer bits per byte than the rung before: rope (-0.010 ± 0.002)." in text
    assert f"Against the rung before {UNDECIDED}" in text and text.count("swiglu") == 1
    assert "2 comparisons at 95 %: about 0.1 of them" in text
    assert "More bits" not in text and "kernel" not in text


def test_single_mode_compares_with_the_base_and_one_seed_has_no_interval() -> None:
    result = made({"base": (3.0,), "rope": (2.9,), "moe": (3.1,)}, Ladder(rungs=("rope", "moe"), mode="single", seeds=1))
    assert [row.before for row in result.rows] == [None, "base", "base"]
    assert [row.verdict for row in result.rows] == ["", ALONE, ALONE]
    moe = result.rows[2]
    assert moe.difference == moe.from_base and moe.difference is not None and moe.difference.values == (pytest.approx(0.1),)
    assert moe.bits_per_byte == Estimate(3.1, None, None, (3.1,))
    assert "From the bottom" not in " ".join(findings(result))


# ---------------------------------------------------------------------- costs


def batch(step: int) -> Batch:
    ids = torch.randint(300, (4, 17), generator=torch.Generator().manual_seed(step))
    return Batch(ids[:, :-1], ids[:, 1:])


def test_bytes_are_those_alive_at_once() -> None:
    torch.ones(8)  # before: not counted
    with Held() as held:
        a = torch.ones(1000)  # 4,000 bytes
        b = (a * 2)[:10]  # a view holds its whole
        c = a.add_(1)  # in place: nothing new
        assert (held.now, held.peak) == (8000, 8000)
        del b
        assert (held.now, held.peak) == (4000, 8000)
        d = a.double()
        assert (held.now, held.peak) == (12_000, 12_000)
        del a, c, d
    assert (held.now, held.peak) == (0, 12_000)


def test_costs_are_the_rungs_own() -> None:
    config = Ladder(**SMALL | {"rungs": ("kernel", "gqa", "window", "moe"), "window_tokens": 4})
    said: list[str] = []
    costs = measure(config, climb(config), batch, CPU, said.append)
    assert said == ["speed: turn 1 of 1"]
    assert [cost.kernel for cost in costs.values()] == ["plain", "blocked", "blocked", "blocked", "blocked"]
    T, L, W, full = 16, 2, 12, 2 * 2 * 12 * 4  # of one layer and token: k and v of two heads of 12 numbers of 4 bytes
    assert costs["kernel"].cache_bytes_per_token == costs["base"].cache_bytes_per_token == L * full
    assert costs["gqa"].cache_bytes_per_token == L * 2 * 1 * W * 4
    assert costs["window"].cache_bytes_per_token == 2 * W * 4 * (T + 4) / T
    base = counted(TINY)
    assert 16 * base < costs["base"].peak_bytes < 16 * base + 500_000  # weights, gradients, two moments; activations
    assert costs["moe"].peak_bytes > costs["window"].peak_bytes
    for cost in costs.values():
        assert len(cost.token_seconds) == 1 and cost.step_seconds and cost.step > 0 and cost.decode_rate > 0
        assert all(4 < loss < 7 for loss in cost.first_losses) and len(cost.first_losses) == 5
    difference = max(abs(a - b) for a, b in zip(costs["base"].first_losses, costs["kernel"].first_losses, strict=True))
    assert difference < 1e-5 < abs(costs["gqa"].first_losses[-1] - costs["base"].first_losses[-1])


def test_a_wrong_kernel_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def everything_seen(q: Any, k: Any, v: Any, mask: Any, *rest: Any) -> torch.Tensor:
        return plain(q, k, v, torch.ones(1, 1, q.size(2), k.size(2), dtype=torch.bool), *rest)

    monkeypatch.setattr(machine, "attend_by", lambda device: everything_seen)
    monkeypatch.setattr("glassgpt.lab.ladder.speed.TURN_SECONDS", 0.0)
    config = Ladder(**SMALL | {"rungs": ("kernel",), "seeds": 1, "model": dataclasses.replace(TINY, width=48)})
    costs = measure(config, climb(config), batch, CPU, lambda _: None)
    costs = {name: dataclasses.replace(cost, step_seconds=[1.0]) for name, cost in costs.items()}
    runs = {name: [Trained("x", 1, 3.0, 1, 1.0)] for name in costs}
    result = compare(config, {}, climb(config), costs, runs)
    assert result.kernel_difference is not None and result.kernel_difference > 1e-4


def test_a_cache_is_read_as_the_engine_fills_it() -> None:
    (_, window) = climb(Ladder(rungs=("window",), model=TINY, window_tokens=4))
    cache = KVCache(window.model)
    model = GPT(window.model).eval()
    with torch.no_grad():
        for _ in range(16):
            model.hidden(torch.zeros(1, 1, dtype=torch.long), cache)
    assert cache.nbytes / 16 == 2 * 2 * 12 * 4 * (16 + 4) / 16


# ---------------------------------------------------------------------- the whole


@pytest.fixture(autouse=True)
def no_loss_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture a run takes longer than the run, and is tested elsewhere."""
    monkeypatch.setattr("glassgpt.train.session.plot_loss", lambda run: [])
    monkeypatch.setattr("glassgpt.lab.ladder.speed.TURN_SECONDS", 0.05)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    words = "the cat sat on a mat and saw the small dog run to its old house by the sea".split()
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(" ".join(generator.choice(words, 12)) for _ in range(200)))
    return str(path)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, source: str) -> tuple[Ladder, Result]:
    """A miniature ladder of three rungs above the base, climbed once."""
    config = Ladder(out_dir=str(tmp_path_factory.mktemp("ladder") / "out"), sources=(source,), **SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glassgpt.train.session.plot_loss", lambda run: [])
        return config, lab.ladder(config)


class Page(HTMLParser):
    """Tags that are open at the end, and every attribute's value."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.values: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.values += [(name, value or "") for name, value in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag != "meta":
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_ladder_is_climbed_and_reported(done: tuple[Ladder, Result]) -> None:
    config, result = done
    out = Path(config.out_dir)
    found = json.loads((out / "ladder.json").read_text())
    assert found == json.loads(json.dumps(result.plain()))
    assert set(found) == {"config", "machine", "counting", "held_out_bytes", "kernel_difference", "rungs", "findings"}
    assert [rung["name"] for rung in found["rungs"]] == ["base", "kernel", "rope", "muon"]
    assert sorted(path.name for path in (out / "runs").iterdir()) == [
        f"{name}-s{s}" for name in ("base", "muon", "rope") for s in (0, 1)
    ]
    batches = set()
    for rung in found["rungs"]:
        assert set(COUNTING) <= set(rung)
        logs = [read_log(out / "runs" / name) for name in rung["runs"]]
        assert rung["bits_per_byte"]["values"] == [log[-1]["val_bits_per_byte"] for log in logs]
        assert rung["bits_per_byte"]["mean"] == pytest.approx(sum(rung["bits_per_byte"]["values"]) / 2)
        assert all(sum(entry["tokens"] for entry in log) == rung["tokens"] == 1024 for log in logs)
        assert rung["seconds"] == pytest.approx(sum(entry["seconds"] for log in logs for entry in log) / 2)
        assert min(rung["training_tokens_per_second"], rung["decoding_tokens_per_second"], rung["peak_bytes"], rung["flops"]) > 0
        batches.add(found["held_out_bytes"] == logs[0][-1]["val_bytes"])
    assert batches == {True}
    base, kernel, rope, _ = found["rungs"]
    assert kernel["runs"] == base["runs"] and kernel["verdict"] == SAME and kernel["difference"]["mean"] == 0
    assert (base["kernel"], kernel["kernel"]) == ("plain", "blocked")
    assert 0 <= found["kernel_difference"] < 1e-5
    assert rope["before"] == "kernel"
    assert rope["difference"]["values"] == pytest.approx(
        np.subtract(rope["bits_per_byte"]["values"], base["bits_per_byte"]["values"])
    )
    assert rope["flops"] == pytest.approx(1024 * (6 * (2 * 12 * 24**2 + 300 * 24) + 12 * 2 * 16 * 24))


def test_the_page_needs_nothing_else(done: tuple[Ladder, Result]) -> None:
    out = Path(done[0].out_dir)
    text = (out / "ladder.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == [] and not page.tags & {"script", "link", "img", "iframe", "object", "image", "base"}
    for name, value in page.values:
        if name in ("src", "href", "xlink:href", "srcset", "data"):
            assert value.startswith("#"), (name, value)  # a marker inside the picture
        assert name.startswith("xmlns") or "//" not in value, (name, value)
    assert "@import" not in text and not re.search(r"url\((?!#)", text) and "prefers-color-scheme: dark" in text
    svg = ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    written = {"".join(part.itertext()).strip() for part in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert {"base", "+ kernel", "+ rope", "+ muon", "Bits per byte, held-out text", "KV cache"} <= written
    picture = text[text.index("<svg") :]  # in the page's own colours, dark or light
    assert "currentColor" in picture and ladder_report.INK not in picture and "#ffffff" not in picture
    assert SAME in text and "learned positions → RoPE" in text
    ElementTree.parse(out / "ladder.svg")
    assert (out / "ladder.png").read_bytes().startswith(b"\x89PNG")


def test_words_on_the_page_are_escaped() -> None:
    result = made({"base": (3.0,), "rope": (2.9,)}, Ladder(rungs=("rope",), seeds=1, sources=("<b>&.txt",)))
    text = ladder_report.page(result, '<?xml version="1.0"?><svg></svg>')
    assert "&lt;b&gt;&amp;.txt" in text and "<b>" not in text and "<?xml" not in text


def test_every_line_fits_80_columns(done: tuple[Ladder, Result], capsys: pytest.CaptureFixture[str]) -> None:
    long = Ladder(out_dir="runs/ladder")
    result = made({rung.name: (3.1, 3.0, 3.2) for rung in climb(long)}, long)
    huge = dataclasses.replace(
        result,
        rows=tuple(
            dataclasses.replace(row, training_tokens_per_second=2.5e6, peak_bytes=71e9, seconds=9e4) for row in result.rows
        ),
    )
    for shown in (done[1], result, huge):
        ladder_report.show(shown, Console(width=80))
        printed = capsys.readouterr().out
        lines = printed.partition("Written:")[0].splitlines()
        assert max(map(len, lines)) <= 80
        assert "…" not in printed and "against the rung before" in printed and UNDECIDED in printed
        starts = [line.split()[0] for line in lines if line.split()]
        for row in shown.rows:
            assert starts.count(row.name) == 2  # a line in each table: none is broken in two


def test_a_second_call_trains_and_measures_nothing(
    done: tuple[Ladder, Result], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, result = done

    def never(*_: Any) -> None:
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(series, "pretrain", never)
    monkeypatch.setattr(lab, "measure", never)
    monkeypatch.setattr(ladder_report, "chart", lambda result, out: [])
    again = lab.ladder(config)
    assert again == result
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads(json.dumps(result.plain()))
    assert "6 of 6 runs are complete already" in printed.err


def test_a_broken_off_ladder_goes_on_to_the_same_end(
    done: tuple[Ladder, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in the second run, SIGTERM in the third: what was done is kept, and the losses are those of a ladder left alone."""
    config, result = done
    config = dataclasses.replace(config, out_dir=str(tmp_path / "out"))
    monkeypatch.setattr(ladder_report, "chart", lambda result, out: [(out / "ladder.svg").write_text("<svg/>")])
    write, lines = Log.write, [0]

    def interrupted(self: Log, entry: dict[str, Any]) -> None:
        write(self, entry)
        lines[0] += 1
        if lines[0] in (21, 38):  # steps of 16 a run: the 5th of rope-s0, then the 6th of muon-s0
            os.kill(os.getpid(), signal.SIGINT if lines[0] == 21 else signal.SIGTERM)

    monkeypatch.setattr(Log, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lab.ladder(config)
    speeds = (tmp_path / "out" / "speed.json").read_bytes()
    broken = read_log(tmp_path / "out" / "runs" / "rope-s0")
    assert 5 <= len(broken) < 16
    assert capsys.readouterr().err.count("run 2 of 6: rope-s0") == 1
    with pytest.raises(UserError, match=r"run muon-s0 was told to stop and is saved; the same command goes on from there"):
        lab.ladder(config)
    assert read_log(tmp_path / "out" / "runs" / "rope-s0")[: len(broken)] == broken  # continued, not begun again
    end = lab.ladder(config)
    assert "2 of 6 runs are complete already" in (said := capsys.readouterr().err) and "run 1 of 4: muon-s0" in said
    assert re.search(r"run 2 of 4: base-s1 \(16 steps, about \d+ s\); \d+\.\d min gone, eta \d+\.\d min", said)
    assert (tmp_path / "out" / "speed.json").read_bytes() == speeds
    assert [row.bits_per_byte for row in end.rows] == [row.bits_per_byte for row in result.rows]


def test_another_ladder_in_the_same_folder_is_refused(
    done: tuple[Ladder, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = done
    changes: dict[str, Any] = {
        "sources": ("embedded",), "tokenizer": "x", "model": dataclasses.replace(TINY, n_layer=3), "rungs": ("rope",),
        "mode": "single", "budget": "flops", "amount": 2048.0, "batch_size": 2, "learning_rate": 1e-3, "muon_rate": 1e-3,
        "seeds": 3, "seed": 1, "kv_heads": 1, "window_tokens": 3, "experts": 4, "top_k": 1, "turns": 2, "precision": "bf16",
    }  # fmt: skip
    for name, value in changes.items():
        with pytest.raises(UserError, match=f"was begun with {name} = "):
            lab.ladder(dataclasses.replace(config, **{name: value}))
    assert set(changes) | set(lab.MAY_DIFFER) == {field.name for field in dataclasses.fields(Ladder)}
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="is not empty and holds no ladder"):
        lab.ladder(dataclasses.replace(config, out_dir=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    monkeypatch.setattr(lab, "pick_device", lambda name: torch.device("cuda"))
    with pytest.raises(UserError, match=r"was measured on cpu and this is cuda; go on with --device cpu"):
        lab.ladder(config)


def test_a_run_that_fails_is_named(tmp_path: Path, source: str) -> None:
    config = Ladder(out_dir=str(tmp_path / "out"), sources=(source,), **SMALL | {"rungs": ("kernel",)})
    config = dataclasses.replace(config, learning_rate=1e30)
    with pytest.raises(UserError, match=r"run base-s0: .*diverged"):
        lab.ladder(config)


def test_without_scipy_it_says_so_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(UserError, match=r"pip install 'glassgpt\[lab\]'"):
        lab.ladder(Ladder(out_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------- the command line


def test_a_bigger_size_is_the_same_command() -> None:
    config = parse("lab ladder", "--model gpt2 --model.dropout 0 --device cuda --amount 5e8 --rungs rope qk-norm".split())
    assert (config.model.width, config.model.dropout, config.device, config.tokens) == (768, 0, "cuda", 5e8)
    assert [rung.name for rung in climb(config)] == ["base", "rope", "qk-norm"]
    config = parse("lab ladder", "--model tiny --model.vocab_size 300 --model.position rope --rungs moe --mode single".split())
    assert [(rung.name, rung.model.position) for rung in climb(config)] == [("base", "rope"), ("moe", "rope")]


def test_a_vocabulary_without_room_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.vocab_size must be at least 257"):
        lab.ladder(Ladder(out_dir=str(tmp_path / "out"), model=dataclasses.replace(TINY, vocab_size=256)))
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "ladder", "--model.position", "rope", "--out_dir", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert "rung rope changes nothing" in captured.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ()}, "sources is empty"),
        ({"rungs": ()}, "rungs is empty; name at least one of kernel, rmsnorm"),
        ({"rungs": ("rope", "rope")}, "rungs must differ from one another; got rope rope"),
        ({"model": dataclasses.replace(TINY, mlp="swiglu")}, "rung swiglu changes nothing"),
        ({"model": dataclasses.replace(TINY, n_head=1)}, "rung gqa: n_head is 1 and kv_heads 1, so nothing is shared"),
        ({"model": dataclasses.replace(TINY, width=6)}, "rung rope: rope turns pairs of numbers, so a head's width must be even"),
        ({"kv_heads": 3}, "rung gqa: n_kv_head must divide n_head"),
        ({"window_tokens": 128}, "rung window: window_tokens 128 is no shorter than the context, 128 tokens"),
        ({"experts": 2, "top_k": 3}, "rung moe: moe.top_k 3 is more than moe.experts 2"),
        ({"experts": 1}, "experts must be at least 2; got 1"),
        ({"top_k": 0}, "top_k must be at least 1; got 0"),
        ({"budget": "flops"}, "budget flops needs --amount"),
        ({"budget": "seconds"}, "budget seconds needs --amount"),
        ({"amount": 1000}, "amount must hold a step, batch_size \\* context_tokens = 1024 tokens; got 1000"),
        ({"amount": -1.0}, "amount must be positive"),
        ({"learning_rate": math.nan}, "learning_rate must be positive"),
        ({"muon_rate": 0.0}, "muon_rate must be positive"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"turns": 0}, "turns must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seed": 2**32 - 1}, "seed must be between"),
    ],
)  # fmt: skip
def test_refused_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        climb(Ladder(**changes))


def test_rates_reach_the_optimisers() -> None:
    base, muon = climb(Ladder(rungs=("muon",), learning_rate=0.25, muon_rate=0.5))
    assert (base.optim, muon.optim) == (OptimConfig(learning_rate=0.25), OptimConfig(optimizer="muon", learning_rate=0.5))
