"""Variants of a GPT, made of a plain one from outside: three matrices for the fused one, a head of its own for the tied one."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from glassgpt.config import UserError
from glassgpt.model import GPT
from glassgpt.model.attention import Attention


class SeparateQKV(nn.Module):
    """Queries, keys and values by a matrix each, joined: (B, T, D) -> (B, T, (H + 2G)W), the numbers of the fused layer."""

    def __init__(self, fused: nn.Linear, rows: tuple[int, int, int]) -> None:
        super().__init__()
        weights = fused.weight.detach().split(rows)
        biases = fused.bias.detach().split(rows) if fused.bias is not None else (None, None, None)
        self.q, self.k, self.v = (_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.q(x), self.k(x), self.v(x)), dim=-1)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.size(1), weight.size(0), bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.clone())
    return made


def separate(model: GPT) -> GPT:
    """Give every layer three matrices in place of one, with the same numbers; returns the model.

    Raises UserError where the fused layer is none: beside an adapter.
    """
    for layer in model.modules():
        if isinstance(layer, Attention):
            if type(layer.qkv) is not nn.Linear:
                raise UserError(
                    f"layer {layer.layer}: qkv is a {type(layer.qkv).__name__}, not a plain matrix; merge the adapter"
                )
            q, k, v = (heads * layer.head_width for heads in layer.heads)
            setattr(layer, "qkv", SeparateQKV(layer.qkv, (q, k, v)))  # noqa: B010  (it is declared as a matrix)
    return model


def untie(model: GPT) -> GPT:
    """Give the model a head of its own, with the embedding's numbers at first; returns it. Raises UserError if it has one."""
    if not model.config.tied_head:
        raise UserError("the head of this shape is not tied; choose one whose head is")
    model.config = dataclasses.replace(model.config, tied_head=False)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    return model


def parameters(model: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
