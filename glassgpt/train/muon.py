"""Muon: momentum whose steps are orthogonal matrices (Jordan et al. 2024), all matrices of one shape at once."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from glassgpt.train import parallel

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration (Jordan et al. 2024)."""
NEWTON_SCHULZ_STEPS = 5


class Muon(Optimizer):
    """`torch.optim.Muon` with `match_rms_adamw`, with two differences.

    Matrices of one shape are stacked and orthogonalised by batched products: the same numbers with fewer, larger operations
    (docs/log.md has what that brings). A matrix that `parts` says holds several maps one above the other is parted first,
    as a step that is orthogonal over q, k and v together is orthogonal for none of them. Sharded parameters (FSDP) are
    gathered for it, so the step does not depend on the number of ranks.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        parts: Callable[[Tensor], int] = lambda _: 1,
    ) -> None:
        """`parts(parameter)` says how many maps lie one above the other in it."""
        super().__init__(list(params), {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._parts = parts

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(state["momentum_buffer"], group["momentum"])  # Nesterov's
                whole = parallel.whole(ahead)
                maps = whole.view(self._parts(parameter), -1, whole.size(1))  # (parts, out, in)
                alike[tuple(maps.shape)].append((parameter, maps))
            for shape, pairs in alike.items():
                steps = orthogonal(torch.cat([maps for _, maps in pairs])).split(shape[0])  # (parts, out, in) each
                rate = group["lr"] * 0.2 * math.sqrt(max(shape[1:]))  # Liu et al. 2025, eq. 4: the size of AdamW's steps
                for (parameter, _), step in zip(pairs, steps, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(parallel.like(step.reshape(parameter.shape), parameter.data), alpha=-rate)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (n, out, in) with their singular values pushed to about 1, in bfloat16: five Newton-Schulz steps."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT  # (..., small, small)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
