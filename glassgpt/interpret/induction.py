"""A transformer whose every number is known: two layers of one head that copy what came after the last time.

"cat dog sun cat" goes on with "dog". Layer 0 looks one token back and writes what it finds beside each token; layer 1 looks for
places beside which its own token is written, and copies the token there (Elhage et al. 2021, Olsson et al. 2022: an induction
head by K-composition). It has GPT-2's shape, with LayerNorm and MLPs of zeros, so whatever looks into models can be tried on it.
"""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from glassgpt.config import ModelConfig
from glassgpt.model import GPT, weights
from glassgpt.text import Tokenizer

BEGIN, UNKNOWN = "<s>", "?"
WORDS = (
    "cat", "dog", "bird", "fish", "tree", "river", "stone", "moon", "sun", "star", "red",
    "green", "blue", "one", "two", "three", "house", "door", "bread", "milk", "road", "king",
)  # fmt: skip
VOCABULARY = [BEGIN, *(f"Ġ{word}" for word in (*WORDS, UNKNOWN))]
"""Tokens by id, in byte characters (Ġ is a space)."""
CONTEXT_TOKENS = 64
SHARPNESS = 40.0
"""Product of a query's and a key's numbers that match. After LayerNorm and the scale 1/√D the key that matches is more than 50
nats ahead of the others: its attention is 1 in float64."""
HEAD_SCALE = 4.0
"""Of the output matrix: what came after the last time gets probability 0.99. With 1 it would be 0.23."""


def induction_model() -> GPT:
    """The network, in float64.

    The residual stream has four slots, each one-hot: the token (V numbers), the previous token (V), the output (V) and the
    position (one for each of the context). LayerNorm does no harm, because every residual has the same mean and norm.
    """
    V, T = len(VOCABULARY), CONTEXT_TOKENS
    token, previous, output, position, D = 0, V, 2 * V, 3 * V, 3 * V + T  # where each slot starts; the width
    query, key, value = 0, D, 2 * D  # where the rows of each start in the fused matrix
    config = ModelConfig(V, context_tokens=T, n_layer=2, n_head=1, width=D, mlp_width=1, tied_head=False)
    model = GPT(config).double().eval()
    parameters, sharp = dict(model.named_parameters()), SHARPNESS**0.5

    def write(name: str, row: int, column: int, count: int, number: float = 1.0) -> None:
        """`number` on `count` places of a diagonal: so many numbers from `column` on are copied to `row` and on."""
        parameters[f"{name}.weight"][row : row + count, column : column + count].diagonal().fill_(number)

    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.fill_(float("norm" in name and name.endswith("weight")))  # gains are one, all else zero
        write("token_embedding", 0, token, V)
        write("position_embedding", 0, position, T)
        write("blocks.0.attn.qkv", query, position, T, sharp)  # my position
        write("blocks.0.attn.qkv", key + 1, position, T - 1, sharp)  # meets the position before, one added
        write("blocks.0.attn.qkv", value, token, V)
        write("blocks.0.attn.out", previous, 0, V)
        write("blocks.1.attn.qkv", query, token, V, sharp)  # my token
        write("blocks.1.attn.qkv", key, previous, V, sharp)  # meets places that come after it
        write("blocks.1.attn.qkv", value, token, V)
        write("blocks.1.attn.out", output, 0, V)
        write("head", 0, output, V, HEAD_SCALE)
    return model


def induction_tokenizer() -> Tokenizer:
    """A token for each of the WORDS; every other word or sign is UNKNOWN. Case and the kind of white space do not matter.

    A text begins with BEGIN: the first token has none before it, and would take itself for its own predecessor.
    """
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token=VOCABULARY[-1]))
    spaces = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase(), *spaces])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)])
    backend.add_special_tokens([BEGIN])
    return Tokenizer(backend)


def save_induction(folder: Path) -> None:
    """Write the bundled model into an existing folder, in float32: `glassgpt/assets/induction` as it is."""
    weights.save(induction_model(), folder, torch.float32)
    induction_tokenizer().save(folder)
