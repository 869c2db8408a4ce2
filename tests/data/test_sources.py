"""Documents out of files."""

from __future__ import annotations

import gzip
import json
import sysconfig
import time
from itertools import islice
from pathlib import Path

import pytest

from glassgpt.config import UserError
from glassgpt.data import EMBEDDED, documents


def read(*paths: Path) -> list[str]:
    return list(documents(map(str, paths)))


def test_a_text_file_is_parted_at_marks(tmp_path: Path) -> None:
    path = tmp_path / "tales.txt"
    path.write_text("One.\n\nStill one.\n<|endoftext|>\nTwo.\n<|endoftext|>\n \n<|endoftext|>  three\n", encoding="utf-8")
    assert read(path) == ["One.\n\nStill one.", "Two.", "  three"]


def test_byte_order_mark_and_crlf_go(tmp_path: Path) -> None:
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbfm\xe1\xbb\x99t\r\nhai\r\n")
    assert read(path) == ["một\nhai"]


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records = [
        {"text": "first"},
        {"text": "has <|endoftext|> inside\nand a line", "title": "ignored"},
        {"text": "\U0001f30d"},
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(json.dumps(record) for record in records).encode() + b"\n")
    assert read(path) == [record["text"] for record in records]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.md"])
def test_gzipped_files_read_the_same(tmp_path: Path, name: str) -> None:
    content = b'{"text": "some words"}\n'
    (tmp_path / name).write_bytes(content)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    assert read(tmp_path / f"{name}.gz") == read(tmp_path / name)
    assert read(tmp_path / name) == ["some words" if name == "a.jsonl" else content.decode().strip()]


def test_a_folder_gives_its_text_files_by_name(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "c.md").write_text("third")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.jsonl").write_text('{"text": "second"}')
    (tmp_path / "deep" / "d.txt.gz").write_bytes(gzip.compress(b"fourth", mtime=0))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "archive.tar.gz").write_bytes(b"nothing to read")
    assert read(tmp_path) == ["first", "second", "third", "fourth"]
    assert read(tmp_path / "c.md", tmp_path / "a.txt") == ["third", "first"]  # sources keep their order


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "caf\xe9".encode("latin-1"), r"not UTF-8 at byte 3 \(0xe9\)"),
        ("cut.txt.gz", gzip.compress(b"words " * 100, mtime=0)[:-12], "cannot read"),
        ("fake.txt.gz", b"not compressed at all", "cannot read"),
        ("bad.jsonl", b'{"text": "ok"}\n\n{"text": \n', "line 3: not JSON"),
        ("other.jsonl", b'{"text": "ok"}\n{"body": "x"}\n', "line 2: expected an object with a string field `text`"),
        ("number.jsonl", b'{"text": 5}\n', "line 1: expected"),
        ("list.jsonl", b'["text"]\n', "line 1: expected"),
        ("half.jsonl", b'{"text": "ok"}\n{"text": "half \\ud83d"}\n', "line 2: .*surrogate"),
    ],
)
def test_errors_name_the_file_and_the_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_missing_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.txt: no such file or folder"):
        read(tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match=r"no \.txt, \.md, \.jsonl \(also \.gz\) or \.parquet file"):
        read(tmp_path)


# ---------------------------------------------------------------------- the corpus that needs no file


def test_embedded_is_a_megabyte_in_seconds_and_always_the_same() -> None:
    began = time.process_time()
    texts = list(documents([EMBEDDED]))
    assert time.process_time() - began < 20
    assert sum(len(text.encode()) for text in texts) > 1_000_000
    assert len(texts) > 100
    assert any("list comprehension" in text for text in texts)
    assert list(islice(documents([EMBEDDED]), 150)) == texts[:150]


def test_embedded_reads_docstrings_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "test" / "lib"  # that the interpreter itself lives in a folder called test must not matter
    for folder in (library, library / "test", library / "site-packages"):
        folder.mkdir(parents=True)
        doc = f'"""Docs of {folder.name}."""\n'
        code = 'raise SystemExit\ndef f():\n    """A function."""\nclass C:\n    async def g():\n        """Method."""\n'
        (folder / "module.py").write_text(doc + code)
    (library / "broken.py").write_text("def (:")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    texts = list(documents([EMBEDDED]))
    assert "Docs of lib.\n\nA function.\n\nMethod." in texts
    assert not any("Docs of test" in text or "Docs of site-packages" in text for text in texts)
