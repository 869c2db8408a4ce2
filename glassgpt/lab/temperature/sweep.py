"""`glassgpt lab temperature`: texts at every temperature and top-p, measured beside real text.

The measures of a cell are those of lab/text_measures.py over all its texts. Groups of real texts, as many and as long as those of
a cell, give every measure a band. A judge other than the model (a second model, or 3-grams of real text) prices every token.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from glassgpt.config import UserError
from glassgpt.config.files import to_plain
from glassgpt.config.generate import Sampling
from glassgpt.config.temperature import Temperature
from glassgpt.data.progress import tracked
from glassgpt.generation import complete
from glassgpt.interpret.next_token import logits_of
from glassgpt.lab import reference as real_text
from glassgpt.lab.reference import Reference
from glassgpt.lab.temperature import pictures as temperature_pictures
from glassgpt.lab.temperature import report as temperature_report
from glassgpt.lab.temperature.cells import Cell, Result, Written, limits_of, measures_of
from glassgpt.lab.temperature.ngram import Ngram
from glassgpt.lab.temperature.sample import measured
from glassgpt.loading import load, pick_device
from glassgpt.model import GPT
from glassgpt.text import Tokenizer

PROMPTS = (
    "Once upon a time, in a little house by the sea, there lived",
    "The old clock struck midnight, and",
    '"I do not believe it," said',
    "The detective looked at the letter again. It was",
    "Early in the morning the children ran down to the river, where",
    "When the ship had landed on the strange planet, the captain",
    "There was once a king who had three daughters. The youngest",
    "It was a cold night, and the wind",
)
"""Beginnings of stories, for the bundled storyteller."""
CONTEXT_TOKENS = 16
"""Of real text before a measured piece: about as many as a prompt has."""

Judge = Callable[[Sequence[int], Sequence[int]], list[float]]
"""judge(ids before, ids) -> bits of each of the ids."""


def temperature_sweep(config: Temperature) -> Result:
    """Write, measure, draw; writes results.json, cells.csv, report.md and two pictures.

    Raises UserError for an unknown model, prompts or reference that cannot be used, and texts that do not fit a context.
    """
    device = str(pick_device(config.device))
    model, tokenizer = load(config.model, device=device)
    prompts = read_prompts(config.prompt_file)
    check_room(model, tokenizer, prompts, config.new_tokens)
    reference = None
    if config.reference:
        share, seed = config.holdout_share, config.seed
        reference = real_text.read(config.reference, share, tokenizer, CONTEXT_TOKENS, config.new_tokens, seed)
    judge, judged_by = make_judge(config, device, tokenizer, reference)
    size = len(prompts) * config.samples
    groups = real_groups(reference, size, config.groups, model, tokenizer, judge)
    limits = limits_of([text for group in groups for text in group])
    known = reference.words if reference else None
    band = [measures_of(group, known, limits) for group in groups]
    grid = [(temperature, top_p) for top_p in config.top_p for temperature in config.temperatures]
    cells = []
    for temperature, top_p in tracked(grid, "cells"):
        texts = write_cell(model, tokenizer, prompts, Sampling(temperature, top_p=top_p), config, judge)
        shown = [text.text for text in texts[:: config.samples]]
        cells.append(Cell(temperature, top_p, measures_of(texts, known, limits), shown))
    result = Result(to_plain(config), list(prompts), judged_by, cells, band, limits)
    _write(result, Path(config.out_dir))
    if config.json:
        print(json.dumps(result.plain()))
    else:
        temperature_report.show(result, Console(width=temperature_report.WIDTH))
    return result


def _write(result: Result, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(result.plain(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "cells.csv").write_text(result.csv(), encoding="utf-8")
    temperature_pictures.chart(result, out)
    (out / "report.md").write_text(temperature_report.markdown(result), encoding="utf-8")


def read_prompts(path: str | None) -> tuple[str, ...]:
    """One prompt a line, empty lines left out. Raises UserError for a file that cannot be read or holds none."""
    if path is None:
        return PROMPTS
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompt file {path}: {error}") from error
    prompts = tuple(line for line in lines if line.strip())
    if not prompts:
        raise UserError(f"prompt file {path} holds no prompt; write one a line")
    return prompts


def check_room(model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], new_tokens: int) -> None:
    """Raises UserError when a prompt and what is written after it do not fit: texts of one cell must be of equal length."""
    context = model.config.context_tokens
    longest = max(CONTEXT_TOKENS, *(len(tokenizer.encode_start(prompt)) for prompt in prompts))
    if longest + new_tokens > context:
        raise UserError(
            f"prompts of up to {longest} tokens and new_tokens {new_tokens} do not fit a context of {context};"
            " take shorter prompts or fewer new_tokens"
        )


# ---------------------------------------------------------------------- judges


def make_judge(config: Temperature, device: str, tokenizer: Tokenizer, reference: Reference | None) -> tuple[Judge | None, str]:
    """The judge and its name; (None, "") when there is neither a second model nor real text."""
    if config.second is not None:
        return second_judge(*load(config.second, device=device), tokenizer), config.second
    if reference is None:
        return None, ""
    return Ngram(reference.known, tokenizer.vocab_size).bits, f"3-grams of {sum(map(len, reference.known)):,} real tokens"


def second_judge(second: GPT, its: Tokenizer, ours: Tokenizer) -> Judge:
    """A judge from another model, which may cut text into other tokens: the bits of each of its tokens are spread evenly over
    the token's bytes, and each of our tokens gets the bits of its own bytes."""

    def judge(before: Sequence[int], ids: Sequence[int]) -> list[float]:
        data = ours.decode_bytes([*before, *ids])
        tokens = its.encode_bytes(data)
        start = [] if its.begin_id is None else [its.begin_id]
        if len(start) + len(tokens) > second.config.context_tokens:
            raise UserError(
                f"the second model's context is {second.config.context_tokens} tokens, and a text has {len(tokens)} of them;"
                " take fewer new_tokens"
            )
        row = [*start, *tokens]
        log_p = logits_of(second, row[:-1])[:, : its.vocab_size].log_softmax(-1)  # (T - 1, V)
        bits = [-log_p[i, token].item() / math.log(2) for i, token in enumerate(row[1:])]
        bits = [0.0] * (len(tokens) - len(bits)) + bits  # nothing predicts the first token where no other one begins texts
        a_byte = [each / len(its.token_bytes(t)) for each, t in zip(bits, tokens, strict=True) for _ in its.token_bytes(t)]
        found, end = [], len(a_byte)  # from the end: some tokenizers put a space before a text
        for token in reversed(ids):
            length = len(ours.token_bytes(token))
            found.append(math.fsum(a_byte[end - length : end]))
            end -= length
        return found[::-1]

    return judge


