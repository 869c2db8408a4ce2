"""Everything that `glassgpt inspect` tells of one prompt, worked out once: the source of the page and of `--json`.

L layers, H heads, G heads of keys and values, T tokens of the prompt, V vocabulary, D width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glassgpt.config import UserError
from glassgpt.config.files import to_plain
from glassgpt.config.generate import Sampling
from glassgpt.interpret.anatomy import Anatomy, anatomy
from glassgpt.interpret.attribution import Attribution, attribute
from glassgpt.interpret.heads import HeadScore, usual_scores
from glassgpt.interpret.hooks import capture
from glassgpt.interpret.lens import Lens, lens
from glassgpt.interpret.next_token import NextToken, Surprise, next_tokens, surprises
from glassgpt.interpret.page.weight_stats import WeightStats, head_slabs, weight_stats
from glassgpt.interpret.tokens import Piece, label, pieces
from glassgpt.model import GPT
from glassgpt.text import Tokenizer

MOST_TOKENS = 256
"""Longest prompt: the patterns of all heads grow with its square."""
SCORED_TOKENS = 64
"""Up to here the scores before the softmax are kept too."""
CANDIDATES = 5
"""Tokens kept in each cell of the lens."""
SHOWN = 20
"""Next tokens listed."""


@dataclass(frozen=True, eq=False)
class Report:
    """One model, one prompt."""

    model: str
    prompt: str
    anatomy: Anatomy
    tokens: tuple[Piece, ...]
    begins: bool
    """Whether the first token is one that the model wants before every text, not a part of the prompt."""
    surprises: tuple[Surprise | None, ...]
    """Of each token, None for the first."""
    heads: tuple[HeadScore, ...]
    """Layer by layer, measured on random tokens, not on the prompt; empty where the model has no room for those."""
    pattern: Tensor
    """Attention (L, H, T, T), row = query."""
    scores: Tensor | None
    """The same before mask and softmax; None above SCORED_TOKENS tokens."""
    masked: Tensor | None
    """The same between: -inf where a key is not seen, with the bias that some models add."""
    lens: Lens
    target: int
    """The token whose logit, after the last position, is taken apart."""
    against: int
    attributions: tuple[Attribution, Attribution]
    """Of the target's logit, and of its lead over `against`."""
    weights: tuple[WeightStats, ...]
    slabs: Tensor
    """Root mean squares of blocks of `attn.qkv.weight`, (L, H + 2G, rows, columns): every head's q, then k, then v."""
    logits: Tensor
    """(V,) float32 after the last position, of the ids that the tokenizer has."""
    next_tokens: tuple[NextToken, ...]
    """The SHOWN likeliest at temperature 1."""
    labels: dict[int, str]
    """How every token that is mentioned anywhere is shown."""
    fragments: tuple[int, ...]
    """Those of them that are only a part of a character: their labels are bytes."""

    def as_json(self) -> dict[str, Any]:
        """Everything as plain data, but for attention, slabs and the whole vocabulary's logits, which are too many numbers."""
        facts = self.anatomy
        return {
            "model": self.model,
            "prompt": self.prompt,
            "config": to_plain(facts.config) | {"kv_heads": facts.config.kv_heads, "head_width": facts.config.head_width},
            "parameters": facts.parameters,
            "parameters_active": facts.parameters_active,
            "parameters_untied": facts.parameters_untied,
            "begins": self.begins,
            "tokens": [
                dataclasses.asdict(piece) | (dataclasses.asdict(surprise) if surprise else {})
                for piece, surprise in zip(self.tokens, self.surprises, strict=True)
            ],
            "heads": [dataclasses.asdict(score) for score in self.heads],
            "lens": {field.name: getattr(self.lens, field.name).tolist() for field in dataclasses.fields(self.lens)},
            "target": self.target,
            "against": self.against,
            "attributions": [dataclasses.asdict(attribution) for attribution in self.attributions],
            "weights": [dataclasses.asdict(stats) for stats in self.weights],
            "next_tokens": [dataclasses.asdict(token) for token in self.next_tokens],
            "fragments": list(self.fragments),
            "labels": {str(token_id): text for token_id, text in self.labels.items()},
        }


