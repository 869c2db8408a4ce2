"""How well a model predicts text it has not seen: nats per token, bits per byte."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from glassgpt import data
from glassgpt.config import UserError
from glassgpt.config.evaluate import Evaluate
from glassgpt.data import Batch
from glassgpt.loading import load, pick_device
from glassgpt.model import Routes
from glassgpt.train import machine, parallel
from glassgpt.train.loss import IGNORE, Scored, routing
from glassgpt.train.parallel import Ranks


@torch.no_grad()
def measure(
    scored: nn.Module,
    batches: Iterable[Batch],
    byte_lengths: Tensor,
    low_precision: contextlib.AbstractContextManager[object],
    ranks: Ranks,
) -> dict[str, float]:
    """Loss in nats per token, and bits per byte: nats / ln 2 / the bytes that the predicted tokens stand for.

    `scored(ids, targets, segments)` sums nats, as `Scored` does. `byte_lengths` (V,) holds the bytes behind each id. Bits per
    byte compares models with different tokenizers. Every rank takes its share of the batches and gets the whole result.
    """
    was_training = scored.training
    scored.eval()
    nats = tokens = text_bytes = 0.0
    for group in _groups(batches, ranks.data_world):
        batch = group[ranks.data_rank] if ranks.data_rank < len(group) else _without_targets(group[0])
        ids, targets = batch.ids.to(ranks.device), batch.targets.to(ranks.device)
        segments = None if batch.segments is None else batch.segments.to(ranks.device)
        # not compiled: rows of another number or length would change the shapes that training is compiled for
        with low_precision, machine.eager():
            nats += scored(ids, targets, segments).item()
        supervised = targets[targets != IGNORE]
        tokens += supervised.numel()
        text_bytes += byte_lengths[supervised].sum().item()
    scored.train(was_training)
    parallel.reshard(scored)
    nats, tokens, text_bytes = ranks.total([nats, tokens, text_bytes])
    text_bytes = max(1.0, text_bytes)
    return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / text_bytes, "tokens": tokens, "bytes": text_bytes}


@torch.no_grad()
def expert_usage(scored: nn.Module, batch: Batch, top_k: int, ranks: Ranks) -> list[list[float]]:
    """Share of the routers' choices that fell on each expert of each layer, for one batch. Every rank calls it with its own."""
    was_training, routes = scored.training, Routes()
    scored.eval()
    segments = None if batch.segments is None else batch.segments.to(ranks.device)
    with machine.eager():
        scored(batch.ids.to(ranks.device), batch.targets.to(ranks.device), segments, routes)
    scored.train(was_training)
    parallel.reshard(scored)
    return [[round(share, 4) for share in layer] for layer in routing(routes, top_k).usage.tolist()]


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    rest = iter(batches)
    while group := list(itertools.islice(rest, size)):
        yield group


def _without_targets(batch: Batch) -> Batch:
    """For a rank with nothing left to measure, which must still take part in every forward pass."""
    return Batch(batch.ids, torch.full_like(batch.targets, IGNORE), batch.segments)


def windows(ids: np.ndarray, context_tokens: int, stride_tokens: int, batch_size: int) -> Iterator[Batch]:
    """Overlapping windows over one text (N,); every token but the first is a target exactly once.

    A window after the first counts only the targets that no earlier one has. The last window ends with the text and may
    overlap more. Raises UserError for fewer than two tokens.
    """
    if len(ids) < 2:
        raise UserError("the text has fewer than two tokens; give more text")
    T = min(context_tokens, len(ids) - 1)
    last = len(ids) - 1 - T
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    counted = 0  # targets so far: places 1 to `counted`
    for start in [*range(0, last, stride_tokens), last]:
        targets = ids[start + 1 : start + T + 1].astype(np.int64)
        targets[: max(0, counted - start)] = IGNORE
        counted = start + T
        rows.append((ids[start : start + T].astype(np.int64), targets))
        if len(rows) == batch_size or start == last:
            inputs, wanted = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
            yield Batch(inputs, wanted)
            rows = []


def evaluate(config: Evaluate) -> dict[str, float]:
    """Print and return loss, perplexity and bits per byte of a model on text; documents are joined by end-of-text tokens.

    Raises UserError for an unknown model, an unreadable or empty source, a stride longer than the context.
    """
    device = pick_device(config.device)
    model, tokenizer = load(config.model, device=str(device))
    context = model.config.context_tokens
    stride = config.stride_tokens or context
    if stride > context:
        raise UserError(f"stride_tokens is {stride} and the context {context}: tokens would be left out; use at most {context}")
    documents = list(data.documents(config.sources))
    if config.holdout_share < 1:
        documents = [text for split, text in data.shards.hold_out(documents, config.holdout_share) if split == "val"]
    ids = _joined(tokenizer.encode_batch(documents), tokenizer.begin_id, tokenizer.end_id)
    byte_lengths = torch.tensor(tokenizer.byte_lengths(), device=device)
    precision: str = config.precision
    if precision == "auto":
        precision, _ = machine.faster_precision(model.config, config.batch_size, device)
    found = measure(
        Scored(model),
        windows(ids, context, stride, config.batch_size),
        byte_lengths,
        machine.autocast(device, precision),
        Ranks(device),
    )
    found["perplexity"] = math.exp(found["loss"])
    if config.json:
        print(json.dumps({"model": config.model, "documents": len(documents), "stride_tokens": stride, **found}))
    else:
        numbers = "{bits_per_byte:.4f} bits per byte, {loss:.4f} nats per token, perplexity {perplexity:.2f}".format(**found)
        read = f"{found['tokens']:,.0f} tokens of {len(documents):,} documents"
        print(f"{numbers} on {read} (context {context}, stride {stride})")
    return found


def _joined(texts: Sequence[Sequence[int]], begin_id: int | None, end_id: int | None) -> np.ndarray:
    begin, end = ([] if token_id is None else [token_id] for token_id in (begin_id, end_id))
    return np.array([token_id for ids in texts for token_id in [*begin, *ids, *end]], dtype=np.int64)
