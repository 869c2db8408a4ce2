"""Quantised networks against plain ones with the same numbers, codes against brute force, files that are not what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import exact
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import glassgpt
from glassgpt import interpret
from glassgpt.config import ModelConfig, UserError
from glassgpt.config.folder import WEIGHTS_FILE, read_config, read_own
from glassgpt.config.hub import Export
from glassgpt.config.model import MoeConfig
from glassgpt.config.quantize import Recipe, stored_bytes
from glassgpt.exporting import export
from glassgpt.interpret.anatomy import anatomy
from glassgpt.interpret.attribution import attribute
from glassgpt.interpret.compare import parameter_differences
from glassgpt.interpret.page.weight_stats import weight_stats
from glassgpt.loading import find_config
from glassgpt.model import GPT, quantised, quantised_files, weights
from glassgpt.model.quantised import Codes, put, round_to_nearest, targets
from glassgpt.text import Tokenizer
from glassgpt.train.loss import Scored

SLOTS: dict[str, dict[str, Any]] = {
    "gpt-2": {},
    "grouped, rotary, gated, rms": {
        "n_kv_head": 2,
        "position": "rope",
        "mlp": "swiglu",
        "mlp_width": 48,
        "norm": "rms",
        "bias": False,
    },
    "untied, qk_norm, capped": {"tied_head": False, "qk_norm": True, "logit_cap": 5.0},
    "experts": {"moe": MoeConfig(experts=3, top_k=2, shared=1, expert_width=16), "mlp": "swiglu"},
}
KINDS: list[tuple[int, int | None, int]] = [(8, None, 8), (8, 8, 8), (4, 8, 8), (4, 16, 4), (4, None, 4)]


def small(config: ModelConfig, bits: int, group: int | None, head_bits: int, activation_bits: Any = 16) -> GPT:
    """A noisy model, quantised."""
    model = exact.noisy(config)
    kinds = {name: head_bits if name in ("token_embedding", "head") else bits for name in targets(model)}
    codes = {name: round_to_nearest(targets(model)[name].get_parameter("weight"), kinds[name], group) for name in kinds}
    return put(model, codes, Recipe(kinds, group, activation_bits=activation_bits))


def by_hand(codes: Codes) -> torch.Tensor:
    """(code - zero) * scale, number by number."""
    N, K = codes.codes.shape
    zero, group = {8: 128, 4: 8}[codes.bits], codes.group or K
    rows = [[(int(codes.codes[n, k]) - zero) * codes.scales[n, k // group].float() for k in range(K)] for n in range(N)]
    return torch.tensor(rows)


# ---------------------------------------------------------------------- the network


@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize(("bits", "group", "head_bits"), KINDS)
def test_logits_are_those_of_the_dequantised_network(slot: str, bits: int, group: int | None, head_bits: int) -> None:
    config = exact.shape(**SLOTS[slot])
    model, plain = small(config, bits, group, head_bits), exact.noisy(config)
    with torch.no_grad():
        for name, module in quantised.quantised_modules(model):
            plain.get_submodule(name).get_parameter("weight").copy_(module.quantised.dequantised())
    ids = exact.tokens(config)
    with torch.no_grad():
        assert exact.error(model(ids), plain(ids)) <= 1e-12
        assert exact.error(quantised.dequantised(model)(ids), plain(ids)) <= 1e-12
        assert exact.error(model(ids), exact.noisy(config)(ids)) > 1e-3  # it was quantised
    assert quantised.parameter_count(model) == sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize("part", ["codes", "scales"])
def test_every_matrix_counts(part: str) -> None:
    config = exact.shape(tied_head=False)
    ids = exact.tokens(config)
    for name in targets(exact.noisy(config)):
        model = small(config, 4, 8, 4)
        before = model(ids)
        tensor = getattr(model.get_submodule(name).matrix, part)
        row = int(ids[0, 0]) % len(tensor)  # which the embedding is asked for
        tensor[row, 0] = tensor[row, 0] * 2 if part == "scales" else tensor[row, 0] ^ 3
        assert exact.error(model(ids), before) > 1e-6, name


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 4), (4, 4), (4, None)])
def test_dequantised_is_the_formula(bits: int, group: int | None) -> None:
    codes = round_to_nearest(exact.random(5, 12), bits, group)
    assert torch.equal(codes.dequantised(), by_hand(codes))
    assert codes.scales.dtype == (torch.float32 if group is None else torch.bfloat16)


def test_routers_norms_and_positions_stay() -> None:
    model = small(exact.shape(**SLOTS["experts"]), 4, 8, 4)
    left = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.ndim == 2}
    assert left == {"weight"}
    assert {name for name, p in model.named_parameters() if p.ndim == 2} == {
        "position_embedding.weight",
        *(f"blocks.{layer}.mlp.router.weight" for layer in range(3)),
    }


def test_scales_keep_their_dtype_and_results_follow_the_model() -> None:
    for group, kept in ((8, torch.bfloat16), (None, torch.float32)):
        model = small(exact.shape(), 8, group, 8)
        before = {name: b.clone() for name, b in model.named_buffers() if name.endswith("scales")}
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            model.to(dtype)
            found = {name: b for name, b in model.named_buffers() if name.endswith("scales")}
            assert all(b.dtype == kept and torch.equal(b, before[name]) for name, b in found.items())
            assert model(exact.tokens(model.config)).dtype == model.head.weight.dtype == dtype


def test_a_tied_head_is_one_matrix() -> None:
    model = small(exact.shape(), 8, None, 8).to(torch.float32)
    assert model.head.matrix is model.token_embedding.matrix
    assert sum(name.endswith("codes") for name, _ in model.named_buffers()) == 1 + 3 * 4


# ---------------------------------------------------------------------- codes


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 4), (4, 4), (4, None)])
def test_codes_are_the_nearest(bits: int, group: int | None) -> None:
    weight = exact.random(6, 12).float()
    found = round_to_nearest(weight, bits, group)
    steps = torch.arange(-127, 128) if bits == 8 else torch.arange(-8, 8)
    for n in range(6):
        for k in range(12):
            values = steps * found.scales[n, k // (group or 12)].float()
            assert float((found.dequantised()[n, k] - weight[n, k]).abs()) == float((values - weight[n, k]).abs().min())
    lowest, highest = (1, 255) if bits == 8 else (0, 15)
    assert lowest <= int(found.codes.min()) and int(found.codes.max()) <= highest


@pytest.mark.parametrize("group", [None, 4, 32])
def test_eight_bits_never_clip(group: int | None) -> None:
    weight = exact.random(64, 32).float()
    found = round_to_nearest(weight, 8, group)
    each = found.scales.float().repeat_interleave(group or 32, dim=1)
    assert bool(((found.dequantised() - weight).abs() <= each / 2 * (1 + 1e-6)).all())
    assert bool((found.scales.float() * 127 >= weight.unflatten(1, (-1, group or 32)).abs().amax(dim=2)).all())


def test_the_scale_of_four_bits_is_the_best_that_was_tried() -> None:
    weight, importance = exact.random(40, 32).float(), exact.random(32, seed=5).float().abs()
    for weighs in (None, importance):
        found = round_to_nearest(weight, 4, 8, weighs)
        weigh = torch.ones(32) if weighs is None else weighs
        errors = ((found.dequantised() - weight).square() * weigh).unflatten(1, (-1, 8)).sum(dim=2)  # (N, groups)
        for factor in (0.7, 0.85, 1.0, 1.1, 8 / 7):
            for n, group in ((0, 0), (7, 3), (39, 1)):
                part = weight[n, group * 8 : group * 8 + 8]
                scale = quantised.stored_scales(part[part.abs().argmax()] / -8 * factor, 8).float()
                rounded = (part / scale).round().clamp(-8, 7) * scale
                error = ((rounded - part).square() * weigh[group * 8 : group * 8 + 8]).sum()
                tried = any(abs(factor - one) < 1e-9 for one in quantised.FACTORS[4])
                assert not tried or float(errors[n, group]) <= float(error) * (1 + 1e-6)
    plain = weight.unflatten(1, (-1, 8)).abs().amax(dim=2, keepdim=True) / 7  # without a search, without signs
    naive = ((weight.unflatten(1, (-1, 8)) / plain).round() * plain).flatten(1)
    assert (round_to_nearest(weight, 4, 8).dequantised() - weight).square().sum() < 0.75 * (naive - weight).square().sum()


def test_scales_are_rounded_outward() -> None:
    scales = torch.cat([exact.random(500).float(), torch.tensor([0.0, 1.0, -1.0, 1 + 2**-8, 1 + 2**-9])])
    found = quantised.stored_scales(scales, 32).float()
    other = torch.where(scales == 0, 1.0, scales)
    assert bool((found.abs() >= other.abs()).all()) and bool((found.sign() == other.sign()).all())
    assert float((found / other - 1).max()) < 2**-7
    assert bool(((found == other) == (other.bfloat16().float() == other)).all())


def test_empty_groups_and_wrong_matrices() -> None:
    weight = exact.random(3, 8)
    weight[1] = 0.0
    for bits in (4, 8):
        assert not round_to_nearest(weight, bits, 4).dequantised()[1].any()
    with pytest.raises(UserError, match="group is 3, which does not divide the matrix's 8 inputs; use a divisor, such as 8"):
        round_to_nearest(weight, 8, 3)
    weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        round_to_nearest(weight, 8, 4)


@pytest.mark.parametrize("K", [1, 2, 7, 8])
def test_packing_loses_nothing(K: int) -> None:
    codes = torch.randint(16, (5, K), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = quantised.pack(codes)
    assert packed.shape == (5, (K + 1) // 2) and packed.dtype == torch.uint8
    assert torch.equal(quantised.unpack(packed, K), codes)
    assert int(packed[0, 0]) % 16 == int(codes[0, 0])  # even columns in the low halves


# ---------------------------------------------------------------------- activations of 8 bits


def test_activations_are_rounded_for_each_token() -> None:
    x = exact.random(2, 3, 8)
    x[0, 0] = 0.0
    found = quantised.rounded_activations(x)
    for b in range(2):
        for t in range(3):
            step = x[b, t].abs().max() / 127 or torch.tensor(1.0)
            expected = torch.tensor([round(float(one / step)) * float(step) for one in x[b, t]], dtype=torch.float64)
            assert exact.error(found[b, t], expected) <= 1e-12


def test_evaluation_rounds_what_the_head_reads() -> None:
    model = small(exact.shape(), 8, 8, 8, activation_bits=8)
    ids = exact.tokens(model.config)
    with torch.no_grad():
        logits, nats = model(ids[:, :-1]), Scored(model).eval()(ids[:, :-1], ids[:, 1:])
        expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        assert exact.error(nats, expected) <= 1e-9
        wide = small(exact.shape(), 8, 8, 8)
        assert exact.error(model(ids), wide(ids)) > 1e-4
        put(wide, {}, wide.head.recipe)
        wide.head = model.head
        assert exact.error(wide(ids), model(ids)) > 1e-4  # not the head alone


# ---------------------------------------------------------------------- files


def folder_of(model: GPT, path: Path) -> Path:
    path.mkdir()
    weights.save(model, path)
    return path


@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize(("bits", "group", "head_bits"), KINDS)
def test_a_folder_gives_the_same_bits(slot: str, bits: int, group: int | None, head_bits: int, tmp_path: Path) -> None:
    model = small(exact.shape(**SLOTS[slot]), bits, group, head_bits, activation_bits=8)
    again = weights.load(folder_of(model, tmp_path / "m")).eval()
    ids = exact.tokens(model.config)
    assert torch.equal(again(ids), model(ids))
    assert quantised.recipe_of(again) == quantised.recipe_of(model) and again.config == model.config
    held = sum(t.numel() * t.element_size() for t in [*again.parameters(), *again.buffers()])
    file = tmp_path / "m" / WEIGHTS_FILE
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert held == file.stat().st_size - header  # nothing else is kept in memory
    facts = anatomy(*find_config(tmp_path / "m"))
    assert facts.stored_bytes == held and facts.parameters == quantised.parameter_count(model)


def test_stored_bytes() -> None:
    assert stored_bytes("int8", 3, 10) == 3 * (10 + 4)
    assert stored_bytes("int4/32", 3, 64) == 3 * (32 + 2 * 2)
    assert stored_bytes("int4", 3, 7) == 3 * (4 + 4)


def tampered(path: Path, change: Any) -> None:
    """Change what a JSON file says."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def set_in_recipe(**changes: Any) -> Any:
    return lambda values: values["quantisation"].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_in_recipe(version=2), "made by a newer GlassGPT (quantisation version 2; this one reads 1): upgrade GlassGPT"),
        (lambda values: values["quantisation"].pop("version"), "quantisation.version must be 1; got None"),
        (lambda values: values.update(quantisation=[]), "quantisation.version must be 1; got None"),
        (set_in_recipe(version="1"), "quantisation.version must be 1; got '1'"),
        (set_in_recipe(grup=8), "unknown key 'quantisation.grup' (did you mean 'group'?)"),
        (set_in_recipe(method="magic"), "quantisation.method must be one of rtn, gptq; got 'magic'"),
        (set_in_recipe(group=0), "group must be at least 1; got 0"),
        (set_in_recipe(group=5), "quantisation.group is 5, which does not divide the 16 inputs of token_embedding"),
        (set_in_recipe(matrices={"blocks.0.mlp.up": 3}), "matrices.blocks.0.mlp.up must have 4 or 8 bits; got 3"),
        (
            set_in_recipe(matrices={"blocks.9.mlp.up": 8}),
            "quantisation.matrices names blocks.9.mlp.up, which this network has not",
        ),
        (
            set_in_recipe(group=None),
            "token_embedding.scales is torch.bfloat16 (31, 2), expected torch.float32 (31, 1) (and 12 more)",
        ),
        (lambda values: values.update(width=32), "are they of another model?"),
        (lambda values: values.update(n_layer=2), "quantisation.matrices names blocks.2.attn.qkv, which this network has not"),
        (lambda values: values.update(n_layer=4), "is missing (and 11 more); are they of another model?"),
        (lambda values: values.pop("quantisation"), "the weights do not fit the configuration"),
    ],
)
def test_a_folder_that_is_not_what_it_says(change: Any, message: str, tmp_path: Path) -> None:
    folder = folder_of(small(exact.shape(), 8, 8, 8), tmp_path / "m")
    tampered(folder / "model.json", change)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        weights.load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value) or "do not fit the configuration" in message


