"""What `glassgpt lab gradient-balance` makes of its parts: medians over batches, paired differences over seeds, sentences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glassgpt.config.files import to_plain
from glassgpt.config.gradient_balance import GradientBalance, weight_of
from glassgpt.lab.gradient_balance.split import (
    END,
    INSTRUCTION,
    KINDS,
    MEANING,
    RESPONSE,
    TEMPLATE,
    WHOLE,
    Split,
    Spread,
    figures,
    kind_figures,
    spread,
)
from glassgpt.lab.ladder.compare import BETTER, UNDECIDED, WORSE, Estimate, estimate, signed, verdict

RESULT_FILE = "results.json"
MEASURED = {"response": (RESPONSE, END), "instruction": (INSTRUCTION,), "template": (TEMPLATE,)}
"""Held-out losses, and the kinds of token that each is the mean over: that of the responses is the one that `sft` reports."""


@dataclass(frozen=True)
class Point:
    """What is measured at one moment of a run."""

    step: int
    nats: list[float]
    """Summed held-out loss by kind."""
    counts: list[int]
    """Held-out tokens by kind."""
    splits: list[Split]
    """Gradients by batch; none where they are not taken apart."""

    def loss(self, of: str) -> float:
        """Held-out loss in nats per token of what MEASURED names."""
        count = sum(self.counts[kind] for kind in MEASURED[of])
        return sum(self.nats[kind] for kind in MEASURED[of]) / count if count else 0.0

    def spreads(self, layer: str = WHOLE, prompt_weight: float = 1.0) -> dict[str, Spread]:
        """`figures` of a layer over the batches."""
        found = [figures(one.products[layer], one.counts, prompt_weight) for one in self.splits]
        return {name: spread([each[name] for each in found]) for name in MEANING}

    def kinds(self) -> dict[str, dict[str, Spread]]:
        """`kind_figures` of the whole model over the batches."""
        found = [kind_figures(one.products[WHOLE], one.counts) for one in self.splits]
        return {kind: {name: spread([each[kind][name] for each in found]) for name in found[0][kind]} for kind in KINDS}


@dataclass(frozen=True)
class Part:
    """A piece of the work that is kept when it is finished: the start, or one run."""

    points: list[Point]
    trained: list[float]
    """The run's own loss at every step."""

    def write(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(asdict(self)))
        aside.replace(path)

    @classmethod
    def read(cls, path: Path) -> Part:
        held = json.loads(path.read_text())
        points = [Point(**point | {"splits": [Split(**one) for one in point["splits"]]}) for point in held["points"]]
        return cls(points, held["trained"])


@dataclass(frozen=True)
class Outcome:
    """Where the runs of a mode ended, in one of the held-out losses."""

    end: Estimate
    """Nats per token, over seeds."""
    difference: Estimate | None
    """To the first mode, paired by seed; None for itself."""
    verdict: str


