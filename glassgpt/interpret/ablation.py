"""Ablation: take a part away, or give it a value from elsewhere, and see what the model loses.

Zero takes the part's average effect away too; the mean keeps that and takes only what varies (Wang et al. 2022, §3); resampling
gives the part what it had in another text (Chan et al. 2022).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from glassgpt.config import UserError
from glassgpt.interpret.attribution import checked
from glassgpt.interpret.hooks import Edit, capture, edit
from glassgpt.interpret.rerun import Activation, Metric, Progress, last_position, mean_loss, record, sweep
from glassgpt.model import GPT

How = Literal["zero", "mean", "position_mean", "resample"]
HOWS: tuple[How, ...] = ("zero", "mean", "position_mean", "resample")
"""Where the values come from: nowhere; the mean of the unablated reference texts over texts and positions; their mean over texts
at each position; another text at each position."""
SWEPT: tuple[Activation, ...] = ("attn.z", "mlp")


@contextmanager
def ablate(
    model: GPT,
    parts: Mapping[str, Sequence[int] | None],
    how: How = "zero",
    reference: Tensor | None = None,
    seed: int = 0,
) -> Iterator[None]:
    """`with ablate(model, {"blocks.3.attn.z": [0, 7], "blocks.5.mlp": None}): model(ids)`.

    Each name of `capture` comes with the heads that are ablated (of tensors that have heads) or with the places in the last
    dimension; None is all. All but "zero" take values from `reference` ids (R, T). With "resample" row b gets row b + shift
    of them, and `seed` draws the shift, 1 to R - 1: rows of `reference` itself never get their own. "position_mean" and
    "resample" are for passes without a cache, no longer than `reference`. Raises UserError as `capture` does, for parts that
    there are not, for a reference that does not fit or on which the model would drop activations at random, and, in here, for
    a pass with a cache where there may be none.
    """
    reference = _checked(how, reference)
    edits: dict[str, Edit] = {}
    if reference is None:
        edits = {name: partial(_with, how=how, name=name, places=places) for name, places in parts.items()}
    else:
        with torch.no_grad(), ExitStack() as stack:
            seen = {pattern: stack.enter_context(capture(model, pattern)) for pattern in parts}
            model(checked(model, reference.flatten())[0].view_as(reference))
        shift = _shift(len(reference), seed) if how == "resample" else 0
        for pattern, places in parts.items():
            for name, was in seen[pattern].items():
                edits[name] = partial(_with, how=how, name=name, places=places, was=was, shift=shift)
    with ExitStack() as stack:
        stack.enter_context(edit(model, edits))
        if how in ("position_mean", "resample"):
            for block in model.blocks:
                stack.callback(block.register_forward_pre_hook(_refuse_cache).remove)
        yield


def _refuse_cache(block: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Before a block runs on (x, where, cache): positions would be counted from the cache's end, not from the text's start."""
    if len(inputs) > 2 and inputs[2] is not None:
        raise UserError(
            "ablation by position_mean or resample is for passes without a cache; run the whole text at once, or ablate by mean"
        )


def _with(x: Tensor, how: How, name: str, places: Sequence[int] | None, was: Tensor | None = None, shift: int = 0) -> Tensor:
    """`x` with other values in some places."""
    value = torch.zeros_like(x) if was is None else _value(x, how, name, was, shift)
    if places is None:
        return value
    by_head = x.dim() == 4
    count = x.size(1 if by_head else -1)
    if bad := [place for place in places if not 0 <= place < count]:
        what = "heads" if by_head else "numbers"
        raise UserError(f"{name} has {what} 0 to {count - 1}; got {', '.join(map(str, bad))}")
    chosen = torch.zeros(count, dtype=torch.bool, device=x.device)
    chosen[list(places)] = True
    return torch.where(chosen.view(-1, 1, 1) if by_head else chosen, value, x)


