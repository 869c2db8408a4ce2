"""`glassgpt info`: counts against the literature, the Q | K | V rows against attention itself, memory against PyTorch's."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from saved import saved_bytes
from torch import Tensor

from glassgpt.config import PRESETS, ModelConfig, UserError, preset
from glassgpt.config.files import from_plain
from glassgpt.config.folder import WEIGHTS_FILE
from glassgpt.config.info import Info
from glassgpt.config.model import MoeConfig
from glassgpt.generation.cache import KVCache
from glassgpt.interpret.anatomy import HeadRows, Inference, Training, activation_bytes, anatomy, folded, qkv_rows
from glassgpt.interpret.info import info
from glassgpt.model import GPT, plain, use_attention, weights

TINY = PRESETS["tiny"]
MODERN = preset(
    "tiny", n_head=4, n_kv_head=2, position="rope", norm="rms", mlp="swiglu", qk_norm=True, bias=False, tied_head=False,
    spans=("full", "window"), window_tokens=8,
)  # fmt: skip
SHARED = preset("tiny", n_head=4, n_kv_head=2)
MIXTURE = dataclasses.replace(MODERN, n_layer=4, moe=MoeConfig(experts=3, top_k=2, shared=1))

# ---------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("distilgpt2", 81_912_576),
    ],
)
def test_published_counts(name: str, published: int) -> None:
    assert anatomy(PRESETS[name]).parameters == published


@pytest.mark.parametrize(
    ("name", "billions", "tolerance"),
    # Brown et al. 2020, table 2.1, prints two to four digits, and not with one rule of what counts: 350M is 355.9 M here.
    [
        ("gpt3-125m", 0.125, 0.01),
        ("gpt3-350m", 0.350, 0.02),
        ("gpt3-760m", 0.760, 0.01),
        ("gpt3-1.3b", 1.3, 0.02),
        ("gpt3-2.7b", 2.7, 0.02),
        ("gpt3-6.7b", 6.7, 0.01),
        ("gpt3-13b", 13.0, 0.02),
        ("gpt3-175b", 175.0, 0.01),
    ],
)
def test_gpt3_counts_are_the_papers(name: str, billions: float, tolerance: float) -> None:
    assert anatomy(PRESETS[name]).parameters / 1e9 == pytest.approx(billions, rel=tolerance)


def test_the_reason_accounts_for_the_tied_head() -> None:
    tied = anatomy(PRESETS["gpt2"])
    assert (tied.parameters, tied.parameters_untied) == (124_439_808, 163_037_184)
    assert tied.reason == "50,257 x 768 = 38,597,376: the head is the token embedding matrix, used twice"
    assert tied.parameters_untied - tied.parameters == 38_597_376
    head = tied.tensors[-1]
    assert (head.name, head.tied_to, head.count, head.share) == ("head.weight", "token_embedding.weight", 0, 0)

    own = anatomy(preset("gpt2", tied_head=False))
    assert own.parameters == own.parameters_untied == 163_037_184
    assert own.reason == "50,257 x 768 = 38,597,376: the head is a matrix of its own"
    assert (own.tensors[-1].tied_to, own.tensors[-1].count) == (None, 38_597_376)


@pytest.mark.parametrize("config", [TINY, PRESETS["gpt2"], preset("tiny", tied_head=False, mlp_width=7)])
def test_groups_add_up_to_the_model(config: ModelConfig) -> None:
    facts = anatomy(config)
    assert sum(tensor.count for tensor in facts.tensors) == facts.parameters
    assert sum(group.count for group in facts.groups) == facts.parameters
    assert sum(group.share for group in facts.groups) == pytest.approx(1)
    blocks = [group for group in facts.groups if group.parts]
    assert [block.name for block in blocks] == [f"blocks.{layer}" for layer in range(config.n_layer)]
    for block in blocks:
        assert {part.name for part in block.parts} == {"attn", "mlp", "norms"}
        assert sum(part.count for part in block.parts) == block.count
    assert [g.name for g in facts.groups if not g.parts] == ["token_embedding", "position_embedding", "norm_f", "head"]


@pytest.mark.parametrize("config", [TINY, MODERN, MIXTURE], ids=["gpt2", "modern", "mixture"])
def test_tensors_are_the_models(config: ModelConfig) -> None:
    state = GPT(config).state_dict()
    assert {tensor.name: tensor.shape for tensor in anatomy(config).tensors} == {k: tuple(v.shape) for k, v in state.items()}


def test_a_mixture_is_told_apart() -> None:
    facts = anatomy(MIXTURE)
    expert = 3 * MIXTURE.width * MIXTURE.expert_width
    assert facts.parameters - facts.parameters_active == MIXTURE.n_layer * (3 - 2) * expert
    assert anatomy(MODERN).parameters_active == anatomy(MODERN).parameters
    block = next(group for group in facts.groups if group.parts)
    parts = {part.name: part for part in block.parts}
    assert parts.keys() == {"norms", "attn", "mlp"}
    assert parts["mlp"].count == 4 * expert + 3 * MIXTURE.width
    assert [tensor.name.split(".", 3)[3] for tensor in parts["attn"].tensors] == [
        *("qkv.weight", "q_norm.weight", "k_norm.weight", "out.weight"),
    ]
    assert [group.name for group in facts.groups if not group.parts] == ["token_embedding", "norm_f", "head"]


def test_equal_blocks_fold_and_nothing_else_does() -> None:
    config = preset("tiny", n_layer=4, context_tokens=TINY.vocab_size)  # both embeddings have one shape
    names = [[group.name for group in alike] for alike in folded(anatomy(config).groups)]
    blocks = [f"blocks.{layer}" for layer in range(4)]
    assert names == [["token_embedding"], ["position_embedding"], blocks, ["norm_f"], ["head"]]

    dtypes = {tensor.name: "bfloat16" if "blocks.1." in tensor.name else "float32" for tensor in anatomy(config).tensors}
    names = [[group.name for group in alike] for alike in folded(anatomy(config, dtypes).groups)]
    assert names[2:-2] == [["blocks.0"], ["blocks.1"], ["blocks.2", "blocks.3"]]


def test_a_type_that_files_do_not_tell_is_unknown() -> None:
    assert anatomy(TINY, {}).stored_bytes is None
    assert anatomy(TINY).stored_bytes == 4 * anatomy(TINY).parameters


# ---------------------------------------------------------------------- Q | K | V


def projections(model: GPT, ids: Tensor) -> dict[str, Tensor]:
    """What the first layer's attention is given: q, k, v (B, H, T, W)."""
    given: list[dict[str, Tensor]] = []

    def recording(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, *rest: Any) -> Tensor:
        given.append({"q": q, "k": k, "v": v})
        return plain(q, k, v, seen, *rest)

    use_attention(model, recording)
    with torch.no_grad():
        model(ids)
    return given[0]


