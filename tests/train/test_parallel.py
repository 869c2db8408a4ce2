"""Several processes, started by `torchrun`, train the run of one process: its losses, its weights, its checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import small
import torch
from hypothesis import given
from hypothesis import strategies as st

import glassgpt
from glassgpt.config import OptimConfig, ParallelConfig, Pretrain, UserError
from glassgpt.config.files import write_yaml
from glassgpt.data import Stream, Windows
from glassgpt.loading import complete_checkpoints
from glassgpt.train import parallel
from glassgpt.train.parallel import QuietError, Ranks
from glassgpt.train.pretrain import pretrain
from glassgpt.train.run import read_log

CPU = torch.device("cpu")
STEPS = 6
WORKER = Path(__file__).with_name("worker.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
SECONDS = 120  # none takes nearly as long
FSDP = ParallelConfig(strategy="fsdp")
SHARDED = ParallelConfig(strategy="fsdp", sharded_checkpoints=True)


class Job(NamedTuple):
    """The runs of one `torchrun`, and what it said."""

    runs: Path
    errors: str
    facts: list[dict[str, Any]]


settings = functools.partial(small.settings, batch_size=8, max_steps=STEPS, eval_interval=3, save_interval=4)


MUON = OptimConfig(learning_rate=0.01, warmup_steps=4, optimizer="muon")
ON_FOUR: dict[str, dict[str, Any]] = {
    "ddp-4": {},
    "fsdp-4": {"batch_size": 1, "accumulation_steps": 8, "parallel": SHARDED},
    "fsdp-2-tensor-2-muon": {"optim": MUON, "parallel": dataclasses.replace(SHARDED, tensor_parallel=2)},
}
ON_TWO: dict[str, dict[str, Any]] = {
    "ddp-2": {"batch_size": 1, "accumulation_steps": 8},
    "fsdp-2": {"checkpoint_activations": True, "parallel": FSDP},
    "tensor-2": {"parallel": ParallelConfig(tensor_parallel=2)},
}


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process: the whole batch at once, in four parts, and with Muon."""
    runs = tmp_path_factory.mktemp("alone")
    pretrain(settings(runs / "whole", text))
    pretrain(settings(runs / "parts", text, batch_size=2, accumulation_steps=4))
    pretrain(settings(runs / "muon", text, optim=MUON))
    return runs


