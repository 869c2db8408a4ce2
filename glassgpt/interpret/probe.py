"""Linear probes: can a property be read off an activation by a linear map, and is that more than a memory for tokens?

A probe that is given enough numbers learns anything that goes with the token itself. So every probe is trained a second time on
a control task: labels drawn at random for each type of token (Hewitt & Liang 2019, "Designing and Interpreting Probes with
Control Tasks"). The difference of the two accuracies, the selectivity, is what the activation says.

N tokens, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from glassgpt.config import UserError
from glassgpt.config.errors import check_seed, nearest
from glassgpt.interpret.activations import activations
from glassgpt.model import GPT

Method = Literal["logistic", "least_squares"]


@dataclass(frozen=True)
class ProbeResult:
    """Accuracies on texts that the probe has not seen."""

    accuracy: float
    control_accuracy: float
    """Of the same probe on labels that were drawn for each type."""
    selectivity: float
    """accuracy - control_accuracy."""
    majority_accuracy: float
    """Of always saying the label that is most frequent in training."""
    train_accuracy: float
    classes: int
    train_tokens: int
    test_tokens: int


def probe(
    features: Tensor,
    labels: Tensor,
    texts: Tensor,
    types: Tensor,
    *,
    method: Method = "logistic",
    penalty: float = 1e-3,
    test_share: float = 0.25,
    seed: int = 0,
) -> ProbeResult:
    """Train and measure a linear probe of features (N, D) for labels (N,): classes from 0, below 0 for tokens to leave out.

    `texts` (N,) numbers the text of each token: whole texts are held out, `test_share` of them drawn by `seed`. `types` (N,)
    is what the control task draws labels for, usually the token ids; it draws them as often as they occur in training.
    logistic: softmax regression by L-BFGS, cross-entropy + penalty / 2 * |W|²; least_squares: ridge regression on one-hot
    labels, closed form. Features are standardised by the training texts.
    Raises UserError for shapes that do not fit, fewer than two classes or two texts, and options out of range.
    """
    _check(features, labels, texts, types, method, penalty, test_share)
    check_seed(seed)
    kept = labels >= 0
    x, y, texts, types = (own[kept] for own in (features, labels.long(), texts, types))
    generator = torch.Generator().manual_seed(seed)
    test = _held_out(texts, test_share, generator)  # (N,)
    classes = int(y.max()) + 1 if len(y) else 0
    if len(y[~test].unique()) < 2:
        raise UserError("the training texts hold fewer than two classes, so there is nothing to tell apart; give more texts")
    control = _control_labels(y[~test], types, generator)
    x = _standardised(x, ~test)

    def accuracies(goal: Tensor) -> tuple[float, float]:
        """On the training texts, and on those held out."""
        weights = FITS[method](x[~test], F.one_hot(goal[~test], classes).to(x), penalty)  # (D + 1, C)
        right = ((x @ weights).argmax(dim=-1) == goal).double()
        return float(right[~test].mean()), float(right[test].mean())

    (train_accuracy, accuracy), (_, control_accuracy) = accuracies(y), accuracies(control)
    majority = float((y[test] == y[~test].mode().values).double().mean())
    counts = int((~test).sum()), int(test.sum())
    return ProbeResult(accuracy, control_accuracy, accuracy - control_accuracy, majority, train_accuracy, classes, *counts)


def probe_layers(
    model: GPT,
    texts: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    names: Sequence[str] | None = None,
    method: Method = "logistic",
    penalty: float = 1e-3,
    test_share: float = 0.25,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[str, ProbeResult]]:
    """`probe` of each activation (B, T, D) of `names`: by default the residual stream, embed and after every block.

    `texts` are ids (T,), `labels` a class for each of their tokens, below 0 for none; the control's types are the ids. The
    activations of all texts are held at once, 4 bytes a number. Raises UserError as `probe` does, and for a name that the model
    has not.
    """
    if not texts or [ids.shape for ids in texts] != [own.shape for own in labels]:
        raise UserError("expected texts, ids (T,) each, and a label for each of their tokens; there are none or shapes differ")
    names = ["embed", *(f"blocks.{layer}" for layer in range(model.config.n_layer))] if names is None else names
    held: dict[str, list[Tensor]] = {name: [] for name in names}
    for ids in texts:
        for name, x in activations(model, names, ids.unsqueeze(0)).items():
            held[name].append(x[0])
    numbers = torch.cat([torch.full_like(ids, number) for number, ids in enumerate(texts)])
    results = []
    for done, name in enumerate(names):
        x = torch.cat(held.pop(name))  # (N, D)
        y, where, types = (own.to(x.device) for own in (torch.cat([*labels]), numbers, torch.cat([*texts])))
        result = probe(x, y, where, types, method=method, penalty=penalty, test_share=test_share, seed=seed)
        results.append((name, result))
        if progress is not None:
            progress(done + 1, len(names))
    return results


# ---------------------------------------------------------------------- parts


def _held_out(texts: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Which tokens (N,) belong to the texts that are held out: at least one text, and not all."""
    every, text_of = texts.unique(return_inverse=True)
    if len(every) < 2:
        raise UserError(f"a probe is tested on texts of their own, so it needs at least 2 texts with labels; got {len(every)}")
    count = min(max(1, round(share * len(every))), len(every) - 1)
    chosen = torch.randperm(len(every), generator=generator)[:count].to(texts.device)
    return torch.isin(text_of, chosen)


