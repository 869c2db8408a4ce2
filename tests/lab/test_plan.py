"""`glassgpt plan`: the estimate, its tables, and what a real step takes."""

from __future__ import annotations

import dataclasses
import json
import sys
from itertools import pairwise
from typing import Literal

import pytest
import torch

from glassgpt.cli import main
from glassgpt.config import PRESETS, ModelConfig, UserError
from glassgpt.config.model import MoeConfig
from glassgpt.config.plan import Plan
from glassgpt.interpret import cost
from glassgpt.lab import plan_check
from glassgpt.lab.plan import estimate, plan
from glassgpt.lab.plan_check import attention_law, flops_rows, memory_row, small

CPU, IS_LINUX = torch.device("cpu"), sys.platform == "linux"
MODERN = dataclasses.replace(
    PRESETS["gpt2"],
    norm="rms",
    position="rope",
    n_kv_head=4,
    mlp="swiglu",
    qk_norm=True,
    bias=False,
    tied_head=False,
    dropout=0.0,
)


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")


# ---------------------------------------------------------------------- the estimate


def test_gpt3_by_hand() -> None:
    """Brown et al. 2020, table D.1: 175 B parameters x 300 B tokens x 6 = 3.14e23 operations, 3,640 PFLOP/s-days."""
    found = estimate(PRESETS["gpt3-175b"], Plan(training_tokens=300e9, gpus=1000, peak_tflops=312, mfu=0.5))
    operations = found.training_flops * found.training_tokens
    assert operations == pytest.approx(3.14e23, rel=0.04)  # theirs leaves attention and the embedding out
    assert found.seconds == operations / (1000 * 312e12 * 0.5)
    assert found.price == pytest.approx(found.seconds / 3600 * 1000 * 2.0)
    assert operations / 1e15 / 86400 == pytest.approx(3640, rel=0.04)


def test_tokens_follow_from_active_parameters() -> None:
    found = estimate(PRESETS["mixtral-8x7b"], Plan())
    assert found.training_tokens == 20 * found.active < 20 * found.parameters
    assert found.training_flops < 6 * found.parameters


def test_more_gpus_take_less_each() -> None:
    one, many = (estimate(PRESETS["gpt3-6.7b"], Plan(gpus=n, training_tokens=1e9)) for n in (1, 8))
    assert many.seconds == pytest.approx(one.seconds / 8)
    assert many.price == pytest.approx(one.price)
    assert many.kept.peak < one.kept.peak
    assert not one.fits(one.checkpointed, 80) and many.fits(many.checkpointed, 80)


@pytest.mark.parametrize("changes", [{"optimizer": "muon"}, {"precision": "fp32"}, {"device": "cpu"}, {"accumulation_steps": 2}])
def test_every_option_changes_the_memory(changes: dict[str, object]) -> None:
    base = Plan(batch_size=4, training_tokens=1e9)
    assert estimate(PRESETS["gpt2"], base).kept != estimate(PRESETS["gpt2"], dataclasses.replace(base, **changes)).kept  # type: ignore[arg-type]


def test_adapters_by_hand() -> None:
    """gpt2-large: r * (in + out) of four matrices in 36 blocks; the peak of a short row is hardly more than the weights."""
    shape = PRESETS["gpt2-large"]
    row = Plan(batch_size=1, context_tokens=64, precision="fp32", device="cpu")
    found, whole = estimate(shape, dataclasses.replace(row, lora_rank=8)), estimate(shape, row)
    D = shape.width
    assert found.adapters == found.trained == 36 * 8 * ((D + 3 * D) + (D + D) + (D + 4 * D) + (4 * D + D)) == 5_898_240
    assert found.trained_share == found.adapters / (whole.parameters + found.adapters)
    assert (whole.adapters, whole.trained, whole.trained_share) == (0, whole.parameters, 1.0)
    assert found.kept.weights == 4 * (whole.parameters + found.adapters)
    assert (found.kept.gradients, found.kept.optimizer) == (4 * found.adapters, 8 * found.adapters)
    assert found.kept.peak < 3.6e9 and whole.checkpointed.peak > 12e9
    trained_too = found.kept.weights + found.kept.gradients + found.kept.optimizer
    assert found.checkpointed.peak - trained_too < 4 * shape.vocab_size * D / 4  # no gradient of the embedding at the end
    assert found.fits(found.kept, 8) and not whole.fits(whole.checkpointed, 8)
    assert 2 * found.forward_flops < found.training_flops < 2.1 * found.forward_flops
    assert (found.training_tokens, whole.training_tokens) == (1e6, 20 * whole.active)


