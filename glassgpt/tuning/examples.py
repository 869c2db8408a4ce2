"""Records to tokens: what is learnt of each example, which ones fit, and batches of them as a pure function of the step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from glassgpt.config import UserError
from glassgpt.data.records import Record
from glassgpt.text import Tokenizer, chat
from glassgpt.text.chat import Encoded, Message
from glassgpt.train.loss import IGNORE

OPEN_ROWS = 64
"""Rows that packing keeps open: an example goes into the first of them that has room."""


@dataclass(frozen=True, eq=False)
class Example:
    """One instruction with its response, as tokens."""

    ids: list[int]
    """The whole text."""
    mask: list[bool]
    """Which tokens the assistant writes."""
    place: str
    """Where it stands: file and line."""

    @property
    def n_response(self) -> int:
        """|A|: tokens of the response, its end included."""
        return sum(self.mask)

    @property
    def n_instruction(self) -> int:
        """|Q|: all the others."""
        return len(self.ids) - self.n_response


# ---------------------------------------------------------------------- text to tokens


def encode(messages: Sequence[Message], answer: Sequence[Message], tokenizer: Tokenizer, template: str) -> Encoded:
    """A prompt and what follows it. Only `answer` is to be learnt when it is given, else every turn of the assistant.

    `template` none joins one prompt and one answer as plain text, and ends it with the end-of-text token.
    """
    if template == "chat":
        ids, mask = chat.render([*messages, *answer], tokenizer)
        if answer:
            asked = len(chat.prompt(messages, tokenizer))
            mask = [learnt and place >= asked for place, learnt in enumerate(mask)]
        return Encoded(ids, mask)
    if not answer:
        messages, answer = messages[:-1], messages[-1:]
    prompt, response = prompt_ids(messages, tokenizer, template), tokenizer.encode(_only(answer), inside=True)
    response += [] if tokenizer.end_id is None else [tokenizer.end_id]
    return Encoded([*prompt, *response], [False] * len(prompt) + [True] * len(response))


def prompt_ids(messages: Sequence[Message], tokenizer: Tokenizer, template: str) -> list[int]:
    """What a model is served to answer these messages: the ids before the answer in `encode`."""
    return chat.prompt(messages, tokenizer) if template == "chat" else tokenizer.encode_start(_only(messages))


def end_ids(tokenizer: Tokenizer, template: str) -> list[int]:
    """The tokens that end an answer."""
    if template == "chat":
        return chat.end_ids(tokenizer)
    return [] if tokenizer.end_id is None else [tokenizer.end_id]


def _only(messages: Sequence[Message]) -> str:
    if len(messages) != 1:
        raise UserError(
            f"--data.template none joins one prompt and one answer; got {len(messages)} messages for one (use template chat)"
        )
    return messages[0].content


# ---------------------------------------------------------------------- which ones fit


@dataclass
class Audit:
    """What became of a file's examples: the answer to "what will it learn?" before any training."""

    examples: list[Example] = field(default_factory=list)
    """Those that are kept."""
    dropped: Counter[str] = field(default_factory=Counter)
    """How many are not, by reason."""
    truncated: int = 0
    """Kept, but without the end of their response."""
    ended: int = 0
    """Kept, and the token that ends the answer is learnt."""

    @property
    def supervised(self) -> int:
        """Tokens to be learnt."""
        return sum(example.n_response for example in self.examples)

    @property
    def masked(self) -> int:
        """Tokens that are only read."""
        return sum(example.n_instruction for example in self.examples)


def fit(
    candidates: Sequence[Example], max_tokens: int, overlong: Literal["drop", "truncate", "error"], ends: Sequence[int]
) -> Audit:
    """Keep what has |Q| + |A| <= max_tokens. An instruction is never cut: an example whose instruction leaves no room is dropped.

    Raises UserError for a long example under `error`, and when nothing is left to be learnt.
    """
    return fit_together([(example,) for example in candidates], max_tokens, overlong, ends)[1]


def fit_together(
    items: Sequence[tuple[Example, ...]], max_tokens: int, overlong: Literal["drop", "truncate", "error"], ends: Sequence[int]
) -> tuple[list[tuple[int, tuple[Example, ...]]], Audit]:
    """`fit` for texts that stay together: an item is kept when all of its texts are. Returns (number, texts) of the kept ones."""
    audit, kept = Audit(), []
    for number, item in enumerate(items):
        texts = [example if len(example.ids) <= max_tokens else _shortened(example, max_tokens, overlong) for example in item]
        found = [text for text in texts if isinstance(text, Example)]
        reasons = [text for text in texts if isinstance(text, str)]
        reasons += ["nothing to learn in it" for text in found if not any(text.mask[1:])]
        if len(item) == 2 and item[0].ids == item[1].ids:
            reasons.append("two equal answers")
        if reasons:
            audit.dropped[reasons[0]] += 1
            continue
        kept.append((number, tuple(found)))
        audit.examples += found
        audit.truncated += sum(len(new.ids) < len(old.ids) for new, old in zip(found, item, strict=True))
        audit.ended += sum(text.ids[-1] in ends and text.mask[-1] for text in found)
    if not kept:
        reasons = [f"{count} {reason}" for reason, count in audit.dropped.items()]
        raise UserError(
            f"nothing to learn: of {len(items)} examples none is left ({', '.join(reasons) or 'there were none'});"
            f" an example may have {max_tokens} tokens"
        )
    return kept, audit


