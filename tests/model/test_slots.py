"""Every way to fill the network's slots: kernels, cache, padding and packing change nothing; shapes keep their promises.

Each property has a mistake beside it that its own comparison must catch.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import EXACT, SHAPE, add_noise, error, errors, noisy, random, shape, tokens
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from glassgpt.config import ModelConfig
from glassgpt.config.model import MoeConfig, RopeConfig
from glassgpt.generation.cache import KVCache, as_batch
from glassgpt.model import GPT, Where, attention, blocked, fused, plain, use_attention
from glassgpt.model import gpt as network
from glassgpt.model.attention import Attend, flexible, visible
from glassgpt.model.weights import load, save

T = SHAPE["context_tokens"]
CPU = torch.device("cpu")
YARN = RopeConfig(scaling="yarn", factor=4.0, original_tokens=24, fast_turns=3.0)
SMOOTH = RopeConfig(scaling="smooth", factor=4.0, original_tokens=24, fast_turns=3.0)
GRID: dict[str, dict[str, Any]] = {
    "as GPT-2": {},
    "sinusoidal": {"position": "sinusoidal"},
    "rope": {"position": "rope"},
    "alibi": {"position": "alibi"},
    "relative": {"position": "relative"},
    "per head": {"position": "per_head"},
    "no position": {"position": "none"},
    "linear rope": {"position": "rope", "rope": RopeConfig(scaling="linear", factor=4.0)},
    "ntk rope, grouped": {"position": "rope", "rope": RopeConfig(scaling="ntk", factor=4.0), "n_kv_head": 2},
    "yarn rope, windows": {"position": "rope", "rope": YARN, "spans": ("full", "window"), "window_tokens": 3},
    "smooth rope, one key head": {"position": "rope", "rope": SMOOTH, "n_kv_head": 1},
    "grouped": {"n_kv_head": 2},
    "one key head": {"n_kv_head": 1, "qk_norm": True},
    "window 1": {"spans": ("window",), "window_tokens": 1},
    "window 3": {"spans": ("window",), "window_tokens": 3},
    "window T": {"spans": ("window",), "window_tokens": T},
    "window above T": {"spans": ("full", "window"), "window_tokens": T + 9},
    "strided": {"spans": ("strided",), "window_tokens": 5},
    "strided by 1": {"spans": ("strided", "full"), "window_tokens": 1},
    "three spans": {"spans": ("full", "strided", "window"), "window_tokens": 4},
    "rms": {"norm": "rms", "embedding_norm": True},
    "no bias": {"bias": False},
    "bias of queries, keys, values alone": {"bias": False, "qkv_bias": True, "mlp": "relu2"},
    "bias but there": {"qkv_bias": False, "mlp": "swiglu"},
    "other attention width": {"attention_width": 24, "attention_scale": 0.7, "tied_head": False},
    "capped": {"logit_cap": 2.0},
    "mixture": {"moe": MoeConfig(experts=4, top_k=2)},
    "mixture, shared, own width": {"mlp": "swiglu", "moe": MoeConfig(5, 2, 2, 7, normalise=False), "position": "rope"},
    "modern": {"position": "rope", "n_kv_head": 2, "spans": ("window", "full"), "window_tokens": 5, "norm": "rms"}
    | {"mlp": "swiglu", "qk_norm": True, "bias": False},
    "slopes and windows": {"position": "alibi", "n_kv_head": 1, "spans": ("strided", "window"), "window_tokens": 5}
    | {"qk_norm": True, "norm": "rms"},
    "buckets and windows": {"position": "relative", "n_kv_head": 2, "spans": ("window",), "window_tokens": 7},
}
KERNELS = (fused, blocked, flexible)

grid = pytest.mark.parametrize("name", GRID)
Change = Callable[[pytest.MonkeyPatch, GPT], object]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that 24 positions cross them."""
    monkeypatch.setattr(attention, "BLOCK_QUERIES", 7)