# ---------------------------------------------------------------------- the command


@pytest.mark.parametrize("name", ["gpt2", "gpt3-175b", "mixtral-8x7b", "tiny"])
@pytest.mark.parametrize("gpus", ["1", "1024"])
def test_tables_fit_a_terminal_of_80_columns(name: str, gpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", name, "--gpus", gpus, "--training_tokens", "300e9", "--optimizer", "muon"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert f"{cost.parameters(PRESETS[name]):,} parameters" in text
    assert ("of them active" in text) == (name == "mixtral-8x7b")
    assert ("exchange" in text) == (gpus != "1")


def test_the_verdict_follows_the_peak(capsys: pytest.CaptureFixture[str]) -> None:
    """A tenth of the memory stays free."""
    found = estimate(PRESETS["gpt2"], Plan())
    shown = []
    for enough_for in (found.checkpointed.peak / 1.01, found.checkpointed.peak * 1.01, found.kept.peak * 1.01):
        plan(Plan(gpu_memory_gb=enough_for / 0.9 / 1e9))
        line = next(line for line in capsys.readouterr().out.splitlines() if "left free" in line)
        shown.append(line.split("free")[1].split())
    assert shown == [["too", "much", "too", "much"], ["too", "much", "fits"], ["fits", "fits"]]


@pytest.mark.parametrize("name", ["gpt2", "mixtral-8x7b"])
def test_adapters_have_a_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", name, "--lora-rank", "8"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    trained = cost.adapter_parameters(PRESETS[name], 8)
    share = f"{trained / (trained + cost.parameters(PRESETS[name])):.2%}"
    assert f"adapters of rank 8: {trained:,} parameters trained, {share} of all\n" in text
    assert "of the adapters" in text and "a million" in text
    assert main(["plan", name]) == 0
    assert "adapters" not in capsys.readouterr().out


def test_json_tells_of_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    plan(Plan("gpt2", json=True, lora_rank=4))
    shown = json.loads(capsys.readouterr().out)
    assert (shown["lora_rank"], shown["adapters"], shown["trained"]) == (4, 589_824, 589_824)
    assert shown["trained_share"] == 589_824 / (124_439_808 + 589_824)
    assert shown["kept"]["optimizer"] == 8 * 589_824


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(Plan("gpt2", json=True, gpus=4, strategy="ddp", context_tokens=512))
    shown = json.loads(capsys.readouterr().out)
    assert (shown["model"], shown["parameters"], shown["active"]) == ("gpt2", 124_439_808, 124_439_808)
    assert shown["context_tokens"] == 512
    assert shown["training_flops"] == cost.training_flops(PRESETS["gpt2"], 512)
    assert shown["kept"] == dataclasses.asdict(found.kept) | {"fits": True}
    assert shown["kv_cache"] == 2 * 2 * 12 * 8 * 512 * 768


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gtp2"], "did you mean 'gpt2'"),
        (["gpt2", "--context_tokens", "1025"], "context is 1024 tokens; got context_tokens 1025"),
        (["gpt2", "--gpus", "0"], "gpus must be at least 1; got 0"),
        (["gpt2", "--batch_size", "0"], "batch_size must be at least 1; got 0"),
        (["gpt2", "--lora-rank", "-1"], "lora_rank must be at least 0; got -1"),
        (["gpt2", "--lora-rank", "8", "--gpus", "2"], "not divided by fsdp; give --strategy ddp"),
        (["gpt2", "--lora-rank", "8", "--optimizer", "muon"], "give --optimizer adamw"),
        (["gpt2", "--mfu", "1.5"], "mfu is a share of the peak, above 0 and at most 1; got 1.5"),
        (["gpt2", "--gpu_memory_gb", "0"], "gpu_memory_gb must be positive; got 0.0"),
        (["gpt2", "--peak_tflops", "nan"], "peak_tflops must be positive; got nan"),
        (["gpt2", "--training_tokens", "inf"], "training_tokens must be positive; got inf"),
        (["gpt2", "--price_per_gpu_hour", "-1"], "price_per_gpu_hour must not be negative; got -1.0"),
    ],
)
def test_bad_input_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------- against real steps


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.endswith(("-medium", "-large", "-xl"))])
def test_every_preset_has_a_small_likeness(name: str) -> None:
    config = PRESETS[name]
    shape = small(config)
    assert cost.parameters(shape) < 40e6
    for slot in ("position", "norm", "mlp", "spans", "qk_norm", "tied_head", "bias", "embedding_norm"):
        assert getattr(shape, slot) == getattr(config, slot)
    assert (shape.kv_heads < shape.n_head) == (config.kv_heads < config.n_head)
    assert bool(shape.moe.experts) == bool(config.moe.experts)


