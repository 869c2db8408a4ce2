"""The mixture of experts: its routing by hand, its layer and losses against `transformers`, and how it trains."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact import EXACT, add_noise, error, errors, float64_throughout, noisy, random, shape, tokens
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from glassgpt.config import ModelConfig, OptimConfig, preset
from glassgpt.config.model import MoeConfig
from glassgpt.model import GPT, Routes, Where
from glassgpt.model.mlp import Mixture
from glassgpt.train import optim
from glassgpt.train.loss import IGNORE, Scored, routing, token_loss
from glassgpt.train.muon import Muon

E, D = 5, 16
EAGER = {"experts_implementation": "eager"}


def config(experts: int = E, top_k: int = 2, **changes: Any) -> ModelConfig:
    moe = {key: changes.pop(key) for key in list(changes) if key in MoeConfig.__dataclass_fields__}
    return shape(mlp="swiglu", moe=MoeConfig(experts, top_k, **moe), **changes)


def layer(**changes: Any) -> Mixture:
    """One mixture, random."""
    made = Mixture(config(**changes)).double()
    add_noise(made)
    return made


# ---------------------------------------------------------------------- routing


def by_hand(mixture: Mixture, x: Tensor, top_k: int, normalise: bool, shared: bool = True) -> Tensor:
    """Token by token: softmax of the scores, the `top_k` largest, their experts' outputs weighted by them."""
    out = []
    for token in x.flatten(0, -2):
        powers = [math.exp(float(row @ token)) for row in mixture.router.weight]
        shares = [power / sum(powers) for power in powers]
        chosen = sorted(range(len(shares)), key=lambda e: -shares[e])[:top_k]
        whole = sum(shares[e] for e in chosen) if normalise else 1.0
        total = torch.zeros_like(token)
        for e in chosen:
            total = total + shares[e] / whole * mixture.experts[e](token)
        for expert in mixture.shared if shared else ():
            total = total + expert(token)
        out.append(total)
    return torch.stack(out).view(x.shape)


@torch.no_grad()
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, E])
@pytest.mark.parametrize("shared", [0, 2])
def test_routing_by_hand(top_k: int, normalise: bool, shared: int) -> None:
    mixture, x = layer(top_k=top_k, normalise=normalise, shared=shared), random(2, 7, D)
    found = mixture(x)
    assert error(found, by_hand(mixture, x, top_k, normalise)) < 1e-12
    if shared:
        assert error(found, by_hand(mixture, x, top_k, normalise, shared=False)) > 1e-3
    if top_k < E:
        assert error(found, by_hand(mixture, x, top_k, not normalise)) > 1e-3
        assert error(found, by_hand(mixture, x, top_k + 1, normalise)) > 1e-4


@torch.no_grad()
def test_all_experts_weighted_alike_when_the_router_knows_nothing() -> None:
    """All ties: each token goes to `top_k` different experts, each with the same weight."""
    mixture, x = layer(top_k=E), random(3, D)
    mixture.router.weight.zero_()
    assert error(mixture(x), sum((expert(x) for expert in mixture.experts), torch.zeros_like(x)) / E) < 1e-13


def counts(mixture: Mixture, run: Callable[[], object]) -> Tensor:
    """How many tokens each expert got."""
    seen = torch.zeros(len(mixture.experts))

    def note(expert: nn.Module, given: tuple[Tensor]) -> None:
        seen[list(mixture.experts).index(expert)] += len(given[0])

    handles = [expert.register_forward_pre_hook(note) for expert in mixture.experts]
    run()
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ties", ["few", "many"])
def test_the_usage_that_is_reported_is_what_the_experts_saw(dtype: torch.dtype, ties: str) -> None:
    """Where scores tie, too, as they often do in bfloat16: both choose the same."""
    mixture, x, routes = layer().to(dtype), random(1, 300, D).to(dtype), Routes()
    if ties == "many":
        mixture.router.weight[1:4] = mixture.router.weight[0]
    seen = counts(mixture, lambda: mixture(x, Where(routes=routes)))
    assert seen.sum() == 300 * 2  # no token is dropped, none is seen twice
    found = routing(routes, 2).usage
    assert found.shape == (1, E) and float((found[0] - seen / 600).abs().max()) < 1e-6


