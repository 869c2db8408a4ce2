"""What is timed: writing to some prompts at once, or reading one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from glassgpt.config import ModelConfig, UserError
from glassgpt.config.bench import BenchGenerate

WARM_TOKENS = 4
"""Written before each timed turn."""


@dataclass(frozen=True)
class Phase:
    """One column of the table."""

    kind: str
    """`decode`: the steps from the first to the last new token; `prefill`: the time to the first."""
    rows: int
    prompt_tokens: int
    new_tokens: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.rows if self.kind == 'decode' else self.prompt_tokens}"

    @property
    def tokens(self) -> int:
        """Written, or read, in the time that counts."""
        return self.rows * (self.new_tokens - 1 if self.kind == "decode" else self.prompt_tokens)

    @property
    def timed_steps(self) -> int:
        return self.new_tokens - 1 if self.kind == "decode" else 1

    @property
    def warm_tokens(self) -> int:
        return min(WARM_TOKENS, self.new_tokens)

    def seconds(self, stamps: list[float]) -> float:
        """The time that counts, of the ends of all steps."""
        return stamps[-1] - stamps[0] if self.kind == "decode" else stamps[0]

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        """Random ids, the same for every system."""
        generator = torch.Generator().manual_seed(seed)
        ids: list[list[int]] = torch.randint(vocab_size, (self.rows, self.prompt_tokens), generator=generator).tolist()
        return ids


def phases_of(config: BenchGenerate, shape: ModelConfig) -> list[Phase]:
    """The phases that are named, in order. Raises UserError for one that does not fit the context."""
    found = []
    for name in dict.fromkeys(config.phases):
        kind, _, number = name.partition("-")
        if kind == "decode":
            found.append(Phase(kind, int(number), config.prompt_tokens, config.new_tokens))
        else:
            found.append(Phase(kind, 1, int(number), 1))
        needed = found[-1].prompt_tokens + found[-1].new_tokens
        if needed > shape.context_tokens:
            raise UserError(
                f"{name} needs {needed} tokens and the context of {config.preset} is {shape.context_tokens};"
                " take other phases, or fewer prompt_tokens and new_tokens"
            )
    return found