def _value(x: Tensor, how: How, name: str, was: Tensor, shift: int) -> Tensor:
    """The reference's activation `was`, as much of it as takes the place of `x`: (B, [H,] T, X), or (n, X) in an expert."""
    fits = was.numel() > 0 and was.size(-1) == x.size(-1)
    if how != "mean":
        fits = fits and x.dim() > 2 and was.size(-2) >= x.size(-2)
    if not fits:
        raise UserError(
            f"{name} is {tuple(was.shape)} on the reference ids and {tuple(x.shape)} here, too different for ablation by {how};"
            " give reference ids of at least this length, or ablate by zero"
        )
    if how == "mean":
        return was.mean([d for d in range(was.dim() - 1) if (was.dim(), d) != (4, 1)], keepdim=True).expand_as(x)
    was = was[..., : x.size(-2), :]
    if how == "position_mean":
        return was.mean(0, keepdim=True).expand_as(x)
    return was[(torch.arange(len(x), device=x.device) + shift) % len(was)]


# ---------------------------------------------------------------------- every part in turn


@dataclass(frozen=True, eq=False)
class AblationSweep:
    """The mean score of the texts with one part ablated, at all positions of all texts."""

    intact: float
    """With nothing ablated."""
    heads: Tensor
    """(L, H)"""
    mlps: Tensor
    """(L,)"""


@torch.no_grad()
def ablation_sweep(
    model: GPT,
    ids: Tensor,
    how: How = "mean",
    metric: Metric | None = None,
    reference: Tensor | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> AblationSweep:
    """Ablate every head and every MLP in turn, on texts (B, T). The score is the mean loss in nats a token, or `metric`.

    `how` and `seed` as in `ablate`; `reference` (R, T or more) is `ids` itself unless given. `progress` counts parts, of all
    texts. Raises UserError as `ablate` does, for no texts, and for texts of one token where the score is the loss.
    """
    if ids.dim() != 2 or not len(ids):
        raise UserError(f"expected at least 1 text of token ids, shape (B, T); got {tuple(ids.shape)}")
    reference = None if how == "zero" else _checked(how, ids if reference is None else reference)
    if reference is not None and how != "mean" and reference.size(1) < ids.size(1):
        raise UserError(f"the reference has {reference.size(1)} tokens a row and the texts {ids.size(1)}; give longer ones")
    others = [record(model, row) for row in reference] if reference is not None else []
    shift = _shift(len(others), seed) if how == "resample" else 0
    scores = {activation: torch.zeros(()) for activation in SWEPT}
    intact, done, parts = 0.0, 0, len(ids) * len(model.blocks) * (model.config.n_head + 1)
    for b, row in enumerate(ids):
        run = record(model, row)
        finish = mean_loss(model, run) if metric is None else last_position(model, metric)
        intact += float(finish(run["residual"][-1:], 0)) / len(ids)
        for activation in SWEPT:
            was = run[activation]
            if how == "zero":
                new = torch.zeros_like(was)
            elif how == "resample":
                new = others[(b + shift) % len(others)][activation][..., : was.size(-2), :]
            elif how == "position_mean":
                new = torch.stack([other[activation][..., : was.size(-2), :] for other in others]).mean(0)
            else:
                new = torch.stack([other[activation].mean(-2, keepdim=True) for other in others]).mean(0).expand_as(was)
            told = progress and partial(_told, progress, done, parts)
            found = sweep(model, run, activation, new, finish, False, told)  # (L, H or 1, 1)
            scores[activation] = scores[activation].to(was.device) + found
            done += found.numel()
    return AblationSweep(intact, scores["attn.z"].squeeze(2) / len(ids), scores["mlp"].flatten() / len(ids))


def _told(progress: Progress, before: int, total: int, done: int, of: int) -> None:
    """The progress of one of several sweeps as that of all."""
    progress(before + done, total)


def _checked(how: How, reference: Tensor | None) -> Tensor | None:
    """The reference ids, None for "zero"."""
    if how not in HOWS:
        raise UserError(f"unknown ablation {how!r}; expected {', '.join(HOWS)}")
    if how == "zero":
        return None
    if reference is None or reference.dim() != 2 or not len(reference):
        got = "none" if reference is None else f"shape {tuple(reference.shape)}"
        raise UserError(f"ablation by {how} takes values from reference ids (R, T); got {got}")
    if how == "resample" and len(reference) < 2:
        raise UserError("ablation by resample needs at least 2 rows of reference ids; got 1")
    return reference


def _shift(rows: int, seed: int) -> int:
    return int(torch.randint(1, rows, (), generator=torch.Generator().manual_seed(seed)))
