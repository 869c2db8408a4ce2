"""What each position does by itself: the dense MLPs and the mixture of experts.

N tokens, D width, F hidden width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.config import ModelConfig
from glassgpt.model.attention import Where


def gelu(x: Tensor) -> Tensor:
    """The tanh-approximated GELU (Hendrycks & Gimpel 2016), as GPT-2 has it."""
    return F.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    """The square of the ReLU (So et al. 2021)."""
    return F.relu(x).square()


class MLP(nn.Module):
    """Two linear maps with an activation between them."""

    def __init__(self, config: ModelConfig, hidden_width: int) -> None:
        super().__init__()
        self.act: Callable[[Tensor], Tensor] = relu2 if config.mlp == "relu2" else gelu
        self.up = nn.Linear(config.width, hidden_width, bias=config.bias)
        self.hidden = nn.Identity()  # a tap
        self.down = nn.Linear(hidden_width, config.width, bias=config.bias)

    def forward(self, x: Tensor, where: Where | None = None) -> Tensor:
        return self.down(self.hidden(self.act(self.up(x))))


class GatedMLP(nn.Module):
    """SwiGLU: a second map, through SiLU, says how much of each hidden number passes (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, hidden_width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, hidden_width, bias=config.bias)
        self.up = nn.Linear(config.width, hidden_width, bias=config.bias)
        self.hidden = nn.Identity()  # a tap
        self.down = nn.Linear(hidden_width, config.width, bias=config.bias)

    def forward(self, x: Tensor, where: Where | None = None) -> Tensor:
        return self.down(self.hidden(F.silu(self.gate(x)) * self.up(x)))


class Mixture(nn.Module):
    """A router sends each token to the `top_k` experts that it scores highest; no token is ever dropped.

    The output is the sum of their outputs, weighted by the softmax of the scores, and of the shared experts' outputs.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k, self.normalise = config.moe.top_k, config.moe.normalise
        self.router = nn.Linear(config.width, config.moe.experts, bias=False)
        self.experts = nn.ModuleList(dense(config, config.expert_width) for _ in range(config.moe.experts))
        self.shared = nn.ModuleList(dense(config, config.expert_width) for _ in range(config.moe.shared))

    def forward(self, x: Tensor, where: Where | None = None) -> Tensor:
        tokens = x.flatten(0, -2)  # (N, D)
        scores = self.router(tokens)  # (N, E)
        if where is not None and where.routes is not None:
            where.routes.add(scores)
        shares = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        weights, chosen = shares.topk(self.top_k, dim=-1)  # (N, k)
        if self.normalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        out = sum((expert(tokens) for expert in self.shared), torch.zeros_like(tokens))
        by_expert = chosen.flatten().argsort(stable=True)  # (N k,): choices in the order of their experts
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        for expert, choices in zip(self.experts, by_expert.split(counts), strict=True):
            rows = choices // self.top_k  # its tokens
            found = expert(tokens[rows]) * weights.flatten()[choices].unsqueeze(-1).to(x.dtype)  # (n, D)
            out.index_add_(0, rows, found.to(out.dtype))
        return out.view(x.shape)


def dense(config: ModelConfig, hidden_width: int) -> nn.Module:
    """The MLP that the configuration names."""
    return (GatedMLP if config.mlp == "swiglu" else MLP)(config, hidden_width)


def mlp(config: ModelConfig) -> nn.Module:
    """A block's second half."""
    return Mixture(config) if config.moe.experts else dense(config, config.hidden_width)
