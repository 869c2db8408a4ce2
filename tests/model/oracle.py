"""Hugging Face's GPT-2 as the oracle: random, with noise on every parameter, in any precision."""

from __future__ import annotations

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from glassgpt.config import ModelConfig
from glassgpt.model import GPT, weights
from glassgpt.model.families import FAMILIES

SMALL = ModelConfig(vocab_size=101, context_tokens=24, n_layer=3, n_head=4, width=32)


def hugging_face(config: ModelConfig, dtype: torch.dtype = torch.float64, noise: float = 0.3) -> GPT2LMHeadModel:
    """Fresh GPT-2s have zero biases and unit norms, in which mistakes do not show: every parameter gets noise."""
    values = weights.config_to_hf(config, end_id=0, dtype=dtype) | {
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**values)).to(dtype).eval()
    add_noise(model, noise)
    return model


@torch.no_grad()
def add_noise(model: nn.Module, size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter += size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


@torch.no_grad()
def converted(oracle: GPT2LMHeadModel, config: ModelConfig) -> GPT:
    """Our model with the oracle's weights."""
    stored = weights._hf_names(FAMILIES["gpt2"], config)
    theirs = {name.removeprefix("transformer."): parameter for name, parameter in oracle.named_parameters()}
    model = GPT(config).to(next(oracle.parameters()).dtype).eval()
    for name, parameter in model.named_parameters():
        tensor = theirs[stored[name].names[0]]
        parameter.copy_(tensor.t() if stored[name].transposed else tensor)
    return model


def random_ids(config: ModelConfig, batch: int = 3, length: int | None = None) -> torch.Tensor:
    """Token ids (B, T)."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(config.vocab_size, (batch, length or config.context_tokens), generator=generator)
