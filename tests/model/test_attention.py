"""Attention in blocks of queries, with its gradient written by hand, against the written-out maths."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from glassgpt.config import ModelConfig
from glassgpt.generation.cache import KVCache
from glassgpt.model import GPT, Where, attention, blocked, fused, plain, use_attention
from glassgpt.model.attention import BLOCK_QUERIES, visible
from glassgpt.model.gpt import Block

B, H, W = 3, 2, 4
LENGTHS = (1, 2, BLOCK_QUERIES - 1, BLOCK_QUERIES, BLOCK_QUERIES + 1, 300)
MASKS = ("causal", "written out", "pad", "segments", "pad and segments")


def tensors(T: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    """q, k, v as `Attention` makes them, views of one matrix that wants a gradient; and a gradient for what comes out."""
    generator = torch.Generator().manual_seed(T)
    qkv = torch.randn(B, T, 3, H, W, generator=generator, dtype=torch.float64).to(dtype)
    dz = torch.randn(B, H, T, W, generator=generator, dtype=torch.float64).to(dtype)
    return [x.detach().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4)], dz


def mask(kind: str, T: int) -> Tensor | None:
    pad = torch.tensor([0, T // 3, T - 1]) if "pad" in kind else None
    generator = torch.Generator().manual_seed(1)
    segments = torch.randint(0, 8, (B, T), generator=generator).eq(0).long().cumsum(1) if "segments" in kind else None
    if kind == "written out":
        return torch.ones(1, 1, T, T, dtype=torch.bool).tril()
    return visible(T, T, pad, segments, torch.device("cpu"))


def with_gradients(attend: Any, inputs: list[Tensor], seen: Tensor | None, dz: Tensor) -> list[Tensor]:
    z = attend(*inputs, seen, 0.0)
    return [z.detach(), *torch.autograd.grad(z, inputs, dz)]


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("kind", MASKS)
def test_blocked_is_the_written_out_one(T: int, kind: str) -> None:
    inputs, dz = tensors(T)
    before = [x.detach().clone() for x in (*inputs, dz)]
    seen = mask(kind, T)
    assert (seen is None) is (kind == "causal")
    expected, found = (with_gradients(attend, inputs, seen, dz) for attend in (plain, blocked))
    for name, x, y in zip(("z", "dq", "dk", "dv"), expected, found, strict=True):
        assert y.shape == x.shape and torch.allclose(y, x, rtol=0, atol=1e-12), name
    assert all(torch.equal(x, y) for x, y in zip(before, (*inputs, dz), strict=True))  # nothing given is overwritten


def test_blocked_in_ragged_small_blocks_passes_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK_QUERIES", 2)
    inputs, _ = tensors(5)
    for kind in MASKS:
        seen = mask(kind, 5)
        assert torch.autograd.gradcheck(lambda q, k, v, seen=seen: blocked(q, k, v, seen, 0.0), inputs)


def test_the_gradient_may_be_asked_for_again_and_in_part() -> None:
    (q, k, v), dz = tensors(130)
    z = blocked(q, k, v, None, 0.0)
    first, again = (torch.autograd.grad(z, (q, k, v), dz, retain_graph=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert torch.equal(torch.autograd.grad(blocked(q.detach(), k, v.detach(), None, 0.0), k, dz)[0], first[1])
    with torch.no_grad():
        assert torch.equal(blocked(q, k, v, None, 0.0), z)


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    (q, k, v), _ = tensors(3)
    (dq,) = torch.autograd.grad(plain(q, k, v, None, 0.0).square().sum(), q, create_graph=True)
    assert torch.autograd.grad(dq.sum(), k)[0].any()
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(blocked(q, k, v, None, 0.0).square().sum(), q, create_graph=True)


@pytest.mark.parametrize("kind", ["causal", "pad and segments"])
def test_blocked_in_bf16_rounds_as_the_written_out_one(kind: str) -> None:
    """Against float64 on the same rounded numbers: bfloat16 keeps 8 bits, and the gradient reads z, rounded once more."""
    T = 300
    inputs, dz = tensors(T, torch.bfloat16)
    seen = mask(kind, T)
    exact = with_gradients(plain, [x.detach().double().requires_grad_() for x in inputs], seen, dz.double())
    for attend in (plain, blocked):
        for name, x, y in zip(("z", "dq", "dk", "dv"), exact, with_gradients(attend, inputs, seen, dz), strict=True):
            assert y.dtype == torch.bfloat16
            assert float((y.double() - x).norm() / x.norm()) < (2**-6 if attend is blocked else 2**-7), (attend.__name__, name)


def test_blocked_under_autocast() -> None:
    config = ModelConfig(vocab_size=10, context_tokens=150, n_layer=1, n_head=H, width=H * W)
    torch.manual_seed(0)
    layer = attention.Attention(config, 0)
    x = torch.randn(B, 150, H * W)
    found = []
    for attend in (plain, blocked):
        layer.attend = attend
        given = x.clone().requires_grad_()
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            z = layer(given, Where())
        assert z.dtype == torch.bfloat16
        z.float().square().sum().backward()
        found.append([z.detach().float(), given.grad, *(p.grad for p in layer.parameters())])
    for a, b in zip(*found, strict=True):
        assert a is not None and b is not None and b.dtype == torch.float32
        assert float((a - b).norm()) <= 0.02 * float(a.norm())


def test_with_dropout_or_a_cache_blocked_is_fused() -> None:
    (q, k, v), _ = tensors(9)
    drawn = []
    for attend in (fused, blocked):
        torch.manual_seed(3)
        drawn.append(attend(q, k, v, None, 0.5))
    assert torch.equal(*drawn) and not torch.equal(drawn[1], blocked(q, k, v, None, 0.0))
    for T in (1, 3):
        seen = visible(T, 9, None, None, q.device)
        assert torch.equal(blocked(q[:, :, -T:], k, v, seen, 0.0), fused(q[:, :, -T:], k, v, seen, 0.0))
        assert torch.allclose(blocked(q[:, :, -T:], k, v, seen, 0.0), plain(q, k, v, None, 0.0)[:, :, -T:], rtol=0, atol=1e-12)


def test_a_model_that_attends_in_blocks_decodes_with_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK_QUERIES", 4)
    config = ModelConfig(vocab_size=30, context_tokens=12, n_layer=2, n_head=H, width=H * W)
    torch.manual_seed(0)
    model = GPT(config).double().eval()
    ids = torch.randint(30, (2, 12))
    expected = model(ids)
    use_attention(model, blocked)
    with torch.no_grad():
        cache = KVCache(config)
        parts = [model(ids[:, a:b], cache) for a, b in ((0, 6), (6, 7), (7, 10), (10, 12))]
    assert torch.allclose(torch.cat(parts, 1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_block_attends_in_blocks(backend: str) -> None:
    config = ModelConfig(vocab_size=10, context_tokens=200, n_layer=1, n_head=H, width=H * W)
    torch.manual_seed(0)
    block = Block(config, 0).double()
    use_attention(block, blocked)
    x = torch.randn(B, 200, H * W, dtype=torch.float64)
    found = []
    for run in (block, torch.compile(block, backend=backend, fullgraph=True)):
        for kind in ("causal", "segments"):
            given = x.clone().requires_grad_()
            block.zero_grad()
            z = run(given, Where({"full": mask(kind, 200)}))
            z.square().sum().backward()
            found.append([z.detach(), given.grad, *(p.grad for p in block.parameters())])
    for eager, compiled in zip(found[:2], found[2:], strict=True):
        for a, b in zip(eager, compiled, strict=True):
            assert a is not None and b is not None
            assert torch.allclose(a, b, rtol=0, atol=1e-10 * max(1.0, float(a.abs().max())))


# ---------------------------------------------------------------------- who sees whom


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 6), (4, 6), (6, 6)])
@pytest.mark.parametrize("pad", [None, (0, 2, 5)])
@pytest.mark.parametrize("segments", [None, ((0, 0, 0, 1, 1, 2), (3, 3, 3, 3, 3, 3), (0, 1, 2, 3, 4, 5))])
def test_visible_by_its_definition(T: int, S: int, pad: Any, segments: Any) -> None:
    if segments is not None and (T != S or S == 1):
        segments = None
    pads, numbers = (None if x is None else torch.tensor(x) for x in (pad, segments))
    found = visible(T, S, pads, numbers, torch.device("cpu"))
    if found is None:
        assert pad is None and segments is None and T in (1, S)
        return
    for row in range(3):
        for query in range(S - T, S):
            for key in range(S):
                sees = key <= query
                sees &= pad is None or key >= pad[row] or key == query
                sees &= segments is None or segments[row][key] == segments[row][query]
                assert bool(found[min(row, len(found) - 1), 0, query - (S - T), key]) is sees


def test_scores_are_scaled_by_the_root_of_the_head_width() -> None:
    q, k = torch.zeros(1, 1, 2, 16, dtype=torch.float64), torch.zeros(1, 1, 2, 16, dtype=torch.float64)
    q[..., 0], k[..., 1, 0] = 4.0, 3.0  # the second query scores 0 and 12 / 4
    v = torch.tensor([[1.0], [2.0]], dtype=torch.float64).expand(1, 1, 2, 16)
    weight = math.exp(3) / (1 + math.exp(3))
    for attend in (plain, fused, blocked):
        assert attend(q, k, v, None, 0.0)[0, 0, 1, 0].item() == pytest.approx(1 + weight, abs=1e-12)


# ---------------------------------------------------------------------- FlexAttention, as it is written, not compiled


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("G", [H, 1])
@pytest.mark.parametrize("kind", ["window", "strided", "pad", "segments", "bias", "bias of each row"])
def test_what_a_mask_leaves_empty_may_be_skipped(kind: str, G: int) -> None:
    """What `flexible` gives to PyTorch on a GPU: the same numbers, and a mask that skips blocks."""
    from torch.nn.attention.flex_attention import flex_attention

    T = 300
    (q, k, v), _ = tensors(T)
    q, k, v = q.detach(), k.detach()[:, :G], v.detach()[:, :G]
    if kind in ("window", "strided"):
        seen = visible(T, T, None, None, q.device, kind, 20)  # type: ignore[arg-type]
    elif "bias" in kind:
        rows = B if "row" in kind else 1
        noise = torch.randn(rows, H, T, T, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        seen = attention.masked(noise, None)
    else:
        seen = mask(kind, T)
    assert seen is not None
    found = attention._skipping(q, k, v, seen, None, flex_attention)
    assert torch.allclose(found, plain(q, k, v, seen, 0.0), rtol=0, atol=1e-12)
    assert not torch.allclose(found, plain(q, k, v, None, 0.0), rtol=0, atol=1e-3)
