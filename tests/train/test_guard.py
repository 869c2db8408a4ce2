"""What looks wrong is noticed, told of and left out; what is asked to stop stops in order."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from small import identical, tensors

from glassgpt.config import OptimConfig, Pretrain, UserError, preset
from glassgpt.config.files import write_yaml
from glassgpt.data import Place, corpus
from glassgpt.loading import complete_checkpoints
from glassgpt.text import Tokenizer
from glassgpt.train import guard
from glassgpt.train import session as sessions
from glassgpt.train.guard import Spikes, Stop
from glassgpt.train.loss import Scored
from glassgpt.train.pretrain import pretrain
from glassgpt.train.run import read_log
from glassgpt.train.session import resume_command

settings = functools.partial(
    small.settings, optim=OptimConfig(learning_rate=0.003, warmup_steps=4), max_steps=30, save_interval=10
)


# ---------------------------------------------------------------------- spikes


def noisy(count: int, seed: int = 0) -> Iterator[float]:
    draw = random.Random(seed)
    return (3.0 + draw.gauss(0, 0.1) for _ in range(count))


def test_noise_is_no_spike_and_a_spike_is() -> None:
    spikes = Spikes(8.0)
    assert not any(spikes.sees(loss) for loss in noisy(500))
    found = [Spikes(8.0, noisy(100, seed)).typical() for seed in range(50)]
    medians, deviations = ([pair[n] for pair in found] for n in (0, 1))
    assert sum(medians) / 50 == pytest.approx(3.0, abs=0.01)
    assert sum(deviations) / 50 == pytest.approx(0.1, rel=0.05)  # the noise's standard deviation
    median, deviation = spikes.typical()
    assert not spikes.sees(median + 7.9 * deviation)
    assert spikes.sees(spikes.typical()[0] + 8.1 * spikes.typical()[1])
    assert not spikes.sees(0.1)  # a fall is none


def test_a_loss_that_stays_high_is_soon_typical() -> None:
    """Or every later step of a run would be called a spike, and with `skip` none would train."""
    spikes = Spikes(8.0, noisy(100))
    found = [spikes.sees(9.0) for _ in range(100)]
    assert all(found[:45]) and not any(found[55:])
    before = spikes.typical()
    assert not spikes.sees(math.nan) and not spikes.sees(math.inf)  # told of as not finite
    assert spikes.typical() == before


def test_the_first_losses_and_zero_deviations_see_nothing() -> None:
    spikes = Spikes(8.0)
    assert [spikes.sees(loss) for loss in (1.0, 1e6, *noisy(17), 1e9)] == [False] * 20
    assert [Spikes(8.0, noisy(count)).sees(1e9) for count in (19, 20)] == [False, True]
    off = Spikes(0.0, noisy(100))
    assert not off.sees(1e9)


def test_a_constant_loss_is_not_a_spike_by_its_last_digit() -> None:
    spikes = Spikes(8.0, [2.0] * 100)
    assert not spikes.sees(2.001)
    assert spikes.sees(2.1)


def test_the_window_is_the_last_hundred() -> None:
    spikes = Spikes(8.0, [*[50.0] * 100, *noisy(100)])
    assert spikes.sees(50.0)


def test_a_restart_from_the_log_decides_alike() -> None:
    draw = random.Random(1)
    losses = [draw.choice([9.0, math.nan]) if draw.random() < 0.05 else loss for loss in noisy(300, 1)]
    whole = Spikes(6.0)
    decided = [whole.sees(loss) for loss in losses]
    assert 3 < sum(decided) < 20
    for cut in (10, 19, 20, 57, 150, 299):
        logged = [
            {"loss": loss, **({"spike": True} if spike else {})} for loss, spike in zip(losses[:cut], decided, strict=False)
        ]
        read = [json.loads(json.dumps(entry)) for entry in logged]
        again = Spikes(6.0, [entry["loss"] for entry in read])
        assert [again.sees(loss) for loss in losses[cut:]] == decided[cut:], cut


# ---------------------------------------------------------------------- bad steps


def nan_at(monkeypatch: pytest.MonkeyPatch, *steps: int, value: float = math.nan) -> None:
    """The loss of these steps (from 1) is `value`; a run calls the model once a step while it trains."""
    forward, calls = Scored.forward, iter(range(1, 1_000_000))

    def wrong(scored: Scored, *batch: Any) -> torch.Tensor:
        total = forward(scored, *batch)
        return total * value if scored.training and next(calls) in steps else total

    monkeypatch.setattr(Scored, "forward", wrong)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_left_out(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    config = settings(tmp_path / "run", text, bad_steps="skip")
    with monkeypatch.context() as patch:
        nan_at(patch, 7, 13, value=value)
        run = pretrain(config)
    entries = read_log(run)
    assert [entry["step"] for entry in entries] == list(range(1, 31))
    assert [entry["step"] for entry in entries if entry.get("skipped")] == [7, 13]
    saved = tensors(complete_checkpoints(run)[-1])
    assert all(tensor.isfinite().all() for tensor in saved.values())
    steps = {name.rsplit(":", 1)[1]: tensor for (_, name), tensor in saved.items() if name.endswith(":step")}
    assert steps["step"] == 28  # not 30
    said = capsys.readouterr().err
    (report,) = re.findall(r"step 7: loss (?:nan|inf), gradient norm (?:nan|inf): not finite\. .*", said)
    file, start, shown = re.search(r"row: (\S+) from token ([\d,]+): '(.*)' \(", report).groups()
    assert (run / "shards" / "00-sentences" / Path(file).name).exists()
    tokenizer = Tokenizer.load(run)
    (domain,) = corpus.read(run / "shards", tokenizer).domains
    (array,) = domain.shards.tokens("train")
    first = int(start.replace(",", ""))
    decoded = tokenizer.decode(array[first : first + 60].tolist())
    assert decoded[: guard.SHOWN_CHARACTERS] == shown.encode().decode("unicode_escape")
    assert decoded.strip()[:20] in text.read_text()

    # taken up again in the middle, with the same bad step still to come, it is the same run
    copy = tmp_path / "copy" / "run"
    shutil.copytree(run, copy)
    for folder in complete_checkpoints(copy)[1:]:
        shutil.rmtree(folder)
    reached = int(complete_checkpoints(copy)[-1].name.removeprefix("step-"))
    with monkeypatch.context() as patch:
        nan_at(patch, *(step - reached for step in (7, 13)), value=value)
        pretrain(dataclasses.replace(config, out_dir=str(copy), resume=True))
    assert identical(run, copy)


def test_a_spike_is_told_of_and_left_out_only_when_asked(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = pretrain(settings(tmp_path / "plain", text))
    capsys.readouterr()
    for bad_steps in ("stop", "skip"):
        with monkeypatch.context() as patch:
            nan_at(patch, 25, value=100.0)
            run = pretrain(settings(tmp_path / bad_steps, text, bad_steps=bad_steps, optim=OptimConfig(grad_clip=0)))
        entry = read_log(run)[24]
        assert entry["spike"] is True and entry.get("skipped", False) == (bad_steps == "skip")
        assert [e["step"] for e in read_log(run) if e.get("spike")] == [25]
        assert re.search(
            r"step 25: loss .*: a spike: typical is \d\.\d+\. The (batch's )?worst row: .* from token", capsys.readouterr().err
        )
    assert not any("spike" in entry or "skipped" in entry for entry in read_log(plain))


def test_skipping_without_end_stops(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MOST_SKIPPED", 3)
    monkeypatch.setattr(Scored, "forward", lambda self, *_: next(self.parameters()).sum() * math.nan)
    with pytest.raises(UserError, match=r"step 4: the last 4 steps were all left out.*Last complete checkpoint: none"):
        pretrain(settings(tmp_path / "run", text, bad_steps="skip"))


def test_the_command_that_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resume_command("pretrain", Path("r")) == "glassgpt pretrain --resume --out_dir r"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert resume_command("pretrain", Path("r"), 8) == "torchrun --nproc-per-node 4 -m glassgpt pretrain --resume --out_dir r"


def test_a_report_changes_nothing(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with dropout either, whose random numbers a report must not use up."""
    changes = {"model": preset("tiny", vocab_size=300, dropout=0.1), "accumulation_steps": 2, "max_steps": 10}
    calm = pretrain(settings(tmp_path / "calm", text, **changes))
    monkeypatch.setattr(Spikes, "sees", lambda spikes, loss: not spikes._losses.append(loss))
    loud = pretrain(settings(tmp_path / "loud", text, **changes))
    assert all(entry["spike"] for entry in read_log(loud))
    assert identical(calm, loud)


