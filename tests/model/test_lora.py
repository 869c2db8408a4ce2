"""Low-rank adapters: what `peft` computes we compute, in files that both open, and the base is never touched."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from exact import error, float64_throughout, noisy, random, shape, tokens
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from glassgpt.config import UserError
from glassgpt.config.folder import ADAPTER_CONFIG_FILE
from glassgpt.config.generate import Sampling
from glassgpt.config.model import MoeConfig
from glassgpt.config.tuning import LoraConfig
from glassgpt.generation.cache import KVCache
from glassgpt.generation.engine import stream
from glassgpt.generation.generator import Generator
from glassgpt.model import GPT, lora, weights
from glassgpt.model.families import Stored
from glassgpt.model.lora import Adapter, LoraLinear, adapters, add, disabled, linears, load_adapter, merge, save_adapter

MODERN = {"position": "rope", "norm": "rms", "mlp": "swiglu", "bias": False, "n_kv_head": 2, "tied_head": False}
SHAPES: dict[str, dict[str, Any]] = {
    "as GPT-2": {},
    "grouped, as Llama": MODERN,
    "by head, as Bloom": {"position": "alibi", "embedding_norm": True, "norm_eps": 1e-4},
    "q, k, v apart, as GPT-Neo": {"attention_scale": 1.0, "qkv_bias": False},
    "normed, as Qwen3": MODERN | {"qk_norm": True, "attention_width": 24},
}
OURS_ALONE: dict[str, dict[str, Any]] = {
    "squared ReLU": {"mlp": "relu2"},
    "shared experts": MODERN | {"moe": MoeConfig(4, 2, shared=1, expert_width=7)},
}
EXPERTS = MODERN | {"moe": MoeConfig(4, 2, expert_width=7)}
BAR = 1e-10
BLOOM_BAR = 1e-8  # its GELU has √(2/π) to eight digits
every_shape = pytest.mark.parametrize("name", SHAPES)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")
        yield


def bar(name: str) -> float:
    return BLOOM_BAR if "Bloom" in name else BAR


def small(name: str) -> GPT:
    return noisy(shape(n_layer=2, **(SHAPES | OURS_ALONE | {"experts": EXPERTS})[name]))


@torch.no_grad()
def disturb(model: nn.Module, seed: int = 5) -> None:
    """Numbers in A and B, neither of which is then zero."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapters(model).values():
        tensor.copy_(0.5 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))


def adapted(name: str, **changes: Any) -> GPT:
    """A noisy model with noisy adapters."""
    model = small(name)
    add(model, LoraConfig(**{"rank": 3, "alpha": 7.0} | changes), seed=0)
    disturb(model)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.randint(31, (2, 20), generator=torch.Generator().manual_seed(3))
    with float64_throughout():
        found = model(ids)
    return found if isinstance(found, Tensor) else found.logits


def theirs(model: GPT, folder: Path) -> Any:
    """What `transformers` makes of the plain model that we write."""
    folder.mkdir()
    weights.save_hf(model, folder, None)
    with float64_throughout():
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, experts_implementation="eager"
        ).eval()


def opened_by_peft(base: Any, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(base, folder).eval()


def made_by_peft(base: Any, folder: Path, **options: Any) -> Any:
    """A random adapter of `peft`'s, saved by it."""
    torch.manual_seed(1)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)).eval()
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if ".lora_" in parameter_name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    model.save_pretrained(folder)
    return model


# ---------------------------------------------------------------------- beside peft