def test_damaged_weights(tmp_path: Path) -> None:
    folder = folder_of(small(exact.shape(), 4, 8, 8), tmp_path / "m")
    file = folder / WEIGHTS_FILE
    whole = file.read_bytes()
    tensors = safetensors.torch.load(whole)  # not from the file, which is cut under it
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="truncated or not a weights file") as caught:
        weights.load(folder)
    assert "\n" not in str(caught.value)
    for name, tensor, message in (
        (
            "blocks.0.mlp.up.codes",
            tensors["blocks.0.mlp.up.codes"].to(torch.int32),
            "is torch.int32 (64, 8), expected torch.uint8",
        ),
        ("blocks.0.mlp.up.scales", tensors["blocks.0.mlp.up.scales"] * torch.nan, "has numbers that are no scales"),
        ("blocks.0.mlp.up.scales", tensors["blocks.0.mlp.up.scales"] * 0, "has numbers that are no scales"),
        ("norm_f.weight", tensors["norm_f.weight"].to(torch.int8), "is torch.int8 (16,), expected numbers (16,)"),
        ("stray", torch.zeros(1), "stray is not expected"),
    ):
        safetensors.torch.save_file(tensors | {name: tensor}, file)
        with pytest.raises(UserError, match=re.escape(message)):
            weights.load(folder)


