"""Path patching: what one head does by one way alone (Wang et al. 2022, §3.1; Goldowsky-Dill et al. 2023).

The clean prompt is run; a sender head's output is that of the corrupted prompt, and only the receivers see it: by the residual
stream, past all attention and all MLPs in between, which are frozen as in the clean run. What comes after the receivers is
computed anew.

n senders, T positions, D width, H heads, W head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from glassgpt.config import UserError
from glassgpt.interpret.hooks import capture, edit
from glassgpt.interpret.patching import Sweep, recorded_pair
from glassgpt.interpret.rerun import PIECE_TOKENS, Again, Metric, Progress, Run, last_position
from glassgpt.model import GPT, Block

Receiver = tuple[int, int, Literal["q", "k", "v"]]
"""(layer, head, what it reads): of "k" and "v" the heads are those of keys and values, which several query heads may share."""
Receivers = Literal["logits"] | Sequence[Receiver]


def path_patch(
    model: GPT,
    clean: Tensor,
    corrupted: Tensor,
    sender: tuple[int, int],
    receivers: Receivers,
    metric: Metric,
    through_mlps: bool = False,
) -> float:
    """The metric of the clean prompt (T,) when the receivers see the sender head (layer, head) as in the corrupted prompt (T,).

    `through_mlps` computes the MLPs on the way anew, as Wang et al. do. A sender that no receiver lies behind changes nothing.
    Raises UserError as `patch_sweep` does, and for a sender or receiver that there is not.
    """
    layer, head = sender
    L, H = len(model.blocks), model.config.n_head
    if not (0 <= layer < L and 0 <= head < H):
        raise UserError(f"no head {layer}.{head}: the model has layers 0 to {L - 1} and heads 0 to {H - 1}")
    sweep = _swept(model, clean, corrupted, receivers, metric, through_mlps, [(layer, torch.tensor([head]))], None)
    return float(sweep.values[layer, head])


def path_sweep(
    model: GPT,
    clean: Tensor,
    corrupted: Tensor,
    receivers: Receivers,
    metric: Metric,
    through_mlps: bool = False,
    progress: Progress | None = None,
) -> Sweep:
    """`path_patch` from every head in turn: values (L, H). `recovered` is 1 where nothing changed, as the base is clean."""
    heads = torch.arange(model.config.n_head).split(max(1, PIECE_TOKENS // max(1, clean.numel())))
    senders = [(layer, some) for layer in range(len(model.blocks)) for some in heads]
    return _swept(model, clean, corrupted, receivers, metric, through_mlps, senders, progress)


@torch.no_grad()
def _swept(
    model: GPT,
    clean: Tensor,
    corrupted: Tensor,
    receivers: Receivers,
    metric: Metric,
    through_mlps: bool,
    senders: Sequence[tuple[int, Tensor]],
    progress: Progress | None,
) -> Sweep:
    if receivers != "logits":
        _check_receivers(model, receivers)
    base, other = recorded_pair(model, clean, corrupted)
    finish = last_position(model, metric)
    with_clean, with_corrupted = (finish(run["residual"][-1:], 0) for run in (base, other))
    last = len(model.blocks) if receivers == "logits" else max(layer for layer, _, _ in receivers)
    values = with_clean.repeat(len(model.blocks), model.config.n_head)
    for done, (layer, heads) in enumerate(senders):
        if layer < last:
            streams = dict(_streams(model, base, _sent(model, base, other, layer, heads), layer, last, through_mlps))
            x = streams[last] if receivers == "logits" else _received(model, base, streams, receivers)
            values[layer, heads] = finish(x, 0)
        if progress is not None:
            progress(done + 1, len(senders))
    return Sweep("paths", values, float(with_clean), float(with_corrupted))


def _sent(model: GPT, base: Run, other: Run, layer: int, heads: Tensor) -> Tensor:
    """The residual stream after attention, (n, T, D), with one of the heads as in the other run."""
    z = base["attn.z"][layer].repeat(len(heads), 1, 1, 1)  # (n, H, T, W)
    z[torch.arange(len(heads)), heads] = other["attn.z"][layer, heads]
    return base["residual"][layer] + cast(Block, model.blocks[layer]).attn.out(z.transpose(1, 2).flatten(2))


def _streams(model: GPT, base: Run, mid: Tensor, layer: int, last: int, through_mlps: bool) -> Iterator[tuple[int, Tensor]]:
    """(depth, residual stream before block `depth`), from the sender's layer to the last receiver's: all heads are frozen."""
    for depth in range(layer + 1, last + 1):
        block = cast(Block, model.blocks[depth - 1])
        x = mid + (block.mlp(block.norm_2(mid)) if through_mlps else base["mlp"][depth - 1])  # (n, T, D)
        yield depth, x
        if depth < last:
            mid = x + base["attn"][depth]


def _received(model: GPT, base: Run, streams: dict[int, Tensor], receivers: Sequence[Receiver]) -> Tensor:
    """The residual stream after the last block, (n, T, D), when receivers read the streams given and all else the clean run's."""
    again = Again(model, base)
    n = len(next(iter(streams.values())))
    edits = {}
    for layer in sorted({layer for layer, _, _ in receivers} & streams.keys()):
        block = cast(Block, model.blocks[layer])
        with capture(model, [f"blocks.{layer}.attn.{letter}" for letter in "qkv"]) as seen:
            block.attn(block.norm_1(streams[layer]), again.where)
        for letter in "qkv":
            heads = [head for at, head, what in receivers if (at, what) == (layer, letter)]
            name = f"blocks.{layer}.attn.{letter}"
            edits[name] = _heads_from(seen[name], heads)
    start = min(layer for layer, _, _ in receivers if layer in streams)
    x = base["residual"][start].repeat(n, 1, 1)
    with edit(model, edits):
        for layer in range(start, len(model.blocks)):
            x = model.blocks[layer](x, again.where)
    return x


def _heads_from(new: Tensor, heads: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """An edit that takes some heads from `new` (n, H, T, W)."""
    chosen = torch.zeros(new.size(1), 1, 1, dtype=torch.bool, device=new.device)
    chosen[list(heads)] = True
    return lambda x: torch.where(chosen, new, x)


def _check_receivers(model: GPT, receivers: Sequence[Receiver]) -> None:
    counts = {"q": model.config.n_head, "k": model.config.kv_heads, "v": model.config.kv_heads}
    L = len(model.blocks)
    if not receivers or not all(isinstance(receiver, tuple | list) and len(receiver) == 3 for receiver in receivers):
        raise UserError(f'receivers must be "logits" or a list of (layer, head, "q", "k" or "v"); got {receivers!r}')
    for layer, head, letter in receivers:
        if letter not in counts or not 0 <= layer < L or not 0 <= head < counts[letter]:
            raise UserError(
                f"no receiver {(layer, head, letter)!r}: expected a layer from 0 to {L - 1}, q with a head from 0 to"
                f" {counts['q'] - 1}, k or v with one from 0 to {counts['k'] - 1}"
            )
