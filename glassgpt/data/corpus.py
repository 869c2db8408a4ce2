"""What a run learns from: one or several domains, each with its shards and its share; and what earlier runs learnt from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glassgpt.config import DataConfig, UserError
from glassgpt.config.files import complete_folder
from glassgpt.data import shards
from glassgpt.data.progress import counted
from glassgpt.data.shards import Shards
from glassgpt.data.sources import Unique, documents
from glassgpt.data.stream import Stream, Windows
from glassgpt.text import Tokenizer

DOMAINS_FILE = "domains.json"


@dataclass(frozen=True)
class Domain:
    """Text of one kind: a source with a weight, or all sources together."""

    name: str
    shards: Shards
    share: float
    """Of the training windows; 0 for an earlier stage's domain that is only measured."""
    stage: int
    """0 for the first run of a chain of `--start`s, 1 for the next one."""


@dataclass(frozen=True)
class Corpus:
    """The domains of a run, earlier stages' first."""

    domains: tuple[Domain, ...]

    @property
    def stage(self) -> int:
        """Which link of the chain this run is."""
        return max(domain.stage for domain in self.domains)

    @property
    def trained(self) -> tuple[Domain, ...]:
        """The domains that are trained on, as a `Place` of the stream counts them."""
        return tuple(domain for domain in self.domains if domain.share)

    def count(self, split: str) -> int:
        """Tokens of `train` or `val`, over the domains that are trained on."""
        return sum(domain.shards.count(split) for domain in self.trained)

    def stream(
        self, context_tokens: int, batch_size: int, accumulation_steps: int, world: int, seed: int, end_id: int | None
    ) -> Stream:
        """The training batches; see `Stream`."""
        windows = [
            Windows(domain.shards.tokens("train"), context_tokens, (seed, number) if number else (seed,))
            for number, domain in enumerate(self.trained)
        ]
        return Stream(windows, [domain.share for domain in self.trained], batch_size, accumulation_steps, world, end_id)


def texts(sources: Sequence[str], once: Unique | None) -> Iterator[str]:
    """The documents of some sources, each once if asked."""
    return once(documents(sources)) if once else documents(sources)


def training_texts(config: DataConfig) -> Iterator[str]:
    """The documents that a tokenizer may learn from: nothing that is held out, group by group as `write` parts them."""
    for sources in _groups(config).values():
        for split, text in shards.hold_out(texts(sources, Unique() if config.deduplicate else None), config.holdout_share):
            if split == "train":
                yield text


def write(folder: Path, config: DataConfig, tokenizer: Tokenizer, earlier: Corpus | None = None) -> Corpus:
    """Tokenise the sources into `folder`, beside the domains of an `earlier` run, whose files are linked (or copied).

    The folder appears complete or not at all. Raises UserError for unreadable or empty sources.
    """
    before = earlier.domains if earlier else ()
    stage = earlier.stage + 1 if earlier else 0
    entries: list[dict[str, Any]] = []
    with complete_folder(folder) as aside:
        for domain in before:
            part = aside / f"{len(entries):02d}-{domain.name}"
            part.mkdir()
            for path in domain.shards.files():
                _link(path, part / path.name)
            entries.append({"name": domain.name, "folder": part.name, "stage": domain.stage})
        for name, sources in _groups(config).items():
            free = next(n for n in _numbered(name) if n not in {entry["name"] for entry in entries})
            part = aside / f"{len(entries):02d}-{free}"
            once = Unique() if config.deduplicate else None
            shards.write(part, counted(texts(sources, once), f"tokenising {free}"), tokenizer, config.holdout_share)
            entries.append({"name": free, "folder": part.name, "stage": stage, "repeats_dropped": once.dropped if once else 0})
        made = [Shards(aside / e["folder"], json.loads((aside / e["folder"] / shards.MANIFEST).read_text())) for e in entries]
        for entry, share in zip(entries, _shares(config, [e["stage"] == stage for e in entries], made), strict=True):
            entry["share"] = share
        (aside / DOMAINS_FILE).write_text(json.dumps(entries, indent=1))
    return read(folder, tokenizer, check=False)


def read(folder: Path, tokenizer: Tokenizer, *, check: bool = True) -> Corpus:
    """Open a run's corpus. Raises UserError when it is incomplete or (with `check`, which reads every file) changed."""
    try:
        entries = json.loads((folder / DOMAINS_FILE).read_text())
        facts = [(entry["name"], folder / entry["folder"], entry["share"], entry["stage"]) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: no readable {DOMAINS_FILE}, so this is no complete corpus ({error}); a run of version 0.1 has none:"
            " start it anew"
        ) from error
    return Corpus(
        tuple(Domain(name, shards.read(part, tokenizer, check=check), share, stage) for name, part, share, stage in facts)
    )


def _groups(config: DataConfig) -> dict[str, tuple[str, ...]]:
    """Name -> sources of each new domain."""
    if not config.weights:
        more = f"+{len(config.sources) - 1}" if len(config.sources) > 1 else ""
        return {_name(config.sources[0]) + more: config.sources}
    groups: dict[str, tuple[str, ...]] = {}
    for source in config.sources:
        groups[next(name for name in _numbered(_name(source)) if name not in groups)] = (source,)
    return groups


def _name(source: str) -> str:
    stem = Path(source.rstrip("/")).name.split(".")[0] or "text"
    return "".join(character if character.isalnum() or character in "-_" else "-" for character in stem)


def _numbered(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}-{number}" for number in range(2, 1000))


def _shares(config: DataConfig, is_new: Sequence[bool], made: Sequence[Shards]) -> list[float]:
    """New domains by their weights (by tokens when none are given); earlier ones share `replay_share` by tokens."""
    tokens = [part.count("train") for part in made]
    weights = list(config.weights) or [count for count, new in zip(tokens, is_new, strict=True) if new]
    given = iter(weights)
    sizes = [next(given) if new else count for count, new in zip(tokens, is_new, strict=True)]
    total = {new: sum(size for size, n in zip(sizes, is_new, strict=True) if n == new) for new in (True, False)}
    part = {True: 1 - config.replay_share, False: config.replay_share}
    return [part[new] * size / total[new] for size, new in zip(sizes, is_new, strict=True)]


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(source, target)
