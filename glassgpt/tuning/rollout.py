"""Answers sampled from a model, for PPO, GRPO and for looking at: the fast generator, with batches and cache."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glassgpt.config import UserError
from glassgpt.config.generate import Sampling
from glassgpt.config.tuning import Rollouts
from glassgpt.data.records import Record
from glassgpt.generation import stream
from glassgpt.generation.generator import Generator
from glassgpt.model import GPT, lora
from glassgpt.text import Tokenizer
from glassgpt.train import machine, parallel
from glassgpt.train.loss import IGNORE
from glassgpt.train.parallel import QuietError, Ranks
from glassgpt.train.session import Session
from glassgpt.tuning import objectives, stage
from glassgpt.tuning.examples import Order, end_ids, prompt_ids
from glassgpt.tuning.rewards import Answer, Rewards, Scores
from glassgpt.tuning.scalar import open_scorer

HELD_OUT_ANSWERS = 64
BATCH_TOKENS = 2**16
"""Positions that a batch of answers may hold in the cache."""


@dataclass(frozen=True)
class Written:
    """One sampled answer."""

    ids: list[int]
    """Its tokens, the one that ended it included."""
    is_whole: bool
    """Whether it ended by itself, before the limit."""


def write(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    ends: Collection[int],
    seeds: Sequence[int],
    *,
    max_new_tokens: int,
    n_ids: int,
    temperature: float = 1.0,
) -> list[Written]:
    """An answer to each prompt (ids), drawn by its own seed: it depends on nothing else in the batch.

    `n_ids` is the tokenizer's vocabulary. Dropout is off while it writes; the model is left in the mode it was in.
    """
    if not prompts:
        return []
    was_training = model.training
    model.eval()
    rows = max(1, BATCH_TOKENS // (max(map(len, prompts)) + max_new_tokens))
    found: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))  # little padding
    with machine.eager():
        for start in range(0, len(order), rows):
            part = order[start : start + rows]
            generators = [Generator(seeds[row]) for row in part]
            tokens = stream(
                model,
                [prompts[row] for row in part],
                Sampling(temperature=temperature),
                generators,
                max_new_tokens,
                lambda token: token.id in ends,
                n_ids=n_ids,
            )
            for token in tokens:
                found[part[token.row]].append(token.id)
    model.train(was_training)
    return [Written(ids, ids[-1] in ends) for ids in found]


@dataclass(frozen=True, eq=False)
class Answers:
    """Prompts and their answers as one batch, padded on the right; positions are those of the targets."""

    ids: Tensor
    """(B, T) int64: prompt and answer without its last token."""
    targets: Tensor
    """(B, T) int64: the answer's tokens where they are predicted, IGNORE elsewhere."""

    @property
    def is_token(self) -> Tensor:
        """(B, T) bool: the answer's tokens."""
        return self.targets != IGNORE


def collate(prompts: Sequence[Sequence[int]], answers: Sequence[Written], device: torch.device) -> Answers:
    """Sampled answers as a batch."""
    T = max(len(prompt) + len(answer.ids) - 1 for prompt, answer in zip(prompts, answers, strict=True))
    ids = torch.zeros(len(prompts), T, dtype=torch.long)
    targets = torch.full_like(ids, IGNORE)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        whole = torch.tensor([*prompt, *answer.ids])
        ids[row, : len(whole) - 1] = whole[:-1]
        targets[row, len(prompt) - 1 : len(whole) - 1] = whole[len(prompt) :]
    return Answers(ids.to(device), targets.to(device))


# ---------------------------------------------------------------------- prompts, answers, rewards


class Prompt(NamedTuple):
    """What is to be answered."""

    record: Record
    ids: list[int]


class Judged(NamedTuple):
    """One sampled answer and what it is worth."""

    prompt: Prompt
    written: Written
    text: str
    scores: Scores


def prompts(records: Sequence[Record], tokenizer: Tokenizer, config: Rollouts, most_tokens: int) -> tuple[list[Prompt], int]:
    """Prompts that leave room for an answer of `max_new_tokens`, and how many do not; of conversations, what stands before the
    last answer. Raises UserError when none does.
    """
    found = [Prompt(record, prompt_ids(record.prompt, tokenizer, config.data.template)) for record in records]
    room = most_tokens - config.max_new_tokens
    fitting = [prompt for prompt in found if len(prompt.ids) <= room]
    if config.data.overlong == "error" and len(fitting) < len(found):
        first = next(prompt for prompt in found if len(prompt.ids) > room)
        raise UserError(
            f"{first.record.place}: the prompt has {len(first.ids)} tokens, and {room} are left beside max_new_tokens ="
            f" {config.max_new_tokens}; shorten it, or use --data.overlong drop"
        )
    if not fitting:
        raise UserError(
            f"no prompt of {len(found)} leaves room for an answer: the shortest has {min(len(p.ids) for p in found)} tokens, and"
            f" {room} are left beside max_new_tokens = {config.max_new_tokens}"
        )
    return fitting, len(found) - len(fitting)


