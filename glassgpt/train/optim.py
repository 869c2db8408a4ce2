"""Optimisers and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from glassgpt.config import OptimConfig
from glassgpt.model import GPT


def build(model: GPT, config: OptimConfig) -> list[Optimizer]:
    """Optimisers that together hold every parameter once.

    Matrices and embeddings decay; biases and norms do not (Radford et al. train so; Loshchilov & Hutter 2019 for the
    decoupled decay). With `muon`, the matrices inside the blocks take orthogonalised momentum steps (Jordan et al.
    2024), scaled to AdamW's step size (Liu et al. 2025, "Muon is Scalable for LLM Training", eq. 4) so that one learning
    rate serves both.
    """
    named = dict(model.named_parameters())
    hidden = {name for name, p in named.items() if config.optimizer == "muon" and name.startswith("blocks.") and p.ndim == 2}
    decayed = [p for name, p in named.items() if p.ndim >= 2 and name not in hidden]
    plain = [p for p in named.values() if p.ndim < 2]
    fused = all(p.device.type in ("cpu", "cuda") for p in named.values())
    adamw = AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=fused,
    )
    if not hidden:
        return [adamw]
    muon = Muon(
        [named[name] for name in sorted(hidden)],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return [adamw, muon]


def learning_rate(step: int, max_steps: int, config: OptimConfig) -> float:
    """Rate of `step` (0-based): linear warm-up, then cosine or linear fall to `final_share` of the peak at the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, max_steps - 1 - config.warmup_steps)
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.learning_rate * (config.final_share + (1 - config.final_share) * left)


def set_rate(optimizers: list[Optimizer], rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def clip(model: nn.Module, largest_norm: float) -> float:
    """Scale all gradients so that their global L2 norm is at most `largest_norm` (0: leave them); returns the norm before."""
    limit = largest_norm or math.inf
    return float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))


def state(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, torch.Tensor]:
    """The optimisers' state as `parameter:key` -> tensor."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}:{key}": value
        for optimizer in optimizers
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def set_state(model: nn.Module, optimizers: list[Optimizer], tensors: dict[str, torch.Tensor]) -> None:
    """Put back what `state` gave."""
    parameters = dict(model.named_parameters())
    owner = {parameter: o for o in optimizers for group in o.param_groups for parameter in group["params"]}
    for name, tensor in tensors.items():
        parameter_name, key = name.rsplit(":", 1)
        parameter = parameters[parameter_name]
        owner[parameter].state[parameter][key] = tensor.to(parameter.device)