def made(name: str) -> GPT:
    return noisy(shape(**GRID[name]))


def logits_and_gradients(model: GPT, ids: Tensor, segments: Tensor | None = None) -> list[Tensor]:
    """Of a random weighting of the logits; a gradient for every parameter."""
    logits = model.logits(model.hidden(ids, segments=segments))
    total = (logits * random(*logits.shape)).sum()
    return [logits.detach(), *torch.autograd.grad(total, list(model.parameters()), materialize_grads=True)]


# ---------------------------------------------------------------------- the network, written out


def attention_by_hand(model: GPT, layer: int, x: Tensor) -> Tensor:
    """One query and head after the other: x (T, D) to (T, D)."""
    config, attn = model.config, model.blocks[layer].attn
    H, G, W = config.n_head, config.kv_heads, config.head_width
    span, window = config.span(layer), config.window_tokens or 0
    rows = attn.qkv(x).view(len(x), H + 2 * G, W)
    rotation = model.position_embedding.rotation(torch.arange(len(x)), x.dtype)
    bias = model.position_embedding.bias(len(x), len(x), CPU, x.dtype)

    def prepared(t: int, head: int, of: nn.Module) -> Tensor:
        cos, sin = (1.0, 0.0) if rotation is None else rotation[:, 0, 0, t]
        a, b = (number := of(rows[t, head])).chunk(2)
        return number * cos + torch.cat((-b, a)) * sin

    out = torch.zeros(len(x), H, W, dtype=x.dtype)
    for t in range(len(x)):
        keys = [s for s in range(t + 1) if span == "full" or t - s < window or (span == "strided" and (t - s) % window == 0)]
        for h in range(H):
            g = H + h // (H // G)
            q = prepared(t, h, attn.q_norm)
            scores = [q @ prepared(s, g, attn.k_norm) * (config.attention_scale or W**-0.5) for s in keys]
            if bias is not None:
                scores = [score + bias[h, t, s] for score, s in zip(scores, keys, strict=True)]
            weights = torch.stack(scores).softmax(0)
            out[t, h] = weights @ rows[keys, g + G]
    return attn.out(out.flatten(1))


def network_by_hand(model: GPT, ids: Tensor) -> Tensor:
    """Logits of one text (T,): pre-norm blocks on the sum of the embeddings."""
    config = model.config
    x = model.position_embedding.add(model.token_embedding.weight[ids], torch.arange(len(ids)))
    x = model.embedding_norm(x) if config.embedding_norm else x
    for layer, block in enumerate(model.blocks):
        x = x + attention_by_hand(model, layer, block.norm_1(x))
        x = x + block.mlp(block.norm_2(x))
    logits = model.norm_f(x) @ (model.token_embedding if config.tied_head else model.head).weight.T
    return logits if config.logit_cap is None else config.logit_cap * (logits / config.logit_cap).tanh()


@torch.no_grad()
def by_hand_error(name: str, change: Callable[[GPT], object] = lambda model: None) -> float:
    model = made(name)
    ids = tokens(model.config, 1, 9)
    expected = network_by_hand(model, ids[0])
    change(model)
    return error(model(ids)[0], expected)


@grid
def test_the_network_written_out(name: str) -> None:
    assert by_hand_error(name) < EXACT


def _shared_norm(model: GPT) -> None:
    for block in model.blocks:
        block.attn.k_norm = block.attn.q_norm


def _spans_from_the_second(model: GPT) -> None:
    for block in model.blocks:
        block.attn.span = model.config.span(block.attn.layer + 1)


