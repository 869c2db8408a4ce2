"""Published architectures, as `transformers` has them: what they write we read, what we write they read, and the logits agree."""

from __future__ import annotations

import contextlib
import importlib
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from oracle import add_noise
from torch import Tensor

from glassgpt.config import ModelConfig, UserError, preset
from glassgpt.config.model import MoeConfig, RopeConfig
from glassgpt.model import GPT, weights
from glassgpt.model.families import FAMILIES, complete, family_of, read_hf, shortest

T, V = 40, 50
TINY = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
OLDEST = {"vocab_size": V, "hidden_size": 32, "layer_norm_epsilon": 1e-4}
# name: (model_type, settings). Each setting here changes the logits.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "llama": ("llama", {**TINY, "rope_theta": 5000.0}),
    "llama, tied": ("llama", {**TINY, "tie_word_embeddings": True}),
    "llama, llama3 scaling": ("llama", {**TINY, "rope_parameters": LLAMA3}),
    "llama, yarn": ("llama", {**TINY, "rope_parameters": YARN}),
    "llama, yarn of other numbers": ("llama", {**TINY, "rope_parameters": {**YARN, "beta_fast": 8.0, "attention_factor": 0.7}}),
    "llama, linear": ("llama", {**TINY, "rope_parameters": LINEAR}),
    "llama, head width": ("llama", {**TINY, "head_dim": 16}),
    "mistral": ("mistral", {**TINY, "sliding_window": 8}),
    "mistral, no window": ("mistral", {**TINY, "sliding_window": None}),
    "qwen2": ("qwen2", TINY),
    "qwen2, windows": ("qwen2", {**TINY, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {**TINY, "head_dim": 16}),
    "mixtral": ("mixtral", {**TINY, "num_local_experts": 4}),
    "mixtral, window": ("mixtral", {**TINY, "num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 9}),
    "qwen3_moe": ("qwen3_moe", {**TINY, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
    "qwen3_moe, normalised": (
        "qwen3_moe",
        {**TINY, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True, "head_dim": 16},
    ),
    "qwen3_moe, window": (
        "qwen3_moe",
        {
            **TINY,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "use_sliding_window": True,
            "sliding_window": 7,
        },
    ),
    "gpt_neo": (
        "gpt_neo",
        {
            **OLDEST,
            "num_layers": 3,
            "num_heads": 4,
            "max_position_embeddings": 64,
            "window_size": 8,
            "attention_types": [[["global", "local", "local"], 1]],
        },
    ),
    "bloom": ("bloom", {**OLDEST, "n_layer": 2, "n_head": 4}),
    "bloom, six heads": ("bloom", {**OLDEST, "hidden_size": 48, "n_layer": 2, "n_head": 6}),
}
BAR = 1e-10
BLOOM_BAR = 1e-8  # its GELU has √(2/π) to eight digits


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """The oracle as it is, but for its own roundings: where its code says float32 it means float64."""

    class Wide(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, {"float32": "float64", "float": "float64"}.get(name, name))

    names = ["transformers.modeling_rope_utils", *(f"transformers.models.{name}.modeling_{name}" for name in FAMILIES)]
    with pytest.MonkeyPatch.context() as patch:
        for module in map(importlib.import_module, names):
            patch.setattr(module, "torch", Wide("torch"))
        patch.setattr(Tensor, "float", Tensor.double)
        yield


def oracle(case: str) -> Any:
    """A model of theirs, in float64, with noise on every parameter."""
    model_type, settings = CASES[case]
    config = transformers.AutoConfig.for_model(model_type, **settings)
    config._experts_implementation = "eager"  # the fast ones have no float64
    torch.manual_seed(0)
    with in_float64():
        model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    add_noise(model, 0.3)
    return model


def logits(model: Any) -> Tensor:
    ids = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), in_float64():
        found = model(ids)
    return found if isinstance(found, Tensor) else found.logits


@pytest.mark.parametrize("case", CASES)
def test_what_they_write_we_read_and_write_again(case: str, tmp_path: Path) -> None:
    theirs = oracle(case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = weights.load_hf(tmp_path / "theirs").eval()
    expected = logits(theirs)
    error = float((logits(ours) - expected).abs().max())
    print(f"measured {case}: {error:.1e} of {float(expected.abs().max()):.1f}")
    assert error < (BLOOM_BAR if "bloom" in case else BAR)
    assert expected.abs().max() > 1

    (tmp_path / "ours").mkdir()
    weights.save_hf(ours, tmp_path / "ours", None)
    written, theirs_written = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert written.keys() == theirs_written.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in theirs_written.items())
    with in_float64():
        again = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "ours", dtype=torch.float64, experts_implementation="eager"
        ).eval()
    simplest = "LlamaForCausalLM" if case == "mistral, no window" else type(theirs).__name__
    assert type(again).__name__ == simplest
    assert (logits(again) - expected).abs().max() < 1e-12
    dtypes = weights.stored_dtypes(ours.config, tmp_path / "ours", is_hf=True)
    assert dtypes == dict.fromkeys((name for name, _ in ours.named_parameters()), "float64")


def test_every_family_is_compared() -> None:
    assert {model_type for model_type, _ in CASES.values()} == set(FAMILIES)


CHANGES: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-3, "rope_theta": 20000.0, "num_attention_heads": 8},
    "llama, llama3 scaling": {"rope_parameters": {**LLAMA3, "high_freq_factor": 3.0}},
    "llama, yarn": {"rope_parameters": {**YARN, "factor": 3.0}},
    "llama, linear": {"rope_parameters": {**LINEAR, "factor": 3.0}},
    "mistral": {"sliding_window": 9},
    "qwen2, windows": {"max_window_layers": 2, "sliding_window": 6, "layer_types": ["full_attention"] * 3},
    "mixtral": {"num_experts_per_tok": 1},
    "qwen3_moe": {"norm_topk_prob": True},
    "gpt_neo": {"window_size": 7, "attention_types": [[["local", "global", "local"], 1]]},
    "bloom": {"n_head": 8, "layer_norm_epsilon": 1e-3},
}