def test_no_token_goes_to_an_expert_twice_and_all_get_gradients() -> None:
    """An expert without tokens has a gradient of zeros: every rank has the same parameters to reduce, and AdamW its state."""
    mixture, x = layer(top_k=1), random(2, 3, D)
    with torch.no_grad():
        mixture.router.weight.zero_()
        mixture.router.weight[2] = 1e-3 * torch.ones(D)
    x = x.abs()  # all tokens to expert 2
    gradients = torch.autograd.grad(mixture(x).square().sum(), list(mixture.experts.parameters()))
    per_expert = len(gradients) // E
    for e in range(E):
        some = any(bool(g.any()) for g in gradients[e * per_expert : (e + 1) * per_expert])
        assert some is (e == 2)


def test_the_router_learns_through_the_weights() -> None:
    """The gradient by the router is that of the sum written out, with the choice held fixed."""
    mixture, x = layer(), random(6, D)
    weight = random(6, D, seed=3)
    (found,) = torch.autograd.grad((mixture(x) * weight).sum(), mixture.router.weight)
    shares = (x @ mixture.router.weight.T).softmax(-1)
    chosen = torch.zeros_like(shares).scatter(1, shares.topk(2).indices, 1.0)
    kept = shares * chosen
    outputs = torch.stack([expert(x) for expert in mixture.experts], dim=1)  # (N, E, D)
    for total, same in ((kept.sum(-1, keepdim=True), True), (kept.sum(-1, keepdim=True).detach(), False)):
        out = ((kept / total).unsqueeze(-1) * outputs).sum(1)
        (expected,) = torch.autograd.grad((out * weight).sum(), mixture.router.weight, retain_graph=True)
        assert (error(found, expected) < 1e-12) is same


# ---------------------------------------------------------------------- against transformers


def oracle(kind: str) -> tuple[nn.Module, Mixture]:
    """Their sparse block with noise on everything, and ours with its weights."""
    if kind == "normalised":
        theirs: nn.Module = MixtralSparseMoeBlock(
            MixtralConfig(hidden_size=D, intermediate_size=12, num_local_experts=E, num_experts_per_tok=2, **EAGER)
        )
    else:
        theirs = Qwen3MoeSparseMoeBlock(
            Qwen3MoeConfig(
                hidden_size=D, moe_intermediate_size=12, num_experts=E, num_experts_per_tok=2, norm_topk_prob=False, **EAGER
            )
        )  # fmt: skip
    theirs = theirs.double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()  # some are not initialised
    add_noise(theirs)
    ours = Mixture(config(normalise=kind == "normalised", expert_width=12, bias=False)).double()
    gate, up = theirs.experts.gate_up_proj.chunk(2, dim=1)
    with torch.no_grad():
        ours.router.weight.copy_(theirs.gate.weight)
        for e, expert in enumerate(ours.experts):
            expert.gate.weight.copy_(gate[e])
            expert.up.weight.copy_(up[e])
            expert.down.weight.copy_(theirs.experts.down_proj[e])
    return theirs, ours


def layer_errors(kind: str, change: Callable[[Mixture], object] = lambda mixture: None) -> float:
    """Outputs, and gradients by the input and the router."""
    theirs, ours = oracle(kind)
    with torch.no_grad():
        change(ours)
    results = []
    for module, router in ((theirs, theirs.gate.weight), (ours, ours.router.weight)):
        x = random(2, 9, D).requires_grad_()
        with float64_throughout():
            out = module(x)
            results.append([out.detach(), *torch.autograd.grad(out.square().sum(), (x, router))])
    return errors(results[1], results[0])


