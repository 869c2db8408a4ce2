"""What every stage after pretraining promises: the same run however it is cut, killed or shared out; and that it learns."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from stages import LORA, STAGES, WORDS, apart, run, settings, tensors, write_examples

from glassgpt.cli import main
from glassgpt.config import OptimConfig, UserError
from glassgpt.config.files import write_yaml
from glassgpt.config.tuning import RecordsConfig
from glassgpt.loading import complete_checkpoints, load
from glassgpt.text import chat
from glassgpt.train.run import read_log
from glassgpt.tuning.rewards import Answer
from glassgpt.tuning.scalar import open_scorer

EVERY = [(stage, lora) for stage in STAGES for lora in (False, True)]
ROLLOUTS = ("ppo", "grpo")


def changes(lora: bool, **more: Any) -> dict[str, Any]:
    return {**({"lora": LORA} if lora else {}), **more}


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs without interruption, made once: six steps, a checkpoint every third."""
    made: dict[tuple[str, bool], Path] = {}

    def get(stage: str, lora: bool) -> Path:
        if (stage, lora) not in made:
            folder = tmp_path_factory.mktemp("whole") / "run"
            made[stage, lora] = run(stage, home, folder, **changes(lora, save_interval=3))
        return made[stage, lora]

    return get


# ---------------------------------------------------------------------- cut and killed


@pytest.mark.parametrize(("stage", "lora"), EVERY)
def test_a_resumed_run_is_the_uninterrupted_one(stage: str, lora: bool, home: Path, whole: Any, tmp_path: Path) -> None:
    """To the bit: weights, heads, adapters, optimisers, and every number of the log but the seconds."""
    before = whole(stage, lora)
    cut = tmp_path / "cut"
    shutil.copytree(before, cut)
    shutil.rmtree(cut / "checkpoints" / "step-000006")
    run(stage, home, cut, **changes(lora, save_interval=3, resume=True))
    ours, theirs = tensors(cut), tensors(before)
    assert ours.keys() == theirs.keys() and len(ours) > 10
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    logs = [[{k: v for k, v in entry.items() if k != "seconds"} for entry in read_log(folder)] for folder in (cut, before)]
    assert logs[0] == logs[1] and len(logs[0]) == 6


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo", "grpo"])
def test_a_killed_run_goes_on_to_the_same_bits(stage: str, home: Path, tmp_path: Path) -> None:
    """SIGKILL at any moment, from outside, and --resume by the command line."""
    calm = run(stage, home, tmp_path / "calm", max_steps=40, save_interval=5)
    stormy = tmp_path / "stormy"
    file = tmp_path / "config.yaml"
    write_yaml(file, settings(stage, home, stormy, max_steps=40, save_interval=5))
    child = subprocess.Popen(
        [sys.executable, "-m", "glassgpt", stage, "--config", str(file)],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    end = time.monotonic() + 60
    while len(read_log(stormy)) < 12 and child.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert 12 <= len(read_log(stormy)) < 40
    assert main([stage, "--resume", "--out_dir", str(stormy)]) == 0
    assert apart(calm, stormy) == 0


def test_a_resumed_run_must_ask_for_the_same(home: Path, whole: Any) -> None:
    with pytest.raises(UserError, match=r"was started with seed = 0; resuming asks for 1"):
        run("sft", home, whole("sft", False), resume=True, seed=1)
    with pytest.raises(UserError, match="holds a run already; continue it with --resume"):
        run("sft", home, whole("sft", False))


def test_a_signal_stops_in_order(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from glassgpt.tuning import sft as module

    steps = iter(range(1, 100))
    real = module.collate

    def collate(*args: Any, **more: Any) -> Any:
        if next(steps) == 6:  # two batches are measured before the first step
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **more)

    monkeypatch.setattr(module, "collate", collate)
    run("sft", home, tmp_path / "run")
    (folder,) = complete_checkpoints(tmp_path / "run")
    assert 1 <= int(folder.name[-6:]) < 6


# ---------------------------------------------------------------------- shared out


@pytest.mark.parametrize(("stage", "lora"), [*[(stage, False) for stage in STAGES], ("sft", True), ("ppo", True)])
def test_accumulation_is_one_batch(stage: str, lora: bool, home: Path, tmp_path: Path) -> None:
    """8 x 1 = 1 x 8 in float64: responses of uneven length make any mean of means wrong by percents."""
    one = run(stage, home, tmp_path / "one", **changes(lora, batch_size=8, max_steps=3))
    many = run(stage, home, tmp_path / "many", **changes(lora, batch_size=1, accumulation_steps=8, max_steps=3))
    assert apart(one, many) < 1e-10
    ours, theirs = read_log(one), read_log(many)
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-10) and a["grad_norm"] == pytest.approx(b["grad_norm"], abs=1e-9)


