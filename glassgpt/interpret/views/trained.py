"""What is trained once and then read: tuned lenses and sparse autoencoders, in folders that the user names."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from glassgpt.config import UserError
from glassgpt.config.inspect import Inspect
from glassgpt.data.progress import steps
from glassgpt.data.sources import documents
from glassgpt.interpret.lens import TunedLens, train_tuned_lens
from glassgpt.interpret.sae import SaeConfig, TrainedSae, load_sae, save_sae, train_sae
from glassgpt.interpret.views.view import Read

WINDOW_TOKENS = 128
ROWS = 8
SAE_TOKENS = 200_000
"""Tokens whose activations an autoencoder is trained on, at most: they are held in memory."""
HELD_OUT_SHARE = 0.1


def tuned(config: Inspect, read: Read) -> TunedLens | None:
    """The lens in the folder of --tuned-lens, trained first where there is none; None when none is asked for."""
    if config.tuned_lens is None:
        return None
    folder = Path(config.tuned_lens)
    if not folder.exists():
        batches = itertools.islice(windows(config, read, "--tuned-lens"), config.steps)
        with steps("training the tuned lens") as progress:
            train_tuned_lens(read.model, _repeated(list(batches)), steps=config.steps, progress=progress).save(folder)
    return TunedLens.load(folder, read.model)


def autoencoder(config: Inspect, read: Read) -> tuple[TrainedSae, list[Tensor]]:
    """The autoencoder in the folder of --sae, trained first where there is none, and batches that it was not trained on."""
    folder = Path(str(config.sae))
    needed = SAE_TOKENS // (ROWS * WINDOW_TOKENS)
    batches = list(itertools.islice(windows(config, read, "--sae"), needed)) if config.source or not folder.exists() else []
    held_out = max(1, round(HELD_OUT_SHARE * len(batches)))
    if not folder.exists():
        if len(batches) < 2:
            raise UserError(
                f"--source has less than {2 * ROWS * WINDOW_TOKENS} tokens, too few for an autoencoder; give more text"
            )
        at = config.sae_at or f"blocks.{(read.model.config.n_layer - 1) // 2}"
        sparse = {"k": 32, "l1": None} if config.sae_kind == "topk" else {"k": None, "l1": 2.0}
        options = SaeConfig(features=config.sae_features, steps=config.steps, seed=config.seed, **sparse)
        with steps("training the autoencoder") as progress:
            save_sae(train_sae(read.model, at, batches[:-held_out], options, progress), folder)
    return load_sae(folder), batches[-held_out:] if batches else []


def windows(config: Inspect, read: Read, option: str) -> Iterator[Tensor]:
    """Batches of ids (ROWS, WINDOW_TOKENS) of the text in --source, windows side by side."""
    if not config.source:
        raise UserError(
            f"{option} {getattr(config, option[2:].replace('-', '_'))}: nothing there yet; to train it, give --source TEXT"
        )
    length = min(WINDOW_TOKENS, read.model.config.context_tokens)
    ids: list[int] = []
    for text in documents(config.source):
        ids += read.tokenizer.encode_start(text)
        while len(ids) >= ROWS * length:
            yield torch.tensor(ids[: ROWS * length], device=read.ids.device).view(ROWS, length)
            del ids[: ROWS * length]


def _repeated(batches: list[Tensor]) -> Iterator[Tensor]:
    """Short texts are read again."""
    if not batches:
        raise UserError(f"--source has less than {ROWS * WINDOW_TOKENS} tokens; give more text")
    return itertools.cycle(batches)
