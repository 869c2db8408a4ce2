"""Prompts to text: the engine's tokens decoded, stopped, collected and shown."""

from __future__ import annotations

import codecs
import dataclasses
import json
import math
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from glassgpt.config import UserError
from glassgpt.config.generate import Generate, Sampling
from glassgpt.generation import engine
from glassgpt.generation.acceptance import Acceptance
from glassgpt.generation.engine import Token
from glassgpt.generation.generator import Generator
from glassgpt.generation.opening import open_guesses, open_model
from glassgpt.generation.runner import Model
from glassgpt.text import Tokenizer

if TYPE_CHECKING:
    from glassgpt.generation.speculative import Guesses

OPTIONS = ("max_new_tokens", "stop", "overflow", "ignore_end")
"""What besides the sampling, the seed and the numbers decides a text."""


@dataclass(frozen=True)
class Completion:
    """One continuation of one prompt."""

    prompt: str
    text: str
    finish_reason: str
    """`end` (end-of-text token), `stop` (a stop text), `length` (max_new_tokens) or `context` (no room left)."""
    tokens: list[Token] = field(repr=False)


class StopText:
    """Passes text on until a stop text appears; holds back what might be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def feed(self, piece: str) -> str:
        """The text that may be shown now."""
        self._held += piece
        if found := [(place + len(stop), place) for stop in self._stops if (place := self._held.find(stop)) >= 0]:
            self.found = True
            _, place = min(found)  # the one that is whole first, however the text was cut into pieces
            shown, self._held = self._held[:place], ""
            return shown
        beginnings = (stop[:n] for stop in self._stops for n in range(1, len(stop)))
        risky = max((len(beginning) for beginning in beginnings if self._held.endswith(beginning)), default=0)
        cut = len(self._held) - risky
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def rest(self) -> str:
        """What was held back, once no more text can come."""
        held, self._held = self._held, ""
        return held


class Row:
    """One text being written."""

    def __init__(self, stops: Sequence[str], show: Callable[[str], None]) -> None:
        self.tokens: list[Token] = []
        self.text = ""
        self.finish_reason = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # waits for a character's last byte
        self._stop = StopText(stops)
        self._show = show

    def add(self, token: Token, data: bytes, is_end: bool) -> bool:
        """Take a token; returns whether the text ends with it."""
        self.tokens.append(token)
        if is_end:
            self.finish_reason = "end"
        else:
            self._write(self._stop.feed(self._decoder.decode(data)))
            if self._stop.found:
                self.finish_reason = "stop"
        return bool(self.finish_reason)

    def close(self, reason: str) -> None:
        """No more tokens come, for `reason` unless the text had ended by itself."""
        if self.finish_reason != "stop":
            self._write(self._stop.feed(self._decoder.decode(b"", final=True)) + self._stop.rest())
        self.finish_reason = self.finish_reason or reason

    def _write(self, piece: str) -> None:
        self.text += piece
        if piece:
            self._show(piece)


def complete(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    seed: int,
    n: int = 1,
    stop: Sequence[str] = (),
    drop_oldest: bool = False,
    ignore_end: bool = False,
    n_top: int = 0,
    show: Callable[[int, str], None] = lambda row, piece: None,
    guesses: Guesses | None = None,
    counts: Acceptance | None = None,
) -> list[Completion]:
    """Continue every prompt `n` times as one batch; completions in the order of the prompts, `n` for each.

    A text depends on its prompt, `seed` and its number among the `n`, never on the other prompts. `show(row, piece)` gets
    text as it is written. With `guesses` rows are written one after another, in fewer passes of the model (`speculative.stream`).
    Raises UserError for an empty or too long prompt.
    """
    context = model.config.context_tokens
    # a prompt that is cut leaves room for the new tokens, and keeps at least half the context of its own
    keep = max(context // 2, context - max_new_tokens + 1) if drop_oldest else None
    encoded = [engine.fit(tokenizer.encode_start(prompt), context, keep) for prompt in prompts]
    ids = [row for row in encoded for _ in range(n)]
    generators = [Generator(seed * 1_000_003 + row % n) for row in range(len(ids))]
    rows = [Row(stop, lambda piece, row=row: show(row, piece)) for row in range(len(ids))]  # type: ignore[misc]

    def ends(token: Token) -> bool:
        is_end = token.id == tokenizer.end_id and not ignore_end
        return rows[token.row].add(token, tokenizer.token_bytes(token.id), is_end)

    stream = engine.stream if guesses is None else guesses.stream(counts)
    for _ in stream(model, ids, sampling, generators, max_new_tokens, ends, n_top, tokenizer.vocab_size):
        pass
    for row in rows:
        row.close("length" if len(row.tokens) == max_new_tokens else "context")
    return [Completion(prompts[i // n], row.text, row.finish_reason, row.tokens) for i, row in enumerate(rows)]


def generate(config: Generate) -> list[Completion]:
    """Continue the prompts and print the texts, streamed when there is only one."""
    prompts = read_prompts(config.prompt, config.prompt_file)
    compute = config.compute.with_dtype(config.dtype)
    opened = open_model(config.model, config.device, compute)
    model, tokenizer = opened.model, opened.tokenizer
    guesses, counts = open_guesses(config.speculation, tokenizer, config.device, compute), Acceptance()
    seed = secrets.randbelow(2**31) if config.seed is None else config.seed
    drop_oldest = config.overflow == "drop-oldest"
    live = len(prompts) * config.n == 1 and not config.json
    if live:
        # too long a prompt is refused before it is shown
        engine.fit(tokenizer.encode_start(prompts[0]), model.config.context_tokens, 1 if drop_oldest else None)
        _print_piece(_bold(prompts[0]))
    completions = complete(
        model,
        tokenizer,
        prompts,
        config.sampling,
        max_new_tokens=config.max_new_tokens,
        seed=seed,
        n=config.n,
        stop=config.stop,
        drop_oldest=drop_oldest,
        ignore_end=config.ignore_end,
        n_top=config.logprobs or 0,
        show=lambda row, piece: _print_piece(piece) if live else None,
        guesses=guesses,
        counts=counts,
    )
    if config.json:
        told = as_json(config, seed, completions, tokenizer) | opened.used
        if guesses is not None:
            told["speculation"] = dataclasses.asdict(config.speculation) | counts.as_json()
        print(json.dumps(told, ensure_ascii=False))
        return completions
    if live:
        print()
    else:
        for number, completion in enumerate(completions, 1):
            print(f"--- {number}/{len(completions)} ({completion.finish_reason})")
            print(_bold(completion.prompt) + completion.text)
    if config.logprobs is not None:
        _print_logprobs(completions, tokenizer)
    return completions


def read_prompts(given: Sequence[str], name: str | None) -> list[str]:
    """The prompts given, and that of a file (- is standard input). Raises UserError for none, an empty one, or bytes that are not
    UTF-8."""
    prompts = list(given)
    if name is not None:
        try:
            prompts.append((sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode("utf-8"))
        except OSError as error:
            raise UserError(f"cannot read the prompt file {name}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"prompt file {name}: not UTF-8 at byte {error.start}") from error
    for prompt in prompts:
        if any("\udc80" <= character <= "\udcff" for character in prompt):  # how Python passes on bytes of the shell
            raise UserError(f"the prompt is not UTF-8: {prompt.encode('utf-8', 'surrogateescape')!r}")
    if not prompts or not all(prompts):
        raise UserError("the prompt is empty; give some text to continue")
    return prompts


def as_json(config: Generate, seed: int, completions: list[Completion], tokenizer: Tokenizer) -> dict[str, object]:
    """What `--json` prints: everything needed to make the same texts again."""

    def token(t: Token) -> dict[str, object]:
        top = [{"id": i, "token": tokenizer.decode([i]), "logprob": value} for i, value in t.top]
        return {"id": t.id, "token": tokenizer.decode([t.id]), "logprob": t.logprob} | ({"top": top} if top else {})

    return {
        "model": config.model,
        "seed": seed,
        "sampling": dataclasses.asdict(config.sampling),
        "options": {name: getattr(config, name) for name in OPTIONS},
        "completions": [
            {
                "prompt": c.prompt,
                "text": c.text,
                "finish_reason": c.finish_reason,
                "ids": [t.id for t in c.tokens],
                **({"tokens": [token(t) for t in c.tokens]} if config.logprobs is not None else {}),
            }
            for c in completions
        ],
    }


def _print_logprobs(completions: list[Completion], tokenizer: Tokenizer) -> None:
    from rich.console import Console
    from rich.table import Table

    for completion in completions:
        title = repr(completion.prompt[:40])
        table = Table("token", "log p", "p", "likeliest here", title=title, title_justify="left")
        for t in completion.tokens:
            others = "  ".join(f"{tokenizer.decode([i])!r} {value:.2f}" for i, value in t.top)
            table.add_row(repr(tokenizer.decode([t.id])), f"{t.logprob:.3f}", f"{math.exp(t.logprob):.3f}", others)
        Console(markup=False, emoji=False, highlight=False).print(table)  # tokens are text, not markup


def _bold(text: str) -> str:
    return f"\x1b[1m{text}\x1b[0m" if sys.stdout.isatty() else text


def _print_piece(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
