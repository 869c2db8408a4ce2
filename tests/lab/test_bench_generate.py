"""`glassgpt bench generate`: workers, turns, noise, floors, tables; with an engine of the tests' own, and with two real ones."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from glassgpt.config import UserError, preset
from glassgpt.config.bench import BenchGenerate
from glassgpt.lab.bench.generate import floor, process, random_weights, report, result, systems
from glassgpt.lab.bench.generate.floor import Bandwidth, Floor
from glassgpt.lab.bench.generate.generate import bench_generate
from glassgpt.lab.bench.generate.phases import Phase, phases_of
from glassgpt.lab.bench.generate.random_weights import some_tokenizer, write_weights
from glassgpt.lab.bench.generate.result import Measured, Result
from glassgpt.lab.bench.generate.systems import System
from glassgpt.model import weights

SMALL: dict[str, Any] = {
    "preset": "tiny",
    "phases": ("decode-1", "decode-2", "prefill-8"),
    "prompt_tokens": 5,
    "new_tokens": 6,
    "repeats": 2,
    "starts": 1,
    "threads": 1,
    "allow_noise": True,
}
FLOOR = Floor(
    [Bandwidth(10**6, 1, 2e9), Bandwidth(10**6, 2, 4e9), Bandwidth(10**9, 2, 1e9)],
    {"float32": 1e9, "bfloat16": 2e9, "int8": 8e9},
    "hand",
)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the tests' engine is there, under the names of the base and of ours; no limits are measured."""
    folder = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(systems, "PEERS", {"ours": "fake_engine", "transformers": "fake_engine"})
    monkeypatch.setattr(process, "PEERS", systems.PEERS)
    monkeypatch.setattr(floor, "measure", lambda shape, bits, threads: FLOOR)
    monkeypatch.setattr(floor, "calibrate", lambda threads: 0.01)


# ---------------------------------------------------------------------- a whole run


