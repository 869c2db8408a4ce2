"""Text to shards: what is held out, what is on the disk, and what is refused."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glassgpt.config import UserError
from glassgpt.data import shards
from glassgpt.text import END_OF_TEXT, Tokenizer

MANY = [f"Document {n}: the cat number {n * 7919 % 1000} sat on the mat. Tiếng Việt 🌍\n" for n in range(1000)]


# ---------------------------------------------------------------------- hold-out


def test_hold_out_parts_the_documents() -> None:
    training, held_out = shards.hold_out(MANY, 0.05)
    assert not set(training) & set(held_out)
    assert sorted(training + held_out) == sorted(MANY)
    assert 25 <= len(held_out) <= 80  # 50 expected, standard deviation 7
    assert 450 <= len(shards.hold_out(MANY, 0.5)[1]) <= 550


def test_hold_out_never_moves_a_document() -> None:
    held_out = set(shards.hold_out(MANY[:600], 0.1)[1])
    more = set(shards.hold_out(MANY, 0.1)[1])
    assert held_out == more & set(MANY[:600])
    shuffled = random.Random(0).sample(MANY, len(MANY))
    assert shuffled != MANY
    assert set(shards.hold_out(shuffled, 0.1)[1]) == more
    assert more <= set(shards.hold_out(MANY, 0.2)[1])  # a larger share only adds


def test_few_documents_give_their_ends() -> None:
    few = MANY[: shards.FEW_DOCUMENTS - 1]
    training, held_out = shards.hold_out(few, 0.2)
    assert [start + end for start, end in zip(training, held_out, strict=True)] == few
    for text, end in zip(few, held_out, strict=True):
        assert abs(len(end) - 0.2 * len(text)) <= 0.5
    assert shards.hold_out(["abc"], 0.05) == (["ab"], ["c"])  # never nothing
    enough = MANY[: shards.FEW_DOCUMENTS]  # one more, and no document is cut
    training, held_out = shards.hold_out(enough, 0.2)
    assert set(training + held_out) == set(enough)


# ---------------------------------------------------------------------- on the disk


def test_round_trip(tokenizer: Tokenizer, tmp_path: Path) -> None:
    written = shards.write(tmp_path / "shards", MANY, tokenizer, 0.1, shard_tokens=5000)
    opened = shards.read(tmp_path / "shards", tokenizer)
    assert opened == written
    for split, texts in zip(shards.SPLITS, shards.hold_out(MANY, 0.1), strict=True):
        arrays = opened.tokens(split)
        assert all(array.dtype == np.uint16 and isinstance(array, np.memmap) for array in arrays)
        assert tokenizer.decode(np.concatenate(arrays)) == "".join(text + END_OF_TEXT for text in texts)
        assert opened.count(split) == sum(map(len, arrays))
        assert [len(array) for array in arrays[:-1]] == [5000] * (len(arrays) - 1)
        assert opened.manifest[f"{split}_documents"] == len(texts)
        assert opened.manifest[f"{split}_bytes"] == len("".join(texts).encode())
    assert len(opened.tokens("train")) > 1


def test_the_manifest_says_what_is_there(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shards.write(tmp_path / "shards", MANY, tokenizer, 0.1, shard_tokens=20_000)
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    assert manifest["tokenizer_sha256"] == tokenizer.sha256
    assert manifest["vocab_size"] == tokenizer.vocab_size
    listed = {shard["file"]: shard["sha256"] for split in shards.SPLITS for shard in manifest["splits"][split]}
    on_disk = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "shards").glob("*.npy")}
    assert listed == on_disk


def test_the_text_of_a_document_cannot_end_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    document = f"one {END_OF_TEXT} two " * 20
    train = np.concatenate(shards.write(tmp_path / "shards", [document], tokenizer, 0.05).tokens("train"))
    assert (train == tokenizer.end_id).sum() == 1


def test_a_large_vocabulary_takes_wider_ids(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 70_000, END_OF_TEXT: 70_001}))
    (tmp_path / "merges.txt").write_text("")
    (train,) = shards.write(tmp_path / "shards", ["abba" * 10], Tokenizer.load(tmp_path), 0.05).tokens("train")
    assert train.dtype == np.uint32
    assert train[:4].tolist() == [0, 70_000, 70_000, 0]


# ---------------------------------------------------------------------- refusals


def test_a_changed_byte_is_noticed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = shards.write(tmp_path / "shards", MANY[:100], tokenizer, 0.1).folder
    path = folder / "val-00000.npy"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"val-00000\.npy: changed since it was written"):
        shards.read(folder, tokenizer)
    path.unlink()
    with pytest.raises(UserError, match=r"val-00000\.npy: missing"):
        shards.read(folder, tokenizer)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="not complete shards"):
        shards.read(folder, tokenizer)


def test_another_format_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = shards.write(tmp_path / "shards", MANY[:5], tokenizer, 0.1).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(UserError, match="shard format 99"):
        shards.read(folder, tokenizer)


def test_another_tokenizer_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = shards.write(tmp_path / "shards", MANY[:5], tokenizer, 0.1).folder
    other = Tokenizer.train(["something else"], 270)
    with pytest.raises(UserError, match="made with another tokenizer") as caught:
        shards.read(folder, other)
    assert tokenizer.sha256[:12] in str(caught.value) and other.sha256[:12] in str(caught.value)


def test_nothing_to_write_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="corpus is empty"):
        shards.write(tmp_path / "shards", [], tokenizer, 0.1)
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(UserError, match=r"no <\|endoftext\|> token"):
        shards.write(tmp_path / "shards", ["a"], Tokenizer.load(tmp_path), 0.1)
    assert not (tmp_path / "shards").exists()


def test_a_full_disk_leaves_nothing(tokenizer: Tokenizer, tmp_path: Path, full_disk: Any) -> None:
    with full_disk(4000), pytest.raises(UserError, match="cannot write"):
        shards.write(tmp_path / "shards", MANY, tokenizer, 0.1)
    assert list(tmp_path.iterdir()) == []
    assert shards.write(tmp_path / "shards", MANY, tokenizer, 0.1).folder.is_dir()  # and with space it is written
