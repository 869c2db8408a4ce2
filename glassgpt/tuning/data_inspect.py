"""`glassgpt data inspect`: what a model would learn from a file, before any training."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from glassgpt.config import UserError
from glassgpt.config.tuning import DataInspect
from glassgpt.data import records as reading
from glassgpt.data.records import Record
from glassgpt.loading import find
from glassgpt.text import Tokenizer
from glassgpt.train.run import sparkline
from glassgpt.tuning import examples, stage
from glassgpt.tuning.examples import Audit, Example

BINS = 20
SHOWN_TOKENS = 160


def data_inspect(config: DataInspect) -> dict[str, Any]:
    """Print and return the audit of files of examples. Raises UserError where a training run would refuse to start."""
    found = find(config.model)
    tokenizer, context = found.tokenizer(), found.config().context_tokens
    if config.max_tokens > context:
        raise UserError(f"max_tokens is {config.max_tokens} and the context of {config.model} {context}; use at most that")
    records = reading.read(config.files)
    texts = encoded(records, tokenizer, config.template)
    ends = examples.end_ids(tokenizer, config.template)
    if records[0].shape == "prompt":  # for reinforcement learning: the model will write the answers
        audit = Audit(texts)
    else:
        audit = examples.fit(texts, config.max_tokens or context, config.overlong, ends)
    facts = summary(audit, records)
    if config.chart:
        stage.plot_lengths(audit, Path(config.chart))
    if config.json:
        print(json.dumps({"model": config.model, "max_tokens": config.max_tokens or context, **facts}, ensure_ascii=False))
    else:
        _show(config, facts, audit, records, tokenizer, Console())
    return facts


def encoded(records: Sequence[Record], tokenizer: Tokenizer, template: str) -> list[Example]:
    """Every text that a stage would read: conversations, both answers of pairs, labelled answers."""
    if records[0].rejected:
        return [text for pair in examples.pairs(records, tokenizer, template) for text in pair]
    if records[0].label is not None:
        return [judged.answer for judged in examples.judged(records, tokenizer, template)]
    if records[0].shape == "prompt":
        asked = (examples.prompt_ids(record.prompt, tokenizer, template) for record in records)
        return [Example(ids, [False] * len(ids), record.place) for ids, record in zip(asked, records, strict=True)]
    return examples.conversations(records, tokenizer, template)


def summary(audit: Audit, records: Sequence[Record]) -> dict[str, Any]:
    """The audit in numbers: lengths in tokens of instructions (Q) and responses (A)."""
    lengths = {"Q": [e.n_instruction for e in audit.examples], "A": [e.n_response for e in audit.examples]}
    return {
        "recognised": reading.recognised(records),
        "examples": len(records),
        "texts": len(audit.examples),
        "dropped": dict(audit.dropped),
        "truncated": audit.truncated,
        "tokens_learnt": audit.supervised,
        "tokens_only_read": audit.masked,
        "end_token_learnt": audit.ended,
        **{
            name: {
                "mean": round(statistics.fmean(values), 2),
                "median": statistics.median(values),
                "p95": sorted(values)[min(len(values) - 1, round(0.95 * len(values)))],
                "max": max(values),
            }
            for name, values in lengths.items()
        },
    }


def _show(
    config: DataInspect, facts: dict[str, Any], audit: Audit, records: Sequence[Record], tokenizer: Tokenizer, console: Console
) -> None:
    for line in facts["recognised"]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    table = Table("tokens", "mean", "median", "95 %", "longest", "shortest to longest")
    for name, what in (("Q", "instruction"), ("A", "response")):
        lengths = [e.n_instruction if name == "Q" else e.n_response for e in audit.examples]
        numbers = facts[name]
        cells = [f"{numbers['mean']:.1f}", *(f"{numbers[key]:,.0f}" for key in ("median", "p95", "max"))]
        table.add_row(f"N_{name}: {what}", *cells, sparkline(_histogram(lengths, BINS), BINS))
    console.print(table)
    count = facts["texts"]
    lost = ", ".join(f"{number:,} {reason}" for reason, number in facts["dropped"].items()) or "none"
    learnt, only_read = facts["tokens_learnt"], facts["tokens_only_read"]
    console.print(f"{count:,} texts kept; dropped: {lost}; truncated: {facts['truncated']:,}", highlight=False)
    share = learnt / (learnt + only_read)
    console.print(f"{learnt:,} tokens are learnt ({share:.0%}), {only_read:,} only read", highlight=False)
    if learnt:
        ended = facts["end_token_learnt"]
        warning = "" if ended == count else "  (the others never learn to stop)"
        console.print(f"the end token is learnt in {ended:,} of {count:,} texts{warning}", highlight=False)
    if config.show:
        console.print("\nlearnt text is [bold green]green[/], what is only read is [dim]dim[/]; \\n stands for line ends")
    for example in audit.examples[: config.show]:
        console.print(f"--- {example.place}", style="cyan", markup=False, highlight=False)
        console.print(coloured(example, tokenizer), soft_wrap=True)


def coloured(example: Example, tokenizer: Tokenizer) -> Text:
    """An example with what is learnt in green. Without colours it stands between ⟦ and ⟧."""
    text, learning = Text(), False
    for token_id, learnt in list(zip(example.ids, example.mask, strict=True))[:SHOWN_TOKENS]:
        if learnt != learning:
            text.append("⟦" if learnt else "⟧", style="bold green")
            learning = learnt
        text.append(tokenizer.decode([token_id]).replace("\n", "\\n\n"), style="bold green" if learnt else "dim")
    text.append("⟧" if learning else "", style="bold green")
    return text.append(f" ... {len(example.ids) - SHOWN_TOKENS} tokens more" if len(example.ids) > SHOWN_TOKENS else "")


def _histogram(lengths: Sequence[int], bins: int) -> list[int]:
    low, high = min(lengths), max(lengths)
    counts = [0] * bins
    for length in lengths:
        counts[min(bins - 1, (length - low) * bins // max(1, high - low))] += 1
    return counts
