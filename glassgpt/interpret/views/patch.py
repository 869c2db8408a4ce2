"""What matters, by changing it: activation patching between two prompts, and causal tracing through noise."""

from __future__ import annotations

import torch
from rich.text import Text
from torch import Tensor

from glassgpt.config import UserError
from glassgpt.config.inspect import Inspect
from glassgpt.data.progress import steps
from glassgpt.interpret.patching import Kind, logit_difference, patch_sweep
from glassgpt.interpret.tokens import pieces
from glassgpt.interpret.tracing import causal_trace
from glassgpt.interpret.views.view import Read, View, encode, heat_map, percent, percents, title, token_id
from glassgpt.text import Tokenizer

NAMES = {"residual": "residual stream", "attn": "attention outputs", "mlp": "MLP outputs", "heads": "heads"}


def patch(config: Inspect, read: Read) -> View:
    """The clean prompt's activations put into the run on the other one, place by place."""
    assert config.patch is not None
    clean, corrupted = _pair(config.patch, read)
    answer, against = (token_id(read.tokenizer, str(text), f"--{name}") for name, text in _asked(config))
    kind: Kind = config.patch_what
    with steps(f"patching {NAMES[kind]}") as progress:
        sweep = patch_sweep(read.model, clean, corrupted, logit_difference(answer, against), kind, progress)
    columns = [f"head {head}" for head in range(sweep.values.size(1))] if kind == "heads" else _columns(read, clean, corrupted)
    rows = row_names(kind, read.model.config.n_layer)
    share = sweep.recovered
    difference = f"logit difference {read.label(answer)!r} - {read.label(against)!r}"
    facts = {
        "model": read.name,
        "clean": config.patch[0],
        "corrupted": config.patch[1],
        "what": kind,
        "rows": rows,
        "columns": columns,
        "answer": read.label(answer),
        "against": read.label(against),
        "clean_logit_difference": sweep.clean,
        "corrupted_logit_difference": sweep.corrupted,
        "logit_difference": sweep.values.tolist(),
        "recovered": share.tolist(),
    }
    ends = Text(f"{difference}: {sweep.clean:+.3f} on the clean prompt, {sweep.corrupted:+.3f} on the other", style="dim")
    heading = f"Patching {NAMES[kind]}"
    numbers, left_out = percents(share, rows, columns)
    note = f"percent of the difference that a patch restores, by layer{left_out}"
    shown = (title(heading), Text(note, style="dim"), numbers, ends)
    return View(facts, shown, lambda: heat_map(share, rows, columns, f"{heading}: {difference}", "recovered", diverging=True))


def row_names(kind: str, n_layer: int) -> list[str]:
    """Rows of a sweep: the residual stream has one more than layers."""
    return [f"layer {layer}" for layer in range(n_layer)] + (["end"] if kind == "residual" else [])


def _asked(config: Inspect) -> tuple[tuple[str, str | None], ...]:
    return ("answer", config.answer), ("against", config.against)


def _pair(prompts: tuple[str, str], read: Read) -> list[Tensor]:
    """Ids of both prompts. Raises UserError where they differ in length, with the tokens to see why."""
    if not all(prompts):
        raise UserError("--patch needs two prompts, and one is empty; give two of the same number of tokens")
    ids = [encode(prompt, read.tokenizer, read.model.config) for prompt in prompts]
    if len(ids[0]) != len(ids[1]):
        told = "; ".join(f"{len(row)}: {'|'.join(_labels(read.tokenizer, row))}" for row in ids)
        raise UserError(f"--patch needs two prompts of the same number of tokens; got {told}")
    return [torch.tensor(row, device=read.ids.device) for row in ids]


def _labels(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [piece.text for piece in pieces(tokenizer, ids)]


def _columns(read: Read, clean: Tensor, corrupted: Tensor) -> list[str]:
    """Tokens of the clean prompt; where the other one differs, both."""
    pairs = zip(*(_labels(read.tokenizer, ids.tolist()) for ids in (clean, corrupted)), strict=True)
    return [a if a == b else f"{a}/{b}" for a, b in pairs]


# ---------------------------------------------------------------------- tracing


def trace(config: Inspect, read: Read) -> View:
    """Noise on the embeddings of --trace's tokens, and one state restored at a time."""
    subject = places_of(str(config.trace), read)
    answer = token_id(read.tokenizer, str(config.answer), "--answer")
    with steps("tracing") as progress:
        samples, seed = config.noise_samples, config.seed
        found = causal_trace(read.model, read.ids, subject, answer, samples=samples, seed=seed, progress=progress)
    labels = [f"{label}*" if place in subject else label for place, label in enumerate(read.labels())]
    rows = row_names("residual", read.model.config.n_layer)
    facts = {
        "model": read.name,
        "tokens": labels,
        "subject": subject,
        "answer": read.label(answer),
        "clean": found.clean,
        "corrupted": found.corrupted,
        "restored": found.restored.tolist(),
        "rows": rows,
    }
    before, after = percent(found.clean), percent(found.corrupted)
    ends = f"probability of {read.label(answer)!r}: {before} as it is, {after} with noise on tokens with *"
    gap = (found.clean - found.corrupted) or 1.0
    numbers, left_out = percents((found.restored - found.corrupted) / gap, rows, labels)
    note = f"percent of the lost probability that one restored state brings back, by layer{left_out}"
    shown = (title("Causal tracing"), Text(note, style="dim"), numbers, Text(ends, style="dim"))
    return View(facts, shown, lambda: heat_map(found.restored, rows, labels, ends, "probability"))


def places_of(text: str, read: Read) -> list[int]:
    """The tokens of the prompt that a part of it touches. Raises UserError where the part is not in it."""
    data, part = read.tokenizer.decode_bytes(read.ids.tolist()), text.encode("utf-8")
    if part not in data:  # some tokenizers do not give back the text as it was
        part = read.tokenizer.decode_bytes(read.tokenizer.encode(text))
    start = data.find(part)
    if not part or start < 0:
        raise UserError(f"--trace {text!r} is not a part of the prompt; give a part of it, as it is written there")
    places, end = [], 0
    for place, token in enumerate(read.ids.tolist()):
        begin, end = end, end + len(read.tokenizer.token_bytes(token))
        if begin < start + len(part) and end > start:
            places.append(place)
    return places