@every_shape
def test_peft_opens_what_we_write(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    save_adapter(model, tmp_path, "its base")
    oracle = opened_by_peft(theirs(small(name), tmp_path / "base"), tmp_path)
    found, expected = logits(model), logits(oracle)
    print(f"measured {name}: {error(found, expected):.1e} of {float(expected.abs().max()):.1f}")
    assert error(found, expected) < bar(name)
    assert error(found, logits(small(name))) > 0.1
    adapted_by_peft = sum(isinstance(module, LoraLayer) for module in oracle.modules())
    assert adapted_by_peft == len(safetensors.torch.load_file(tmp_path / lora.ADAPTER_FILE)) / 2  # and nothing besides


@pytest.mark.parametrize("name", ["as GPT-2", "grouped, as Llama"])
@pytest.mark.parametrize("target", ["qkv", "out", "up", "down"])
def test_peft_adapts_the_same_matrices(name: str, target: str, tmp_path: Path) -> None:
    """GPT-2 has two modules called c_proj."""
    model = adapted(name, targets=(target,))
    save_adapter(model, tmp_path, "its base")
    oracle = opened_by_peft(theirs(small(name), tmp_path / "base"), tmp_path)
    assert error(logits(model), logits(oracle)) < bar(name)
    adapted_by_peft = sum(isinstance(module, LoraLayer) for module in oracle.modules())
    assert adapted_by_peft == 2 * (3 if target == "qkv" and "Llama" in name else 1)


def test_peft_opens_experts(tmp_path: Path) -> None:
    """Published files have an expert's matrices one by one; `peft` packs them, and warns of names that it has made itself."""
    warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
    model = adapted("experts", targets=("up", "gate", "down"))
    save_adapter(model, tmp_path, "its base")
    oracle = opened_by_peft(theirs(small("experts"), tmp_path / "base"), tmp_path)
    assert error(logits(model), logits(oracle)) < BAR


ALL = {
    "as GPT-2": ["c_attn", "c_proj", "c_fc"],
    "grouped, as Llama": [f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")],
    "by head, as Bloom": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "q, k, v apart, as GPT-Neo": ["q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"],
    "normed, as Qwen3": [f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")],
}


@every_shape
def test_we_open_what_peft_writes(name: str, tmp_path: Path) -> None:
    oracle = made_by_peft(theirs(small(name), tmp_path / "base"), tmp_path, r=3, lora_alpha=7, target_modules=ALL[name])
    model = load_adapter(small(name), tmp_path)
    found, expected = logits(model), logits(oracle)
    print(f"measured {name}: {error(found, expected):.1e} of {float(expected.abs().max()):.1f}")
    assert error(found, expected) < bar(name)
    assert error(found, logits(small(name))) > 0.1
    with oracle.disable_adapter():
        assert error(logits(small(name)), logits(oracle)) < bar(name)


OPTIONS: dict[str, dict[str, Any]] = {
    "queries and values": {"target_modules": ["q_proj", "v_proj"]},
    "keys alone": {"target_modules": ["k_proj"]},
    "by the root of the rank": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "use_rslora": True},
    "ranks of their own": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
        "rank_pattern": {"k_proj": 5, "layers.0.mlp.down_proj": 1},
    },
    "by the root of ranks of their own": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 5},
        "use_rslora": True,
    },
    "scales of their own": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "alpha_pattern": {"v_proj": 11, "^model.layers.1.mlp.up_proj": 2},
    },
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "every linear map": {"target_modules": "all-linear"},
    "a regular expression": {"target_modules": r".*\.1\.(self_attn|mlp)\.[kd].*_proj"},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_peft(option: str, tmp_path: Path) -> None:
    """Also written again by us: what we read, they read."""
    name = "grouped, as Llama"
    oracle = made_by_peft(theirs(small(name), tmp_path / "base"), tmp_path, r=3, lora_alpha=7, **OPTIONS[option])
    model, expected = load_adapter(small(name), tmp_path), logits(oracle)
    assert error(logits(model), expected) < BAR
    (tmp_path / "again").mkdir()
    save_adapter(model, tmp_path / "again", "its base")
    assert error(logits(load_adapter(small(name), tmp_path / "again")), expected) < BAR
    assert error(logits(opened_by_peft(theirs(small(name), tmp_path / "base2"), tmp_path / "again")), expected) < BAR
    assert error(logits(merge(model)), expected) < BAR


