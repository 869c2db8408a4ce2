"""The shape of a network: `ModelConfig`, and the published sizes as named presets. No torch in here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from glassgpt.config.errors import UserError, check_at_least, nearest


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the network's parameters and maths.

    Raises UserError at construction when two fields contradict each other.
    """

    vocab_size: int = 50257
    """Number of token ids."""
    context_tokens: int = 1024
    """Longest sequence that the network can see."""
    n_layer: int = 12
    """Number of blocks."""
    n_head: int = 12
    """Attention heads in a block; must divide `width`."""
    width: int = 768
    """Size D of the residual stream."""
    mlp_width: int | None = None
    """Hidden size of the MLP; 4 * width when not given."""
    dropout: float = 0.0
    """Share of activations set to zero in training (embeddings, attention, both residual branches)."""
    norm_eps: float = 1e-5
    """Added to the variance inside every norm."""
    tied_head: bool = True
    """Whether the output head is the token embedding matrix itself."""

    def __post_init__(self) -> None:
        check_at_least(1, self, "vocab_size", "context_tokens", "n_layer", "n_head", "width")
        if self.width % self.n_head:
            raise UserError(
                f"n_head must divide width: width {self.width} / n_head {self.n_head} leaves {self.width % self.n_head}"
                f" (use width {self.width // self.n_head * self.n_head or self.n_head} or another n_head)"
            )
        check_at_least(1, self, "mlp_width")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be in [0, 1); got {self.dropout}")
        if not self.norm_eps > 0:
            raise UserError(f"norm_eps must be positive; got {self.norm_eps}")

    @property
    def head_width(self) -> int:
        return self.width // self.n_head

    @property
    def hidden_width(self) -> int:
        return self.mlp_width or 4 * self.width


def _gpt2(n_layer: int, n_head: int, width: int) -> ModelConfig:
    return ModelConfig(n_layer=n_layer, n_head=n_head, width=width, dropout=0.1)


def _gpt3(n_layer: int, n_head: int, width: int) -> ModelConfig:
    # GPT-3 alternates dense and banded sparse attention; that changes no parameter, so these dense ones count the same.
    return ModelConfig(n_layer=n_layer, n_head=n_head, width=width, context_tokens=2048)


PRESETS: dict[str, ModelConfig] = {
    # Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". Texts often call gpt2-large
    # "1.5 B"; it has 774 M parameters, and gpt2-xl is the 1.5 B one.
    "gpt2": _gpt2(12, 12, 768),
    "gpt2-medium": _gpt2(24, 16, 1024),
    "gpt2-large": _gpt2(36, 20, 1280),
    "gpt2-xl": _gpt2(48, 25, 1600),
    "distilgpt2": _gpt2(6, 12, 768),
    # Brown et al. 2020, "Language Models are Few-Shot Learners", table 2.1. Two rows of the table contradict
    # themselves (heads x head width != width): XL prints 24 heads of 128 at width 2048 (16 fit), 13B prints
    # width 5140 with 40 heads of 128 (5120 fits). The consistent number is used here.
    "gpt3-125m": _gpt3(12, 12, 768),
    "gpt3-350m": _gpt3(24, 16, 1024),
    "gpt3-760m": _gpt3(24, 16, 1536),
    "gpt3-1.3b": _gpt3(24, 16, 2048),
    "gpt3-2.7b": _gpt3(32, 32, 2560),
    "gpt3-6.7b": _gpt3(32, 32, 4096),
    "gpt3-13b": _gpt3(40, 40, 5120),
    "gpt3-175b": _gpt3(96, 96, 12288),
    # Small ones: `storyteller` is the bundled model's shape, `nano` trains in a minute on two cores, `tiny` is for tests.
    "storyteller": ModelConfig(vocab_size=8192, context_tokens=512, n_layer=6, n_head=5, width=320),
    "nano": ModelConfig(vocab_size=2048, context_tokens=128, n_layer=4, n_head=4, width=128),
    "tiny": ModelConfig(vocab_size=256, context_tokens=32, n_layer=2, n_head=2, width=16),
}

PRESET_NOTES: dict[str, str] = {
    "gpt2-large": 'often called "1.5 B" in texts; it has 774 M parameters (gpt2-xl is the 1.5 B one)',
    "gpt3-1.3b": "the paper's table prints 24 heads of 128 at width 2048, which do not fit; 16 heads do",
    "gpt3-13b": "the paper's table prints width 5140 for 40 heads of 128; 5120 fits",
}


def preset(name: str, **changes: object) -> ModelConfig:
    """The preset called `name`, with fields replaced. Raises UserError for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}{nearest(name, PRESETS)}; presets: {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)  # type: ignore[arg-type]
