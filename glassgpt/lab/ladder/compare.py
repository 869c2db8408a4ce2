"""What `glassgpt lab ladder` makes of its runs: means, paired differences, intervals, and what they say."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from glassgpt.config import ModelConfig, UserError
from glassgpt.config.files import to_plain
from glassgpt.config.ladder import BASE, CHANGES, Ladder, Rung
from glassgpt.interpret.cost import active_parameters, parameters, training_flops
from glassgpt.lab.ladder.speed import Cost

BETTER, WORSE, SAME, ALONE = "better", "worse", "the same runs", "one seed: no interval"
UNDECIDED = "not distinguishable at this size"

COUNTING = {
    "bits_per_byte": "of the held-out text at the last step; mean over seeds, 95 % t interval",
    "difference": "this rung minus `before`, paired by seed; mean, 95 % t interval of the differences",
    "from_base": "the same against the base",
    "training_tokens_per_second": "median over steps of new models that took turns before the first run",
    "decoding_tokens_per_second": "median over turns; one sequence, greedy, after a prompt of half the context, random weights",
    "peak_bytes": "most bytes of tensors alive in two training steps: weights, gradients, optimiser, activations",
    "cache_bytes_per_token": "keys and values of one sequence as long as the context, over its tokens",
    "parameters": "all; a tied head once",
    "active_parameters": "those that one token meets: without the experts that it does not go to",
    "flops": "of one run: 6 a matrix entry and token, and attention",
    "seconds": "of one run's training steps, mean over seeds",
}


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    name: str
    steps: int
    bits_per_byte: float
    """Of the whole held-out text."""
    held_out_bytes: int
    seconds: float
    """In training steps."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float | None
    """None for a single value, which has no interval."""
    high: float | None
    values: tuple[float, ...]
    """By seed."""

    @property
    def half(self) -> float | None:
        """Half the interval's width."""
        return None if self.high is None else self.high - self.mean


@dataclass(frozen=True)
class Row:
    """One rung, as reported. COUNTING says what the numbers are."""

    name: str
    change: str
    before: str | None
    kernel: str
    """Attention that speed and memory were measured with."""
    runs: tuple[str, ...]
    steps: int
    tokens: int
    flops: float
    parameters: int
    active_parameters: int
    bits_per_byte: Estimate
    difference: Estimate | None
    verdict: str
    from_base: Estimate | None
    base_verdict: str
    training_tokens_per_second: float
    decoding_tokens_per_second: float
    peak_bytes: int
    cache_bytes_per_token: float
    seconds: float


@dataclass(frozen=True)
class Result:
    """What `glassgpt lab ladder` found."""

    config: Ladder
    machine: dict[str, Any]
    """Device, its name, threads."""
    rows: tuple[Row, ...]
    kernel_difference: float | None
    """Largest difference, in nats per token, of the first five losses with the written-out and the fast attention; None without
    the rung `kernel`."""
    held_out_bytes: int

    def plain(self) -> dict[str, Any]:
        """Everything, as dicts and lists, ready for JSON."""
        return {
            "config": to_plain(self.config),
            "machine": self.machine,
            "counting": COUNTING,
            "held_out_bytes": self.held_out_bytes,
            "kernel_difference": self.kernel_difference,
            "rungs": [asdict(row) for row in self.rows],
            "findings": findings(self),
        }


# ---------------------------------------------------------------------- comparing