@pytest.mark.usefixtures("fake")
def test_a_run_of_all_phases(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every system goes through every phase; those that fail are left out, each with its reason in one line."""
    config = BenchGenerate(**SMALL, work_dir=str(tmp_path / "kept"), svg=str(tmp_path / "rates.svg"), json=True)
    found = bench_generate(dataclasses.replace(config, systems=("transformers-*32", "ours-*int*", "ours-float32")))
    assert list(found.systems) == [
        "ours-float32",
        "ours-int8",
        "ours-crash-int8",
        "ours-raise-int8",
        "ours-spin-int4",
        "transformers-float32",
        "transformers-other-float32",
    ]
    assert found.left_out["ours-crash-int8"] == "after decode-1: its process ended with code 7: out of luck"
    assert found.left_out["ours-raise-int8"] == "after decode-1: ValueError: one prompt at most"
    assert found.left_out["ours-lazy-int4"] == "NotImplementedError: no converter"
    assert found.left_out["transformers-short-float32"].startswith("RuntimeError: wrote [0] tokens in 1 steps; 1 were asked for")
    for name, measured in found.systems.items():
        finished = ("decode-1",) if name in found.left_out else SMALL["phases"]
        assert {phase: len(turns) for phase, turns in measured.turns.items()} == dict.fromkeys(finished, 2)
        assert tuple(measured.ids) == finished
        assert len(measured.start_seconds) == len(measured.load_seconds) == len(measured.peak_bytes) == 1
        assert 1e6 < measured.peak_bytes[0] < 1e9
    assert found.systems["ours-int8"].disk_bytes == 1000
    assert [(measured.bits, measured.is_ours) for measured in found.systems.values()][1:5] == [
        (8, True), (8, True), (8, True), (4, True),
    ]  # fmt: skip
    decode = found.phases[1]
    assert found.same_ids("ours-float32", decode) == 1 and found.same_ids("ours-int8", decode) == 0.5
    told = json.loads(capsys.readouterr().out)
    seconds = statistics.median(told["systems"]["ours-int8"]["turns"]["decode-2"])
    assert told["shown"]["ours-int8"]["decode-2"]["tokens_per_second"] == decode.tokens / seconds
    assert list(told["shown"]["ours-crash-int8"]) == ["decode-1"]
    assert "float32, but other ids: transformers-other-float32" in report.notes(found)
    assert "ours-int8" in (tmp_path / "rates.svg").read_text()
    assert (tmp_path / "kept" / "tiny-0" / "hf" / "config.json").is_file()


@pytest.mark.usefixtures("fake")
def test_too_much_noise_is_no_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = iter([0.01, 0.02] * 100)
    monkeypatch.setattr(floor, "calibrate", lambda threads: next(seconds))
    config = BenchGenerate(**SMALL | {"systems": ("ours-float32",), "phases": ("prefill-8",), "starts": 0, "repeats": 3})
    config = dataclasses.replace(config, allow_noise=False)
    with pytest.raises(
        UserError, match=r"too noisy to compare on: the same work took times whose quartiles are \d+% apart \(limit"
    ):
        bench_generate(config)
    assert capsys.readouterr().out == ""
    bench_generate(dataclasses.replace(config, allow_noise=True))
    assert "warning: the same work took times" in capsys.readouterr().out


@pytest.mark.usefixtures("fake")
def test_systems_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every system's warm-up, then turn after turn of all; the warm-up is not among the times."""
    order: list[tuple[str, int]] = []
    generate = process.Worker.generate

    def watched(self: process.Worker, prompts: list[list[int]], new_tokens: int, warm_tokens: int = 0) -> dict[str, Any]:
        order.append((self.system.name, warm_tokens))
        return generate(self, prompts, new_tokens, warm_tokens) | {"seconds": [float(len(order)), float(len(order)) * 3]}

    monkeypatch.setattr(process.Worker, "generate", watched)
    values = {"systems": ("ours-float32", "ours-int8"), "phases": ("decode-1",), "starts": 0, "repeats": 3}
    found = bench_generate(BenchGenerate(**SMALL | values))
    assert order == [(name, warm) for warm in (0, 4, 4, 4) for name in ("ours-float32", "ours-int8")]
    assert found.systems["ours-int8"].turns == {"decode-1": [8.0, 12.0, 16.0]}


def test_a_worker_starts_light(start_python: Any) -> None:
    """A cold start must cost what the engine takes: nothing heavy comes in before it."""
    heavy = "torch", "numpy", "tokenizers", "rich", "tyro"
    code = f"import sys, glassgpt.lab.bench.generate.worker; print([name for name in {heavy} if name in sys.modules])"
    out, errors = start_python(code).communicate(timeout=60)
    assert (out.strip(), errors) == ("[]", "")


@pytest.mark.usefixtures("fake")
def test_one_that_waits_is_stopped(tmp_path: Path) -> None:
    """Nothing of a waiting process runs; the mutant that does not stop it does."""

    def runs_on(worker: process.Worker) -> bool:
        worker.generate([[1, 2]], 3)
        before = (tmp_path / "turns").stat().st_size
        end = time.monotonic() + (0.5 if stopped else 60)  # on a busy machine a thread may wait long for its turn
        while time.monotonic() < end:
            if (tmp_path / "turns").stat().st_size > before + 3:  # what was under way may still end
                return True
            time.sleep(0.01)
        return False

    (tmp_path / "weights.bin").write_bytes(bytes(1000))
    for stopped in (True, False):
        worker = process.Worker(System("ours", "spin-int4"), tmp_path, 1, tmp_path / "log")
        if not stopped:
            worker._signal("SIGCONT")
            worker._signal = lambda name: None  # type: ignore[method-assign]
        try:
            assert runs_on(worker) is not stopped
        finally:
            worker.close()


def test_both_real_sides_write_the_same_tokens(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ours in plain PyTorch and `transformers`, float32: greedy ids are equal, one prompt or two."""
    monkeypatch.setattr(floor, "measure", lambda shape, bits, threads: FLOOR)
    monkeypatch.setattr(random_weights, "NOISE", 0.5)
    config = BenchGenerate(**SMALL | {"starts": 0, "systems": ("ours-plain-float32", "transformers-float32")})
    found = bench_generate(config)
    assert found.left_out == {}
    for phase in found.phases:
        assert found.same_ids("ours-plain-float32", phase) == 1
    ids = found.systems["ours-plain-float32"].ids["decode-2"]
    assert len(ids) == 2 and all(len(row) == 6 for row in ids) and len({*ids[0], *ids[1]}) > 2
    out = capsys.readouterr().out
    assert "all of float32 wrote the same ids" in out
    assert max(map(len, out.splitlines()[:-1])) <= 100


# ---------------------------------------------------------------------- what follows from times


def measured(bits: int, is_ours: bool, *seconds: float, ids: list[list[int]] | None = None) -> Measured:
    turns = {"decode-2": list(seconds)}
    return Measured(bits, is_ours, 10**6, [1.0], [0.5], [10**8], turns, {"decode-2": ids or [[1, 2, 3], [4, 5, 6]]})


def by_hand(calibration: list[float] | None = None) -> Result:
    config = BenchGenerate(preset="tiny", phases=("decode-2",), prompt_tokens=5, new_tokens=3)
    shape = preset("tiny")
    found = {
        "ours-int8": measured(8, True, 1.0, 1.0, 9.0, ids=[[1, 2, 9], [4, 9, 6]]),
        "transformers-float32": measured(32, False, 4.0, 4.0, 4.0),
        "ctranslate2-int8": measured(8, False, 3.0, 3.0, 3.0),
        "openvino-bfloat16": measured(16, False, 2.0, 2.0, 2.0),
    }
    return Result(config, shape, 2, phases_of(config, shape), found, {}, 0.01, calibration or [0.01] * 4, FLOOR)


def test_rates_and_ratios_by_hand() -> None:
    found, phase = by_hand(), Phase("decode", 2, 5, 3)
    assert found.phases == [phase] and phase.tokens == 4 and phase.seconds([1.0, 2.0, 4.0]) == 3.0
    assert found.rate("ours-int8", phase) == 4.0
    assert found.ratio("ours-int8", phase) == 4.0
    assert found.best_peer(phase) == "openvino-bfloat16" and found.lead("ours-int8", phase) == 2.0
    assert found.best_peer(phase, 8) == "ctranslate2-int8" and found.lead("ours-int8", phase, 8) == 3.0
    assert found.best_peer(phase, 4) is None and found.lead("ours-int8", phase, 4) is None
    assert found.spread("ours-int8", phase) == (5.0 - 1.0) / 1.0
    assert found.same_ids("ours-int8", phase) == (2 + 1) / 6
    prefill = Phase("prefill", 1, 8, 1)
    assert (prefill.name, prefill.tokens, prefill.seconds([0.25])) == ("prefill-8", 8, 0.25)


def test_noise_by_hand() -> None:
    (line,) = by_hand().noise()  # one of four cells
    assert line == "quartiles of 1 of 4 cells are more than 25% apart: ours-int8 in decode-2 400%"
    quiet = by_hand([0.01, 0.01, 0.01, 0.012])
    quiet.systems["ours-int8"].turns["decode-2"][:] = [1.0, 1.1, 1.2]
    assert quiet.noise() == []
    noisy = by_hand([0.01, 0.01, 0.012, 0.012])
    assert noisy.noise()[0] == "the same work took times whose quartiles are 18% apart (limit 15%)"
    (busy,) = [line for line in by_hand([0.016] * 4).noise() if "busy" in line]  # as steady as it is slow
    assert busy == "the machine was busy throughout: the same work took 1.6x its best time (limit 1.5x)"
    assert not any("busy" in line for line in by_hand([0.014] * 4).noise())
    assert result.spread([1.0, 3.0]) == 1.0 and result.spread([5.0]) == 0.0


def test_the_floor_by_hand() -> None:
    """tiny: 2 layers of 16 x 16 x 12 entries, a head of 256 x 16; heads of 2 x 8."""
    shape, entries = preset("tiny"), 2 * 12 * 256 + 256 * 16
    assert floor.weight_bytes(shape, 32) == 4 * entries and floor.weight_bytes(shape, 4) == entries * 9 // 16
    decode = Phase("decode", 3, 5, 3)  # two timed steps, which see 6 and 7 tokens
    assert floor.step_operations(shape, decode) == 3 * (2 * entries + 2 * 4 * 16 * 6.5)
    prefill = Phase("prefill", 1, 4, 1)
    assert floor.step_operations(shape, prefill) == 4 * 2 * 2 * 12 * 256 + 2 * 256 * 16 + 2 * 4 * 16 * (1 + 2 + 3 + 4)
    assert FLOOR.bandwidth(10**6, 1) == 2e9 and FLOOR.bandwidth(4 * 10**8, 2) == 4e9 and FLOOR.bandwidth(6 * 10**8, 2) == 1e9
    computing = 2 * floor.step_operations(shape, decode) / 1e9
    assert FLOOR.seconds(shape, decode, 32, 2) == pytest.approx(computing, rel=1e-12)
    slow = dataclasses.replace(FLOOR, rates={"int8": 1e15})
    assert slow.seconds(shape, decode, 8, 2) == pytest.approx(2 * entries / 4e9, rel=1e-12)
    found = by_hand()
    share = found.rate("ours-int8", found.phases[0]) * FLOOR.seconds(shape, found.phases[0], 8, 2) / 4
    assert found.floor_share("ours-int8", found.phases[0]) == pytest.approx(share, rel=1e-12)


def test_limits_without_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(*_: object) -> float:
        raise floor.native.Unavailable("no compiler")

    monkeypatch.setattr(floor.native, "measure_bandwidth", unavailable)
    monkeypatch.setattr(floor, "MEASURE_SECONDS", 0.0)
    found = floor.measure(preset("tiny"), {32, 8}, 1)
    assert found.measured_by == "torch" and set(found.rates) == {"float32", "int8"} and min(found.rates.values()) > 1e6
    assert floor.calibrate(1) > 0


# ---------------------------------------------------------------------- tables


def test_tables_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    report.show(by_hand())
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert ["ours-int8", "4.0", "~400%", "4.00x"] in [line.split() for line in lines]
    assert ["ours-int8", "2.00x", "/", "3.00x"] in [line.split() for line in lines]
    assert ["ours-int8", "1.00", "s", "0.500", "s", "100", "MB", "1.0", "MB"] in [line.split() for line in lines]
    assert ["ours-int8", "50%"] in [line.split() for line in lines]


@pytest.mark.parametrize("name", ["ours-int8", "openvino-bfloat16", "transformers-float32"])
def test_a_phase_that_was_not_finished(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """An empty cell; everything else is as if the system were not there."""
    found = by_hand()
    phase = found.phases[0]
    found.systems[name].turns.clear()
    found.systems[name].ids.clear()
    assert found.ratio(name, phase) is found.lead(name, phase) is found.same_ids(name, phase) is None
    assert found.best_peer(phase) == ("ctranslate2-int8" if name == "openvino-bfloat16" else "openvino-bfloat16")
    assert (found.ratio("ctranslate2-int8", phase) is None) is (name == "transformers-float32")
    assert len(found.noise()) == (name != "ours-int8")  # its cell is the one that is not steady
    report.show(found)
    assert [name, "-"] in [line.split() for line in capsys.readouterr().out.splitlines()]
    assert report.as_json(found)["shown"][name] == {}
    assert all(path.is_file() for path in report.draw(found, [tmp_path / "rates.svg"]))


def test_what_must_be_known_is_told() -> None:
    found = by_hand()
    told = " | ".join(report.notes(found))
    assert "GPTQ only" in told and "AVX-512" not in told and "float embedding" not in told
    found.systems["xllamacpp-Q8_0"] = found.systems["onnxruntime-int8"] = measured(8, False, 3.0, 3.0, 3.0)
    told = " | ".join(report.notes(found))
    assert "llama.cpp here is a wheel without AVX-512" in told and "float embedding beside its 8-bit head" in told
    found.systems["llama.cpp-Q8_0"] = found.systems.pop("xllamacpp-Q8_0")
    assert "AVX-512" not in " | ".join(report.notes(found))


# ---------------------------------------------------------------------- choosing, weights, bad input


def test_systems_are_chosen_by_name_or_pattern(fake: None) -> None:
    assert [system.name for system in systems.choose(("*-int8", "ours-spin*"))[0]][:4] == [
        "ours-int8", "ours-crash-int8", "ours-raise-int8", "ours-spin-int4",
    ]  # fmt: skip
    assert len(systems.choose(("ours",))[0]) == 8
    with pytest.raises(UserError, match=r"systems: 'openvin' names none of them.*engines: ours, transformers"):
        systems.choose(("openvin",))


def test_one_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, fake: None) -> None:
    import fake_engine  # type: ignore[import-not-found]

    monkeypatch.setattr(fake_engine, "missing", lambda: "pip install fake")
    with pytest.raises(UserError, match="ours-int8 is not installed: pip install fake"):
        systems.choose(("ours-int8",))


def test_every_engine_names_its_precisions() -> None:
    known = systems.known_systems()
    assert {system.peer for system in known} == set(systems.PEERS)
    assert {system.bits for system in known} == {32, 16, 8, 4}
    assert systems.BASE in {system.name for system in known}


def test_weights_are_the_same_for_a_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        torch.manual_seed(len(name) + seed + 5)
        write_weights(preset("tiny"), seed, tmp_path / name)
    a, b, c = (weights.load_hf(tmp_path / name).state_dict() for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)
    assert some_tokenizer(40).vocab_size == 40 and len(set(some_tokenizer(40).pieces())) == 40


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"phases": ("decode-0",)}, "phases must be decode-B or prefill-T, as decode-8 or prefill-512; got 'decode-0'"),
        ({"phases": ()}, "phases is empty; name at least one"),
        ({"systems": ()}, "systems is empty; name at least one"),
        ({"new_tokens": 1}, "new_tokens must be at least 2; got 1"),
        ({"repeats": 0}, "repeats must be at least 1; got 0"),
        ({"repeats": 2}, "repeats must be at least 3 to tell noise; got 2; take more, or use --allow_noise"),
    ],
)
def test_contradictions_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BenchGenerate(**values)


def test_too_long_for_the_context() -> None:
    with pytest.raises(UserError, match=r"decode-1 needs 160 tokens and the context of tiny is 32; take other phases"):
        bench_generate(BenchGenerate(preset="tiny"))
    with pytest.raises(UserError, match=r"--png writes \.png files"):
        bench_generate(BenchGenerate(png="rates.svg"))
