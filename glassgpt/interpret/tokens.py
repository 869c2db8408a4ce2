"""Tokens for people to look at: spaces that show, and the bytes of characters that the vocabulary has cut into several tokens."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from glassgpt.text import Tokenizer

SYMBOLS = {" ": "·", "\n": "↵", "\t": "→", "\r": "␍"}
DOTTED_CIRCLE = "◌"
"""What Unicode puts under a combining mark that stands alone."""


@dataclass(frozen=True)
class Piece:
    """One token of a text, ready to be shown. Tokens that share a character (or several) form a group; others stand alone."""

    text: str
    """What the token says, as `visible` has it; its bytes (`hex`) when it holds only a part of a character."""
    id: int
    hex: str
    """Its bytes, as in "e1 bb 99"."""
    group: int
    """Number of its group, counted from 0 along the text."""
    character: str
    """What the whole group says, as `visible` has it; empty where the bytes are not UTF-8."""

    @property
    def is_fragment(self) -> bool:
        """Whether `text` is bytes."""
        return self.text != self.character


def pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> list[Piece]:
    """Each token of a text, in order. Raises UserError for an id outside the vocabulary.

    A byte-level BPE (Radford et al. 2019, §2.2) may part a character's UTF-8 bytes: to GPT-2 "ộ" is three tokens, e1, bb and
    99, which become one group here. A token of such a group that has whole characters too (" " before e1) is shown in bytes.
    """
    ids = [int(token_id) for token_id in ids]
    tokens = [tokenizer.token_bytes(token_id) for token_id in ids]
    inside = _inside_characters(b"".join(tokens))
    found: list[Piece] = []
    start = end = 0  # the group's first token, the bytes so far
    for here, data in enumerate(tokens):
        end += len(data)
        if end in inside:
            continue  # the next token has the rest of this character
        found += _group(ids[start : here + 1], tokens[start : here + 1], found[-1].group + 1 if found else 0)
        start = here + 1
    return found


def _group(ids: list[int], tokens: list[bytes], number: int) -> list[Piece]:
    """Tokens that together hold whole characters, or bytes that are not UTF-8."""
    try:
        character = visible(b"".join(tokens).decode("utf-8"))
    except UnicodeDecodeError:
        character = ""
    is_whole = len(tokens) == 1 and (character or not tokens[0])
    return [
        Piece(character if is_whole else data.hex(" "), token_id, data.hex(" "), number, character)
        for token_id, data in zip(ids, tokens, strict=True)
    ]


def _inside_characters(data: bytes) -> set[int]:
    """The places between bytes at which a character is cut; a byte that is not UTF-8 stands alone."""
    inside: set[int] = set()
    place = 0
    for character in data.decode("utf-8", errors="surrogateescape"):
        length = len(character.encode("utf-8", errors="surrogateescape"))
        inside.update(range(place + 1, place + length))
        place += length
    return inside


def label(tokenizer: Tokenizer, token_id: int) -> str:
    """One token by itself, as in a list of predictions; "id 50300" where a model has more rows than the vocabulary tokens."""
    return pieces(tokenizer, [token_id])[0].text if 0 <= token_id < tokenizer.vocab_size else f"id {token_id}"


def visible(text: str) -> str:
    """Text in which everything shows: spaces as "·", newlines as "↵", others without ink as their number, "U+200B".

    Never has U+FFFD, the sign for bytes that could not be read: where the text itself has one it is "U+FFFD" in letters.
    """
    shown = "".join(map(_shown, text))
    return DOTTED_CIRCLE + shown if text and unicodedata.category(text[0]) == "Mn" else shown


def _shown(character: str) -> str:
    if character in SYMBOLS:
        return SYMBOLS[character]
    has_ink = unicodedata.category(character)[0] not in "CZ" and character != "\N{REPLACEMENT CHARACTER}"
    return character if has_ink else f"U+{ord(character):04X}"
