"""`glassgpt info MODEL`: what a model is made of, as tables or as JSON."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from glassgpt.config import PRESET_NOTES, PRESETS, ModelConfig, UserError, nearest
from glassgpt.config.files import to_plain
from glassgpt.config.info import Info
from glassgpt.interpret.anatomy import Anatomy, Group, TensorInfo, anatomy, folded
from glassgpt.loading import find_config

SHOWN_HEADS = 4
"""Rows of the Q | K | V table; with more heads the middle ones are left out."""


def info(config: Info) -> Anatomy:
    """Show a model's parameters, Q | K | V rows and memory; returns the same as data.

    Reads a stored model's configuration and the headers of its files, never its weights. Raises UserError when there is
    no such model and no such preset.
    """
    shape, dtypes = resolve(config.model)
    facts = anatomy(shape, dtypes, config.batch_size, config.context_tokens)
    note = PRESET_NOTES.get(config.model) if dtypes is None else None
    if config.json:
        print(json.dumps({"model": config.model, "note": note, "stored": dtypes is not None, **as_json(facts)}))
    else:
        _show(Console(highlight=False), facts, config, note, stored=dtypes is not None)
    return facts


def resolve(name: str) -> tuple[ModelConfig, dict[str, str] | None]:
    """Shape and stored dtypes of what `glassgpt.load(name)` would give; else the preset's shape and None."""
    try:
        return find_config(name)
    except UserError as error:
        if name in PRESETS:
            return PRESETS[name], None
        if Path(name).exists():  # a folder or file with something wrong in it: the error says what
            raise
        raise UserError(f"{error}; presets{nearest(name, PRESETS)}: {', '.join(PRESETS)}") from error


# ---------------------------------------------------------------------- JSON


def as_json(facts: Anatomy) -> dict[str, Any]:
    """What `--json` prints: counts of parameters, bytes of memory, each head's rows (first and last included)."""
    memory = facts.memory
    return {
        "parameters": facts.parameters,
        "parameters_active": facts.parameters_active,
        "parameters_untied": facts.parameters_untied,
        "reason": facts.reason,
        "stored_bytes": facts.stored_bytes,
        "config": to_plain(facts.config),
        "groups": [_group_json(group) for group in facts.groups],
        "tensors": [dataclasses.asdict(tensor) for tensor in facts.tensors],
        "qkv": [{"part": x.part, "head": x.head, "first_row": x.rows[0], "last_row": x.rows[-1]} for x in facts.qkv],
        "memory": {
            "batch_size": memory.batch_size,
            "context_tokens": memory.context_tokens,
            "inference": {x.dtype: _bytes_json(x) for x in memory.inference},
            "training": _bytes_json(memory.training),
        },
    }


def _group_json(group: Group) -> dict[str, Any]:
    parts = {part.name: part.count for part in group.parts}
    return {"name": group.name, "count": group.count, "share": group.share, "parts": parts}


def _bytes_json(estimate: Any) -> dict[str, int]:
    bytes_of = {key: value for key, value in dataclasses.asdict(estimate).items() if key != "dtype"}
    return {**bytes_of, "total": estimate.total}


# ---------------------------------------------------------------------- tables


def _show(console: Console, facts: Anatomy, config: Info, note: str | None, stored: bool) -> None:
    console.print(Text.assemble((config.model, "bold"), f"  {facts.parameters:,} parameters"))
    console.print(_origin(facts, stored), style="dim")
    if note is not None:
        console.print(f"Note: {note}.", style="yellow")
    _show_config(console, facts.config)
    if config.all:
        _show_tensors(console, facts)
    else:
        _show_blocks(console, facts)
    _show_totals(console, facts)
    _show_qkv(console, facts)
    _show_memory(console, facts)


def _origin(facts: Anatomy, stored: bool) -> str:
    if not stored:
        return "A preset: a shape without weights."
    dtypes = " and ".join(sorted({tensor.dtype for tensor in facts.tensors}))
    size = "" if facts.stored_bytes is None else f", {decimal(facts.stored_bytes)}"
    return f"Weights stored as {dtypes}{size}."


