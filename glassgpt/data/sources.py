"""Documents out of files: plain text, JSONL, folders of them, each also gzipped, and a corpus that needs no file."""

from __future__ import annotations

import ast
import contextlib
import gzip
import importlib
import json
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from glassgpt.config import UserError
from glassgpt.text import END_OF_TEXT

EMBEDDED = "embedded"
SUFFIXES = (".txt", ".md", ".jsonl")


def documents(sources: Iterable[str]) -> Iterator[str]:
    """The documents of every source in order, each a non-empty string.

    A text file is parted at `<|endoftext|>` marks; a JSONL file has one document a line in its field `text`; a folder
    gives its .txt, .md and .jsonl files (also .gz) by name; `embedded` is Python's own documentation.
    Raises UserError naming the file and line of anything unreadable.
    """
    for source in sources:
        found = embedded() if source == EMBEDDED else _of_path(Path(source))
        yield from (text for text in found if text.strip())


def _of_path(path: Path) -> Iterator[str]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _suffix(file) in SUFFIXES)
        if not files:
            raise UserError(f"{path}: no {', '.join(SUFFIXES)} file (also .gz) in this folder")
        for file in files:
            yield from _of_path(file)
    elif not path.exists():
        raise UserError(f"{path}: no such file or folder (give a text or JSONL file, a folder of them, or `{EMBEDDED}`)")
    elif _suffix(path) == ".jsonl":
        yield from _of_jsonl(path)
    else:
        yield from (part.strip("\n") for part in _read(path).split(END_OF_TEXT))


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def _read(path: Path) -> str:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 at byte {error.start} ({error.object[error.start]:#04x}); convert the file to UTF-8"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot read: {error}") from error


def _of_jsonl(path: Path) -> Iterator[str]:
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON: {error.msg}") from error
        if not (isinstance(record, dict) and isinstance(record.get("text"), str)):
            raise UserError(f"{path}, line {number}: expected an object with a string field `text`; got {line[:60]}")
        if half := re.search("[\ud800-\udfff]", record["text"]):
            raise UserError(
                f"{path}, line {number}: `text` holds {half[0]!r}, half of a surrogate pair, which is not Unicode text"
            )
        yield record["text"]


def embedded() -> Iterator[str]:
    """Text that every Python installation brings: pydoc's topics and the docstrings of the standard library.

    Files are parsed, never imported, so no module's code runs. The text changes a little from one Python to another.
    """
    with contextlib.suppress(ImportError):  # some distributions split it off
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        yield from (text for _, text in sorted(topics.items()))
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.glob("**/*.py")):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docs = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        yield "\n\n".join(doc for doc in docs if doc)
