"""Every position against its formula or `transformers`, in float64, and proof that the comparisons would notice a mistake."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from exact import EXACT, error, float64_throughout, noisy, random, shape, tokens
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.t5.modeling_t5 import T5Attention

from glassgpt.config.model import RopeConfig
from glassgpt.model import GPT, plain
from glassgpt.model.attention import masked
from glassgpt.model.position import BUCKETS, POSITIONS, Rope, alibi_slopes, distances, rope_speeds, turned

CPU, WIDE = torch.device("cpu"), torch.float64


def position(name: str, **changes: Any) -> Any:
    """A position alone, its numbers random."""
    made = POSITIONS[name](shape(position=name, **changes)).double()
    for parameter in made.parameters():
        parameter.data = random(*parameter.shape)
    return made


# ---------------------------------------------------------------------- added to the embedding


def test_learned_adds_a_row_for_each_position() -> None:
    learned, x = position("learned"), random(2, 5, 16)
    places = torch.tensor([[0, 0, 1, 2, 3], [7, 8, 9, 10, 23]])
    assert torch.equal(learned.add(x, places), x + learned.weight[places])


def vaswani(place: int, i: int, width: int) -> float:
    """Vaswani et al. 2017, §3.5: number i of the vector of a position."""
    angle = place / 10000 ** (2 * (i // 2) / width)
    return math.cos(angle) if i % 2 else math.sin(angle)


def test_sinusoidal_written_out() -> None:
    x, places = random(2, 4, 16), torch.tensor([[0, 1, 2, 3], [5, 0, 23, 1000]])
    found = position("sinusoidal").add(x, places) - x
    table = [[[vaswani(place, i, 16) for i in range(16)] for place in row] for row in places.tolist()]
    assert error(found, torch.tensor(table, dtype=WIDE)) < 1e-12
    halves = torch.tensor(table, dtype=WIDE).unflatten(-1, (8, 2)).transpose(-1, -2).flatten(-2)  # all sines, then all cosines
    assert error(found, halves) > 0.1


# ---------------------------------------------------------------------- rope

SCALINGS: dict[str, tuple[RopeConfig, dict[str, Any]]] = {
    "none": (RopeConfig(theta=500.0), {"rope_type": "default"}),
    "linear": (RopeConfig(500.0, "linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
    "yarn": (
        RopeConfig(500.0, "yarn", 4.0, 64),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "yarn, own turns and gain": (
        RopeConfig(500.0, "yarn", 4.0, 64, fast_turns=5.0, slow_turns=2.0, attention_factor=1.5),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 5.0, "beta_slow": 2.0}
        | {"attention_factor": 1.5},
    ),
    "smooth": (
        RopeConfig(500.0, "smooth", 8.0, 64, fast_turns=4.0),
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
        | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
}
W = 32


def theirs(values: dict[str, Any]) -> LlamaRotaryEmbedding:
    config = LlamaConfig(
        hidden_size=2 * W, num_attention_heads=2, max_position_embeddings=256, rope_parameters=values | {"rope_theta": 500.0}
    )
    return LlamaRotaryEmbedding(config)


def rotation_error(config: RopeConfig, values: dict[str, Any], later: int = 0) -> float:
    """Our turned queries against theirs, at positions that differ from row to row."""
    x, places = random(2, 3, 6, W), torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 10, 63, 64, 200]])
    rope = Rope(shape(position="rope", width=2 * W, n_head=2, rope=config))
    with float64_throughout():
        rotary = theirs(values)
        cos, sin = rotary(x, places)
        expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    return error(turned(x, rope.rotation(places + later, WIDE)), expected)


@pytest.mark.parametrize("name", SCALINGS)
def test_rope_turns_as_the_published_models(name: str) -> None:
    found = rotation_error(*SCALINGS[name])
    print(f"measured: {name}: turned queries differ by {found:.1e}")
    assert found < EXACT


@pytest.mark.parametrize(
    ("name", "config", "later"),
    [
        ("none", RopeConfig(500.0), 1),
        ("none", RopeConfig(501.0), 0),
        ("linear", RopeConfig(500.0, "ntk", 4.0), 0),
        ("linear", RopeConfig(500.0, "linear", 2.0), 0),
        ("yarn", RopeConfig(500.0, "yarn", 4.0, 65536), 0),
        ("yarn", RopeConfig(500.0, "yarn", 4.0, 64, fast_turns=4.0), 0),
        ("yarn", RopeConfig(500.0, "yarn", 4.0, 64, attention_factor=1.0), 0),
        ("smooth", RopeConfig(500.0, "smooth", 8.0, 64), 0),
        ("smooth", RopeConfig(500.0, "smooth", 8.0, 256, fast_turns=4.0), 0),
    ],
)
def test_another_turn_is_noticed(name: str, config: RopeConfig, later: int) -> None:
    assert rotation_error(config, SCALINGS[name][1], later) > 1e-3


def test_ntk_keeps_the_fastest_pair_and_slows_the_slowest_by_the_factor() -> None:
    """bloc97 2023: theta' = theta * factor ** (W / (W - 2))."""
    speeds, gain = rope_speeds(RopeConfig(500.0, "ntk", 4.0), W, CPU, WIDE)
    theta = 500.0 * 4.0 ** (W / (W - 2))
    assert error(speeds, torch.tensor([theta ** (-2 * i / W) for i in range(W // 2)], dtype=WIDE)) < 1e-15
    before, _ = rope_speeds(RopeConfig(500.0), W, CPU, WIDE)
    assert speeds[0] == before[0] == 1 and gain == 1
    assert float(before[-1] / speeds[-1]) == pytest.approx(4.0, rel=0, abs=1e-12)
    assert rope_speeds(RopeConfig(500.0, "ntk", 4.0), 2, CPU, WIDE)[0].tolist() == [1.0]  # a single pair: nothing to slow


@pytest.mark.parametrize("scaling", ["linear", "ntk", "yarn", "smooth"])
def test_a_factor_of_one_scales_nothing(scaling: Any) -> None:
    speeds, gain = rope_speeds(RopeConfig(500.0, scaling, 1.0, 64), W, CPU, WIDE)
    assert gain == 1 and error(speeds, rope_speeds(RopeConfig(500.0), W, CPU, WIDE)[0]) < 1e-15


def by_complex_numbers(x: Tensor, places: Tensor, sign: int = 1) -> Tensor:
    """Number i and number i + W/2 as one complex number, times e^(i position speed)."""
    half = x.size(-1) // 2
    speeds = 10000.0 ** (-torch.arange(half, dtype=WIDE) / half)
    angles = places.view(-1, 1) * speeds
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), sign * angles)
    return torch.cat((z.real, z.imag), dim=-1)


def test_turned_is_complex_multiplication() -> None:
    x, places = random(2, 4, 9, 8), torch.arange(3, 12)
    found = turned(x, Rope(shape(width=32)).rotation(places, WIDE))
    assert error(found, by_complex_numbers(x, places)) < 1e-13
    assert error(found, by_complex_numbers(x, places, sign=-1)) > 0.1
    assert turned(x, None) is x


def test_rope_knows_distances_alone() -> None:
    """Shift every position of a text: the scores stay. Shift the keys alone: they do not."""
    rope, q, k = Rope(shape(width=32)), random(2, 4, 9, 8), random(2, 4, 9, 8, seed=3)

    def scores(query_shift: int, key_shift: int) -> Tensor:
        at = [rope.rotation(torch.arange(9) + shift, WIDE) for shift in (query_shift, key_shift)]
        return turned(q, at[0]) @ turned(k, at[1]).mT

    assert error(scores(1000, 1000), scores(0, 0)) < 1e-11
    assert error(scores(1000, 1001), scores(0, 0)) > 0.1


def test_positions_are_told_apart_far_out_in_half_precision() -> None:
    """Angles are made in float32 also where the model is bfloat16, in which 1000 and 1001 are one number."""
    rope = Rope(shape(width=32))
    found = rope.rotation(torch.tensor([1000, 1001]), torch.bfloat16)
    exact = rope.rotation(torch.tensor([1000, 1001]), WIDE)
    assert found.dtype == torch.bfloat16 and float((found.double() - exact).abs().max()) < 2**-8


# ---------------------------------------------------------------------- added to the scores


def patterns(bias: Tensor) -> Tensor:
    """Attention's softmax of random scores with a bias (H, T, S)."""
    return masked(random(1, *bias.shape), masked(bias.unsqueeze(0), None)).softmax(dim=-1)


def bloom_error(heads: int, T: int = 20, slopes: list[float] | None = None) -> float:
    alibi = position("alibi", n_head=heads, width=heads)
    alibi.slopes = slopes or alibi.slopes
    with float64_throughout():
        expected = build_alibi_tensor(torch.ones(1, T, dtype=torch.long), heads, WIDE)  # (H, 1, S): the same in every row
    return error(patterns(alibi.bias(T, T, CPU, WIDE)), patterns(expected.expand(heads, T, T)))


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 25])
def test_alibi_is_blooms(heads: int) -> None:
    assert bloom_error(heads) < 1e-12