@pytest.mark.parametrize("tensor", ["weight", "bias"])
@pytest.mark.parametrize(
    ("config", "of_head"),
    [(config, of_head) for config in (TINY, SHARED) for of_head in qkv_rows(config)],
    ids=lambda x: f"{x.part}{x.head}" if isinstance(x, HeadRows) else f"{x.kv_heads} of {x.n_head}",
)
def test_rows_make_one_heads_projection_and_no_other(config: ModelConfig, of_head: HeadRows, tensor: str) -> None:
    torch.manual_seed(0)
    model = GPT(config)
    ids = torch.randint(config.vocab_size, (2, 5))
    before = projections(model, ids)
    with torch.no_grad():
        getattr(model.blocks[0].attn.qkv, tensor)[of_head.rows.start : of_head.rows.stop] += 1
    after = projections(model, ids)
    changed = {
        (part, head)
        for part in ("q", "k", "v")
        for head in range(before[part].size(1))
        if not torch.equal(before[part][:, head], after[part][:, head])
    }
    assert changed == {(of_head.part, of_head.head)}
    # Every feature of the head moved: the range is not too short.
    moved = (before[of_head.part] != after[of_head.part])[:, of_head.head].any(dim=0).any(dim=0)
    assert moved.all()


@pytest.mark.parametrize("name", ["tiny", "gpt2", "gpt3-175b"])
def test_rows_cover_the_matrix_once(name: str) -> None:
    config = PRESETS[name]
    rows = [row for of_head in qkv_rows(config) for row in of_head.rows]
    assert rows == list(range(3 * config.width))


