"""What each method of pruning costs at each sparsity: a table and a picture."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from glassgpt import charts
from glassgpt.compress import masks, structured
from glassgpt.compress.windows import bits_per_byte, windows
from glassgpt.config import UserError
from glassgpt.config.prune import Prune
from glassgpt.data.progress import steps
from glassgpt.interpret.inspect import check_path
from glassgpt.loading import load, pick_device
from glassgpt.model import GPT
from glassgpt.text import Tokenizer

Method = Callable[[], GPT]
INK, COLORS = "#2b2f36", ("#e8a08f", "#c8553d", "#8a2c18", "#3a76c4", "#9dbfe6", "#1d3f70", "#b8860b", "#2e8b57", "#7b4fa3")


@dataclass(frozen=True)
class Point:
    """One method at one sparsity."""

    method: str
    sparsity: float
    """What was asked for; of heads the nearest share that there is."""
    removed: float
    """Share of the weights in all matrices of the blocks that are zero or gone: heads alone cannot reach the MLPs'."""
    bits_per_byte: float


@dataclass(frozen=True)
class Curve:
    """What `prune --curve` measures."""

    model: str
    text_tokens: int
    calibration_tokens: int
    intact: float
    """Bits per byte of the model as it is."""
    points: list[Point]
    left_out: list[str]
    """Why a method, or a point of it, is not there."""


def curve(config: Prune) -> Curve:
    """Measure every method at every sparsity, print a table, draw. Raises UserError as `prune` does."""
    for path, suffix in ((config.png, ".png"), (config.svg, ".svg")):
        check_path(path, suffix)
    model, tokenizer = load(config.model, device=str(pick_device(config.device)))
    masks.check_plain(model)
    held_out = text_of(config, tokenizer, model)
    calibration = calibration_of(config, tokenizer, model) if config.calibration else None
    tried, left_out = _tried(config, model, calibration)
    whole, points = _matrix_weights(model), []
    with steps("curve") as progress:
        intact = bits_per_byte(model, held_out, tokenizer)
        for done, (name, sparsity, method) in enumerate(tried, 1):
            try:
                pruned = method()
            except UserError as error:
                left_out.append(f"{name} at {sparsity}: {error}")
                continue
            left = _matrix_weights(pruned) * (1 - masks.zero_share(pruned))
            points.append(Point(name, sparsity, 1 - left / whole, bits_per_byte(pruned, held_out, tokenizer)))
            progress(done, len(tried))
    calibrated = 0 if calibration is None else calibration[:, 1:].numel()
    result = Curve(config.model, held_out[:, 1:].numel(), calibrated, intact, points, left_out)
    print(json.dumps(asdict(result))) if config.json else show(result)
    for path in filter(None, (config.png, config.svg)):
        charts.save(draw(result), Path(path))
        print(f"picture: {path}", file=sys.stderr)
    return result


def text_of(config: Prune, tokenizer: Tokenizer, model: GPT) -> Tensor:
    """Windows of the text that the loss is measured on (N, T + 1)."""
    context = model.config.context_tokens
    return windows(config.text, "val", config.holdout_share, tokenizer, context, config.text_tokens, config.seed)


def calibration_of(config: Prune, tokenizer: Tokenizer, model: GPT) -> Tensor:
    """Windows of the text that a method decides by (N, T + 1)."""
    context, tokens = model.config.context_tokens, config.calibration_tokens
    ids = windows(config.calibration, "train", config.holdout_share, tokenizer, context, tokens, config.seed)
    return ids.to(next(model.parameters()).device)