def test_two_ranks_are_one(home: Path, tmp_path: Path) -> None:
    """Every stage, with and without adapters, in one job of two processes under torchrun."""
    configs = tmp_path / "configs"
    configs.mkdir()
    runs = [(stage, lora) for stage in STAGES for lora in (False, True) if not lora or stage in ("sft", "dpo", "ppo")]
    for number, (stage, lora) in enumerate(runs):
        more = changes(lora, batch_size=2, accumulation_steps=2, max_steps=3)
        write_yaml(configs / f"{number:02}-{stage}.yaml", settings(stage, home, tmp_path / f"two-{number}", **more))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("stages_worker.py")), str(configs)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for number, (stage, lora) in enumerate(runs):
        alone = run(stage, home, tmp_path / f"one-{number}", **changes(lora, batch_size=4, max_steps=3))
        assert apart(alone, tmp_path / f"two-{number}") < 1e-10, (stage, lora)
        ours, theirs = (read_log(folder)[-1] for folder in (alone, tmp_path / f"two-{number}"))
        for name in ours.keys() - {"seconds", "sample"}:
            assert ours[name] == pytest.approx(theirs[name], abs=1e-9), (stage, name)


# ---------------------------------------------------------------------- it learns


def test_sft_learns_one_batch_by_heart(home: Path, tmp_path: Path) -> None:
    write_examples(tmp_path, count=5)
    data = RecordsConfig(files=(str(tmp_path / "chats.jsonl"),), held_out=(str(tmp_path / "chats.jsonl"),))
    optim = OptimConfig(learning_rate=0.01, warmup_steps=5, weight_decay=0.0)
    folder = run("sft", home, tmp_path / "run", data=data, optim=optim, max_steps=120, batch_size=5, precision="fp32")
    log = read_log(folder)
    assert log[0]["loss"] > 3 and log[-1]["loss"] < 0.05 and log[-1]["val_loss"] < 0.05
    model, tokenizer = load(folder)
    row = json.loads((tmp_path / "chats.jsonl").read_text().splitlines()[0])
    from glassgpt.tuning.rollout import write

    ids = chat.prompt([chat.Message("user", row["prompt"])], tokenizer)
    (answer,) = write(model, [ids], chat.end_ids(tokenizer), [0], max_new_tokens=30, n_ids=300, temperature=0)
    assert answer.is_whole and tokenizer.decode(answer.ids[:-1]) == row["completion"]


@pytest.mark.parametrize("stage", ["reward", "dpo", "ipo", "kto"])
def test_pairs_are_told_apart(stage: str, home: Path, tmp_path: Path) -> None:
    """The better answers end in "yes": all that is held out must be judged right in the end."""
    optim = OptimConfig(learning_rate=0.005, warmup_steps=5, weight_decay=0.0)
    log = read_log(run(stage, home, tmp_path / "run", optim=optim, max_steps=60, precision="fp32"))
    assert log[-1]["val_accuracy"] >= 0.9
    if stage in ("dpo", "ipo"):
        assert log[0]["margin"] == pytest.approx(0, abs=1e-4)  # it is its own reference
        assert log[-1]["val_margin"] > 3 * abs(log[0]["margin"]) and log[-1]["val_margin"] > 0.1
    if stage == "dpo":
        assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("stage", ROLLOUTS)
def test_rewarded_answers_become_likelier(stage: str, home: Path, tmp_path: Path) -> None:
    optim = OptimConfig(learning_rate=0.003, warmup_steps=2, weight_decay=0.0, final_share=1.0)
    more = (
        {"reward": ("contains:e",), "beta": 0.0, "target_kl": 0.0} if stage == "ppo" else {"reward": ("contains:e",), "beta": 0.0}
    )
    folder = run(stage, home, tmp_path / "run", optim=optim, max_steps=40, batch_size=8, precision="fp32", **more)
    log = read_log(folder)
    first, last = (sum(entry["reward"] for entry in part) / 5 for part in (log[:5], log[-5:]))
    assert first < 0.5 and last > 0.9 and log[-1]["val_reward"] > 0.9
    assert log[0]["kl"] == pytest.approx(0, abs=1e-5) and log[-1]["kl"] > 0.1