@pytest.mark.parametrize(("case", "name"), [(case, name) for case, changes in CHANGES.items() for name in changes])
def test_the_comparison_would_notice(case: str, name: str, tmp_path: Path) -> None:
    theirs = oracle(case)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    if name == "rope_theta":
        values["rope_parameters"]["rope_theta"] = CHANGES[case][name]
    elif name == "num_attention_heads":
        values |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
    elif name == "max_window_layers":
        del values["layer_types"]
    path.write_text(json.dumps(values | {name: CHANGES[case][name]}))
    assert (logits(weights.load_hf(tmp_path).eval()) - logits(theirs)).abs().max() > 1e-5


@pytest.mark.parametrize("by_head", [True, False])
def test_rows_in_another_order_would_be_noticed(by_head: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = "bloom" if by_head else "llama"
    theirs = oracle(case)
    theirs.save_pretrained(tmp_path)
    family = FAMILIES[case]
    stored = type(family).stored

    def wrong(self: Any, config: ModelConfig, name: str) -> Any:
        found = stored(self, config, name)
        if by_head:
            return found._replace(by_head=False)
        return found._replace(names=(found.names[0], *found.names[:0:-1])) if len(found.names) == 3 else found

    monkeypatch.setattr(type(family), "stored", wrong)
    assert (logits(weights.load_hf(tmp_path).eval()) - logits(theirs)).abs().max() > 1e-3


# ---------------------------------------------------------------------- old files


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("llama, llama3 scaling", {"rope_theta": 500000.0, "rope_scaling": LLAMA3}),
        ("llama, linear", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("llama", {"rope_theta": 5000.0, "rope_scaling": None}),
    ],
)
def test_rope_as_earlier_files_have_it(case: str, change: dict[str, Any], tmp_path: Path) -> None:
    theirs = oracle(case)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = {name: value for name, value in json.loads(path.read_text()).items() if name != "rope_parameters"}
    path.write_text(json.dumps(values | change))
    assert (logits(weights.load_hf(tmp_path).eval()) - logits(theirs)).abs().max() < BAR