@dataclass(frozen=True)
class Result:
    """What `glassgpt lab gradient-balance` found."""

    config: GradientBalance
    machine: dict[str, Any]
    lengths: dict[str, float]
    """Tokens in the loss by kind, mean over training examples; `longer`: share of the examples of which A is longer than Q;
    `longer_content`: the same without template and end; `left_out`: share of all examples that are longer than max_tokens."""
    start: Part
    runs: dict[str, list[Part]]
    """By mode, then by seed."""

    @property
    def before(self) -> Point:
        return self.start.points[0]

    @property
    def layers(self) -> list[str]:
        return list(self.before.splits[0].products)

    @property
    def answer_share(self) -> float:
        """E[A] / (E[Q] + E[A])."""
        asked, answered = (sum(self.lengths[KINDS[kind]] for kind in own) for own in ((TEMPLATE, INSTRUCTION), (RESPONSE, END)))
        return answered / (asked + answered)

    def along(self, mode: str) -> list[Point]:
        """The moments of a mode's first run at which gradients were taken apart."""
        return [point for point in self.runs[mode][0].points if point.splits]

    def outcome(self, mode: str, of: str) -> Outcome:
        ends = {name: [run.points[-1].loss(of) for run in self.runs[name]] for name in (mode, self.config.modes[0])}
        own, first = ends[mode], ends[self.config.modes[0]]
        apart = None if mode == self.config.modes[0] else estimate([a - b for a, b in zip(own, first, strict=True)])
        return Outcome(estimate(own), apart, verdict(apart))

    def plain(self) -> dict[str, Any]:
        """Everything but the inner products by batch, which `parts` keeps, as dicts and lists, ready for JSON."""
        modes = self.config.modes
        return {
            "config": to_plain(self.config),
            "machine": self.machine,
            "meaning": MEANING,
            "tokens_per_example": self.lengths,
            "answer_share_of_tokens": self.answer_share,
            "start": _plain(self.before, self.layers),
            "along": {mode: [_plain(point, self.layers) for point in self.along(mode)] for mode in modes},
            "share_in_the_loss_of": {mode: asdict(self.before.spreads(prompt_weight=weight_of(mode))["share"]) for mode in modes},
            "curves": {
                mode: [[{"step": point.step} | {of: point.loss(of) for of in MEASURED} for point in run.points] for run in own]
                for mode, own in self.runs.items()
            },
            "ends": {of: {mode: asdict(self.outcome(mode, of)) for mode in modes} for of in MEASURED},
            "findings": findings(self),
        }


def _plain(point: Point, layers: Sequence[str]) -> dict[str, Any]:
    return {
        "step": point.step,
        "held_out": {of: point.loss(of) for of in MEASURED},
        "layers": {layer: {name: asdict(one) for name, one in point.spreads(layer).items()} for layer in layers},
        "kinds": {kind: {name: asdict(one) for name, one in own.items()} for kind, own in point.kinds().items()},
    }


def findings(result: Result) -> list[str]:
    """The report in sentences."""
    config, at = result.config, result.before.spreads()
    longer = "longer" if result.answer_share > 0.5 else "not longer"
    said = [
        f"Responses are {longer} than what stands before them: {result.answer_share:.0%} of the tokens in the full loss are A"
        f" (median batch {at['tokens'].median:.0%}); without the template's words and the end token the response is longer in"
        f" {result.lengths['longer_content']:.0%} of the examples."
    ]
    if result.lengths["left_out"]:
        said.append(
            f"{result.lengths['left_out']:.0%} of the examples have more than max_tokens and are left out, so what is long is"
            " counted too little; raise it to have them all."
        )
    share = at["share"]
    source = (
        "mostly from the response"
        if share.low > 0.5
        else "mostly from the instruction and the template"
        if share.high < 0.5
        else "about as much from either"
    )
    said.append(
        f"At the start the full loss's gradient comes {source}: |g_A| / (|g_Q| + |g_A|) = {with_quarters(share)}; a token of A"
        f" gives {_over(at['response_per_token'].median, at['instruction_per_token'].median):.2g} times the norm of one of Q,"
        f" cosine {with_quarters(at['cosine'])}. Of what people say alone, without template and end, the response has"
        f" {at['content_tokens'].median:.0%} of the tokens and a share of {with_quarters(at['content_share'])}."
    )
    for of in ("response", "instruction"):
        told = []
        for mode in config.modes[1:]:
            outcome = result.outcome(mode, of)
            if outcome.difference is not None:
                word = {BETTER: "lower", WORSE: "higher", UNDECIDED: "not distinguishable"}.get(outcome.verdict, outcome.verdict)
                told.append(f"{mode} {signed(outcome.difference)} ({word})")
        if told:
            said.append(
                f"Held-out loss of the {of}s after {config.steps} steps, against {config.modes[0]}, in nats per token:"
                f" {'; '.join(told)}."
            )
    return said


def with_quarters(found: Spread) -> str:
    """0.51 (0.48 to 0.55)."""
    return f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"


def _over(a: float, b: float) -> float:
    return a / b if b else 0.0
