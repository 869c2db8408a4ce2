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
from glassgpt.config import UserError
from glassgpt.config.inspect import Inspect
from glassgpt.data.progress import steps
from glassgpt.generation.writer import read_prompts
from glassgpt.interpret.page.html import page
from glassgpt.interpret.page.report import collect
from glassgpt.interpret.views import ablate, attention, compare, features, heads, lens, next_token, patch, summary, why
from glassgpt.interpret.views.view import Read, View, encode, rule, token_id
from glassgpt.loading import load, pick_device

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
    "ablate": ablate.ablate,
    "sae": features.view,
}
WITHOUT_PROMPT = ("heads", "patch")
"""Views that need none: one draws random tokens, the other brings two."""
DEFAULT_MODEL = "storyteller"


def inspect(config: Inspect) -> dict[str, Any]:
    """Show a view of a model and a prompt; returns its numbers. Raises UserError for a prompt that is empty or too long."""
    for path, suffix in ((config.html, None), (config.png, ".png"), (config.svg, ".svg")):
        check_path(path, suffix)
    prompt = prompt_of(config)
    read = opened(config.compare[0] if config.compare else config.model or DEFAULT_MODEL, config, prompt)
    if config.html is not None:
        return write_page(config, read, prompt)
    if config.compare and config.view != "compare":
        both = [("a", read), ("b", opened(config.compare[1], config, prompt))]
        views = {side: VIEWS[config.view](config, side_read) for side, side_read in both}
        facts: dict[str, Any] = {side: view.facts for side, view in views.items()}
        shown = [part for side, view in views.items() for part in (rule(f"{side.upper()}: {view.facts['model']}"), *view.shown)]
    else:
        views = {"": VIEWS[config.view](config, read)}
        facts, shown = views[""].facts, list(views[""].shown)
    if config.json:
        print(json.dumps(facts, ensure_ascii=False, allow_nan=False))
    else:
        console = Console(highlight=False)
        for part in shown:
            console.print(part)
    for path in (config.png, config.svg):
        for side, view in views.items() if path is not None else ():
            place = Path(str(path))
            place = place.with_name(f"{place.stem}-{side}{place.suffix}") if side else place
            charts.save(view.draw(), place)
            print(f"picture: {place}", file=sys.stderr)
    return facts


def opened(name: str, config: Inspect, prompt: str) -> Read:
    """A model, and the prompt in its own tokens."""
    model, tokenizer = load(name, device=str(pick_device(config.device)), dtype=getattr(torch, config.dtype))
    ids = encode(prompt, tokenizer, model.config) if prompt else []
    return Read(name, model, tokenizer, torch.tensor(ids, dtype=torch.long, device=model.token_embedding.weight.device))


def prompt_of(config: Inspect) -> str:
    """The text to read. Raises UserError where there is none and the view needs one."""
    if config.prompt or config.prompt_file is not None:
        return read_prompts((config.prompt,) if config.prompt else (), config.prompt_file)[0]
    if config.view in WITHOUT_PROMPT:
        return ""
    raise UserError('nothing to read; give --prompt "TEXT" or --prompt-file FILE')


def check_path(path: str | None, suffix: str | None) -> None:
    """Before any work: whether the file can be written there, as what its name says."""
    if path is None:
        return
    place = Path(path)
    if not place.absolute().parent.is_dir():
        raise UserError(f"{path}: the folder {place.absolute().parent} does not exist; make it first")
    if place.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file in it")
    if suffix is not None and place.suffix.lower() != suffix:
        raise UserError(f"--{suffix[1:]} writes {suffix} files; got {path}")


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
    facts = report.as_json()
    if config.json:
        print(json.dumps(facts, ensure_ascii=False))
    else:
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; open it in a browser")
    return facts
