"""Activation patching: which activations of one prompt make another prompt's run give the first one's answer.

Vig et al. 2020 (causal mediation), Meng et al. 2022 (causal tracing); how to read it: Heimersheim & Nanda 2024. The network is
used as it is. Prompts are compared position by position, so they must have the same number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from glassgpt.config import UserError
from glassgpt.interpret.rerun import Activation, Metric, Progress, Run, last_position, record, sweep
from glassgpt.model import GPT

Kind = Literal["residual", "attn", "mlp", "heads", "head_positions"]
KINDS: dict[str, tuple[Activation, bool]] = {
    "residual": ("residual", True),
    "attn": ("attn", True),
    "mlp": ("mlp", True),
    "heads": ("attn.z", False),
    "head_positions": ("attn.z", True),
}
"""What is patched, and whether a position at a time."""


@dataclass(frozen=True, eq=False)
class Sweep:
    """The metric of every patched run."""

    kind: str
    values: Tensor
    """"residual" (L + 1, T): row l is the residual stream before block l, the last row after the last block. "attn" and "mlp"
    (L, T): what attention or the MLP adds. "heads" (L, H): a head's output at all positions. "head_positions" (L, H, T)."""
    clean: float
    """The metric of the clean run."""
    corrupted: float
    """The metric of the corrupted run."""

    @property
    def recovered(self) -> Tensor:
        """(values - corrupted) / (clean - corrupted): 1 where a patch restores the clean metric, 0 where it does nothing.

        Raises UserError where both runs have the same metric.
        """
        gap = self.clean - self.corrupted
        if gap == 0:
            raise UserError(
                f"both prompts have the metric {self.clean:g}, so there is nothing to recover; change a token that matters for it"
            )
        return (self.values - self.corrupted) / gap


def patch_sweep(
    model: GPT, clean: Tensor, corrupted: Tensor, metric: Metric, kind: Kind = "residual", progress: Progress | None = None
) -> Sweep:
    """Run the corrupted prompt (T,) once for each place, with the clean prompt's (T,) activation in that place.

    Raises UserError where the prompts have different lengths, are too long or hold ids that the model has not, for an unknown
    kind, for a model in training mode with dropout, and as `metric` does.
    """
    if kind not in KINDS:
        raise UserError(f"unknown kind {kind!r}; expected {', '.join(KINDS)}")
    return between(model, *recorded_pair(model, clean, corrupted), metric, kind, progress)


@torch.no_grad()
def between(model: GPT, clean: Run, corrupted: Run, metric: Metric, kind: Kind, progress: Progress | None = None) -> Sweep:
    """`patch_sweep` of runs that were made before."""
    activation, by_position = KINDS[kind]
    finish = last_position(model, metric)
    values = sweep(model, corrupted, activation, clean[activation], finish, by_position, progress)  # (R, H or 1, T or 1)
    values = values.squeeze(2) if not by_position else values if activation == "attn.z" else values.squeeze(1)
    with_clean, with_corrupted = (float(finish(run["residual"][-1:], 0)) for run in (clean, corrupted))
    return Sweep(kind, values, with_clean, with_corrupted)


def recorded_pair(model: GPT, clean: Tensor, corrupted: Tensor) -> tuple[Run, Run]:
    """Both prompts' runs. Raises UserError where they have different lengths, and as `record` does."""
    if clean.shape != corrupted.shape:
        told = (
            f"{name} has {ids.numel()} ({ids.flatten().tolist()})" for name, ids in (("clean", clean), ("corrupted", corrupted))
        )
        raise UserError(f"both prompts must have the same number of tokens; {', '.join(told)}")
    return record(model, clean), record(model, corrupted)


# ---------------------------------------------------------------------- metrics


def logit_difference(answer: int, against: int) -> Metric:
    """The logit of `answer` minus that of `against`: what Wang et al. (2022) measure."""
    return lambda logits: _column(logits, answer) - _column(logits, against)


def log_probability(token: int) -> Metric:
    """The natural log of a token's probability."""
    return lambda logits: _column(logits.log_softmax(-1), token)


def probability(token: int) -> Metric:
    """A token's probability."""
    return lambda logits: _column(logits.softmax(-1), token)


def _column(of: Tensor, token: int) -> Tensor:
    if not 0 <= token < of.size(-1):
        raise UserError(f"token id {token} is not in the vocabulary; expected 0 to {of.size(-1) - 1}")
    return of[:, token]
