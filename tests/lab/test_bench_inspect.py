"""`glassgpt bench inspect` on a tiny shape; beside TransformerLens where it is installed."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec

import pytest

from glassgpt.config import UserError
from glassgpt.config.bench import BenchInspect
from glassgpt.lab.bench import inspect as bench
from glassgpt.lab.bench.inspect import PEER, WORK, Result, Timing, bench_inspect

SIDES = [False, True] if find_spec("transformer_lens") else [False]
TINY = {"preset": "tiny", "tokens": 12, "prompt_tokens": 5, "repeats": 2, "threads": 1}


@pytest.mark.parametrize("peer", SIDES)
def test_what_it_measures(peer: bool, capsys: pytest.CaptureFixture[str]) -> None:
    bench_inspect(BenchInspect(**TINY, peer=peer, json=True))  # type: ignore[arg-type]
    found = json.loads(capsys.readouterr().out)
    assert list(found["timings"]) == [*WORK, "page"] and list(found["timings"].pop("page")) == ["glassgpt"]
    assert 100_000 < found["page_bytes"] < 1_000_000
    for timings in found["timings"].values():
        assert list(timings) == (["glassgpt", PEER] if peer else ["glassgpt"])
        assert all(second > 0 for timing in timings.values() for second in timing["seconds"])
    assert len(found["timings"]["capture"]["glassgpt"]["seconds"]) == 2
    assert found["cost_of_capture"] > 0
    assert all(value < 1e-4 for value in found["difference"].values())
    assert list(found["ratio"]) == (list(WORK) if peer else [])


def test_ratios_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    forward = {"glassgpt": Timing([1.0, 2.0, 9.0], [0]), PEER: Timing([3.0], [0])}
    capture = {"glassgpt": Timing([5.0], [10**6]), PEER: Timing([15.0], [2 * 10**6])}
    patch = {"glassgpt": Timing([2.0], [0]), PEER: Timing([50.0], [0])}
    page = {"glassgpt": Timing([7.0], [0])}
    result = Result(BenchInspect(), 2, {"forward": forward, "capture": capture, "patch": patch, "page": page}, {}, 4_050_000)
    assert result.cost_of_capture == 2.5
    assert (result.ratio("capture"), result.ratio("patch")) == (3.0, 25.0)
    assert forward["glassgpt"].spread == 4.0
    bench._show(result)
    out = capsys.readouterr().out
    assert "capturing everything costs 2.50x the forward pass" in out
    assert "the page of 64 tokens has 4.05 MB" in out
    assert "patching, layers x positions: 25.00x as fast as TransformerLens" in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_missing_peer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"`transformer_lens` is not installed; pip install 'glassgpt\[bench\]'"):
        bench_inspect(BenchInspect(**TINY))  # type: ignore[arg-type]


def test_a_text_too_long_is_refused() -> None:
    with pytest.raises(UserError, match="must fit in the context of tiny, 32; got 64"):
        bench_inspect(BenchInspect(preset="tiny", peer=False))


def test_a_text_too_long_for_the_page_is_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(bench, "_workers")  # no model is made
    with pytest.raises(UserError, match="tokens must be at most 256, which is what the timed page can show; got 257"):
        bench_inspect(BenchInspect(tokens=257, peer=False))


def test_the_peer_is_loaded_in_its_own_process_alone() -> None:
    assert "transformer_lens" not in sys.modules
