"""What temperature does: one prompt, several temperatures, and the change in numbers and in a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

from glassgpt import charts
from glassgpt.config.generate import Sampling
from glassgpt.generation import Completion, complete, distribution
from glassgpt.interpret.next_token import logits_of, next_tokens
from glassgpt.lab.text_measures import repeated_share
from glassgpt.model import GPT
from glassgpt.text import Tokenizer


@dataclass(frozen=True)
class Sample:
    """One continuation at one temperature."""

    temperature: float
    completion: Completion
    entropy_bits: float
    """Mean entropy of the distributions that its tokens were drawn from: log2 of the number of equally likely choices."""
    surprise_bits: float
    """Mean -log2 of the model's own probability (temperature 1) of each token written."""
    repeated_share: float
    """Share of its 3-token runs that had occurred in it before."""


def sample(model: GPT, tokenizer: Tokenizer, prompt: str, temperature: float, new_tokens: int, seed: int) -> Sample:
    """Write `new_tokens` tokens after `prompt` and measure them. Raises UserError as `complete` does."""
    settings = Sampling(temperature=temperature)
    (completion,) = complete(model, tokenizer, [prompt], settings, max_new_tokens=new_tokens, seed=seed, ignore_end=True)
    written = [token.id for token in completion.tokens]
    surprise_bits, entropy_bits = measured(model, tokenizer.encode_start(prompt), written, settings, tokenizer.vocab_size)
    return Sample(temperature, completion, fmean(entropy_bits), fmean(surprise_bits), repeated_share(written))


def measured(
    model: GPT, before: Sequence[int], written: Sequence[int], sampling: Sampling, n_ids: int
) -> tuple[list[float], list[float]]:
    """Of every token written after the ids `before`, in bits: -log2 of the model's own probability (temperature 1), and the
    entropy of the distribution that it was drawn from. `n_ids` of the vocabulary can be drawn."""
    logits = logits_of(model, [*before, *written][:-1])[-len(written) :, :n_ids]  # (written, V)
    ids = torch.tensor(list(written), device=logits.device)[:, None]
    surprise = -logits.log_softmax(-1).gather(-1, ids).squeeze(-1) / math.log(2)
    drawn_from = distribution(logits, sampling)
    return surprise.tolist(), (torch.special.entr(drawn_from).sum(-1) / math.log(2)).tolist()


def likeliest(model: GPT, tokenizer: Tokenizer, prompt: str, temperature: float, count: int) -> list[tuple[str, float]]:
    """The `count` likeliest next tokens, in the model's own order, and their probabilities at a temperature."""
    logits = logits_of(model, tokenizer.encode_start(prompt))[-1, : tokenizer.vocab_size]  # (V,)
    found = next_tokens(logits, Sampling(temperature=temperature), count)
    return [(tokenizer.decode([token.id]), token.probability) for token in found]


def chart(model: GPT, tokenizer: Tokenizer, prompt: str, temperatures: Sequence[float], path: Path, count: int = 12) -> None:
    """Draw the next-token distribution at each temperature side by side; `path` may end in .svg or .png."""
    # the same tokens in every panel, in the model's own order: temperature changes heights, never the order
    tokens = [token for token, _ in likeliest(model, tokenizer, prompt, 1.0, count)]
    figure, panels = charts.figure(len(temperatures), (4 * len(temperatures), 4.2))
    for axes, temperature in zip(panels, temperatures, strict=True):
        heights = [p for _, p in likeliest(model, tokenizer, prompt, temperature, count)]
        axes.barh(range(count), heights, color="#2f5d9b")
        charts.label_axis(axes.yaxis, [repr(token) for token in tokens])
        axes.set(title=f"temperature {temperature:g}", xlim=(0, 1), xlabel="probability")
        for place, height in enumerate(heights):
            inside = height > 0.85
            where, color = (height - 0.12, "white") if inside else (height + 0.015, "black")
            axes.text(where, place, f"{height:.3f}", va="center", fontsize=8, color=color)
    panels[0].invert_yaxis()
    figure.suptitle(charts.drawable(f"What comes after “…{prompt[-60:]}”"), fontsize=11)
    charts.save(figure, path)
