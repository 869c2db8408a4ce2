"""The tokenizer against GPT-2's published vectors, and its promises for any text and any bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from glassgpt.config import UserError
from glassgpt.text import END_OF_TEXT, Tokenizer
from glassgpt.text.tokenizer import byte_characters

SPLIT_CHARACTERS = "👋🏽 Tiếng Việt: ữ ằ ỗ — 🌍👩‍🚀 naïve, 漢字"
quick = settings(max_examples=60, deadline=None)


@pytest.fixture(scope="module")
def gpt2(shared: Path) -> Tokenizer:
    return Tokenizer.load(shared / "tokenizer")  # encoder.json + vocab.bpe


@pytest.fixture(scope="module")
def vectors(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "tokenizer" / "gpt2_test_vectors.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------- GPT-2's vectors


def test_gpt2_sizes(gpt2: Tokenizer, vectors: dict[str, Any]) -> None:
    assert (gpt2.vocab_size, gpt2.end_id) == (vectors["vocab_size"], vectors["end_of_text"]["id"])


def test_gpt2_encode_vectors(gpt2: Tokenizer, vectors: dict[str, Any]) -> None:
    assert len(vectors["encode"]) == 160
    wrong = [case["text"] for case in vectors["encode"] if gpt2.encode(case["text"]) != case["ids"]]
    assert wrong == []
    texts = [case["text"] for case in vectors["encode"]]
    assert gpt2.encode_batch(texts) == [case["ids"] for case in vectors["encode"]]
    assert [gpt2.decode(case["ids"]) for case in vectors["encode"]] == texts


def test_gpt2_special_token_vectors(gpt2: Tokenizer, vectors: dict[str, Any]) -> None:
    assert vectors["special"]
    for case in vectors["special"]:
        assert gpt2.encode(case["text"], allow_special=True) == case["ids_with_special_allowed"]
        assert gpt2.encode(case["text"]) == case["ids_as_ordinary_text"]  # after the other: no state may stay behind


def test_gpt2_decode_vectors(gpt2: Tokenizer, vectors: dict[str, Any]) -> None:
    assert any("�" in case["utf8_replace"] for case in vectors["decode"])  # some are incomplete UTF-8
    for case in vectors["decode"]:
        assert gpt2.decode_bytes(case["ids"]).hex() == case["bytes_hex"]
        assert gpt2.decode(case["ids"]) == case["utf8_replace"]


def test_toy_merges(vectors: dict[str, Any], tmp_path: Path) -> None:
    toy = vectors["toy_bpe"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(toy["vocab_in_id_order"])}))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *toy["merges"]]))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode(" " + toy["text"]) == toy["ids"]
    assert tokenizer.end_id == toy["vocab_in_id_order"].index(END_OF_TEXT)


# ---------------------------------------------------------------------- files


def test_every_layout_is_the_same_tokenizer(gpt2: Tokenizer, shared: Path, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    ours.mkdir()
    shutil.copy(shared / "tokenizer" / "encoder.json", theirs / "vocab.json")
    shutil.copy(shared / "tokenizer" / "vocab.bpe", theirs / "merges.txt")
    gpt2.save(ours)
    text = f"Hello world {SPLIT_CHARACTERS}"
    for path in (theirs, ours, ours / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.sha256 == gpt2.sha256
        assert loaded.encode(text) == gpt2.encode(text)
        assert loaded.encode(END_OF_TEXT, allow_special=True) == [50256]


def test_save_and_load_keep_the_hash(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.encode(END_OF_TEXT, allow_special=True)  # how it was used must not show in the hash
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.encode("the cat") == tokenizer.encode("the cat")
    assert Tokenizer.train(["quite another text"], 270).sha256 != tokenizer.sha256


def test_ids_left_out_count_in_the_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 9}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("ab") == [9]
    assert tokenizer.vocab_size == 10  # an embedding of this many rows holds every id
    assert len(tokenizer.byte_lengths()) == 10


# ---------------------------------------------------------------------- training


def test_training() -> None:
    text = "she sells sea shells on the sea shore; the shells she sells are sea shells. " * 10
    plain, merged = Tokenizer.train([text], 257), Tokenizer.train([text], 270)
    assert (plain.vocab_size, merged.vocab_size) == (257, 270)
    assert len(plain.encode(text)) == len(text.encode())  # 256 bytes and the end: no merges
    assert len(merged.encode(text)) < len(text) * 0.6
    assert merged.sha256 == Tokenizer.train([text], 270).sha256
    assert merged.end_id is not None
    assert merged.decode([merged.end_id]) == END_OF_TEXT
    with pytest.raises(UserError, match="at least 257"):
        Tokenizer.train([text], 256)


def test_byte_lengths_are_the_bytes_of_the_text(tokenizer: Tokenizer) -> None:
    lengths = tokenizer.byte_lengths()
    assert len(lengths) == tokenizer.vocab_size
    assert sum(lengths[i] for i in tokenizer.encode(SPLIT_CHARACTERS)) == len(SPLIT_CHARACTERS.encode())
    assert tokenizer.end_id is not None
    assert lengths[tokenizer.end_id] == 0


def test_byte_characters_cover_every_byte_once() -> None:
    table = byte_characters()
    assert sorted(table.values()) == list(range(256))
    assert (table["A"], table["Ġ"], table["Ċ"]) == (ord("A"), ord(" "), ord("\n"))
    assert not any(character.isspace() for character in table)


# ---------------------------------------------------------------------- any text, any bytes


@given(st.text())
@quick
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode(tokenizer.encode(text + END_OF_TEXT + text, allow_special=True)) == text + END_OF_TEXT + text
    assert tokenizer.encode_bytes(text.encode()) == ids


@given(st.lists(st.one_of(st.binary(), st.text().map(str.encode))).map(b"".join))
@quick
def test_any_bytes_come_back(tokenizer: Tokenizer, data: bytes) -> None:
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",), exclude_characters="�")))
@quick
def test_streamed_text_is_the_text(tokenizer: Tokenizer, text: str) -> None:
    pieces = list(tokenizer.stream(tokenizer.encode(text)))
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)


def test_streaming_waits_for_whole_characters(gpt2: Tokenizer) -> None:
    ids = gpt2.encode(SPLIT_CHARACTERS)
    pieces = list(gpt2.stream(ids))
    assert any("�" in gpt2.decode([token_id]) for token_id in ids)  # characters are split across tokens here
    assert "" in pieces
    assert not any("�" in piece for piece in pieces)
    assert "".join(pieces) == SPLIT_CHARACTERS
    assert list(gpt2.stream(ids[:1])) == ["", "�"]  # a character that never ends is shown as broken, at the end
    assert len(ids) == len(pieces)


def test_streaming_is_one_piece_per_id(gpt2: Tokenizer) -> None:
    arrived = []

    def source() -> Any:
        for token_id in gpt2.encode("one two three"):
            arrived.append(token_id)
            yield token_id

    counts = [(len(arrived), piece) for piece in gpt2.stream(source())]
    assert counts == [(1, "one"), (2, " two"), (3, " three")]


# ---------------------------------------------------------------------- errors


def test_a_missing_tokenizer_names_what_was_looked_for(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError) as caught:
            Tokenizer.load(path)
        for name in (str(path), "tokenizer.json", "vocab.json + merges.txt", "encoder.json + vocab.bpe"):
            assert name in str(caught.value)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"tokenizer.json": '{"model": '}, "tokenizer.json"),
        ({"tokenizer.json": "[]"}, "tokenizer.json"),
        ({"vocab.json": '{"a": 0', "merges.txt": ""}, "cannot read"),
        ({"vocab.json": "[1, 2]", "merges.txt": ""}, "cannot read"),
        ({"vocab.json": '{"a": 0, "b": 1, "ab": 2}', "merges.txt": "#version: 0.2\na b c\n"}, "merges.txt.*'a b c'"),
        ({"vocab.json": '{"a": 0, "b": 1, "ab": 2}', "merges.txt": "ab\n"}, "merges.txt.*'ab'"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a z\n"}, "z"),
    ],
)
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, files: dict[str, str], named: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=named) as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer) -> None:
    for token_id in (tokenizer.vocab_size, -1):
        with pytest.raises(UserError, match=rf"{token_id} is outside the vocabulary \(0 to {tokenizer.vocab_size - 1}\)"):
            tokenizer.decode([0, token_id])


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="not valid Unicode"):
        tokenizer.encode("half a pair: \ud83d")


def test_bytes_need_a_byte_level_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(UserError, match="tokens for 1 of 256 bytes"):
        Tokenizer.load(tmp_path).encode_bytes(b"\xff")


# ---------------------------------------------------------------------- SentencePiece's way


def test_tokens_that_are_text_with_bytes_beside_them() -> None:
    """As Llama 2 and Mistral have them: `▁` for a space, `<0xNN>` for what no token has, a space before the text."""
    words = ["▁", "t", "h", "e", "c", "a", "▁t", "▁th", "▁the", "</s>"]
    vocabulary = {piece: n for n, piece in enumerate([*(f"<0x{byte:02X}>" for byte in range(256)), *words])}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, byte_fallback=True))
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    backend.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode("the cat ế\n")
    assert ids[0] == vocabulary["▁the"]
    assert tokenizer.decode(ids) == " the cat ế\n"
    assert "".join(tokenizer.stream(ids)) == " the cat ế\n"
    assert tokenizer.byte_lengths()[vocabulary["▁the"]] == 4 and tokenizer.byte_lengths()[10] == 1
    assert (tokenizer.end_token, tokenizer.end_id) == ("</s>", vocabulary["</s>"])
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(b"the\xff")) == b" the\xff"


def test_the_token_that_begins_texts() -> None:
    """What a vocabulary's own template puts before a text; GPT-2's puts nothing."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "<s>": 1}, []))
    backend.add_special_tokens(["<s>"])
    assert Tokenizer(backend).begin_id is None and Tokenizer(backend).encode_start("aa") == [0, 0]
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = Tokenizer(backend)
    assert (tokenizer.begin_id, tokenizer.encode("aa"), tokenizer.encode_start("aa")) == (1, [0, 0], [1, 0, 0])
