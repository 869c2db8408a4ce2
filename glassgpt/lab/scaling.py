"""`glassgpt lab scaling`: a ladder of model sizes on several token budgets, the laws that fit it, a run predicted.

The default ladder is 30 runs: six sizes of 7 thousand to 336 thousand parameters (50x) on five budgets of 61 thousand to
983 thousand tokens (16x), the last just under one epoch of Python's own documentation. That is 8 TFLOP by 6 N D and
12 TFLOP with attention and head: by single-core timings five to seven minutes on two CPU cores, with the fits.

What is counted, in all of this module:

    N  parameters without the token and position embeddings (Kaplan et al. 2020, §1.3; biases and norms are in)
    D  tokens seen in training: steps * batch_size * context_tokens
    C  6 N D floating-point operations: forward and backward products of the N parameters. Attention scores and the head
       are left out, as Kaplan et al. do; `Run.flops` has them
    L  loss on held-out text at the end of training, nats per token

The run with the largest N and D (each of its seeds) is left out of every fit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from glassgpt import charts
from glassgpt.config import DataConfig, ModelConfig, OptimConfig, Pretrain, UserError
from glassgpt.config.files import to_plain
from glassgpt.config.scaling import HEAD_WIDTH, Scaling
from glassgpt.data import Corpus
from glassgpt.interpret.anatomy import anatomy
from glassgpt.lab import series
from glassgpt.loading import pick_device
from glassgpt.train.pretrain import prepare
from glassgpt.train.run import read_log

Array = np.ndarray[Any, np.dtype[np.float64]]

RESULT_FILE = "scaling.json"
NAME = "scaling"
EMBEDDINGS = ("token_embedding", "position_embedding", "head")
REFERENCE_WIDTH = 64
SAVE_INTERVAL = 1000
MAY_DIFFER = ("out_dir", "device", "bootstrap", "json")  # on a second call in the same folder
PF_DAY = 1e15 * 24 * 3600
"""Floating-point operations of one PetaFLOP/s-day, the unit of Kaplan's and GPT-3's L(C)."""

HUBER_DELTA = 1e-3
KAPLAN, GPT3, CHINCHILLA = "Kaplan et al. 2020", "Brown et al. 2020, fig. 3.1", "Hoffmann et al. 2022, approach 3"
PUBLISHED: dict[str, dict[str, tuple[float, str]]] = {
    "size_power": {"alpha_N": (0.076, KAPLAN)},
    "tokens_power": {"alpha_D": (0.095, KAPLAN)},
    "compute_power": {"alpha_C": (0.050, KAPLAN)},
    "gpt3": {"alpha_C": (0.048, GPT3), "K": (2.57, GPT3)},
    "joint": {
        "alpha": (0.34, CHINCHILLA),
        "beta": (0.28, CHINCHILLA),
        "E": (1.69, CHINCHILLA),
        "A": (406.4, CHINCHILLA),
        "B": (410.7, CHINCHILLA),
    },
}
WHY = (
    "Why ours differ: the published laws were measured from about a million to many billions of parameters on web text. Here"
    " the models are tiny, the budgets at most about an epoch of a small corpus, the tokens short: losses are far above their"
    " floor and fall fast. Exponents belong to text, tokenizer and range; E, A, B and K also to the unit of a token."
)


# ---------------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Run:
    """One finished training run."""

    name: str
    width: int
    n_layer: int
    seed: int
    steps: int
    learning_rate: float
    N: int
    """Parameters without embeddings."""
    parameters: int
    """All parameters."""
    D: int
    """Tokens seen."""
    C: float
    """6 N D."""
    flops: float
    """With attention scores and head: 6 D (N + V * width + 2 * n_layer * T * width) (Chowdhery et al. 2022, app. B)."""
    epochs: float
    """D over the tokens of the training text."""
    loss: float
    """Nats per token on the held-out text."""
    bits_per_byte: float
    seconds: float
    """Time in training steps."""

    def value(self, variable: str) -> float:
        """N, D, or C in PetaFLOP/s-days: the unit in which laws are fitted and published."""
        return {"N": float(self.N), "D": float(self.D), "C": self.C / PF_DAY}[variable]


@dataclass(frozen=True)
class Law:
    """L = E + the sum over variables of coefficient / variable ** exponent; E is 0 in a pure power law."""

    variables: tuple[str, ...]
    exponents: tuple[float, ...]
    coefficients: tuple[float, ...]
    irreducible: float = 0.0

    def __call__(self, **values: Any) -> Any:
        """Loss in nats per token at `N=`, `D=`, `C=` (PetaFLOP/s-days), numbers or arrays."""
        terms = zip(self.variables, self.exponents, self.coefficients, strict=True)
        return self.irreducible + sum(c * np.asarray(values[name]) ** -exponent for name, exponent, c in terms)

    def named(self, irreducible: bool = True) -> dict[str, float]:
        """Its numbers by the papers' names: alpha, beta, A, B for N and D together, alpha_X and K for one variable X."""
        joint = len(self.variables) > 1
        exponents = ("alpha", "beta") if joint else (f"alpha_{self.variables[0]}",)
        coefficients = ("A", "B") if joint else ("K",)
        numbers = dict(zip(exponents, self.exponents, strict=True)) | dict(zip(coefficients, self.coefficients, strict=True))
        return numbers | ({"E": self.irreducible} if irreducible else {})


