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
STEPS, SAE_FEATURES, SAE_K, SAE_L1 = 500, 2048, 32, 2.0
"""Where the user says nothing."""


def tuned(config: Inspect, read: Read) -> TunedLens | None:
    """The lens in the folder of --tuned-lens, trained first where there is none; None when none is asked for."""
    if config.tuned_lens is None:
        return None
    folder = Path(config.tuned_lens)
    if not folder.exists():
        number = config.steps or STEPS
        batches = list(itertools.islice(windows(config, read, "--tuned-lens"), number))
        with steps("training the tuned lens") as progress:
            train_tuned_lens(read.model, _repeated(batches), steps=number, progress=progress).save(folder)
    elif config.steps or config.source:
        raise UserError(f"{folder}: this tuned lens is trained already; leave out --source and --steps, or name another folder")
    return TunedLens.load(folder, read.model)


def autoencoder(config: Inspect, read: Read) -> tuple[TrainedSae, list[Tensor]]:
    """The autoencoder in the folder of --sae, trained first where there is none, and batches that it was not trained on."""
    folder = Path(str(config.sae))
    if folder.exists():
        _check_options(config, load_sae(folder), folder)
    needed = SAE_TOKENS // (ROWS * WINDOW_TOKENS)
    batches = list(itertools.islice(windows(config, read, "--sae"), needed)) if config.source or not folder.exists() else []
    held_out = max(1, round(HELD_OUT_SHARE * len(batches)))
    if not folder.exists():
        if len(batches) < 2:
            raise UserError(
                f"--source has less than {2 * ROWS * WINDOW_TOKENS} tokens, too few for an autoencoder; give more text"
            )
        at = config.sae_at or f"blocks.{(read.model.config.n_layer - 1) // 2}"
        features = config.sae_features or SAE_FEATURES
        sparse = {"k": None, "l1": SAE_L1} if config.sae_kind == "l1" else {"k": min(SAE_K, features), "l1": None}
        options = SaeConfig(features=features, steps=config.steps or STEPS, seed=config.seed, **sparse)
        with steps("training the autoencoder") as progress:
            save_sae(train_sae(read.model, at, batches[:-held_out], options, progress), folder)
    return load_sae(folder), batches[-held_out:] if batches else []


def _check_options(config: Inspect, trained: TrainedSae, folder: Path) -> None:
    """Options of a training that is over cannot be changed: what is there must be what is asked for."""
    kind = "l1" if trained.config.k is None else "topk"
    known = {"sae_at": trained.name, "sae_features": trained.config.features, "sae_kind": kind, "steps": trained.config.steps}
    for name, there in known.items():
        asked = getattr(config, name)
        if asked is not None and asked != there:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{folder}: this autoencoder was trained with {flag} {there}, not {asked}; name another folder to train one"
            )


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
