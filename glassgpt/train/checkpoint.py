"""Checkpoints: folders that are complete or absent, each one a model that `glassgpt.load` opens."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from glassgpt.config import UserError
from glassgpt.config.errors import first_line
from glassgpt.config.files import complete_folder
from glassgpt.config.folder import SHARDED
from glassgpt.loading import COMPLETE_FILE, complete_checkpoints
from glassgpt.model import GPT, lora, weights
from glassgpt.text import Tokenizer
from glassgpt.train import optim, parallel
from glassgpt.train.parallel import Ranks

OPTIMIZER_FILE = "optimizer.safetensors"
HEAD_FILE = "head.safetensors"
MODEL, OPTIMIZER = "model.", "optimizer."  # prefixes of the tensors' names in a sharded checkpoint


def save(
    run: Path,
    step: int,
    module: nn.Module,
    optimizers: list[Optimizer],
    tokenizer: Tokenizer,
    facts: dict[str, Any],
    ranks: Ranks,
    *,
    sharded: bool = False,
    base: str | None = None,
) -> Path:
    """Write `run/checkpoints/step-NNNNNN`: the plain model, its tokenizer, the optimisers and, last, what must be there.

    `module` is a GPT, or holds one as `model` beside a scalar `head`. A model with adapters is written as these alone, upon the
    model called `base`. `step` counts finished optimiser steps. Random state needs no saving: data order and dropout follow from
    the step. Every rank calls it. Rank 0 writes; with `sharded` each rank writes its own part, and nothing is gathered.
    """
    target = run / "checkpoints" / f"step-{step:06d}"
    model, head = _parts_of(module)
    own = {name: p.detach() for name, p in model.named_parameters()}
    state = optim.state(module, optimizers)
    if not sharded:
        own = {name: parallel.whole(tensor) for name, tensor in own.items()}
        state = {name: parallel.whole(tensor) for name, tensor in state.items()}

    with contextlib.ExitStack() as stack:

        def begin() -> Path:
            if target.exists() and target not in complete_checkpoints(run):
                shutil.rmtree(target)  # a damaged one or half a copy, which resuming has passed over
            return stack.enter_context(complete_folder(target))

        def finish() -> None:
            if sharded:
                weights.save_config(model, aside)
            else:
                if base is None:
                    weights.save(model, aside, tensors=own)
                else:
                    lora.save_adapter(model, aside, base)
                if head is not None:
                    tensors = {name: p.detach().cpu() for name, p in head.named_parameters()}
                    safetensors.torch.save_file(tensors, aside / HEAD_FILE)
                safetensors.torch.save_file({name: t.cpu() for name, t in state.items()}, aside / OPTIMIZER_FILE)
            tokenizer.save(aside)
            sizes = {str(path.relative_to(aside)): path.stat().st_size for path in sorted(aside.rglob("*")) if path.is_file()}
            (aside / COMPLETE_FILE).write_text(json.dumps({"step": step, "files": sizes, **facts}, indent=1))
            stack.close()  # every file on the disk, then the folder's name

        aside = ranks.first(begin)
        if sharded:
            _write_parts(aside, own, state)
        ranks.first(finish)
    return target


def _parts_of(module: nn.Module) -> tuple[GPT, nn.Module | None]:
    """The network of what is trained, and the scalar head beside it, if there is one."""
    return (module, None) if isinstance(module, GPT) else (module.model, module.head)  # type: ignore[return-value]


def _write_parts(folder: Path, own: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    tensors = {f"{MODEL}{name}": tensor for name, tensor in own.items()}
    tensors |= {f"{OPTIMIZER}{name}": _at_least_1d(tensor) for name, tensor in state.items()}
    try:
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder / SHARDED), save_distributed=True))
    except CheckpointException as error:  # no Exception to Python
        raise UserError(f"cannot write {folder}: {first_line(error)}; nothing that was there before has changed") from error


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints and the best one, and what interrupted saves have left."""
    complete = complete_checkpoints(run)
    kept = {*complete[-keep:], *([found] if (found := best(complete)) else [])}
    for folder in complete:
        if folder not in kept:
            shutil.rmtree(folder)
    for folder in (run / "checkpoints").glob(".tmp-step-*"):
        shutil.rmtree(folder, ignore_errors=True)


def best(complete: list[Path]) -> Path | None:
    """The checkpoint with the lowest held-out loss, None when none has been measured."""
    losses = {folder: facts(folder).get("val_loss", math.inf) for folder in complete}
    losses = {folder: loss for folder, loss in losses.items() if math.isfinite(loss)}
    return min(losses, key=lambda folder: losses[folder], default=None)


def facts(folder: Path) -> dict[str, Any]:
    """What a complete checkpoint has noted of itself."""
    found: dict[str, Any] = json.loads((folder / COMPLETE_FILE).read_text())
    return found


def restore(folder: Path, module: nn.Module, optimizers: list[Optimizer]) -> int:
    """Load weights and optimisers in place, whole or sharded, whatever they were saved as; returns the finished steps."""
    model, head = _parts_of(module)
    try:
        step = int(facts(folder)["step"])
        if (folder / SHARDED).is_dir():
            _read_parts(folder, model, optimizers)
            return step
        if (folder / lora.ADAPTER_FILE).is_file():
            lora.load_adapter(model, folder)
        else:
            put(model, weights.load(folder))
        if head is not None:
            head.load_state_dict(safetensors.torch.load_file(folder / HEAD_FILE))
        optim.set_state(module, optimizers, safetensors.torch.load_file(folder / OPTIMIZER_FILE))
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{folder}: cannot restore this checkpoint ({error}); delete it to continue from the one before"
        ) from error
    return step


@torch.no_grad()
def put(model: GPT, source: GPT) -> None:
    """Copy a plain model's weights into one of the same shape that may be sharded."""
    held = dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.copy_(parallel.like(held[name], parameter.data))


def _read_parts(folder: Path, model: GPT, optimizers: list[Optimizer]) -> None:
    import torch.distributed as dist
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = weights.sharded_reader(folder)
    stored = reader.read_metadata().state_dict_metadata
    parameters = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {f"{MODEL}{name}": p.detach() for name, p in parameters.items()}
    state = {}
    for key in (key for key in stored if key.startswith(OPTIMIZER)):
        name = key.removeprefix(OPTIMIZER)
        like = parameters[name.rpartition(":")[0]].detach()
        is_single = stored[key].size != like.shape  # AdamW's count of steps
        state[name] = tensors[key] = torch.zeros(stored[key].size) if is_single else torch.zeros_like(like)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that there is one process
        try:
            load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
        except CheckpointException as error:  # no Exception to Python: it would pass every `except` above
            raise ValueError(first_line(error)) from error
    optim.set_state(model, optimizers, {n: t.reshape(()) if n.endswith(":step") else t for n, t in state.items()})


def _at_least_1d(tensor: Tensor) -> Tensor:
    """The format has no place for a tensor without dimensions."""
    return tensor if tensor.ndim else tensor.reshape(1)
