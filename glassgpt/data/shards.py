"""Text to token shards on disk: arrays of ids, and a manifest written last that says what they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glassgpt.config import UserError
from glassgpt.config.files import complete_folder
from glassgpt.text import Tokenizer

FORMAT = 1
FEW_DOCUMENTS = 40
SPLITS = ("train", "val")


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


def hold_out(documents: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    """Part documents into (training, validation).

    A document's own hash decides, so adding documents moves none of the old ones and order does not matter. With
    fewer than 40 documents the end of each one is held out instead.
    """
    if len(documents) < FEW_DOCUMENTS:
        cuts = [(text, len(text) - max(1, round(len(text) * share))) for text in documents]
        return [text[:cut] for text, cut in cuts], [text[cut:] for text, cut in cuts]
    parts: tuple[list[str], list[str]] = ([], [])
    for text in documents:
        draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
        parts[draw < share].append(text)
    if not parts[1]:  # a few dozen documents can all draw high
        parts[1].append(parts[0].pop())
    return parts


def write(
    folder: Path,
    documents: Sequence[str],
    tokenizer: Tokenizer,
    holdout_share: float,
    shard_tokens: int = 50_000_000,
) -> Shards:
    """Tokenise documents into `folder`; the end-of-text id follows each one. The folder appears complete or not at all.

    Raises UserError for an empty corpus, a tokenizer without end-of-text token, a full disk.
    """
    if tokenizer.end_id is None:
        raise UserError("the tokenizer has no <|endoftext|> token, which parts documents; use one that has, or train one")
    if not documents:
        raise UserError("the corpus is empty: no source holds any text")
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.name,
        "splits": {},
    }
    with complete_folder(folder) as aside:
        for split, texts in zip(SPLITS, hold_out(documents, holdout_share), strict=True):
            parts = []
            for start in range(0, len(texts), 256):  # bounded memory: 256 documents' encodings at a time
                encoded = tokenizer.encode_batch(texts[start : start + 256])
                parts += [np.array([*ids, tokenizer.end_id], dtype=dtype) for ids in encoded]
            ids = np.concatenate(parts) if parts else np.zeros(0, dtype)
            manifest["splits"][split] = []
            for number, first in enumerate(range(0, len(ids), shard_tokens)):
                name = f"{split}-{number:05d}.npy"
                piece = ids[first : first + shard_tokens]
                np.save(aside / name, piece)
                manifest["splits"][split].append({"file": name, "tokens": len(piece), "sha256": _sha256(aside / name)})
            manifest[f"{split}_documents"] = len(texts)
            manifest[f"{split}_bytes"] = sum(len(text.encode()) for text in texts)
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return Shards(folder, manifest)


def read(folder: Path, tokenizer: Tokenizer) -> Shards:
    """Open shards. Raises UserError when they are incomplete, changed, or made by another tokenizer."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
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
        if not path.is_file() or _sha256(path) != shard["sha256"]:
            raise UserError(
                f"{path}: {'changed since it was written' if path.is_file() else 'missing'}; delete {folder} to make it anew"
            )
    return Shards(folder, manifest)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
