"""`glassgpt bench speculative`: what guessing tokens ahead buys, on a story begun and on a quotation, taking turns."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from glassgpt.config import UserError
from glassgpt.config.bench import BenchSpeculative
from glassgpt.config.generate import Sampling
from glassgpt.config.speculation import Speculation
from glassgpt.data.progress import tracked
from glassgpt.generation import engine
from glassgpt.generation.acceptance import Acceptance
from glassgpt.generation.generator import Generator
from glassgpt.generation.opening import Opened, open_guesses, open_model
from glassgpt.generation.speculative import Guesses


@dataclass(frozen=True)
class Way:
    """One way to write from one prompt at one temperature."""

    prompt: str
    prompt_tokens: int
    temperature: float
    name: str
    """`plain`, `lookup N`, or the draft."""
    seconds: list[float]
    """From the first token to the last, a value for each turn."""
    tokens: int
    """Written between them."""
    acceptance: float | None
    """Accepted guesses over all."""
    tokens_a_pass: float
    same_text: bool | None
    """Whether the tokens are those of plain writing; None where they are drawn."""

    @property
    def rate(self) -> float:
        """Median tokens a second."""
        return self.tokens / statistics.median(self.seconds)


@dataclass(frozen=True)
class Result:
    """What `bench speculative` measured."""

    config: BenchSpeculative
    used: dict[str, object]
    ways: list[Way]

    def ratio(self, way: Way) -> float:
        """Its rate over that of plain writing."""
        return way.rate / next(
            w.rate for w in self.ways if (w.prompt, w.temperature, w.name) == (way.prompt, way.temperature, "plain")
        )


def bench_speculative(config: BenchSpeculative) -> Result:
    """Time each way of writing. Raises UserError where the second prompt does not fit, and for a draft with another tokenizer."""
    opened = open_model(config.model, "cpu", config.compute)
    wanted: dict[str, Speculation] = {f"lookup {n}": Speculation(lookup=n, proposals=config.proposals) for n in config.lookups}
    wanted |= {name: Speculation(draft=name, proposals=config.proposals) for name in config.drafts}
    guesses: dict[str, Guesses | None] = {"plain": None}
    guesses |= {name: open_guesses(one, opened.tokenizer, "cpu", config.compute) for name, one in wanted.items()}
    ways = []
    for prompt, ids in _prompts(config, opened).items():
        for temperature in config.temperatures:
            ways += _timed(config, opened, guesses, prompt, ids, temperature)
    result = Result(config, opened.used, ways)
    _show(result)
    return result


def _prompts(config: BenchSpeculative, opened: Opened) -> dict[str, list[int]]:
    begun = opened.tokenizer.encode_start(config.prompt)
    room = opened.model.config.context_tokens
    if len(begun) + config.quoted_tokens + config.again_tokens >= room:
        raise UserError(f"the quotation does not fit the context of {room} tokens; lower --quoted_tokens or --again_tokens")
    generator = Generator(config.seed)
    story = begun + [
        token.id
        for token in engine.stream(
            opened.model, [begun], Sampling(temperature=0.8), [generator], config.quoted_tokens, n_ids=opened.tokenizer.vocab_size
        )
    ]
    return {"story begun": begun, "quotation": story + story[: config.again_tokens]}


def _timed(
    config: BenchSpeculative, opened: Opened, guesses: dict[str, Guesses | None], prompt: str, ids: list[int], temperature: float
) -> list[Way]:
    """Every way from one prompt; in each turn one after the other."""
    room = min(config.new_tokens, opened.model.config.context_tokens - len(ids))
    seconds: dict[str, list[float]] = {name: [] for name in guesses}
    written: dict[str, list[int]] = {}
    counts: dict[str, Acceptance] = {}
    for turn in tracked(range(config.repeats + 1), f"{prompt}, temperature {temperature:g}"):
        for name, guess in guesses.items():
            counts[name] = Acceptance()
            generators = [Generator(config.seed)]
            stamps, written[name] = [], []
            write = engine.stream if guess is None else guess.stream(counts[name])
            sampling = Sampling(temperature=temperature)
            for token in write(opened.model, [ids], sampling, generators, room, n_ids=opened.tokenizer.vocab_size):
                stamps.append(time.perf_counter())
                written[name].append(token.id)
            if turn:  # the first one warms up
                seconds[name].append(stamps[-1] - stamps[0])
    return [
        Way(
            prompt,
            len(ids),
            temperature,
            name,
            seconds[name],
            len(written[name]) - 1,
            counts[name].accepted / counts[name].proposed if counts[name].proposed else None,
            counts[name].tokens / counts[name].passes if counts[name].passes else 1.0,
            written[name] == written["plain"] if temperature == 0 else None,
        )
        for name in guesses
    ]


def _show(result: Result) -> None:
    if result.config.json:
        ways = [asdict(way) | {"tokens_per_second": way.rate, "ratio": result.ratio(way)} for way in result.ways]
        print(json.dumps({"config": asdict(result.config), **result.used, "ways": ways}))
        return
    title = f"{result.config.model}, {result.used['engine']} {result.used['precision']}: tokens written a second"
    table = Table("prompt", "T", "way", "tokens/s", "ratio", "accepted", "tokens a pass", title=title, title_justify="left")
    for way in result.ways:
        if way.name == "plain" and way is not result.ways[0]:
            table.add_section()
        accepted = "" if way.acceptance is None else f"{way.acceptance:.0%}"
        changed = "" if way.same_text in (None, True) else " (other text)"
        first = way.name == "plain"
        where = (f"{way.prompt}, {way.prompt_tokens}", f"{way.temperature:g}") if first else ("", "")
        table.add_row(
            *where, way.name + changed, f"{way.rate:,.0f}", f"{result.ratio(way):.2f}x", accepted, f"{way.tokens_a_pass:.2f}"
        )
    console = Console()
    console.print(table)
    console.print(f"medians of {result.config.repeats} turns; greedy text (T 0) must be that of plain writing")
