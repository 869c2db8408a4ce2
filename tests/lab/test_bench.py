"""`glassgpt bench generate` on a tiny shape."""

from __future__ import annotations

import json
import statistics

import pytest

from glassgpt.cli import main
from glassgpt.config import UserError
from glassgpt.config.lab import Bench
from glassgpt.lab.bench.generate import PEER, Result, Timing, bench

SMALL = ["bench", "generate", "--preset", "tiny", "--prompt_tokens", "5", "--new_tokens", "6", "--repeats", "2"]


def test_both_sides_write_the_same_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--batch_size", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["same_text"] is True
    for name in ("glassgpt", PEER):
        timing = found["timings"][name]
        assert len(timing["prefill_seconds"]) == len(timing["decode_seconds"]) == 2
        decode = 2 * 5 / statistics.median(timing["decode_seconds"])
        assert found["tokens_per_second"][name]["decode"] == pytest.approx(decode, abs=1e-6)
    rates = found["tokens_per_second"]
    assert found["ratio"]["decode"] == pytest.approx(rates["glassgpt"]["decode"] / rates[PEER]["decode"], abs=1e-9)


def test_rates_and_ratios_by_hand() -> None:
    timings = {"glassgpt": Timing([1.0, 2.0, 9.0], [4.0, 5.0, 6.0]), PEER: Timing([4.0] * 3, [10.0] * 3)}
    result = Result(Bench(prompt_tokens=8, new_tokens=11, batch_size=3), 2, timings, True)
    assert result.rate("glassgpt", "prefill") == 3 * 8 / 2.0
    assert result.rate("glassgpt", "decode") == 3 * 10 / 5.0
    assert (result.ratio("prefill"), result.ratio("decode")) == (2.0, 2.0)


def test_table_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SMALL) == 0
    out = capsys.readouterr().out
    assert "ratio" in out
    assert "both wrote the same tokens" in out
    assert max(map(len, out.splitlines())) <= 80


def test_too_long_for_the_context() -> None:
    with pytest.raises(UserError, match=r"prompt_tokens \+ new_tokens is 96; the context of tiny is 32"):
        bench(Bench(preset="tiny"))
