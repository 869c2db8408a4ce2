"""Text to shards: what is held out, what is on the disk, and what is refused."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glassgpt.config import UserError
from glassgpt.data import shards
from glassgpt.text import END_OF_TEXT, Tokenizer

MANY = [f"Document {n}: the cat number {n * 7919 % 1000} sat on the mat. Tiếng Việt 🌍\n" for n in range(1000)]


# ---------------------------------------------------------------------- hold-out


def hold_out(documents: Iterable[str], share: float) -> tuple[list[str], list[str]]:
    """(training, held-out)."""
    parts: dict[str, list[str]] = {split: [] for split in shards.SPLITS}
    for split, text in shards.hold_out(documents, share):
        parts[split].append(text)
    return parts["train"], parts["val"]


def with_all_in_memory(documents: list[str], share: float) -> tuple[list[str], list[str]]:
    """The rule, as it was written before it had to stream."""
    if len(documents) < 40:
        cuts = [(text, len(text) - max(1, round(len(text) * share))) for text in documents]
        return [text[:cut] for text, cut in cuts], [text[cut:] for text, cut in cuts]
    parts: tuple[list[str], list[str]] = ([], [])
    for text in documents:
        parts[int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64 < share].append(text)
    if not parts[1]:
        parts[1].append(parts[0].pop())
    return parts


@settings(max_examples=300, deadline=None)
@given(
    count=st.integers(0, 60) | st.sampled_from([39, 40, 41, 200]),
    salt=st.integers(0, 10**6),
    share=st.sampled_from([0.001, 0.02, 0.05, 0.3, 0.9]),
)
def test_one_pass_decides_as_all_at_once(count: int, salt: int, share: float) -> None:
    documents = [f"{salt} {n} {'x' * (n % 7)}" for n in range(count)]
    assert hold_out(iter(documents), share) == with_all_in_memory(documents, share)


def test_hold_out_holds_few_documents_back() -> None:
    taken: list[int] = []
    endless = (taken.append(n) or MANY[n % 1000] for n in itertools.count())  # type: ignore[func-returns-value]
    for given_out, (split, _) in enumerate(shards.hold_out(endless, 0.1), 1):
        assert split in shards.SPLITS and len(taken) <= shards.FEW_DOCUMENTS + given_out + 1
        if given_out == 500:
            break


def test_hold_out_parts_the_documents() -> None:
    training, held_out = hold_out(MANY, 0.05)
    assert not set(training) & set(held_out)
    assert sorted(training + held_out) == sorted(MANY)
    assert 25 <= len(held_out) <= 80  # 50 expected, standard deviation 7
    assert 450 <= len(hold_out(MANY, 0.5)[1]) <= 550


def test_hold_out_never_moves_a_document() -> None:
    held_out = set(hold_out(MANY[:600], 0.1)[1])
    more = set(hold_out(MANY, 0.1)[1])
    assert held_out == more & set(MANY[:600])
    shuffled = random.Random(0).sample(MANY, len(MANY))
    assert shuffled != MANY
    assert set(hold_out(shuffled, 0.1)[1]) == more
    assert more <= set(hold_out(MANY, 0.2)[1])  # a larger share only adds


def test_few_documents_give_their_ends() -> None:
    few = MANY[: shards.FEW_DOCUMENTS - 1]
    training, held_out = hold_out(few, 0.2)
    assert [start + end for start, end in zip(training, held_out, strict=True)] == few
    for text, end in zip(few, held_out, strict=True):
        assert abs(len(end) - 0.2 * len(text)) <= 0.5
    assert hold_out(["abc"], 0.05) == (["ab"], ["c"])  # never nothing
    enough = MANY[: shards.FEW_DOCUMENTS]  # one more, and no document is cut
    training, held_out = hold_out(enough, 0.2)
    assert set(training + held_out) == set(enough)


# ---------------------------------------------------------------------- on the disk


def test_round_trip(tokenizer: Tokenizer, tmp_path: Path) -> None:
    written = shards.write(tmp_path / "shards", iter(MANY), tokenizer, 0.1, shard_tokens=5000)
    opened = shards.read(tmp_path / "shards", tokenizer)
    assert opened == written
    for split, texts in zip(shards.SPLITS, hold_out(MANY, 0.1), strict=True):
        arrays = opened.tokens(split)
        assert all(array.dtype == np.uint16 and isinstance(array, np.memmap) for array in arrays)
        assert tokenizer.decode(np.concatenate(arrays)) == "".join(text + END_OF_TEXT for text in texts)
        assert opened.count(split) == sum(map(len, arrays))
        assert [len(array) for array in arrays[:-1]] == [5000] * (len(arrays) - 1)
        assert opened.manifest[f"{split}_documents"] == len(texts)
        assert opened.manifest[f"{split}_bytes"] == len("".join(texts).encode())
    assert len(opened.tokens("train")) > 1


@pytest.mark.parametrize("shard_tokens", [1, 2, 3, 50, 51, 100, 102, 10_000])
def test_shards_are_cut_exactly(tokenizer: Tokenizer, tmp_path: Path, shard_tokens: int) -> None:
    """Also within a document, in the middle of several, and where the last one ends a shard: no empty one follows."""
    documents = ["a" * 60, "b", "c" * 40]
    written = shards.write(tmp_path / "shards", documents, tokenizer, 0.5, shard_tokens)
    for split, parts in zip(shards.SPLITS, hold_out(documents, 0.5), strict=True):
        whole = [i for text in parts for i in [*tokenizer.encode(text), tokenizer.end_id]]
        assert [array.tolist() for array in written.tokens(split)] == [
            whole[first : first + shard_tokens] for first in range(0, len(whole), shard_tokens)
        ]
        assert len(written.files()) == 1 + sum(len(written.tokens(split)) for split in shards.SPLITS)
        assert all(path.is_file() for path in written.files())


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
        shards.write(tmp_path / "empty", [], tokenizer, 0.1)
    all_held_out = [text for text in MANY if hold_out([*MANY[:50], text], 0.5)[1][-1:] == [text]][:60]
    with pytest.raises(UserError, match=r"holdout_share 0\.5 holds out every document"):
        shards.write(tmp_path / "held out", all_held_out, tokenizer, 0.5)
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(UserError, match=r"no <\|endoftext\|> token"):
        shards.write(tmp_path / "shards", ["a"], Tokenizer.load(tmp_path), 0.1)
    assert not (tmp_path / "shards").exists()
