"""The shape of a network: `ModelConfig`, and the published sizes as named presets. No torch in here."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from glassgpt.config.errors import UserError, check_at_least, check_choices, nearest

Span = Literal["full", "window", "strided"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (Su et al. 2021): how fast each pair of numbers of a query or key turns, and how longer contexts turn."""

    theta: float = 10000.0
    """Base: pair i of a head of W numbers turns by theta ** (-2i / W) radians a token."""
    scaling: Literal["none", "linear", "ntk", "yarn", "smooth"] = "none"
    """How the turns are slowed for a context that is `factor` times as long as the one trained on: linear (Chen et al. 2023), ntk
    (a larger base: bloc97 2023), yarn (Peng et al. 2023), smooth (slow turns only, with a smooth border)."""
    factor: float = 1.0
    """The new context over the old one."""
    original_tokens: int | None = None
    """The context trained on; needed by yarn and smooth."""
    fast_turns: float = 32.0
    """yarn and smooth: pairs that turn at least this often in the old context stay as they are (published: 32; smooth: 4)."""
    slow_turns: float = 1.0
    """yarn and smooth: pairs that turn at most this often are slowed by the whole factor."""
    attention_factor: float | None = None
    """yarn: queries and keys are multiplied by this (0.1 ln factor + 1 when not given)."""

    def __post_init__(self) -> None:
        for name in ("theta", "factor", "fast_turns", "slow_turns"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise UserError(f"rope.{name} must be positive; got {getattr(self, name)}")
        if self.theta <= 1:
            raise UserError(f"rope.theta must be above 1, so that later pairs turn more slowly; got {self.theta}")
        check_choices(self, "rope.")
        if self.attention_factor is not None and not (self.attention_factor > 0 and self.scaling == "yarn"):
            raise UserError(f"rope.attention_factor {self.attention_factor} must be positive, and is for rope.scaling yarn alone")
        if self.factor < 1:
            raise UserError(f"rope.factor must be at least 1; got {self.factor}")
        if self.fast_turns <= self.slow_turns:
            raise UserError(f"rope.fast_turns {self.fast_turns} must be above rope.slow_turns {self.slow_turns}")
        if self.scaling in ("yarn", "smooth") and self.original_tokens is None:
            raise UserError(f"rope.scaling {self.scaling} needs rope.original_tokens, the context that was trained on")
        if self.factor != 1 and self.scaling == "none":
            raise UserError(f"rope.factor is {self.factor} and rope.scaling none; choose linear, ntk, yarn or smooth")
        check_at_least(1, self, "original_tokens", prefix="rope.")


@dataclass(frozen=True)
class MoeConfig:
    """A mixture of experts in the place of every MLP (Shazeer et al. 2017): a router sends each token to a few of them."""

    experts: int = 0
    """Experts to choose from; 0 for one dense MLP."""
    top_k: int = 2
    """Experts that each token goes to."""
    shared: int = 0
    """Experts that every token goes to, beside the chosen ones (Dai et al. 2024)."""
    expert_width: int | None = None
    """Hidden width of one expert; when not given, so that the active experts together are as wide as the dense MLP."""
    normalise: bool = True
    """Whether the weights of the chosen experts are scaled to add up to 1."""
    balance_loss: float = 0.01
    """Weight of the load-balance loss in training (Fedus et al. 2021, eq. 4)."""
    z_loss: float = 0.001
    """Weight of the router's z-loss in training (Zoph et al. 2022, eq. 5)."""

    def __post_init__(self) -> None:
        check_at_least(0, self, "experts", "shared", "balance_loss", "z_loss", prefix="moe.")
        check_at_least(1, self, "top_k", "expert_width", prefix="moe.")
        if self.experts and self.top_k > self.experts:
            raise UserError(f"moe.top_k {self.top_k} is more than moe.experts {self.experts}; lower top_k or add experts")
        for name in ("shared", "expert_width"):
            if getattr(self, name) and not self.experts:
                raise UserError(f"moe.{name} is {getattr(self, name)} and moe.experts 0; give experts too")


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
    """Attention heads in a block; must divide the width."""
    width: int = 768
    """Size D of the residual stream."""
    mlp_width: int | None = None
    """Hidden size of the MLP; when not given 4 * width, and for swiglu, which has a third matrix, 8/3 * width."""
    dropout: float = 0.0
    """Share of activations set to zero in training (embeddings, attention, both residual branches)."""
    norm_eps: float = 1e-5
    """Added to the variance inside every norm."""
    tied_head: bool = True
    """Whether the output head is the token embedding matrix itself."""
    position: Literal["learned", "sinusoidal", "rope", "alibi", "relative", "per_head", "none"] = "learned"
    """learned or sinusoidal vectors added to the embeddings; rope: queries and keys turn; alibi: a falling slope on the scores;
    relative: a learned number on them for each bucket of distances (T5); per_head: one for each distance."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    n_kv_head: int | None = None
    """Heads of keys and values, each shared by n_head / n_kv_head query heads: n_head when not given (MHA), 1 is MQA, between is
    GQA."""
    attention_width: int | None = None
    """Size of all query heads together; `width` when not given."""
    attention_scale: float | None = None
    """Factor of the scores; 1 / square root of the head width when not given."""
    qk_norm: bool = False
    """Norm every query and key, head by head, before they meet."""
    spans: tuple[Span, ...] = ("full",)
    """How far back each layer sees; the pattern repeats: `full window` alternates as GPT-3 does. window: the last window_tokens;
    strided: those, and before them every window_tokens-th (Child et al. 2019)."""
    window_tokens: int | None = None
    """Tokens of a window, the current one included."""
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm or RMSNorm."""
    embedding_norm: bool = False
    """Norm the embeddings too."""
    mlp: Literal["gelu", "swiglu", "relu2"] = "gelu"
    """Activation: tanh-GELU, SwiGLU (Shazeer 2020) or squared ReLU (So et al. 2021)."""
    moe: MoeConfig = field(default_factory=MoeConfig)
    bias: bool = True
    """Whether linear maps and LayerNorms have biases."""
    qkv_bias: bool | None = None
    """The same for queries, keys and values; as `bias` when not given."""
    logit_cap: float | None = None
    """Soft limit c of the logits: c * tanh(logits / c)."""

    def __post_init__(self) -> None:
        names = ("vocab_size", "context_tokens", "n_layer", "n_head", "width", "mlp_width", "n_kv_head", "attention_width")
        check_at_least(1, self, *names, "window_tokens")
        name, total = ("width", self.width) if self.attention_width is None else ("attention_width", self.attention_width)
        if total % self.n_head:
            raise UserError(
                f"n_head must divide {name}: {name} {total} / n_head {self.n_head} leaves {total % self.n_head}"
                f" (use {name} {total // self.n_head * self.n_head or self.n_head} or another n_head)"
            )
        if self.n_head % self.kv_heads:
            divisors = [n for n in range(1, self.n_head + 1) if self.n_head % n == 0]
            raise UserError(
                f"n_kv_head must divide n_head: n_head {self.n_head} / n_kv_head {self.kv_heads} leaves"
                f" {self.n_head % self.kv_heads} (use {', '.join(map(str, divisors))})"
            )
        if self.position == "rope" and self.head_width % 2:
            raise UserError(
                f"rope turns pairs of numbers, so a head's width must be even: width {total} / n_head {self.n_head} ="
                f" {self.head_width} (change one of the two)"
            )
        if self.position == "sinusoidal" and self.width % 2:
            raise UserError(f"sinusoidal positions are pairs of sine and cosine, so width must be even; got {self.width}")
        if not self.spans:
            raise UserError("spans is empty; give full, window or strided")
        check_choices(self)
        if self.window_tokens is None and set(self.spans) != {"full"}:
            raise UserError(f"spans {' '.join(self.spans)} needs window_tokens, the size of the window")
        if self.window_tokens is not None and set(self.spans) == {"full"}:
            raise UserError(f"window_tokens is {self.window_tokens} and spans is full; give spans window too, or leave it out")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be in [0, 1); got {self.dropout}")
        if not self.norm_eps > 0:
            raise UserError(f"norm_eps must be positive; got {self.norm_eps}")
        for name in ("attention_scale", "logit_cap"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise UserError(f"{name} must be positive; got {getattr(self, name)}")

    @property
    def head_width(self) -> int:
        return (self.attention_width or self.width) // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def has_qkv_bias(self) -> bool:
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def hidden_width(self) -> int:
        """Of the dense MLP."""
        if self.mlp_width is None and self.mlp == "swiglu":
            return 8 * max(1, round(self.width / 3))  # as many parameters as 4 * width has without a gate
        return self.mlp_width or 4 * self.width

    @property
    def expert_width(self) -> int:
        """Of one expert of a mixture."""
        return self.moe.expert_width or max(1, self.hidden_width // (self.moe.top_k + self.moe.shared))

    def span(self, layer: int) -> Span:
        """How far back a layer sees."""
        return self.spans[layer % len(self.spans)]


def _gpt2(n_layer: int, n_head: int, width: int) -> ModelConfig:
    return ModelConfig(n_layer=n_layer, n_head=n_head, width=width, dropout=0.1)


def _gpt3(n_layer: int, n_head: int, width: int) -> ModelConfig:
    # GPT-3 alternates dense and banded sparse attention; that changes no parameter, so these dense ones count the same.
    return ModelConfig(n_layer=n_layer, n_head=n_head, width=width, context_tokens=2048)


def _gpt_neo(n_layer: int, n_head: int, width: int) -> ModelConfig:
    return ModelConfig(
        *(50257, 2048, n_layer, n_head, width),
        qkv_bias=False,
        attention_scale=1.0,
        spans=("full", "window"),
        window_tokens=256,
    )


def _bloom(n_layer: int, n_head: int, width: int) -> ModelConfig:
    return ModelConfig(250880, 2048, n_layer, n_head, width, position="alibi", embedding_norm=True)


def _modern(n_layer: int, n_head: int, width: int, n_kv_head: int, **changes: Any) -> ModelConfig:
    """A GPT-2 size with what came after it: no position table, shared keys and values, gates, simpler norms, no biases."""
    return ModelConfig(
        n_layer=n_layer,
        n_head=n_head,
        width=width,
        n_kv_head=n_kv_head,
        position="rope",
        norm="rms",
        mlp="swiglu",
        qk_norm=True,
        bias=False,
        **changes,
    )


def _published(
    vocab_size: int,
    context_tokens: int,
    n_layer: int,
    n_head: int,
    n_kv_head: int,
    width: int,
    mlp_width: int,
    theta: float,
    **changes: Any,
) -> ModelConfig:
    """What the open models of 2023 to 2025 have in common."""
    return ModelConfig(
        *(vocab_size, context_tokens, n_layer, n_head, width, mlp_width),
        **{"norm_eps": 1e-5, "tied_head": False, "rope": RopeConfig(theta), **changes},
        n_kv_head=n_kv_head,
        position="rope",
        norm="rms",
        mlp="swiglu",
        bias=False,
    )


_SIZES = {"": (12, 12, 768, 4), "-medium": (24, 16, 1024, 4), "-large": (36, 20, 1280, 5), "-xl": (48, 25, 1600, 5)}
_LONGER = RopeConfig(5e5, "smooth", 8.0, 8192, fast_turns=4.0)

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
    # GPT-2's sizes with everything that came later (`modern`), with a mixture of 8 experts of which 2 are active, as wide
    # together as the dense MLP (`moe`), and GPT-2 with every second layer seeing 256 tokens, as GPT-3 has it (`sparse`).
    **{f"modern{size}": _modern(*shape) for size, shape in _SIZES.items()},
    **{f"moe{size}": _modern(*shape, moe=MoeConfig(experts=8)) for size, shape in _SIZES.items()},
    **{
        f"sparse{size}": dataclasses.replace(_gpt2(*shape[:3]), spans=("full", "window"), window_tokens=256)
        for size, shape in _SIZES.items()
    },
    # Shapes of published open models, from their config.json.
    "llama-2-7b": _published(32000, 4096, 32, 32, 32, 4096, 11008, 1e4),
    "llama-3-8b": _published(128256, 8192, 32, 32, 8, 4096, 14336, 5e5),
    "llama-3-70b": _published(128256, 8192, 80, 64, 8, 8192, 28672, 5e5),
    "llama-3.1-8b": _published(128256, 131072, 32, 32, 8, 4096, 14336, 5e5, rope=_LONGER),
    "mistral-7b": _published(32000, 32768, 32, 32, 8, 4096, 14336, 1e4, spans=("window",), window_tokens=4096),
    "mixtral-8x7b": _published(32000, 32768, 32, 32, 8, 4096, 14336, 1e6, moe=MoeConfig(8, 2, expert_width=14336)),
    "qwen2.5-0.5b": _published(151936, 32768, 24, 14, 2, 896, 4864, 1e6, norm_eps=1e-6, tied_head=True, qkv_bias=True),
    "qwen2.5-7b": _published(152064, 131072, 28, 28, 4, 3584, 18944, 1e6, norm_eps=1e-6, qkv_bias=True),
    "qwen3-0.6b": _published(
        151936, 40960, 28, 16, 8, 1024, 3072, 1e6, norm_eps=1e-6, tied_head=True, qk_norm=True, attention_width=2048
    ),
    "qwen3-8b": _published(151936, 40960, 36, 32, 8, 4096, 12288, 1e6, norm_eps=1e-6, qk_norm=True),
    "qwen3-30b-a3b": _published(
        *(151936, 40960, 48, 32, 4, 2048, 6144, 1e6),
        norm_eps=1e-6,
        qk_norm=True,
        attention_width=4096,
        moe=MoeConfig(128, 8, expert_width=768),
    ),
    "gpt-neo-125m": _gpt_neo(12, 12, 768),
    "gpt-neo-1.3b": _gpt_neo(24, 16, 2048),
    "gpt-neo-2.7b": _gpt_neo(32, 20, 2560),
    "bloom-560m": _bloom(24, 16, 1024),
    "bloom-176b": _bloom(70, 112, 14336),
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
