"""Published architectures, a table each: what their `config.json` and their tensors call what we have.

To add one, write its table: `fields` where only names differ, `ours` for what is always so in it, `needs` for settings that must
have one value, `tensors` for names. The functions above the table are for what several of them say in a form of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from glassgpt.config import ModelConfig, UserError, nearest
from glassgpt.config.files import from_plain
from glassgpt.config.folder import HF_CONFIG_FILE, read_json
from glassgpt.config.model import MoeConfig, RopeConfig, Span

REQUIRED = object()
# Settings of no family here that change the maths, with the values at which they do not.
ELSEWHERE: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (None, 1.0),
    "quantization_config": (None,),
    **dict.fromkeys(("clip_qkv", "attn_logit_softcapping", "final_logit_softcapping"), (None,)),
    **dict.fromkeys(("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"), (None,)),
}
FULL: Span = "full"
LAYER_TYPES: dict[str, Span] = {"full_attention": "full", "sliding_attention": "window"}
ATTENTION_TYPES: dict[str, Span] = {"global": "full", "local": "window"}
Values = dict[str, Any]


class Theirs(NamedTuple):
    """A setting of theirs."""

    name: str
    default: Any = REQUIRED
    """What a file that lacks it means."""
    older: str | None = None
    """A name that earlier files have."""


class Stored(NamedTuple):
    """Where one of our parameters is found in a file."""

    names: tuple[str, ...]
    """One tensor, or several whose rows follow one another in ours."""
    transposed: bool = False
    by_head: bool = False
    """Rows lie head by head, q k v of each, where ours have all q, then all k, then all v."""

    def rows(self, config: ModelConfig, rows: int) -> list[int]:
        """Rows of ours that each of the tensors named holds: all in one, or those of q, of k and of v."""
        if len(self.names) == 1:
            return [rows]
        return [heads * config.head_width for heads in (config.n_head, config.kv_heads, config.kv_heads)]


@dataclass(frozen=True)
class Family:
    """How one architecture is written down."""

    model_type: str
    architecture: str
    """The class that `transformers` has for it."""
    fields: dict[str, Theirs]
    """Our field, nested ones with a dot -> theirs."""
    tensors: dict[str, str | tuple[str, ...]]
    """Our module, `{layer}` and `{expert}` for numbers -> theirs, without prefix."""
    prefix: str
    """Of every tensor but the head's."""
    ours: dict[str, Any] = field(default_factory=dict)
    """Our fields that have one value in it."""
    needs: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Their settings that change the maths, with the values that we have; the first is written."""
    special: tuple[tuple[Callable[[Values], Values], Callable[[ModelConfig], Values]], ...] = ()
    """Pairs of functions for settings of another form: theirs to our fields, and back."""
    transposed: bool = False
    """Matrices are (in, out), as GPT-2's Conv1D keeps them."""
    by_head: bool = False
    ignored: tuple[str, ...] = ()
    """Ends of the names of tensors that hold no parameter."""

    def read(self, values: Values) -> ModelConfig:
        """Their settings as our configuration. Raises UserError with the field that cannot be represented."""
        for name, allowed in (ELSEWHERE | self.needs).items():
            if name in values and values[name] not in allowed:
                raise UserError(f"{name} = {values[name]!r} cannot be represented; expected {' or '.join(map(repr, allowed))}")
        flat = dict(self.ours)
        for ours, theirs in self.fields.items():
            value = values.get(theirs.name, values.get(theirs.older or theirs.name, theirs.default))
            if value is REQUIRED:
                raise UserError(f"the field {theirs.name!r} is missing")
            flat[ours] = value
        for read, _ in self.special:
            flat |= read(values)
        return from_plain(ModelConfig, _nested(flat))  # checks the types

    def write(self, config: ModelConfig) -> Values:
        """Our configuration as their settings; what they have no word for is lost (`family_of` looks)."""
        given, config = config, dataclasses.replace(complete(config), dropout=config.dropout)
        values = {name: allowed[0] for name, allowed in self.needs.items()}
        for ours, theirs in self.fields.items():
            outer, _, inner = ours.partition(".")
            says_nothing = theirs.default is None and getattr(given, outer) is None
            value = None if says_nothing else getattr(config, outer)
            values[theirs.name] = getattr(value, inner) if inner else value
        for _, write in self.special:
            values |= write(config)
        return values

    def stored(self, config: ModelConfig, name: str) -> Stored:
        """Where the parameter of ours called `name` is."""
        module, _, kind = name.rpartition(".")
        parts = module.split(".")
        layer = parts[1] if parts[0] == "blocks" else ""
        expert = parts[parts.index("experts") + 1] if "experts" in parts else ""
        if layer:
            parts[1] = "{layer}"
        if expert:
            parts[parts.index("experts") + 1] = "{expert}"
        pattern = ".".join(parts)
        if pattern not in self.tensors:
            raise UserError(f"{self.architecture} has no place for {name}")
        names = self.tensors[pattern]
        names = (names,) if isinstance(names, str) else names
        full = tuple(f"{theirs.format(layer=layer, expert=expert)}.{kind}" for theirs in names)
        is_matrix = kind == "weight" and parts[-1] in ("qkv", "out", "up", "down", "gate")
        return Stored(full, transposed=self.transposed and is_matrix, by_head=self.by_head and parts[-1] == "qkv")