def test_shared_keys_have_rows_once() -> None:
    assert [of_head.part for of_head in qkv_rows(SHARED)] == [*"qqqqkkvv"]
    rows = [row for of_head in qkv_rows(SHARED) for row in of_head.rows]
    assert rows == list(range(GPT(SHARED).blocks[0].attn.qkv.weight.size(0)))


def test_in_a_hugging_face_file_the_rows_are_columns(tmp_path: Path) -> None:
    model = GPT(TINY)
    weights.save_hf(model, tmp_path, None)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    theirs = next(tensor for name, tensor in tensors.items() if name.endswith("h.0.attn.c_attn.weight"))
    ours = model.blocks[0].attn.qkv.weight
    for of_head in qkv_rows(TINY):
        assert torch.equal(theirs[:, list(of_head.rows)], ours[list(of_head.rows)].T)


# ---------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "changes",
    # Each makes another term of the formula the large one.
    [{}, {"vocab_size": 2000}, {"mlp_width": 9}, {"mlp_width": 600}, {"n_head": 16}, {"n_layer": 6}, {"width": 128}],
    ids=str,
)
@pytest.mark.parametrize(("B", "T"), [(2, 64), (3, 40), (1, 1)])
def test_activations_are_what_autograd_keeps(changes: dict[str, int], B: int, T: int) -> None:
    base = {"vocab_size": 64, "context_tokens": 64, "n_layer": 2, "n_head": 2, "width": 32}
    config = ModelConfig(**{**base, **changes})
    assert activation_bytes(config, B, T) == saved_bytes(config, B, T)  # test_cost.py does so for every slot


@pytest.mark.parametrize("config", [TINY, MODERN, MIXTURE], ids=["gpt2", "modern", "mixture"])
def test_cache_and_logits_are_those_of_generation(config: ModelConfig) -> None:
    B, T = 3, TINY.context_tokens
    for estimate in anatomy(config, batch_size=B).memory.inference:
        model = GPT(config).to(getattr(torch, estimate.dtype))
        cache = KVCache(config)
        with torch.no_grad():
            logits = model.head(model.hidden(torch.zeros(B, T, dtype=torch.long), cache)[:, -1])
        assert estimate.kv_cache == cache.nbytes
        assert estimate.logits == logits.nbytes
        assert estimate.weights == sum(parameter.nbytes for parameter in model.parameters())
        assert estimate.total == estimate.weights + estimate.kv_cache + estimate.logits


def test_training_state_is_adamws() -> None:
    training = anatomy(TINY).memory.training
    model = GPT(TINY)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    optimizer.step()
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert training.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert training.gradients == sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
    assert training.optimizer == sum(moment.nbytes for moment in moments)
    assert training.total == 16 * anatomy(TINY).parameters + training.activations


def test_memory_of_a_text_longer_than_the_context_is_refused() -> None:
    assert anatomy(TINY, context_tokens=32).memory.context_tokens == 32
    with pytest.raises(UserError, match="context is 32 tokens; got context_tokens 33"):
        anatomy(TINY, context_tokens=33)


# ---------------------------------------------------------------------- the command


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    facts = info(Info("gpt2", json=True, batch_size=2, context_tokens=100))
    shown = json.loads(capsys.readouterr().out)
    assert shown["model"] == "gpt2"
    assert shown["stored"] is False
    assert (shown["parameters"], shown["parameters_untied"]) == (124_439_808, 163_037_184)
    assert shown["reason"] == facts.reason
    assert from_plain(ModelConfig, shown["config"]) == PRESETS["gpt2"]
    assert [set(tensor) for tensor in shown["tensors"]] == [{"name", "shape", "dtype", "count", "share", "tied_to"}] * 149
    assert sum(tensor["count"] for tensor in shown["tensors"]) == sum(group["count"] for group in shown["groups"])
    assert all(tensor["count"] in (0, math.prod(tensor["shape"])) for tensor in shown["tensors"])
    assert shown["qkv"][13] == {"part": "k", "head": 1, "first_row": 832, "last_row": 895}
    assert (shown["memory"]["batch_size"], shown["memory"]["context_tokens"]) == (2, 100)
    assert shown["memory"]["inference"]["float32"] == bytes_of(facts.memory.inference[0])
    assert shown["memory"]["training"] == bytes_of(facts.memory.training)