@dataclass(frozen=True)
class Fit:
    """A law fitted to runs, and how sure it is."""

    formula: str
    points: int
    """Runs that it was fitted to."""
    unknowns: int
    law: Law | None
    """None when there are fewer points than unknowns."""
    error: float | None
    """Root mean square of ln(fitted loss) - ln(measured loss)."""
    numbers: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    """95 % bootstrap percentile intervals; empty when `note` says why there are none."""
    resamples: int
    """Resamples that determined the law and made the intervals."""
    note: str
    laws: tuple[Law, ...] = ()
    """One for each of these resamples."""

    def interval_at(self, **values: float) -> tuple[float, float] | None:
        """95 % interval of the law's own value there; the scatter of a single run around it is not in it."""
        if not self.intervals:
            return None
        return _percentiles([float(law(**values)) for law in self.laws])


@dataclass(frozen=True)
class Prediction:
    """The run left out: what the joint law says of it, and what it was."""

    runs: tuple[str, ...]
    N: int
    D: int
    predicted: float
    measured: float
    """Mean over seeds."""
    difference: float
    """Predicted - measured, nats per token."""
    percent: float
    """The same as a share of the measured loss."""
    interval: tuple[float, float] | None
    inside: bool | None
    """Whether the measured loss lies in the interval; None where there is none."""


@dataclass(frozen=True)
class Result:
    """What `glassgpt lab scaling` found."""

    config: Scaling
    runs: tuple[Run, ...]
    fits: dict[str, Fit]
    """`size`, `tokens`, `compute` with E, the same with `_power` without, and `joint`."""
    frontier: tuple[str, ...]
    """Names of the runs on the lower envelope of loss over compute."""
    prediction: Prediction

    def plain(self) -> dict[str, Any]:
        """Everything, as dicts and lists, ready for JSON."""
        fits: dict[str, Any] = {}
        for name, fit in self.fits.items():
            fits[name] = {key: getattr(fit, key) for key in ("formula", "points", "unknowns", "error", "numbers", "intervals")}
            fits[name] |= {"resamples": fit.resamples, "note": fit.note}
        counting = {
            "N": "parameters without token and position embeddings, head; biases and norms are in",
            "D": "tokens seen in training",
            "C": "6 N D floating-point operations; laws take PetaFLOP/s-days (8.64e19)",
            "flops": "with attention scores and head",
            "loss": "nats per token on held-out text, last step",
        }
        return {
            "config": to_plain(self.config),
            "counting": counting,
            "runs": [asdict(run) for run in self.runs],
            "frontier": list(self.frontier),
            "fits": fits,
            "prediction": asdict(self.prediction),
            "published": {law: {k: {"value": v, "source": s} for k, (v, s) in row.items()} for law, row in PUBLISHED.items()},
            "why_they_differ": WHY,
        }