def test_beta_holds_on_to_the_start(home: Path, tmp_path: Path) -> None:
    found = {}
    for beta in (0.0, 1.0):
        optim = OptimConfig(learning_rate=0.003, warmup_steps=2, weight_decay=0.0, final_share=1.0)
        more = {"reward": ("contains:e",), "beta": beta}
        found[beta] = read_log(
            run("grpo", home, tmp_path / f"{beta}", optim=optim, max_steps=25, batch_size=8, precision="fp32", **more)
        )
    assert found[1.0][-1]["kl"] < 0.5 * found[0.0][-1]["kl"]


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_muon_trains_adapters(stage: str, home: Path, tmp_path: Path) -> None:
    """Then AdamW has nothing left, or a value head alone."""
    optim = OptimConfig(optimizer="muon", learning_rate=0.003, warmup_steps=2)
    log = read_log(run(stage, home, tmp_path / "run", optim=optim, lora=LORA))
    assert len(log) == 6 and log[-1]["grad_norm"] > 0


# ---------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_loss_that_is_not_finite_stops_and_keeps_what_was_good(stage: str, home: Path, tmp_path: Path) -> None:
    optim = OptimConfig(learning_rate=1e300, warmup_steps=0, weight_decay=0.0, grad_clip=0.0)
    with pytest.raises(UserError, match=r"diverged|not numbers|NaN"):
        run(stage, home, tmp_path / "run", optim=optim, save_interval=1)
    for folder in complete_checkpoints(tmp_path / "run"):
        json.loads((folder / "complete.json").read_text())


BAD_REWARDS = {
    "raises": ("raise ValueError('no such word')", "ValueError: no such word"),
    "returns NaN": ("return float('nan')", "nan"),
    "hangs": ("import time; time.sleep(60)", "second"),
}


@pytest.mark.parametrize("what", list(BAD_REWARDS))
@pytest.mark.parametrize("stage", ROLLOUTS)
def test_a_bad_reward_stops_the_run_with_a_checkpoint(stage: str, what: str, home: Path, tmp_path: Path) -> None:
    """It names the sample; and after the reward is mended the run goes on to what it would have been."""
    body, said = BAD_REWARDS[what]
    good = "def f(prompt, response):\n    return float('e' in response)\n"
    (tmp_path / "good.py").write_text(good)
    count = tmp_path / "count"
    bad = (
        "from pathlib import Path\n"
        f"PLACE = Path({str(count)!r})\n"
        "def f(prompt, response):\n"
        "    number = int(PLACE.read_text()) if PLACE.exists() else 0\n"
        "    PLACE.write_text(str(number + 1))\n"
        f"    if number == 13: {body}\n"
        "    return float('e' in response)\n"
    )
    (tmp_path / "reward.py").write_text(bad)
    more = {"reward": (f"{tmp_path / 'reward.py'}:f",), "reward_seconds": 1.0, "save_interval": 2}
    with pytest.raises(UserError, match=said) as error:
        run(stage, home, tmp_path / "run", **more)
    assert "prompts.jsonl, line" in str(error.value)
    stopped = int(complete_checkpoints(tmp_path / "run")[-1].name[-6:])
    assert stopped == {"ppo": 3, "grpo": 0}[stage]  # 4 and 16 answers a step: the fourteenth is in step 4 and in step 1
    run(stage, home, tmp_path / "run", **more, resume=True)
    calm = run(stage, home, tmp_path / "calm", **{**more, "reward": (f"{tmp_path / 'good.py'}:f",)})
    assert apart(calm, tmp_path / "run") == 0