def complete(config: ModelConfig) -> ModelConfig:
    """The configuration with nothing left to a default, and none of training's fields: equal for equal networks."""
    spans: tuple[Span, ...] = tuple(config.span(layer) for layer in range(config.n_layer))
    if config.window_tokens is not None and config.window_tokens >= config.context_tokens:
        spans = tuple(FULL for _ in spans)
    has_window = set(spans) != {"full"}
    moe = config.moe
    if moe.experts:
        moe = MoeConfig(moe.experts, moe.top_k, moe.shared, config.expert_width, moe.normalise)
    return dataclasses.replace(
        config,
        dropout=0.0,
        mlp_width=config.expert_width if moe.experts else config.hidden_width,
        n_kv_head=config.kv_heads,
        attention_width=config.n_head * config.head_width,
        attention_scale=config.head_width**-0.5 if config.attention_scale is None else config.attention_scale,
        qkv_bias=config.has_qkv_bias,
        rope=config.rope if config.position == "rope" else RopeConfig(),
        spans=shortest(spans),
        window_tokens=config.window_tokens if has_window else None,
        moe=moe if moe.experts else MoeConfig(),
    )


def shortest(spans: tuple[Span, ...]) -> tuple[Span, ...]:
    """The shortest pattern whose repetition is `spans`."""
    n = len(spans)
    return next(spans[:k] for k in range(1, n + 1) if all(spans[i] == spans[i % k] for i in range(n)))


def _nested(flat: Mapping[str, Any]) -> Values:
    values: Values = {}
    for name, value in flat.items():
        outer, _, inner = name.partition(".")
        if inner:
            values.setdefault(outer, {})[inner] = value
        else:
            values[outer] = value
    return values


# ---------------------------------------------------------------------- settings with a form of their own

_ROPE_SCALED = {  # their rope_type -> ours, and their names for its numbers
    "linear": ("linear", {"factor": "factor"}),
    "yarn": (
        "yarn",
        {
            "factor": "factor",
            "original_tokens": "original_max_position_embeddings",
            "fast_turns": "beta_fast",
            "slow_turns": "beta_slow",
            "attention_factor": "attention_factor",
        },
    ),
    "llama3": (
        "smooth",
        {
            "factor": "factor",
            "original_tokens": "original_max_position_embeddings",
            "fast_turns": "high_freq_factor",
            "slow_turns": "low_freq_factor",
        },
    ),
}