def _control_labels(train_labels: Tensor, types: Tensor, generator: torch.Generator) -> Tensor:
    """A label (N,) for each token, the same for all of a type."""
    every, type_of = types.unique(return_inverse=True)
    drawn = torch.randint(len(train_labels), (len(every),), generator=generator).to(types.device)
    return train_labels[drawn][type_of]


def _standardised(x: Tensor, train: Tensor) -> Tensor:
    """(N, D + 1): mean 0 and variance 1 over the training tokens, and a 1 for the bias."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    spread, mean = torch.std_mean(x[train], dim=0, correction=0)
    x = (x - mean) / torch.where(spread > 0, spread, 1)
    return torch.cat((x, torch.ones_like(x[:, :1])), dim=1)


@torch.inference_mode(False)
@torch.enable_grad()
def _logistic(x: Tensor, goal: Tensor, penalty: float) -> Tensor:
    """Softmax regression of one-hot goals (N, C) on x (N, D + 1): a convex problem, from zero."""
    x, goal = x.clone(), goal.clone()
    weights = torch.zeros(x.size(1), goal.size(1), dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weights, goal) + penalty / 2 * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def _least_squares(x: Tensor, goal: Tensor, penalty: float) -> Tensor:
    """Ridge regression on one-hot goals, closed form: (XᵀX / N + penalty I)⁻¹ Xᵀ Y / N, the bias free."""
    ridge = torch.full_like(x[0], penalty)
    ridge[-1] = 0
    return torch.linalg.solve(x.T @ x / len(x) + ridge.diag(), x.T @ goal / len(x))


FITS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"logistic": _logistic, "least_squares": _least_squares}


def _check(
    features: Tensor, labels: Tensor, texts: Tensor, types: Tensor, method: str, penalty: float, test_share: float
) -> None:
    """Raises UserError for the first thing that does not fit."""
    shapes = [tuple(x.shape) for x in (features, labels, texts, types)]
    if features.dim() != 2 or shapes[1:] != [shapes[0][:1]] * 3:
        raise UserError(f"expected features (N, D), and labels, texts and types (N,) each; got {', '.join(map(str, shapes))}")
    if method not in FITS:
        raise UserError(f"method must be one of {', '.join(FITS)}; got {method!r}{nearest(method, FITS)}")
    if not penalty > 0 or not 0 < test_share < 1:
        raise UserError(f"penalty must be above 0 and test_share between 0 and 1; got {penalty} and {test_share}")
