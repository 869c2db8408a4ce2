"""Path patching: in a linear model direct paths add up to direct logit attribution; in any model, against the maths by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact import error, noisy, shape, tokens
from torch import Tensor, nn

from glassgpt.config import UserError
from glassgpt.config.model import MoeConfig
from glassgpt.interpret import capture, edit
from glassgpt.interpret.patching import logit_difference, patch_sweep
from glassgpt.interpret.paths import Receiver, path_patch, path_sweep
from glassgpt.model import GPT

T, EXACT = 7, 1e-12
METRIC = logit_difference(3, 5)
SLOTS: dict[str, dict[str, Any]] = {
    "default": {},
    "modern": {"position": "rope", "norm": "rms", "mlp": "swiglu", "bias": False, "n_kv_head": 2, "qk_norm": True},
    "windows": {"position": "alibi", "spans": ("full", "window"), "window_tokens": 3, "logit_cap": 5.0},
    "experts": {"moe": MoeConfig(experts=4, top_k=2, shared=1)},
}


def made(slot: str = "default") -> GPT:
    return noisy(shape(**SLOTS[slot]))


def prompts(model: GPT) -> tuple[Tensor, Tensor]:
    clean, corrupted = tokens(model.config, 2, T)
    return clean, corrupted


@torch.no_grad()
def everything(model: GPT, ids: Tensor) -> dict[str, Tensor]:
    with capture(model, "**") as seen:
        model(ids.unsqueeze(0))
    return seen


def output(model: GPT, seen: dict[str, Tensor], layer: int, head: int) -> Tensor:
    """What a head adds to the residual stream, (1, T, D)."""
    W = model.config.head_width
    weight = model.blocks[layer].attn.out.weight.detach()[:, head * W : (head + 1) * W]
    return seen[f"blocks.{layer}.attn.z"][:, head] @ weight.T


@torch.no_grad()
def linear() -> GPT:
    """No norms, no MLPs, and queries of zero: every head looks back evenly whatever the tokens are."""
    model = made()
    model.norm_f = nn.Identity()
    for block in model.blocks:
        block.norm_1, block.norm_2 = nn.Identity(), nn.Identity()
        block.mlp.down.weight.zero_()
        block.attn.qkv.weight[: model.config.width] = 0
        block.attn.qkv.bias[: model.config.width] = 0
    return model


@torch.no_grad()
def test_direct_paths_of_a_linear_model_add_up_to_direct_logit_attribution() -> None:
    model = linear()
    clean, corrupted = prompts(model)
    found = path_sweep(model, clean, corrupted, "logits", METRIC)
    seen = [everything(model, ids) for ids in (clean, corrupted)]
    direction = model.head.weight[3] - model.head.weight[5]  # (D,)
    L, H = found.values.shape
    dla = [[[float(output(model, s, layer, h)[0, -1] @ direction) for h in range(H)] for layer in range(L)] for s in seen]
    difference = torch.tensor(dla[1], dtype=torch.float64) - torch.tensor(dla[0], dtype=torch.float64)  # (L, H)
    assert error(found.values - found.clean, difference) < EXACT
    embeddings = float((seen[1]["embed"] - seen[0]["embed"])[0, -1] @ direction)
    assert abs(float((found.values - found.clean).sum()) + embeddings - (found.corrupted - found.clean)) < EXACT
    assert difference.abs().min() > 1e-4


@pytest.mark.parametrize("slot", SLOTS)
@torch.no_grad()
def test_the_direct_path_to_the_logits_by_hand(slot: str) -> None:
    model = made(slot)
    clean, corrupted = prompts(model)
    found = path_sweep(model, clean, corrupted, "logits", METRIC)
    seen, other = everything(model, clean), everything(model, corrupted)
    for layer in range(3):
        for head in range(4):
            stream = seen["blocks.2"] + output(model, other, layer, head) - output(model, seen, layer, head)
            by_hand = METRIC(model.logits(model.norm_f(stream))[:, -1])
            assert abs(float(found.values[layer, head]) - float(by_hand)) < EXACT
    assert path_patch(model, clean, corrupted, (1, 2), "logits", METRIC) == pytest.approx(float(found.values[1, 2]), abs=EXACT)
    # the last layer's heads reach the logits directly and through one MLP; all that they do is both together
    through = path_sweep(model, clean, corrupted, "logits", METRIC, through_mlps=True)
    with edit(model, {"blocks.2.attn.z": lambda x: torch.cat((other["blocks.2.attn.z"][:, :1], x[:, 1:]), dim=1)}):
        whole = METRIC(model(clean.unsqueeze(0))[:, -1])
    assert abs(float(through.values[2, 0]) - float(whole)) < EXACT
    assert abs(float(found.values[2, 0]) - float(whole)) > 1e-4


@torch.no_grad()
def by_hooks(model: GPT, clean: Tensor, corrupted: Tensor, layer: int, head: int, receivers: list[Receiver], mlps: bool) -> float:
    """Wang et al.'s three passes, with hooks: freeze all heads but the sender, keep what receivers get, run with that."""
    seen, other = everything(model, clean), everything(model, corrupted)

    def fixed(layer_of_z: int) -> Any:
        def f(x: Tensor) -> Tensor:
            z = seen[f"blocks.{layer_of_z}.attn.z"].clone()
            if layer_of_z == layer:
                z[:, head] = other[f"blocks.{layer}.attn.z"][:, head]
            return z

        return f

    frozen: dict[str, Any] = {f"blocks.{number}.attn.z": fixed(number) for number in range(3)}
    if not mlps:
        frozen |= {f"blocks.{number}.mlp": lambda x, number=number: seen[f"blocks.{number}.mlp"] for number in range(3)}
    names = [f"blocks.{at}.attn.{what}" for at, _, what in receivers]
    with edit(model, frozen), capture(model, names) as got:
        model(clean.unsqueeze(0))

    def received(name: str) -> Any:
        heads = [h for at, h, what in receivers if name == f"blocks.{at}.attn.{what}"]

        def f(x: Tensor) -> Tensor:
            x = x.clone()
            x[:, heads] = got[name][:, heads]
            return x

        return f

    with edit(model, {name: received(name) for name in names}):
        return float(METRIC(model(clean.unsqueeze(0))[:, -1]))


