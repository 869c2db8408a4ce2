"""Scaling laws: known laws come back from made-up losses, and a miniature ladder is trained, kept and reported whole."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glassgpt.config import Pretrain, UserError
from glassgpt.config.files import read_yaml
from glassgpt.config.scaling import Scaling
from glassgpt.data import corpus
from glassgpt.lab import scaling as lab
from glassgpt.lab.scaling import PF_DAY, Law, Run, analyse, fit, frontier, ladder, scaling
from glassgpt.loading import load
from glassgpt.train.run import read_log

TRUTH = Law(("N", "D"), (0.34, 0.28), (40.0, 30.0), 1.69)
EXPECTED = {"alpha": 0.34, "beta": 0.28, "A": 40.0, "B": 30.0, "E": 1.69}
FAST = {"bootstrap": 40}


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine tenths of the time goes into intervals."""
    monkeypatch.setattr(lab, "fit", lambda *args, **options: fit(*args, **options | {"resamples": 4}))


def run(N: int, D: int, loss: float, seed: int = 0) -> Run:
    return Run(f"n{N}-d{D}-s{seed}", 16, 2, seed, 1, 1e-3, N, N, D, 6.0 * N * D, 6.0 * N * D, 0.5, loss, 1.0, 1.0)


def grid(law: Law, noise: float = 0.0, seed: int = 0) -> list[Run]:
    """Six sizes on five budgets whose losses are the law's, each times exp(noise * normal)."""
    generator = np.random.default_rng(seed)
    sizes, budgets = (25_000, 57_000, 100_000, 156_000, 336_000, 790_000), (61_000, 123_000, 246_000, 492_000, 983_000)
    return [run(N, D, float(law(N=N, D=D)) * math.exp(noise * generator.standard_normal())) for N in sizes for D in budgets]


def on_line(variable: str, law: Law, values: tuple[float, ...]) -> list[Run]:
    """Runs that vary one of N and D, or both so that C is as given (PetaFLOP/s-days)."""
    points = []
    for value in values:
        root = math.sqrt(value * PF_DAY / 6)
        made = run(
            *((int(value), 1000) if variable == "N" else (1000, int(value)) if variable == "D" else (int(root), int(root))), 1
        )
        points.append(dataclasses.replace(made, loss=float(law(**{variable: made.value(variable)}))))
    return points


# ---------------------------------------------------------------------- laws


def test_exact_losses_give_the_law_and_the_run_left_out() -> None:
    runs = grid(TRUTH)
    result = analyse(Scaling(**FAST), runs)
    joint = result.fits["joint"]
    assert joint.points == 29 and joint.unknowns == 5
    assert joint.numbers == pytest.approx(EXPECTED, rel=1e-6)
    assert joint.error == pytest.approx(0, abs=1e-9)
    for name, (low, high) in joint.intervals.items():
        assert (low, high) == pytest.approx((EXPECTED[name], EXPECTED[name]), rel=1e-4)
    left = result.prediction
    assert left.runs == (runs[-1].name,)
    assert (left.N, left.D) == (790_000, 983_000)
    assert left.predicted == pytest.approx(1.69 + 40 / 790_000**0.34 + 30 / 983_000**0.28, abs=1e-8)
    assert left.difference == pytest.approx(0, abs=1e-8)
    # at the largest D the law in N keeps alpha, and its floor is E + B / D^beta; the same for D
    size, tokens = result.fits["size"], result.fits["tokens"]
    assert (size.points, tokens.points) == (5, 4)
    assert size.numbers == pytest.approx({"alpha_N": 0.34, "K": 40, "E": 1.69 + 30 / 983_000**0.28}, rel=1e-5)
    assert tokens.numbers == pytest.approx({"alpha_D": 0.28, "K": 30, "E": 1.69 + 40 / 790_000**0.34}, rel=1e-5)


@pytest.mark.usefixtures("few_resamples")
def test_the_run_left_out_changes_no_fit() -> None:
    runs = grid(TRUTH, noise=0.01)
    spoiled = [*runs[:-1], dataclasses.replace(runs[-1], loss=99.0)]
    one, two = (analyse(Scaling(**FAST), each) for each in (runs, spoiled))
    assert one.fits == two.fits
    assert one.prediction.predicted == two.prediction.predicted
    assert two.prediction.measured == 99 and two.prediction.inside is False
    assert two.prediction.percent == pytest.approx(100 * (two.prediction.predicted - 99) / 99, abs=1e-12)


