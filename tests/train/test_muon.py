"""Muon against PyTorch's own, and what is ours in it: fused maps are parted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from glassgpt.config import OptimConfig, preset
from glassgpt.model import GPT
from glassgpt.train import optim
from glassgpt.train.muon import Muon, orthogonal

RATE, DECAY, MOMENTUM = 0.02, 0.1, 0.9
SHAPES = [(16, 16), (48, 16), (16, 48), (16, 16), (5, 3), (3, 5), (64, 64), (48, 16)]


def gradient(number: int, step: int, shape: tuple[int, ...]) -> torch.Tensor:
    return 1e-3 * torch.randn(shape, generator=torch.Generator().manual_seed(100 * number + step))


def start(shapes: list[tuple[int, int]]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def test_unparted_matrices_move_as_with_pytorchs_muon() -> None:
    ours, theirs = start(SHAPES), start(SHAPES)
    own = Muon(ours, RATE, DECAY, MOMENTUM)
    peer = torch.optim.Muon(theirs, lr=RATE, weight_decay=DECAY, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        for parameters, optimizer in ((ours, own), (theirs, peer)):
            for number, parameter in enumerate(parameters):
                parameter.grad = gradient(number, step, tuple(parameter.shape))
            optimizer.step()
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            rate = RATE * 0.2 * max(a.shape) ** 0.5
            # each step is of numbers up to 1 in bfloat16, whose last place is 2^-8, after five iterations
            assert (a - b).abs().max() < (step + 1) * rate * 0.04, (number, step)
            assert (a - start(SHAPES)[number]).abs().max() > rate * 0.2  # and it does move


def test_a_fused_matrix_moves_as_three() -> None:
    (fused,) = start([(48, 16)])
    parts = [nn.Parameter(part.clone()) for part in fused.detach().chunk(3)]
    together = nn.Parameter(fused.detach().clone())
    optimizers = [Muon([fused], RATE, DECAY, MOMENTUM, lambda _: 3), Muon(parts, RATE, DECAY, MOMENTUM)]
    optimizers.append(Muon([together], RATE, DECAY, MOMENTUM))
    for step in range(3):
        fused.grad = together.grad = gradient(0, step, (48, 16)) * torch.tensor([1.0] * 16 + [10.0] * 16 + [0.1] * 16).view(-1, 1)
        for part, grad in zip(parts, fused.grad.chunk(3), strict=True):
            part.grad = grad
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(fused, torch.cat(parts), rtol=0, atol=1e-6)  # one batched product or three
    assert not torch.allclose(fused, together, rtol=0, atol=1e-2)


@pytest.mark.parametrize("optimizer", ["muon"])
def test_only_qkv_is_parted(optimizer: str) -> None:
    model = GPT(preset("tiny", vocab_size=300))
    _, muon = optim.build(model, OptimConfig(optimizer=optimizer))
    assert isinstance(muon, Muon)
    parts = {name: muon._parts(parameter) for name, parameter in model.named_parameters() if name.startswith("blocks.")}
    assert {name for name, count in parts.items() if count == 3} == {f"blocks.{n}.attn.qkv.weight" for n in range(2)}
    assert set(parts.values()) == {1, 3}


def test_decay_is_decoupled_and_by_the_rate() -> None:
    """No gradient, no direction: what is left is the decay alone."""
    (parameter,) = start([(16, 16)])
    before = parameter.detach().clone()
    muon = Muon([parameter], RATE, DECAY, MOMENTUM)
    for _ in range(3):
        parameter.grad = torch.zeros(16, 16)
        muon.step()
    assert torch.allclose(parameter, before * (1 - RATE * DECAY) ** 3, rtol=1e-6, atol=0)
    parameter.grad = None  # nothing to do, not even decay
    kept = parameter.detach().clone()
    muon.step()
    assert torch.equal(parameter, kept)


def test_the_size_of_the_gradient_does_not_matter() -> None:
    ends = []
    for scale in (1.0, 2.0**-8, 2.0**20):
        (parameter,) = start([(24, 16)])
        parameter.grad = gradient(0, 0, (24, 16)) * scale
        Muon([parameter], RATE, DECAY, MOMENTUM).step()
        ends.append(parameter.detach())
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 64, 16), (2, 16, 64), (1, 1, 8), (1, 8, 1)])
def test_singular_values_come_to_about_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonal(matrices)
    assert found.shape == shape and found.dtype == torch.bfloat16
    values = torch.linalg.svdvals(found.float())
    assert values.max() < 1.3
    # the smallest of a square matrix may be so small that five steps do not lift it; of the others none is
    assert values.min() > (0.2 if shape[1] == shape[2] else 0.5)
    # and the directions stay: U V^T is the closest orthogonal matrix
    U, _, Vh = torch.linalg.svd(matrices, full_matrices=False)
    cosine = (found.float() * (U @ Vh)).sum() / (found.float().norm() * (U @ Vh).norm())
    assert cosine > 0.9


def test_a_zero_matrix_stays_zero() -> None:
    assert torch.equal(orthogonal(torch.zeros(1, 4, 8)), torch.zeros(1, 4, 8, dtype=torch.bfloat16))
