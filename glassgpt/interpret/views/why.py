"""Why the next token is likely: its logit as a sum over the model's parts, and the tokens of the prompt that it goes back to."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.text import Text

from glassgpt import charts
from glassgpt.config.inspect import Inspect
from glassgpt.interpret.attribution import Part, attribute
from glassgpt.interpret.gradients import gradient_times_input, integrated_gradients
from glassgpt.interpret.views.view import BLUE, ORANGE, Read, View, bar, clamped, table, title, token_id


def why(config: Inspect, read: Read) -> View:
    """Direct logit attribution and integrated gradients at --position, of --answer (default: the likeliest) less --against."""
    place = read.place(config.position)
    answer = int(read.logits()[place].argmax()) if config.answer is None else token_id(read.tokenizer, config.answer, "--answer")
    against = None if config.against is None else token_id(read.tokenizer, config.against, "--against")
    found = attribute(read.model, read.ids, answer, place, against)
    inputs = integrated_gradients(read.model, read.ids, answer, place, against)
    times = gradient_times_input(read.model, read.ids, answer, place, against)
    asked = f"logit of {read.label(answer)!r}" + ("" if against is None else f" less that of {read.label(against)!r}")
    facts = {
        "model": read.name,
        "place": place,
        "answer": read.label(answer),
        "against": None if against is None else read.label(against),
        "parts": [dataclasses.asdict(part) for part in found.parts],
        "sum": found.total,
        "logit": found.logit,
        "tokens": read.labels()[: place + 1],
        "integrated_gradients": inputs.values[: place + 1].tolist(),
        "integrated_gradients_gap": inputs.gap,
        "gradient_times_input": times[: place + 1].tolist(),
    }
    shown = _bars(found.parts, config.top, asked, place)
    if config.neurons:
        every = attribute(read.model, read.ids, answer, place, against, neurons=True)
        strongest = sorted((part for part in every.parts if part.kind == "neuron"), key=lambda part: -abs(part.value))[
            : config.top
        ]
        facts["neurons"] = [dataclasses.asdict(part) for part in strongest]
        shown = (*shown, *_bars(tuple(strongest), config.top, asked, place, "Neurons"))
    sums = Text.assemble(
        "\nsum of all parts ", (f"{found.total:+.4f}", "bold"), "   the model's own ", (f"{found.logit:+.4f}", "bold")
    )
    return View(facts, (*shown, sums, *_inputs(facts)), lambda: draw(found.parts, asked, found.total, found.logit))


def _bars(parts: tuple[Part, ...], count: int, asked: str, place: int, heading: str = "Why") -> tuple[Any, ...]:
    rows = table("part", ">adds", "")
    ordered = sorted(parts, key=lambda part: -abs(part.value))
    largest = abs(ordered[0].value) or 1.0
    for part in ordered[:count]:
        rows.add_row(part.name, f"{part.value:+.3f}", bar(abs(part.value) / largest, 24, "blue" if part.value > 0 else "yellow"))
    if left := ordered[count:]:
        rows.add_row(f"{len(left)} others", f"{sum(part.value for part in left):+.3f}", "", style="dim")
    return (title(heading, f"what each part adds to the {asked}, after token {place}"), rows)


def _inputs(facts: dict[str, Any]) -> tuple[Any, ...]:
    rows = table(">", "token", ">counts for", "", ">gradient x input")
    values = facts["integrated_gradients"]
    largest = max(map(abs, values)) or 1.0
    for place, (label, value, times) in enumerate(zip(facts["tokens"], values, facts["gradient_times_input"], strict=True)):
        strength = bar(abs(value) / largest, 24, "blue" if value > 0 else "yellow")
        rows.add_row(str(place), Text(label), f"{value:+.3f}", strength, f"{times:+.3f}")
    note = f"integrated gradients; what they miss of the whole: {facts['integrated_gradients_gap']:+.3f}"
    return (title("Which tokens of the prompt", note), rows)


def draw(parts: tuple[Part, ...], asked: str, total: float, logit: float) -> Any:
    """A bar for every part, in the order in which the model has them."""
    figure, axes = charts.figure(size=(9, clamped(0.2 * len(parts) + 1.4)))
    axes.barh(range(len(parts)), [part.value for part in parts], color=[BLUE if part.value > 0 else ORANGE for part in parts])
    axes.tick_params(axis="y", labelsize=7)
    charts.label_axis(axes.yaxis, [part.name for part in parts], most=200)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_ylim(-0.8, len(parts) - 0.2)
    heading = f"{charts.drawable(asked)}\nsum of all parts {total:+.4f}, the model's own {logit:+.4f}"
    axes.set(xlabel="adds to the logit", title=heading)
    return figure