@pytest.mark.parametrize("name", ["as GPT-2", "grouped, as Llama"])
def test_gradients_are_pefts(name: str, tmp_path: Path) -> None:
    """Of A and B; the q, k, v that share an A each have a part of its gradient. Nothing else has one."""
    model = adapted(name)
    save_adapter(model, tmp_path, "its base")
    oracle = opened_by_peft(theirs(small(name), tmp_path / "base"), tmp_path)
    for parameter_name, parameter in oracle.named_parameters():
        parameter.requires_grad_(".lora_" in parameter_name)
    ids = tokens(model.config, 2, 15)
    weight = random(2, 15, model.config.vocab_size)
    with float64_throughout():
        (model(ids) * weight).sum().backward()
        (oracle(ids).logits * weight).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(adapters(model))
    gradients = {
        n.replace(".default", "").removeprefix(lora.PREFIX).removesuffix(".weight"): p.grad
        for n, p in oracle.named_parameters()
        if p.grad is not None
    }
    places, _ = lora._places(model)
    for ours, stored in places.items():
        a, b = (model.get_submodule(ours).get_submodule(f"lora_{x}").weight.grad for x in "ab")
        assert error(a, sum(gradients[f"{n}.lora_A"] for n in stored.names)) < 1e-9 * max(1, float(a.abs().max()))
        assert error(b, torch.cat([gradients[f"{n}.lora_B"] for n in stored.names])) < 1e-9 * max(1, float(b.abs().max()))
        assert a.abs().max() > 0.01 < b.abs().max()


