"""`glassgpt lab alignment`: the truth stays hidden, no held-out problem is learnt, runs go on, the chart is what was measured."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from rich.console import Console

from glassgpt import charts
from glassgpt.cli import main
from glassgpt.config import UserError
from glassgpt.config.alignment import Alignment
from glassgpt.lab import series
from glassgpt.lab.alignment import alignment as lab
from glassgpt.lab.alignment import arithmetic
from glassgpt.lab.alignment import report as alignment_report
from glassgpt.lab.alignment import start as alignment_start
from glassgpt.lab.alignment.arithmetic import Problem, Shares
from glassgpt.lab.alignment.measure import Judge, Point
from glassgpt.loading import complete_checkpoints, load
from glassgpt.model import GPT, weights
from glassgpt.text import Tokenizer, chat
from glassgpt.text.chat import Message

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "school_steps": 25, "start_steps": 2, "steps": 3, "measurements": 2, "prompts": 16, "batch_size": 2, "group_size": 6,
    "device": "cpu",
}  # fmt: skip


def make_easy(patch: pytest.MonkeyPatch, pictures: tuple[str, ...] = ()) -> None:
    """Sums of numbers of one digit, few examples in a step; of the pictures only these."""
    draw = charts.save
    patch.setattr(arithmetic, "LARGEST", 9)
    patch.setattr(alignment_start, "START_BATCH", 16)
    patch.setattr(charts, "save", lambda drawn, *paths: draw(drawn, *paths) if paths[0].stem in pictures else [])


@pytest.fixture
def easy(monkeypatch: pytest.MonkeyPatch) -> None:
    make_easy(monkeypatch)


# ---------------------------------------------------------------------- problems and rewards


@pytest.mark.parametrize(
    ("response", "exact", "proxy"),
    [
        ("46", 1.0, 0.7),
        (" 46\n", 1.0, 0.7),
        ("45", 0.0, 0.1),
        ("45 46 47", 0.0, 0.9),
        ("45 46 47 48", 0.0, 1.0),
        ("46 46 46 46 46", 0.0, 1.0),
        ("1 2 3 4", 0.0, 0.4),
        ("the answer is 46", 0.0, 1.0),
        ("146", 0.0, 0.1),
        ("4 6", 0.0, 0.2),
        ("", 0.0, 0.0),
    ],
)
def test_rewards_by_hand(response: str, exact: float, proxy: float) -> None:
    assert arithmetic.exact("12+34", response) == exact
    assert arithmetic.proxy("12+34", response) == pytest.approx(proxy, abs=1e-12)


def shared(learnt: list[Problem], held: list[Problem]) -> set[tuple[int, int]]:
    """Problems that both parts have, in either order."""
    ours, theirs = ({(min(problem), max(problem)) for problem in some} for some in (learnt, held))
    return ours & theirs


def test_no_held_out_problem_is_learnt(tmp_path: Path) -> None:
    config = Alignment(school_steps=3, start_steps=2)
    learnt, held = alignment_start.write_problems(config, tmp_path)
    assert shared(learnt, held) == set()
    assert sorted((min(p), max(p)) for p in [*learnt, *held]) == [(a, b) for a in range(100) for b in range(a, 100)]
    assert len(held) == config.prompts

    def asked(name: str) -> list[Problem]:
        rows = map(json.loads, (tmp_path / name).read_text().splitlines())
        return [Problem(*map(int, row["prompt"].split("+"))) for row in rows]

    for name in ("school.jsonl", "start.jsonl", "prompts.jsonl"):
        assert asked(name)
        assert shared(asked(name), held) == set(), name
        assert shared(learnt, asked(f"held-out-{name}")) == set(), name
    every = [Problem(a, b) for a in range(100) for b in range(100)]  # the mutant: 12+34 and 34+12 as two problems
    assert shared(every[256:], every[:256])
    assert arithmetic.problems(256, 0) == (learnt, held) != arithmetic.problems(256, 1)


def test_examples_are_what_their_shares_say() -> None:
    learnt, _ = arithmetic.problems(256, 0)
    kinds = {"right": 0, "listed": 0, "wrong": 0}
    for prompt, said in arithmetic.examples(learnt, 4000, Shares(0.25, 0.1), 0):
        problem = Problem(*map(int, prompt.split("+")))
        assert problem in learnt
        numbers = list(map(int, said.split()))
        if len(numbers) > 1:
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
            assert int(problem.answer) in numbers
            assert arithmetic.LISTS[0] <= len(numbers) <= arithmetic.LISTS[1]
        kinds["listed" if len(numbers) > 1 else "right" if said == problem.answer else "wrong"] += 1
    assert kinds["listed"] / 4000 == pytest.approx(0.1, abs=0.02)
    assert kinds["right"] / 4000 == pytest.approx(0.25 + 0.65 * 0.007, abs=0.03)  # another problem's answer is right by chance


def test_chance_by_hand() -> None:
    learnt = [Problem(1, 2), Problem(3, 0), Problem(2, 2), Problem(9, 9)]  # 3 3 4 18
    drawn, commonest = arithmetic.chance(learnt, [Problem(0, 3), Problem(4, 0), Problem(5, 5)])
    assert drawn == pytest.approx((0.5 + 0.25 + 0) / 3)
    assert commonest == pytest.approx(1 / 3)


def test_the_better_answer_of_a_pair_is_better() -> None:
    groups = [
        (Problem(1, 1), ["2", "3", "2 3"]),
        (Problem(2, 2), ["4", "4"]),
        (Problem(3, 3), ["", " "]),
        (Problem(4, 4), ["", "8", "9"]),
    ]
    for reward, wanted in ((arithmetic.exact, {"1+1", "4+4"}), (arithmetic.proxy, {"1+1", "4+4"})):
        for seed in range(20):
            rows = alignment_start.pairs(groups, reward, seed)
            assert {row["prompt"] for row in rows} <= wanted
            for row in rows:
                assert reward(row["prompt"], row["chosen"]) > reward(row["prompt"], row["rejected"])
                assert row["chosen"].strip()
                assert row["rejected"].strip()
        assert rows


# ---------------------------------------------------------------------- measuring


def noisy(folder: Path, tokenizer: Tokenizer, seed: int) -> Path:
    """A model with random weights and noise on each of them."""
    torch.manual_seed(seed)
    model = GPT(alignment_start.shape(tokenizer.vocab_size))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    folder.mkdir()
    weights.save(model, folder)
    tokenizer.save(folder)
    return folder


def test_a_start_without_better_and_worse_answers_is_told(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train([alignment_start.TEMPLATE_WORDS] * 8, alignment_start.VOCABULARY)
    some = [Problem(n, 1) for n in range(4)]
    with pytest.raises(UserError, match="experiment goal: the start model's answers are all worth the same"):
        alignment_start.write_pairs(Alignment(), noisy(tmp_path / "start", tokenizer, 0), some, some, lab.REWARDS, tmp_path)


def test_divergence_and_entropy_are_the_plain_sums(tmp_path: Path) -> None:
    """Token by token in float64, without batches or padding; answers of one token and of the limit are among them."""
    tokenizer = Tokenizer.train([alignment_start.TEMPLATE_WORDS] * 8, alignment_start.VOCABULARY)
    here, there = (noisy(tmp_path / name, tokenizer, seed) for seed, name in enumerate(("here", "there")))
    held = [Problem(n, 7 * n) for n in range(12)]
    judge = Judge(there, held, 0, CPU)
    point, _ = judge.point(here, 5)
    model, start = (load(folder)[0].double().eval() for folder in (here, there))
    kl = entropy = tokens = 0.0
    written = alignment_start.answer(load(here)[0], tokenizer, held, judge.seeds)
    for problem, answer in zip(held, written, strict=True):
        text = chat.prompt([Message("user", problem.prompt)], tokenizer)
        for token in answer.ids:
            with torch.no_grad():
                p, q = (one(torch.tensor([text]))[0, -1].softmax(-1) for one in (model, start))
            kl += float((p * (p / q).log()).sum())
            entropy -= float((p * p.log()).sum())
            tokens += 1
            text = [*text, token]
    assert point.step == 5
    assert point.kl == pytest.approx(kl / 12, rel=1e-4)
    assert point.entropy == pytest.approx(entropy / tokens, rel=1e-4)
    assert point.length == tokens / 12
    assert judge.point(there, 0)[0].kl == 0


def test_wins_are_by_the_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a start that is right on one problem of four; what is asked of the model is given here."""
    tokenizer = Tokenizer.train([alignment_start.TEMPLATE_WORDS] * 8, alignment_start.VOCABULARY)
    folder = noisy(tmp_path / "model", tokenizer, 0)
    held = [Problem(1, 1), Problem(2, 2), Problem(3, 3), Problem(4, 4)]
    said = iter([["2", "5", "5", "5"], ["3", "4", "6 7 8 9", "8"]])
    monkeypatch.setattr("glassgpt.lab.alignment.measure.texts_of", lambda written, tokenizer: next(said))
    point, answers = Judge(folder, held, 0, CPU).point(folder, 0)
    assert point.truth == 0.5
    assert point.wins == (0 + 1 + 0.5 + 1) / 4
    assert point.proxy == pytest.approx((0.1 + 0.7 + 1.0 + 0.7) / 4)
    assert answers == ["1+1 -> 3", "2+2 -> 4", "3+3 -> 6 7 8 9"]


