"""Sources larger than memory: read in blocks, the result is what the whole file would have given."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glassgpt.config import UserError
from glassgpt.data import documents, sources

MARK = "<|endoftext|>"
FIXTURE = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Characters of one to four bytes, whole marks, pieces of marks, both halves of CRLF, a byte order mark in the middle.
PIECES = ["a", "é", "ộ", "\U0001f30d", MARK, MARK, MARK[:5], MARK[5:], "<", "|>", "\r\n", "\r", "\n", "\n", " ", "\ufeff", "\x85"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


def cut(text: str, largest: int) -> list[str]:
    """The rule for a long document: part after the last line end among the first `largest` characters, else there."""
    if len(text) <= largest:
        return [text]
    end = text[:largest].rfind("\n") + 1 or largest
    return [text[:end], *cut(text[end:], largest)]


def whole(data: bytes, largest: int) -> list[str]:
    """Documents of a text file that is held in memory."""
    text = data.decode("utf-8-sig").replace("\r\n", "\n")
    parts = (piece.strip("\n") for part in text.split(MARK) for piece in cut(part, largest))
    return [part for part in parts if part.strip()]


@FIXTURE
@given(
    text=TEXTS,
    mark=st.booleans(),
    block=st.integers(1, 30),
    largest=st.integers(1, 25) | st.just(10**6),
    suffix=st.sampled_from(["", ".gz"]),
)
def test_blocks_do_not_show(text: str, mark: bool, block: int, largest: int, suffix: str, tmp_path: Path) -> None:
    data = b"\xef\xbb\xbf" * mark + text.encode()
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(gzip.compress(data, 1) if suffix else data)
    with patch.object(sources, "READ_BYTES", block), patch.object(sources, "LARGEST_DOCUMENT_CHARACTERS", largest):
        assert list(documents([str(path)])) == whole(data, largest)


@FIXTURE
@given(
    data=st.lists(st.sampled_from(PIECES).map(str.encode) | st.binary(min_size=1, max_size=3), max_size=12).map(b"".join),
    mark=st.booleans(),
    block=st.integers(1, 12),
)
def test_the_first_byte_that_is_not_utf8_is_named(data: bytes, mark: bool, block: int, tmp_path: Path) -> None:
    """Its place is that in the file, with the byte order mark counted."""
    data = b"\xef\xbb\xbf" * mark + data
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with patch.object(sources, "READ_BYTES", block):
        try:
            data.decode()
        except UnicodeDecodeError as error:
            with pytest.raises(UserError, match=rf"not UTF-8 at byte {error.start} \({data[error.start]:#04x}\)"):
                list(documents([str(path)]))
        else:
            assert list(documents([str(path)])) == whole(data, 10**6)


@FIXTURE
@given(texts=st.lists(TEXTS, max_size=8), end=st.sampled_from(["\n", "\r\n", "\n\n"]), block=st.integers(1, 40))
def test_jsonl_in_blocks(texts: list[str], end: str, block: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) + end for text in texts]
    path.write_text("\ufeff" + "".join(lines), encoding="utf-8", newline="")
    with patch.object(sources, "READ_BYTES", block):
        assert list(documents([str(path)])) == [text for text in texts if text.strip()]


def test_a_long_document_is_parted_at_a_line_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LARGEST_DOCUMENT_CHARACTERS", 10)
    path = tmp_path / "a.txt"
    path.write_text(f"one\ntwo\nthree\n{MARK}0123456789{MARK}0123456789abc")
    assert list(documents([str(path)])) == ["one\ntwo", "three", "0123456789", "0123456789", "abc"]
    path.write_text("one\n3456789ab\n")  # the second line end would be the eleventh character and more
    assert list(documents([str(path)])) == ["one", "3456789ab"]
    path.write_text("one\n456789\nten")
    assert list(documents([str(path)])) == ["one", "456789\nten"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_what_comes_before_an_error_is_given_and_its_place_is_exact(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "READ_BYTES", 64)
    line = b'{"text": "m\xe1\xbb\x99t"}\n' if name == "a.jsonl" else b"m\xe1\xbb\x99t<|endoftext|>\r\n"
    data = line * 50 + b"ab\xe1"  # ends within a character
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    found = documents([str(tmp_path / name)])
    assert [next(found) for _ in range(49)] == ["một"] * 49
    with pytest.raises(UserError, match=rf"{name}: not UTF-8 at byte {len(line) * 50 + 2} \(0xe1\)"):
        list(found)


def test_a_line_number_far_into_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "some words"}\n' * 200_000 + b"oops\n"))
    found = documents([str(path)])
    assert sum(1 for _ in zip(range(200_000), found, strict=False)) == 200_000
    with pytest.raises(UserError, match="line 200001: not JSON"):
        next(found)


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 100_000], ids=["an integer too long", "brackets too deep"])
def test_json_that_python_refuses(tmp_path: Path, value: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ok"}\n{"text": "ok", "n": ' + value)
    with pytest.raises(UserError, match="line 2: not JSON"):
        list(documents([str(path)]))


def test_a_wrong_name_is_told_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    found = documents([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])
    with pytest.raises(UserError, match=r"b\.txt: no such file or folder"):
        next(found)
    for name in ("", "\0", "x" * 5000):  # names that no file can have
        with pytest.raises(UserError, match="no such file or folder"):
            list(documents([name]))


# ---------------------------------------------------------------------- memory


def peak_and_count(found: Iterable[str]) -> tuple[int, int]:
    """(bytes held at most, documents) of reading them all."""
    tracemalloc.start()
    try:
        count = sum(1 for _ in found)
        return tracemalloc.get_traced_memory()[1], count
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    line = json.dumps({"text": "words " * 500}) if ".jsonl" in name else "words " * 500 + MARK
    path = tmp_path / name
    with gzip.open(path, "wt", compresslevel=1) as file:
        for _ in range(100):
            file.write((line + "\n") * 200)
    held, count = peak_and_count(documents([str(path)]))
    assert count == 20_000  # 60 MB
    assert held < 10e6


def test_memory_is_bounded_without_any_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LARGEST_DOCUMENT_CHARACTERS", 2**20)
    path = tmp_path / "a.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(60):
            file.write(b"x" * 10**6)
    held, count = peak_and_count(documents([str(path)]))
    assert count == -(-60 * 10**6 // 2**20)
    assert held < 12e6


# ---------------------------------------------------------------------- repeats


def test_repeats_are_dropped() -> None:
    once = sources.Unique()
    assert list(once(["a", "b", " a\n", "A", "b", "\ud800"])) == ["a", "b", "A", "\ud800"]  # the first of each, as it came
    assert once.dropped == 2
    assert list(once(["c", "a"])) == ["c"]  # over calls
    assert once.dropped == 3


def test_repeats_cost_about_100_bytes_a_document() -> None:
    held, _ = peak_and_count(sources.Unique()(f"{number} {'words ' * 100}" for number in range(20_000)))
    assert held < 250 * 20_000  # twice the set for the moment in which it grows; the texts themselves are 600 bytes each