MISTAKES: dict[str, Callable[[LoraLinear], Any]] = {
    "no scale": lambda m: setattr(m, "alpha", m.rank),
    "rank / alpha": lambda m: setattr(m, "alpha", m.rank * m.rank / m.alpha),
    "scaled by the root": lambda m: setattr(m, "alpha", m.alpha * math.sqrt(m.rank)),
    "A read column by column": lambda m: m.lora_a.weight.copy_(m.lora_a.weight.t().reshape(m.lora_a.weight.shape)),
    "B read column by column": lambda m: m.lora_b.weight.copy_(m.lora_b.weight.t().reshape(m.lora_b.weight.shape)),
    "A and B of other ranks": lambda m: m.lora_b.weight.copy_(m.lora_b.weight.flip(1)),
    "added to the base, not beside it": lambda m: m.base.weight.add_(m.merged() - m.base.weight),
    "a bias": lambda m: setattr(m.lora_b, "bias", nn.Parameter(torch.full((m.lora_b.out_features,), 1e-3, dtype=torch.float64))),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_one_adapter_would_be_noticed(mistake: str, tmp_path: Path) -> None:
    model = adapted("grouped, as Llama")
    save_adapter(model, tmp_path, "its base")
    expected = logits(opened_by_peft(theirs(small("grouped, as Llama"), tmp_path / "base"), tmp_path))
    with torch.no_grad():
        MISTAKES[mistake](model.blocks[1].mlp.down)
    assert error(logits(model), expected) > 1e-4


def other_places(change: Callable[[Stored], Stored]) -> Callable[[GPT], Any]:
    def places(model: GPT, right: Any = lora._places) -> Any:
        found, every = right(model)
        return {name: change(stored) for name, stored in found.items()}, every

    return places


def one_a(parts: list[Adapter], rows: list[int]) -> Adapter:
    return Adapter(sum(part.a for part in parts) / len(parts), torch.cat([part.b for part in parts]), parts[0].alpha)  # type: ignore[arg-type]


def scaled_as_one(parts: list[Adapter], rows: list[int], right: Any = lora._joined) -> Adapter:
    return right(parts, rows)._replace(alpha=parts[0].alpha)


READING_MISTAKES: dict[str, tuple[str, str, Any]] = {  # k and v have as many rows
    "k where v is": (
        "grouped, as Llama",
        "_places",
        other_places(lambda s: s._replace(names=(s.names[0], *s.names[:0:-1]) if len(s.names) == 3 else s.names)),
    ),
    "one head after the other": ("by head, as Bloom", "_places", other_places(lambda s: s._replace(by_head=False))),
    "one A for three": ("grouped, as Llama", "_joined", one_a),
    "three ranks scaled as one": ("grouped, as Llama", "_joined", scaled_as_one),
}


@pytest.mark.parametrize("mistake", READING_MISTAKES)
def test_a_mistake_in_reading_would_be_noticed(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, function, wrong = READING_MISTAKES[mistake]
    expected = logits(made_by_peft(theirs(small(name), tmp_path / "base"), tmp_path, r=3, lora_alpha=7, target_modules=ALL[name]))
    assert error(logits(load_adapter(small(name), tmp_path)), expected) < bar(name)
    monkeypatch.setattr(lora, function, wrong)
    assert error(logits(load_adapter(small(name), tmp_path)), expected) > 1e-3


# ---------------------------------------------------------------------- in the model


def test_names() -> None:
    model = adapted("grouped, as Llama", targets=("qkv", "gate"))
    names = [name for name, _ in model.blocks[1].named_parameters()]
    assert names == [
        "norm_1.weight",
        *(f"attn.qkv.{x}.weight" for x in ("base", "lora_a", "lora_b")),
        "attn.out.weight",
        "norm_2.weight",
        *(f"mlp.gate.{x}.weight" for x in ("base", "lora_a", "lora_b")),
        "mlp.up.weight",
        "mlp.down.weight",
    ]
    assert type(model) is GPT
    assert list(adapters(model)) == [
        f"blocks.{i}.{m}.lora_{x}.weight" for i in (0, 1) for m in ("attn.qkv", "mlp.gate") for x in "ab"
    ]
    assert {name: tuple(adapters(model)[name].shape) for name in list(adapters(model))[:2]} == {
        "blocks.0.attn.qkv.lora_a.weight": (3, 16),
        "blocks.0.attn.qkv.lora_b.weight": (32, 3),
    }
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(adapters(model))
    assert linears(model).keys() == linears(small("grouped, as Llama")).keys()


@pytest.mark.parametrize("name", [*SHAPES, *OURS_ALONE, "experts"])
def test_every_target_is_found_and_the_start_changes_nothing(name: str) -> None:
    model = small(name)
    before, plain = logits(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = add(model, LoraConfig(rank=2), seed=3)
    wrapped = {n for n, module in model.named_modules() if isinstance(module, LoraLinear)}
    assert wrapped == {n for n in linears(model) if not n.endswith("router")}
    assert [id(p) for p in trained] == [id(p) for p in adapters(model).values()]
    assert torch.equal(logits(model), before)  # B is zero
    kept = {n.replace(".base.", "."): p for n, p in model.named_parameters() if n not in adapters(model)}
    assert kept.keys() == plain.keys() and all(torch.equal(p, plain[n]) for n, p in kept.items())


def test_the_start_follows_from_the_seed_alone() -> None:
    """And takes nothing from the global random state; A is spread as `peft`'s."""
    found = []
    for global_seed, seed in ((1, 7), (2, 7), (1, 8)):
        model = small("as GPT-2")
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        add(model, LoraConfig(rank=3), seed)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(adapters(model))
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    a = [n for n in found[0] if n.endswith("a.weight")]
    assert not any(torch.equal(found[0][n], found[2][n]) for n in a)
    assert not torch.equal(found[0][a[0]], found[0]["blocks.1.attn.qkv.lora_a.weight"])
    for seed in range(3):
        model = GPT(shape(width=64, n_head=4, n_layer=1))
        add(model, LoraConfig(rank=64, targets=("qkv",)), seed)
        numbers = model.blocks[0].attn.qkv.lora_a.weight.detach()
        bound = 1 / math.sqrt(64)  # Kaiming-uniform with a = √5
        assert 0.97 * bound < float(numbers.abs().max()) <= bound
        assert abs(float(numbers.std()) / (bound / math.sqrt(3)) - 1) < 0.03


def test_targets_that_are_not_there() -> None:
    model = small("as GPT-2")
    add(model, LoraConfig(rank=2, targets=("gate", "up")), 0)
    assert {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, LoraLinear)} == {"up"}
    with pytest.raises(UserError, match=r"lora.targets is gate, of which this model has none; it has qkv, out, up, down"):
        add(small("as GPT-2"), LoraConfig(rank=2, targets=("gate",)), 0)
    with pytest.raises(UserError, match="has adapters already"):
        add(model, LoraConfig(rank=2), 0)
    with pytest.raises(UserError, match=r"lora\.rank is 0"):
        add(small("as GPT-2"), LoraConfig(), 0)


@pytest.mark.parametrize("name", [*SHAPES, *OURS_ALONE, "experts"])
def test_merging_changes_nothing_but_the_weights(name: str) -> None:
    """A plain model again, of the same logits; the routers, embeddings, norms and biases keep their bits."""
    model, plain = adapted(name), dict(small(name).named_parameters())
    before, expected = logits(model), {n: m.merged() for n, m in model.named_modules() if isinstance(m, LoraLinear)}
    assert merge(model) is model
    assert error(logits(model), before) < BAR
    assert adapters(model) == {} and not any(isinstance(m, LoraLinear) for m in model.modules())
    merged = dict(model.named_parameters())
    assert list(merged) == list(plain) and all(p.requires_grad for p in merged.values())
    changed = {n.removesuffix(".weight") for n in merged if not torch.equal(merged[n], plain[n])}
    assert changed == set(expected)
    assert all(torch.equal(merged[f"{n}.weight"], tensor) for n, tensor in expected.items())
    assert (model.head.weight is model.token_embedding.weight) == model.config.tied_head


def test_merging_rounds_once() -> None:
    """The sum is made in float64, whatever the weights are in."""
    model = adapted("as GPT-2").to(torch.bfloat16)
    module = model.blocks[0].attn.qkv
    W, A, B = (m.weight.detach().double() for m in (module.base, module.lora_a, module.lora_b))
    expected = (W + (7.0 / 3) * B @ A).to(torch.bfloat16)
    in_bfloat16 = module.base.weight + (module.lora_b.weight * module.scale) @ module.lora_a.weight
    merge(model)
    assert torch.equal(model.blocks[0].attn.qkv.weight, expected)
    assert not torch.equal(in_bfloat16, expected)


@every_shape
def test_switched_off_it_is_the_base(name: str) -> None:
    """Bit for bit, and on again afterwards, whatever happens in between."""
    model, expected = adapted(name), logits(small(name))
    on = logits(model)
    with disabled(model):
        assert torch.equal(logits(model), expected)
        with disabled(model):
            pass
        assert torch.equal(logits(model), expected)  # the inner one has not switched them on
    assert torch.equal(logits(model), on)
    with contextlib.suppress(ZeroDivisionError), disabled(nn.Sequential(model)):
        off = logits(model)
        raise ZeroDivisionError
    assert torch.equal(off, expected)
    assert torch.equal(logits(model), on) and not torch.equal(on, expected)


def test_dropout_is_of_the_adapters_input_and_of_training_alone() -> None:
    model = adapted("as GPT-2", dropout=0.5)
    module, x = model.blocks[0].mlp.up, random(5, 16)
    torch.manual_seed(0)
    assert torch.equal(module(x), module(x))
    module.train()
    torch.manual_seed(4)
    found = module(x)
    torch.manual_seed(4)
    dropped = nn.functional.dropout(x, 0.5)
    assert 0 < int((dropped == 0).sum()) < dropped.numel()
    expected = module.base(x) + (7.0 / 3) * (dropped @ module.lora_a.weight.t() @ module.lora_b.weight.t())
    assert error(found, expected) < 1e-12
    state = torch.get_rng_state()
    with disabled(model):
        assert torch.equal(module(x), module.base(x))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["grouped, as Llama", "experts"])
def test_cache_and_generation(name: str) -> None:
    """As the merged model has them."""
    model, plain = adapted(name), merge(adapted(name))
    ids = tokens(model.config, 2, 12)
    with torch.no_grad():
        cache = KVCache(model.config)
        parts = [model(part, cache) for part in ids.split([5, 1, 6], dim=1)]
        assert error(torch.cat(parts, dim=1), plain(ids)) < BAR
    written = []
    for network in (model, plain):
        generators = [Generator(seed) for seed in range(2)]
        written.append([t.id for t in stream(network, ids.tolist(), Sampling(temperature=2.0), generators, 8)])
    assert written[0] == written[1] and len(written[0]) == 16


def test_activations_computed_again_and_other_kernels() -> None:
    """Gradients are the same with the blocks computed twice, and with the attention written out."""
    from glassgpt.model import plain, use_attention

    model = adapted("grouped, as Llama").train()
    ids = tokens(model.config, 2, 12)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        (model(ids) * random(2, 12, 31)).sum().backward()
        return [p.grad.clone() for p in adapters(model).values() if p.grad is not None]

    expected = gradients()
    use_attention(model, plain)
    assert max(error(a, b) / float(b.abs().max()) for a, b in zip(gradients(), expected, strict=True)) < 1e-10
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda *given, forward=forward: checkpoint(forward, *given, use_reentrant=False)
    assert max(error(a, b) / float(b.abs().max()) for a, b in zip(gradients(), expected, strict=True)) < 1e-10


def test_training_moves_the_adapters_alone() -> None:
    model = small("as GPT-2")
    optimizer = torch.optim.AdamW(add(model, LoraConfig(rank=2), 0), lr=1e-2)
    before = copy.deepcopy(model.state_dict())
    ids = tokens(model.config, 4)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed == set(adapters(model))


# ---------------------------------------------------------------------- our folders


@pytest.mark.parametrize("name", [*SHAPES, *OURS_ALONE, "experts"])
def test_there_and_back(name: str, tmp_path: Path) -> None:
    """Bit for bit, in rank, scale and dropout too, into a plain model and into one that has other numbers in its adapters."""
    model = adapted(name, dropout=0.1)
    save_adapter(model, tmp_path, "its base")
    fresh, held = small(name), small(name)
    add(held, LoraConfig(rank=3, alpha=9.0, dropout=0.1), seed=9)
    kept = {n: id(p) for n, p in held.named_parameters()}
    for other in (load_adapter(fresh, tmp_path), load_adapter(held, tmp_path)):
        assert list(adapters(other)) == list(adapters(model))
        assert all(torch.equal(tensor, adapters(model)[n]) for n, tensor in adapters(other).items())
        assert {n for n, p in other.named_parameters() if p.requires_grad} == set(adapters(model))
        assert torch.equal(logits(other), logits(model))
        modules = [m for m in other.modules() if isinstance(m, LoraLinear)]
        assert {(m.rank, m.alpha, m.drop.p) for m in modules} == {(3, 7.0, 0.1)}
    assert {n: id(p) for n, p in held.named_parameters()} == kept  # the optimiser's own tensors


def test_what_is_written(tmp_path: Path) -> None:
    model = adapted("as GPT-2", targets=("qkv", "down"), alpha=16.0)
    save_adapter(model, tmp_path, "gpt2")
    values = json.loads((tmp_path / ADAPTER_CONFIG_FILE).read_text())
    assert values["target_modules"] == ["c_attn", "mlp.c_proj"]
    assert values["fan_in_fan_out"] is True
    assert (values["r"], values["lora_alpha"], values["base_model_name_or_path"]) == (3, 16, "gpt2")
    assert values["peft_type"] == "LORA" and values["task_type"] == "CAUSAL_LM" and values["rank_pattern"] == {}
    assert all(hasattr(peft.LoraConfig(), key) for key in values)
    names = safetensors.torch.load_file(tmp_path / lora.ADAPTER_FILE).keys()
    assert "base_model.model.transformer.h.1.mlp.c_proj.lora_B.weight" in names and len(names) == 8
    with pytest.raises(UserError, match="no adapters to save"):
        save_adapter(small("as GPT-2"), tmp_path, "gpt2")


def test_tensors_in_place_of_the_models_own(tmp_path: Path) -> None:
    """Where those are spread over several processes."""
    model = adapted("as GPT-2")
    whole = {n: p.detach() * 2 for n, p in model.named_parameters()}
    save_adapter(model, tmp_path, "its base", tensors=whole)
    found = adapters(load_adapter(small("as GPT-2"), tmp_path))
    assert all(torch.equal(tensor, whole[n]) for n, tensor in found.items())


def test_adapters_keep_a_precision_above_the_base(tmp_path: Path) -> None:
    model = adapted("as GPT-2").float()
    save_adapter(model, tmp_path, "its base")
    found = load_adapter(small("as GPT-2").to(torch.bfloat16), tmp_path)
    assert {t.dtype for t in adapters(found).values()} == {torch.float32}
    assert found(tokens(found.config)).dtype == torch.bfloat16
    wide = load_adapter(small("as GPT-2"), tmp_path)
    assert {t.dtype for t in adapters(wide).values()} == {torch.float64}


def test_adapters_of_another_shape_than_the_models(tmp_path: Path) -> None:
    save_adapter(adapted("as GPT-2"), tmp_path, "its base")
    with pytest.raises(UserError, match=r"at blocks\.0\.attn\.qkv their rank is 3, the model's 2"):
        load_adapter(adapted("as GPT-2", rank=2), tmp_path)
    with pytest.raises(UserError, match=r"at blocks\.0\.attn\.out their rank is 3, the model's 0"):
        load_adapter(adapted("as GPT-2", targets=("qkv",)), tmp_path)


# ---------------------------------------------------------------------- what is refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(adapted("grouped, as Llama"), tmp_path, "its base")
    return tmp_path


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / ADAPTER_CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "use_dora = True cannot be represented; expected it to be absent or off"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\] cannot be represented"),
        ({"bias": "all"}, "bias = 'all' cannot be represented; expected 'none'"),
        ({"lora_bias": True}, "lora_bias = True cannot"),
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA' cannot be represented; expected 'LORA'"),
        ({"task_type": "SEQ_CLS"}, "task_type = 'SEQ_CLS' cannot"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' cannot"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters = .* cannot"),
        ({"layer_replication": [[0, 2]]}, "layer_replication = .* cannot"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens = .* cannot"),
        ({"some_new_field": {"strength": 2}}, "some_new_field = .* cannot"),
        ({"revision": "v2"}, "revision = 'v2' cannot"),
        ({"r": 0}, "the rank r must be a whole number above 0; got 0"),
        ({"r": "3"}, "r must be int; got '3'"),
        ({"lora_alpha": "much"}, "lora_alpha must be float; got 'much'"),
        ({"lora_alpha": math.nan}, "the scale lora_alpha must be a number, and not 0; got nan"),
        ({"rank_pattern": {"q_proj": 1.5}}, "the rank q_proj must be a whole number above 0; got 1.5"),
        ({"rank_pattern": {"q_(": 2}}, r"'q_\(' is no pattern of names"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern must be dict"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\); got 1.0"),
    ],
)
def test_settings_that_cannot_be_represented(changes: dict[str, Any], said: str, folder: Path) -> None:
    rewrite(folder, **changes)
    with pytest.raises(UserError, match=said) as caught:
        load_adapter(small("grouped, as Llama"), folder)
    assert str(folder / ADAPTER_CONFIG_FILE) in str(caught.value)