@pytest.mark.parametrize("mlps", [False, True])
@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize("receivers", [[(2, 1, "q")], [(1, 1, "k"), (2, 0, "v"), (2, 1, "v")]])
def test_paths_to_heads_equal_three_hooked_passes(slot: str, receivers: list[Receiver], mlps: bool) -> None:
    model = made(slot)
    clean, corrupted = prompts(model)
    found = path_sweep(model, clean, corrupted, receivers, METRIC, through_mlps=mlps)
    for layer in range(3):
        for head in (0, 3):
            expected = by_hooks(model, clean, corrupted, layer, head, receivers, mlps)
            assert abs(float(found.values[layer, head]) - expected) < EXACT
    assert torch.all(found.values[2] == found.clean)  # nothing lies behind them
    assert float((found.values[0] - found.clean).abs().max()) > 1e-4


def test_a_wrong_receiver_is_noticed() -> None:
    model = made()
    clean, corrupted = prompts(model)
    values = [float(path_patch(model, clean, corrupted, (0, 0), [(2, head, "q")], METRIC)) for head in range(4)]
    assert min(abs(a - b) for i, a in enumerate(values) for b in values[:i]) > 1e-6


def test_a_path_from_the_same_prompt_changes_nothing() -> None:
    model = made()
    clean, _ = prompts(model)
    for receivers in ("logits", [(2, 1, "q")]):
        found = path_sweep(model, clean, clean, receivers, METRIC)  # type: ignore[arg-type]
        assert float((found.values - found.clean).abs().max()) < EXACT


def test_one_path_is_less_than_the_whole_effect() -> None:
    """What patching a head does by every way is not what it does by one."""
    model = made()
    clean, corrupted = prompts(model)
    whole = patch_sweep(model, corrupted, clean, METRIC, "heads").values
    assert error(path_sweep(model, clean, corrupted, "logits", METRIC).values, whole) > 1e-3


def test_progress_is_told() -> None:
    model = made()
    told: list[tuple[int, int]] = []
    path_sweep(model, *prompts(model), "logits", METRIC, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("sender", "receivers", "message"),
    [
        ((3, 0), "logits", "no head 3.0: the model has layers 0 to 2 and heads 0 to 3"),
        ((0, -1), "logits", "no head 0.-1"),
        ((0, 0), [], r'receivers must be "logits" or a list of \(layer, head, "q", "k" or "v"\); got \[\]'),
        ((0, 0), "q", r'receivers must be "logits" or a list of .*; got \'q\''),
        ((0, 0), (2, 1, "q"), "receivers must be .* a list of"),
        ((0, 0), [(2, 1)], "receivers must be .* a list of"),
        ((0, 0), [(2, 2, "k")], r"no receiver \(2, 2, 'k'\): .* k or v with one from 0 to 1"),
        ((0, 0), [(2, 0, "z")], r"no receiver \(2, 0, 'z'\)"),
    ],
)
def test_refusals(sender: tuple[int, int], receivers: Any, message: str) -> None:
    model = made("modern")
    with pytest.raises(UserError, match=message):
        path_patch(model, *prompts(model), sender, receivers, METRIC)
