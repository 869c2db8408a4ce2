"""Causal tracing: where a model recalls a fact about a subject whose tokens are drowned in noise (Meng et al. 2022, §2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from glassgpt.config import UserError
from glassgpt.interpret.patching import between, probability
from glassgpt.interpret.rerun import Progress, record
from glassgpt.model import GPT

TRACED = ("residual", "attn", "mlp")


@dataclass(frozen=True, eq=False)
class CausalTrace:
    """Probabilities of one next token."""

    clean: float
    """Of the text as it is."""
    corrupted: float
    """With noise on the subject's embeddings, the mean of the samples."""
    restored: Tensor
    """The same with one state put back: (L + 1, T) for "residual", (L, T) for "attn" and "mlp", as in `Sweep`."""
    noise_std: float


@torch.no_grad()
def causal_trace(
    model: GPT,
    ids: Tensor,
    subject: Sequence[int],
    token: int,
    noise_std: float | None = None,
    samples: int = 10,
    seed: int = 0,
    kind: Literal["residual", "attn", "mlp"] = "residual",
    progress: Progress | None = None,
) -> CausalTrace:
    """Add noise to the token embeddings at the positions `subject` of a text (T,), then restore each clean state in turn.

    N(0, noise_std²) is drawn anew for each sample, and stays for all its runs. None is 3 times the standard deviation of the
    embedding matrix. Raises UserError for positions that are not in the text, for a token that is not in the vocabulary, for
    noise that has no size, for an unknown kind, for fewer than 1 sample, and as `record` does.
    """
    if kind not in TRACED:
        raise UserError(f"unknown kind {kind!r}; expected {', '.join(TRACED)}")
    if noise_std is not None and not (noise_std >= 0 and math.isfinite(noise_std)):
        raise UserError(f"noise_std must be a number from 0 up; got {noise_std}")
    if samples < 1:
        raise UserError(f"samples must be at least 1; got {samples}")
    clean = record(model, ids)
    bad = [position for position in subject if not 0 <= position < len(ids)]
    if bad or not subject:
        raise UserError(f"the subject must be positions 0 to {len(ids) - 1} of the text; got {list(subject)}")
    weight = model.token_embedding.weight
    std = 3 * float(weight.std()) if noise_std is None else noise_std
    generator = torch.Generator().manual_seed(seed)
    sweeps = []
    for sample in range(samples):
        noise = torch.zeros(1, len(ids), weight.size(1), dtype=torch.float64)  # (1, T, D)
        noise[0, list(subject)] = std * torch.randn(len(subject), weight.size(1), generator=generator, dtype=torch.float64)
        corrupted = record(model, ids, {"token_embedding": noise.to(weight).add})
        sweeps.append(between(model, clean, corrupted, probability(token), kind))
        if progress is not None:
            progress(sample + 1, samples)
    restored = torch.stack([found.values for found in sweeps]).mean(0)
    return CausalTrace(sweeps[0].clean, sum(found.corrupted for found in sweeps) / samples, restored, std)
