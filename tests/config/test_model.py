"""Shapes that contradict themselves are refused in one line with the two numbers and what to do."""

from __future__ import annotations

import math
from typing import Any

import pytest

from glassgpt.cli import main
from glassgpt.config import ModelConfig, UserError
from glassgpt.config.model import MoeConfig, RopeConfig

NAN, INFINITE = math.nan, math.inf
REFUSED: list[tuple[type, dict[str, Any], list[str]]] = [
    (ModelConfig, {"width": 768, "n_head": 11}, ["width 768", "n_head 11", "leaves 9", "use width 759 or another n_head"]),
    (ModelConfig, {"width": 3, "n_head": 4}, ["width 3", "n_head 4", "use width 4"]),
    (ModelConfig, {"attention_width": 100, "n_head": 12}, ["attention_width 100", "n_head 12", "use attention_width 96"]),
    (ModelConfig, {"n_head": 12, "width": 48, "n_kv_head": 5}, ["n_head 12", "n_kv_head 5", "leaves 2", "use 1, 2, 3, 4, 6, 12"]),
    (ModelConfig, {"n_head": 12, "width": 48, "n_kv_head": 24}, ["n_head 12", "n_kv_head 24", "use 1, 2, 3, 4, 6, 12"]),
    (ModelConfig, {"n_kv_head": 0}, ["n_kv_head must be at least 1; got 0"]),
    (ModelConfig, {"attention_width": 0}, ["attention_width must be at least 1; got 0"]),
    (ModelConfig, {"position": "rope", "n_head": 4, "width": 12}, ["must be even", "width 12", "n_head 4", "= 3", "change one"]),
    (ModelConfig, {"position": "rope", "n_head": 4, "attention_width": 20}, ["must be even", "width 20", "n_head 4", "= 5"]),
    (ModelConfig, {"position": "sinusoidal", "n_head": 3, "width": 9}, ["width must be even; got 9"]),
    (ModelConfig, {"spans": ("full", "window")}, ["spans full window needs window_tokens"]),
    (ModelConfig, {"spans": ("strided",)}, ["spans strided needs window_tokens"]),
    (ModelConfig, {"spans": ()}, ["spans is empty; give full, window or strided"]),
    (ModelConfig, {"spans": ("window",), "window_tokens": 0}, ["window_tokens must be at least 1; got 0"]),
    (ModelConfig, {"dropout": 1.0}, ["dropout must be in [0, 1); got 1.0"]),
    (ModelConfig, {"norm_eps": 0.0}, ["norm_eps must be positive; got 0.0"]),
    (ModelConfig, {"attention_scale": 0.0}, ["attention_scale must be positive; got 0.0"]),
    (ModelConfig, {"logit_cap": -1.0}, ["logit_cap must be positive; got -1.0"]),
    (ModelConfig, {"logit_cap": NAN}, ["logit_cap must be positive; got nan"]),
    (MoeConfig, {"experts": 4, "top_k": 5}, ["moe.top_k 5", "moe.experts 4", "lower top_k or add experts"]),
    (MoeConfig, {"experts": 4, "top_k": 0}, ["moe.top_k must be at least 1; got 0"]),
    (MoeConfig, {"experts": -1}, ["moe.experts must be at least 0; got -1"]),
    (MoeConfig, {"shared": 2}, ["moe.shared is 2", "moe.experts 0", "give experts too"]),
    (MoeConfig, {"experts": 4, "expert_width": 0}, ["moe.expert_width must be at least 1; got 0"]),
    (MoeConfig, {"experts": 4, "balance_loss": -0.1}, ["moe.balance_loss must be at least 0; got -0.1"]),
    (MoeConfig, {"experts": 4, "z_loss": NAN}, ["moe.z_loss must be at least 0; got nan"]),
    (RopeConfig, {"theta": 0.0}, ["rope.theta must be positive; got 0.0"]),
    (RopeConfig, {"theta": INFINITE}, ["rope.theta must be positive; got inf"]),
    (RopeConfig, {"theta": 1.0}, ["rope.theta must be above 1", "got 1.0"]),
    (RopeConfig, {"scaling": "linear", "factor": 0.5}, ["rope.factor must be at least 1; got 0.5"]),
    (RopeConfig, {"factor": 4.0}, ["rope.factor is 4.0", "rope.scaling none", "choose linear, ntk, yarn or smooth"]),
    (RopeConfig, {"scaling": "yarn", "factor": 4.0}, ["rope.scaling yarn needs rope.original_tokens"]),
    (RopeConfig, {"scaling": "smooth", "factor": 4.0}, ["rope.scaling smooth needs rope.original_tokens"]),
    (RopeConfig, {"scaling": "yarn", "factor": 4.0, "original_tokens": 0}, ["rope.original_tokens must be at least 1; got 0"]),
    (RopeConfig, {"fast_turns": 1.0}, ["rope.fast_turns 1.0 must be above rope.slow_turns 1.0"]),
    (RopeConfig, {"fast_turns": NAN}, ["rope.fast_turns must be positive; got nan"]),
    (RopeConfig, {"slow_turns": -1.0}, ["rope.slow_turns must be positive; got -1.0"]),
]
WITHIN = {ModelConfig: "", MoeConfig: "moe.", RopeConfig: "rope."}
COUNTS = ("vocab_size", "context_tokens", "n_layer", "n_head", "width", "mlp_width")


