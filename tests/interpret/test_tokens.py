"""Tokens as they are shown: characters that are cut into several, and everything without ink."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from glassgpt.config import UserError
from glassgpt.interpret.tokens import Piece, label, pieces, visible
from glassgpt.text import Tokenizer
from glassgpt.text.tokenizer import byte_characters

HANOI = "Hà Nội là thủ đô của Việt Nam"
AI = "Trí tuệ nhân tạo đang thay đổi thế giới"


@pytest.fixture(scope="module")
def gpt2(shared: Path) -> Tokenizer:
    return Tokenizer.load(shared / "tokenizer")


@pytest.fixture(scope="module")
def single_bytes() -> Tokenizer:
    """Every byte its own token."""
    return Tokenizer.train([], 257)


def joined(found: list[Piece]) -> str:
    """The text, from what the groups say."""
    by_group = {piece.group: piece.character for piece in found}
    return "".join(by_group.values())


def of_bytes(tokenizer: Tokenizer, data: bytes) -> list[Piece]:
    return pieces(tokenizer, tokenizer.encode_bytes(data))


def lone_bytes(found: list[Piece]) -> int:
    """Tokens that are one byte of a longer character."""
    return sum(piece.is_fragment and len(piece.hex) == 2 for piece in found)


@pytest.mark.parametrize(("text", "characters", "tokens", "lone"), [(HANOI, 29, 27, 13), (AI, 39, 36, 17)])
def test_vietnamese_in_a_vocabulary_made_for_english(gpt2: Tokenizer, text: str, characters: int, tokens: int, lone: int) -> None:
    found = pieces(gpt2, gpt2.encode(text))
    assert (len(text), len(found), lone_bytes(found)) == (characters, tokens, lone)
    assert joined(found) == text.replace(" ", "·")
    assert bytes.fromhex("".join(piece.hex for piece in found)).decode() == text
    assert not any("\ufffd" in piece.text + piece.character for piece in found)


def test_a_character_of_several_tokens_is_one_group(gpt2: Tokenizer) -> None:
    found = pieces(gpt2, gpt2.encode("Nội"))
    assert [(piece.text, piece.hex, piece.group, piece.character) for piece in found] == [
        ("N", "4e", 0, "N"),
        ("e1", "e1", 1, "ộ"),
        ("bb", "bb", 1, "ộ"),
        ("99", "99", 1, "ộ"),
        ("i", "69", 2, "i"),
    ]
    assert [piece.is_fragment for piece in found] == [False, True, True, True, False]


def test_a_fragment_with_a_space_is_shown_in_bytes(gpt2: Tokenizer) -> None:
    found = pieces(gpt2, gpt2.encode("a ộ"))
    assert found[0].text == "a"
    assert {(piece.group, piece.character) for piece in found[1:]} == {(1, "·ộ")}
    assert " ".join(piece.text for piece in found[1:]) == "20 e1 bb 99"


def test_emoji(gpt2: Tokenizer) -> None:
    text = "ok 👍🏽, 👨‍👩‍👧"
    found = pieces(gpt2, gpt2.encode(text))
    assert joined(found) == visible(text)
    assert "U+200D" in joined(found)  # the joiner between the people
    thumb = [piece for piece in found if "👍" in piece.character]
    assert len({piece.group for piece in thumb}) == 1 and " ".join(piece.text for piece in thumb) == "20 f0 9f 91 8d"


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"a\xe1\xbb", [("a", "a"), ("e1", ""), ("bb", "")]),  # the end is missing, as in a text being written
        (b"\x99a", [("99", ""), ("a", "a")]),  # a continuation of nothing
        (b"\xc3a", [("c3", ""), ("a", "a")]),  # a start and no continuation
        (b"\xed\xa0\x80", [("ed", ""), ("a0", ""), ("80", "")]),  # half of a surrogate pair
        (b"\xc0\x80", [("c0", ""), ("80", "")]),  # longer than need be
        (b"\xff\xc3\xa0", [("ff", ""), ("c3", "à"), ("a0", "à")]),
        (b"\xef\xbf\xbd", [("ef", "U+FFFD"), ("bf", "U+FFFD"), ("bd", "U+FFFD")]),  # the character itself
    ],
)
def test_bytes_that_are_not_text(single_bytes: Tokenizer, data: bytes, shown: list[tuple[str, str]]) -> None:
    assert [(piece.text, piece.character) for piece in of_bytes(single_bytes, data)] == shown


def test_a_token_that_ends_inside_a_character_at_the_end_of_the_text(gpt2: Tokenizer) -> None:
    (piece,) = pieces(gpt2, [next(i for i in range(gpt2.vocab_size) if gpt2.token_bytes(i) == b" \xe2\x80")])
    assert (piece.text, piece.character, piece.is_fragment) == ("20 e2 80", "", True)


def test_any_bytes_are_shown_and_never_as_the_replacement_character(gpt2: Tokenizer, single_bytes: Tokenizer) -> None:
    draw = random.Random(0)
    for tokenizer in (gpt2, single_bytes):
        for _ in range(200):
            data = draw.randbytes(12)
            found = of_bytes(tokenizer, data)
            assert bytes.fromhex("".join(piece.hex for piece in found)) == data
            assert not any("\ufffd" in piece.text + piece.character for piece in found)
            valid = visible(data.decode("utf-8", errors="ignore"))
            assert joined(found).replace("◌", "") == valid.replace("◌", "")  # marks stand alone in pieces
            numbers = [piece.group for piece in found]
            assert numbers == sorted(numbers) and set(numbers) == set(range(numbers[-1] + 1))


def test_every_token_of_the_vocabulary_alone(gpt2: Tokenizer) -> None:
    whole = fragments = 0
    for token_id in range(gpt2.vocab_size):
        (piece,) = pieces(gpt2, [token_id])
        assert "\ufffd" not in piece.text and piece.text and " " not in piece.character
        whole, fragments = whole + (not piece.is_fragment), fragments + piece.is_fragment
        assert piece.is_fragment == (not _is_utf8(gpt2.token_bytes(token_id)))
    assert whole + fragments == 50_257 and fragments > 128


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_the_end_of_a_text_breaks_a_character(gpt2: Tokenizer) -> None:
    first, second = gpt2.encode("\u0301")  # of two bytes
    found = pieces(gpt2, [first, gpt2.end_id or 0, second])
    assert [(piece.text, piece.character) for piece in found] == [("cc", ""), ("<|endoftext|>", "<|endoftext|>"), ("81", "")]
    assert len({piece.group for piece in found}) == 3


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" a  b", "·a··b"),
        ("a\n\tb\r\n", "a↵→b␍↵"),
        ("\x00\u200b\u00a0", "U+0000U+200BU+00A0"),
        ("e\u0301", "e\u0301"),  # a mark on a letter is as it is
        ("\u0301x", "◌\u0301x"),
        ("", ""),
    ],
)
def test_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_a_row_that_the_vocabulary_lacks(gpt2: Tokenizer) -> None:
    assert (label(gpt2, 262), label(gpt2, 50_300)) == ("·the", "id 50300")
    assert pieces(gpt2, []) == []
    with pytest.raises(UserError, match="token id 50300 is outside"):
        pieces(gpt2, [262, 50_300])


def test_a_vocabulary_with_holes() -> None:
    """Ids that are left out have no bytes; they do not part what is around them."""
    import tokenizers

    ids = byte_characters() | {"ab": 300}
    holed = Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE(ids, [])))
    found = pieces(holed, [0xC3, 280, 0xA0, 280, 300])
    assert [(piece.text, piece.group, piece.character) for piece in found] == [
        ("c3", 0, "à"), ("", 0, "à"), ("a0", 0, "à"), ("", 1, ""), ("ab", 2, "ab"),
    ]  # fmt: skip
    assert not found[3].is_fragment