@pytest.mark.parametrize("kind", ["normalised", "as they are"])
def test_the_layer_is_theirs(kind: str) -> None:
    found = layer_errors(kind)
    print(f"measured: {kind}: outputs and gradients differ by {found:.1e}")
    assert found < EXACT


def _swap_experts(mixture: Mixture) -> None:
    mixture.experts = nn.ModuleList(reversed(mixture.experts))


def _swap_gates(mixture: Mixture) -> None:
    for expert in mixture.experts:
        expert.gate, expert.up = expert.up, expert.gate


MUTANTS: dict[str, Callable[[Mixture], object]] = {
    "weights not normalised, or normalised": lambda mixture: setattr(mixture, "normalise", not mixture.normalise),
    "one expert fewer": lambda mixture: setattr(mixture, "top_k", 1),
    "one expert more": lambda mixture: setattr(mixture, "top_k", 3),
    "experts in another order": _swap_experts,
    "gate and up swapped": _swap_gates,
    "router reversed": lambda mixture: mixture.router.weight.neg_(),
}


@pytest.mark.parametrize("kind", ["normalised", "as they are"])
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_in_the_layer_is_noticed(name: str, kind: str) -> None:
    assert layer_errors(kind, MUTANTS[name]) > 1e-3


def routes_of(*logits: Tensor) -> Routes:
    routes = Routes()
    routes.logits += logits
    return routes


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_balance_loss_is_theirs_over_the_choices(top_k: int) -> None:
    """Theirs counts each of a token's `top_k` choices as 1, and is `top_k` times ours; ours is the mean over the layers."""
    logits = [random(40, E, seed=seed) for seed in (1, 2, 3)]
    with float64_throughout():
        theirs = [load_balancing_loss_func((one,), E, top_k) / top_k for one in logits]
        pooled = load_balancing_loss_func(tuple(logits), E, top_k) / top_k
    for one, expected in zip(logits, theirs, strict=True):
        assert error(routing(routes_of(one), top_k).balance, expected) < EXACT
        assert error(routing(routes_of(one), top_k % 3 + 1).balance, expected) > 1e-4
    ours = routing(routes_of(*logits), top_k).balance
    assert error(ours, torch.stack(theirs).mean()) < EXACT
    assert error(ours, pooled) > 1e-4  # which lets one layer's unevenness hide another's


def test_balance_and_usage_at_their_ends() -> None:
    even = torch.eye(4, dtype=torch.float64).repeat(3, 1)  # 12 tokens, 3 for each
    one = torch.zeros(12, 4, dtype=torch.float64)
    one[:, 2] = 50.0
    found = routing(routes_of(30 * even, one), 1)
    assert found.usage.tolist() == [[0.25] * 4, [0, 0, 1, 0]]
    assert routing(routes_of(30 * even), 1).balance.item() == pytest.approx(1.0, abs=1e-12)
    assert routing(routes_of(one), 1).balance.item() == pytest.approx(4.0, abs=1e-12)
    for top_k in (1, 2, 3):
        usage = routing(routes_of(random(33, E), random(33, E, seed=5)), top_k).usage
        assert usage.shape == (2, E) and usage.sum(dim=1).tolist() == pytest.approx([1.0, 1.0], abs=1e-12)


def test_the_z_loss_in_closed_form() -> None:
    """Equal scores of c over E experts: (c + ln E)²; and the mean over tokens and layers of any scores."""
    assert routing(routes_of(torch.full((3, E), 2.0).double()), 2).z.item() == pytest.approx((2 + math.log(E)) ** 2, abs=1e-12)
    logits = [random(7, E, seed=seed) for seed in (1, 2)]
    expected = [math.log(sum(math.exp(s) for s in row)) ** 2 for one in logits for row in one.tolist()]
    assert routing(routes_of(*logits), 2).z.item() == pytest.approx(sum(expected) / 14, abs=1e-12)


