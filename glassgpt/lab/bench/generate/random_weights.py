"""The model that every system runs: random, and written as converters want to read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from glassgpt.config import ModelConfig
from glassgpt.model import GPT, weights
from glassgpt.text import END_OF_TEXT, Tokenizer

NOISE = 0.05
"""Added to every random weight (normal, this wide), so that no bias is zero and greedy texts do not repeat one token."""


@torch.no_grad()
def write_weights(shape: ModelConfig, seed: int, folder: Path) -> None:
    """A random model as a Hugging Face folder, with a tokenizer, as converters ask for one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT(shape).eval()
        for parameter in model.parameters():
            parameter.add_(NOISE * torch.randn_like(parameter))
    tokenizer = some_tokenizer(shape.vocab_size)
    weights.save_hf(model, folder, tokenizer.end_id)
    tokenizer.save(folder)
    facts: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    facts |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    (folder / "tokenizer_config.json").write_text(json.dumps(facts) + "\n")


def some_tokenizer(vocab_size: int) -> Tokenizer:
    """Tokens "#", "0", "#0", "#1", ..., the first two of which merge, and the end of text: each stands for whole characters."""
    pieces = ["#", "0", *(f"#{number}" for number in range(vocab_size - 3))]
    backend = tokenizers.Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [("#", "0")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend)