@torch.no_grad()
def collect(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    name: str,
    target: int | None = None,
    against: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Look at a prompt from all sides. `target` and `against` are the two likeliest next tokens when not given.

    Raises UserError for an empty prompt, one of more than MOST_TOKENS tokens or longer than the context, for a target that is
    no token or equals `against`, for weights or logits that are not finite, and as `attribute` does.
    """
    ids = _ids(tokenizer, prompt).to(next(model.parameters()).device)
    step = _counter(progress, 6)
    weights = tuple(weight_stats(model))
    _check_finite(weights)
    step()
    logits, attention = _run(model, ids)
    last = logits[-1, : tokenizer.vocab_size]  # (V,)
    if not last.isfinite().all():
        raise UserError("the model's logits are not all finite numbers: its weights are broken, and there is nothing to show")
    order = last.argsort(descending=True, stable=True)
    target, against = _pair(order.tolist(), target, against)
    step()
    heads = _scored(model, tokenizer)
    step()
    layers = lens(model, ids, k=min(CANDIDATES, tokenizer.vocab_size), n_ids=tokenizer.vocab_size)
    step()
    attributions = attribute(model, ids, target), attribute(model, ids, target, against=against)
    step()
    mentioned = [ids, layers.ids.flatten(), order[:SHOWN], torch.tensor([target, against])]
    labels = {token_id: label(tokenizer, token_id) for token_id in torch.cat([x.cpu() for x in mentioned]).unique().tolist()}
    report = Report(
        model=name,
        prompt=prompt,
        anatomy=anatomy(model.config),
        tokens=tuple(pieces(tokenizer, ids.tolist())),
        begins=tokenizer.begin_id is not None,
        surprises=tuple(surprises(logits, ids.cpu())),
        heads=heads,
        pattern=attention["pattern"],
        scores=attention.get("scores"),
        masked=attention.get("masked"),
        lens=layers,
        target=target,
        against=against,
        attributions=attributions,
        weights=weights,
        slabs=head_slabs(model),
        logits=last,
        next_tokens=tuple(next_tokens(last, Sampling(), SHOWN)),
        labels=labels,
        fragments=tuple(token_id for token_id in labels if _is_fragment(tokenizer, token_id)),
    )
    step()
    return report


def _ids(tokenizer: Tokenizer, prompt: str) -> Tensor:
    """Token ids (T,) of the prompt."""
    ids = tokenizer.encode_start(prompt)
    if not prompt:
        raise UserError("the prompt is empty; give at least one character")
    if len(ids) > MOST_TOKENS:
        raise UserError(f"the prompt has {len(ids)} tokens and the page shows {MOST_TOKENS} at most; shorten it")
    return torch.tensor(ids)


def _check_finite(weights: tuple[WeightStats, ...]) -> None:
    """Of every parameter: some may have no part in this prompt."""
    for stats in weights:
        if not all(math.isfinite(x) for x in (stats.mean, stats.std, stats.min, stats.max)):
            raise UserError(
                f"the numbers of {stats.name} are not all finite: the weights are broken, and there is nothing to show"
            )


def _scored(model: GPT, tokenizer: Tokenizer) -> tuple[HeadScore, ...]:
    """The heads' scores; none where context or vocabulary are too small for the probe, which is no part of the prompt."""
    try:
        return tuple(usual_scores(model, tokenizer))
    except UserError:
        return ()


def _is_fragment(tokenizer: Tokenizer, token_id: int) -> bool:
    return token_id < tokenizer.vocab_size and pieces(tokenizer, [token_id])[0].is_fragment


def _counter(progress: Callable[[int, int], None] | None, total: int) -> Callable[[], None]:
    """Call it after every step."""
    done = iter(range(1, total + 1))
    return (lambda: None) if progress is None else (lambda: progress(next(done), total))


def _run(model: GPT, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (T, V) in float32, and each stage of attention (L, H, T, T) on the CPU."""
    stages = ("scores", "masked", "pattern") if len(ids) <= SCORED_TOKENS else ("pattern",)
    with capture(model, [f"blocks.*.attn.{stage}" for stage in stages]) as seen:
        logits = model(ids[None])[0].float().cpu()
    layers = range(model.config.n_layer)
    found = {stage: torch.stack([seen[f"blocks.{i}.attn.{stage}"][0].cpu() for i in layers]) for stage in stages}
    return logits, found


def _pair(order: list[int], target: int | None, against: int | None) -> tuple[int, int]:
    """The token to explain and the one to hold against it; the likeliest that are still free where None."""
    for token_id in (target, against):
        if token_id is not None and not 0 <= token_id < len(order):
            raise UserError(f"token id {token_id} is outside the vocabulary (0 to {len(order) - 1})")
    if target is not None and target == against:
        raise UserError(f"target and against are the same token, {target}; give two different ones")
    first = next(i for i in order if i != against) if target is None else target
    second = next(i for i in order if i != first) if against is None else against
    return first, second