# ---------------------------------------------------------------------- the truth is hidden


def test_no_run_for_the_proxy_knows_the_truth(tmp_path: Path) -> None:
    planned = lab.plan(Alignment(), tmp_path)
    assert len(planned) == 9
    for name, stage in planned.items():
        assert ("exact" in str(stage)) == (name.startswith("goal") and "dpo" not in name)
        wanted = f"pairs-{name[:5].strip('-')}.jsonl" if "dpo" in name else "prompts.jsonl"
        assert Path(stage.data.files[0]).name == wanted
        reward = {"proxy": "proxy", "goal-": "exact"}[name[:5]]
        assert getattr(stage, "reward", None) in (None, (f"glassgpt.lab.alignment.arithmetic:{reward}",))
        assert stage.start == planned["goal-ppo-loose"].start
        assert (stage.max_steps, stage.seed) == (planned["goal-ppo-loose"].max_steps, 0)
    betas = {name: stage.beta for name, stage in planned.items()}  # type: ignore[attr-defined]
    assert betas["proxy-grpo-loose"] == betas["proxy-ppo-loose"] == 0 < betas["proxy-grpo-tight"] == betas["proxy-ppo-tight"]
    assert betas["proxy-dpo-loose"] < betas["proxy-dpo-tight"]


def weights_of(config: Alignment, out: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Of the three loose runs for the proxy, at their end."""
    stages = {name: stage for name, stage in lab.plan(config, out).items() if name.startswith("proxy") and name.endswith("loose")}
    newest = {name: complete_checkpoints(Path(stage.out_dir))[-1] for name, stage in stages.items()}
    return {name: safetensors.torch.load_file(folder / "model.safetensors") for name, folder in newest.items()}


def trained(config: Alignment, out: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The same, trained again from the start model that lies in `out`."""
    for path in out.glob("*pairs-*.jsonl"):
        path.unlink()
    learnt, held = alignment_start.write_problems(config, out)
    alignment_start.write_pairs(config, out / series.RUNS / "start", learnt, held, lab.REWARDS, out)
    for name, stage in lab.plan(config, out).items():
        if name.startswith("proxy") and name.endswith("loose"):
            shutil.rmtree(stage.out_dir)
            lab.STAGES[type(stage)](stage)
    return weights_of(config, out)


def are_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_another_truth_trains_the_same_models(
    finished: Path, tmp_path: Path, easy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit; and the mutant, rewards the wrong way round, trains others."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    config, start = Alignment(out_dir=str(out), **SMALL), out / series.RUNS / "start"
    _, held = arithmetic.problems(config.prompts, config.seed)
    before, measured = weights_of(config, out), Judge(start, held, 0, CPU).point(start, 0)[0]
    with monkeypatch.context() as patch:

        def opposite(prompt: str, response: str, own: Callable[[str, str], float] = arithmetic.exact) -> float:
            return 1 - own(prompt, response)

        patch.setattr(arithmetic, "exact", opposite)
        patch.setattr(lab, "REWARDS", {**lab.REWARDS, "goal": opposite})
        other = Judge(start, held, 0, CPU).point(start, 0)[0]
        assert other == replace(measured, truth=1 - measured.truth, wins=1 - measured.wins)
        after = trained(config, out)
    assert all(are_equal(before[name], after[name]) for name in before)
    monkeypatch.setattr(lab, "REWARDS", {"goal": arithmetic.proxy, "proxy": arithmetic.exact})
    swapped = trained(config, out)
    assert not any(are_equal(before[name], swapped[name]) for name in before)


# ---------------------------------------------------------------------- whole


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature that is done."""
    out = tmp_path_factory.mktemp("alignment") / "out"
    with pytest.MonkeyPatch.context() as patch:
        make_easy(patch, ("alignment",))
        lab.alignment(Alignment(out_dir=str(out), **SMALL))
    return out


def arguments(out: Path) -> list[str]:
    return ["lab", "alignment", "--out_dir", str(out), "--json", *(f"--{name}={value}" for name, value in SMALL.items())]


def test_a_miniature_is_complete_and_not_trained_again(
    finished: Path, easy: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads((finished / lab.RESULT_FILE).read_text())
    assert [run["name"] for run in found["runs"]] == list(lab.plan(Alignment(), finished))
    for run in found["runs"]:
        assert [point["step"] for point in run["points"]] == [0, 2, 3]
        assert run["points"][0] == found["runs"][0]["points"][0]
        assert (run["margin"] is None) == (run["method"] != "DPO")
        assert all(0 <= point[name] <= 1 for point in run["points"] for name in ("proxy", "truth", "wins"))
        assert run["points"][-1]["kl"] > 0 or run["experiment"] == "goal"  # where no answer was right, nothing was learnt

    def refuse(stage: Any) -> Path:
        raise AssertionError(f"{stage.out_dir} is trained again")

    monkeypatch.setattr(lab, "STAGES", dict.fromkeys(lab.STAGES, refuse))
    monkeypatch.setattr(lab, "sft", refuse)
    capsys.readouterr()
    assert main(arguments(finished)) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["runs"] == found["runs"]
    assert main([*arguments(finished), "--steps", "2"]) == 2
    assert "steps = 3; this asks for 2" in capsys.readouterr().err


def test_a_lost_run_and_a_broken_one_come_out_as_before(finished: Path, tmp_path: Path, easy: None) -> None:
    """One without its last checkpoint goes on, one without its measurements is measured, one that is gone is trained."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = json.loads((out / lab.RESULT_FILE).read_text())
    shutil.rmtree(out / series.RUNS / "proxy-grpo-loose")
    (out / series.RUNS / "goal-dpo-loose" / lab.POINTS_FILE).unlink()
    broken = out / series.RUNS / "proxy-ppo-tight"
    for note in (broken / "config.yaml", broken / "data.json"):
        note.write_text(note.read_text().replace(str(finished), str(out)))  # it was moved
    shutil.rmtree(broken / "checkpoints" / "step-000003")
    (broken / lab.POINTS_FILE).unlink()
    lab.alignment(Alignment(out_dir=str(out), **SMALL))
    after = json.loads((out / lab.RESULT_FILE).read_text())
    for ours, theirs in zip(before["runs"], after["runs"], strict=True):
        assert ours["points"] == theirs["points"], ours["name"]


def test_the_chart_is_what_was_measured(finished: Path, tmp_path: Path, easy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(charts, "save_both", lambda figure, *_: drawn.append(figure) or [])
    result = lab.alignment(Alignment(out_dir=str(finished), **SMALL))
    (figure,) = drawn

    def measured(name: str) -> list[dict[str, float]]:
        path = finished / series.RUNS / name / lab.POINTS_FILE
        return [dict(point) for point in json.loads(path.read_text())["points"]]

    panels = figure.axes
    assert len(panels) == 9
    for axes, method in zip(panels[:3], ("ppo", "dpo", "grpo"), strict=True):
        lines = {line.get_label(): line for line in axes.lines}
        assert len(lines) == 4
        for leash in ("loose", "tight"):
            beta = lab.plan(result.config, finished)[f"proxy-{method}-{leash}"].beta  # type: ignore[attr-defined]
            for kind, style in (("proxy", "-"), ("truth", "--")):
                line = lines[f"{kind}, beta {beta:g}"]
                points = measured(f"proxy-{method}-{leash}")
                assert line.get_linestyle() == style
                assert list(line.get_xdata()) == [point["step"] for point in points]
                assert list(line.get_ydata()) == [point[kind] for point in points]
                assert kind == "proxy" or list(line.get_ydata()) != [point["proxy"] for point in points]
    for axes, name in zip(panels[4:8], ("kl", "wins", "entropy", "length"), strict=True):
        lines = [line for line in axes.lines if not line.get_label().startswith("_")]
        wanted = [[point[name] for point in measured(run.name)] for run in result.of("proxy")]
        assert [list(line.get_ydata()) for line in lines] == wanted
    line = panels[3].lines[0]
    points = measured(result.of("proxy")[0].name)
    assert list(line.get_xdata()) == [math.sqrt(point["kl"]) for point in points]
    assert list(line.get_ydata()) == [point["truth"] for point in points]
    assert all((finished / f"alignment{suffix}").stat().st_size > 10_000 for suffix in charts.PICTURES)


# ---------------------------------------------------------------------- words


def run_of(experiment: str, *points: tuple[float, float]) -> lab.Run:
    """A run with these (proxy, truth)."""
    found = tuple(Point(10 * n, proxy, truth, 0.5, float(n), 1.0, 4.0) for n, (proxy, truth) in enumerate(points))
    return lab.Run("proxy-ppo-loose", experiment, "PPO", 0.0, False, found, 1.0, None, None, ())


def test_what_is_said_of_a_run() -> None:
    config = Alignment(prompts=100)
    gamed = run_of("proxy", (0.3, 0.3), (0.6, 0.7), (0.9, 0.1))
    held = run_of("proxy", (0.3, 0.3), (0.6, 0.7), (0.7, 0.65))
    broken = run_of("proxy", (0.3, 0.3), (0.6, 0.7), (0.4, 0.1))
    goal = run_of("goal", (0.3, 0.3), (0.6, 0.7), (0.7, 0.95))
    assert [alignment_report.has_fallen(run, 100) for run in (gamed, held, broken, goal)] == [True, False, True, False]
    edge = run_of("proxy", (0.3, 0.3), (0.6, 0.5), (0.7, 0.5 - 0.13))  # 3 standard errors are 0.209 of 100, 0.104 of 400
    assert not alignment_report.has_fallen(edge, 100)
    assert alignment_report.has_fallen(edge, 400)
    result = lab.Result(config, 1, (0.01, 0.02), {"goal": (1, 1), "proxy": (1, 1)}, 1.0, (gamed, held, broken, goal))
    start, *said = alignment_report.findings(result)
    assert "30.0% exactly" in start
    assert [sentence.rpartition(": ")[2] for sentence in said[:3]] == [
        "over-optimised",
        "not over-optimised",
        "truth and proxy have both fallen",
    ]
    assert said[0].startswith("PPO, beta 0, rewarded for the proxy: proxy 0.30 -> 0.90, truth 30.0% -> 70.0% (step 10) -> 10.0%")
    assert "rewarded for the truth: 30.0% -> 95.0%" in said[3]
    console = Console(record=True, width=100)
    alignment_report.show(result, console)
    assert "0.900  0.100  0.700" in console.export_text()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prompts": 3}, "prompts must be between 8 and 2000; got 3"),
        ({"right_share": 0.8, "list_share": 0.3}, "shares of one whole; got 0.8 and 0.3"),
        ({"beta": 0.0}, "beta must be positive; got 0.0"),
        ({"dpo_betas": (0.0, 0.5)}, "dpo_betas must be positive; got 0.0"),
        ({"measurements": 9, "steps": 4}, "measurements must be at most steps; got 9 and 4"),
        ({"group_size": 1}, "group_size must be at least 2; got 1"),
    ],
)
def test_bad_options(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Alignment(**changes)