def test_the_worst_row_is_described(text: Path, tmp_path: Path) -> None:
    run = pretrain(settings(tmp_path / "run", text, max_steps=1))
    tokenizer = Tokenizer.load(run)
    texts = corpus.read(run / "shards", tokenizer)
    places = [Place(0, 0, 5), Place(0, 0, 1234), Place(0, 0, 70)]
    (array,) = texts.domains[0].shards.tokens("train")
    shown = tokenizer.decode(array[1234:1300].tolist())[:60]
    assert guard.describe(places, [2.0, 7.5, 3.0], texts, tokenizer).endswith(f"from token 1,234: {shown!r} (7.50 nats a token)")
    assert "from token 1,234:" in guard.describe(places, [4.0, math.nan, 3.0], texts, tokenizer)


# ---------------------------------------------------------------------- asked to stop


def test_signals_are_noted_and_handlers_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with Stop() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize(
    ("has_mates", "error"), [(True, RuntimeError), (True, ConnectionError), (True, KeyError), (False, RuntimeError)]
)
def test_a_rank_that_has_lost_a_mate_is_deaf_to_torchrun(has_mates: bool, error: type[Exception]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.suppress(error), Stop(has_mates=has_mates):
            raise error
        now = signal.getsignal(signal.SIGTERM)
        assert now == (signal.SIG_IGN if has_mates and error is not KeyError else before)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_elsewhere_than_in_the_main_thread_nothing_is_set() -> None:
    import threading

    found: list[object] = []

    def look() -> None:
        with Stop():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [before]


@pytest.fixture(scope="module")
def calm(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody stops."""
    return pretrain(long_run(tmp_path_factory.mktemp("calm") / "run", text))


def long_run(out_dir: Path, text: Path) -> Pretrain:
    return settings(out_dir, text, max_steps=200, save_interval=0, model=preset("tiny", vocab_size=300, dropout=0.1))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(
    number: int, code: int, text: Path, tmp_path: Path, calm: Path, wait_for: Callable[..., None]
) -> None:
    run, file = tmp_path / "run", tmp_path / "config.yaml"
    write_yaml(file, long_run(run, text))
    command = [sys.executable, "-m", "glassgpt", "pretrain", "--config", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    wait_for(lambda: len(read_log(run)) >= 20, child)
    child.send_signal(number)
    _, said = child.communicate(timeout=60)
    assert child.returncode == code, said
    (saved,) = complete_checkpoints(run)
    step = read_log(run)[-1]["step"]
    assert saved.name == f"step-{step:06d}" and 20 <= step < 200
    assert f"stopped after step {step}, which is saved; continue with\n  {resume_command('pretrain', run)}\n" in said
    assert "Traceback" not in said
    assert (run / "loss.svg").exists()
    from glassgpt.cli import main

    assert main([*resume_command("pretrain", run).split()[1:], "--compile", "off"]) == 0
    assert [entry["step"] for entry in read_log(run)] == list(range(1, 201))
    assert identical(run, calm)


@pytest.fixture
def wait_for() -> Callable[..., None]:
    def wait(condition: Callable[[], bool], child: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)

    return wait