def test_noisy_losses_give_intervals_that_hold_the_truth() -> None:
    result = analyse(Scaling(**FAST), grid(TRUTH, noise=0.005, seed=1))
    joint = result.fits["joint"]
    assert joint.resamples == 40 and joint.note == ""
    assert joint.error == pytest.approx(0.005, rel=0.5)
    for name, true in EXPECTED.items():
        low, high = joint.intervals[name]
        assert low < true < high
        assert low < joint.numbers[name] < high
    assert 0.01 < joint.intervals["alpha"][1] - joint.intervals["alpha"][0] < 0.3
    interval = result.prediction.interval
    assert interval is not None and result.prediction.inside is True
    assert interval[0] < float(TRUTH(N=790_000, D=983_000)) < interval[1]
    assert interval[1] - interval[0] < 0.15


def test_one_wild_run_hardly_moves_a_huber_fit() -> None:
    runs = grid(TRUTH)[:-1]
    runs[7] = dataclasses.replace(runs[7], loss=1.5 * runs[7].loss)
    robust = fit(runs, ("N", "D"), True, lab.HUBER_DELTA, resamples=40)
    squares = fit(runs, ("N", "D"), True, math.inf, resamples=40)
    assert abs(robust.numbers["alpha"] - 0.34) < 0.01 < abs(squares.numbers["alpha"] - 0.34)


@pytest.mark.parametrize(
    ("variable", "values"),
    [("N", (1e4, 3e4, 1e5, 3e5, 1e6)), ("D", (1e5, 3e5, 1e6, 3e6)), ("C", (1e-9, 1e-8, 1e-7, 1e-6, 1e-5))],
)
@pytest.mark.parametrize("floor", [0.0, 1.2])
def test_laws_of_one_variable_by_hand(variable: str, values: tuple[float, ...], floor: float) -> None:
    law = Law((variable,), (0.21,), (9.0 if variable != "C" else 0.6,), floor)
    found = fit(on_line(variable, law, values), (variable,), floor > 0, math.inf, resamples=40)
    expected = {f"alpha_{variable}": 0.21, "K": law.coefficients[0]} | ({"E": floor} if floor else {})
    assert found.numbers == pytest.approx(expected, rel=1e-5)
    for name, (low, high) in found.intervals.items():
        assert (low, high) == pytest.approx((expected[name], expected[name]), rel=1e-3)


def test_a_pure_power_law_bends_where_there_is_a_floor() -> None:
    points = on_line("N", Law(("N",), (0.3,), (9.0,), 2.0), (1e4, 3e4, 1e5, 3e5, 1e6))
    pure, floored = (fit(points, ("N",), floor, math.inf, resamples=40) for floor in (False, True))
    assert pure.error is not None and floored.error is not None
    assert pure.error > 0.003 > 1e-6 > floored.error
    slope = np.polyfit([math.log(p.N) for p in points], [math.log(p.loss) for p in points], 1)[0]
    assert pure.numbers["alpha_N"] == pytest.approx(-slope, abs=1e-6)  # least squares on ln L is a straight line's


def test_too_few_points_are_said_and_not_hidden() -> None:
    law = Law(("N",), (0.3,), (9.0,), 2.0)
    two, three = (on_line("N", law, (1e4, 1e5, 1e6)[:n]) for n in (2, 3))
    none = fit(two, ("N",), True, math.inf)
    assert none.law is None and none.numbers == {} and none.intervals == {} and none.error is None
    assert none.note == "no fit: 2 different points for 3 unknowns"
    exact = fit(three, ("N",), True, math.inf)
    assert exact.numbers["alpha_N"] == pytest.approx(0.3, abs=1e-5)
    assert exact.intervals == {} and exact.interval_at(N=1e7) is None
    assert exact.note == "no interval: 3 different points for 3 unknowns, so it meets them all"
    copies = fit(two * 3, ("N",), True, math.inf)  # seeds are runs, not places
    assert copies.note == "no fit: 2 different points for 3 unknowns"
    one_size = [dataclasses.replace(made, N=10_000) for made in grid(TRUTH)]
    assert fit(one_size, ("N", "D"), True, lab.HUBER_DELTA).note == "no fit: 0 different points for 5 unknowns"