def _read_rope(values: Values, theta: float = 10000.0) -> Values:
    """`rope_parameters` of today, or `rope_theta` and `rope_scaling` of earlier files."""
    earlier = {"rope_theta": values.get("rope_theta")} | (values.get("rope_scaling") or {})
    given = {name: value for name, value in (earlier | (values.get("rope_parameters") or {})).items() if value is not None}
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    ours: Values = {"position": "rope", "rope.theta": given.pop("rope_theta", theta)}
    if kind != "default" and kind not in _ROPE_SCALED:
        raise UserError(
            f"rope_type = {kind!r} cannot be represented; expected one of default, {', '.join(_ROPE_SCALED)}"
            f"{nearest(str(kind), _ROPE_SCALED)}"
        )
    scaling, names = _ROPE_SCALED.get(kind, ("none", {}))
    same = {"partial_rotary_factor": 1.0, "truncate": True}  # what these stand for here
    for name, value in given.items():
        if name not in names.values() and same.get(name, value is None) != value:
            raise UserError(f"rope_parameters.{name} = {value!r} cannot be represented")
    ours |= {"rope.scaling": scaling} | {f"rope.{name}": given[theirs] for name, theirs in names.items() if theirs in given}
    if "original_tokens" in names and "rope.original_tokens" not in ours:
        ours["rope.original_tokens"] = values.get("original_max_position_embeddings", values.get("max_position_embeddings"))
    return ours


def _write_rope(config: ModelConfig) -> Values:
    rope = config.rope
    kinds = {ours: (theirs, names) for theirs, (ours, names) in _ROPE_SCALED.items()}
    if rope.scaling not in kinds:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": rope.theta}, "rope_theta": rope.theta}
    kind, names = kinds[rope.scaling]
    numbers = {theirs: getattr(rope, ours) for ours, theirs in names.items() if getattr(rope, ours) is not None}
    scaling = {"rope_type": kind} | numbers
    return {"rope_parameters": scaling | {"rope_theta": rope.theta}, "rope_theta": rope.theta, "rope_scaling": scaling}


def _read_head_width(values: Values, default: int | None = None) -> Values:
    width = values.get("head_dim", default)
    return {} if width is None else {"attention_width": width * values["num_attention_heads"]}


def _write_head_width(config: ModelConfig) -> Values:
    return {"head_dim": config.head_width}


def _read_window(values: Values) -> Values:
    """One window for every layer. A file that says nothing means Mistral's first."""
    window = values.get("sliding_window", 4096 if values.get("model_type") == "mistral" else None)
    return {} if window is None else {"spans": ["window"], "window_tokens": window}


def _write_window(config: ModelConfig) -> Values:
    return {"sliding_window": config.window_tokens}


def _read_layer_types(values: Values) -> Values:
    """A window for some layers: by name, or from a layer on."""
    window = values.get("sliding_window") if values.get("use_sliding_window") else None
    if window is None:
        return {}
    types = values.get("layer_types")
    if types is None:
        last = values.get("max_window_layers", 28)
        types = ["full_attention" if layer < last else "sliding_attention" for layer in range(values["num_hidden_layers"])]
    spans = _spans("layer_types", types, LAYER_TYPES, values["num_hidden_layers"])
    return {"spans": spans, "window_tokens": window if set(spans) != {"full"} else None}


def _write_layer_types(config: ModelConfig) -> Values:
    types = _kinds(config, LAYER_TYPES)
    return {
        "use_sliding_window": config.window_tokens is not None,
        "sliding_window": config.window_tokens,
        "layer_types": types,
        "max_window_layers": types.index("sliding_attention") if "sliding_attention" in types else config.n_layer,
    }


def _read_attention_types(values: Values) -> Values:
    """GPT-Neo's [[["global", "local"], 6]]."""
    kinds = [kind for pattern, times in values.get("attention_types", [[["global", "local"], 12]]) for kind in pattern * times]
    spans = _spans("attention_types", kinds, ATTENTION_TYPES, values["num_layers"])
    return {"spans": spans, "window_tokens": values.get("window_size", 256) if set(spans) != {"full"} else None}


def _kinds(config: ModelConfig, words: dict[str, Span]) -> list[str]:
    """A word for each layer; a span that has none is written as a full one, and `family_of` finds the loss."""
    by_span = {span: word for word, span in words.items()}
    return [by_span.get(config.span(layer), by_span[FULL]) for layer in range(config.n_layer)]


