"""Capture and edit: what is seen is what flows, on every slot; nothing stays behind; what hooks cannot see is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import EXACT, error, noisy, shape, tokens
from torch import Tensor, nn

from glassgpt.config import ModelConfig, UserError
from glassgpt.config.model import MoeConfig
from glassgpt.config.tuning import LoraConfig
from glassgpt.generation.cache import KVCache
from glassgpt.interpret import capture, edit
from glassgpt.interpret.hooks import SHAPES, Edit, names
from glassgpt.model import GPT, lora, use_attention
from glassgpt.model.attention import Attention, fused

T = 12
SLOTS: dict[str, ModelConfig] = {
    "default": shape(),
    "modern": shape(position="rope", norm="rms", mlp="swiglu", bias=False, n_kv_head=2, qk_norm=True, tied_head=False),
    "alibi": shape(position="alibi", embedding_norm=True, mlp="relu2", logit_cap=5.0),
    "window": shape(position="relative", spans=("full", "window", "strided"), window_tokens=4),
    "experts": shape(mlp="swiglu", moe=MoeConfig(experts=4, top_k=2, shared=1)),
}
EVERY_SLOT = pytest.mark.parametrize("config", SLOTS.values(), ids=SLOTS)


def seen_of(model: GPT, ids: Tensor, wanted: Any = "**", **arguments: Any) -> dict[str, Tensor]:
    with capture(model, wanted) as seen, torch.no_grad():
        model(ids, **arguments)
    return seen


def numberless(name: str) -> str:
    """blocks.3.norm_1 -> blocks.*.norm_1."""
    return re.sub(r"(?<=\.)\d+", "*", name)


# ---------------------------------------------------------------------- what is seen


@EVERY_SLOT
def test_watching_changes_nothing_and_leaves_nothing(config: ModelConfig) -> None:
    model, ids = noisy(config), tokens(config, length=T)
    before = model(ids)
    attends = [module.attend for module in model.modules() if isinstance(module, Attention)]
    with capture(model, "**"):
        assert error(model(ids), before) < EXACT
    assert torch.equal(model(ids), before)
    assert [module.attend for module in model.modules() if isinstance(module, Attention)] == attends
    assert not any(module._forward_hooks for module in model.modules())


@EVERY_SLOT
def test_every_name_has_its_shape(config: ModelConfig) -> None:
    """The table of names, and so the page made from it, says what is there."""
    model, ids = noisy(config), tokens(config, length=T)
    seen = seen_of(model, ids)
    assert list(seen) and set(seen) == set(names(model))
    moe = config.moe.experts
    sizes = {"B": 3, "T": T, "S": T, "D": config.width, "H": config.n_head, "G": config.kv_heads, "W": config.head_width}
    sizes |= {"F": config.expert_width if moe else config.hidden_width, "E": moe, "V": config.vocab_size}
    for name, x in seen.items():
        wanted = SHAPES[numberless(name)][0].split(", ")
        assert len(wanted) == x.dim(), name
        for size, letters in zip(x.shape, wanted, strict=True):
            assert letters == "n" or size == eval(letters, sizes), name


def test_every_row_of_the_table_is_met() -> None:
    found = {numberless(name) for config in SLOTS.values() for name in names(noisy(config))}
    relu_experts = noisy(shape(moe=MoeConfig(experts=2)))
    assert found | {numberless(name) for name in names(relu_experts)} == set(SHAPES)


def test_the_page_has_the_table(root: Path) -> None:
    rows = re.findall(
        r"^\| `([^`]+)` \| \(([^)]*(?:\([^)]*\)[^)]*)?)\) \| (.+) \|$",
        (root / "docs/activations.md").read_text(encoding="utf-8"),
        re.M,
    )
    assert {name: (size, what) for name, size, what in rows} == SHAPES


def test_the_page_s_example_runs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (root / "docs/activations.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out == "torch.Size([1, 5, 4, 4])\n"


@EVERY_SLOT
def test_the_parts_make_the_whole(config: ModelConfig) -> None:
    """Residual stream = embedding + what every attention and every MLP adds; scores, mask and softmax make the pattern."""
    model, ids = noisy(config), tokens(config, length=T)
    seen = seen_of(model, ids)
    x = seen["embed"]
    for i in range(config.n_layer):
        x = x + seen[f"blocks.{i}.attn"]
        assert error(x, seen[f"blocks.{i}.resid_mid"]) < EXACT
        x = x + seen[f"blocks.{i}.mlp"]
        assert error(x, seen[f"blocks.{i}"]) < EXACT
        q, k, v, pattern = (seen[f"blocks.{i}.attn.{name}"] for name in ("q", "k", "v", "pattern"))
        k, v = (y.repeat_interleave(config.n_head // config.kv_heads, dim=1) for y in (k, v))
        assert error(q @ k.mT / config.head_width**0.5, seen[f"blocks.{i}.attn.scores"]) < EXACT
        assert error(seen[f"blocks.{i}.attn.masked"].softmax(-1), pattern) < EXACT
        assert error(pattern.sum(-1), torch.ones(3, config.n_head, T).double()) < EXACT
        assert pattern.triu(1).abs().max() == 0
        assert error(pattern @ v, seen[f"blocks.{i}.attn.z"]) < EXACT
    assert error(model.norm_f(x), seen["norm_f"]) < EXACT


@EVERY_SLOT
def test_with_a_cache_the_steps_are_the_rows_of_the_whole(config: ModelConfig) -> None:
    model, ids = noisy(config), tokens(config, length=T)
    whole, cache, steps = seen_of(model, ids), KVCache(config), []
    for start, end in ((0, 5), (5, 6), (6, T)):
        steps.append(seen_of(model, ids[:, start:end], cache=cache))
    for name in ("embed", "blocks.1", "blocks.2.attn", "blocks.2.mlp", "norm_f", "head"):
        assert error(torch.cat([step[name] for step in steps], dim=1), whole[name]) < EXACT, name
    for name in ("blocks.1.attn.q", "blocks.1.attn.k", "blocks.1.attn.v", "blocks.1.attn.z"):
        assert error(torch.cat([step[name] for step in steps], dim=2), whole[name]) < EXACT, name
    last = steps[-1]["blocks.0.attn.pattern"]  # of the new positions, over all that the layer holds
    assert error(last, whole["blocks.0.attn.pattern"][:, :, 6:]) < EXACT


@EVERY_SLOT
def test_batch_mates_and_padding_change_nothing(config: ModelConfig) -> None:
    model, ids = noisy(config), tokens(config, length=T)
    whole = seen_of(model, ids)
    for name, x in seen_of(model, ids[1:2]).items():
        if "mlp." not in name:  # an expert's rows are those of the whole batch
            assert error(x.nan_to_num(neginf=-1e3), whole[name][1:2].nan_to_num(neginf=-1e3)) < EXACT, name
    padded = torch.cat((torch.zeros(3, 4, dtype=torch.long), ids), dim=1)
    shifted = seen_of(model, padded, pad=torch.tensor([4, 4, 4]))
    assert error(shifted["blocks.2"][:, 4:], whole["blocks.2"]) < EXACT
    assert error(shifted["blocks.2.attn.pattern"][:, :, 4:, 4:], whole["blocks.2.attn.pattern"]) < EXACT


def test_gradients_are_those_of_autograd() -> None:
    model, ids = noisy(shape()), tokens(shape(), length=T)
    with capture(model, ["embed", "blocks.*.attn.pattern", "blocks.1"]) as seen:
        model(ids)[:, -1, 3].sum().backward()
    x = seen["blocks.1"].detach().requires_grad_()
    _, where = model.enter(ids)
    logits = model.logits(model.norm_f(model.blocks[2](x, where)))
    logits[:, -1, 3].sum().backward()
    assert seen["blocks.1"].grad is not None and x.grad is not None
    assert error(seen["blocks.1"].grad, x.grad) < EXACT
    assert all(x.grad is not None and x.grad.abs().max() > 1e-6 for x in seen.values())


def test_adapters_are_seen_through() -> None:
    model, ids = noisy(shape()), tokens(shape(), length=T)
    plain_names = names(model)
    lora.add(model, LoraConfig(rank=2), seed=0)
    assert names(model) == plain_names
    assert set(seen_of(model, ids)) == set(plain_names)


# ---------------------------------------------------------------------- what is wanted


def test_wildcards() -> None:
    model, ids = noisy(shape()), tokens(shape(), length=T)
    assert set(seen_of(model, ids, "blocks.*")) == {"blocks.0", "blocks.1", "blocks.2"}
    assert set(seen_of(model, ids, ["blocks.1.**.pattern", "embed"])) == {"blocks.1.attn.pattern", "embed"}
    wanted = {"blocks.2.attn.q", "blocks.2.attn.q_norm", "blocks.2.attn.k_norm"}
    assert set(seen_of(model, ids, ("blocks.2.attn.q", "blocks.2.attn.*_norm"))) == wanted
    assert len(seen_of(model, ids)) == len(names(model))


@pytest.mark.parametrize("name", ["blocks.1.attn.patern", "blocks.7", "", "blocks.0.mlp.router"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"no activation {name!r} in this model")), capture(noisy(shape()), [name]):
        pass


def test_a_near_name_is_told() -> None:
    with (
        pytest.raises(UserError, match=r"did you mean 'blocks.1.attn.pattern'"),
        edit(noisy(shape()), {"blocks.1.attn.patern": abs}),
    ):
        pass


# ---------------------------------------------------------------------- edits


def head_off(z: Tensor) -> Tensor:
    """Without head 2."""
    z = z.clone()
    z[:, 2] = 0
    return z


@EVERY_SLOT
def test_an_edit_of_a_head_takes_its_part_away(config: ModelConfig) -> None:
    model, ids = noisy(config), tokens(config, length=T)
    before = seen_of(model, ids)
    with edit(model, {"blocks.1.attn.z": head_off}):
        after = seen_of(model, ids)
    columns = slice(2 * config.head_width, 3 * config.head_width)
    part = before["blocks.1.attn.z"][:, 2] @ model.blocks[1].attn.out.weight[:, columns].T
    assert error(before["blocks.1.attn"] - after["blocks.1.attn"], part) < EXACT
    assert torch.equal(before["blocks.0"], after["blocks.0"])
    sliced = before["blocks.1.attn"][..., columns]  # the usual mistake: a slice of the output is not a head
    assert (
        part.norm() > 2 * sliced.norm() or part.norm() < sliced.norm() / 1.01 or (part[..., columns] - sliced).abs().max() > 0.1
    )


def test_every_activation_can_be_edited() -> None:
    """What comes after an edit follows from it."""
    for config in SLOTS.values():
        model, ids = noisy(config), tokens(config, length=T)
        before = model(ids)
        for name in names(model):
            flat: Edit = lambda x: 0.5 * x if x.isinf().any() else 0.5 * x + 0.25 * x.flip(-1)  # noqa: E731
            with edit(model, {name: flat}):
                changed = (model(ids) - before).abs().max()
            assert changed > 1e-6, name
        assert torch.equal(model(ids), before)


def test_edits_run_in_the_order_in_which_they_were_opened() -> None:
    model, ids = noisy(shape()), tokens(shape(), length=T)
    whole = seen_of(model, ids)["blocks.0"]
    with (
        edit(model, {"blocks.0": lambda x: x + 1}),
        edit(model, {"blocks.0": lambda x: 2 * x}),
        capture(model, "blocks.0") as seen,
    ):
        model(ids)
    assert error(seen["blocks.0"].detach(), 2 * (whole + 1)) < EXACT
    with capture(model, "blocks.0") as seen, edit(model, {"blocks.0": lambda x: x + 1}):
        model(ids)
    assert error(seen["blocks.0"].detach(), whole) < EXACT


@pytest.mark.parametrize("wrong", [lambda x: None, lambda x: x[:, :1], lambda x: x.float(), lambda x: x.sum()])
def test_an_edit_that_gives_another_shape_is_refused(wrong: Any) -> None:
    model, ids = noisy(shape()), tokens(shape(), length=T)
    before = model(ids)
    with pytest.raises(UserError, match=r"the edit of blocks\.1 must return a tensor"), edit(model, {"blocks.1": wrong}):
        model(ids)
    assert torch.equal(model(ids), before)


def test_nothing_stays_after_an_exception() -> None:
    model, ids = noisy(shape()), tokens(shape(), length=T)
    before = model(ids)

    def broken(x: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), capture(model, "**"), edit(model, {"blocks.1.attn.pattern": broken}):
        model(ids)
    with pytest.raises(UserError), edit(model, {"blocks.0": head_off, "nothing": head_off}):
        pass
    assert torch.equal(model(ids), before)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(module.attend is fused for module in model.modules() if isinstance(module, Attention))


def test_the_way_attention_was_computed_comes_back() -> None:
    """Only layers whose pattern is watched are written out, and only so long."""
    model, ids = noisy(shape()), tokens(shape(), length=T)
    calls: list[int] = []

    def counting(*arguments: Any) -> Tensor:
        calls.append(1)
        return fused(*arguments)

    use_attention(model, counting)
    with capture(model, ["blocks.1.attn.pattern", "blocks.1.attn.scores", "blocks.2.attn.z"]):
        model(ids)
    assert len(calls) == 2
    model(ids)
    assert len(calls) == 5


# ---------------------------------------------------------------------- models that hooks cannot see into


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model


def test_compiled_and_wrapped_models_are_refused() -> None:
    inside_out = noisy(shape())
    inside_out.blocks[1] = torch.compile(inside_out.blocks[1])
    in_place = noisy(shape())
    in_place.blocks[2].mlp.compile()
    whole = noisy(shape())
    whole.compile()
    for model, what in (
        (torch.compile(noisy(shape())), "a OptimizedModule"),
        (Wrapper(noisy(shape())), "a Wrapper"),
        (inside_out, "blocks.1"),
        (in_place, "blocks.2.mlp"),
        (whole, "the model itself"),
    ):
        with (
            pytest.raises(UserError, match=rf"needs the plain GPT; got .*{what}.*before torch.compile, DDP or FSDP"),
            capture(model, "**"),
        ):  # type: ignore[arg-type]
            pass