def test_the_gradient_is_the_slope() -> None:
    x, y = np.random.default_rng(0).normal(size=(7, 2)), np.linspace(0.5, 1.5, 7)
    for delta in (1e-3, 0.1, math.inf):
        theta = np.array([0.1, -0.4, 0.3, 0.7, 0.2])
        _, slopes = lab._huber(theta, x, y, delta)
        for i, step in enumerate(np.eye(5) * 1e-6):
            rise = lab._huber(theta + step, x, y, delta)[0] - lab._huber(theta - step, x, y, delta)[0]
            assert slopes[i] == pytest.approx(rise / 2e-6, rel=1e-4, abs=1e-3)


def test_huber_loss_by_hand() -> None:
    theta, x = np.array([0.0, 0.0]), np.zeros((2, 1))  # ln L = 0 everywhere
    assert lab._huber(theta, x, np.array([0.25, 2.0]), 0.5)[0] == pytest.approx(1e6 * (0.25**2 / 2 + 0.5 * (2 - 0.25)))
    assert lab._huber(theta, x, np.array([0.25, 2.0]), math.inf)[0] == pytest.approx(1e6 * (0.25**2 / 2 + 2))


def test_frontier_by_hand() -> None:
    a, b, c, d, e = run(1, 1, 5.0), run(2, 1, 4.0), run(1, 2, 4.5, 1), run(3, 1, 4.0), run(9, 1, 3.0)
    assert frontier([e, d, c, b, a]) == [a, b, e]  # c costs as much as b and is worse; d costs more and is no better
    assert frontier([]) == []


@pytest.mark.usefixtures("few_resamples")
def test_seeds_are_points_and_the_measured_loss_is_their_mean() -> None:
    runs = [*grid(TRUTH), *(dataclasses.replace(made, name=f"{made.name}-again", loss=made.loss + 0.1) for made in grid(TRUTH))]
    result = analyse(Scaling(**FAST), runs)
    assert result.fits["joint"].points == 58
    assert len(result.prediction.runs) == 2
    assert result.prediction.measured == pytest.approx(float(TRUTH(N=790_000, D=983_000)) + 0.05, abs=1e-9)


# ---------------------------------------------------------------------- what is counted


def test_ladder_and_what_it_counts() -> None:
    config = Scaling()
    runs = ladder(config, 512)
    assert len(runs) == len({each.out_dir for each in runs}) == 30
    small, large = runs[0], runs[-1]
    assert (small.model.width, small.model.n_layer, small.model.n_head, small.max_steps) == (16, 2, 1, 240)
    assert (large.model.width, large.model.n_layer, large.model.n_head, large.max_steps) == (96, 3, 6, 3840)
    assert large.optim.learning_rate == pytest.approx(2e-3 * math.sqrt(64 / 96), rel=1e-12)
    assert (small.optim.warmup_steps, large.optim.warmup_steps) == (24, 384)
    found = lab._facts(large)
    N = 3 * (12 * 96**2 + 13 * 96) + 2 * 96  # four D x D of attention, two 4D x D of the MLP; biases and norms 13 D
    assert found["N"] == N
    assert found["parameters"] == N + 512 * 96 + 128 * 96
    assert found["D"] == 3840 * 2 * 128
    assert found["C"] == 6 * N * found["D"]
    assert found["flops"] == 6 * found["D"] * (N + 512 * 96 + 2 * 3 * 128 * 96)
    costs = [lab._facts(each)["C"] for each in runs]
    assert costs == sorted(costs)
    assert 30 < lab._facts(large)["N"] / lab._facts(small)["N"] < 60
    several = ladder(dataclasses.replace(config, seeds=2, seed=5), 512)
    assert len(several) == 60 and {each.seed for each in several} == {5, 6}


# ---------------------------------------------------------------------- the whole


SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "widths": (16, 32, 48),
    "token_budgets": (256, 512, 1024),
    "context_tokens": 16,
    "batch_size": 4,
    "bootstrap": 40,
    "device": "cpu",
    "json": True,
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Scaling, lab.Result]:
    """A miniature ladder, trained once."""
    folder = tmp_path_factory.mktemp("scaling")
    words = "the cat sat on a mat and saw the small dog run to its old house by the sea".split()
    generator = np.random.default_rng(0)
    (folder / "text.txt").write_text("\n".join(" ".join(generator.choice(words, 12)) for _ in range(200)))
    config = Scaling(out_dir=str(folder / "out"), sources=(str(folder / "text.txt"),), **SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab, "fit", lambda *args, **options: fit(*args, **options | {"resamples": 12}))
        patch.setattr("glassgpt.train.session.plot_loss", lambda run: [])  # half the time, and tested elsewhere
        return config, scaling(config)


def test_a_ladder_is_trained_and_reported(done: tuple[Scaling, lab.Result]) -> None:
    config, result = done
    out = Path(config.out_dir)
    found = json.loads((out / "scaling.json").read_text())
    assert found == json.loads(json.dumps(result.plain()))
    assert len(found["runs"]) == 9
    train_tokens = corpus.read(out / "shards", load(out / "runs" / found["runs"][0]["name"])[1]).count("train")
    for made in found["runs"]:
        log = read_log(out / "runs" / made["name"])
        assert made["loss"] == log[-1]["val_loss"] and made["bits_per_byte"] == log[-1]["val_bits_per_byte"]
        assert sum(entry["tokens"] for entry in log) == made["D"] == made["steps"] * 64
        assert made["C"] == 6 * made["N"] * made["D"]
        assert made["epochs"] == pytest.approx(made["D"] / train_tokens)
    assert len({read_log(out / "runs" / made["name"])[-1]["val_tokens"] for made in found["runs"]}) == 1  # the same text
    assert set(found["fits"]) == {"joint", *(a + b for a in ("size", "tokens", "compute") for b in ("", "_power"))}
    joint = found["fits"]["joint"]
    assert set(joint["numbers"]) == set(joint["intervals"]) == {"alpha", "beta", "A", "B", "E"} and joint["points"] == 8
    assert found["fits"]["size"]["note"] == found["fits"]["tokens"]["note"] == "no fit: 2 different points for 3 unknowns"
    assert found["fits"]["size_power"]["note"].startswith("no interval: 2 different points for 2 unknowns")
    left = found["prediction"]
    assert left["runs"] == ["w0048-d000001024-s0"]
    assert left["difference"] == pytest.approx(left["predicted"] - left["measured"], abs=1e-12)
    assert left["inside"] is (left["interval"][0] <= left["measured"] <= left["interval"][1])
    assert found["published"]["joint"]["alpha"]["value"] == 0.34
    assert found["config"]["widths"] == [16, 32, 48]
    assert (out / "scaling.svg").read_text().rstrip().endswith("</svg>")
    assert (out / "scaling.png").read_bytes().startswith(b"\x89PNG")
    model, tokenizer = load(out / "runs" / left["runs"][0])  # each run is a model like any other
    assert model.config.width == 48 and tokenizer.vocab_size == 300
    settings = read_yaml(out / "runs" / left["runs"][0] / "config.yaml", Pretrain)
    assert settings.data.sources == config.sources and (settings.compile, settings.precision) == ("off", "fp32")