def _spans(name: str, kinds: list[str], words: dict[str, Span], n_layer: int) -> list[Span]:
    """The pattern of a list with a word for each layer."""
    if unknown := [kind for kind in kinds if kind not in words]:
        raise UserError(f"{name} has {unknown[0]!r}, which cannot be represented; expected {' or '.join(words)}")
    if len(kinds) != n_layer:
        raise UserError(f"{name} names {len(kinds)} layers and the network has {n_layer}")
    return list(shortest(tuple(words[kind] for kind in kinds)))


def _write_attention_types(config: ModelConfig) -> Values:
    kinds = _kinds(config, ATTENTION_TYPES)
    return {
        "attention_types": [[kinds, 1]],
        "attention_layers": kinds,
        "window_size": config.window_tokens or config.context_tokens,
    }


def _read_window_if_used(values: Values) -> Values:
    """One window for every layer, where it is switched on."""
    return _read_window(values) if values.get("use_sliding_window") else {}


def _write_window_if_used(config: ModelConfig) -> Values:
    return {"use_sliding_window": config.window_tokens is not None, "sliding_window": config.window_tokens}


def _read_experts_everywhere(values: Values) -> Values:
    if values.get("mlp_only_layers") or values.get("decoder_sparse_step", 1) != 1:
        raise UserError("mlp_only_layers or decoder_sparse_step leave some layers dense, which cannot be represented")
    return {}


# ---------------------------------------------------------------------- the table

GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    {
        "vocab_size": Theirs("vocab_size"),
        "context_tokens": Theirs("n_positions", 1024, older="n_ctx"),
        "n_layer": Theirs("n_layer"),
        "n_head": Theirs("n_head"),
        "width": Theirs("n_embd"),
        "mlp_width": Theirs("n_inner", None),
        "norm_eps": Theirs("layer_norm_epsilon", 1e-5),
        "tied_head": Theirs("tie_word_embeddings", True),
    },
    {
        "token_embedding": "wte",
        "position_embedding": "wpe",
        "norm_f": "ln_f",
        "head": "lm_head",
        "blocks.{layer}.norm_1": "h.{layer}.ln_1",
        "blocks.{layer}.attn.qkv": "h.{layer}.attn.c_attn",
        "blocks.{layer}.attn.out": "h.{layer}.attn.c_proj",
        "blocks.{layer}.norm_2": "h.{layer}.ln_2",
        "blocks.{layer}.mlp.up": "h.{layer}.mlp.c_fc",
        "blocks.{layer}.mlp.down": "h.{layer}.mlp.c_proj",
    },
    prefix="transformer.",
    needs={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    special=(
        (
            lambda values: {"dropout": values.get("resid_pdrop", 0.1)},
            lambda config: dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        ),
    ),
    transposed=True,
    ignored=(".attn.bias", ".attn.masked_bias"),
)

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    {
        "vocab_size": Theirs("vocab_size"),
        "context_tokens": Theirs("max_position_embeddings", 2048),
        "n_layer": Theirs("num_hidden_layers"),
        "n_head": Theirs("num_attention_heads"),
        "n_kv_head": Theirs("num_key_value_heads", None),
        "width": Theirs("hidden_size"),
        "mlp_width": Theirs("intermediate_size"),
        "norm_eps": Theirs("rms_norm_eps", 1e-6),
        "tied_head": Theirs("tie_word_embeddings", False),
    },
    {
        "token_embedding": "embed_tokens",
        "norm_f": "norm",
        "head": "lm_head",
        "blocks.{layer}.norm_1": "layers.{layer}.input_layernorm",
        "blocks.{layer}.attn.qkv": tuple(f"layers.{{layer}}.self_attn.{x}_proj" for x in "qkv"),
        "blocks.{layer}.attn.out": "layers.{layer}.self_attn.o_proj",
        "blocks.{layer}.norm_2": "layers.{layer}.post_attention_layernorm",
        "blocks.{layer}.mlp.gate": "layers.{layer}.mlp.gate_proj",
        "blocks.{layer}.mlp.up": "layers.{layer}.mlp.up_proj",
        "blocks.{layer}.mlp.down": "layers.{layer}.mlp.down_proj",
    },
    prefix="model.",
    ours={"norm": "rms", "mlp": "swiglu", "bias": False},
    needs={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "sliding_window": (None,)},
    special=((_read_rope, _write_rope), (_read_head_width, _write_head_width)),
    ignored=(".rotary_emb.inv_freq",),
)