def test_other_slopes_are_noticed() -> None:
    assert bloom_error(6, slopes=[2 ** (-8 * i / 6) for i in range(1, 7)]) > 1e-3  # as if 6 were a power of two
    assert bloom_error(4, slopes=alibi_slopes(4)[::-1]) > 1e-3


def test_alibi_slopes_of_the_paper() -> None:
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(12) == pytest.approx([2.0**-i for i in range(1, 9)] + [2 ** -(i + 0.5) for i in range(4)], abs=1e-15)


def bucket_numbers(T: int, S: int) -> Tensor:
    """The buckets that `relative` chooses, read off a table in which a bucket's number stands for it."""
    relative = position("relative")
    relative.weight.data = torch.arange(BUCKETS, dtype=WIDE).view(-1, 1).repeat(1, 4)
    bias = relative.bias(T, S, CPU, WIDE)
    assert bias.shape == (4, T, S) and bool((bias == bias[:1]).all())
    return bias[0]


def t5_buckets(T: int, S: int, **changes: Any) -> Tensor:
    values = {"bidirectional": False, "num_buckets": 32, "max_distance": 128} | changes
    return T5Attention._relative_position_bucket(-distances(T, S, CPU), **values).double()


@pytest.mark.parametrize(("T", "S"), [(300, 300), (1, 300), (7, 150)])
def test_relative_has_t5s_buckets(T: int, S: int) -> None:
    assert torch.equal(bucket_numbers(T, S), t5_buckets(T, S))
    for other in ({"max_distance": 127}, {"bidirectional": True}, {"num_buckets": 31}):
        assert not torch.equal(bucket_numbers(T, S), t5_buckets(T, S, **other))


