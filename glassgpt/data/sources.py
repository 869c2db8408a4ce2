"""Documents out of files: plain text, JSONL, Parquet, folders of them, datasets of the hub, and a corpus that needs no file.

Everything is read as a stream: no more than one document and one block or batch of a file is held at a time.
"""

from __future__ import annotations

import ast
import codecs
import contextlib
import gzip
import hashlib
import importlib
import itertools
import json
import os
import re
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from glassgpt.config import UserError
from glassgpt.text import END_OF_TEXT

EMBEDDED = "embedded"
HUB = "hf:"
HUB_GRAMMAR = "hf:OWNER/NAME[@CONFIG][:SPLIT], or hf:./FOLDER[@CONFIG][:SPLIT] for data files on this machine"
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
LARGEST_DOCUMENT_CHARACTERS = 2**20
READ_BYTES = 2**20
PARQUET_ROWS = 64  # a batch; a row can be a whole book


def documents(sources: Iterable[str]) -> Iterator[str]:
    """The documents of every source in order, each a non-empty string.

    A text file is parted at `<|endoftext|>` marks; a JSONL file has one document a line in its field `text`, a Parquet
    file one a row in its column `text`; a folder gives its .txt, .md, .jsonl (also .gz) and .parquet files by name;
    `hf:OWNER/NAME@CONFIG:SPLIT` is a dataset of the Hugging Face hub, streamed, with the split `train` and no
    configuration unless they are given, and `hf:./FOLDER` a folder that `datasets` understands; `embedded` is Python's own
    documentation. Only an `hf:` source touches the network.

    In a text file a document of more than 1 Mi characters is parted at the last line end before that (there, when it has
    none), so memory stays bounded. Files and folders are looked up before anything is read.
    Raises UserError naming the file and line or row of anything unreadable.
    """
    for found in [_find(source) for source in sources]:  # a list: a wrong name is told at once, not after hours of reading
        yield from (text for text in found if text and not text.isspace())


def _find(source: str) -> Iterator[str]:
    """The documents of a source that is there; nothing of it is read yet."""
    if source == EMBEDDED:
        return embedded()
    if source.startswith(HUB):
        return _of_dataset(source, dataset_of(source))
    given = f"a text, JSONL or Parquet file, a folder of them, {HUB}OWNER/NAME, or `{EMBEDDED}`"
    return itertools.chain.from_iterable(map(_of_file, files_of(source, SUFFIXES, given)))


def files_of(source: str, suffixes: Sequence[str], expected: str) -> list[Path]:
    """A file, or those of a folder that end in one of these suffixes (also .gz), by name."""
    if not os.path.exists(source):  # unlike Path.exists, no error for a name that no file can have
        raise UserError(f"{source}: no such file or folder (give {expected})")
    path = Path(source)
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and suffix_of(file) in suffixes)
    if not files:
        raise UserError(f"{path}: no {', '.join(suffixes[:-1])} (also .gz) or {suffixes[-1]} file in this folder")
    return files


def suffix_of(path: Path) -> str:
    """What a file's name ends in, without .gz."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def _of_file(path: Path) -> Iterator[str]:
    match suffix_of(path):
        case ".parquet":
            yield from _of_parquet(path)
        case ".jsonl":
            yield from _of_jsonl(path)
        case _:
            parts = _split(read_text(path), END_OF_TEXT, LARGEST_DOCUMENT_CHARACTERS)
            yield from (part.strip("\n") for part in parts)


# ---------------------------------------------------------------------- text and JSONL


def read_text(path: Path) -> Iterator[str]:
    """The text of a file in blocks of about READ_BYTES, without byte order mark, CRLF as LF."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    size, text, at_start = 0, "", True
    with _opened(path) as file:
        while block := file.read(READ_BYTES):
            size += len(block)
            text += _decode(decoder, block, path, size)
            if at_start and text:
                text, at_start = text.removeprefix("\ufeff"), False
            ready = len(text) - text.endswith("\r")  # its LF may come with the next block
            yield text[:ready].replace("\r\n", "\n")
            text = text[ready:]
    yield text + _decode(decoder, b"", path, size)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot read: {error}") from error


