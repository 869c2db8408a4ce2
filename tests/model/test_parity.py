"""GPT-2 against `transformers` in float64, and proof that the comparison would notice a mistake."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from oracle import SMALL, converted, hugging_face, random_ids
from torch import Tensor, nn

import glassgpt.model.attention as attention
from glassgpt.config import PRESETS, ModelConfig
from glassgpt.model import GPT, plain, use_attention
from glassgpt.model import weights as weight_files
from glassgpt.model.families import FAMILIES
from glassgpt.train.loss import token_loss

LOGITS = 1e-10
GRADIENTS = 1e-8


def logit_error(model: GPT, oracle: nn.Module, config: ModelConfig) -> float:
    ids = random_ids(config)
    with torch.no_grad():
        return float((model(ids) - oracle(ids).logits).abs().max())


@pytest.mark.parametrize("attend", [attention.plain, attention.fused])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mlp_width", [None, 48])
def test_logits(attend: attention.Attend, tied: bool, mlp_width: int | None) -> None:
    config = dataclasses.replace(SMALL, tied_head=tied, mlp_width=mlp_width)
    oracle = hugging_face(config)
    model = converted(oracle, config)
    use_attention(model, attend)
    error = logit_error(model, oracle, config)
    print(f"measured: float64 logits differ by {error:.1e}")
    assert error < LOGITS


@pytest.mark.parametrize("attend", [attention.plain, attention.fused])
def test_loss_and_every_gradient(attend: attention.Attend) -> None:
    oracle = hugging_face(SMALL)
    model = converted(oracle, SMALL)
    use_attention(model, attend)
    ids = random_ids(SMALL)
    # through the oracle's own `labels` the loss is taken in float32; from its logits it is float64 all the way
    theirs = nn.functional.cross_entropy(oracle(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss = token_loss(model(ids[:, :-1]), ids[:, 1:])
    ours = loss.sum / loss.count
    assert abs(float((theirs - ours).detach())) < GRADIENTS
    theirs.backward()
    ours.backward()
    gradients = {name.removeprefix("transformer."): p.grad for name, p in oracle.named_parameters()}
    names = weight_files._hf_names(FAMILIES["gpt2"], SMALL)
    errors = []
    for name, parameter in model.named_parameters():
        expected = gradients[names[name].names[0]]
        assert expected is not None
        assert parameter.grad is not None
        expected = expected.t() if names[name].transposed else expected
        errors.append(float((parameter.grad - expected).abs().max()))
        assert errors[-1] < GRADIENTS, name
    print(f"measured: loss differs by {float((theirs - ours).detach().abs()):.1e}, gradients by {max(errors):.1e}")
    assert len(errors) == len(gradients) == 12 * SMALL.n_layer + 4


def test_full_gpt2_size_in_float32() -> None:
    """At the real size, 124 M parameters, the two agree to float32's own precision."""
    config = dataclasses.replace(PRESETS["gpt2"], dropout=0.0)
    oracle = hugging_face(config, torch.float32, noise=0.02)
    model = converted(oracle, config)
    ids = random_ids(config, batch=1, length=48)
    with torch.no_grad():
        error = float((model(ids) - oracle(ids).logits).abs().max())
    print(f"measured: float32 logits at gpt2 size differ by {error:.1e}")
    assert error < 1e-4


# ---------------------------------------------------------------------- mistakes that the comparison must catch


class _Exact(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x)


class _NoBias(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


def _exact_gelu(model: GPT) -> None:
    for block in model.blocks:
        block.mlp.act = _Exact()


def _swapped_norms(model: GPT) -> None:
    for block in model.blocks:
        block.norm_1, block.norm_2 = block.norm_2, block.norm_1


def _no_qkv_bias(model: GPT) -> None:
    for block in model.blocks:
        block.attn.qkv = _NoBias(block.attn.qkv)


def _no_attention_output_bias(model: GPT) -> None:
    for block in model.blocks:
        block.attn.out = _NoBias(block.attn.out)


def _no_mlp_bias(model: GPT) -> None:
    for block in model.blocks:
        block.mlp.down = _NoBias(block.mlp.down)


def _other_eps(model: GPT) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6


def _attend(change: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]) -> Callable[[GPT], None]:
    return lambda model: use_attention(model, lambda q, k, v, seen, dropout, scale: change(q, k, v, seen))


def _shifted_positions(model: GPT) -> None:
    model.position_embedding.weight.data = model.position_embedding.weight.data.roll(1, dims=0)


def _no_final_norm_bias(model: GPT) -> None:
    model.norm_f.bias.data.zero_()


def _heads_interleaved(model: GPT) -> None:
    """Heads read from every n-th channel instead of consecutive ones."""
    for block in model.blocks:
        weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
        H, W = model.config.n_head, model.config.head_width
        weight.data = weight.data.view(3, W, H, -1).transpose(1, 2).reshape(weight.shape)
        bias.data = bias.data.view(3, W, H).transpose(1, 2).reshape(bias.shape)


def _post_norm(model: GPT) -> None:
    for block in model.blocks:

        def forward(x: Tensor, seen: Tensor | None = None, cache: None = None, block: nn.Module = block) -> Tensor:
            x = block.norm_1(x + block.attn(x, seen, cache))
            return block.norm_2(x + block.mlp(x))

        block.forward = forward


def _last_layer_skipped(model: GPT) -> None:
    model.blocks = model.blocks[:-1]


MUTANTS: dict[str, Callable[[GPT], None]] = {
    "exact GELU for the tanh one": _exact_gelu,
    "the two norms swapped": _swapped_norms,
    "no QKV bias": _no_qkv_bias,
    "no bias after attention": _no_attention_output_bias,
    "no bias after the MLP": _no_mlp_bias,
    "eps 1e-6 for 1e-5": _other_eps,
    "no 1/sqrt(W) scale": _attend(lambda q, k, v, seen: plain(q * math.sqrt(q.size(-1)), k, v, seen, 0.0)),
    "scale 1/sqrt(D) for 1/sqrt(W)": _attend(lambda q, k, v, seen: plain(q / math.sqrt(SMALL.n_head), k, v, seen, 0.0)),
    "query and key swapped": _attend(lambda q, k, v, seen: plain(k, q, v, seen, 0.0)),
    "not causal": _attend(lambda q, k, v, seen: nn.functional.scaled_dot_product_attention(q, k, v)),
    "sees one token too few": _attend(
        lambda q, k, v, seen: plain(q, k, v, (torch.ones(q.size(2), q.size(2)).tril(-1) + torch.eye(q.size(2), 1)).bool(), 0.0)
    ),
    "positions shifted by one": _shifted_positions,
    "no bias in the final norm": _no_final_norm_bias,
    "heads interleaved": _heads_interleaved,
    "post-norm": _post_norm,
    "one layer skipped": _last_layer_skipped,
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str) -> None:
    """The comparison of `test_logits` fails, and by far, for each of these mistakes."""
    oracle = hugging_face(SMALL)
    model = converted(oracle, SMALL)
    assert logit_error(model, oracle, SMALL) < LOGITS
    with torch.no_grad():
        MUTANTS[name](model)
    error = logit_error(model, oracle, SMALL)
    print(f"measured: {name}: logits differ by {error:.1e}")
    assert error > 1000 * LOGITS
