"""The gradient of a batch taken apart by the kind of token whose loss it is the gradient of.

A loss that is a sum over tokens has a gradient that is a sum over tokens too, so

    gradient of the full loss = (g_template + g_instruction + g_response + g_end) / tokens        exactly,

one backward pass for each kind, from one forward pass. All that is reported follows from the inner products of the four, kept by
layer: g_Q is the first two together, g_A the last two, and |x + y|² = <x, x> + 2 <x, y> + <y, y>.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glassgpt.config import UserError
from glassgpt.model import GPT
from glassgpt.text import Tokenizer, chat
from glassgpt.text.chat import Message
from glassgpt.train.loss import IGNORE, Loss, head_loss
from glassgpt.tuning.examples import Example, Rows, collate

KINDS = ("template", "instruction", "response", "end")
"""The template's words and marks; what users (and systems) say; what the assistant says; what ends its answers."""
TEMPLATE, INSTRUCTION, RESPONSE, END = range(4)
ANSWER = (0.0, 0.0, 1.0, 1.0)
"""The kinds that a loss on responses learns: A. The others are Q."""
WHOLE = "whole model"
ORDER = ("embedding", "embedding = head", "positions", "embedding norm", "block", "final norm", "head")


@dataclass(frozen=True, eq=False)
class Marked:
    """An example with the kind of each of its tokens."""

    example: Example
    kinds: list[int]


def mark(example: Example, messages: Sequence[Message], tokenizer: Tokenizer, template: str, ends: Sequence[int]) -> Marked:
    """The kinds of an example's tokens; `example` is the whole conversation `messages`.

    What is learnt of it says which turns are the assistant's, and which of the template's words end them.
    """
    kinds: list[int] = []
    if template == "chat":
        for piece in chat.pieces(messages, chat.template_of(tokenizer)):
            own = piece.author is None
            count = len(tokenizer.encode(piece.text, allow_special=own, inside=bool(kinds)))
            kinds += [TEMPLATE if own else INSTRUCTION] * count
    else:
        begins = tokenizer.begin_id is not None and example.ids[:1] == [tokenizer.begin_id]
        kinds = [TEMPLATE] * begins + [INSTRUCTION] * (len(example.ids) - begins)
        if example.mask[-1] and example.ids[-1] in ends:
            kinds[-1] = TEMPLATE
    if len(kinds) != len(example.ids):
        raise UserError(f"{example.place}: the template's words and the messages cannot be told apart; try --template none")
    learnt = {TEMPLATE: END, INSTRUCTION: RESPONSE}
    return Marked(example, [learnt[kind] if is_learnt else kind for kind, is_learnt in zip(kinds, example.mask, strict=True)])


def batch(items: Sequence[Marked], device: torch.device | None = None) -> tuple[Rows, Tensor]:
    """Rows of the full loss, and the kind (B, T) of each target; -1 where there is none."""
    rows = collate([[item.example] for item in items], prompt_weight=1.0).to(device or torch.device("cpu"))
    kinds = torch.full_like(rows.targets, -1)
    for number, item in enumerate(items):
        kinds[number, : len(item.kinds) - 1] = torch.tensor(item.kinds[1:])
    return rows, kinds


def losses(model: GPT, rows: Rows, kinds: Tensor) -> list[Loss | None]:
    """The summed loss of each kind's tokens, None where there is no such token, all of one forward pass."""
    hidden = model.hidden(rows.ids, segments=rows.segments)  # (B, T, D)
    found: list[Loss | None] = []
    for kind in range(len(KINDS)):
        there = (kinds == kind) & (rows.targets != IGNORE)  # (B, T), true at n places
        own = hidden[there].unsqueeze(0), rows.targets[there].unsqueeze(0)  # (1, n, D), (1, n)
        found.append(head_loss(own[0], model.head.weight, own[1], model.config.logit_cap) if own[1].numel() else None)
    return found


def gradients(model: GPT, rows: Rows, kinds: Tensor) -> list[dict[str, Tensor]]:
    """The gradient of each kind's summed loss, by parameter. Their sum is the gradient of the summed full loss."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = []
    for loss in losses(model, rows, kinds):
        if loss is None:
            found.append({name: torch.zeros_like(parameter) for name, parameter in named.items()})
            continue
        own = torch.autograd.grad(loss.sum, list(named.values()), retain_graph=True, materialize_grads=True)
        found.append(dict(zip(named, own, strict=True)))
    return found


# ---------------------------------------------------------------------- by layer


def layer_of(name: str, *, tied: bool) -> str:
    """The layer that a parameter is reported with. A norm belongs to what it stands before."""
    parts = name.split(".")
    if parts[0] == "blocks":
        return f"block {parts[1]} {'attention' if parts[2] in ('norm_1', 'attn') else 'MLP'}"
    if parts[0] == "token_embedding":
        return "embedding = head" if tied else "embedding"
    return {"position_embedding": "positions", "embedding_norm": "embedding norm", "norm_f": "final norm", "head": "head"}[
        parts[0]
    ]


@dataclass(frozen=True)
class Split:
    """One batch's gradient, taken apart."""

    counts: list[int]
    """Tokens of each kind in the loss: an example's first token is in none."""
    products: dict[str, list[list[float]]]
    """By layer: the inner products (4, 4) of the kinds' gradients, of summed losses."""


