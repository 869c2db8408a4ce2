"""`glassgpt bench train` and `bench device` on tiny shapes."""

from __future__ import annotations

import json
import math

import pytest

from glassgpt.cli import main
from glassgpt.config import UserError
from glassgpt.config.bench import BenchTrain
from glassgpt.lab.bench.train import Result, Timing

TINY = ["--preset", "tiny", "--context_tokens", "16", "--repeats", "1"]


def test_both_sides_make_the_same_step(capsys: pytest.CaptureFixture[str]) -> None:
    """Equal weights and tokens: the losses of the first step agree, whatever the micro-batch."""
    arguments = ["bench", "train", *TINY, "--batch_size", "4", "--micro_batch_size", "2", "--systems", "ours", "fp32", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    losses = {name: timing["loss"] for name, timing in found["timings"].items()}
    assert losses.keys() == {"ours", "fp32"}
    bar = 1e-5 if found["timings"]["ours"]["precision"] == "fp32" else 2e-2
    assert abs(losses["ours"] - losses["fp32"]) < bar
    assert abs(losses["fp32"] - math.log(257)) < 0.3
    assert found["ratio_to_best_peer"] > 0
    assert all(timing["peak_bytes"] > 0 for timing in found["timings"].values())


def test_rates_by_hand() -> None:
    timing = Timing("bf16", 9.0, [2.0, 4.0, 100.0], 10**9, 5.0)
    result = Result(BenchTrain(batch_size=8, context_tokens=100), 1, 65, 2, 400, {"fp32": 10.0, "bf16": 1000.0}, {"ours": timing})
    assert result.rate("ours") == 200.0
    assert result.mfu("ours") == 0.1
    assert result.spread("ours") == (100.0 - 2.0) / 4.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"batch_size": 6, "micro_batch_size": 4}, "micro_batch_size 4 does not divide batch_size 6"),
        ({"systems": ()}, "systems is empty"),
    ],
)
def test_contradictions_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BenchTrain(**values)  # type: ignore[arg-type]


def test_every_device_gets_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "device", *TINY, "--batch_size", "2", "--new_tokens", "4", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert ("cpu", "fp32") in {(row["device"], row["precision"]) for row in rows}
    assert all(row[kind] > 0 for row in rows for kind in ("forward", "training", "generation"))


def test_a_context_too_long_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "device", "--preset", "tiny", "--context_tokens", "64"]) == 2
    assert "must fit in the context of tiny, 32" in capsys.readouterr().err