def start_job(world: int, folder: Path, configs: list[Pretrain]) -> Job:
    folder.mkdir(exist_ok=True)
    for number, config in enumerate(configs):
        write_yaml(folder / f"{number}.yaml", config)
    done = subprocess.run(
        [*TORCHRUN, str(world), str(WORKER), str(folder)], env=ENVIRONMENT, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr[-3000:]
    facts = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
    return Job(folder, done.stderr, facts)


@pytest.fixture(scope="module")
def four(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("four")
    return start_job(4, folder, [settings(folder / name, text, **how) for name, how in ON_FOUR.items()])


@pytest.fixture(scope="module")
def two(text: Path, four: Job, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Runs of its own, then the sharded runs of four ranks taken up again after their fourth step."""
    folder = tmp_path_factory.mktemp("two")
    configs = [settings(folder / name, text, **how) for name, how in ON_TWO.items()]
    for name in ("fsdp-4", "fsdp-2-tensor-2-muon"):
        run = back_at_step_4(four.runs / name, folder / name)
        layout = ParallelConfig(strategy="fsdp", sharded_checkpoints=name == "fsdp-4")
        configs.append(settings(run, text, **{**ON_FOUR[name], "parallel": layout, "resume": True}))
    return start_job(2, folder, configs)


def back_at_step_4(run: Path, copy: Path) -> Path:
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "gathered")
    shutil.rmtree(copy / "checkpoints" / "step-000006")
    return copy


def curve(run: Path) -> list[float]:
    entries = read_log(run)
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    return [entry[key] for entry in entries for key in ("loss", "val_loss") if key in entry]


def apart(a: Path, b: Path) -> float:
    return max(abs(x - y) for x, y in zip(curve(a), curve(b), strict=True))


# ---------------------------------------------------------------------- the same training


def test_accumulation_is_the_whole_batch_at_once(alone: Path) -> None:
    assert len(set(curve(alone / "whole"))) == STEPS + 2  # it trains
    assert apart(alone / "whole", alone / "parts") < 1e-6


@pytest.mark.parametrize("name", ["ddp-4", "fsdp-4"])
def test_four_processes_train_as_one(name: str, four: Job, alone: Path) -> None:
    assert apart(alone / "whole", four.runs / name) < 1e-6


@pytest.mark.parametrize("name", list(ON_TWO))
def test_two_processes_train_as_one(name: str, two: Job, alone: Path) -> None:
    assert apart(alone / "whole", two.runs / name) < 1e-6


def test_muon_on_shards_of_shards_trains_as_alone(four: Job, alone: Path) -> None:
    assert apart(alone / "muon", alone / "whole") > 1e-3
    assert apart(alone / "muon", four.runs / "fsdp-2-tensor-2-muon") < 5e-6  # its steps are rounded to bfloat16


def test_the_same_to_1e10_in_float64(two: Job) -> None:
    os.environ.setdefault("WORLD_SIZE", "1")
    sys.path.insert(0, str(WORKER.parent))
    try:
        from worker import CURVES, curve64
    finally:
        sys.path.pop(0)
    exact = curve64(ParallelConfig(), 1)
    assert len(set(exact)) == len(exact) == 12  # losses and gradient norms in turn
    assert max(abs(a - b) for a, b in zip(exact, curve64(ParallelConfig(), 8), strict=True)) < 1e-10
    for rank in two.facts:
        assert rank["curves"].keys() == CURVES.keys()
        for name, found in rank["curves"].items():
            assert max(abs(a - b) for a, b in zip(exact, found, strict=True)) < 1e-10, name


def test_only_rank_0_speaks_and_writes(two: Job, four: Job) -> None:
    for job, names in ((two, [*ON_TWO, *list(ON_FOUR)[1:]]), (four, [*ON_FOUR])):
        for said, times in (("parameters on", 1), (f"step {STEPS}: held-out loss", 1), (f"step {STEPS}/{STEPS}", 1)):
            assert job.errors.count(said) == times * len(names), said
        assert "Warning" not in job.errors and "Traceback" not in job.errors
    for name in ON_TWO:
        kept = {path.name for path in (two.runs / name).iterdir()}
        assert kept == {
            "checkpoints",
            "config.yaml",
            "ledger.json",
            "log.jsonl",
            "loss.png",
            "loss.svg",
            "shards",
            "tokenizer.json",
        }


def test_ranks_know_each_other(two: Job) -> None:
    for number, facts in enumerate(two.facts):
        ranks = facts["ranks"]
        assert (ranks["rank"], ranks["world"], ranks["gone"]) == (number, 2, [])
        assert facts["total"] == [3.0, 20.0]
        assert facts["gathered"] == ["of 0", "of 1"]
        assert facts["first"] == "made by 0"


# ---------------------------------------------------------------------- sharded checkpoints


@pytest.mark.parametrize("name", ["fsdp-4", "fsdp-2-tensor-2-muon"])
def test_a_sharded_checkpoint_is_the_gathered_one(name: str, four: Job) -> None:
    run = four.runs / name
    assert [folder.name for folder in complete_checkpoints(run)] == ["step-000004", "step-000006"]
    for folder in complete_checkpoints(run):
        files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        parts = {file for file in files if file.endswith(".safetensors")}
        assert len(parts) > 1 and all(part.startswith("sharded/") for part in parts)  # nobody gathered anything
        assert {Path(file).suffix for file in files} == {".safetensors", ".json"}  # and no pickle
        assert not any(path.read_bytes()[:1] == b"\x80" for path in folder.rglob("*") if path.is_file())
        gathered = run / "gathered" / "checkpoints" / folder.name
        whole = safetensors.torch.load_file(gathered / "model.safetensors")
        model, _ = glassgpt.load(str(folder))
        assert {n: p.shape for n, p in model.named_parameters()} == {n: t.shape for n, t in whole.items()}
        assert all(torch.equal(parameter, whole[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("name", ["fsdp-4", "fsdp-2-tensor-2-muon"])
def test_a_sharded_checkpoint_goes_on_alone(name: str, text: Path, four: Job, tmp_path: Path) -> None:
    run = back_at_step_4(four.runs / name, tmp_path / name)
    pretrain(settings(run, text, **{**ON_FOUR[name], "parallel": ParallelConfig(), "resume": True}))
    assert apart(run, four.runs / name) < (5e-6 if "muon" in name else 1e-6)
    assert (run / "checkpoints" / "step-000006" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["fsdp-4", "fsdp-2-tensor-2-muon"])
def test_a_sharded_checkpoint_goes_on_on_two_ranks(name: str, two: Job, four: Job) -> None:
    assert apart(two.runs / name, four.runs / name) < (5e-6 if "muon" in name else 1e-6)
    assert [folder.name for folder in complete_checkpoints(two.runs / name)] == ["step-000004", "step-000006"]


def test_a_damaged_part_is_told_of(text: Path, four: Job, tmp_path: Path) -> None:
    run = back_at_step_4(four.runs / "fsdp-4", tmp_path / "run")
    folder = run / "checkpoints" / "step-000004"
    part = max((folder / "sharded").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = part.read_bytes()
    part.write_bytes(content[: len(content) // 2])
    assert complete_checkpoints(run) == []
    with pytest.raises(UserError, match="step-000004"):
        glassgpt.load(str(folder))
    part.write_bytes(b"\xff" * len(content))  # right size, wrong inside
    with pytest.raises(UserError, match="step-000004"):
        glassgpt.load(str(folder))
    with pytest.raises(UserError, match="step-000004"):
        pretrain(settings(run, text, **{**ON_FOUR["fsdp-4"], "parallel": ParallelConfig(), "resume": True}))


# ---------------------------------------------------------------------- sharing a step


def ranks_of(world: int, tensor_parallel: int = 1) -> list[Ranks]:
    return [Ranks(CPU, rank, world, tensor_parallel) for rank in range(world)]


@given(st.integers(1, 12), st.integers(1, 8), st.integers(1, 12), st.integers(1, 2), st.integers(0, 3))
def test_a_step_is_the_same_windows_on_any_number_of_ranks(size: int, parts: int, world: int, tensor: int, step: int) -> None:
    windows = [Windows([np.arange(1000), np.arange(300)], 8, (0,)), Windows([np.arange(500)], 8, (0, 1))]
    shares = [0.7, 0.3]
    everyone = ranks_of(world * tensor, tensor)
    if size * parts % world:
        with pytest.raises(UserError, match=f"{size * parts} sequences, which {world} ranks cannot share evenly"):
            parallel.share_batch(size, parts, everyone[0].data_world)
        return
    whole = sorted(Stream(windows, shares, size * parts).places(step))
    mine, micro_batches = parallel.share_batch(size, parts, everyone[0].data_world)
    assert mine <= size  # no more rows at once than were asked for
    stream = Stream(windows, shares, mine, micro_batches, world)
    found = [
        place
        for ranks in everyone
        if ranks.rank % tensor == 0
        for micro in range(micro_batches)
        for place in stream.places(step, micro, ranks.data_rank)
    ]
    assert sorted(found) == whole
    for ranks in everyone:  # the ranks of a tensor-parallel group see the same rows
        assert ranks.data_rank == everyone[ranks.rank - ranks.rank % tensor].data_rank


def test_one_process_is_a_job_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with parallel.joined(ParallelConfig(), "cpu") as ranks:
        assert (ranks.is_first, ranks.world, ranks.data_world, ranks.gone()) == (True, 1, 1, [])
        assert ranks.total([1.0, 2.0]) == [1.0, 2.0] and ranks.gather("x") == ["x"] and ranks.first(lambda: 3) == 3
    with (
        pytest.raises(UserError, match="tensor_parallel is 2, "),
        joined(ParallelConfig(tensor_parallel=2)),
    ):
        pass
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(UserError, match="6 ranks cannot be parted"), joined(ParallelConfig(tensor_parallel=4)):
        pass
    with pytest.raises(UserError, match="needs --parallel"), joined(ParallelConfig(tensor_parallel=2)):
        pass


def joined(config: ParallelConfig) -> contextlib.AbstractContextManager[Ranks]:
    return parallel.joined(config, "cpu")


def test_who_is_gone() -> None:
    import socket

    ended = subprocess.Popen([sys.executable, "-c", ""])
    here = socket.gethostname()
    for _ in range(500):
        ranks = Ranks(CPU, 0, 3, processes={0: (here, os.getpid()), 1: (here, ended.pid), 2: ("elsewhere", 1)})
        if ranks.gone():
            break
        time.sleep(0.01)
    assert ranks.gone() == [1]  # not waited for yet: a zombie counts as gone
    ended.wait()
    assert ranks.gone() == [1]
    assert issubclass(QuietError, UserError)


# ---------------------------------------------------------------------- the command, and when it goes wrong


@contextlib.contextmanager
def command(world: int, config: Pretrain, folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """`torchrun ... -m glassgpt pretrain` with this configuration; ended afterwards, whatever happens."""
    write_yaml(folder / "config.yaml", config)
    arguments = [*TORCHRUN, str(world), *options, "-m", "glassgpt", "pretrain", "--config", str(folder / "config.yaml")]
    with (folder / "errors").open("w") as errors:
        process = subprocess.Popen(arguments, env=ENVIRONMENT, stderr=errors, stdout=subprocess.DEVNULL, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        if process.poll() is None:
            process.kill()
            process.wait()


def worker_of(launcher: subprocess.Popen[str], rank: int) -> int:
    """The process id of a rank."""
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no rank {rank}")


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not any(entry["step"] >= step for entry in read_log(run)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


LONG = 80


@pytest.fixture(scope="module")
def long_alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain(long_run(tmp_path_factory.mktemp("long") / "run", text))


def long_run(out_dir: Path, text: Path) -> Pretrain:
    optimizer = OptimConfig(learning_rate=1e-3, warmup_steps=4)
    return settings(out_dir, text, batch_size=4, max_steps=LONG, save_interval=10, eval_interval=0, optim=optimizer)


def test_a_mistake_ends_the_job_with_one_message(tmp_path: Path) -> None:
    with command(2, settings(tmp_path / "run", tmp_path / "missing.txt"), tmp_path) as job:
        assert job.wait(60) not in (0, None)
    said = (tmp_path / "errors").read_text()
    assert said.count("glassgpt pretrain: error:") == 1
    assert said.count("no such file") == 1


def test_a_killed_rank_ends_the_job_and_is_named(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with command(2, long_run(run, text), tmp_path) as job:
        wait_for_step(run, 25, job)
        victim = worker_of(job, 1)
        os.kill(victim, signal.SIGKILL)
        assert job.wait(60) not in (0, None)
    said = (tmp_path / "errors").read_text()
    (message,) = [line for line in said.splitlines() if line.startswith("glassgpt pretrain: error:")]
    assert "rank 1 (host " in message and f"process {victim})" in message
    assert f"Last complete checkpoint: {complete_checkpoints(run)[-1]}" in message and "--resume" in message
    assert read_log(run)[-1]["step"] < LONG


def test_torchrun_takes_a_run_up_again_by_itself(text: Path, tmp_path: Path, long_alone: Path) -> None:
    run = tmp_path / "run"
    with command(2, long_run(run, text), tmp_path, "--max-restarts", "1") as job:
        wait_for_step(run, 25, job)
        os.kill(worker_of(job, 0), signal.SIGKILL)  # the one that writes
        assert job.wait(SECONDS) == 0
    ours, theirs = read_log(run), read_log(long_alone)
    assert [entry["step"] for entry in ours] == list(range(1, LONG + 1))
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs, strict=True)) < 1e-4
    assert (tmp_path / "errors").read_text().count("parameters on") == 2  # it was started twice