MISTRAL = dataclasses.replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    fields=LLAMA.fields
    | {"context_tokens": Theirs("max_position_embeddings", 131072), "n_kv_head": Theirs("num_key_value_heads", 8)},
    needs={"hidden_act": ("silu",)},
    special=(*LLAMA.special, (_read_window, _write_window)),
)

QWEN2 = dataclasses.replace(
    LLAMA,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    ours=LLAMA.ours | {"qkv_bias": True},
    needs={"hidden_act": ("silu",)},
    special=((_read_rope, _write_rope), (_read_layer_types, _write_layer_types)),
)

QWEN3 = dataclasses.replace(
    QWEN2,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    tensors=LLAMA.tensors | {f"blocks.{{layer}}.attn.{x}_norm": f"layers.{{layer}}.self_attn.{x}_norm" for x in "qk"},
    ours=LLAMA.ours | {"qk_norm": True},
    needs={"hidden_act": ("silu",), "attention_bias": (False,)},
    special=(
        (_read_rope, _write_rope),
        (lambda values: _read_head_width(values, 128), _write_head_width),
        (_read_layer_types, _write_layer_types),
    ),
)

_EXPERTS = {"moe.top_k": Theirs("num_experts_per_tok", 2), "moe.experts": Theirs("num_local_experts", older="num_experts")}

MIXTRAL = dataclasses.replace(
    MISTRAL,
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    fields=LLAMA.fields | _EXPERTS | {"moe.expert_width": Theirs("intermediate_size"), "norm_eps": Theirs("rms_norm_eps", 1e-5)},
    tensors={ours: theirs for ours, theirs in LLAMA.tensors.items() if ".mlp." not in ours}
    | {"blocks.{layer}.mlp.router": "layers.{layer}.block_sparse_moe.gate"}
    | {
        f"blocks.{{layer}}.mlp.experts.{{expert}}.{ours}": f"layers.{{layer}}.block_sparse_moe.experts.{{expert}}.{theirs}"
        for ours, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3"))
    },
    ours=LLAMA.ours | {"moe.normalise": True},
    special=(
        (lambda values: _read_rope(values, 1e6), _write_rope),
        (_read_head_width, _write_head_width),
        (_read_window, _write_window),
    ),
)

QWEN3_MOE = dataclasses.replace(
    QWEN3,
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    fields={ours: theirs for ours, theirs in LLAMA.fields.items() if ours != "mlp_width"}
    | {
        "moe.experts": Theirs("num_experts", older="num_local_experts"),
        "moe.top_k": Theirs("num_experts_per_tok", 8),
        "moe.expert_width": Theirs("moe_intermediate_size"),
        "moe.normalise": Theirs("norm_topk_prob", False),
    },
    tensors={ours: theirs for ours, theirs in QWEN3.tensors.items() if ".mlp." not in ours}
    | {"blocks.{layer}.mlp.router": "layers.{layer}.mlp.gate"}
    | {
        f"blocks.{{layer}}.mlp.experts.{{expert}}.{ours}": f"layers.{{layer}}.mlp.experts.{{expert}}.{ours}_proj"
        for ours in ("gate", "up", "down")
    },
    special=(
        *LLAMA.special,
        (_read_window_if_used, _write_window_if_used),
        (_read_experts_everywhere, lambda config: {"decoder_sparse_step": 1, "mlp_only_layers": []}),
    ),
)