MUTANTS: dict[str, tuple[str, Callable[[GPT], object]]] = {
    "queries and keys share a norm": ("modern", _shared_norm),
    "the embedding norm left out": ("rms", lambda model: setattr(model, "embedding_norm", nn.Identity())),
    "the pattern of spans begins one late": ("yarn rope, windows", _spans_from_the_second),
    "no scale of its own": (
        "other attention width",
        lambda model: [setattr(block.attn, "scale", None) for block in model.blocks],
    ),
    "the head is the embedding": (
        "other attention width",
        lambda model: setattr(model.head, "weight", model.token_embedding.weight),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mistake_in_the_network_is_noticed(mutant: str) -> None:
    assert by_hand_error(*MUTANTS[mutant]) > 1e-3


# ---------------------------------------------------------------------- the kernels


def kernel_error(name: str, attend: Attend) -> float:
    model = made(name)
    found = []
    for kernel in (plain, attend):
        use_attention(model, kernel)
        found.append(logits_and_gradients(model, tokens(model.config, 2)))
    return errors(found[1], found[0])


@grid
def test_every_kernel_is_the_written_out_one(name: str) -> None:
    """Logits and the gradient of every parameter."""
    for attend in KERNELS:
        assert kernel_error(name, attend) < EXACT, attend.__name__


def _without_mask(*given: Any) -> Tensor:
    return fused(*given[:3], None, *given[4:])


def _without_scale(*given: Any) -> Tensor:
    return fused(*given[:5])


def _key_heads_in_turn(*given: Any) -> Tensor:
    """Query head h reads key head h modulo G in place of h / (H / G)."""
    q, k, v, *rest = given
    times = q.size(1) // k.size(1)
    return fused(q, k.repeat(1, times, 1, 1), v.repeat(1, times, 1, 1), *rest)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("window 3", _without_mask),
        ("strided", _without_mask),
        ("alibi", _without_mask),
        ("relative", _without_mask),
        ("other attention width", _without_scale),
        ("grouped", _key_heads_in_turn),
    ],
)
def test_a_wrong_kernel_is_noticed(name: str, wrong: Attend) -> None:
    assert kernel_error(name, lambda *given: wrong(*given)) > 1e-3


@pytest.mark.filterwarnings("ignore")  # they say why a kernel was not used
def test_which_kernel_runs() -> None:
    """The causal case is flash attention, without a mask; a mask needs another: PyTorch refuses where it cannot obey."""
    q, k, v = random(3, 2, 4, 16, 8).float()
    k, v = k[:, :2], v[:, :2]
    expected = plain(q, k, v, None, 0.0)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert torch.allclose(fused(q, k, v, None, 0.0), expected, rtol=0, atol=1e-5)
        with pytest.raises(RuntimeError, match="No available kernel"):
            fused(q.requires_grad_(), k, v, None, 0.5)
    q = q.detach()
    for window in (3, 16):
        mask = visible(16, 16, torch.tensor([0, 2]), None, CPU, "window", window)
        with sdpa_kernel(SDPBackend.MATH):
            found = fused(q, k, v, mask, 0.0)
        assert torch.allclose(found, plain(q, k, v, mask, 0.0), rtol=0, atol=1e-5)


@grid
def test_plain_spans_ask_for_no_mask(name: str) -> None:
    """A mask would cost the fast kernel: a full span without a bias has none, nor has a window that sees everything."""
    model = made(name)
    masks = model._masks(tokens(model.config, 1), None, None, None, torch.float64)
    assert set(masks) == {model.config.span(layer) for layer in range(model.config.n_layer)}
    for span, mask in masks.items():
        wide = span == "full" or (model.config.window_tokens or 0) >= T
        assert (mask is None) is (wide and model.config.position not in ("alibi", "relative", "per_head"))


# ---------------------------------------------------------------------- who sees whom


@pytest.mark.parametrize("window", [1, 2, 3, 6, 9])
@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (1, 6), (4, 6), (1, 1)])
def test_spans_by_their_definition(window: int, queries: int, keys: int) -> None:
    """Child et al. 2019 for the strided one: the last `window`, and every `window`-th before them."""
    for span in ("window", "strided"):
        found = visible(queries, keys, None, None, CPU, span, window)
        if found is None:
            assert window >= keys
            continue
        for t in range(queries):
            for s in range(keys):
                back = keys - queries + t - s
                near = 0 <= back < window
                assert bool(found[0, 0, t, s]) is (near or (span == "strided" and back >= 0 and back % window == 0))


