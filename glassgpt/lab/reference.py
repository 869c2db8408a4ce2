"""Real text as a yardstick: one part that is known (its words, its 3-grams), and texts of another part to measure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from glassgpt import data
from glassgpt.config import UserError
from glassgpt.lab.text_measures import words
from glassgpt.text import Tokenizer

FEW_DOCUMENTS = 20
"""With fewer, the beginning of each document is known and its end is measured."""
LARGEST_CHARACTERS = 8_000_000
"""More of the reference is not read: counts of 3-grams would not fit in memory."""


@dataclass(frozen=True, eq=False)
class Reference:
    """Token ids and words of real text."""

    known: list[list[int]]
    """Documents that a judge may learn from."""
    words: frozenset[str]
    """The words in them."""
    pieces: list[tuple[list[int], list[int]]]
    """From other documents, in random order, without overlap: (ids before, ids to measure)."""


def documents(sources: Sequence[str], holdout_share: float) -> list[str]:
    """The documents of the sources, or those that `pretrain` holds out; at most LARGEST_CHARACTERS in all."""
    found = data.documents(sources)
    if holdout_share < 1:
        found = (text for split, text in data.shards.hold_out(found, holdout_share) if split == "val")
    read: list[str] = []
    size = 0
    for text in found:
        if read and size + len(text) > LARGEST_CHARACTERS:
            break
        read.append(text)
        size += len(text)
    if not read:
        raise UserError(f"{' '.join(sources)}: no text in it; give files with text")
    return read


def read(sources: Sequence[str], holdout_share: float, tokenizer: Tokenizer, before: int, length: int, seed: int) -> Reference:
    """Half of the documents are known, of the others come pieces of `before` + `length` tokens.

    Raises UserError when nothing is left to measure.
    """
    texts = documents(sources, holdout_share)
    draw = random.Random(seed)
    draw.shuffle(texts)
    if len(texts) < FEW_DOCUMENTS:
        parts = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts]
        known, other = [part[0] for part in parts], [part[1] for part in parts]
    else:
        known, other = texts[::2], texts[1::2]
    pieces = []
    for ids in tokenizer.encode_batch(other):
        spare = len(ids) % (before + length)
        starts = range(draw.randint(0, spare), len(ids) - before - length + 1, before + length)
        pieces += [(ids[start : start + before], ids[start + before : start + before + length]) for start in starts]
    if not pieces:
        raise UserError(
            f"{' '.join(sources)}: no document has {2 * (before + length)} tokens; give longer text or fewer new_tokens"
        )
    draw.shuffle(pieces)
    return Reference(tokenizer.encode_batch(known), frozenset(word for text in known for word in words(text)), pieces)