def test_half_precision_scores_are_summed_in_float32() -> None:
    logits = random(64, E).bfloat16()
    found, exact = routing(routes_of(logits), 2), routing(routes_of(logits.double()), 2)
    for name in ("balance", "z", "usage"):
        a, b = getattr(found, name), getattr(exact, name)
        assert a.dtype == torch.float32 and float((a.double() - b).abs().max()) < 1e-5


# ---------------------------------------------------------------------- in training


def batch(of: ModelConfig) -> tuple[Tensor, Tensor]:
    """ids, and targets of which some do not count."""
    ids = tokens(of, 2)
    targets = ids.roll(-1, dims=1)
    targets[:, ::5] = IGNORE
    return ids, targets


def gradients(of: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(of, list(model.parameters()), retain_graph=True))


def written_out(model: GPT, ids: Tensor, targets: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The plain loss, and the routers' two losses from the scores that a hook sees, by their formulas."""
    scores: list[Tensor] = []
    handles = [block.mlp.router.register_forward_hook(lambda m, given, made: scores.append(made)) for block in model.blocks]
    loss = token_loss(model(ids), targets).sum
    for handle in handles:
        handle.remove()
    balance, z = [], []
    for layer_scores in scores:
        shares = layer_scores.softmax(-1)
        _, chosen = shares.topk(top_k)
        f = torch.stack([(chosen == e).double().mean() for e in range(shares.size(-1))])
        balance.append(shares.size(-1) * (f * shares.mean(0)).sum())
        z.append(layer_scores.exp().sum(-1).log().square().mean())
    return loss, torch.stack(balance).mean(), torch.stack(z).mean()


def test_scored_has_the_plain_loss_and_the_gradient_of_the_whole() -> None:
    model = noisy(config(balance_loss=0.3, z_loss=0.2)).train()
    ids, targets = batch(model.config)
    found = Scored(model)(ids, targets)
    loss, balance, z = written_out(model, ids, targets, 2)
    count = int((targets != IGNORE).sum())
    assert found.item() == pytest.approx(loss.item(), abs=1e-9)
    ours = gradients(found, model)
    assert errors(ours, gradients(loss + count * (0.3 * balance + 0.2 * z), model)) < EXACT
    for wrong in (
        loss,
        loss + 0.3 * balance + 0.2 * z,
        loss + count * 0.3 * balance,
        loss + count * 0.2 * z,
        loss + targets.numel() * (0.3 * balance + 0.2 * z),
        loss + count * (0.3 * 2 * balance + 0.2 * z),
    ):
        assert errors(ours, gradients(wrong, model)) > 1e-4


def test_evaluation_has_no_router_losses() -> None:
    model = noisy(config(balance_loss=0.3, z_loss=0.2)).eval()
    ids, targets = batch(model.config)
    loss, *_ = written_out(model, ids, targets, 2)
    found = Scored(model).eval()(ids, targets)
    assert found.item() == pytest.approx(loss.item(), abs=1e-9)
    assert errors(gradients(found, model), gradients(loss, model)) < EXACT


def test_without_weights_the_router_losses_are_nothing() -> None:
    model = noisy(config(balance_loss=0.0, z_loss=0.0)).train()
    ids, targets = batch(model.config)
    loss, *_ = written_out(model, ids, targets, 2)
    assert errors(gradients(Scored(model)(ids, targets), model), gradients(loss, model)) < EXACT


def usage_after(balance_loss: float, steps: int = 40) -> tuple[float, float]:
    """The largest share of any expert before and after a short training that starts with one expert preferred by all."""
    torch.manual_seed(0)
    model = GPT(config(4, 1, n_layer=2, balance_loss=balance_loss, z_loss=0.0))
    with torch.no_grad():
        for block in model.blocks:
            block.norm_2.bias += 0.3
            block.mlp.router.weight[0] += 0.1
    optimizers = optim.build(model, OptimConfig(learning_rate=0.01, weight_decay=0.0))
    optim.set_rate(optimizers, 0.01)

    def largest() -> float:
        routes = Routes()
        with torch.no_grad():
            model.hidden(tokens(model.config, 16, seed=99), routes=routes)
        return float(routing(routes, 1).usage.max())

    before = largest()
    for step in range(steps):
        ids = tokens(model.config, 8, seed=step)
        targets = (ids + 1) % model.config.vocab_size
        (Scored(model)(ids, targets) / ids.numel()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return before, largest()


def test_the_balance_loss_evens_out_an_uneven_start() -> None:
    before, after = usage_after(balance_loss=0.1)
    _, without = usage_after(balance_loss=0.0)
    print(f"measured: the busiest of 4 experts has {before:.2f} of the tokens, {after:.2f} after training, {without:.2f} without")
    assert before > 0.9
    assert after < 0.45
    assert without > after + 0.2


# ---------------------------------------------------------------------- optimisers

SHAPES: dict[str, dict[str, Any]] = {
    "mixture": {"shared": 1},
    "mixture, grouped, untied": {"n_kv_head": 2, "tied_head": False, "norm": "rms", "qk_norm": True, "position": "rope"},
    "mixture, one key head, tables": {"n_kv_head": 1, "position": "relative", "embedding_norm": True, "bias": False},
}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_parameter_is_held_once(name: str, optimizer: Any) -> None:
    model = noisy(config(**SHAPES[name]))
    optimizers = optim.build(model, OptimConfig(optimizer=optimizer, weight_decay=0.3))
    held = [id(p) for made in optimizers for group in made.param_groups for p in group["params"]]
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(held) == len(set(held)) and set(held) == set(names)
    decayed = {names[id(p)] for made in optimizers for g in made.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {parameter_name for parameter_name, p in model.named_parameters() if p.ndim >= 2}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("top_k", [1, E])
def test_every_parameter_gets_a_gradient(name: str, top_k: int) -> None:
    """If of zeros, where an expert got no token."""
    model = noisy(config(top_k=top_k, **SHAPES[name])).train()
    ids, targets = batch(model.config)
    Scored(model)(ids, targets).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert bool(parameter.grad.any()) or (top_k == 1 and ".experts." in parameter_name), parameter_name


def test_muon_takes_the_experts_and_leaves_the_routers() -> None:
    """A router's rows are compared with each other, not multiplied together: AdamW has them."""
    model = noisy(config(shared=1, n_kv_head=2))
    _, muon = optim.build(model, OptimConfig(optimizer="muon"))
    assert isinstance(muon, Muon)
    names = {id(p): name for name, p in model.named_parameters()}
    held = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    matrices = {name for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2}
    assert held == {name for name in matrices if not name.endswith("router.weight")}
    assert len(matrices) - len(held) == 3


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_muon_orthogonalises_keys_and_values_by_themselves(kv_heads: int) -> None:
    """Steps of k and of v have singular values of about 1 each, times one rate; as a whole the matrix has not."""
    model = noisy(shape(n_kv_head=kv_heads), torch.float32)
    _, muon = optim.build(model, OptimConfig(optimizer="muon", weight_decay=0.0))
    optim.set_rate([muon], 1.0)
    weight = model.blocks[0].attn.qkv.weight
    before = weight.detach().clone()
    weight.grad = random(*weight.shape).float()
    muon.step()
    size = kv_heads * 4  # rows of k, and of v
    step = (before - weight.detach()) / (0.2 * math.sqrt(max(size, 16)))
    for part in step.split(size):
        values = torch.linalg.svdvals(part)
        assert values.min() > 0.5 and values.max() < 1.3
    assert torch.linalg.svdvals(step).max() > 1.3


def test_what_is_computed_again_is_not_noted_again() -> None:
    """With activations computed a second time the routers speak twice; the second time would keep a second graph alive."""
    model = GPT(preset("tiny", moe=MoeConfig(experts=3, top_k=1)))
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    routes = Routes()
    model.hidden(torch.zeros(1, 5, dtype=torch.long), routes=routes).sum().backward()
    assert len(routes.logits) == model.config.n_layer
