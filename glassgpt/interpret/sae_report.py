"""What a sparse autoencoder is worth, and what its features answer to.

N tokens, D width of the activation, M features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glassgpt.config import UserError
from glassgpt.config.files import to_plain
from glassgpt.interpret.activations import activations
from glassgpt.interpret.hooks import edit
from glassgpt.interpret.sae import Progress, Sae, TrainedSae, held
from glassgpt.model import GPT

CHUNK_TOKENS = 4096
"""Tokens whose codes are held at once."""


@dataclass(frozen=True)
class SaeReport:
    """How faithful and how sparse a sparse autoencoder is."""

    explained_variance: float
    """1 - Σ|x - x̂|² / Σ|x - mean|², over all tokens and numbers."""
    l0: float
    """Mean number of active features a token."""
    dead_share: float
    """Share of the features that no token activated."""
    loss_nats: float
    """Mean loss a token of the model as it is."""
    loss_zero_nats: float
    """With zeros in the activation's place."""
    loss_sae_nats: float
    """With the reconstruction in its place."""
    loss_recovered: float
    """(zero - sae) / (zero - plain): 1 for a perfect reconstruction."""
    tokens: int


@torch.no_grad()
def evaluate_sae(trained: TrainedSae, model: GPT, batches: Sequence[Tensor], progress: Progress | None = None) -> SaeReport:
    """Measure on batches of ids (B, T), T at least 2, best of texts that it was not trained on.

    All their activations are held at once. Raises UserError for another model.
    """
    sae = on_device(trained, model)
    x = held(model, trained.name, batches)  # (N, D)
    missed, active, fired = 0.0, 0, torch.zeros(len(sae.decoder), dtype=torch.bool, device=x.device)
    for chunk in x.split(CHUNK_TOKENS):
        codes = sae.encode(chunk)
        missed += float((chunk - sae.decode(codes)).square().sum())
        active += int((codes > 0).sum())
        fired |= (codes > 0).any(dim=0)
    variance = float((x - x.mean(dim=0)).square().sum())
    losses = []
    for done, replace in enumerate((lambda x: x, torch.zeros_like, lambda x: sae(x.float()).to(x.dtype))):
        losses.append(edited_loss(model, trained.name, batches, replace))
        if progress is not None:
            progress(done + 1, 3)
    return SaeReport(
        explained_variance=1 - missed / variance if variance else float("nan"),
        l0=active / len(x),
        dead_share=1 - float(fired.float().mean()),
        loss_nats=losses[0],
        loss_zero_nats=losses[1],
        loss_sae_nats=losses[2],
        loss_recovered=loss_recovered(*losses),
        tokens=len(x),
    )


@torch.no_grad()
def edited_loss(model: GPT, name: str, batches: Sequence[Tensor], replace: Callable[[Tensor], Tensor]) -> float:
    """Mean loss a token, in nats, of batches of ids (B, T) with `replace(x)` in the place of the activation `name`."""
    total, count = 0.0, 0
    with edit(model, {name: replace}):
        for ids in batches:
            ids = ids.to(model.head.weight.device)
            logits = model(ids)[:, :-1].flatten(0, 1).float()  # (B (T - 1), V)
            total += float(F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum"))
            count += len(logits)
    return total / count if count else float("nan")


def loss_recovered(plain: float, zero: float, reconstructed: float) -> float:
    """Of what zeros cost, the share that the reconstruction does not cost; NaN where zeros cost nothing."""
    return (zero - reconstructed) / (zero - plain) if zero != plain else float("nan")


# ---------------------------------------------------------------------- what its features answer to


@dataclass(frozen=True)
class Context:
    """A token that activates a feature, with its surroundings."""

    code: float
    """How strongly."""
    ids: tuple[int, ...]
    at: int
    """Which of `ids` it is."""


@torch.no_grad()
def top_contexts(
    trained: TrainedSae,
    model: GPT,
    batches: Sequence[Tensor],
    features: Sequence[int],
    count: int = 10,
    before: int = 8,
    after: int = 4,
) -> list[list[Context]]:
    """For each of `features`, the `count` tokens of the batches (B, T) that activate it most, strongest first.

    Fewer where fewer activate it. Raises UserError for another model or a feature that there is not.
    """
    sae = on_device(trained, model)
    if wrong := [feature for feature in features if not 0 <= feature < trained.config.features]:
        raise UserError(f"features are numbered 0 to {trained.config.features - 1}; got {wrong[0]}")
    found: list[list[Context]] = [[] for _ in features]
    for ids in batches:
        codes = sae.encode(activations(model, [trained.name], ids)[trained.name].float())[..., list(features)]  # (B, T, features)
        values, places = codes.flatten(0, 1).topk(min(count, ids.numel()), dim=0)  # (count, features)
        for feature, contexts in enumerate(found):
            for code, place in zip(values[:, feature].tolist(), places[:, feature].tolist(), strict=True):
                row, at = divmod(place, ids.size(1))
                start = max(0, at - before)
                if code > 0:
                    contexts.append(Context(code, tuple(ids[row, start : at + after + 1].tolist()), at - start))
    return [sorted(contexts, key=lambda context: -context.code)[:count] for contexts in found]


def on_device(trained: TrainedSae, model: GPT) -> Sae:
    """The autoencoder on the model's device. Raises UserError when it is another model's, as far as the shape tells."""
    ours, theirs = to_plain(model.config), to_plain(trained.model)
    if differing := [key for key in ours if ours[key] != theirs[key]]:
        key = differing[0]
        raise UserError(
            f"this sparse autoencoder is for another model, with {key} {theirs[key]}; this one has {ours[key]}."
            " Use the model that it was trained on, or train one for this model"
        )
    return trained.sae.to(model.head.weight.device)