def bytes_of(estimate: Inference | Training) -> dict[str, int]:
    values = dataclasses.asdict(estimate) | {"total": estimate.total}
    return {name: value for name, value in values.items() if name != "dtype"}


@pytest.mark.parametrize("name", ["gpt2", "gpt3-175b", "tiny"])
@pytest.mark.parametrize("every", [False, True])
def test_tables_fit_a_terminal_of_80_columns(name: str, every: bool, capsys: pytest.CaptureFixture[str]) -> None:
    facts = info(Info(name, all=every))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    tables = text[: text.index("parameters, each counted once")]
    assert "…" not in tables.replace(" … blocks.", " .. blocks.")  # nothing was cut off
    assert f"{facts.parameters:,}" in text
    assert f"{facts.parameters_untied:,}" in text
    assert facts.reason in " ".join(text.split())
    assert "head.weight = token_embedding.weight (tied)" in text
    assert ("blocks.1.attn.qkv.weight" in text) == every


@pytest.mark.parametrize("name", ["modern", "llama-3.1-8b", "mistral-7b", "mixtral-8x7b"])
def test_modern_tables_fit_too(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    facts = info(Info(name))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    lines = [line.split() for line in text.splitlines()]
    assert not any(word.endswith("…") and len(word) > 1 for line in lines for word in line)  # nothing was cut off
    G, W, H = facts.config.kv_heads, facts.config.head_width, facts.config.n_head
    rows = (H - 1) * W, H * W + (G - 1) * W, (H + G) * W + (G - 1) * W  # the last head's
    last = [str(H - 1), *(word for first in rows for word in (f"{first:,}", "…", f"{first + W - 1:,}"))]
    assert last in lines
    active = "active: what one token meets".split()
    assert ([*active, f"{facts.parameters_active:,}"] in lines) == bool(facts.config.moe.experts)


def test_experts_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    info(Info("mixtral-8x7b"))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert "experts.*.up.weight 8 x 14,336 x 4,096 469,762,048 15,032,385,536 32.2%".split() in lines
    info(Info("mixtral-8x7b", json=True))
    shown = json.loads(capsys.readouterr().out)
    assert (shown["parameters"], shown["parameters_active"]) == (46_702_792_704, 12_879_925_248)


def test_folded_blocks_show_their_inside_once(capsys: pytest.CaptureFixture[str]) -> None:
    info(Info("gpt2"))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert "blocks.0 … blocks.11 12 equal blocks 7,087,872 85,054,464 68.3%".split() in lines
    assert "qkv.weight 2,304 x 768 1,769,472 21,233,664 17.1%".split() in lines
    assert "11 704 … 767 1,472 … 1,535 2,240 … 2,303".split() in lines
    assert sum(line[:1] == ["qkv.weight"] for line in lines) == 1


def test_a_preset_that_texts_misname_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    info(Info("gpt2-large"))
    text = capsys.readouterr().out
    assert 'often called "1.5 B"' in text
    assert "774,030,080" in text


def test_a_stored_model_is_described_by_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights.save(GPT(preset("tiny", n_layer=3, tied_head=False)), tmp_path, torch.float16)
    facts = info(Info(str(tmp_path)))
    text = capsys.readouterr().out
    stored = safetensors.torch.load_file(tmp_path / WEIGHTS_FILE)
    assert facts.config.n_layer == 3
    assert {tensor.dtype for tensor in facts.tensors} == {"float16"}
    assert facts.stored_bytes == sum(tensor.nbytes for tensor in stored.values())
    assert "Weights stored as float16" in text
    assert "(tied)" not in text


def test_a_folder_named_like_a_preset_wins_if_it_holds_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert info(Info("tiny", json=True)).config == TINY
    weights.save(GPT(preset("tiny", n_layer=5)), tmp_path / "tiny")
    assert info(Info("tiny", json=True)).config.n_layer == 5


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'gpt2'"):
        info(Info("gtp2"))
    with pytest.raises(UserError, match="no model in this folder") as caught:
        info(Info(str(tmp_path)))
    assert "presets" not in str(caught.value)
    with pytest.raises(UserError, match="batch_size must be at least 1; got 0"):
        Info("gpt2", batch_size=0)
    with pytest.raises(UserError, match="context_tokens must be at least 1; got -3"):
        dataclasses.replace(Info("gpt2"), context_tokens=-3)