# ---------------------------------------------------------------------- anywhere in the program


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised model with a tokenizer, as `glassgpt.load` opens it."""
    tokenizer = Tokenizer.train(["the cat sat on the mat, the other cat sat there too. "] * 4, 280)
    config = exact.shape(vocab_size=tokenizer.vocab_size)
    folder = tmp_path_factory.mktemp("quantised") / "m"
    folder_of(small(config, 8, 8, 8).float(), folder)
    tokenizer.save(folder)
    return folder


def test_load_gives_the_codes_or_the_plain_model(stored: Path) -> None:
    (model, _), (plain, _) = (glassgpt.load(stored, dtype=torch.float64, plain=plain) for plain in (False, True))
    ids = exact.tokens(model.config)
    assert quantised.recipe_of(model) is not None and quantised.recipe_of(plain) is None
    assert exact.error(model(ids), plain(ids)) <= 1e-12
    assert all(p.requires_grad and p.is_leaf for p in plain.parameters())
    assert plain.head.weight is plain.token_embedding.weight
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in GPT(plain.config).named_parameters()]
    plain(ids).sum().backward()
    assert all(p.grad is not None for p in plain.parameters())


def test_looking_inside(stored: Path) -> None:
    (model, _), (plain, _) = (glassgpt.load(stored, dtype=torch.float64, plain=plain) for plain in (False, True))
    ids = exact.tokens(model.config, batch=1)
    names = ["blocks.1.attn.pattern", "blocks.2.mlp.hidden", "blocks.0.attn.qkv"]
    with interpret.capture(model, names) as seen, interpret.capture(plain, names) as expected:
        model(ids), plain(ids)
    assert all(exact.error(seen[name].detach(), expected[name].detach()) <= 1e-12 for name in names)
    ours, theirs = (attribute(one, ids[0], 5) for one in (model, plain))
    assert [part.name for part in ours.parts] == [part.name for part in theirs.parts]
    assert max(abs(a.value - b.value) for a, b in zip(ours.parts, theirs.parts, strict=True)) <= 1e-10
    assert list(weight_stats(model)) == list(weight_stats(plain))
    assert all(row.difference == 0 for row in parameter_differences(model, plain))
    assert len(parameter_differences(model, plain)) == len(list(plain.named_parameters()))


@pytest.mark.parametrize("to", ["hf", "gguf", "glassgpt"])
def test_exported_are_the_numbers_that_the_codes_stand_for(stored: Path, to: str, tmp_path: Path) -> None:
    export(Export(str(stored), str(tmp_path / to), to=to))  # type: ignore[arg-type]
    if to == "gguf":
        return  # written by the same function as every other model's
    model, _ = glassgpt.load(stored)
    again, _ = glassgpt.load(tmp_path / to)
    ids = exact.tokens(model.config)
    assert quantised.recipe_of(again) is None and torch.equal(again(ids), model(ids))


def test_the_recipe_is_beside_the_configuration(stored: Path) -> None:
    values = json.loads((stored / "model.json").read_text())
    assert values["quantisation"]["version"] == 1 and values["quantisation"]["matrices"]["blocks.0.attn.qkv"] == 8
    assert read_config(stored) == ModelConfig(**{**exact.SHAPE, "vocab_size": values["vocab_size"]})
    assert set(quantised_files.expected(*read_own(stored))) == set(  # type: ignore[arg-type]
        safetensors.torch.load_file(stored / "model.safetensors")
    )