def test_what_peft_writes_by_default_is_nowhere_refused(tmp_path: Path) -> None:
    """Every field of today's `peft`."""
    made_by_peft(theirs(small("as GPT-2"), tmp_path / "base"), tmp_path, r=2, target_modules=["c_attn"])
    values = json.loads((tmp_path / ADAPTER_CONFIG_FILE).read_text())
    assert len(values) > 30
    assert lora.read_settings(tmp_path).base_model_name_or_path == str(tmp_path / "base")


def narrowed(name: str, tensor: Tensor) -> Tensor:
    return tensor[:, :-1].contiguous() if name.endswith("layers.0.self_attn.k_proj.lora_A.weight") else tensor


Tensors = dict[str, Tensor]
UNFIT: dict[str, Callable[[Tensors], Tensors]] = {
    r"up_proj\.lora_B\.weight: missing, expected shape": lambda t: {
        n: x for n, x in t.items() if "1.mlp.up_proj.lora_B" not in n
    },
    r"model\.lm_head\.lora_A\.weight: unexpected": lambda t: t | {f"{lora.PREFIX}lm_head.lora_A.weight": torch.ones(3, 16)},
    r"embed_tokens\.weight: unexpected": lambda t: t | {f"{lora.PREFIX}model.embed_tokens.weight": torch.ones(31, 16)},
    r"k_proj\.lora_A\.weight: torch\.float64, shape \(3, 15\); expected numbers of shape \(3, 16\)": lambda t: {
        n: narrowed(n, x) for n, x in t.items()
    },
    r"torch\.int64": lambda t: {n: x.long() for n, x in t.items()},
    "no adapter in it": lambda t: {},
}


