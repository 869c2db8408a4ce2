"""Where a token stands: one slot, seven ways to fill it.

A position either joins the embedding (`add`), turns queries and keys (`rotation`), or adds to the scores by the distance between
query and key (`bias`). Each class does one of the three and leaves the others as they are here, in `Position`.

B batch, T positions of this call, S keys, D width, H heads, W head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from glassgpt.config import ModelConfig
from glassgpt.config.model import RopeConfig

BUCKETS = 32
"""Buckets of distances of `relative`, and their reach: T5's values (Raffel et al. 2020, §2.1)."""
BUCKETS_REACH = 128


class Position(nn.Module):
    """No position at all: what the others start from."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    def add(self, x: Tensor, positions: Tensor) -> Tensor:
        """Embeddings (B, T, D) with what belongs to `positions`, (T,) or (B, T), added."""
        return x

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Cosines and sines, (2, 1 or B, 1, T, W), by which queries and keys at `positions` are turned."""
        return None

    def bias(self, T: int, S: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores, (H, T, S), of the last T of S positions; for keys to come it may be anything."""
        return None


class Learned(Position):
    """A learned vector for each position, as GPT-2 has them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.context_tokens, config.width))
        if not self.weight.is_meta:
            nn.init.normal_(self.weight)  # to be drawn anew, but without it a seed would no longer give 0.2.0's network

    def add(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + nn.functional.embedding(positions, self.weight)


class Sinusoidal(Position):
    """Sines and cosines of falling frequency (Vaswani et al. 2017, §3.5), side by side."""

    def add(self, x: Tensor, positions: Tensor) -> Tensor:
        angles = positions.unsqueeze(-1) * _frequencies(x.size(-1), 10000.0, x.device, x.dtype)  # (..., T, D/2)
        return x + torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2).to(x.dtype)


class Rope(Position):
    """Queries and keys turn with their position, so a score knows the distance alone (Su et al. 2021).

    Number i of a head turns with number i + W/2, as in the published models.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.width, self.config = config.head_width, config.rope

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        speeds, gain = rope_speeds(self.config, self.width, positions.device, dtype)
        angles = positions.unsqueeze(-1) * speeds  # (T, W/2) or (B, T, W/2)
        angles = torch.cat((angles, angles), dim=-1).view(-1, 1, positions.size(-1), self.width)
        return (torch.stack((angles.cos(), angles.sin())) * gain).to(dtype)


def turned(x: Tensor, rotation: Tensor | None) -> Tensor:
    """Queries or keys (B, H, T, W), each pair of numbers turned by the angle of its position; as they are without angles."""
    if rotation is None:
        return x
    cos, sin = rotation.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def rope_speeds(config: RopeConfig, width: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Radians a token of each pair (W/2,), and the factor of queries and keys, after scaling."""
    factor, theta = config.factor, config.theta
    if config.scaling == "ntk":
        theta *= factor ** (width / max(1, width - 2))  # the slowest pair is slowed by `factor`, the fastest not at all
    speeds = _frequencies(width, theta, device, dtype)
    if config.scaling == "linear":
        return speeds / factor, 1.0
    if config.scaling in ("none", "ntk") or config.original_tokens is None:
        return speeds, 1.0
    if config.scaling == "smooth":
        turns = config.original_tokens * speeds / (2 * math.pi)  # in the old context
        stay = ((turns - config.slow_turns) / (config.fast_turns - config.slow_turns)).clamp(0, 1)
        return speeds * (stay + (1 - stay) / factor), 1.0

    def pair(turns: float) -> float:
        """The (fractional) pair that turns this often in the old context."""
        return width * math.log(config.original_tokens / (turns * 2 * math.pi)) / (2 * math.log(theta))  # type: ignore[operator]

    first, last = max(0, math.floor(pair(config.fast_turns))), min(width - 1, math.ceil(pair(config.slow_turns)))
    ramp = (torch.arange(width // 2, device=device, dtype=speeds.dtype) - first) / max(last - first, 1e-3)
    slowed = ramp.clamp(0, 1)
    gain = config.attention_factor if config.attention_factor is not None else 0.1 * math.log(factor) + 1
    return speeds * (1 - slowed + slowed / factor), gain


class Alibi(Position):
    """Scores fall with distance, in each head by a slope of its own (Press et al. 2022)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.slopes = alibi_slopes(config.n_head)

    def bias(self, T: int, S: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        slopes = torch.tensor(self.slopes, device=device, dtype=_wide(dtype))
        return -slopes.view(-1, 1, 1) * distances(T, S, device)  # (H, T, S)


def alibi_slopes(n_head: int) -> list[float]:
    """2 ** (-8 i / n) for i = 1 ... n; where n is no power of two, the next power's odd ones fill up (as the authors do)."""
    power = 2 ** math.floor(math.log2(n_head))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    return slopes + [2 ** (-4 * i / power) for i in range(1, 2 * (n_head - power), 2)]


class Relative(Position):
    """A learned number on the score for each head and bucket of distances: one each when near, ever wider when far (T5)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(BUCKETS, config.n_head))

    def bias(self, T: int, S: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        exact = BUCKETS // 2
        back = distances(T, S, device).clamp(min=0)
        far = (back.clamp(min=1) / exact).log() / math.log(BUCKETS_REACH / exact) * (BUCKETS - exact)
        bucket = torch.where(back < exact, back, (exact + far.long()).clamp(max=BUCKETS - 1))  # (T, S)
        return nn.functional.embedding(bucket, self.weight).permute(2, 0, 1)  # (H, T, S)


class PerHead(Position):
    """A learned number on the score for each head and each distance."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.context_tokens, config.n_head))

    def bias(self, T: int, S: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        return nn.functional.embedding(distances(T, S, device).clamp(min=0), self.weight).permute(2, 0, 1)  # (H, T, S)


def distances(T: int, S: int, device: torch.device) -> Tensor:
    """How far back each key lies from each query, (T, S); below 0 for keys to come. The T queries are the last T of the S."""
    query = torch.arange(S - T, S, device=device).view(T, 1)
    return query - torch.arange(S, device=device).view(1, S)


POSITIONS: dict[str, type[Position]] = {
    "learned": Learned,
    "sinusoidal": Sinusoidal,
    "rope": Rope,
    "alibi": Alibi,
    "relative": Relative,
    "per_head": PerHead,
    "none": Position,
}


def _frequencies(width: int, theta: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """theta ** (-2i / width) for i = 0 ... width/2 - 1."""
    return theta ** -(torch.arange(0, width, 2, device=device, dtype=_wide(dtype)) / width)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Angles and slopes lose too much below float32."""
    return torch.promote_types(dtype, torch.float32)
