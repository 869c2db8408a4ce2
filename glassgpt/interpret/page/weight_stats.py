"""Parameters in numbers and small pictures.

L layers, H heads, G heads of keys and values, W head width, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glassgpt.interpret.attribution import linear_parts
from glassgpt.model import GPT
from glassgpt.model.quantised import dequantised

BINS = 40
"""Bars of a histogram of weights."""
SPREAD = 4.0
"""It reaches this many standard deviations to both sides; what lies beyond is in the outermost bars."""
HISTOGRAM_NUMBERS = 2**20
"""Larger tensors are sampled for it: every second number, every third, and so on."""
SLAB = (8, 64)
"""Rows and columns to which a head's part of the Q | K | V matrix is reduced."""


@dataclass(frozen=True)
class WeightStats:
    """One named parameter tensor in numbers."""

    name: str
    shape: tuple[int, ...]
    count: int
    """Parameters that it adds to the model: 0 when it is another name for `tied_to`."""
    tied_to: str | None
    mean: float
    std: float
    min: float
    max: float
    histogram: tuple[int, ...]
    """How many numbers, of those sampled, lie in each of BINS equal steps from mean - SPREAD std to mean + SPREAD std."""


def weight_stats(model: GPT) -> Iterator[WeightStats]:
    """Every parameter under every name, a tied head's too, in the order of the forward pass.

    A matrix with an adapter is what the network multiplies by: the two added up, under the matrix's own name. A quantised one is
    the numbers that its codes stand for.
    """
    model = dequantised(model)
    first_name: dict[torch.nn.Parameter, str] = {}
    for full_name, parameter in model.named_parameters(remove_duplicate=False):
        if ".lora_" in full_name:
            continue
        name = full_name.replace(".base.", ".")
        weight: Tensor = parameter
        if full_name.endswith(".base.weight"):
            weight, _ = linear_parts(model.get_submodule(full_name.removesuffix(".base.weight")), torch.float32)
        home = first_name.setdefault(parameter, name)
        yield _stats(name, weight.detach().float(), None if home == name else home)


def _stats(name: str, weight: Tensor, tied_to: str | None) -> WeightStats:
    std, mean = (float(x) for x in torch.std_mean(weight, correction=0))
    low, high = mean - SPREAD * std, mean + SPREAD * std
    sample = weight.flatten()[:: -(-weight.numel() // HISTOGRAM_NUMBERS)].cpu()
    histogram = torch.histc(sample.clamp(low, high), BINS, low, high) if high > low else torch.zeros(BINS)
    if not histogram.any():  # all alike, as in a new norm: one bar in the middle
        histogram[BINS // 2] = len(sample)
    least, most = (float(x) for x in weight.aminmax())
    count = 0 if tied_to else weight.numel()
    counts = tuple(int(n) for n in histogram.tolist())
    return WeightStats(name, tuple(weight.shape), count, tied_to, mean, std, least, most, counts)


def head_slabs(model: GPT) -> Tensor:
    """Root mean square of each block of each head's rows of Q | K | V: (L, H + 2G, *SLAB), fewer where a matrix is smaller."""
    parts = model.config.n_head + 2 * model.config.kv_heads
    found = []
    for layer in range(model.config.n_layer):
        weight, _ = linear_parts(model.get_submodule(f"blocks.{layer}.attn.qkv"), torch.float32)  # ((H + 2G) W, D)
        by_head = weight.detach().view(parts, -1, weight.size(1))  # (H + 2G, W, D)
        size = (min(SLAB[0], by_head.size(1)), min(SLAB[1], by_head.size(2)))
        found.append(F.adaptive_avg_pool2d(by_head.square(), size).sqrt().cpu())
    return torch.stack(found)
