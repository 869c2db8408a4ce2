"""`glassgpt lab coherence`: how far back does the model look, and do its texts keep to what they were about?

by position   loss of held-out tokens by how many tokens stand before them
context cut   loss of the same tokens when only the last k tokens are shown: what tokens further back are worth
topic         do words of a prompt come again in the text after it, more than words of other prompts do?
attention     mean distance of attention, by layer and head
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from glassgpt.config import UserError
from glassgpt.config.coherence import Coherence
from glassgpt.config.files import to_plain
from glassgpt.config.generate import Sampling
from glassgpt.data.progress import steps
from glassgpt.generation import stream
from glassgpt.generation.generator import Generator
from glassgpt.interpret.heads import pattern_distance
from glassgpt.interpret.hooks import capture
from glassgpt.lab.bootstrap import Interval
from glassgpt.lab.coherence import context_loss, topics
from glassgpt.lab.coherence import report as coherence_report
from glassgpt.lab.coherence.context_loss import WITHIN_BITS, WITHIN_SHARE, Point, Reach
from glassgpt.lab.coherence.topics import Shares
from glassgpt.lab.reference import documents
from glassgpt.lab.text_measures import words
from glassgpt.loading import load, pick_device
from glassgpt.model import GPT
from glassgpt.text import Tokenizer

ATTENTION_ROWS = 4
"""Stretches of text that the mean distance of attention is taken over."""


@dataclass(frozen=True)
class Result:
    """What the experiment found. Bits are per token."""

    config: dict[str, Any]
    context_tokens: int
    documents: int
    """Documents longer than that."""
    positions: list[Point]
    sizes: list[int]
    """Lengths of the cut context."""
    cut: list[Interval]
    """Loss at each."""
    gain: list[Interval]
    """What each costs more than all of the context, paired by target."""
    near_share: Reach
    """Within WITHIN_SHARE of the loss with all of the context."""
    near_bits: Reach
    """Within WITHIN_BITS."""
    written: list[Shares]
    """Words of the prompt in the model's texts."""
    real: list[Shares]
    """The same in the text that really follows."""
    distance_tokens: list[list[float]]
    """Mean distance of attention, (L, H)."""
    uniform_tokens: float
    """The same if a token looked at all before it and at itself alike."""