@pytest.mark.skipif(not IS_LINUX, reason="the peak of a process can be reset on Linux only")
@pytest.mark.parametrize(
    ("config", "checkpoint", "micro_batches", "optimizer"),
    [
        (PRESETS["gpt2"], False, 2, "adamw"),
        (MODERN, True, 1, "muon"),
        (PRESETS["mixtral-8x7b"], True, 1, "adamw"),
    ],
    ids=["gpt2", "modern, checkpointing, muon", "mixture, checkpointing"],
)
def test_a_real_step_takes_what_was_predicted(
    config: ModelConfig, checkpoint: bool, micro_batches: int, optimizer: Literal["adamw", "muon"]
) -> None:
    row = memory_row(small(config), "fp32", checkpoint=checkpoint, micro_batches=micro_batches, optimizer=optimizer, device=CPU)
    assert row.measured > 100e6  # large enough for the noise of a process not to count
    assert abs(row.error) < 0.1, row


@pytest.mark.skipif(not IS_LINUX, reason="the peak of a process can be reset on Linux only")
def test_a_real_step_of_adapters_takes_what_was_predicted() -> None:
    row = memory_row(small(MODERN), "fp32", checkpoint=True, micro_batches=1, optimizer="adamw", device=CPU, lora_rank=8)
    assert row.measured > 80e6
    assert abs(row.error) < 0.1, row


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("config", [MODERN, dataclasses.replace(MODERN, moe=MoeConfig(experts=4))], ids=["modern", "mixture"])
def test_operations_of_a_real_step_are_exact(config: ModelConfig, rank: int) -> None:
    shape = dataclasses.replace(small(config), n_layer=2, context_tokens=160)
    assert [row.error for row in flops_rows(shape, lora_rank=rank)] == [0, 0, 0]


def test_the_law_of_attention_is_measured() -> None:
    rows = attention_law(dataclasses.replace(small(MODERN), n_layer=1))
    assert [row.predicted for row in rows] == [row.counted for row in rows]
    assert [b.counted / a.counted for a, b in pairwise(rows)] == [4.0, 4.0, 4.0]
    assert rows[-1].seconds > 4 * rows[0].seconds


def test_the_check_is_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_check, "measure", lambda *_: 200_000_000)  # the test above measures
    monkeypatch.setattr(plan_check, "CONTEXT_TOKENS", 32)
    plan(Plan("tiny", check=True))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert "fp32, 1 micro-batch, checkpointing" in text and "T = 1,024" in text
    plan(Plan("tiny", check=True, json=True))
    shown = json.loads(capsys.readouterr().out)["check"]
    assert all(row["predicted"] == row["counted"] for row in (*shown["flops"], *shown["law"]))
    assert all(row["measured"] == 200_000_000 for row in shown["memory"])


def test_a_process_that_ends_is_told() -> None:
    with pytest.raises(UserError, match=r"the process that measures memory ended: .*no-such-device"):
        plan_check.measure(PRESETS["tiny"], cost.Setup(context_tokens=8), 1, "no-such-device")  # type: ignore[arg-type]
