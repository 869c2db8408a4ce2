"""What a checkpoint of `glassgpt lab alignment` is worth, measured beside training and after it: nothing here is learnt from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from glassgpt.lab.alignment import arithmetic
from glassgpt.lab.alignment.arithmetic import Problem
from glassgpt.lab.alignment.start import answer, prompt_ids, seeds_from, texts_of
from glassgpt.loading import load
from glassgpt.tuning import rollout


@dataclass(frozen=True)
class Point:
    """One checkpoint, by its sampled answers to the held-out problems (temperature 1)."""

    step: int
    proxy: float
    """What the judge of `arithmetic.proxy` gives them."""
    truth: float
    """Share of answers that are the right number and nothing else."""
    wins: float
    """Share of problems on which the answer is better than the start model's by the truth; half for each draw."""
    kl: float
    """KL divergence to the start model in nats per answer: of whole next-token distributions, summed along each answer."""
    entropy: float
    """Nats per token."""
    length: float
    """Tokens per answer, the one that ends it included."""


class Judge:
    """Asks every checkpoint the same problems with the same seeds, and holds the answers against the start model's."""

    def __init__(self, start: Path, held: Sequence[Problem], seed: int, device: torch.device) -> None:
        self.start, self._tokenizer = load(start, device=str(device))
        self.start.eval()
        self._held, self._device = held, device
        first = seeds_from(seed, 2)  # the pairs' answers have 0 and 1
        self.seeds = range(first, first + len(held))
        others = range(first + len(held), first + 2 * len(held))  # or the start would draw with itself on every problem
        answers = answer(self.start, self._tokenizer, held, others)
        texts = texts_of(answers, self._tokenizer)
        self._before = [arithmetic.exact(problem.prompt, text) for problem, text in zip(held, texts, strict=True)]

    @torch.no_grad()
    def point(self, checkpoint: Path, step: int) -> tuple[Point, list[str]]:
        """The numbers of a checkpoint, and its first answers."""
        model, tokenizer = load(checkpoint, device=str(self._device))
        model.eval()
        written = answer(model, tokenizer, self._held, self.seeds)
        texts = texts_of(written, tokenizer)
        proxy, truth = (
            [reward(problem.prompt, text) for problem, text in zip(self._held, texts, strict=True)]
            for reward in (arithmetic.proxy, arithmetic.exact)
        )
        better = [(now > before) + 0.5 * (now == before) for now, before in zip(truth, self._before, strict=True)]

        batch = rollout.collate(prompt_ids(self._held, tokenizer), written, self._device)
        ours, starts = (one(batch.ids).log_softmax(-1).double() for one in (model, self.start))  # (B, T, V)
        chances = ours.exp()
        kl, entropy = (chances * (ours - starts)).sum(-1), -(chances * ours).sum(-1)  # (B, T)
        count, tokens = len(self._held), float(batch.is_token.sum())
        found = Point(
            step,
            sum(proxy) / count,
            sum(truth) / count,
            sum(better) / count,
            float(kl[batch.is_token].sum()) / count,
            float(entropy[batch.is_token].sum()) / tokens,
            tokens / count,
        )
        return found, [f"{problem.prompt} -> {text}" for problem, text in zip(self._held[:3], texts, strict=False)]
