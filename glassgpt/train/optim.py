"""Optimisers and the learning-rate schedule."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import cast

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from glassgpt.config import OptimConfig
from glassgpt.model import GPT
from glassgpt.train import parallel
from glassgpt.train.muon import Muon


def build(model: nn.Module, config: OptimConfig) -> list[Optimizer]:
    """Optimisers that together hold every trained parameter once, of a GPT or of a module that holds one as `model`.

    Matrices and embeddings decay; biases and norms do not (Radford et al. train so; Loshchilov & Hutter 2019 for the
    decoupled decay). With `muon`, the matrices inside the blocks take orthogonalised momentum steps (Jordan et al.
    2024), scaled to AdamW's step size (Liu et al. 2025, "Muon is Scalable for LLM Training", eq. 4) so that one learning
    rate serves both.
    """
    gpt = cast(GPT, model if isinstance(model, GPT) else model.model)
    named = {name.removeprefix("model."): p for name, p in model.named_parameters() if p.requires_grad}
    blocks = {name for name, p in named.items() if name.startswith("blocks.") and p.ndim >= 2}
    hidden = {name for name in blocks if config.optimizer == "muon" and not name.endswith("router.weight")}
    embeddings = [p for name, p in named.items() if name not in blocks and p.ndim >= 2]
    matrices = [p for name, p in named.items() if name in blocks - hidden]
    plain = [p for p in named.values() if p.ndim < 2]
    kinds = {(type(p), p.device.type) for p in named.values()}
    groups = [
        {"params": embeddings, "weight_decay": config.weight_decay, "rate": config.embedding_rate},
        {"params": matrices, "weight_decay": config.weight_decay, "rate": 1.0},
        {"params": plain, "weight_decay": 0.0, "rate": 1.0},
    ]
    one_kind = len({kind for kind, _ in kinds}) == 1  # tensor parallelism leaves some parameters sharded, some not
    fused = one_kind and all(device in ("cpu", "cuda") for _, device in kinds)
    groups = [group for group in groups if group["params"]]
    optimizers: list[Optimizer] = []
    if groups:  # beside adapters Muon takes all there is
        betas = (config.beta1, config.beta2)
        optimizers.append(AdamW(groups, lr=config.learning_rate, betas=betas, fused=fused, foreach=False))
    if not hidden:
        return optimizers
    stacked = {named[name] for name in hidden if name.endswith("attn.qkv.weight")}
    maps = gpt.config.n_head // gpt.config.kv_heads + 2  # of equal size, one above the other: q (shared keys: several), k, v
    muon = Muon(
        [named[name] for name in sorted(hidden)],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        parts=lambda parameter: maps if parameter in stacked else 1,
    )
    return [*optimizers, muon]


def keep_zeros(model: GPT, optimizers: list[Optimizer]) -> None:
    """Hold at zero, after every step, what is exactly zero now in the blocks' matrices: the weights that pruning took."""
    kept = {p: p.detach() != 0 for p in model.blocks.parameters() if p.ndim >= 2}

    @torch.no_grad()
    def clear(optimizer: Optimizer, *_: object) -> None:
        for parameter in (p for group in optimizer.param_groups for p in group["params"] if p in kept):
            parameter.mul_(kept[parameter])

    for optimizer in optimizers:
        optimizer.register_step_post_hook(clear)


def learning_rate(step: int, max_steps: int, config: OptimConfig) -> float:
    """Rate of `step` (0-based): linear warm-up, a stable part, then cosine or linear fall to `final_share` of the peak at the
    last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    falling = config.warmup_steps + config.stable_share * (max_steps - 1 - config.warmup_steps)
    done = max(0.0, (step - falling) / max(1, max_steps - 1 - falling))
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.learning_rate * (config.final_share + (1 - config.final_share) * left)


def set_rate(optimizers: list[Optimizer], rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("rate", 1.0)


def clip(model: nn.Module, largest_norm: float) -> float:
    """Scale all gradients so that their global L2 norm is at most `largest_norm` (0: leave them); returns the norm before."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    alike: dict[object, list[torch.Tensor]] = defaultdict(list)  # tensors that are sharded differently do not mix
    for gradient in gradients:
        alike[getattr(gradient, "device_mesh", None)].append(gradient)
    norm = math.hypot(*(float(parallel.whole(torch.nn.utils.get_total_norm(some))) for some in alike.values()))
    if 0 < largest_norm < norm and math.isfinite(norm):
        for gradient in gradients:
            gradient.mul_(largest_norm / (norm + 1e-6))
    return norm


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
    """Put back what `state` gave, whole or sharded."""
    parameters = dict(model.named_parameters())
    owner = {parameter: o for o in optimizers for group in o.param_groups for parameter in group["params"]}
    for name, tensor in tensors.items():
        parameter_name, key = name.rsplit(":", 1)
        parameter = parameters[parameter_name]
        same_kind = tensor.ndim == 0 or type(tensor) is type(parameter.data)
        held = tensor.to(parameter.device) if same_kind else parallel.like(tensor, parameter.data)
        owner[parameter].state[parameter][key] = held
