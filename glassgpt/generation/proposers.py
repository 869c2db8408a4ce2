"""Who guesses the next tokens for speculative decoding: a smaller model, or the text itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from glassgpt.config.generate import Sampling
from glassgpt.generation.engine import numbers
from glassgpt.generation.generator import Generator
from glassgpt.generation.runner import Model, Scores, start
from glassgpt.generation.sampling import distribution, draw, penalised


class Proposal(NamedTuple):
    """Guesses of the next tokens, k of them."""

    ids: list[int]
    probabilities: Tensor | None = None
    """(k, V): the distributions that they were drawn from; None where each was certain."""


class Proposer(Protocol):
    """Guesses for one row. Called each time with a text that begins with the one of the time before."""

    def propose(self, text: Text, count: int, generator: Generator) -> Proposal:
        """What may come after `text`: at most `count` tokens, or none."""
        ...

    def close(self) -> None:
        """Nothing more is asked for."""
        ...


class Text(NamedTuple):
    """One row: its prompt, and what was written after it."""

    prompt: Sequence[int]
    written: list[int]

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *self.written]


def after_penalties(scores: Scores, sampling: Sampling, text: Text, guesses: Sequence[int]) -> Tensor:
    """Logits (n, V) after the penalties; place j of the n stands after `text` and the first j guesses."""
    if not sampling.has_penalties:
        return scores.logits
    written = torch.tensor(text.written, dtype=torch.long).bincount(minlength=scores.logits.size(-1))  # (V,)
    counts = written.repeat(len(scores.logits), 1)  # (n, V)
    for place, guess in enumerate(guesses, 1):
        counts[place:, guess] += 1
    seen = counts > 0
    seen[:, list(text.prompt)] = True
    return penalised(scores.logits, sampling, seen.to(scores.logits.device), counts.to(scores.logits.device))


class Draft:
    """A smaller model with the same vocabulary guesses token by token (Leviathan et al. 2023; Chen et al. 2023)."""

    def __init__(self, model: Model, sampling: Sampling, n_ids: int | None) -> None:
        self._runner = start(model, n_ids)
        self._context = model.config.context_tokens
        self._sampling = sampling
        self._fed: list[int] = []
        self._sure = 0
        """So many tokens of `_fed` are surely the text's."""

    def propose(self, text: Text, count: int, generator: Generator) -> Proposal:
        """The last guess is never read, so a full context still gives one."""
        ids = text.ids
        count = min(count, self._context - len(ids) + 1)
        if count < 1:
            return Proposal([])
        guesses: list[int] = []
        probabilities: list[Tensor] = []
        scores = self._read(ids)
        for _ in range(count):
            numbers(scores)  # with a NaN every guess would be accepted
            logits = after_penalties(scores, self._sampling, Text(text.prompt, [*text.written, *guesses]), ())  # (1, V)
            if self._sampling.temperature == 0:
                guess = logits.argmax(-1)
            else:
                probabilities.append(distribution(logits, self._sampling))
                guess = draw(probabilities[-1], [generator])
            guesses += guess.tolist()
            if len(guesses) < count:
                scores = self._runner.feed([guesses[-1:]])
                self._fed += guesses[-1:]
        return Proposal(guesses, torch.cat(probabilities) if probabilities else None)

    def _read(self, ids: list[int]) -> Scores:
        """Feed what is new in the text, after taking back the guesses that are not in it. The last token is always fed."""
        fed, same = self._fed, self._sure
        while same < min(len(fed), len(ids) - 1) and fed[same] == ids[same]:
            same += 1
        if same < len(fed):
            self._runner.rewind([same])
        self._fed, self._sure = list(ids), len(ids)
        return self._runner.feed([ids[same:]])

    def close(self) -> None:
        self._runner.close()


class Lookup:
    """What followed the last tokens where they stood before in the text (prompt lookup decoding, Saxena 2023)."""

    def __init__(self, longest: int) -> None:
        """The last `longest` tokens are looked for, then fewer, down to one."""
        self._longest = longest
        self._read = 0
        self._after: dict[tuple[int, ...], int] = {}
        """Where each run of tokens was last followed by something: the place of what followed."""

    def propose(self, text: Text, count: int, generator: Generator) -> Proposal:
        """The newest occurrence of the longest run wins. What is copied may run into the copy, as in LZ77: "ababa" -> "babab"."""
        ids = text.ids
        self._index(ids)
        if count < 1:
            return Proposal([])
        for size in range(min(self._longest, len(ids) - 1), 0, -1):
            if (place := self._after.get(tuple(ids[-size:]))) is not None:
                for source in range(place, place + count):
                    ids.append(ids[source])
                return Proposal(ids[-count:])
        return Proposal([])

    def _index(self, ids: list[int]) -> None:
        for place in range(max(1, self._read), len(ids)):
            for size in range(1, min(self._longest, place) + 1):
                self._after[tuple(ids[place - size : place])] = place
        self._read = len(ids)

    def close(self) -> None:
        """There is nothing to give back."""