def _title(console: Console, title: str) -> None:
    console.print(f"\n{title}", style="bold")


def _table(*columns: str, gap: int = 2) -> Table:
    """A table without a frame; columns whose name starts with > are flush right."""
    has_header = any(column.strip(">") for column in columns)
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="dim", show_header=has_header)
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left", no_wrap=True)
    return table


def _show_config(console: Console, config: ModelConfig) -> None:
    remarks = {
        "n_head": f"each {config.head_width:,} wide",
        "n_kv_head": f"each shared by {config.n_head // config.kv_heads}",
        "mlp_width": f"{config.hidden_width / config.width:.4g} x width",
        "tied_head": "the head is the token embedding" if config.tied_head else "the head has its own matrix",
    }
    _title(console, "Configuration")
    table = _table("", ">", "")
    for name, value in _settings(config).items():
        is_count = isinstance(value, int) and not isinstance(value, bool)
        table.add_row(name, f"{value:,}" if is_count else str(value), Text(remarks.get(name, ""), style="dim"))
    console.print(table)


def _settings(config: ModelConfig) -> dict[str, Any]:
    """The fields that say something of this network, those of nested ones with a dot."""
    values = to_plain(config) | {"mlp_width": config.hidden_width, "spans": " ".join(config.spans)}
    rope, moe = values.pop("rope"), values.pop("moe")
    if config.position == "rope":
        values |= {f"rope.{name}": value for name, value in rope.items() if rope["scaling"] != "none" or name == "theta"}
    if config.moe.experts:
        values |= {f"moe.{name}": value for name, value in (moe | {"expert_width": config.expert_width}).items()}
    return {name: value for name, value in values.items() if value is not None}


def _show_blocks(console: Console, facts: Anatomy) -> None:
    """Equal blocks as one, with their inside once; a tied head is left to the totals."""
    _title(console, "Parameters")
    table = _table("", "shape", ">each", ">in all", ">share", gap=1 if facts.config.moe.experts else 2)
    for alike in folded(facts.groups):
        group, times = alike[0], len(alike)
        if group.count == 0:
            continue
        name = group.name if times == 1 else f"{group.name} … {alike[-1].name}"
        shape = f"{times:,} equal blocks" if times > 1 else _shape(group.tensors[0]) if len(group.tensors) == 1 else ""
        table.add_row(name, shape, *_counts(group, times), style="bold" if group.parts else "")
        for part in group.parts:
            table.add_row(f" {part.name}", "", *_counts(part, times))
            for name, tensors in _alike(part, f"{group.name}.{part.name}." if part.name != "norms" else f"{group.name}.").items():
                several = f"{len(tensors):,} x " if len(tensors) > 1 else ""
                counts = _counts(Group(name, tensors), times)
                table.add_row(f"  {name}", f"{several}{_shape(tensors[0])}", *counts, style="dim")
    console.print(table)


def _alike(part: Group, prefix: str) -> dict[str, tuple[TensorInfo, ...]]:
    """A part's tensors by name, those of a mixture's experts together: experts.*.up.weight."""
    found: dict[str, tuple[TensorInfo, ...]] = {}
    for tensor in part.tensors:
        name = re.sub(r"\.\d+\.", ".*.", tensor.name.removeprefix(prefix))
        found[name] = (*found.get(name, ()), tensor)
    return found


def _shape(tensor: TensorInfo) -> str:
    return " x ".join(f"{size:,}" for size in tensor.shape)


def _counts(item: Group | TensorInfo, times: int) -> tuple[str, str, str]:
    return f"{item.count:,}", f"{item.count * times:,}", _share(item.share * times)


def _share(share: float) -> str:
    return "<0.1%" if share < 0.001 else f"{share:.1%}"


def _show_tensors(console: Console, facts: Anatomy) -> None:
    _title(console, "Tensors")
    table = _table("", "shape", "dtype", ">parameters", ">share", gap=1 if facts.config.moe.experts else 2)
    for tensor in facts.tensors:
        if tensor.tied_to is None:
            table.add_row(tensor.name, _shape(tensor), tensor.dtype, f"{tensor.count:,}", _share(tensor.share))
    console.print(table)