@pytest.mark.parametrize("said", UNFIT)
def test_tensors_that_do_not_fit(said: str, folder: Path) -> None:
    path = folder / lora.ADAPTER_FILE
    safetensors.torch.save_file(UNFIT[said](safetensors.torch.load_file(path)), path)
    model = small("grouped, as Llama")
    with pytest.raises(UserError, match=said) as caught:
        load_adapter(model, folder)
    assert "made for its base" in str(caught.value) and str(path) in str(caught.value)
    assert adapters(model) == {} and all(p.requires_grad for p in model.parameters())


def test_another_base(folder: Path) -> None:
    """Of other widths, and of another architecture: each tensor is named."""
    with pytest.raises(
        UserError, match=r"q_proj.lora_A.weight: torch.float64, shape \(3, 16\); expected numbers of shape \(3, 8\)"
    ):
        load_adapter(noisy(shape(n_layer=2, width=8, **MODERN)), folder)
    with pytest.raises(UserError, match=r"base_model.model.model.layers.1.mlp.gate_proj.lora_A.weight: unexpected"):
        load_adapter(small("as GPT-2"), folder)
    with pytest.raises(UserError, match=r"layers.1.mlp.gate_proj.lora_A.weight: unexpected"):
        load_adapter(noisy(shape(**MODERN | {"n_layer": 1})), folder)


def test_a_damaged_file(folder: Path) -> None:
    path = folder / lora.ADAPTER_FILE
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"adapter_model.safetensors: truncated or not a weights file"):
        load_adapter(small("grouped, as Llama"), folder)


def test_pickles_are_never_opened(folder: Path) -> None:
    (folder / lora.ADAPTER_FILE).unlink()
    with pytest.raises(UserError, match=r"no weights of the adapter; looked for adapter_model.safetensors"):
        load_adapter(small("grouped, as Llama"), folder)
    (folder / "adapter_model.bin").write_bytes(b"cos\nabort\n(tR.")  # a pickle that would end this process
    with pytest.raises(UserError, match=r"adapter_model.bin: running code from a file is refused"):
        load_adapter(small("grouped, as Llama"), folder)
