"""Domains of a run: what they hold, what they weigh, and what is taken over from the runs before."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glassgpt.config import DataConfig, UserError
from glassgpt.data import Corpus, corpus, shards
from glassgpt.text import END_OF_TEXT, Tokenizer

Source = Callable[[str, list[str]], str]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """Write documents as a JSONL file; gives its name."""

    def write(name: str, texts: list[str]) -> str:
        path = tmp_path / "sources" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return str(path)

    return write


def texts(kind: str, count: int = 60) -> list[str]:
    return [f"{kind} {number}: the cat sat on the mat {number * 7919 % 1000}" for number in range(count)]


def read_back(domain: corpus.Domain, tokenizer: Tokenizer, split: str) -> list[str]:
    """The documents of a split, as the shards hold them."""
    return tokenizer.decode(np.concatenate(domain.shards.tokens(split))).split(END_OF_TEXT)[:-1]


def held_out(documents: list[str], share: float, split: str) -> list[str]:
    return [text for where, text in shards.hold_out(documents, share) if where == split]


def facts(made: Corpus) -> list[tuple[str, int, float]]:
    return [(domain.name, domain.stage, domain.share) for domain in made.domains]


# ---------------------------------------------------------------------- new domains


def test_without_weights_all_sources_are_one_domain(tokenizer: Tokenizer, tmp_path: Path, source: Source) -> None:
    a, b = texts("a"), texts("b", 30)
    config = DataConfig((source("a.jsonl", a), source("b.jsonl", b)), holdout_share=0.2)
    made = corpus.write(tmp_path / "shards", config, tokenizer)
    assert facts(made) == [("a+1", 0, 1.0)] and made.stage == 0
    (domain,) = made.domains
    for split in shards.SPLITS:
        assert read_back(domain, tokenizer, split) == held_out(a + b, 0.2, split)
        assert made.count(split) == domain.shards.count(split) > 0
    assert corpus.read(tmp_path / "shards", tokenizer) == made
    assert facts(corpus.write(tmp_path / "one", DataConfig(config.sources[:1]), tokenizer)) == [("a", 0, 1.0)]


def test_with_weights_each_source_is_a_domain(tokenizer: Tokenizer, tmp_path: Path, source: Source) -> None:
    parts = [texts("a"), texts("b", 200), texts("c", 50)]
    names = [source(f"{name}.jsonl", part) for name, part in zip("abc", parts, strict=True)]
    made = corpus.write(tmp_path / "shards", DataConfig(tuple(names), (6, 1, 3), holdout_share=0.2), tokenizer)
    assert facts(made) == [("a", 0, 0.6), ("b", 0, 0.1), ("c", 0, 0.3)]
    for domain, part in zip(made.domains, parts, strict=True):
        for split in shards.SPLITS:
            assert read_back(domain, tokenizer, split) == held_out(part, 0.2, split)
    assert made.count("train") == sum(domain.shards.count("train") for domain in made.domains)
    assert corpus.read(tmp_path / "shards", tokenizer) == made


def test_names_are_told_apart(tokenizer: Tokenizer, tmp_path: Path, source: Source) -> None:
    files = ["x/a.jsonl", "y/a.jsonl", "a-2.jsonl", "my text!.v2.jsonl", ".jsonl"]
    names = [source(file, texts(file)) for file in files[:4]]
    hidden = tmp_path / "sources" / ".txt"
    hidden.write_text("some words that are a text")
    made = corpus.write(tmp_path / "first", DataConfig((*names, str(hidden)), (1,) * 5), tokenizer)
    assert [domain.name for domain in made.domains] == ["a", "a-2", "a-2-2", "my-text-", "text"]
    assert [read_back(domain, tokenizer, "val")[0][:1] for domain in made.domains[:3]] == ["x", "y", "a"]
    again = corpus.write(tmp_path / "second", DataConfig(tuple(names[:2]), (1, 1)), tokenizer, made)
    assert [domain.name for domain in again.domains] == ["a", "a-2", "a-2-2", "my-text-", "text", "a-3", "a-2-3"]
    assert len({domain.shards.folder for domain in again.domains}) == 7


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("hf:roneneldan/TinyStories@all:train", "TinyStories-all-train"), ("hf:./books", "books"), ("embedded", "embedded"),
        ("/data/books/", "books"), (".", "text"), ("..", "text"), ("truyện.txt.gz", "truyện"),
    ],
)  # fmt: skip
def test_names_by_source(given: str, name: str) -> None:
    assert corpus._name(given) == name


@pytest.mark.parametrize("weights", [(), (1.0, 1.0)])
def test_repeats_are_dropped_within_a_domain(
    tokenizer: Tokenizer, tmp_path: Path, source: Source, weights: tuple[float, ...]
) -> None:
    a, b = texts("a"), texts("b")
    sources = (source("a.jsonl", [*a, *a[:7]]), source("b.jsonl", [*a[:5], *b, b[0]]))
    config = DataConfig(sources, weights, deduplicate=True, holdout_share=0.2)
    made = corpus.write(tmp_path / "once", config, tokenizer)
    written = json.loads((tmp_path / "once" / corpus.DOMAINS_FILE).read_text())
    assert [entry["repeats_dropped"] for entry in written] == ([7, 1] if weights else [13])
    wanted = [a, [*a[:5], *b]] if weights else [a + b]
    for domain, part in zip(made.domains, wanted, strict=True):
        assert read_back(domain, tokenizer, "train") == held_out(part, 0.2, "train")
    both = corpus.write(tmp_path / "all", DataConfig(sources, weights, holdout_share=0.2), tokenizer)
    assert sum(domain.shards.manifest[f"{split}_documents"] for domain in both.domains for split in shards.SPLITS) == 133


@pytest.mark.parametrize("deduplicate", [False, True])
@pytest.mark.parametrize("weights", [(), (1.0, 2.0)])
def test_a_tokenizer_sees_just_what_is_trained_on(
    tokenizer: Tokenizer, tmp_path: Path, source: Source, weights: tuple[float, ...], deduplicate: bool
) -> None:
    """Few documents of the second source alone, many of both together: what is cut depends on the domain."""
    sources = (source("a.jsonl", texts("a", 45)), source("b.jsonl", texts("b", 20) + texts("a", 3)))
    config = DataConfig(sources, weights, deduplicate=deduplicate, holdout_share=0.2)
    made = corpus.write(tmp_path / "shards", config, tokenizer)
    trained = [text for domain in made.domains for text in read_back(domain, tokenizer, "train")]
    assert list(corpus.training_texts(config)) == trained


# ---------------------------------------------------------------------- earlier runs


def test_earlier_domains_are_linked_and_replayed(tokenizer: Tokenizer, tmp_path: Path, source: Source) -> None:
    old = DataConfig((source("a.jsonl", texts("a")), source("b.jsonl", texts("b", 200))), (3, 1))
    first = corpus.write(tmp_path / "first", old, tokenizer)
    new = DataConfig((source("c.jsonl", texts("c")), source("d.jsonl", texts("d"))), (1, 4), replay_share=0.2)
    second = corpus.write(tmp_path / "second", new, tokenizer, first)
    a, b = (domain.shards.count("train") for domain in first.domains)
    assert [(name, stage) for name, stage, _ in facts(second)] == [("a", 0), ("b", 0), ("c", 1), ("d", 1)]
    assert [domain.share for domain in second.domains] == pytest.approx([0.2 * a / (a + b), 0.2 * b / (a + b), 0.16, 0.64])
    assert second.stage == 1
    for before, after in zip(first.domains, second.domains, strict=False):
        assert before.shards.manifest == after.shards.manifest
        for path, link in zip(before.shards.files(), after.shards.files(), strict=True):
            assert path.samefile(link) and tmp_path / "second" in link.parents
    assert corpus.read(tmp_path / "second", tokenizer) == second
    third = corpus.write(tmp_path / "third", DataConfig((source("e.jsonl", texts("e")),), replay_share=0.5), tokenizer, second)
    assert [(name, stage) for name, stage, _ in facts(third)] == [("a", 0), ("b", 0), ("c", 1), ("d", 1), ("e", 2)]
    tokens = [domain.shards.count("train") for domain in third.domains[:4]]
    assert [domain.share for domain in third.domains] == pytest.approx([*(0.5 * n / sum(tokens) for n in tokens), 0.5])
    (tmp_path / "first" / corpus.DOMAINS_FILE).unlink()  # a run may be deleted; what others use of it stays
    for path in (tmp_path / "first").rglob("*.npy"):
        path.unlink()
    assert corpus.read(tmp_path / "third", tokenizer) == third


def test_without_replay_earlier_domains_are_only_measured(tokenizer: Tokenizer, tmp_path: Path, source: Source) -> None:
    first = corpus.write(tmp_path / "first", DataConfig((source("a.jsonl", texts("a")),)), tokenizer)
    sources = (source("b.jsonl", texts("b")), source("c.jsonl", texts("c")))
    second = corpus.write(tmp_path / "second", DataConfig(sources, (1, 3)), tokenizer, first)
    assert facts(second) == [("a", 0, 0.0), ("b", 1, 0.25), ("c", 1, 0.75)]
    b, c = second.domains[1:]
    for split in shards.SPLITS:
        assert second.count(split) == b.shards.count(split) + c.shards.count(split)
    stream = second.stream(8, 1000, 1, 1, 0, None)
    assert len(stream.domains) == 2
    places = stream.places(0)
    assert [sum(place.domain == number for place in places) for number in (0, 1)] == [250, 750]
    assert second.trained == (b, c)
    for place, row in list(zip(places, stream.batch(0).ids, strict=True))[:20]:
        ids = second.trained[place.domain].shards.tokens("train")[place.array]
        assert row.tolist() == ids[place.start : place.start + 8].tolist()


def test_where_links_are_impossible_files_are_copied(
    tokenizer: Tokenizer, tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = corpus.write(tmp_path / "first", DataConfig((source("a.jsonl", texts("a")),)), tokenizer)

    def refuse(*_: object) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    second = corpus.write(tmp_path / "second", DataConfig((source("b.jsonl", texts("b")),), replay_share=0.5), tokenizer, first)
    assert corpus.read(tmp_path / "second", tokenizer) == second
    for path, copy in zip(first.domains[0].shards.files(), second.domains[0].shards.files(), strict=True):
        assert path.read_bytes() == copy.read_bytes() and not path.samefile(copy)


# ---------------------------------------------------------------------- batches


def test_the_first_domain_is_read_as_if_alone_and_the_others_in_orders_of_their_own(
    tokenizer: Tokenizer, tmp_path: Path, source: Source
) -> None:
    sources = (source("a.jsonl", texts("a")), source("b.jsonl", texts("a")))
    two = corpus.write(tmp_path / "two", DataConfig(sources, (1, 1)), tokenizer).stream(8, 2, 3, 2, 5, 4)
    one = corpus.write(tmp_path / "one", DataConfig(sources[:1]), tokenizer).stream(8, 2, 3, 2, 5, None)
    assert (two.batch_size, two.accumulation_steps, two.world, two.end_id) == (2, 3, 2, 4)
    orders = [[windows.place(number) for number in range(50)] for windows in (*two.domains, one.domains[0])]
    assert orders[0] == orders[2] != orders[1]
    assert [place for number in range(25) for place in one.places(number)][:2] == [(0, *orders[0][0]), (0, *orders[0][1])]


# ---------------------------------------------------------------------- complete or absent


def test_a_flipped_byte_in_any_shard_is_noticed(tokenizer: Tokenizer, tmp_path: Path, source: Source) -> None:
    first = corpus.write(tmp_path / "first", DataConfig((source("a.jsonl", texts("a")),)), tokenizer)
    sources = (source("b.jsonl", texts("b")), source("c.jsonl", texts("c")))
    folder = tmp_path / "second"
    made = corpus.write(folder, DataConfig(sources, (1, 3)), tokenizer, first)
    files = sorted(folder.rglob("*.npy"))
    assert len(files) == 6
    for path in files:
        whole = path.read_bytes()
        for at in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(UserError, match=f"{path.name}: changed since it was written"):
                corpus.read(folder, tokenizer)
        path.write_bytes(whole)
    assert corpus.read(folder, tokenizer) == made
    with pytest.raises(UserError, match="made with another tokenizer"):
        corpus.read(folder, Tokenizer.train(["something else"], 270))
    manifest = made.domains[2].shards.folder / shards.MANIFEST
    manifest.rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"02-c: .*not complete shards"):
        corpus.read(folder, tokenizer)
    (folder / corpus.DOMAINS_FILE).write_text("[{")
    with pytest.raises(UserError, match=r"no readable domains\.json"):
        corpus.read(folder, tokenizer)
    with pytest.raises(UserError, match=r"no readable domains\.json"):
        corpus.read(tmp_path / "nowhere", tokenizer)


def test_a_full_disk_leaves_nothing(tokenizer: Tokenizer, tmp_path: Path, source: Source, full_disk: Any) -> None:
    config = DataConfig((source("a.jsonl", texts("a", 500)),))
    with full_disk(4000), pytest.raises(UserError, match="cannot write"):
        corpus.write(tmp_path / "shards", config, tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["sources"]
    assert corpus.write(tmp_path / "shards", config, tokenizer).count("train")  # and with space it is written
    with pytest.raises(UserError, match="exists already"):
        corpus.write(tmp_path / "shards", config, tokenizer)


def test_an_unreadable_or_empty_source_leaves_nothing(tokenizer: Tokenizer, tmp_path: Path, source: Source) -> None:
    good, bad = source("a.jsonl", texts("a")), Path(source("b.jsonl", texts("b")))
    for content, message in ((b'{"text": "ok"}\noops\n', "line 2: not JSON"), (b"\n", "corpus is empty")):
        bad.write_bytes(content)
        with pytest.raises(UserError, match=message):
            corpus.write(tmp_path / "shards", DataConfig((good, str(bad)), (1, 1)), tokenizer)
        assert [path.name for path in tmp_path.iterdir()] == ["sources"]