def _decode(decoder: codecs.IncrementalDecoder, block: bytes, path: Path, size: int) -> str:
    """Decode the next block of a file, the last one when it is empty; `size` bytes of the file have been read."""
    try:
        return decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
        at = size - len(error.object) + error.start  # `object` is the end of what was read: this block and a begun character
        raise UserError(
            f"{path}: not UTF-8 at byte {at} ({error.object[error.start]:#04x}); convert the file to UTF-8"
        ) from error


def _split(blocks: Iterable[str], mark: str, largest: int = sys.maxsize) -> Iterator[str]:
    """What `"".join(blocks).split(mark)` gives, each part through `_cut`, holding one block and one part at a time."""
    part: list[str] = []
    tail = ""  # may be the beginning of a mark
    for block in blocks:
        *ends, rest = (tail + block).split(mark)
        for end in ends:
            yield from _cut("".join([*part, end]), largest)
            part = []
        ready = max(0, len(rest) - len(mark) + 1)
        part.append(rest[:ready])
        tail = rest[ready:]
        if sum(map(len, part)) > largest:
            *pieces, last = _cut("".join(part), largest)
            part = [last]
            yield from pieces
    yield from _cut("".join([*part, tail]), largest)


def _cut(text: str, largest: int) -> list[str]:
    """Pieces of at most `largest` characters; each but the last ends after the last line end that it can hold."""
    pieces, start = [], 0
    while len(text) - start > largest:
        end = text.rfind("\n", start, start + largest) + 1 or start + largest
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _of_jsonl(path: Path) -> Iterator[str]:
    for number, record, line in json_lines(path, read_text(path)):
        if not (isinstance(record, dict) and isinstance(record.get("text"), str)):
            raise UserError(f"{path}, line {number}: expected an object with a string field `text`; got {line[:60]}")
        check_unicode(record["text"], f"{path}, line {number}: `text`")
        yield record["text"]