def t_quantile(freedom: int, probability: float = 0.975) -> float:
    """Student's t below which so much of the probability lies."""
    try:
        from scipy.special import stdtrit  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError("intervals need `scipy`, which is not installed; pip install 'glassgpt[lab]'") from error
    return float(stdtrit(freedom, probability))


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % interval, mean ± t(n - 1) * s / √n, s the standard deviation with n - 1 (Student 1908)."""
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return Estimate(mean, None, None, tuple(values))
    half = t_quantile(n - 1) * statistics.stdev(values) / n**0.5
    return Estimate(mean, mean - half, mean + half, tuple(values))


def verdict(difference: Estimate | None) -> str:
    """What a paired difference in bits per byte says; nothing for the base."""
    if difference is None:
        return ""
    if difference.low is None or difference.high is None:
        return ALONE
    if difference.low <= 0 <= difference.high:
        return UNDECIDED
    return BETTER if difference.high < 0 else WORSE


def compare(
    config: Ladder, machine: dict[str, Any], rungs: Sequence[Rung], costs: dict[str, Cost], runs: dict[str, list[Trained]]
) -> Result:
    """Costs and losses put together, a row a rung. `runs` holds every rung's, by seed."""
    losses = {rung: [run.bits_per_byte for run in own] for rung, own in runs.items()}
    names = {rung: tuple(run.name for run in own) for rung, own in runs.items()}
    rows = []
    for rung in rungs:
        cost, own = costs[rung.name], runs[rung.name]

        def against(other: str | None, name: str = rung.name) -> tuple[Estimate | None, str]:
            if other is None:
                return None, ""
            found = estimate([a - b for a, b in zip(losses[name], losses[other], strict=True)])
            return found, SAME if names[name] == names[other] else verdict(found)

        difference, said = against(rung.before)
        from_base, said_of_base = against(BASE if rung.before else None)
        rows.append(
            Row(
                name=rung.name,
                change=CHANGES[rung.name],
                before=rung.before,
                kernel=cost.kernel,
                runs=names[rung.name],
                steps=own[0].steps,
                tokens=own[0].steps * config.step_tokens,
                flops=own[0].steps * step_flops(config, rung.model),
                parameters=parameters(rung.model),
                active_parameters=active_parameters(rung.model),
                bits_per_byte=estimate(losses[rung.name]),
                difference=difference,
                verdict=said,
                from_base=from_base,
                base_verdict=said_of_base,
                training_tokens_per_second=config.step_tokens / cost.step,
                decoding_tokens_per_second=cost.decode_rate,
                peak_bytes=cost.peak_bytes,
                cache_bytes_per_token=cost.cache_bytes_per_token,
                seconds=statistics.fmean(run.seconds for run in own),
            )
        )
    return Result(config, machine, tuple(rows), _kernel_difference(rungs, costs), own[0].held_out_bytes)


def step_flops(config: Ladder, shape: ModelConfig) -> float:
    """Floating-point operations of one optimiser step."""
    return float(training_flops(shape, shape.context_tokens) * config.step_tokens)


def _kernel_difference(rungs: Sequence[Rung], costs: dict[str, Cost]) -> float | None:
    for rung in rungs:
        if rung.name == "kernel":
            pairs = zip(costs[rung.name].first_losses, costs[rung.before or BASE].first_losses, strict=True)
            return max(abs(a - b) for a, b in pairs)
    return None


def findings(result: Result) -> list[str]:
    """The report in sentences."""
    config, rows = result.config, result.rows
    base, top = rows[0], rows[-1]
    amount = f"{config.tokens:,.0f} tokens" if config.budget == "tokens" else f"{config.amount:g} {_UNITS[config.budget]}"
    other = "the rung before" if config.mode == "cumulative" else "the base"
    said = [f"Every run had {amount}; {config.seeds} seed{'s' * (config.seeds > 1)} of each rung, on the same batches."]
    if config.mode == "cumulative" and top.from_base is not None:
        said.append(
            f"From the bottom to the top: {base.bits_per_byte.mean:.3f} -> {top.bits_per_byte.mean:.3f} bits per byte,"
            f" {signed(top.from_base)} ({top.base_verdict})."
        )
    for word, text in ((BETTER, "Fewer"), (WORSE, "More")):
        if found := [f"{row.name} ({signed(row.difference)})" for row in rows if row.verdict == word and row.difference]:
            said.append(f"{text} bits per byte than {other}: {', '.join(found)}.")
    if unclear := [row.name for row in rows if row.verdict == UNDECIDED]:
        said.append(f"Against {other} {UNDECIDED} (the 95 % interval of the paired difference holds 0): {', '.join(unclear)}.")
    compared = sum(row.verdict in (BETTER, WORSE, UNDECIDED) for row in rows)
    if compared > 1:
        said.append(
            f"{compared} comparisons at 95 %: about {0.05 * compared:.2g} of them would be called different by chance alone."
        )
    if result.kernel_difference is not None:
        said.append(
            f"Written-out and fast attention: the first five losses differ by {result.kernel_difference:.1e} nats per token"
            " at most." + " Its runs are those of the rung that it is compared with." * any(row.verdict == SAME for row in rows)
        )
    return said


_UNITS = {"flops": "floating-point operations", "seconds": "seconds of training by the speed measured first"}


def signed(difference: Estimate) -> str:
    """-0.123 ± 0.045."""
    return f"{difference.mean:+.3f}" + ("" if difference.half is None else f" ± {difference.half:.3f}")