@dataclass(frozen=True, eq=False)
class Step:
    """All answers of this rank in one step, micro-batch by micro-batch, and what is known of them before the update."""

    judged: list[list[Judged]]
    batches: list[Answers]
    scores: list[Tensor]
    """(B,) each: what every answer is worth."""
    hidden: list[Tensor]
    """(B, T, D) each: last hidden states of the policy that wrote them; a value head reads these."""
    old: list[Tensor]
    """(B, T) each: log-probabilities of the answers' tokens under the policy that wrote them."""
    start: list[Tensor]
    """(B, T) each: under the starting model."""
    tokens: float
    """Tokens in the answers of all ranks."""
    facts: dict[str, float]
    """For the log: mean reward and its parts, KL divergence per answer (k3), entropy per token, answers that ended, length."""


class Sampler:
    """Lets the policy answer prompts and the rewards judge the answers; everything follows from step and row."""

    def __init__(
        self, config: Rollouts, ranks: Ranks, model: GPT, tokenizer: Tokenizer, rewards: Rewards, answers_each: int = 1
    ) -> None:
        """Reads the prompts. `answers_each` prompts are answered so many times."""
        self.config, self.ranks, self.model, self.tokenizer, self.rewards = config, ranks, model, tokenizer, rewards
        self.each = answers_each
        self._start = stage.reference(config, model)
        self._ends = end_ids(tokenizer, config.data.template)
        learnt, held = stage.read(config.data, config.seed)
        context = stage.longest(config.data, model)
        (self.learnt, self._dropped), (self.held, _) = (prompts(some, tokenizer, config, context) for some in (learnt, held))
        self._order = Order(tuple(len(prompt.ids) for prompt in self.learnt), config.seed)
        self.total_steps = stage.steps(config, self._order.rows_per_epoch())
        shared = parallel.share_batch(config.batch_size, config.accumulation_steps, ranks.world)
        self._size, self._micro_batches = shared

    @property
    def answers(self) -> int:
        """Answers in a step, of all ranks."""
        return self.config.batch_size * self.config.accumulation_steps * self.each

    def told(self) -> str:
        """The prompts in one line."""
        mean = sum(len(prompt.ids) for prompt in self.learnt) / len(self.learnt)
        lost = f" ({self._dropped:,} dropped: no room for an answer)" if self._dropped else ""
        return (
            f"{len(self.learnt):,} prompts{lost} of {mean:.1f} tokens to learn from, {len(self.held):,} held out;"
            f" {self.answers:,} answers a step, worth {' + '.join(self.config.reward)}"
        )

    def step(self, step: int) -> Step:
        """Sample and judge the answers of a step. Raises UserError on every rank when a reward fails on one."""
        config, judged = self.config, []
        for micro in range(self._micro_batches):
            rows = self._order.share(step, micro, self.ranks.rank, self._size, self._micro_batches, self.ranks.world)
            first = (self.ranks.rank * self._micro_batches + micro) * self._size * self.each
            asked = [self.learnt[index] for (index,) in rows for _ in range(self.each)]
            base = (config.seed * 1_000_003 + step) * 1_000_003 + 1
            judged.append(self.judge(asked, [(base + first + row) % 2**63 for row in range(len(asked))]))
        device, dtype = self.model.head.weight.device, self.model.head.weight.dtype
        batches = [collate([one.prompt.ids for one in some], [one.written for one in some], device) for some in judged]
        scores = [torch.tensor([one.scores.total for one in some], dtype=torch.float64).to(device, dtype) for some in judged]
        with torch.no_grad(), machine.autocast(device, config.precision):
            hidden = [self.model.hidden(batch.ids) for batch in batches]
            old = [self.logps_of(states, batch) for states, batch in zip(hidden, batches, strict=True)]
            with lora.disabled(self.model) if self._start is None else contextlib.nullcontext():
                start = [self.logps(batch, self._start) for batch in batches]
        return Step(judged, batches, scores, hidden, old, start, *self._facts(judged, batches, old, start))

    def logps(self, batch: Answers, model: GPT | None = None) -> Tensor:
        """Log-probabilities (B, T) of the answers' tokens at the policy's temperature, 0 elsewhere."""
        model = model or self.model
        return self.logps_of(model.hidden(batch.ids), batch, model)

    def logps_of(self, hidden: Tensor, batch: Answers, model: GPT | None = None) -> Tensor:
        """The same from the last hidden states (B, T, D)."""
        model = model or self.model
        cap, temperature = model.config.logit_cap, self.config.temperature
        return objectives.token_logprobs(hidden, model.head.weight, batch.targets, cap, temperature)

    def _facts(
        self, judged: list[list[Judged]], batches: list[Answers], old: list[Tensor], start: list[Tensor]
    ) -> tuple[float, dict[str, float]]:
        every = [one for some in judged for one in some]
        names = self.rewards.names
        sums = [
            float(sum(batch.is_token.sum() for batch in batches)),
            float(sum(objectives.k3(o, s).sum() for o, s in zip(old, start, strict=True))),
            float(-sum(o.sum() for o in old)),  # drawn from the policy itself, a token's surprise is its entropy on average
            float(sum(one.written.is_whole for one in every)),
            sum(one.scores.total for one in every),
            *(sum(one.scores.parts[name] for one in every) for name in names),
        ]
        tokens, kl, surprise, whole, reward, *parts = self.ranks.total(sums)
        count = self.answers
        facts = {"reward": reward / count, "kl": kl / count, "entropy": surprise / tokens, "ended": whole / count}
        facts |= {"length": tokens / count}
        if len(names) > 1:
            facts |= {f"reward_{name}": part / count for name, part in zip(names, parts, strict=True)}
        return tokens, facts

    def judge(self, asked: Sequence[Prompt], seeds: Sequence[int]) -> list[Judged]:
        """Answers to these prompts with their scores. Raises UserError on every rank when a reward fails on one."""
        judged: list[Judged] = []
        failure: UserError | None = None
        try:
            judged = self._judge(asked, seeds)
        except UserError as error:
            failure = error
        told = [message for message in self.ranks.gather(None if failure is None else str(failure)) if message is not None]
        if told:
            raise failure or QuietError(told[0])
        return judged

    def _judge(self, asked: Sequence[Prompt], seeds: Sequence[int]) -> list[Judged]:
        written = write(
            self.model,
            [prompt.ids for prompt in asked],
            self._ends,
            seeds,
            max_new_tokens=self.config.max_new_tokens,
            n_ids=self.tokenizer.vocab_size,
            temperature=self.config.temperature,
        )
        texts = [self.tokenizer.decode([i for i in answer.ids if i not in self._ends]) for answer in written]
        answers = [
            Answer(prompt.record.prompt, text, prompt.record.place, prompt.record.fields, answer.is_whole)
            for prompt, text, answer in zip(asked, texts, written, strict=True)
        ]
        return list(map(Judged, asked, written, texts, self.rewards(answers)))

    def measure(self, limit: int = HELD_OUT_ANSWERS) -> tuple[dict[str, float], str]:
        """What sampled answers to held-out prompts are worth (`val_reward`, its parts, `val_length`), and a few of them."""
        count = min(limit, len(self.held))
        rows = range(self.ranks.rank, count, self.ranks.world)
        found = self.judge([self.held[row] for row in rows], [self.config.seed * 1_000_003 + row for row in rows])
        names = self.rewards.names
        sums = [sum(one.scores.total for one in found), sum(float(len(one.written.ids)) for one in found)]
        sums += [sum(one.scores.parts[name] for one in found) for name in names]
        reward, length, *parts = (total / count for total in self.ranks.total(sums))
        told = {"val_reward": reward, "val_length": length}
        told |= {f"val_{name}": part for name, part in zip(names, parts, strict=True)} if len(names) > 1 else {}
        return told, show(found)

    def finish(self, session: Session, entry: dict[str, Any], speed: str) -> None:
        """End the step; before it, where that is due, put the held-out reward into its entry of the log and show some answers.

        A reward that fails on those stops the run too, after a checkpoint of the step.
        """
        failure: UserError | None = None
        try:
            self._report(session, entry)
        except UserError as error:
            failure = error
        session.finish(entry, speed)
        if failure is not None:
            session.save({})
            raise failure

    def _report(self, session: Session, entry: dict[str, Any]) -> None:
        if session.is_due(self.config.eval_interval):
            found, answers = self.measure()
            entry |= found
            session.say(
                f"step {session.step + 1}: held-out reward {entry['val_reward']:.4f}, {entry['val_length']:.1f} tokens an answer"
            )
            if session.is_due(self.config.sample_interval):
                session.progress.show_sample(session.step + 1, answers)


def open_rewards(config: Rollouts, ranks: Ranks) -> Rewards:
    """What the answers are worth, by functions in a process of their own and by trained models on this rank's device."""
    return Rewards(config.reward, seconds=config.reward_seconds, open_model=lambda name: open_scorer(name, ranks.device))


@contextlib.contextmanager
def saved_before(session: Session) -> Iterator[None]:
    """A reward that fails stops the run, with a checkpoint of the steps before it."""
    try:
        yield
    except UserError:
        session.save({})
        raise


def show(judged: Sequence[Judged], count: int = 3) -> str:
    """A few answers with what they are worth, one a line."""
    lines = (
        f"{one.scores.total:+.2f}  {one.prompt.record.prompt[-1].content[-60:]!r} -> {one.text[:80]!r}" for one in judged[:count]
    )
    return "\n".join(lines)
