"""From logits to the next token: pure functions of tensors. B rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glassgpt.config.generate import Sampling
from glassgpt.generation.generator import Generator


def exact(logits: Tensor) -> Tensor:
    """The same numbers in float32, if they were shorter: a softmax over a vocabulary needs it."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def penalised(logits: Tensor, sampling: Sampling, seen: Tensor, written: Tensor) -> Tensor:
    """Logits (B, V) after the repetition penalty (Keskar et al. 2019) and OpenAI's presence and frequency penalties.

    `seen` (B, V) bool marks tokens of the prompt or the text so far; `written` (B, V) counts those of the text so far.
    """
    if sampling.repetition_penalty != 1:
        weakened = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = torch.where(seen, weakened, logits)
    written = written.to(logits.dtype)
    return logits - sampling.frequency_penalty * written - sampling.presence_penalty * written.clamp(max=1)


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities (B, V) that the next token is drawn from.

    Temperature, then top-k, then top-p (Holtzman et al. 2020: the smallest set whose mass reaches p; the token that
    crosses p is in), then min-p (Nguyen et al. 2024). Temperature 0 puts everything on the first largest logit.
    """
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    # the distance to the largest logit is at most 0, so a tiny temperature sends it to -inf, never to NaN
    number = torch.finfo(logits.dtype)
    logits = (logits - logits.amax(-1, keepdim=True)).div_(min(max(sampling.temperature, number.tiny), number.max))
    if 0 < sampling.top_k < logits.size(-1):
        kth = logits.topk(sampling.top_k).values[:, -1:]
        logits.masked_fill_(logits < kth, float("-inf"))
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        order = logits.argsort(dim=-1, descending=True, stable=True)  # logits differ where probabilities round to a tie
        largest = probabilities.gather(-1, order)
        before = largest.cumsum(-1) - largest  # mass of the tokens ahead of each one
        beyond = before >= sampling.top_p
        beyond[:, 0] = False  # the likeliest token stays, however small p is
        probabilities = probabilities.masked_fill(beyond.scatter(-1, order, beyond), 0)
    if sampling.min_p > 0:
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    return probabilities / probabilities.sum(-1, keepdim=True)


def choose(logits: Tensor, sampling: Sampling, generators: Sequence[Generator]) -> Tensor:
    """The next token (B,) of each row. Temperature 0 needs no distribution: it is the exact argmax."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    return draw(distribution(logits, sampling), generators)


def draw(probabilities: Tensor, generators: Sequence[Generator]) -> Tensor:
    """One token (B,) per row, by inverting the cumulative distribution at the row's own random number.

    Every row has its own generator and takes one number a step, so no row's text depends on its batch-mates.
    """
    number = torch.float32 if probabilities.device.type == "mps" else torch.float64  # MPS has no float64
    uniform = torch.tensor([generator.uniform() for generator in generators], dtype=number, device=probabilities.device)
    cumulative = probabilities.to(number).cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    point = uniform[:, None] * total
    # the first token whose cumulative mass exceeds the point; rounding must not pass the last possible one
    drawn = torch.searchsorted(cumulative, point, right=True)
    last = torch.searchsorted(cumulative, total)
    return torch.minimum(drawn, last).squeeze(-1)


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy (B,) in nats of softmax(logits) (B, V)."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p.nan_to_num(neginf=0.0)).sum(-1)