@contextlib.contextmanager
def mistaken(change: Change | None, model: GPT) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if change is not None:
            change(patch, model)
        yield


def _sees_the_next(patch: pytest.MonkeyPatch, model: GPT) -> None:
    patch.setattr(attention, "distances", lambda *given: network_distances(*given) + 1)


def _wider_by_one(patch: pytest.MonkeyPatch, model: GPT) -> None:
    patch.setattr(network, "visible", lambda *given: visible(*given[:-1], given[-1] + 1))


network_distances = attention.distances


@torch.no_grad()
def leak(name: str, change: Change | None = None) -> float:
    """How much a changed token changes the logits before it."""
    model = made(name)
    ids = tokens(model.config)
    use_attention(model, plain)
    worst = 0.0
    with mistaken(change, model):
        before = model(ids)
        for t in (1, 12, T - 1):
            other = ids.clone()
            other[:, t] = (other[:, t] + 1) % model.config.vocab_size
            after = model(other)
            assert not torch.equal(after[:, t], before[:, t])
            worst = max(worst, error(after[:, :t], before[:, :t]))
    return worst


@grid
def test_a_token_changes_nothing_before_it(name: str) -> None:
    """To the last bit; but experts count their tokens, and a product of another size may round elsewhere."""
    assert leak(name) <= (1e-12 if "mixture" in name else 0.0)


@pytest.mark.parametrize("name", ["window 3", "strided", "three spans", "modern", "slopes and windows"])
def test_a_token_that_sees_the_next_is_noticed(name: str) -> None:
    assert leak(name, _sees_the_next) > 1e-6


@torch.no_grad()
def reach(span: Any, window: int, change: Change | None = None) -> list[int]:
    """How far back each position that the last logits of a single layer depend on lies."""
    model = noisy(shape(n_layer=1, spans=(span,), window_tokens=window))
    ids, found = tokens(model.config, 1), []
    with mistaken(change, model):
        before = model(ids)[:, -1]
        for back in range(T):
            other = ids.clone()
            other[:, T - 1 - back] = (other[:, T - 1 - back] + 1) % model.config.vocab_size
            if not torch.equal(model(other)[:, -1], before):
                found.append(back)
    return found


@pytest.mark.parametrize("window", [1, 2, 5, T])
def test_a_window_reaches_so_far_and_no_further(window: int) -> None:
    assert reach("window", window) == list(range(window))
    assert reach("strided", window) == sorted({*range(window), *range(0, T, window)})
    if window < T:
        assert reach("window", window, _wider_by_one) != list(range(window))


@torch.no_grad()
def test_window_1_is_each_token_alone() -> None:
    """Its own value is all that it sees: every position as if it were a text of one token."""
    windowed = noisy(shape(spans=("window",), window_tokens=1, position="rope"))
    ids = tokens(windowed.config, 1)
    alone = torch.cat([windowed(ids[:, t : t + 1]) for t in range(T)], dim=1)
    assert error(windowed(ids), alone) < EXACT
    with mistaken(_wider_by_one, windowed):
        assert error(windowed(ids), alone) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("span", ["window", "strided"])
