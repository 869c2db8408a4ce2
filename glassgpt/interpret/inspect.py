"""`glassgpt inspect`: one look inside a model, as tables, a picture, a page, or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from glassgpt import charts
from glassgpt.config import ModelConfig, UserError
from glassgpt.config.inspect import Inspect
from glassgpt.data.progress import steps
from glassgpt.generation.writer import read_prompts
from glassgpt.interpret.html import page
from glassgpt.interpret.report import collect
from glassgpt.interpret.views import attention, compare, features, heads, lens, next_token, patch, summary, why
from glassgpt.interpret.views.view import Read, View, token_id
from glassgpt.loading import load, pick_device
from glassgpt.text import Tokenizer

VIEWS: dict[str, Callable[[Inspect, Read], View]] = {
    "summary": summary.summary,
    "attention": attention.attention,
    "heads": heads.heads,
    "lens": lens.view,
    "why": why.why,
    "next": next_token.view,
    "tree": next_token.tree,
    "compare": compare.view,
    "patch": patch.patch,
    "trace": patch.trace,
    "sae": features.view,
}
WITHOUT_PROMPT = ("heads", "patch")
"""Views that need none: one draws random tokens, the other brings two."""
DEFAULT_MODEL = "storyteller"


def inspect(config: Inspect) -> dict[str, Any]:
    """Show a view of a model and a prompt; returns its numbers. Raises UserError for a prompt that is empty or too long."""
    for path in (config.html, config.png, config.svg):
        check_folder(path)
    name = config.compare[0] if config.compare else config.model or DEFAULT_MODEL
    dtype = getattr(torch, config.dtype)
    model, tokenizer = load(name, device=str(pick_device(config.device)), dtype=dtype)
    prompt = "" if config.view in WITHOUT_PROMPT else prompt_of(config)
    ids = encode(prompt, tokenizer, model.config) if prompt else []
    read = Read(name, model, tokenizer, torch.tensor(ids, device=model.token_embedding.weight.device))
    if config.html is not None:
        return write_page(config, read, prompt)
    view = VIEWS[config.view](config, read)
    if config.json:
        print(json.dumps(view.facts, ensure_ascii=False))
    else:
        view.show(Console(highlight=False))
    for path in (config.png, config.svg):
        if path is not None:
            charts.save(view.draw(), Path(path))
            print(f"picture: {path}", file=sys.stderr)
    return view.facts


def prompt_of(config: Inspect) -> str:
    """The text to read. Raises UserError where there is none."""
    if not config.prompt and config.prompt_file is None:
        raise UserError('nothing to read; give --prompt "TEXT" or --prompt-file FILE')
    return read_prompts((config.prompt,) if config.prompt else (), config.prompt_file)[0]


def encode(prompt: str, tokenizer: Tokenizer, model: ModelConfig) -> list[int]:
    """Ids of a prompt. Raises UserError for one that is too long."""
    ids = tokenizer.encode_start(prompt)
    if len(ids) > model.context_tokens:
        raise UserError(f"the prompt has {len(ids)} tokens and the context is {model.context_tokens}; shorten it")
    return ids


def check_folder(path: str | None) -> None:
    """Before any work: whether the file can be written there."""
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise UserError(f"{path}: the folder {Path(path).absolute().parent} does not exist; make it first")


def write_page(config: Inspect, read: Read, prompt: str) -> dict[str, Any]:
    """The page with everything; returns its numbers."""
    answer, against = (
        None if text is None else token_id(read.tokenizer, text, f"--{name}")
        for name, text in (("answer", config.answer), ("against", config.against))
    )
    with steps("reading") as progress:
        report = collect(read.model, read.tokenizer, prompt, name=read.name, target=answer, against=against, progress=progress)
    path = Path(str(config.html))
    path.write_text(page(report), encoding="utf-8")
    if config.json:
        print(json.dumps(report.as_json(), ensure_ascii=False))
    else:
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; open it in a browser")
    return report.as_json()