# ---------------------------------------------------------------------- texts


def write_cell(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], sampling: Sampling, config: Temperature, judge: Judge | None
) -> list[Written]:
    """The texts of one cell, all prompts and samples as one batch, each with its numbers."""
    length, seed, n = config.new_tokens, config.seed, config.samples
    completions = complete(model, tokenizer, prompts, sampling, max_new_tokens=length, seed=seed, n=n, ignore_end=True)
    return [
        priced(model, tokenizer, tokenizer.encode_start(made.prompt), [token.id for token in made.tokens], sampling, judge)
        for made in completions
    ]


def priced(
    model: GPT, tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int], sampling: Sampling, judge: Judge | None
) -> Written:
    """A text with what each token costs under the model and under the judge."""
    own_bits, entropy_bits = measured(model, before, ids, sampling, tokenizer.vocab_size)
    data = tokenizer.decode_bytes(token for token in ids if not tokenizer.is_special(token))
    return Written(list(ids), data, own_bits, entropy_bits, judge(before, ids) if judge else None)


def real_groups(
    reference: Reference | None, size: int, groups: int, model: GPT, tokenizer: Tokenizer, judge: Judge | None
) -> list[list[Written]]:
    """Real texts in groups as large as a cell. Raises UserError when there are not enough for one group."""
    if reference is None:
        return []
    count = min(groups, len(reference.pieces) // size)
    if not count:
        raise UserError(f"the reference gives {len(reference.pieces)} pieces, a cell has {size} texts; give more text")
    start = [] if tokenizer.begin_id is None else [tokenizer.begin_id]
    pieces = reference.pieces[: count * size]
    found = [
        dataclasses.replace(priced(model, tokenizer, [*start, *before], ids, Sampling(), judge), entropy_bits=None)
        for before, ids in tracked(pieces, "real texts")
    ]
    return [found[i : i + size] for i in range(0, len(found), size)]