@pytest.mark.parametrize(("kind", "changes", "said"), REFUSED, ids=lambda x: "" if not isinstance(x, dict) else str(x))
def test_a_contradiction_is_refused(kind: type, changes: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        kind(**changes)
    message = str(caught.value)
    assert "\n" not in message
    assert [words for words in said if words not in message] == [], message


@pytest.mark.parametrize("name", COUNTS)
def test_counts_start_at_1(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} must be at least 1; got 0"):
        ModelConfig(**{name: 0})


def flags(kind: type, changes: dict[str, Any]) -> list[str]:
    """What one would type for these changes."""
    typed: list[str] = []
    for name, value in changes.items():
        values = list(map(str, value)) if isinstance(value, tuple) else [str(value)]
        typed += [f"--model.{WITHIN[kind]}{name}", *values]
    return typed


@pytest.mark.parametrize(("kind", "changes", "said"), [case for case in REFUSED if case[1].get("spans") != ()])
def test_the_command_says_it_in_one_line(
    kind: type, changes: dict[str, Any], said: list[str], tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["pretrain", "--out_dir", str(out), "--data.sources", "none.txt", *flags(kind, changes)]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "Traceback" not in printed.err
    assert [words for words in said if words not in printed.err] == [], printed.err
    assert not printed.out and not out.exists()


def test_a_preset_and_a_change_that_contradict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--model", "tiny", "--model.n_kv_head", "3"]) == 2
    assert "n_head 2 / n_kv_head 3 leaves 2 (use 1, 2)" in capsys.readouterr().err


# ---------------------------------------------------------------------- what is left out is filled in


def test_widths_that_follow_from_others() -> None:
    config = ModelConfig(n_head=12, width=768)
    assert (config.head_width, config.kv_heads, config.hidden_width, config.has_qkv_bias) == (64, 12, 3072, True)
    grouped = ModelConfig(n_head=12, width=768, n_kv_head=4, attention_width=1536, bias=False, mlp="swiglu")
    assert (grouped.head_width, grouped.kv_heads, grouped.hidden_width, grouped.has_qkv_bias) == (128, 4, 2048, False)
    assert ModelConfig(bias=False, qkv_bias=True).has_qkv_bias and not ModelConfig(qkv_bias=False).has_qkv_bias
    assert ModelConfig(mlp="swiglu", mlp_width=100).hidden_width == ModelConfig(mlp_width=100).hidden_width == 100


def test_active_experts_are_together_as_wide_as_the_dense_mlp() -> None:
    assert ModelConfig(width=768, moe=MoeConfig(8, 2)).expert_width == 3072 // 2
    assert ModelConfig(width=768, moe=MoeConfig(8, 2, shared=1)).expert_width == 3072 // 3
    assert ModelConfig(width=768, moe=MoeConfig(8, 2, expert_width=10)).expert_width == 10
    assert ModelConfig(n_head=1, width=1, moe=MoeConfig(8, 8)).expert_width == 1  # never none at all


def test_the_pattern_of_spans_repeats() -> None:
    config = ModelConfig(n_layer=5, spans=("full", "window", "strided"), window_tokens=4)
    assert [config.span(layer) for layer in range(5)] == ["full", "window", "strided", "full", "window"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"norm": "rmsnorm"}, r"norm must be one of layer, rms; got 'rmsnorm' \(did you mean 'rms'\?\)"),
        ({"mlp": "swiglue"}, r"mlp must be one of gelu, swiglu, relu2; got 'swiglue' \(did you mean 'swiglu'\?\)"),
        ({"position": "rop"}, r"position must be one of learned, .* \(did you mean 'rope'\?\)"),
        ({"spans": ("local",), "window_tokens": 4}, r"spans must be one of full, window, strided; got 'local'"),
        ({"window_tokens": 4}, "window_tokens is 4 and spans is full"),
    ],
)
def test_a_slot_that_is_not_there_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ModelConfig(**changes)


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(UserError, match=r"rope.scaling must be one of .*; got 'yarm'"):
        RopeConfig(scaling="yarm")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"rope.attention_factor 2.0 must be positive, and is for rope.scaling yarn alone"):
        RopeConfig(attention_factor=2.0)
    with pytest.raises(UserError, match=r"rope.attention_factor 0.0 must be positive"):
        RopeConfig(scaling="yarn", original_tokens=10, attention_factor=0.0)
    with pytest.raises(UserError, match=r"moe.expert_width is 10 and moe.experts 0"):
        MoeConfig(expert_width=10)
