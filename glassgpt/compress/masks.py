"""Unstructured pruning: which weights of a matrix become zero.

N outputs, K inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from glassgpt.config import UserError
from glassgpt.data.progress import Progress
from glassgpt.interpret.activations import check_no_dropout
from glassgpt.model import GPT, Where

Compared = Literal["row", "matrix"]
"""Which weights are ranked together: those of one output, or all of a matrix."""
PATTERN = (2, 4)
"""2:4: removed, of how many along a row."""
ROWS = 4
"""Windows in one forward pass over the calibration text."""


def matrices(part: nn.Module) -> dict[str, nn.Linear]:
    """The linear maps that are pruned, by their names in `part`: all of the blocks but routers, small maps that decide much."""
    return {
        name: module for name, module in part.named_modules() if isinstance(module, nn.Linear) and not name.endswith("router")
    }


def zero_share(model: GPT) -> float:
    """The share of the weights in the blocks' matrices that are exactly zero."""
    held = [linear.weight for linear in matrices(model.blocks).values()]
    return sum(int((weight == 0).sum()) for weight in held) / sum(weight.numel() for weight in held)


def kept(scores: Tensor, group: int, removed: int) -> Tensor:
    """Scores (N, K) to a mask (N, K): false for the `removed` lowest of every `group` in a row-major run, of equals the first.

    A group of N * K compares a whole matrix, one of K each row, one of 4 with 2 removed is the pattern 2:4.
    """
    runs = scores.reshape(-1, group)
    lowest = runs.argsort(dim=1, stable=True)[:, :removed]
    return torch.ones_like(runs, dtype=torch.bool).scatter(1, lowest, False).view_as(scores)


@torch.no_grad()
def prune_magnitude(model: GPT, sparsity: float, pattern: str | None = None, compared: Compared = "matrix") -> None:
    """Set the smallest weights of each matrix to zero, in place (Han et al. 2015): round(sparsity * N * K) of them.

    `compared` "row" takes round(sparsity * K) of each row; the pattern "2:4" two of every four along a row, whatever the others
    say. Raises UserError for a model whose matrices are not plain, for rows that the pattern does not divide, and where no weight
    would stay.
    """
    check_plain(model)
    check_pattern(model, pattern)
    for linear in matrices(model.blocks).values():
        _zero(linear, linear.weight.abs(), sparsity, pattern, compared)


@torch.no_grad()
def prune_wanda(
    model: GPT,
    ids: Tensor,
    sparsity: float,
    pattern: str | None = None,
    compared: Compared = "row",
    progress: Progress = lambda done, total: None,
) -> None:
    """Set weights to zero by |W_nk| * ‖X_k‖ (Sun et al. 2023, eq. 1), in place: round(sparsity * K) in each row, as published.

    ‖X_k‖ is the L2 norm of input k over the tokens of ids (B, T). Block after block: what a block reads comes from the pruned
    blocks below it, as in the authors' code. `pattern`, `compared` and errors as in `prune_magnitude`; `progress` counts blocks.
    Raises UserError too for a model in training mode with dropout, and for an expert that no token of the text was sent to.
    """
    check_plain(model)
    check_pattern(model, pattern)
    check_no_dropout(model)
    states = [model.enter(rows) for rows in ids.split(ROWS)]
    for number, block in enumerate(model.blocks):
        with _square_sums(block) as sums:
            _through(block, states)
        for name, linear in matrices(block).items():
            if name not in sums:
                raise UserError(f"blocks.{number}.{name} saw no token of the calibration text; give more --calibration_tokens")
            _zero(linear, linear.weight.abs() * sums[name].sqrt(), sparsity, pattern, compared)
        states = _through(block, states)
        progress(number + 1, len(model.blocks))


def check_plain(model: GPT) -> None:
    """Raises UserError for a model with adapters or with matrices that are stored in few bits."""
    with torch.device("meta"):
        plain = {name for name, _ in GPT(model.config).named_parameters()}
    if {name for name, _ in model.named_parameters()} != plain:
        raise UserError("pruning needs a plain model: merge adapters first, and prune before you quantise")


def check_pattern(model: GPT, pattern: str | None) -> None:
    """Raises UserError where a pattern of so many of four does not divide a row."""
    for name, linear in matrices(model.blocks).items():
        if pattern is not None and linear.in_features % PATTERN[1]:
            raise UserError(
                f"pattern {pattern} needs rows of a multiple of {PATTERN[1]} weights; blocks.{name} has {linear.in_features}"
            )


def _zero(linear: nn.Linear, scores: Tensor, sparsity: float, pattern: str | None, compared: Compared) -> None:
    group = linear.in_features if compared == "row" else scores.numel()
    removed, group = (round(sparsity * group), group) if pattern is None else PATTERN
    if removed >= group:
        raise UserError(f"sparsity {sparsity} leaves none of the {group:,} weights of a {compared}; give less")
    linear.weight.masked_fill_(~kept(scores, group, removed), 0.0)


def _through(block: nn.Module, states: Sequence[tuple[Tensor, Where]]) -> list[tuple[Tensor, Where]]:
    return [(block(x, where), where) for x, where in states]


@contextmanager
def _square_sums(block: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Σ x² over all tokens that each linear map of a block reads, (K,) by name, of every forward pass in here."""
    sums: dict[str, Tensor] = {}

    def add(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            x = inputs[0].flatten(0, -2)  # (tokens, K)
            if len(x):
                sums[name] = sums.get(name, torch.zeros((), device=x.device)) + x.square().sum(dim=0)

        return hook

    with ExitStack() as stack:
        for name, linear in matrices(block).items():
            stack.callback(linear.register_forward_hook(add(name)).remove)
        yield sums