@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_a_window_as_long_as_the_text_is_full(span: Any, position: Any) -> None:
    """To the last bit. A shorter one is another network, but for `strided` with a window of 1, which skips nothing."""
    full = noisy(shape(position=position))
    ids = tokens(full.config)
    for window in (T, T + 1, 10 * T):
        assert torch.equal(noisy(shape(position=position, spans=(span,), window_tokens=window))(ids), full(ids))
    for window in (T - 1, 3) if span == "window" else (T // 2, 3):
        assert error(noisy(shape(position=position, spans=(span,), window_tokens=window))(ids), full(ids)) > 1e-6
    if span == "strided":
        assert error(noisy(shape(position=position, spans=(span,), window_tokens=1))(ids), full(ids)) < EXACT


# ---------------------------------------------------------------------- with a cache, in a batch, packed


def _cache_loses_one(patch: pytest.MonkeyPatch, model: GPT) -> None:
    """A windowed layer that drops a position too early."""
    patch.setattr(KVCache, "held", lambda cache, layer: max(0, min(cache.length, (model.config.window_tokens or 0) - 2)))


def _positions_from_0(patch: pytest.MonkeyPatch, model: GPT) -> None:
    """Each call counts its positions anew."""
    real = network._positions
    patch.setattr(network, "_positions", lambda ids, start, pad, segments: real(ids, 0, pad, segments))


def _keys_at_the_start(patch: pytest.MonkeyPatch, model: GPT) -> None:
    """Every call but the first stands at position 1."""
    real = network._positions
    patch.setattr(network, "_positions", lambda ids, start, pad, segments: real(ids, min(start, 1), pad, segments))


def _pad_one_short(patch: pytest.MonkeyPatch, model: GPT) -> None:
    short = lambda pad: pad if pad is None else (pad - 1).clamp(min=0)  # noqa: E731
    patch.setattr(network, "visible", lambda T, S, pad, *rest: visible(T, S, short(pad), *rest))


def _borders_ignored(patch: pytest.MonkeyPatch, model: GPT) -> None:
    patch.setattr(network, "visible", lambda T, S, pad, segments, *rest: visible(T, S, pad, None, *rest))


@torch.no_grad()
def cache_error(name: str, change: Change | None = None, sizes: tuple[int, ...] = (9, 1, 5, 1, 8)) -> float:
    model = made(name)
    ids = tokens(model.config)
    expected = model(ids)
    cache = KVCache(model.config)
    with mistaken(change, model):
        return error(torch.cat([model(part, cache) for part in ids.split(sizes, dim=1)], dim=1), expected)


@grid
def test_cached_is_uncached(name: str) -> None:
    for sizes in ((9, 1, 1, 5, 1, 2, 1, 1, 1, 1, 1), (*[1] * 8, 16), (2, 22), (T - 1, 1)):
        assert cache_error(name, sizes=sizes) < EXACT, sizes


@torch.no_grad()
def batch_error(name: str, change: Change | None = None) -> float:
    """Ragged prompts padded on the left, two tokens more with a cache, then one row gone, then three more tokens at once."""
    model = made(name)
    lengths, more = (5, 11, 2), 6
    alone = [tokens(model.config, 1, n + more, seed=n)[0] for n in lengths]
    expected = [model(row[None])[0, -more - 1 :] for row in alone]
    ids, pad = as_batch([row[:n].tolist() for n, row in zip(lengths, alone, strict=True)], CPU)
    rest = torch.stack([row[-more:] for row in alone])
    assert pad is not None and pad.tolist() == [6, 0, 9]
    cache = KVCache(model.config)
    with mistaken(change, model):
        found = [model(ids, cache, pad)[:, -1:], *(model(rest[:, t : t + 1], cache, pad) for t in range(3))]
        rows = torch.tensor([2, 0])
        cache.keep(rows, 6)
        later = model(rest[rows, 3:], cache, pad[rows] - 6)
    worst = max(error(torch.cat(found, dim=1)[row], expected[row][:4]) for row in range(3))
    return max(worst, *(error(later[place], expected[row][4:]) for place, row in enumerate(rows.tolist())))


@grid
def test_a_padded_batch_that_shrinks_is_each_row_alone(name: str) -> None:
    assert batch_error(name) < EXACT


SEGMENTS = torch.tensor([[0] * 5 + [1] + [2] * 9 + [3] * 9, [0] * T, list(range(T))])


def packed_error(name: str, change: Change | None = None) -> float:
    """Logits and gradients of packed documents against each document alone."""
    model = made(name)
    ids = tokens(model.config)
    with mistaken(change, model):
        packed = logits_and_gradients(model, ids, SEGMENTS)
    logits = torch.zeros_like(packed[0])
    for row in range(len(ids)):
        for number in SEGMENTS[row].unique():
            of = SEGMENTS[row] == number
            logits[row, of] = model(ids[row : row + 1, of])[0]
    total = (logits * random(*logits.shape)).sum()
    return errors(packed, [logits.detach(), *torch.autograd.grad(total, list(model.parameters()))])


@grid
def test_packed_documents_are_as_if_alone(name: str) -> None:
    assert packed_error(name) < EXACT


@pytest.mark.parametrize(
    ("measure", "name", "change"),
    [
        (cache_error, "window 3", _cache_loses_one),
        (cache_error, "rope", _keys_at_the_start),
        (cache_error, "sinusoidal", _positions_from_0),
        (cache_error, "yarn rope, windows", _positions_from_0),
        (batch_error, "rope", _pad_one_short),
        (batch_error, "alibi", _pad_one_short),
        (batch_error, "yarn rope, windows", _pad_one_short),
        (batch_error, "window 3", _cache_loses_one),
        (packed_error, "rope", _borders_ignored),
        (packed_error, "relative", _borders_ignored),
        (packed_error, "three spans", _borders_ignored),
    ],
)
def test_a_mistake_with_cache_padding_or_packing_is_noticed(measure: Any, name: str, change: Change) -> None:
    assert measure(name, change) > 1e-4


# ---------------------------------------------------------------------- shapes that must come to the same


def linear(module: nn.Linear) -> list[nn.Parameter]:
    return [module.weight] if module.bias is None else [module.weight, module.bias]


@torch.no_grad()
def copied_heads_error(wrong_order: bool = False) -> float:
    """Shared key/value heads against as many heads as queries have, each a copy of the shared one."""
    few = noisy(shape(n_kv_head=2, position="rope", qk_norm=True))
    every = GPT(shape(position="rope", qk_norm=True)).double().eval()
    state = few.state_dict()
    for name in state:
        if ".qkv." in name:
            q, k, v = state[name].split([16, 8, 8])
            wide = (2, 4, -1)  # G heads of W numbers
            again = [x.reshape(wide).repeat(2, 1, 1) if wrong_order else x.reshape(wide).repeat_interleave(2, 0) for x in (k, v)]
            state[name] = torch.cat([q.reshape(16, -1), *(x.flatten(0, 1) for x in again)]).view(-1, *q.shape[1:])
    every.load_state_dict(state)
    ids = tokens(few.config)
    return error(few(ids), every(ids))


def test_shared_keys_are_copied_keys() -> None:
    assert copied_heads_error() < EXACT
    assert copied_heads_error(wrong_order=True) > 0.01


@torch.no_grad()
@pytest.mark.parametrize("mlp", ["gelu", "swiglu", "relu2"])
def test_one_expert_is_dense(mlp: Any) -> None:
    """Normalised, or not: a softmax over one expert is 1. A shared one beside it is not dense."""
    plain_one = noisy(shape(mlp=mlp))
    ids = tokens(plain_one.config)
    for moe in (MoeConfig(1, 1), MoeConfig(1, 1, normalise=False), MoeConfig(1, 1, 1, plain_one.config.hidden_width)):
        mixture = noisy(shape(mlp=mlp, moe=moe))
        state = mixture.state_dict()
        for name, tensor in plain_one.state_dict().items():
            for place in ("mlp.", "mlp.experts.0.", "mlp.shared.0."):
                if (there := name.replace("mlp.", place)) in state:
                    state[there] = tensor
        mixture.load_state_dict(state)
        differs = error(mixture(ids), plain_one(ids))
        assert differs < EXACT if not moe.shared else differs > 0.01


def written_out(model: GPT, x: Tensor) -> Tensor:
    """A block's MLP by its formula."""
    mlp = model.blocks[0].mlp
    if model.config.mlp == "swiglu":
        gate = x @ mlp.gate.weight.T + mlp.gate.bias
        hidden = gate / (1 + (-gate).exp()) * (x @ mlp.up.weight.T + mlp.up.bias)
    else:
        up = x @ mlp.up.weight.T + mlp.up.bias
        curve = 0.5 * up * (1 + (2**0.5 / torch.pi**0.5 * (up + 0.044715 * up**3)).tanh())
        hidden = curve if model.config.mlp == "gelu" else up.clamp(min=0) ** 2
    return hidden @ mlp.down.weight.T + mlp.down.bias


@torch.no_grad()
@pytest.mark.parametrize("mlp", ["gelu", "swiglu", "relu2"])
def test_mlps_written_out(mlp: Any) -> None:
    model, x = noisy(shape(mlp=mlp)), random(2, 3, 16)
    assert error(model.blocks[0].mlp(x), written_out(model, x)) < 1e-12
    if mlp == "swiglu":
        model.blocks[0].mlp.gate, model.blocks[0].mlp.up = model.blocks[0].mlp.up, model.blocks[0].mlp.gate
    else:
        model.blocks[0].mlp.act = nn.functional.gelu  # the exact one
    x = 3 * x
    swapped = model.blocks[0].mlp(x)
    if mlp == "swiglu":
        model.blocks[0].mlp.gate, model.blocks[0].mlp.up = model.blocks[0].mlp.up, model.blocks[0].mlp.gate
    assert error(swapped, written_out(model, x)) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms_written_out(kind: Any) -> None:
    """Also of queries and keys, head by head."""
    model = noisy(shape(norm=kind, qk_norm=True, norm_eps=0.01))
    for module, x in ((model.norm_f, random(2, 5, 16)), (model.blocks[1].attn.q_norm, random(2, 4, 5, 4))):
        mean = x.mean(-1, keepdim=True) if kind == "layer" else 0.0
        expected = (x - mean) / (((x - mean) ** 2).mean(-1, keepdim=True) + 0.01).sqrt() * module.weight
        expected = expected + module.bias if kind == "layer" else expected
        assert error(module(x), expected) < 1e-13
        module.eps = 1e-5
        assert error(module(x), expected) > 1e-4


@torch.no_grad()
def test_rms_of_half_precision_is_taken_in_float32() -> None:
    """What autocast hands to the norm of queries and keys: bfloat16, beside weights in float32."""
    module = noisy(shape(norm="rms", qk_norm=True), torch.float32).blocks[0].attn.q_norm
    x = random(2, 4, 5, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = module(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, module(x.float()).bfloat16())


@torch.no_grad()
def test_the_cap_bounds_the_logits_and_hardly_moves_small_ones() -> None:
    free, capped = noisy(shape()), noisy(shape(logit_cap=2.0))
    ids = tokens(free.config)
    assert float(free(ids).abs().max()) > 3
    assert float(capped(ids).abs().max()) < 2
    assert error(capped(ids), 2 * (free(ids) / 2).tanh()) < 1e-12
    assert error(noisy(shape(logit_cap=1e6))(ids), free(ids)) < 1e-9


@torch.no_grad()
def test_what_a_shape_leaves_out() -> None:
    """Biases, norms and widths are where the configuration says, and nowhere else."""
    names = {name: dict(noisy(shape(**GRID[name])).named_parameters()) for name in GRID}
    assert not any(name.endswith("bias") for name in names["no bias"])
    with_bias = [name for name in names["bias of queries, keys, values alone"] if name.endswith("bias")]
    assert with_bias == [f"blocks.{layer}.attn.qkv.bias" for layer in range(3)]
    assert not any(name.endswith("qkv.bias") for name in names["bias but there"])
    assert any(name.endswith("gate.bias") for name in names["bias but there"])
    assert {name for name in names["rms"] if "norm" in name and name.endswith("bias")} == set()
    assert "embedding_norm.weight" in names["rms"] and "embedding_norm.weight" not in names["as GPT-2"]
    wide = names["other attention width"]
    assert (wide["blocks.0.attn.qkv.weight"].shape, wide["blocks.0.attn.out.weight"].shape) == ((72, 16), (16, 24))
    assert names["grouped"]["blocks.0.attn.qkv.weight"].shape == (16 + 2 * 8, 16)
    assert names["one key head"]["blocks.0.attn.q_norm.weight"].shape == (4,)
    for name in ("sinusoidal", "rope", "alibi", "no position"):
        assert not any("position" in parameter for parameter in names[name])


# ---------------------------------------------------------------------- precision, compilation, copies, files


@grid
def test_bf16_runs_and_is_close(name: str) -> None:
    """Whole and under autocast, with a cache and without. A router may choose another expert, so mixtures are only run."""
    exact = noisy(shape(**GRID[name]), size=0.1)
    ids = tokens(exact.config, 2)
    with torch.no_grad():
        expected = exact(ids)
    for attend in (plain, fused, blocked):
        for whole in (True, False):
            model = copy.deepcopy(exact).to(torch.bfloat16 if whole else torch.float32)
            use_attention(model, attend)
            with torch.autocast("cpu", torch.bfloat16, enabled=not whole):
                logits = model(ids)
                logits.float().square().mean().backward()
                with torch.no_grad():
                    cache = KVCache(model.config)
                    cached = torch.cat([model(part, cache) for part in ids.split([10, 1, 13], dim=1)], dim=1)
            assert logits.dtype == cached.dtype == torch.bfloat16
            assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
            for found in (logits, cached):
                share = float((found.detach().double() - expected).norm() / expected.norm())
                assert share < (0.5 if "mixture" in name else 0.04), (attend.__name__, whole, share)


COMPILED = ("modern", "buckets and windows", "mixture, shared, own width")


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_blocks_are_the_eager_ones(name: str) -> None:
    """In one graph each, but for mixtures, whose experts get as many tokens as come."""
    torch._dynamo.reset()
    model = noisy(shape(**GRID[name] | {"n_layer": 2}))
    ids = tokens(model.config, 2)
    use_attention(model, blocked)
    expected = logits_and_gradients(model, ids)
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph="mixture" not in name)
    assert errors(logits_and_gradients(model, ids), expected) < EXACT


@grid
def test_copies_and_files_keep_every_bit(name: str, tmp_path: Path) -> None:
    model = noisy(shape(**GRID[name]), torch.float32)
    save(model, tmp_path)
    ids = tokens(model.config, 1)
    with torch.no_grad():
        for other in (copy.deepcopy(model), load(tmp_path).eval()):
            assert other.config == model.config
            assert other.state_dict().keys() == model.state_dict().keys()
            assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))
            assert torch.allclose(other(ids), model(ids), rtol=0, atol=1e-5)  # where memory lies otherwise, sums may round so
            add_noise(other)
            assert not torch.equal(other(ids), model(ids))  # it was a copy


def test_a_block_can_be_run_alone() -> None:
    block = made("modern").blocks[0]
    x = random(2, 6, 16)
    assert block(x, Where()).shape == x.shape


def test_the_grid_fills_every_slot() -> None:
    """No choice that a configuration has is left out above."""
    configs = [shape(**changes) for changes in GRID.values()]
    fields = {"position": 7, "norm": 2, "mlp": 3, "bias": 2, "qkv_bias": 3, "tied_head": 2, "embedding_norm": 2, "qk_norm": 2}
    for name, count in fields.items():
        assert len({getattr(config, name) for config in configs}) == count, name
    assert {config.rope.scaling for config in configs} == {"none", "linear", "ntk", "yarn", "smooth"}
    assert {span for config in configs for span in config.spans} == {"full", "window", "strided"}
    assert {config.kv_heads for config in configs} == {1, 2, 4}
    assert isinstance(configs[0], ModelConfig)