@pytest.mark.parametrize("stage", ROLLOUTS)
def test_a_reward_that_fails_on_held_out_prompts_stops_with_a_checkpoint_too(stage: str, home: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    held = tmp_path / "other" / "held.jsonl"
    held.write_text('{"prompt": "never asked before"}\n')
    code = "def f(prompt, response):\n    assert 'never' not in prompt\n    return 1.0\n"
    (tmp_path / "reward.py").write_text(code)
    data = RecordsConfig(files=(str(home / "prompts.jsonl"),), held_out=(str(held),))
    with pytest.raises(UserError, match=r"held\.jsonl, line 1"):
        run(stage, home, tmp_path / "run", data=data, reward=(f"{tmp_path / 'reward.py'}:f",), eval_interval=3)
    assert complete_checkpoints(tmp_path / "run")[-1].name == "step-000003" and len(read_log(tmp_path / "run")) == 3


def test_any_seed_will_do(home: Path, tmp_path: Path) -> None:
    for stage in ROLLOUTS:
        assert len(read_log(run(stage, home, tmp_path / stage, seed=2**32 - 1, max_steps=2))) == 2


def test_changed_examples_are_not_gone_on_with(home: Path, tmp_path: Path) -> None:
    write_examples(tmp_path)
    data = RecordsConfig(files=(str(tmp_path / "chats.jsonl"),), holdout_share=0.2)
    folder = run("sft", home, tmp_path / "run", data=data, save_interval=3)
    shutil.rmtree(folder / "checkpoints" / "step-000006")
    lines = (tmp_path / "chats.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "chats.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match=r"chats.jsonl has changed since .* was started"):
        run("sft", home, folder, data=data, save_interval=3, resume=True)
    (tmp_path / "chats.jsonl").write_text("".join(lines))
    assert len(read_log(run("sft", home, folder, data=data, save_interval=3, resume=True))) == 6


def test_kto_takes_equal_answers_to_several_prompts(home: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"the {word}", "completion": "yes", "label": bool(n % 2)} for n, word in enumerate(WORDS)]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = RecordsConfig(files=(str(tmp_path / "labels.jsonl"),), holdout_share=0.04)  # one is held out
    assert len(read_log(run("kto", home, tmp_path / "run", data=data, max_steps=2))) == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_kl": -1.0}, "target_kl must be at least 0"),
        ({"gae_lambda": 7.0}, "gae_lambda must be between 0 and 1"),
        ({"value_clip": -1.0}, "value_clip must be at least 0"),
        ({"discount": math.nan}, "discount must be between 0 and 1"),
        ({"beta": 0.0, "target_kl": 2.0}, "target_kl multiplies beta, which is 0"),
        ({"lora": dataclasses.replace(LORA, dropout=0.1)}, "leave lora.dropout 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes: dict[str, Any], said: str, home: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        settings("ppo", home, tmp_path, **changes)


def test_only_a_reward_model_judges(home: Path, tmp_path: Path) -> None:
    """A value head is none; an answer that was cut off is scored without an end that it never wrote."""
    critic = run("ppo", home, tmp_path / "ppo", max_steps=1)
    with pytest.raises(UserError, match="is no reward model"):
        open_scorer(str(critic), torch.device("cpu"))
    judge = open_scorer(str(run("reward", home, tmp_path / "reward", max_steps=30, precision="fp32")), torch.device("cpu"))
    asked = (chat.Message("user", "the cat"),)
    whole, cut = (Answer(asked, "sat", "here", {}, is_whole) for is_whole in (True, False))
    first, second = judge([whole, cut])
    assert judge([whole]) == pytest.approx([first], abs=1e-6) and abs(first - second) > 1e-4
    folder = run("grpo", home, tmp_path / "grpo", reward=(f"model:{tmp_path / 'reward'}",), max_steps=2, precision="fp32")
    assert len(read_log(folder)) == 2


@pytest.mark.parametrize(
    ("stage", "file", "said"),
    [
        ("sft", "pairs", "preference"),
        ("sft", "prompts", "prompt"),
        ("reward", "chats", "pairs have fields prompt, chosen and rejected"),
        ("dpo", "prompts", "pairs have fields prompt, chosen and rejected"),
        ("kto", "chats", "kto wants fields prompt, completion and label"),
    ],
)
def test_examples_of_another_kind_are_refused(stage: str, file: str, said: str, home: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as error:
        run(stage, home, tmp_path / "run", data=RecordsConfig(files=(str(home / f"{file}.jsonl"),), holdout_share=0.2))
    assert f"{file}.jsonl, line" in str(error.value)


def test_a_run_without_anything_to_learn_does_not_start(home: Path, tmp_path: Path) -> None:
    data = RecordsConfig(files=(str(home / "chats.jsonl"),), max_tokens=12)
    with pytest.raises(UserError, match=r"nothing to learn: of \d+ examples none is left"):
        run("sft", home, tmp_path / "run", data=data)
    with pytest.raises(UserError, match="no data: name at least one file"):
        run("sft", home, tmp_path / "other", data=RecordsConfig())


def test_pictures_are_drawn(home: Path, tmp_path: Path) -> None:
    """Of pairs their loss, lengths and calibration; of rewards these, with the divergence beside them."""
    drawn = {"reward": ("loss", "lengths", "calibration"), "grpo": ("reward",)}
    for stage, names in drawn.items():
        folder = run(stage, home, tmp_path / stage)
        assert {path.stem for path in folder.glob("*.svg")} == {path.stem for path in folder.glob("*.png")} == set(names)