def _show_totals(console: Console, facts: Anatomy) -> None:
    for tensor in facts.tensors:
        if tensor.tied_to is not None:
            console.print(f"{tensor.name} = {tensor.tied_to} (tied)")
    console.print()
    table = _table("", ">")
    table.add_row("parameters, each counted once", f"{facts.parameters:,}", style="bold")
    if facts.parameters_active != facts.parameters:
        table.add_row("active: what one token meets", f"{facts.parameters_active:,}")
    table.add_row("with a head of its own", f"{facts.parameters_untied:,}")
    console.print(table)
    console.print(facts.reason)


def _show_qkv(console: Console, facts: Anatomy) -> None:
    D, W, H, G = facts.config.width, facts.config.head_width, facts.config.n_head, facts.config.kv_heads
    _title(console, f"Q | K | V: rows of attn.qkv.weight, {(H + 2 * G) * W:,} x {D:,}, in every block")
    rows = {(of_head.part, of_head.head): f"{of_head.rows[0]:,} … {of_head.rows[-1]:,}" for of_head in facts.qkv}
    table = _table("head", ">Q", ">K", ">V")
    shown = range(H) if H <= SHOWN_HEADS else (0, 1, H - 1)
    for before, head in zip((-1, *shown), shown, strict=False):
        if head > before + 1:
            table.add_row(*"…" * 4)
        shared = head * G // H
        table.add_row(f"{head}", rows["q", head], rows["k", shared], rows["v", shared])
    console.print(table)
    text = f"The keys of head 0: model.blocks[0].attn.qkv.weight[{H * W}:{H * W + W}]."
    if G < H:
        text += f" {H // G} heads of queries share each of the {G} of keys and values."
    elif facts.config.position == "learned" and H * W == D:
        text += (
            f" A Hugging Face GPT-2 holds the same matrix as a Conv1D, {D:,} x {3 * D:,}: there these rows are columns of"
            " c_attn.weight."
        )
    console.print(text, style="dim")


def _show_memory(console: Console, facts: Anatomy) -> None:
    memory = facts.memory
    many = "sequence" if memory.batch_size == 1 else "sequences"
    _title(console, f"Memory for B = {memory.batch_size:,} {many} of T = {memory.context_tokens:,} tokens (estimates)")
    table = _table("to generate", "numbers", *(f">{estimate.dtype}" for estimate in memory.inference))
    table.add_row("weights", "parameters", *(decimal(x.weights) for x in memory.inference))
    table.add_row("keys and values", _cached(facts.config), *(decimal(x.kv_cache) for x in memory.inference))
    table.add_row("logits of one step", "B x vocabulary", *(decimal(x.logits) for x in memory.inference))
    table.add_row("in all", "", *(decimal(x.total) for x in memory.inference), style="bold")
    console.print(table)

    training = memory.training
    console.print()
    table = _table("to train with AdamW", "", ">float32")
    table.add_row("weights", "4 bytes a parameter", decimal(training.weights))
    table.add_row("gradients", "4 bytes a parameter", decimal(training.gradients))
    table.add_row("AdamW's moments", "8 bytes a parameter", decimal(training.optimizer))
    table.add_row("activations", "kept for the backward pass", decimal(training.activations))
    table.add_row("in all", "", decimal(training.total), style="bold")
    console.print(table)
    dropout = facts.config.dropout
    rest = f"; what dropout {dropout:g} keeps comes on top." if dropout else "."
    console.print(f"Activations with fused attention{rest}", style="dim")


def _cached(config: ModelConfig) -> str:
    """Where the numbers of the cache come from."""
    width = "width" if config.kv_heads * config.head_width == config.width else f"{config.kv_heads * config.head_width:,}"
    if "window" not in config.spans:
        return f"2 x layers x B x T x {width}"
    return f"2 x B x {width} x positions held"
