"""Speed of several models, measured in turn so that a moment of other load meets all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from glassgpt.config.generate import Sampling
from glassgpt.data.progress import steps
from glassgpt.generation import stream
from glassgpt.generation.generator import Generator
from glassgpt.model import GPT

PROMPT_TOKENS, NEW_TOKENS = 16, 48


@dataclass(frozen=True)
class Speed:
    """Medians, in tokens a second, of the plain PyTorch model."""

    generate: float
    """Written after a short prompt, one text at a time."""
    forward: float
    """Read in one forward pass over the whole context."""


@torch.inference_mode()
def speeds(models: Sequence[GPT], repeats: int, seed: int = 0) -> list[Speed]:
    """The speed of each model over `repeats` turns, after one turn that does not count. They have one vocabulary and context."""
    context = models[0].config.context_tokens
    prompt_tokens = min(PROMPT_TOKENS, context // 2)
    new_tokens = min(NEW_TOKENS, context - prompt_tokens)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(models[0].config.vocab_size, (1, context), generator=generator).to(next(models[0].parameters()).device)
    prompt = ids[0, :prompt_tokens].tolist()

    def generate(model: GPT) -> object:
        return list(stream(model, [prompt], Sampling(temperature=0), [Generator(seed)], new_tokens))

    taken: list[tuple[list[float], list[float]]] = [([], []) for _ in models]
    with steps("speed") as progress:
        for turn in range(repeats + 1):
            for model, (writing, reading) in zip(models, taken, strict=True):
                writing.append(_seconds(lambda model=model: generate(model)))  # type: ignore[misc]
                reading.append(_seconds(lambda model=model: model(ids)[0, -1, 0].item()))  # type: ignore[misc]
            progress(turn, repeats)
    return [Speed(new_tokens / median(writing[1:]), context / median(reading[1:])) for writing, reading in taken]


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
