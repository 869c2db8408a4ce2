"""Structured pruning: whole attention heads and MLP channels are taken out, and what is left is a smaller plain model.

H query heads in G groups that share keys and values (G = H for MHA), W head width, F channels of an MLP or of an expert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from glassgpt.compress.masks import check_plain
from glassgpt.config import ModelConfig, UserError
from glassgpt.data.progress import Progress
from glassgpt.interpret.activations import check_no_dropout
from glassgpt.interpret.hooks import capture
from glassgpt.model import GPT
from glassgpt.train.loss import head_loss

BOUND = ("alibi", "relative", "per_head")
"""Positions that give each head of all layers a slope or a column of its own: heads cannot leave layer by layer."""


def importance(model: GPT, ids: Tensor, progress: Progress = lambda done, total: None) -> dict[str, Tensor]:
    """What the loss would notice, to first order, if a head or a channel were gone: (G,) or (F,) by the name of its module.

    Each is multiplied by a gate g = 1, and |∂loss / ∂g| is its importance, the mean over the windows ids (B, T + 1): for heads
    Michel et al. 2019, §4.1, for channels the Taylor criterion of Molchanov et al. 2017, §2.2. Heads that share keys and
    values have one gate. The names are blocks.*.attn, blocks.*.mlp, and in a mixture blocks.*.mlp.experts.* and .shared.*.
    Raises UserError for a model that is not plain, and for one in training mode with dropout.
    """
    check_plain(model)
    check_no_dropout(model)
    found: dict[str, Tensor] = {}
    for done, row in enumerate(ids.unsqueeze(1), 1):  # one window: an expert's tokens do not say which window they are from
        with torch.enable_grad(), capture(model, ["blocks.*.attn.z", "blocks.**.hidden"]) as seen:
            hidden = model.hidden(row[:, :-1])
            loss = head_loss(hidden, model.head.weight, row[:, 1:], model.config.logit_cap)
            gradients = torch.autograd.grad(loss.sum / loss.count, list(seen.values()))
        for (name, x), gradient in zip(seen.items(), gradients, strict=True):
            product = (x * gradient).detach()
            if name.endswith(".z"):  # (1, H, T, W)
                change = product.sum(dim=(0, 2, 3)).view(model.config.kv_heads, -1).sum(dim=1)  # (G,)
            else:  # (1, T, F), or of an expert (n, F)
                change = product.flatten(0, -2).sum(dim=0)  # (F,)
            module = name.rpartition(".")[0]
            found[module] = found.get(module, torch.zeros_like(change)) + change.abs() / len(ids)
        progress(done, len(ids))
    return found


def choose(found: Mapping[str, Tensor], heads: int, mlp_share: float, config: ModelConfig) -> dict[str, Tensor]:
    """What stays, by the names of `importance`: the numbers of groups of heads and of channels, rising.

    `heads` query heads leave each layer, and round(mlp_share * F) channels each MLP, the least important ones. Raises UserError
    where nothing would stay or no channel leave, for a part of a group of heads, and for positions that are bound to the number
    of a head.
    """
    check_heads(heads, config)
    share = config.n_head // config.kv_heads
    stays = {}
    for name, values in found.items():
        removed = heads // share if name.endswith(".attn") else round(mlp_share * len(values))
        if removed >= len(values):
            raise UserError(f"mlp_share {mlp_share} leaves none of the {len(values)} channels of {name}; give less")
        if mlp_share and not removed and not name.endswith(".attn"):
            raise UserError(
                f"mlp_share {mlp_share} takes out none of the {len(values)} channels of {name}; give {1 / len(values):.4f}"
            )
        if removed:
            stays[name] = values.argsort(stable=True)[removed:].sort().values
    return stays


def check_heads(heads: int, config: ModelConfig) -> None:
    """Raises UserError unless so many query heads can leave each layer."""
    share = config.n_head // config.kv_heads
    if not heads:
        return
    if config.position in BOUND:
        raise UserError(f"position {config.position} is bound to the number of a head, so heads cannot leave; give --mlp_share")
    if heads >= config.n_head:
        raise UserError(f"a layer has {config.n_head} heads and one at least must stay; got --heads {heads}")
    if heads % share:
        shared = f"{share} query heads share their keys and values and leave together"
        raise UserError(f"{shared}; --heads must be a multiple of {share}, got {heads}")


def smaller(model: GPT, stays: Mapping[str, Tensor]) -> GPT:
    """A new model of the parts that stay, as many in each layer; modules that `stays` does not name are whole.

    It computes what `model` does with the columns of attn.out and mlp.down set to zero that read what has gone. Weights are
    copied. Raises UserError for a model that is not plain.
    """
    check_plain(model)
    config = model.config
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, places in stays.items():
        if name.endswith(".attn"):
            rows, columns = _head_places(places, config)
            inner, outer = ["qkv"], "out"
        else:
            rows = columns = places
            inner, outer = ["gate", "up"], "down"
        for part in (f"{name}.{linear}.{kind}" for linear in inner for kind in ("weight", "bias")):
            if part in state:
                state[part] = state[part][rows]
        state[f"{name}.{outer}.weight"] = state[f"{name}.{outer}.weight"][:, columns]
    with torch.device("meta"):
        small = GPT(smaller_config(config, stays))
    if small.config.tied_head:
        state["head.weight"] = state["token_embedding.weight"]
    small.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    small.tie()  # assigning made the two names two parameters
    return small.train(model.training)


def smaller_config(config: ModelConfig, stays: Mapping[str, Tensor]) -> ModelConfig:
    """The shape of what stays. Every layer keeps as many."""
    groups = {len(places) for name, places in stays.items() if name.endswith(".attn")}
    channels = {len(places) for name, places in stays.items() if not name.endswith(".attn")}
    if groups:
        (left,) = groups
        n_head = left * config.n_head // config.kv_heads
        n_kv_head = None if config.n_kv_head is None else left
        config = dataclasses.replace(config, n_head=n_head, n_kv_head=n_kv_head, attention_width=n_head * config.head_width)
    if channels:
        (left,) = channels
        if config.moe.experts:
            return dataclasses.replace(config, moe=dataclasses.replace(config.moe, expert_width=left))
        return dataclasses.replace(config, mlp_width=left)
    return config


def _head_places(groups: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Rows of the fused matrix, ((H + 2G) W,) of them, and columns of the output matrix, that groups of heads hold."""
    share, W = config.n_head // config.kv_heads, config.head_width
    queries = _spread(groups, share)  # heads
    first_key, first_value = config.n_head, config.n_head + config.kv_heads
    heads = torch.cat((queries, first_key + groups, first_value + groups))
    return _spread(heads, W), _spread(queries, W)


def _spread(places: Tensor, size: int) -> Tensor:
    """The numbers place * size ... place * size + size - 1 of each place."""
    return (places.unsqueeze(1) * size + torch.arange(size, device=places.device)).flatten()