def test_relative_takes_each_heads_own_number() -> None:
    relative = position("relative")
    bias = relative.bias(5, 40, CPU, WIDE)
    for head in range(4):
        for t in range(5):
            for s in range(36 + t):
                bucket = int(t5_buckets(5, 40)[t, s])
                assert bias[head, t, s] == relative.weight[bucket, head]


def test_per_head_is_a_table_of_distances() -> None:
    table = position("per_head")
    bias = table.bias(3, 24, CPU, WIDE)
    for head in range(4):
        for t in range(3):
            for s in range(22 + t):
                assert bias[head, t, s] == table.weight[21 + t - s, head]


def test_a_bias_with_a_cache_is_the_last_rows_of_the_whole() -> None:
    for name in ("alibi", "relative", "per_head"):
        made = position(name)
        whole, last = (masked(made.bias(T, 20, CPU, WIDE).unsqueeze(0), None) for T in (20, 4))
        assert torch.equal(last, whole[:, :, -4:])


def test_every_position_does_one_thing() -> None:
    x, places = random(1, 6, 16), torch.arange(6)
    for name in POSITIONS:
        made = position(name)
        does = [
            not torch.equal(made.add(x, places), x),
            made.rotation(places, WIDE) is not None,
            made.bias(6, 6, CPU, WIDE) is not None,
        ]
        assert sum(does) == (name != "none"), name


# ---------------------------------------------------------------------- in a whole network


def sees_order(model: GPT) -> float:
    """How much the last logits change when two earlier tokens change places."""
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    return error(model(ids)[:, -1], model(ids[:, [0, 3, 2, 1, 4, 5]])[:, -1])


@torch.no_grad()
@pytest.mark.parametrize("name", POSITIONS)
def test_a_network_knows_the_order_of_words_only_from_its_position(name: Any) -> None:
    """Of one layer; a second one knows more, for causal attention sees a different number of words from each place."""
    moved = sees_order(noisy(shape(position=name, n_layer=1)))
    assert moved < 1e-12 if name == "none" else moved > 1e-4


@torch.no_grad()
def test_alibi_with_slopes_of_0_is_no_position() -> None:
    with_slopes, without = noisy(shape(position="alibi")), noisy(shape(position="none"))
    ids = tokens(with_slopes.config)
    assert error(with_slopes(ids), without(ids)) > 0.01
    with_slopes.position_embedding.slopes = [0.0] * 4
    assert error(with_slopes(ids), without(ids)) < EXACT


@torch.no_grad()
def test_positions_of_0_are_no_position() -> None:
    """Tables of zeros, and rope at speed 0, leave the network as one without positions."""
    without, ids = noisy(shape(position="none")), tokens(shape())
    for name in ("learned", "relative", "per_head"):
        model = noisy(shape(position=name))
        model.load_state_dict(without.state_dict(), strict=False)
        assert error(model(ids), without(ids)) > 1e-3
        model.position_embedding.weight.zero_()
        assert error(model(ids), without(ids)) < EXACT
    q, k, v = random(3, 1, 2, 5, 4)
    still = Rope(shape()).rotation(torch.zeros(5, dtype=torch.long), WIDE)
    assert torch.equal(plain(turned(q, still), turned(k, still), v, None, 0.0), plain(q, k, v, None, 0.0))