def _tried(config: Prune, model: GPT, calibration: Tensor | None) -> tuple[list[tuple[str, float, Method]], list[str]]:
    """(method, sparsity, what makes the model) of every point, and what is left out and why."""
    shape = model.config
    fours = _refused(masks.check_pattern, model, "2:4")
    heads = _refused(structured.check_heads, shape.n_head // shape.kv_heads, shape)  # the fewest that can leave
    tried = _zeroed(config, model, masks.prune_magnitude, "magnitude", with_fours=not fours)
    if calibration is None:
        return tried, [*fours, "wanda and structured pruning decide by text: give --calibration FILES"]
    wanda = partial(masks.prune_wanda, ids=calibration[:, :-1])
    tried += _zeroed(config, model, wanda, "wanda", with_fours=not fours)
    with steps("importance") as progress:
        found = structured.importance(model, calibration, progress)
    tried += _smaller(config, model, found, with_heads=not heads)
    return tried, fours + heads


def _zeroed(
    config: Prune, model: GPT, how: Callable[..., None], name: str, *, with_fours: bool
) -> list[tuple[str, float, Method]]:
    """Every sparsity, ranked by matrix and by row, and the pattern 2:4."""

    def make(**settings: Any) -> GPT:
        pruned = copy.deepcopy(model)
        how(pruned, **settings)
        return pruned

    tried: list[tuple[str, float, Method]] = [
        (f"{name}, by {compared}", sparsity, partial(make, sparsity=sparsity, compared=compared))
        for compared in ("matrix", "row")
        for sparsity in config.curve
    ]
    return tried + ([(f"{name} 2:4", 0.5, partial(make, sparsity=0.5, pattern="2:4"))] if with_fours else [])


def _smaller(config: Prune, model: GPT, found: dict[str, Tensor], *, with_heads: bool) -> list[tuple[str, float, Method]]:
    """Channels, heads, and both at about the same share."""
    shape = model.config
    share, groups = shape.n_head // shape.kv_heads, shape.kv_heads
    heads = {sparsity: share * min(int(sparsity * groups + 0.5), groups - 1) for sparsity in config.curve if with_heads}

    def make(heads: int, mlp_share: float) -> GPT:
        return structured.smaller(model, structured.choose(found, heads, mlp_share, shape))

    tried: list[tuple[str, float, Method]] = [("channels", sparsity, partial(make, 0, sparsity)) for sparsity in config.curve]
    tried += [("heads", count / shape.n_head, partial(make, count, 0.0)) for count in dict.fromkeys(heads.values()) if count]
    return tried + [
        ("heads and channels", sparsity, partial(make, count, sparsity)) for sparsity, count in heads.items() if count
    ]


def _refused(check: Callable[..., None], *arguments: Any) -> list[str]:
    """Why a check fails, or nothing."""
    try:
        check(*arguments)
    except UserError as error:
        return [str(error)]
    return []


def _matrix_weights(model: GPT) -> int:
    return sum(linear.weight.numel() for linear in masks.matrices(model.blocks).values())


def show(result: Curve) -> None:
    """Print the points as a table."""
    table = Table("method", "sparsity", "of all matrices", "bits/byte", "more")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("none", "-", "0.0%", f"{result.intact:.4f}", "-")
    for point in result.points:
        more = point.bits_per_byte / result.intact - 1
        table.add_row(point.method, f"{point.sparsity:.0%}", f"{point.removed:.1%}", f"{point.bits_per_byte:.4f}", f"{more:+.1%}")
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"bits per byte on {result.text_tokens:,} tokens; no training after pruning; only heads and channels make a model smaller"
    )
    for reason in result.left_out:
        console.print(f"left out: {reason}")


def draw(result: Curve) -> Any:
    """The loss of each method over the share of all matrices' weights that is zero or gone."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    figure, axes = charts.figure()
    for number, name in enumerate(dict.fromkeys(point.method for point in result.points)):
        points = sorted((point.removed, point.bits_per_byte) for point in result.points if point.method == name)
        marker = "D" if len(points) == 1 else "o-"
        axes.plot(*zip(*points, strict=True), marker, color=COLORS[number % len(COLORS)], ms=5, lw=1.6, label=name)
    axes.axhline(result.intact, color=INK, lw=1, ls="--", label=f"as it was: {result.intact:.3f}")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(8))  # a logarithmic axis names powers of ten by itself: none is in sight
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set(
        title=f"{charts.drawable(result.model)}: what pruning costs, without training afterwards",
        xlabel="weights of the blocks' matrices that are zero or gone",
        ylabel="bits per byte (logarithmic)",
    )
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    return figure