def coherence(config: Coherence) -> Result:
    """Measure, draw, tell; writes results.json, two tables, report.md and a picture.

    Raises UserError for an unknown model, text that cannot be read, and fewer than two documents longer than the context.
    """
    model, tokenizer = load(config.model, device=str(pick_device(config.device)))
    start = [] if tokenizer.begin_id is None else [tokenizer.begin_id]
    context = context_of(config, model, start)
    texts = documents(config.source, config.holdout_share)
    ids = tokenizer.encode_batch(texts)
    long = [each for each in ids if len(each) > context]
    if len(long) < 2:
        raise UserError(
            f"{len(long)} document(s) have more than {context} tokens, and intervals need two;"
            " give more or longer text, or a smaller context_tokens"
        )
    resampled = (config.resamples, config.seed)
    rows, document = stretches(long, context + 1, config.windows, config.seed)
    given = with_start(rows, start, model)
    with steps("loss by position") as progress:
        bits = context_loss.position_bits(model, given, max(1, config.batch_tokens // context), progress)[:, len(start) :]
    positions = context_loss.by_position(bits, document, *resampled)

    rows, document = stretches(long, context + 1, config.targets, config.seed + 1)
    sizes = context_loss.lengths(context)
    with steps("loss with the context cut") as progress:
        bits = context_loss.cut_bits(model, with_start(rows, [], model), sizes, config.batch_tokens, start, progress)
    result = Result(
        to_plain(config),
        context,
        len(long),
        positions,
        sizes,
        context_loss.mean_bits(bits, document, *resampled),
        context_loss.gain_bits(bits, document, *resampled),
        context_loss.reach(bits, sizes, document, lambda full: WITHIN_SHARE * full, *resampled),
        context_loss.reach(bits, sizes, document, lambda full: np.full_like(full, WITHIN_BITS), *resampled),
        *keeps_topic(config, model, tokenizer, texts, ids, start),
        attention_distance(model, given[:ATTENTION_ROWS, :-1]),
        (given.size(1) - 2) / 4,
    )
    _write(result, Path(config.out_dir))
    if config.json:
        print(json.dumps(asdict(result)))
    else:
        coherence_report.show(result, Console(width=coherence_report.WIDTH))
    return result


def context_of(config: Coherence, model: GPT, start: Sequence[int]) -> int:
    """The longest context to try. Raises UserError for more than the model has, and for texts that would not fit."""
    most = model.config.context_tokens - len(start)
    if (config.context_tokens or 0) > most:
        raise UserError(f"context_tokens is {config.context_tokens}, the model has {most}; use at most that")
    if config.prompts and config.prompt_tokens + config.new_tokens > most:
        raise UserError(
            f"prompt_tokens {config.prompt_tokens} and new_tokens {config.new_tokens} do not fit the model's context of {most};"
            " make one smaller, or leave that part out with --prompts 0"
        )
    return config.context_tokens or most


# ---------------------------------------------------------------------- text


def stretches(ids: Sequence[list[int]], length: int, count: int, seed: int) -> tuple[list[list[int]], list[int]]:
    """`count` runs of `length` tokens, each beginning at a random place, and the document that each is from.

    Documents take turns, in random order; fewer runs come when all places are used. Documents must be long enough.
    """
    draw = random.Random(seed)
    order = draw.sample(range(len(ids)), len(ids))
    wanted = -(-count // len(ids))
    starts = {}
    for place in order:
        room = range(len(ids[place]) - length + 1)
        starts[place] = draw.sample(room, min(wanted, len(room)))
    found = [(place, starts[place][turn]) for turn in range(wanted) for place in order if turn < len(starts[place])][:count]
    return [ids[place][begin : begin + length] for place, begin in found], [place for place, _ in found]


def with_start(rows: Sequence[list[int]], start: Sequence[int], model: GPT) -> Tensor:
    """Rows as a tensor beside the model, each after the token that texts begin with, if there is one."""
    return torch.tensor([[*start, *row] for row in rows], device=model.head.weight.device)


def keeps_topic(
    config: Coherence, model: GPT, tokenizer: Tokenizer, texts: Sequence[str], ids: Sequence[list[int]], start: Sequence[int]
) -> tuple[list[Shares], list[Shares]]:
    """Shares of the prompts' words in the model's texts and in the real ones, for the same prompts."""
    length = config.prompt_tokens + config.new_tokens
    long = [each for each in ids if len(each) >= length]
    rows, _ = stretches(long, length, config.prompts, config.seed + 2) if long and config.prompts else ([], [])
    if len(rows) < 2:
        return [], []
    prompts = [row[: config.prompt_tokens] for row in rows]
    written = continued(model, tokenizer, [[*start, *prompt] for prompt in prompts], config)
    common = topics.common_words(texts)
    held = [frozenset(word for word in words(tokenizer.decode(prompt)) if topics.is_content(word, common)) for prompt in prompts]
    near = min(topics.NEAREST_TOKENS, config.new_tokens)
    ranges = [(1, near), *((low, high) for low, high in context_loss.buckets(config.new_tokens) if low > near)]
    both = []
    for each in (written, [row[config.prompt_tokens :] for row in rows]):
        placed = [topics.placed_words(tokenizer, text) for text in each]
        both.append(topics.shares(placed, held, ranges, common, config.resamples, config.seed))
    return both[0], both[1]


def continued(model: GPT, tokenizer: Tokenizer, prompts: Sequence[list[int]], config: Coherence) -> list[list[int]]:
    """The ids that the model writes after each prompt, all as one batch."""
    generators = [Generator(config.seed * 1_000_003 + row) for row in range(len(prompts))]
    written: list[list[int]] = [[] for _ in prompts]
    sampling, total = Sampling(config.temperature), len(prompts) * config.new_tokens
    with steps("texts") as progress:
        tokens = stream(model, prompts, sampling, generators, config.new_tokens, n_ids=tokenizer.vocab_size)
        for done, token in enumerate(tokens, 1):
            written[token.row].append(token.id)
            progress(done, total)
    return written


@torch.inference_mode()
def attention_distance(model: GPT, rows: Tensor) -> list[list[float]]:
    """Mean distance in tokens that each head looks back, (L, H), over rows (N, T), a layer and a row at a time."""
    found = []
    for layer in range(len(model.blocks)):
        name = f"blocks.{layer}.attn.pattern"
        distances = []
        for row in rows:
            with capture(model, name) as seen:
                model.hidden(row[None])
            distances.append(pattern_distance(seen[name])[0])
        found.append(torch.stack(distances).mean(0).tolist())
    return found


# ---------------------------------------------------------------------- files


def _write(result: Result, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
    positions = [[point.low, point.high, *asdict(point.bits).values()] for point in result.positions]
    _table(out / "position.csv", ["first", "last", "bits", "low", "high"], positions)
    cut = [[k, *asdict(a).values(), *asdict(b).values()] for k, a, b in zip(result.sizes, result.cut, result.gain, strict=True)]
    _table(out / "cut.csv", ["tokens", "bits", "low", "high", "more_bits", "more_low", "more_high"], cut)
    coherence_report.chart(result, out)
    (out / "report.md").write_text(coherence_report.markdown(result), encoding="utf-8")


def _table(path: Path, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(names)
        table.writerows(rows)