def json_lines(path: Path, blocks: Iterable[str]) -> Iterator[tuple[int, Any, str]]:
    """(number, value, text) of every line of JSON in a file's text; lines of white space are counted and passed over."""
    for number, line in enumerate(_split(blocks, "\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # also an integer of thousands of digits, thousands of brackets
            raise UserError(f"{path}, line {number}: not JSON: {getattr(error, 'msg', error)}") from error
        yield number, value, line


def check_unicode(text: str, what: str) -> None:
    """Raise UserError for half a surrogate pair, which JSON can hold and UTF-8 cannot."""
    if half := re.search("[\ud800-\udfff]", text):
        raise UserError(f"{what} holds {half[0]!r}, half of a surrogate pair, which is not Unicode text")


# ---------------------------------------------------------------------- Parquet and datasets


def _extra(module: str, source: object) -> Any:
    """A module of the extra `data`, imported when a source needs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{source}: reading it needs {module.split('.')[0]} ({error}): pip install 'glassgpt[data]'") from error


def _of_parquet(path: Path) -> Iterator[str]:
    for row, record in enumerate(parquet_rows(path, ["text"]), 1):
        yield _text(record["text"], path, row)


def parquet_rows(path: Path, only: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, of some of its columns or all, holding one batch at a time."""
    if path.suffix == ".gz":
        raise UserError(f"{path}: Parquet is compressed inside; gunzip this file")
    pyarrow, parquet = _extra("pyarrow", path), _extra("pyarrow.parquet", path)
    row, name = 0, ""
    try:
        # A row group can hold a million rows: without these two options the whole of it is read at once.
        with parquet.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False) as file:
            columns = file.schema_arrow.names
            for name in only:
                if name not in columns:
                    raise UserError(f"{path}: no column `{name}`; its columns are {', '.join(columns) or 'none'}")
            for batch in file.iter_batches(PARQUET_ROWS, columns=list(only) or None, use_threads=False):
                for place in range(len(batch)):
                    row += 1
                    record = {}
                    for name, column in zip(batch.schema.names, batch.columns, strict=True):
                        record[name] = column[place].as_py()
                    yield record
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, row {row}: `{name}` is not UTF-8 at its byte {error.start}") from error
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot read after row {row}: {_one_line(error)}") from error


def _text(value: object, source: object, row: int) -> str:
    if not isinstance(value, str):
        given = "null" if value is None else f"{type(value).__name__} {str(value)[:60]}"
        raise UserError(f"{source}, row {row}: expected a string in `text`; got {given}")
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


class Dataset(NamedTuple):
    """What an `hf:` source names."""

    name: str
    config: str | None
    split: str


def dataset_of(source: str) -> Dataset:
    """The data set that an `hf:` source names; only a folder of this machine is looked up."""
    folder, repository = r"(?:~|\.{0,2})/(?!/)[^@:]*", r"\w[\w.-]*/[\w.-]+"
    found = re.fullmatch(rf"{HUB}({folder}|{repository})(?:@([^@:]+))?(?::(\w+(?:\.\w+)*))?", source)
    if not found:
        raise UserError(f"{source}: expected {HUB_GRAMMAR}")
    name, config, split = found.groups(default="")
    if name[0] in "~./":
        name = os.path.realpath(os.path.expanduser(name))
        if not os.path.isdir(name):
            raise UserError(f"{source}: no folder {name}")
    else:
        name = f"hf://datasets/{name}"  # never a folder that happens to be called like a dataset
    return Dataset(name, config or None, split or "train")


def _of_dataset(source: str, dataset: Dataset) -> Iterator[str]:
    for row, record in enumerate(dataset_rows(source, dataset, ["text"]), 1):
        yield _text(record["text"], source, row)


def dataset_rows(source: str, dataset: Dataset, only: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """The rows of a dataset, of some of its columns or all.

    They come through `datasets`, which runs no code of a dataset and holds one row group of a Parquet file.
    """
    datasets = _extra("datasets", source)
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it would tell a server of every dataset that is opened, local ones too
    _extra("huggingface_hub", source).constants.HF_HUB_DISABLE_TELEMETRY = True
    endpoint, is_offline = datasets.config.HF_ENDPOINT, datasets.config.HF_HUB_OFFLINE
    row = 0
    try:
        splits = datasets.load_dataset(dataset.name, dataset.config, streaming=True)
        if dataset.split not in splits:
            raise UserError(f"{source}: no split {dataset.split!r}; it has {', '.join(splits)}: write one after a colon")
        rows = splits[dataset.split]
        columns = rows.column_names or only  # known only after the first row in some formats
        for name in only:
            if name not in columns:
                raise UserError(f"{source}: no column `{name}`; its columns are {', '.join(columns)}")
        for row, record in enumerate(rows.select_columns(list(only)) if only and rows.column_names else rows, 1):
            for name in only:
                if name not in record:
                    raise UserError(f"{source}, row {row}: no field `{name}`; its fields are {', '.join(record)}")
            yield record
    except UserError:
        raise
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"{source}: {endpoint} has no such dataset that you may see (a private or gated one needs HF_TOKEN):"
            f" {_one_line(error)}"
        ) from error
    except Exception as error:  # of httpx, huggingface_hub, pyarrow, pandas, by format and version
        if is_offline and dataset.name.startswith("hf://"):
            raise UserError(f"{source}: HF_HUB_OFFLINE is set, so it cannot be fetched; unset it") from error
        if isinstance(error, ConnectionError):
            raise UserError(
                f"{source}: cannot reach {endpoint}: {_one_line(error)}; check the network, then try again"
            ) from error
        place = f"after row {row}" if row else "any of it"
        raise UserError(f"{source}: cannot read {place}: {_one_line(error)} (a source is {HUB_GRAMMAR})") from error


# ---------------------------------------------------------------------- repeats


class Unique:
    """Passes on the documents that have not come before: `once = Unique(); for text in once(documents(...))`.

    Two documents are the same when their text is, without the white space around it. What is held is a 16-byte digest of
    each in a set: about 100 bytes a document. `dropped` counts the repeats so far, over all calls.
    """

    def __init__(self) -> None:
        self.dropped = 0
        self._seen: set[bytes] = set()

    def __call__(self, documents: Iterable[str]) -> Iterator[str]:
        for text in documents:
            digest = hashlib.blake2b(text.strip().encode(errors="surrogatepass"), digest_size=16).digest()
            if digest in self._seen:
                self.dropped += 1
            else:
                self._seen.add(digest)
                yield text


# ---------------------------------------------------------------------- the corpus that needs no file


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
