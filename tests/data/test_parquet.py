"""Parquet files, read batch by batch."""

from __future__ import annotations

import gzip
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glassgpt.config import UserError
from glassgpt.data import documents


def write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def read(*paths: Path) -> list[str]:
    return list(documents(map(str, paths)))


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_rows_are_documents(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [f"một hai {n} <|endoftext|>\r\n" for n in range(1000)]  # as they are: in a column nothing needs a mark
    pq.write_table(pa.table({"n": range(1000), "text": pa.array(texts).cast(kind)}), tmp_path / "a.parquet", row_group_size=300)
    assert read(tmp_path / "a.parquet") == texts


def test_a_folder_gives_parquet_files_too(tmp_path: Path) -> None:
    (tmp_path / "b.parquet").mkdir()  # as Spark writes them
    write(tmp_path / "b.parquet" / "part-0.parquet", text=["second", " ", "third"])
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.jsonl").write_text('{"text": "fourth"}')
    assert read(tmp_path) == ["first", "second", "third", "fourth"]


def test_no_rows(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.parquet", text=pa.array([], pa.string()))) == []


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["x"], "n": [1]}, "no column `text`; its columns are body, n"),
        ({}, "no column `text`; its columns are none"),
        ({"text": ["ok"] * 99 + [None]}, "row 100: expected a string in `text`; got null"),
        ({"text": [5]}, "row 1: expected a string in `text`; got int 5"),
        ({"text": [{"en": "x"}]}, "row 1: expected a string in `text`; got dict"),
        ({"text": pa.array([b"ok", b"caf\xe9"]).view(pa.string())}, "row 2: `text` is not UTF-8 at its byte 3"),
    ],
)
def test_errors_name_the_file_and_the_row(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "a.parquet", **columns)
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [os.urandom(50).hex() for _ in range(5000)]}), path)
    sound = path.read_bytes()
    for content in (b"", b"PAR1 nothing more", sound[:-100], sound[: len(sound) // 2]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot read after row 0: "):
            read(path)
    path.write_bytes(sound[:1000] + bytes(len(sound) // 2) + sound[1000 + len(sound) // 2 :])  # footer sound, data not
    with pytest.raises(UserError, match=r"a\.parquet"):
        read(path)
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress(sound))
    with pytest.raises(UserError, match=r"b\.parquet\.gz: .*gunzip"):
        read(tmp_path / "b.parquet.gz")


def test_a_row_group_is_not_read_at_once(tmp_path: Path, start_python: Any) -> None:
    """Fifty megabytes in one row group, not compressed; Arrow says what it held at most, in a process of its own."""
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"{n} {'words ' * 1000}" for n in range(8000)]})
    pq.write_table(table, path, row_group_size=10**6, use_dictionary=False, compression="none")
    code = (
        "import sys, pyarrow; from glassgpt.data import documents;"
        "print(sum(1 for _ in documents(sys.argv[1:])), pyarrow.default_memory_pool().max_memory())"
    )
    out, errors = start_python(code, path).communicate(timeout=60)
    assert errors == ""
    count, held = map(int, out.split())
    assert count == 8000
    assert held < 15e6, held


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", text=["x"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as an import of a package that is not there
    with pytest.raises(UserError, match=r"a\.parquet: reading it needs pyarrow .*pip install 'glassgpt\[data\]'"):
        read(path)