GPT_NEO = dataclasses.replace(
    GPT2,
    model_type="gpt_neo",
    architecture="GPTNeoForCausalLM",
    fields={
        "vocab_size": Theirs("vocab_size"),
        "context_tokens": Theirs("max_position_embeddings", 2048),
        "n_layer": Theirs("num_layers"),
        "n_head": Theirs("num_heads"),
        "width": Theirs("hidden_size"),
        "mlp_width": Theirs("intermediate_size", None),
        "norm_eps": Theirs("layer_norm_epsilon", 1e-5),
        "tied_head": Theirs("tie_word_embeddings", True),
    },
    tensors=GPT2.tensors
    | {
        "blocks.{layer}.attn.qkv": tuple(f"h.{{layer}}.attn.attention.{x}_proj" for x in "qkv"),
        "blocks.{layer}.attn.out": "h.{layer}.attn.attention.out_proj",
    },
    ours={"attention_scale": 1.0, "qkv_bias": False},
    needs={"activation_function": ("gelu_new", "gelu_pytorch_tanh")},
    special=((_read_attention_types, _write_attention_types),),
    transposed=False,
    ignored=(".attention.bias", ".attention.masked_bias"),
)

BLOOM = dataclasses.replace(
    GPT2,
    model_type="bloom",
    architecture="BloomForCausalLM",
    fields={
        "vocab_size": Theirs("vocab_size"),
        "context_tokens": Theirs("seq_length", 2048),
        "n_layer": Theirs("n_layer", older="num_hidden_layers"),
        "n_head": Theirs("n_head", older="num_attention_heads"),
        "width": Theirs("hidden_size", older="n_embed"),
        "norm_eps": Theirs("layer_norm_epsilon", 1e-5),
        "tied_head": Theirs("tie_word_embeddings", True),
    },
    tensors={
        "token_embedding": "word_embeddings",
        "embedding_norm": "word_embeddings_layernorm",
        "norm_f": "ln_f",
        "head": "lm_head",
        "blocks.{layer}.norm_1": "h.{layer}.input_layernorm",
        "blocks.{layer}.attn.qkv": "h.{layer}.self_attention.query_key_value",
        "blocks.{layer}.attn.out": "h.{layer}.self_attention.dense",
        "blocks.{layer}.norm_2": "h.{layer}.post_attention_layernorm",
        "blocks.{layer}.mlp.up": "h.{layer}.mlp.dense_h_to_4h",
        "blocks.{layer}.mlp.down": "h.{layer}.mlp.dense_4h_to_h",
    },
    ours={"position": "alibi", "embedding_norm": True},
    needs={"apply_residual_connection_post_layernorm": (False,)},
    special=(),
    transposed=False,
    by_head=True,
    ignored=(),
)

FAMILIES = {family.model_type: family for family in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN3_MOE, GPT_NEO, BLOOM)}


def read_hf(folder: Path) -> tuple[Family, ModelConfig]:
    """The table and the configuration of a Hugging Face folder. Raises UserError with the field that cannot be represented."""
    values = read_json(folder / HF_CONFIG_FILE)
    try:
        kind = family(values.get("model_type"))
        return kind, kind.read(values)
    except UserError as error:
        raise UserError(f"{folder / HF_CONFIG_FILE}: {error}") from error


def family(model_type: object) -> Family:
    """The table of a `model_type`. Raises UserError for one that is not here."""
    if model_type not in FAMILIES:
        raise UserError(
            f"model_type {model_type!r} is not supported{nearest(str(model_type), FAMILIES)}; this version loads"
            f" {', '.join(FAMILIES)}"
        )
    return FAMILIES[str(model_type)]


def family_of(config: ModelConfig) -> Family:
    """The first architecture that says all of `config`: read back from its settings, it is the same network.

    Raises UserError naming, for the nearest one, the fields that stand in the way.
    """
    wanted, fewest = complete(config), None
    for candidate in FAMILIES.values():
        try:
            found = complete(candidate.read(candidate.write(config)))
        except UserError:
            continue
        lost = [f.name for f in dataclasses.fields(wanted) if getattr(found, f.name) != getattr(wanted, f.name)]
        if not lost:
            return candidate
        if fewest is None or len(lost) < len(fewest[1]):
            fewest = (candidate, lost)
    if fewest is None:
        raise UserError("no published architecture is this network (export --to glassgpt keeps everything)")
    nearest_one, lost = fewest
    said = ", ".join(f"{name} = {getattr(config, name)}" for name in lost)
    raise UserError(
        f"no published architecture is this network; the nearest, {nearest_one.architecture}, has no {said}"
        " (export --to glassgpt keeps everything)"
    )