def split(model: GPT, rows: Rows, kinds: Tensor) -> Split:
    """Take one batch's gradient apart. The inner products are summed in float64."""
    apart = gradients(model, rows, kinds)
    products: dict[str, Tensor] = {}
    for name in apart[0]:
        own = torch.stack([some[name].flatten() for some in apart]).cpu().double()  # (4, n)
        layer = layer_of(name, tied=model.config.tied_head)
        products[layer] = products.get(layer, torch.zeros(len(KINDS), len(KINDS), dtype=torch.float64)) + own @ own.T
    counts = [int((kinds == kind).sum()) for kind in range(len(KINDS))]
    ordered = {layer: products[layer].tolist() for layer in sorted(products, key=_place)}
    return Split(counts, {WHOLE: sum(products.values(), torch.zeros(())).tolist()} | ordered)


def _place(layer: str) -> tuple[int, ...]:
    """From the input to the output."""
    words = layer.split()
    if words[0] == "block":
        return ORDER.index("block"), int(words[1]), words[2] == "MLP"
    return ORDER.index(layer), 0, False


# ---------------------------------------------------------------------- what it comes to

MEANING = {
    "instruction": "|g_Q| / (|Q| + |A|): norm of what the instruction's tokens, with the template's, give the full gradient",
    "response": "|g_A| / (|Q| + |A|): norm of what the response's tokens, with its end, give it",
    "share": "|g_A| / (|g_Q| + |g_A|), both divided by the same count",
    "part": "<g_A, g> / <g, g>: how much of the full gradient g = g_Q + g_A is the response's; with Q's part it makes 1",
    "cosine": "of g_Q and g_A",
    "instruction_per_token": "|g_Q| / |Q|",
    "response_per_token": "|g_A| / |A|",
    "tokens": "|A| / (|Q| + |A|)",
    "content_share": "|g_A| / (|g_Q| + |g_A|) of what people say alone: without the template's words, without the end",
    "content_tokens": "share of the response's tokens in those",
    "content_cosine": "cosine of the two",
}


def figures(products: Sequence[Sequence[float]], counts: Sequence[int], prompt_weight: float = 1.0) -> dict[str, float]:
    """What MEANING says of one layer and batch. With `prompt_weight`, of the loss in which Q's tokens count so much.

    A batch without instruction, or a layer without gradient, has 0 where there is nothing to divide by.
    """
    inner, tokens, is_answer = np.array(products), np.array(counts, float), np.array(ANSWER)
    asked = (1 - is_answer) * prompt_weight
    total = float(tokens @ (asked + is_answer))
    qq, aa, qa = (float(x @ inner @ y) for x, y in ((asked, asked), (is_answer, is_answer), (asked, is_answer)))
    q, a, heard, said = (math.sqrt(max(x, 0.0)) for x in (qq, aa, inner[INSTRUCTION, INSTRUCTION], inner[RESPONSE, RESPONSE]))
    return {
        "instruction": _over(q, total),
        "response": _over(a, total),
        "share": _over(a, q + a),
        "part": _over(aa + qa, qq + aa + 2 * qa),
        "cosine": _over(qa, q * a),
        "instruction_per_token": _over(q, float(tokens @ asked)),
        "response_per_token": _over(a, float(tokens @ is_answer)),
        "tokens": _over(float(tokens @ is_answer), total),
        "content_share": _over(said, prompt_weight * heard + said),
        "content_tokens": _over(tokens[RESPONSE], prompt_weight * tokens[INSTRUCTION] + tokens[RESPONSE]),
        "content_cosine": _over(float(inner[INSTRUCTION, RESPONSE]), heard * said),
    }


def kind_figures(products: Sequence[Sequence[float]], counts: Sequence[int]) -> dict[str, dict[str, float]]:
    """By kind: its share of the tokens, its norm in the full loss's gradient, and its norm per token."""
    norms, total = [math.sqrt(max(products[kind][kind], 0.0)) for kind in range(len(KINDS))], sum(counts)
    return {
        name: {"tokens": _over(count, total), "norm": _over(norm, total), "per_token": _over(norm, count)}
        for name, norm, count in zip(KINDS, norms, counts, strict=True)
    }


def _over(a: float, b: float) -> float:
    return float(a / b) if b else 0.0


@dataclass(frozen=True)
class Spread:
    """Of several batches."""

    median: float
    low: float
    """A quarter of them lie below."""
    high: float
    """A quarter of them lie above."""


def spread(values: Sequence[float]) -> Spread:
    low, median, high = (float(value) for value in np.percentile(values, (25, 50, 75)))
    return Spread(median, low, high)
