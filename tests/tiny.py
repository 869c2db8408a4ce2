"""Tiny GPTs that the generation tests run: one random, one that writes a given text; and a command, run in this process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest
import torch

from glassgpt.cli import main
from glassgpt.config import ModelConfig
from glassgpt.model import GPT
from glassgpt.text import Tokenizer

VIETNAMESE = "Chào buổi sáng, thế giới! Một chú mèo 🐈 ngủ dưới ánh nắng ☀️, còn cả nhà 👩‍👩‍👧 thì uống trà 🍵."


@cache
def few_merges() -> Tokenizer:
    """A byte-level BPE with 23 merges: most Vietnamese letters and every emoji are spread over several tokens."""
    return Tokenizer.train([VIETNAMESE, "the cat sat on the mat, the other cat sat there too. "] * 4, 280)


@torch.no_grad()
def disturbed(config: ModelConfig) -> GPT:
    """A random model in float64 with noise on every parameter, so that no bias is zero and no norm is one."""
    torch.manual_seed(0)
    model = GPT(config).double().eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


@torch.no_grad()
def scripted(tokenizer: Tokenizer, script: list[int], prompt_length: int = 1, context_tokens: int = 128) -> GPT:
    """A GPT that, after a prompt of `prompt_length` tokens, takes the ids of `script` for the likeliest by far.

    Every position is its own direction of the residual stream, blocks add nothing, and row `id` of the head points at
    the positions after which that id is written.
    """
    config = ModelConfig(tokenizer.vocab_size, context_tokens, 1, 1, context_tokens, tied_head=False)
    model = GPT(config).double().eval()
    for parameter in model.parameters():
        parameter.zero_()
    model.position_embedding.weight.copy_(torch.eye(context_tokens))
    model.norm_f.weight.fill_(10.0)
    for place, token_id in enumerate(script, start=prompt_length - 1):
        model.head.weight[token_id, place] = 1.0
    return model


def random_ids(config: ModelConfig, *shape: int, seed: int = 2) -> torch.Tensor:
    """Token ids of the given shape."""
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


class Result(NamedTuple):
    """What a command has left: its exit code and what it printed."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


def caller(verb: str, capsys: pytest.CaptureFixture[str]) -> Run:
    """`glassgpt VERB ...` in this process."""

    def call(*arguments: object) -> Result:
        code = main([verb, *map(str, arguments)])
        return Result(code, *capsys.readouterr())

    return call