def scaling(config: Scaling) -> Result:
    """Train what is missing of the ladder, fit, predict, print; writes scaling.json and the pictures into `out_dir`.

    Raises UserError when scipy is not installed, when `out_dir` holds something else or another ladder, and for whatever
    `pretrain` refuses, with the run's name.
    """
    _minimize()  # minutes of training must not end in a missing package
    pick_device(config.device)
    out = Path(config.out_dir)
    _open(out, config)
    data = DataConfig(sources=config.sources, tokenizer=config.tokenizer)
    tokenizer, corpus = prepare(out, data, config.vocab_size)
    result = analyse(config, train_ladder(out, ladder(config, tokenizer.vocab_size), corpus))
    text = json.dumps(result.plain(), indent=1)
    (out / RESULT_FILE).write_text(text + "\n")
    chart(result, out)
    if config.json:
        print(json.dumps(result.plain()))
    else:
        show(result, Console())
    return result


def _open(out: Path, config: Scaling) -> None:
    series.open_folder(out, config, MAY_DIFFER, "ladder of scaling runs")


# ---------------------------------------------------------------------- runs


def ladder(config: Scaling, vocab_size: int) -> list[Pretrain]:
    """Every run, cheapest first; `out_dir` is its name alone."""
    runs = []
    for width in config.widths:
        shape = ModelConfig(
            vocab_size=vocab_size,
            context_tokens=config.context_tokens,
            n_layer=max(2, width // 32),
            n_head=width // HEAD_WIDTH,
            width=width,
        )
        for steps in (budget // config.step_tokens for budget in config.token_budgets):
            optim = OptimConfig(
                learning_rate=config.learning_rate * math.sqrt(REFERENCE_WIDTH / width), warmup_steps=max(1, steps // 10)
            )
            runs += [
                Pretrain(
                    out_dir=f"w{width:04d}-d{steps * config.step_tokens:09d}-s{seed}",
                    model=shape,
                    data=DataConfig(sources=config.sources),
                    optim=optim,
                    max_steps=steps,
                    batch_size=config.batch_size,
                    eval_interval=0,
                    save_interval=SAVE_INTERVAL,
                    precision="fp32",  # one arithmetic for all sizes
                    compile="off",
                    seed=seed,
                    device=config.device,
                )
                for seed in range(config.seed, config.seed + config.seeds)
            ]
    return sorted(runs, key=lambda run: _facts(run)["C"])


def train_ladder(out: Path, runs: Sequence[Pretrain], corpus: Corpus) -> list[Run]:
    """The runs' results, in order: read where the run is complete, else trained or continued."""

    def describe(run: Pretrain) -> str:
        facts = _facts(run)
        return f"{facts['N']:,} parameters without embeddings, {facts['D']:,} tokens"

    series.train_missing(out, runs, lambda run: _facts(run)["flops"], describe)
    return [_read(out / series.RUNS / run.out_dir, run, corpus.count("train")) for run in runs]


@lru_cache
def _sizes(shape: ModelConfig) -> tuple[int, int]:
    """Parameters without embeddings and head, and all of them."""
    parts = anatomy(shape)
    return sum(group.count for group in parts.groups if group.name not in EMBEDDINGS), parts.parameters


def _facts(run: Pretrain) -> dict[str, Any]:
    """N, all parameters, D, C and all FLOPs of a run, from its configuration."""
    shape = run.model
    N, parameters = _sizes(shape)
    D = run.max_steps * run.batch_size * shape.context_tokens
    others = shape.vocab_size * shape.width + 2 * shape.n_layer * shape.context_tokens * shape.width
    return {"N": N, "parameters": parameters, "D": D, "C": 6.0 * N * D, "flops": 6.0 * D * (N + others)}


def _read(folder: Path, run: Pretrain, train_tokens: int) -> Run:
    entries, facts = read_log(folder), _facts(run)
    return Run(
        name=run.out_dir,
        width=run.model.width,
        n_layer=run.model.n_layer,
        seed=run.seed,
        steps=run.max_steps,
        learning_rate=run.optim.learning_rate,
        epochs=facts["D"] / train_tokens,
        loss=entries[-1]["val_loss"],
        bits_per_byte=entries[-1]["val_bits_per_byte"],
        seconds=round(sum(entry["seconds"] for entry in entries), 3),
        **facts,
    )


# ---------------------------------------------------------------------- laws


def analyse(config: Scaling, runs: Sequence[Run]) -> Result:
    """Fit every law to the runs but the largest, and predict that one."""
    largest_N, largest_D = max(run.N for run in runs), max(run.D for run in runs)
    left_out = [run for run in runs if largest_N == run.N and largest_D == run.D]
    seen = [run for run in runs if run not in left_out]
    fits: dict[str, Fit] = {}
    sets: list[tuple[str, str, list[Run], Callable[[Sequence[Run]], list[Run]]]] = [
        ("size", "N", [run for run in seen if largest_D == run.D], list),
        ("tokens", "D", [run for run in seen if largest_N == run.N], list),
        ("compute", "C", seen, frontier),
    ]
    for name, variable, points, choose in sets:
        for suffix, irreducible in (("", True), ("_power", False)):
            fits[name + suffix] = fit(
                points, (variable,), irreducible, math.inf, choose=choose, resamples=config.bootstrap, seed=config.seed
            )
    fits["joint"] = fit(seen, ("N", "D"), True, HUBER_DELTA, resamples=config.bootstrap, seed=config.seed)
    prediction = predict(fits["joint"], left_out)
    return Result(config, tuple(runs), fits, tuple(run.name for run in frontier(seen)), prediction)


def predict(joint: Fit, left_out: Sequence[Run]) -> Prediction:
    """Compare the joint law with runs of one (N, D) that it has not seen. Raises UserError when there is no law."""
    if joint.law is None:
        raise UserError(f"the joint law cannot be fitted: {joint.note}; give more widths or token_budgets")
    N, D = left_out[0].N, left_out[0].D
    predicted, measured = float(joint.law(N=N, D=D)), sum(run.loss for run in left_out) / len(left_out)
    interval = joint.interval_at(N=N, D=D)
    return Prediction(
        runs=tuple(run.name for run in left_out),
        N=N,
        D=D,
        predicted=predicted,
        measured=measured,
        difference=predicted - measured,
        percent=100 * (predicted - measured) / measured,
        interval=interval,
        inside=None if interval is None else interval[0] <= measured <= interval[1],
    )


def frontier(runs: Sequence[Run]) -> list[Run]:
    """The lower envelope of loss over compute: the runs that no run of the same or less compute equals or beats."""
    best: list[Run] = []
    for run in sorted(runs, key=lambda run: (run.C, run.loss)):
        if not best or run.loss < best[-1].loss:
            best.append(run)
    return best


def fit(
    runs: Sequence[Run],
    variables: tuple[str, ...],
    irreducible: bool,
    delta: float,
    *,
    choose: Callable[[Sequence[Run]], list[Run]] = list,
    resamples: int = 200,
    seed: int = 0,
) -> Fit:
    """Fit a law to `choose(runs)`, and to resamples of `runs` with replacement for its intervals.

    One variable, with E or without (Kaplan et al. 2020, eq. 1.1-1.3; least squares on ln L, delta infinite), or N and D:

        L(N, D) = E + A / N^alpha + B / D^beta                  Hoffmann et al. 2022, eq. 2

    fitted to ln L with the Huber loss of delta 1e-3 by L-BFGS from a grid of starting points (their appendix D.3): the ten
    best of 300, and for a resample the best one of these and the law of all points.

    A resample counts only if it has as many different points as the law has unknowns; when that is less than half of them,
    or when the law meets all its points exactly for want of more, there are no intervals and `note` says so.
    """
    unknowns = 2 * len(variables) + irreducible
    formula = _formula(variables, irreducible)
    points = choose(runs)
    different = _different(points, variables)
    if different < unknowns:
        note = f"no fit: {different} different points for {unknowns} unknowns"
        return Fit(formula, len(points), unknowns, None, None, {}, {}, 0, note)
    starts = _nearest(_grid(points, variables, irreducible), points, variables, delta, count=10)
    law, solution = _best(points, variables, irreducible, delta, starts)
    fitted = law(**{name: np.array([run.value(name) for run in points]) for name in variables})
    error = float(np.sqrt(np.mean((np.log(fitted) - np.log([run.loss for run in points])) ** 2)))
    numbers = law.named(irreducible)
    if different == unknowns:
        note = f"no interval: {different} different points for {unknowns} unknowns, so it meets them all"
        return Fit(formula, len(points), unknowns, law, error, numbers, {}, 0, note)

    laws = []
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        drawn = choose([runs[index] for index in generator.integers(len(runs), size=len(runs))])
        if _different(drawn, variables) >= unknowns:
            near = _nearest(starts, drawn, variables, delta, count=1)
            laws.append(_best(drawn, variables, irreducible, delta, [*near, solution])[0])
    note = "" if len(laws) == resamples else f"{resamples - len(laws)} of {resamples} resamples had too few different points"
    if len(laws) < resamples / 2:
        return Fit(formula, len(points), unknowns, law, error, numbers, {}, 0, f"no interval: {note}")
    found = [each.named(irreducible) for each in laws]
    intervals = {name: _percentiles([each[name] for each in found]) for name in numbers}
    return Fit(formula, len(points), unknowns, law, error, numbers, intervals, len(laws), note, tuple(laws))


def _formula(variables: tuple[str, ...], irreducible: bool) -> str:
    if len(variables) > 1:
        return "L(N, D) = E + A / N^alpha + B / D^beta"
    (name,) = variables
    return f"L({name}) = {'E + ' if irreducible else ''}K / {name}^alpha_{name}"


def _different(runs: Sequence[Run], variables: tuple[str, ...]) -> int:
    """Different places among the runs; 0 when a variable of several takes fewer than two values, which hides its exponent."""
    places = {tuple(run.value(name) for name in variables) for run in runs}
    return len(places) if all(len({place[i] for place in places}) > 1 for i in range(len(variables))) else 0


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


# ---------------------------------------------------------------------- the fit itself

# A law of d variables is the vector (a_1 ... a_d, alpha_1 ... alpha_d[, e]) with
#
#     ln L = ln( exp(a_1 - alpha_1 x_1) + ... + exp(a_d - alpha_d x_d) [+ exp(e)] )
#
# where x_i is ln of the variable, less its mean over the points: uncentred, a and alpha hardly tell apart.

LARGEST_EXPONENT = 4.0


def _minimize() -> Callable[..., Any]:
    try:
        from scipy.optimize import minimize  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError("fitting needs `scipy`, which is not installed; pip install 'glassgpt[lab]'") from error
    found: Callable[..., Any] = minimize
    return found


def _grid(runs: Sequence[Run], variables: tuple[str, ...], irreducible: bool) -> list[Array]:
    """Starting points: every mix of exponents, of E's part in the lowest loss, and of the terms' parts in the rest."""
    losses = np.array([run.loss for run in runs])
    low, middle = float(losses.min()), float(np.exp(np.log(losses).mean()))
    exponents = [0.05, 0.2, 0.5, 1.0, 2.0]
    splits = [(1.0,)] if len(variables) == 1 else [(0.2, 0.8), (0.5, 0.5), (0.8, 0.2)]
    mixes = [(x,) for x in exponents] if len(variables) == 1 else [(x, y) for x in exponents for y in exponents]
    starts = []
    for part in (0.1, 0.4, 0.7, 0.95) if irreducible else (0.0,):
        rest = middle - part * low
        for split in splits:
            sizes = [math.log(rest * share) for share in split]
            starts += [np.array([*sizes, *mix, *([math.log(part * low)] if irreducible else [])]) for mix in mixes]
    return starts


def _centred(runs: Sequence[Run], variables: tuple[str, ...]) -> tuple[Array, Array, Array]:
    """ln of the variables less their mean (n, d), ln of the losses (n,), that mean (d,)."""
    x = np.log([[run.value(name) for name in variables] for run in runs])
    centre = x.mean(0)
    return x - centre, np.log([run.loss for run in runs]), centre


def _nearest(starts: Sequence[Array], runs: Sequence[Run], variables: tuple[str, ...], delta: float, count: int) -> list[Array]:
    """The `count` starting points of lowest loss."""
    x, y, _ = _centred(runs, variables)
    return sorted(starts, key=lambda start: _huber(start, x, y, delta)[0])[:count]


def _best(
    runs: Sequence[Run], variables: tuple[str, ...], irreducible: bool, delta: float, starts: Sequence[Array]
) -> tuple[Law, Array]:
    """The lowest minimum reached from `starts`: the law, and its vector."""
    x, y, centre = _centred(runs, variables)
    d = len(variables)
    limits = [(y.min() - 15, y.max() + 5)] * d + [(0.0, LARGEST_EXPONENT)] * d
    limits += [(y.min() - 15, y.min() + 0.1)] if irreducible else []
    minimize = _minimize()
    options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-13, "gtol": 1e-8}
    ends = [minimize(_huber, s, (x, y, delta), "L-BFGS-B", jac=True, bounds=limits, options=options) for s in starts]
    solution = min(ends, key=lambda end: end.fun).x
    exponents = solution[d : 2 * d]
    coefficients = np.exp(solution[:d] + exponents * centre)
    law = Law(
        variables,
        tuple(map(float, exponents)),
        tuple(map(float, coefficients)),
        float(np.exp(solution[-1])) if irreducible else 0.0,
    )
    return law, solution


def _huber(theta: Array, x: Array, y: Array, delta: float) -> tuple[float, Array]:
    """Summed Huber loss of ln L, in units of 1e-6, and its gradient.

    The unit matters: L-BFGS stops by absolute limits, and a fit of Hoffmann et al. that stopped early is why their
    published A, B and E do not quite belong together (Besiroglu et al. 2024).
    """
    d = x.shape[1]
    terms = np.concatenate([theta[:d] - theta[d : 2 * d] * x, np.broadcast_to(theta[2 * d :], (len(x), len(theta) - 2 * d))], 1)
    top = terms.max(1, keepdims=True)
    parts = np.exp(terms - top)  # (n, d or d + 1)
    whole = parts.sum(1, keepdims=True)
    residual = (top + np.log(whole))[:, 0] - y  # (n,)
    share = parts / whole
    slopes = np.concatenate([share[:, :d], -share[:, :d] * x, share[:, d:]], 1)  # (n, parameters)
    size = np.abs(residual)
    inner = np.minimum(size, delta)
    return 1e6 * float((inner * (size - inner / 2)).sum()), 1e6 * (np.clip(residual, -delta, delta) @ slopes)


# ---------------------------------------------------------------------- what people see


def show(result: Result, console: Console) -> None:
    """Print the losses, the laws beside the published ones, and the prediction, 80 columns wide."""
    _show_losses(result, console)
    _show_laws(result, console)
    p = result.prediction
    console.print()
    console.print(f"[bold]Left out of every fit:[/bold] N {p.N:,}, D {p.D:,}", highlight=False)
    console.print(
        f"predicted {p.predicted:.4f}, measured {p.measured:.4f} nats per token: {p.difference:+.4f} ({p.percent:+.2f} %)",
        highlight=False,
    )
    if p.interval is None:
        console.print(f"no 95 % interval ({result.fits['joint'].note})", highlight=False)
    else:
        where = "inside" if p.inside else "outside"
        said = f"95 % interval of the law there {p.interval[0]:.4f} to {p.interval[1]:.4f}: the measured loss is {where}"
        console.print(said, highlight=False)
    console.print()
    console.print(WHY, highlight=False, style="dim")
    names = [RESULT_FILE, *(f"{NAME}{suffix}" for suffix in charts.PICTURES)]
    console.print("\nWritten:", *(f"  {Path(result.config.out_dir) / name}" for name in names), sep="\n", highlight=False)


def _show_losses(result: Result, console: Console) -> None:
    runs = result.runs
    budgets = sorted({run.D for run in runs})
    title = "Held-out loss, nats per token, by size N and tokens D"
    table = Table("width", "N", *(f"D {_short(budget)}" for budget in budgets), title=title, title_justify="left", box=None)
    for column in table.columns:
        column.justify = "right"
    for width in sorted({run.width for run in runs}):
        row = [run for run in runs if run.width == width]
        cells = []
        for budget in budgets:
            here = [run for run in row if budget == run.D]
            marks = ("°" if any(run.name in result.frontier for run in here) else "") + (
                "*" if any(run.name in result.prediction.runs for run in here) else ""
            )
            cells.append(f"{sum(run.loss for run in here) / len(here):.3f}{marks or ' '}")
        table.add_row(str(width), f"{row[0].N:,}", *cells)
    console.print(table)
    seconds = sum(run.seconds for run in runs)
    compute, everything = sum(run.C for run in runs) / 1e12, sum(run.flops for run in runs) / 1e12
    console.print(
        f"° on the compute frontier   * left out of the fits{'' if result.config.seeds == 1 else '   means over seeds'}",
        f"{len(runs)} runs, {seconds / 60:.1f} min of steps; 6 N D = {compute:.3g} TFLOP ({everything:.3g} with attention and"
        " head); largest budget {:.2f} epochs".format(max(run.epochs for run in runs)),
        sep="\n",
        style="dim",
        highlight=False,
    )


def _show_laws(result: Result, console: Console) -> None:
    console.print()
    table = Table("law", "", "ours", "95 % interval", "published", box=None, pad_edge=False)
    published = PUBLISHED | {"compute_power": PUBLISHED["gpt3"] | PUBLISHED["compute_power"]}
    notes: list[str] = []
    for name, fit_ in result.fits.items():
        table.add_section()
        first = "L(N, D) =\n  E + A / N^alpha\n  + B / D^beta" if name == "joint" else fit_.formula
        for row, (key, value) in enumerate((fit_.numbers or {"": math.nan}).items()):
            interval = fit_.intervals.get(key)
            shown = f"{interval[0]:.3g} to {interval[1]:.3g}" if interval else "none"
            known = published.get(name, {}).get(key)
            source = "" if known is None else f"{known[0]:g} {known[1].partition(' ')[0]}"
            table.add_row(first if row == 0 else "", key, f"{value:.3g}" if fit_.numbers else "no fit", shown, source)
        if fit_.note:
            notes.append(f"{fit_.formula}: {fit_.note}")
    console.print(table)
    console.print("C in PetaFLOP/s-days; Brown et al. (GPT-3): L = 2.57 C^-0.048", *notes, sep="\n", style="dim", highlight=False)


def _short(tokens: float) -> str:
    """61440 -> 61k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:.3g}{letter}"
    return f"{tokens:.3g}"


def chart(result: Result, out: Path) -> list[Path]:
    """Draw loss against N, D and C as `scaling.svg` and `scaling.png`: runs, laws, and the run left out."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure, panels = charts.figure(3, (14, 4.8))
    held, fits = result.prediction, result.fits
    seen = [run for run in result.runs if run.name not in held.runs]
    joint = fits["joint"].law
    sides = (
        (panels[0], "N", "D", "size", "non-embedding parameters N", "Larger models"),
        (panels[1], "D", "N", "tokens", "training tokens D", "More text"),
    )
    for axes, along, other, name, label, title in sides:
        values = sorted({run.value(other) for run in result.runs})
        span = _span([run.value(along) for run in result.runs])
        for value, color in zip(values, _colors(len(values)), strict=True):
            points = [run for run in seen if run.value(other) == value]
            text = f"{other} = {_short(value)}"
            axes.plot([run.value(along) for run in points], [run.loss for run in points], "o", color=color, ms=5, label=text)
            if joint is not None:
                axes.plot(span, joint(**{along: span, other: value}), color=color, lw=1.1, alpha=0.8)
        _draw_law(axes, fits[name], along, span, f"largest {other}")
        axes.set(xlabel=label, title=title)
    axes = panels[2]
    sizes = sorted({run.N for run in result.runs})
    for size, color in zip(sizes, _colors(len(sizes)), strict=True):
        points = sorted((run for run in seen if size == run.N), key=lambda run: run.C)
        axes.plot([run.C for run in points], [run.loss for run in points], "o-", color=color, ms=4, lw=0.8, alpha=0.8)
    efficient = [run for run in seen if run.name in result.frontier]
    axes.plot([run.C for run in efficient], [run.loss for run in efficient], "o", mfc="none", mec="black", ms=9, label="frontier")
    span = _span([run.C for run in result.runs])
    _draw_law(axes, fits["compute_power"], "C", span, "frontier", PF_DAY)
    axes.set(xlabel="training compute C = 6 N D (FLOP)", title="More compute (colours as in the middle)")
    for axes, place in zip(panels, (held.N, held.D, 6.0 * held.N * held.D), strict=True):
        axes.plot(
            place,
            held.measured,
            "*",
            color="#c8553d",
            ms=15,
            mec="white",
            mew=0.6,
            label=f"left out: measured {held.measured:.3f}",
            zorder=5,
        )
        axes.plot(
            place,
            held.predicted,
            "D",
            mfc="none",
            mec="#c8553d",
            mew=1.6,
            ms=8,
            label=f"left out: predicted {held.predicted:.3f}",
            zorder=6,
        )
        axes.set(xscale="log", yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=7.5)
    panels[0].set_ylabel("held-out loss L (nats per token)")
    if joint is not None:
        n, d = joint.exponents
        a, b = joint.coefficients
        law = f"$L(N, D) = {joint.irreducible:.2f} + {a:.3g}\\,/\\,N^{{{n:.2f}}} + {b:.3g}\\,/\\,D^{{{d:.2f}}}$"
        figure.suptitle(f"Coloured curves: {law}, fitted without the run marked by a star", fontsize=11)
    return charts.save_both(figure, out, NAME)


def _span(values: Sequence[float]) -> Array:
    return np.geomspace(0.8 * min(values), 1.25 * max(values), 100)


def _colors(count: int) -> list[Any]:
    import matplotlib

    return list(matplotlib.colormaps["viridis_r"](np.linspace(0.12, 0.95, count)))


def _draw_law(axes: Any, fit_: Fit, variable: str, span: Array, of: str, unit: float = 1.0) -> None:
    if fit_.law is None:
        return
    (exponent,) = fit_.law.exponents
    floor = f"{fit_.law.irreducible:.2f} + " if "E" in fit_.numbers else ""
    label = f"{of}: ${floor}K\\,{variable}^{{-{exponent:.3g}}}$"
    axes.plot(span, fit_.law(**{variable: span / unit}), "--", color="black", lw=1.3, label=label)
