"""Speculative decoding: guesses are checked by the model in one pass, and the text keeps its distribution exactly.

Leviathan, Kalman, Matias 2023 (Fast Inference from Transformers via Speculative Decoding, algorithm 1); Chen et al. 2023.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glassgpt.config import UserError
from glassgpt.config.generate import Sampling
from glassgpt.generation.acceptance import Acceptance
from glassgpt.generation.engine import Token, as_tokens, fit
from glassgpt.generation.generator import Generator
from glassgpt.generation.proposers import Draft, Lookup, Proposal, Proposer, Text, after_penalties
from glassgpt.generation.runner import Model, Runner, Scores, start
from glassgpt.generation.sampling import distribution, draw


@dataclass(frozen=True)
class Guesses:
    """Who guesses, and how many tokens at a time."""

    draft: Model | None = None
    """A smaller model of the same vocabulary; without one the text is looked up."""
    lookup: int = 3
    """Longest run of tokens that is looked up."""
    proposals: int = 8
    """At most; fewer are made while they are wrong."""

    def proposer(self, sampling: Sampling, n_ids: int | None) -> Proposer:
        return Lookup(self.lookup) if self.draft is None else Draft(self.draft, sampling, n_ids)

    def stream(self, counts: Acceptance | None = None) -> Callable[..., Iterator[Token]]:
        """`stream` with these guesses: called as `engine.stream` is."""
        return functools.partial(stream, guesses=self, counts=counts)


def stream(
    model: Model,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    generators: Sequence[Generator],
    max_new_tokens: int,
    ends: Callable[[Token], bool] = lambda token: False,
    n_top: int = 0,
    n_ids: int | None = None,
    *,
    guesses: Guesses,
    counts: Acceptance | None = None,
) -> Iterator[Token]:
    """Like `engine.stream`, with fewer passes of `model`; rows are written one after another.

    At temperature 0 the tokens are those of `engine.stream` (up to the rounding of logits, which depends on how many tokens a
    pass reads); above it they have the same distribution, though other tokens come from the same seed. Adds to `counts`. Raises
    UserError as `engine.stream` does, and for a draft of another vocabulary.
    """
    counts = counts or Acceptance()
    sizes = [min(n_ids or one.config.vocab_size, one.config.vocab_size) for one in (model, guesses.draft) if one is not None]
    if len(set(sizes)) > 1:
        raise UserError(f"the model has a vocabulary of {sizes[0]} tokens and the draft one of {sizes[1]}: they must be the same")
    prompts = [fit(ids, model.config.context_tokens) for ids in prompts]
    for row, prompt in enumerate(prompts):
        room = min(max_new_tokens, model.config.context_tokens - len(prompt) + 1)
        proposer = guesses.proposer(sampling, n_ids)
        runner = start(model, n_ids)
        try:
            writer = Writer(row, runner, proposer, sampling, generators[row], n_top, counts)
            for token in writer.tokens(prompt, room, guesses.proposals):
                counts.tokens += 1
                yield token
                if ends(token):
                    break
        finally:
            runner.close()
            proposer.close()


class Writer:
    """Writes one row."""

    def __init__(
        self,
        row: int,
        runner: Runner,
        proposer: Proposer,
        sampling: Sampling,
        generator: Generator,
        n_top: int,
        counts: Acceptance,
    ) -> None:
        self._row, self._runner, self._proposer, self._sampling = row, runner, proposer, sampling
        self._generator, self._n_top, self._counts = generator, n_top, counts

    def tokens(self, prompt: Sequence[int], room: int, most: int) -> Iterator[Token]:
        """`room` tokens after the prompt, with `most` guesses a pass at first, and fewer while they are wrong.

        The first pass reads the prompt and guesses nothing.
        """
        text, fed, guess, count = Text(prompt, []), list(prompt), Proposal([]), most
        while True:
            scores = self._runner.feed([fed], every=bool(text.written))
            self._counts.passes += 1
            chosen = self._checked(scores, text, guess)
            accepted = len(chosen) - 1
            self._counts.proposed += len(guess.ids)
            self._counts.accepted += accepted
            places = list(range(len(chosen)))
            yield from as_tokens([self._row] * len(chosen), chosen, scores.of(places), self._n_top)
            text.written.extend(chosen)
            left = room - len(text.written)
            if left == 0:
                return
            if accepted < len(guess.ids):
                self._runner.rewind([len(prompt) + len(text.written) - 1])
                count = accepted + 1
            elif guess.ids:
                count = min(most, 2 * count)
            guess = self._proposer.propose(text, min(count, left - 1), self._generator)
            fed = [text.written[-1], *guess.ids]

    def _checked(self, scores: Scores, text: Text, guess: Proposal) -> list[int]:
        """The guesses that are accepted, and the token after them."""
        if self._sampling.temperature == 0:
            return likeliest(scores, self._sampling, text, guess.ids)
        with torch.inference_mode():
            logits = after_penalties(scores, self._sampling, text, guess.ids)  # (guesses + 1, V)
            return checked(lambda place: distribution(logits[place, None], self._sampling)[0], guess, self._generator)


def likeliest(scores: Scores, sampling: Sampling, text: Text, guesses: Sequence[int]) -> list[int]:
    """The likeliest tokens, up to the first that was not guessed, which is right all the same."""
    best = scores.best if not sampling.has_penalties else after_penalties(scores, sampling, text, guesses).argmax(-1).tolist()
    right = 0
    for guess, token_id in zip(guesses, best, strict=False):
        if guess != token_id:
            break
        right += 1
    return best[: right + 1]


def checked(p: Callable[[int], Tensor], guess: Proposal, generator: Generator) -> list[int]:
    """Guesses drawn from q, accepted or replaced so that what comes out is distributed as p (V,) of its place.

    Guess x is accepted with probability min(1, p(x) / q(x)); the first that is not gives way to a draw from max(0, p - q), which
    is what p has more than q (Leviathan et al. 2023, algorithm 1). When all are accepted, a draw from p follows. No such rule
    accepts more: of each place the overlap, sum(min(p, q)). A place after the first refusal is never looked at.
    """
    for place, token_id in enumerate(guess.ids):
        target = p(place)
        q = certain(token_id, target) if guess.probabilities is None else guess.probabilities[place].to(target.device)
        if generator.uniform() * float(q[token_id]) >= float(target[token_id]):
            more = (target - q).clamp(min=0)
            instead = more if bool(more.any()) else target  # p and q differ by rounding alone
            return [*guess.ids[:place], *draw(instead[None], [generator]).tolist()]
    return [*guess.ids, *draw(p(len(guess.ids))[None], [generator]).tolist()]


def certain(token_id: int, like: Tensor) -> Tensor:
    """Everything on one token: (V,)."""
    q = torch.zeros_like(like)
    q[token_id] = 1.0
    return q