# ---------------------------------------------------------------------- what cannot be said

MODERN = {"position": "rope", "norm": "rms", "mlp": "swiglu", "bias": False, "n_kv_head": 1, "tied_head": False}


@pytest.mark.parametrize(
    ("changes", "architecture"),
    [
        ({}, "GPT2LMHeadModel"),
        (MODERN, "LlamaForCausalLM"),
        (MODERN | {"rope": RopeConfig(scaling="yarn", factor=2.0, original_tokens=16)}, "LlamaForCausalLM"),
        (MODERN | {"attention_width": 64}, "LlamaForCausalLM"),
        (MODERN | {"spans": ("window",), "window_tokens": 4}, "MistralForCausalLM"),
        (MODERN | {"spans": ("window",), "window_tokens": 32}, "LlamaForCausalLM"),  # the whole context
        (MODERN | {"qkv_bias": True}, "Qwen2ForCausalLM"),
        (MODERN | {"qk_norm": True}, "Qwen3ForCausalLM"),
        (MODERN | {"qk_norm": True, "spans": ("full", "window"), "window_tokens": 4}, "Qwen3ForCausalLM"),
        (MODERN | {"moe": MoeConfig(experts=4)}, "MixtralForCausalLM"),
        (MODERN | {"moe": MoeConfig(experts=4), "qk_norm": True}, "Qwen3MoeForCausalLM"),
        ({"position": "alibi", "embedding_norm": True}, "BloomForCausalLM"),
        ({"attention_scale": 1.0, "qkv_bias": False, "spans": ("full", "window"), "window_tokens": 8}, "GPTNeoForCausalLM"),
    ],
)
def test_the_architecture_of_a_network_built_here(changes: dict[str, Any], architecture: str, tmp_path: Path) -> None:
    """And `transformers` computes what we do."""
    config = preset("tiny", vocab_size=V, **changes)
    torch.manual_seed(0)
    model = GPT(config).double().eval()
    add_noise(model, 0.1)
    weights.save_hf(model, tmp_path, None)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [architecture]
    back = weights.load_hf(tmp_path)
    assert complete(back.config) == complete(config)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))
    with in_float64(), torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float64, experts_implementation="eager"
        ).eval()
        ids = torch.randint(V, (2, 30), generator=torch.Generator().manual_seed(4))
        bar = BLOOM_BAR if architecture.startswith("Bloom") else BAR
        assert (theirs(ids).logits - model(ids)).abs().max() < bar


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mlp": "relu2"}, "GPT2LMHeadModel, has no mlp = relu2"),
        ({"position": "relative"}, "has no position = relative"),
        ({"norm": "rms"}, "GPT2LMHeadModel, has no norm = rms"),
        (MODERN | {"logit_cap": 30.0}, "LlamaForCausalLM, has no logit_cap = 30.0"),
        (MODERN | {"rope": RopeConfig(scaling="ntk", factor=2.0)}, "LlamaForCausalLM, has no rope = "),
        (MODERN | {"moe": MoeConfig(experts=4, shared=1)}, "has no moe = MoeConfig"),
        (MODERN | {"spans": ("strided",), "window_tokens": 4}, "no published architecture is"),
        ({"spans": ("full", "window"), "window_tokens": 4}, "has no spans = .*, window_tokens = 4"),
        (
            MODERN | {"qk_norm": True, "moe": MoeConfig(4), "spans": ("full", "window"), "window_tokens": 4},
            "no published architecture is",
        ),
    ],
)
def test_what_no_architecture_is_names_the_field(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        weights.save_hf(GPT(preset("tiny", **changes)), tmp_path, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("case", "change", "said"),
    [
        (
            "llama",
            {"model_type": "lama"},
            r"model_type 'lama' is not supported \(did you mean 'llama'\?\); this version loads gpt2, ",
        ),
        ("llama", {"hidden_act": "relu"}, r"hidden_act = 'relu' cannot be represented; expected 'silu'"),
        ("llama", {"attention_bias": True}, r"attention_bias = True cannot be represented"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic"}}, r"rope_type = 'dynamic' cannot be represented; expected one of"),
        ("llama", {"rope_parameters": {**LINEAR, "rope_type": "default"}}, r"rope_parameters.factor = 2.0 cannot be represented"),
        ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0.5 cannot be represented"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, r"partial_rotary_factor = 0.5"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, r"rope_parameters.full_attention = .* cannot be"),
        ("llama", {"sliding_window": 8}, r"sliding_window = 8 cannot be represented; expected None"),
        ("bloom", {"quantization_config": {"bits": 4}}, r"quantization_config = .* cannot be represented"),
        ("gpt2", {"clip_qkv": 8.0}, r"clip_qkv = 8.0 cannot be represented"),
        ("qwen2, windows", {"layer_types": ["full_attention"]}, "layer_types names 1 layers and the network has 3"),
        ("gpt_neo", {"attention_types": [[["global", "local"], 3]]}, "attention_types names 6 layers and the network has 3"),
        ("llama", {"rope_parameters": {**YARN, "mscale": 0.7}}, r"rope_parameters.mscale = 0.7 cannot be represented"),
        ("llama", {"rope_parameters": {**YARN, "truncate": False}}, r"rope_parameters.truncate = False cannot be represented"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers or decoder_sparse_step leave some layers dense"),
        ("qwen2, windows", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types has 'linear_attention'"),
        ("gpt_neo", {"attention_types": [[["global", "sparse"], 1]]}, "attention_types has 'sparse'"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm = True cannot"),
        ("llama", {"num_key_value_heads": 3}, r"n_kv_head must divide n_head: n_head 4 / n_kv_head 3"),
    ],
)
def test_a_setting_that_cannot_be_represented_is_named(case: str, change: dict[str, Any], said: str, tmp_path: Path) -> None:
    model_type, settings = CASES[case]
    values = transformers.AutoConfig.for_model(model_type, **settings).to_dict() | change
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=said) as caught:
        read_hf(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "config.json"))


def test_a_tensor_of_one_of_three_that_is_missing_is_named(tmp_path: Path) -> None:
    oracle("llama").save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    tensors["model.layers.0.self_attn.v_proj.weight"] = torch.ones(3, 32)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as caught:
        weights.load_hf(tmp_path)
    _, *lines = str(caught.value).splitlines()
    assert [line.strip() for line in lines] == [
        "layers.0.self_attn.v_proj.weight: shape (3, 32), expected (16, 32)",
        "layers.1.self_attn.k_proj.weight: missing, expected shape (16, 32)",
    ]


def test_patterns() -> None:
    assert shortest(("full",) * 5) == ("full",)
    assert shortest(("full", "window", "full", "window")) == ("full", "window")
    assert shortest(("full", "window", "full")) == ("full", "window")
    assert shortest(("full", "full", "window")) == ("full", "full", "window")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("llama-3.1-8b", 8_030_261_248),
        ("mistral-7b", 7_241_732_096),
        ("mixtral-8x7b", 46_702_792_704),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("gpt-neo-125m", 125_198_592),
        ("gpt-neo-1.3b", 1_315_575_808),
        ("gpt-neo-2.7b", 2_651_307_520),
        ("bloom-560m", 559_214_592),
        ("bloom-176b", 176_247_271_424),
    ],
)
def test_published_parameter_counts(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = GPT(preset(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert family_of(model.config).architecture  # some class of theirs is this network