def test_a_second_call_trains_nothing_and_a_broken_off_one_goes_on(
    done: tuple[Scaling, lab.Result], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, result = done
    trained: list[str] = []
    real = lab.series.pretrain

    def counted(asked: Any) -> Path:
        trained.append(Path(asked.out_dir).name)
        return real(asked)

    monkeypatch.setattr(lab.series, "pretrain", counted)
    monkeypatch.setattr(lab, "chart", lambda result, out: [])  # drawn once already, and fitted

    def analysed(asked: Scaling, runs: list[Run]) -> lab.Result:
        assert [dataclasses.replace(made, seconds=0) for made in runs] == [
            dataclasses.replace(made, seconds=0) for made in result.runs
        ]
        return dataclasses.replace(result, config=asked, runs=tuple(runs))

    monkeypatch.setattr(lab, "analyse", analysed)
    monkeypatch.setattr("glassgpt.train.session.plot_loss", lambda run: [])
    again = scaling(config)
    assert trained == []
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads(json.dumps(again.plain())) == json.loads(json.dumps(result.plain()))
    assert "9 of 9 runs are complete already" in printed.err
    # a run that lost its last steps, as after a crash, is made again, to the same loss
    log = Path(config.out_dir) / "runs" / "w0032-d000000512-s0" / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    for checkpoint in (log.parent / "checkpoints").iterdir():
        checkpoint.rename(checkpoint.with_name(f".tmp-{checkpoint.name}"))
    mended = scaling(dataclasses.replace(config, json=False))
    assert trained == ["w0032-d000000512-s0"]
    assert [made.loss for made in mended.runs] == [made.loss for made in result.runs]
    printed = capsys.readouterr()
    assert "run 1 of 1: w0032-d000000512-s0" in printed.err
    assert max(map(len, printed.out.splitlines())) <= 80
    for expected in ("0.34 Hoffmann", "0.076 Kaplan", "0.095 Kaplan", "predicted", "measured", "no fit", "scaling.png"):
        assert expected in printed.out


def test_another_ladder_in_the_same_folder_is_refused(done: tuple[Scaling, lab.Result], tmp_path: Path) -> None:
    config, _ = done
    changes: dict[str, Any] = {
        "sources": ("embedded",), "tokenizer": "x", "vocab_size": 400, "widths": (16, 32, 64), "token_budgets": (256, 512, 2048),
        "context_tokens": 8, "batch_size": 2, "learning_rate": 1e-3, "seeds": 2, "seed": 1,
    }  # fmt: skip
    for name, value in changes.items():
        with pytest.raises(UserError, match=f"was begun with {name} = "):
            scaling(dataclasses.replace(config, **{name: value}))
    assert set(changes) | set(lab.MAY_DIFFER) == {field.name for field in dataclasses.fields(Scaling)}
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="is not empty and holds no ladder"):
        scaling(dataclasses.replace(config, out_dir=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_tokenizer_may_be_given(done: tuple[Scaling, lab.Result], tmp_path: Path) -> None:
    config, _ = done
    source = Path(config.out_dir) / "tokenizer.json"
    other = dataclasses.replace(config, out_dir=str(tmp_path / "out"), tokenizer=str(source), vocab_size=999)
    lab._open(tmp_path / "out", other)
    tokenizer, _ = lab.prepare(tmp_path / "out", lab.DataConfig(other.sources, tokenizer=other.tokenizer), other.vocab_size)
    assert tokenizer.vocab_size == 300
    assert read_yaml(tmp_path / "out" / "config.yaml", Scaling) == other


def test_a_run_that_fails_is_named(done: tuple[Scaling, lab.Result], tmp_path: Path) -> None:
    config, _ = done
    changes: dict[str, Any] = {"context_tokens": 2000, "batch_size": 1, "token_budgets": (2000, 4000, 8000)}
    with pytest.raises(UserError, match=r"run w0016-d000002000-s0: .*too short"):
        scaling(dataclasses.replace(config, out_dir=str(tmp_path / "out"), **changes))


def test_without_scipy_it_says_so_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(UserError, match=r"pip install 'glassgpt\[lab\]'"):
        scaling(Scaling(out_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ()}, "sources is empty"),
        ({"widths": (32, 64)}, "at least 3 widths; got 2"),
        ({"token_budgets": (4096, 8192)}, "at least 3 token_budgets; got 2"),
        ({"widths": (32, 40, 64)}, "multiples of 16, the width of a head; got 40"),
        ({"widths": (32, 0, 64)}, "multiples of 16, the width of a head; got 0"),
        ({"widths": (32, 64, 64)}, "widths must differ from one another; got 32, 64, 64"),
        ({"token_budgets": (4096, 8192, 8200)}, "differ by at least one step of 256 tokens"),
        ({"token_budgets": (200, 4096, 8192)}, "at least one step, batch_size \\* context_tokens = 256; got 200"),
        ({"context_tokens": 0}, "context_tokens must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"vocab_size": 256}, "vocab_size must be at least 257"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"learning_rate": math.inf}, "learning_rate must be positive"),
        ({"bootstrap": 39}, "bootstrap must be at least 40"),
        ({"seed": -1}, "seed must be between"),
        ({"seed": 2**32 - 1, "seeds": 2}, "seed must be between"),
    ],
)
def test_refused_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Scaling(**changes)