def _shortened(example: Example, max_tokens: int, overlong: str) -> Example | str:
    """A long example as the policy has it, or why it is dropped."""
    if overlong == "error":
        raise UserError(
            f"{example.place}: {example.n_instruction} tokens of instruction and {example.n_response} of response are more"
            f" than {max_tokens} (data.max_tokens or context); shorten it, or try --data.overlong drop or truncate"
        )
    if overlong == "drop":
        return "too long"
    cut = truncated(example, max_tokens)
    return cut if cut.n_response else "its instruction alone is too long"


def truncated(example: Example, max_tokens: int) -> Example:
    """Without what is beyond max_tokens, and then without a following instruction that nothing answers."""
    last = max((place for place, learnt in enumerate(example.mask[:max_tokens]) if learnt), default=-1)
    return Example(example.ids[: last + 1], example.mask[: last + 1], example.place)


def conversations(records: Sequence[Record], tokenizer: Tokenizer, template: str) -> list[Example]:
    """Records with an answer as examples of which every turn of the assistant is learnt.

    Raises UserError, naming the place, for a record without one: a pair or a bare prompt.
    """
    examples = []
    for record in records:
        if record.rejected or record.label is not None:
            raise UserError(
                f"{record.place}: recognised as {record.shape}, which has no single answer to imitate; train on it with"
                " `glassgpt dpo` or `glassgpt reward`"
            )
        if not any(message.role == "assistant" for message in record.messages):
            raise UserError(f"{record.place}: recognised as {record.shape}: a prompt without an answer, so nothing can be learnt")
        examples.append(_named(record, record.messages, (), tokenizer, template))
    return examples


class Pair(NamedTuple):
    """A prompt with a better and a worse answer."""

    chosen: Example
    rejected: Example


def pairs(records: Sequence[Record], tokenizer: Tokenizer, template: str) -> list[Pair]:
    """Records as pairs. Raises UserError, naming the place, for one that is none."""
    found = []
    for record in records:
        if not record.rejected:
            raise UserError(f"{record.place}: recognised as {record.shape}; pairs have fields prompt, chosen and rejected")
        chosen, rejected = (
            _named(record, record.messages, answer, tokenizer, template) for answer in (record.chosen, record.rejected)
        )
        found.append(Pair(chosen, rejected))
    return found


class Judged(NamedTuple):
    """One answer that is good or bad."""

    answer: Example
    mismatched: Example
    """The same prompt with the answer of the next record: what KTO measures the model's drift on."""
    is_good: bool


def judged(records: Sequence[Record], tokenizer: Tokenizer, template: str) -> list[Judged]:
    """Records as labelled answers, of a pair its two. Raises UserError, naming the place, for one that has no label."""
    singles: list[tuple[Record, Sequence[Message], bool]] = []
    for record in records:
        if record.rejected:
            singles += [(record, record.chosen, True), (record, record.rejected, False)]
        elif record.label is not None:
            singles.append((record, record.chosen, record.label))
        else:
            raise UserError(
                f"{record.place}: recognised as {record.shape}; kto wants fields prompt, completion and label, or pairs"
            )
    step = 2 if records[0].rejected else 1  # the other answer of a pair is to the same prompt
    found = []
    for number, (record, answer, is_good) in enumerate(singles):
        _, other, _ = singles[(number + step) % len(singles)]
        own, mismatched = (_named(record, record.messages, some, tokenizer, template) for some in (answer, other))
        found.append(Judged(own, mismatched, is_good))
    return found


def _named(
    record: Record, messages: Sequence[Message], answer: Sequence[Message], tokenizer: Tokenizer, template: str
) -> Example:
    try:
        return Example(*encode(messages, answer, tokenizer, template), record.place)
    except UserError as error:
        raise UserError(f"{record.place}: {error}") from error


# ---------------------------------------------------------------------- tokens to batches


