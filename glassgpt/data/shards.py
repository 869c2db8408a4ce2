"""Text to token shards on disk: arrays of ids, and a manifest written last that says what they are."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glassgpt.config import UserError
from glassgpt.text import Tokenizer

FORMAT = 1
FEW_DOCUMENTS = 40
SPLITS = ("train", "val")
SHARD_TOKENS = 50_000_000
DOCUMENTS_AT_ONCE = 256
CHARACTERS_AT_ONCE = 2**22
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Shards:
    """A folder of shards that has been checked: every file has the size and the hash that its manifest states."""

    folder: Path
    manifest: dict[str, Any]

    def tokens(self, split: str) -> list[np.ndarray]:
        """The memory-mapped id arrays of a split (`train` or `val`)."""
        return [np.load(self.folder / shard["file"], mmap_mode="r") for shard in self.manifest["splits"][split]]

    def count(self, split: str) -> int:
        return sum(shard["tokens"] for shard in self.manifest["splits"][split])

    def files(self) -> list[Path]:
        return [
            self.folder / MANIFEST,
            *(self.folder / shard["file"] for split in SPLITS for shard in self.manifest["splits"][split]),
        ]


def hold_out(documents: Iterable[str], share: float) -> Iterator[tuple[str, str]]:
    """(`train` or `val`, text) of every document, in one pass.

    A document's own hash decides, so adding documents moves none of the old ones and order does not matter. With
    fewer than 40 documents the end of each one is held out instead.
    """
    rest = iter(documents)
    first = list(itertools.islice(rest, FEW_DOCUMENTS))
    if len(first) < FEW_DOCUMENTS:
        for text in first:
            cut = len(text) - max(1, round(len(text) * share))
            yield "train", text[:cut]
            yield "val", text[cut:]
        return
    last, any_held_out = None, False
    for text in itertools.chain(first, rest):
        if int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64 < share:
            any_held_out = True
            yield "val", text
            continue
        if last is not None:
            yield "train", last
        last = text
    if last is not None:
        yield "train" if any_held_out else "val", last  # a few dozen documents can all draw high


def write(
    folder: Path,
    documents: Iterable[str],
    tokenizer: Tokenizer,
    holdout_share: float,
    shard_tokens: int = SHARD_TOKENS,
) -> Shards:
    """Tokenise documents into a new folder in one pass; the end-of-text id follows each one. Memory: a shard a split.

    Raises UserError for an empty corpus, a tokenizer without end-of-text token. `glassgpt.config.files.complete_folder`
    around it makes the folder appear complete or not at all.
    """
    if tokenizer.end_id is None:
        raise UserError("the tokenizer has no <|endoftext|> token, which parts documents; use one that has, or train one")
    folder.mkdir(parents=True)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    splits = {split: _Split(folder, split, shard_tokens) for split in SPLITS}
    parted = hold_out(documents, holdout_share)
    while some := _group(parted):
        for (split, text), ids in zip(some, tokenizer.encode_batch([text for _, text in some]), strict=True):
            splits[split].add(np.array([*ids, tokenizer.end_id], dtype=dtype), len(text.encode()))
    if not splits["val"].documents:  # with any document at all, one is held out
        raise UserError("the corpus is empty: no source holds any text")
    if not splits["train"].documents:
        raise UserError(f"data.holdout_share {holdout_share} holds out every document, so none is left to train on; lower it")
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.name,
        "splits": {name: split.close() for name, split in splits.items()},
    }
    for name, written in splits.items():
        manifest[f"{name}_documents"] = written.documents
        manifest[f"{name}_bytes"] = written.bytes
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return Shards(folder, manifest)


def _group(parted: Iterator[tuple[str, str]]) -> list[tuple[str, str]]:
    """The next few documents, of bounded size together, to be tokenised on all cores at once."""
    group, characters = [], 0
    for split, text in parted:
        group.append((split, text))
        characters += len(text)
        if len(group) == DOCUMENTS_AT_ONCE or characters > CHARACTERS_AT_ONCE:
            break
    return group


class _Split:
    """The shards of one split while they are written."""

    def __init__(self, folder: Path, name: str, shard_tokens: int) -> None:
        self.documents = self.bytes = 0
        self._folder, self._name, self._limit = folder, name, shard_tokens
        self._waiting: list[np.ndarray] = []
        self._tokens = 0
        self._files: list[dict[str, Any]] = []

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        self.documents += 1
        self.bytes += text_bytes
        while self._tokens + len(ids) > self._limit:
            fits = self._limit - self._tokens
            self._waiting.append(ids[:fits])
            ids = ids[fits:]
            self._flush()
        self._waiting.append(ids)
        self._tokens += len(ids)

    def close(self) -> list[dict[str, Any]]:
        if self._tokens:
            self._flush()
        return self._files

    def _flush(self) -> None:
        path = self._folder / f"{self._name}-{len(self._files):05d}.npy"
        ids = np.concatenate(self._waiting)
        np.save(path, ids)
        self._files.append({"file": path.name, "tokens": len(ids), "sha256": _sha256(path)})
        self._waiting, self._tokens = [], 0


def read(folder: Path, tokenizer: Tokenizer, *, check: bool = True) -> Shards:
    """Open shards. Raises UserError when they are incomplete, made by another tokenizer, or (with `check`) changed."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no readable manifest.json, so these are not complete shards ({error})") from error
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{folder}: shard format {manifest.get('format')}; this version reads {FORMAT}: delete the folder to make it anew"
        )
    if manifest["tokenizer_sha256"] != tokenizer.sha256:
        raise UserError(
            f"{folder}: made with another tokenizer"
            f" (hash {manifest['tokenizer_sha256'][:12]}; this one is {tokenizer.sha256[:12]});"
            " delete the folder to make it anew, or give the tokenizer it was made with"
        )
    for shard in (shard for split in SPLITS for shard in manifest["splits"][split]):
        path = folder / shard["file"]
        if not path.is_file() or (check and _sha256(path) != shard["sha256"]):
            raise UserError(
                f"{path}: {'changed since it was written' if path.is_file() else 'missing'}; delete {folder} to make it anew"
            )
    return Shards(folder, manifest)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