@dataclass(frozen=True, eq=False)
class Rows:
    """Examples side by side, padded on the right; a row may hold several."""

    ids: Tensor
    """(B, T) int64."""
    targets: Tensor
    """(B, T) int64: `ids` one position further, IGNORE where nothing is learnt."""
    weights: Tensor
    """(B, T): what each target counts."""
    segments: Tensor | None
    """(B, T) int64: number of the example within its row, None where every row holds one."""
    places: list[str]
    """Where the examples of each row stand."""

    @property
    def count(self) -> float:
        """What the summed loss of the step is divided by: this batch's part."""
        return float(self.weights.sum())

    def to(self, device: torch.device) -> Rows:
        segments = None if self.segments is None else self.segments.to(device)
        return Rows(self.ids.to(device), self.targets.to(device), self.weights.to(device), segments, self.places)


def collate(rows: Sequence[Sequence[Example]], prompt_weight: float = 0.0, average: str = "token") -> Rows:
    """Rows of examples as tensors. Tokens outside the responses weigh `prompt_weight`, those inside 1.

    With `average` example, the weights of each example are divided by their sum.
    """
    T = max(sum(len(example.ids) - 1 for example in row) for row in rows)
    ids, targets, weights, segments = (np.zeros((len(rows), T), kind) for kind in (np.int64, np.int64, np.float64, np.int64))
    targets += IGNORE
    for number, row in enumerate(rows):
        at = 0
        for segment, example in enumerate(row):
            end = at + len(example.ids) - 1
            worth = np.where(example.mask[1:], 1.0, prompt_weight)
            if average == "example":
                worth /= max(worth.sum(), 1e-30)
            ids[number, at:end] = example.ids[:-1]
            targets[number, at:end] = np.where(worth > 0, example.ids[1:], IGNORE)
            weights[number, at:end] = worth
            segments[number, at:end] = segment
            at = end
        segments[number, at:] = len(row)  # padding sees itself alone
    is_packed = any(len(row) > 1 for row in rows)
    return Rows(
        torch.from_numpy(ids),
        torch.from_numpy(targets),
        torch.from_numpy(weights),
        torch.from_numpy(segments) if is_packed else None,
        [", ".join(example.place for example in row) for row in rows],
    )


@dataclass(frozen=True, eq=False)
class Order:
    """The endless sequence of rows: every epoch visits each example once, in a new order that follows from the seed."""

    lengths: tuple[int, ...]
    """Tokens of each example."""
    seed: int
    row_tokens: int | None = None
    """Pack examples into rows of so many inputs; None gives each example a row of its own."""

    def rows_per_epoch(self, epoch: int = 0) -> int:
        if self.row_tokens is None:
            return len(self.lengths)
        return _row_count(self.lengths, self.seed, epoch, self.row_tokens)

    def rows(self, start: int, count: int) -> list[tuple[int, ...]]:
        """The examples of `count` rows from number `start` on, counted over all epochs."""
        found: list[tuple[int, ...]] = []
        epoch = 0
        if self.row_tokens is None:
            epoch, start = divmod(start, len(self.lengths))
        while len(found) < count:
            if start < (there := self.rows_per_epoch(epoch)):
                found += _packed(self.lengths, self.seed, epoch, self.row_tokens)[start : start + count - len(found)]
            start, epoch = max(0, start - there), epoch + 1
        return found

    def share(self, step: int, micro: int, rank: int, size: int, micro_batches: int, world: int) -> list[tuple[int, ...]]:
        """Rows of one micro-batch of one rank: a step is the same rows however they are shared out."""
        mine = size * micro_batches
        return self.rows(step * mine * world + rank * mine + micro * size, size)


@cache
def _row_count(lengths: tuple[int, ...], seed: int, epoch: int, row_tokens: int | None) -> int:
    """Numbers stay when the rows themselves are forgotten: a later epoch is found without packing all before it again."""
    return len(_packed(lengths, seed, epoch, row_tokens))


@lru_cache(maxsize=4)
def _packed(lengths: tuple[int, ...], seed: int, epoch: int, row_tokens: int | None) -> tuple[tuple[int, ...], ...]:
    order = np.random.default_rng((seed, epoch)).permutation(len(lengths)).tolist()
    if row_tokens is None:
        return tuple((index,) for index in order)
    closed: list[list[int]] = []
    opened: list[tuple[int, list[int]]] = []  # room left, examples
    for index in order:
        need = lengths[index] - 1
        place = next((n for n, (room, _) in enumerate(opened) if room >= need), None)
        if place is None:
            opened.append((row_tokens - need, [index]))
        else:
            room, row = opened[place]
            opened[place] = (room - need, [*row, index])
        if len(opened) > OPEN_ROWS:
            fullest = min(range(len(opened)), key=lambda n: opened[n][0])
            closed.append(opened.pop(fullest)[1])
    rows = [*closed, *(row for _, row in opened)]
    return tuple(map(tuple, rows))
