"""More than one process: who this one is, and the plain model spread over all of them. `torchrun` starts them.

The model's code knows nothing of it: DDP wraps it, FSDP2 and tensor parallelism replace its parameters from outside.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from glassgpt.config import ParallelConfig, UserError
from glassgpt.loading import pick_device
from glassgpt.model.mlp import MLP, GatedMLP
from glassgpt.train.loss import Scored

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """The processes of a job and this one's place among them."""

    device: torch.device
    rank: int = 0
    world: int = 1
    tensor_parallel: int = 1
    mesh: DeviceMesh | None = None
    """("data", "tensor"): ranks of one row share the model's matrices, ranks of one column share the data."""
    processes: dict[int, tuple[str, int]] = field(default_factory=dict)
    """rank -> (host, process id)."""

    @property
    def is_first(self) -> bool:
        """Only this one prints and writes."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of the data this rank takes."""
        return self.rank // self.tensor_parallel

    @property
    def data_world(self) -> int:
        """Into how many shares the data are parted."""
        return self.world // self.tensor_parallel

    def error(self, message: str) -> UserError:
        """A mistake that every rank finds at the same time: the first rank is to tell of it."""
        return UserError(message) if self.is_first else QuietError(message)

    def first(self, function: Callable[[], Result]) -> Result:
        """Run `function` on rank 0; every rank gets its result, or its UserError (a QuietError on the others)."""
        if self.world == 1:
            return function()
        outcome: list[object] = [None, None]
        failure: Exception | None = None
        if self.is_first:
            try:
                outcome[0] = function()
            except Exception as error:
                failure, outcome[1] = error, str(error)
                error.own = True  # type: ignore[attr-defined]  # no other rank's end is to blame
        dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
        if failure is not None:
            raise failure
        if outcome[1] is not None:
            raise QuietError(str(outcome[1]))
        return cast(Result, outcome[0])

    def total(self, values: list[float]) -> list[float]:
        """Sums over the ranks that share the data, in float64."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return (tensor / self.tensor_parallel).tolist()

    def gather(self, value: Result) -> list[Result]:
        """The value of every rank, on every rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def gone(self) -> list[int]:
        """Ranks on this host whose process has ended."""
        here = socket.gethostname()
        return [rank for rank, (host, process) in self.processes.items() if host == here and not _runs(process)]


class QuietError(UserError):
    """A mistake that another rank has told of already."""

    told = True


@contextlib.contextmanager
def joined(config: ParallelConfig, device: str) -> Iterator[Ranks]:
    """The job that `torchrun` has started, or this process alone.

    Raises UserError for a number of ranks that `tensor_parallel` does not divide.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        if config.tensor_parallel > 1:
            raise UserError(f"parallel.tensor_parallel is {config.tensor_parallel}, with one process; start with torchrun")
        yield Ranks(pick_device(device))
        return
    if world % config.tensor_parallel:
        raise UserError(f"{world} ranks cannot be parted by parallel.tensor_parallel = {config.tensor_parallel}")
    if config.tensor_parallel not in (1, world) and config.strategy != "fsdp":
        raise UserError("tensor parallelism beside data parallelism needs --parallel.strategy fsdp")
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)  # before anything is allocated, or every rank opens the first GPU
    here = pick_device(device)
    if here.type == "cuda":
        here = torch.device("cuda", local_rank)
    store, _, _ = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    # torchrun's store outlives a restart, and in it lie the addresses of the ranks before: each attempt gets keys of its own
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt {attempt}", store)  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo"
    # a rank that ends is noticed at once; the limit is for what takes long, such as rank 0 tokenising for all
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(days=2))
    try:
        shape = (world // config.tensor_parallel, config.tensor_parallel)
        mesh = init_device_mesh(here.type, shape, mesh_dim_names=("data", "tensor"))
        found: list[tuple[str, int]] = [("", 0)] * world
        dist.all_gather_object(found, (socket.gethostname(), os.getpid()))
        yield Ranks(here, rank, world, config.tensor_parallel, mesh, dict(enumerate(found)))
    finally:
        dist.destroy_process_group()


def share_batch(batch_size: int, accumulation_steps: int, world: int) -> tuple[int, int]:
    """(rows in a micro-batch, micro-batches) of one rank of `world`, so that a step is the same rows on any number of ranks.

    Raises UserError when the rows of a step cannot be parted evenly.
    """
    rows = batch_size * accumulation_steps
    if rows % world:
        raise UserError(
            f"a step has batch_size * accumulation_steps = {rows} sequences, which {world} ranks cannot share evenly;"
            " change one of the three"
        )
    mine = rows // world
    micro = min(batch_size, mine)
    while mine % micro:
        micro -= 1
    return micro, mine // micro


def spread(scored: Scored, config: ParallelConfig, ranks: Ranks, *, compiled: bool, checkpoint_activations: bool) -> nn.Module:
    """The model as this job trains it. Blocks are compiled, recomputed and sharded one by one, as they are alike."""
    for block in scored.model.blocks:
        if checkpoint_activations:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if compiled:
            block.compile()
    if ranks.mesh is None:
        return scored
    if ranks.tensor_parallel > 1:
        for module in scored.model.modules():
            if isinstance(module, MLP | GatedMLP):
                inward: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in ("gate", "up") if hasattr(module, name)}
                parallelize_module(module, ranks.mesh["tensor"], {**inward, "down": RowwiseParallel()})
    if ranks.data_world == 1:
        return scored
    if config.strategy == "fsdp":
        for block in scored.model.blocks:
            fully_shard(block, mesh=ranks.mesh["data"])
        fully_shard(scored, mesh=ranks.mesh["data"])
        return scored
    devices = [ranks.device.index] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(scored, device_ids=devices)


def synchronise(trained: nn.Module, on: bool) -> None:
    """Whether the next backward pass exchanges gradients: once a step, in its last micro-batch."""
    if isinstance(trained, DistributedDataParallel):
        trained.require_backward_grad_sync = on
    elif isinstance(trained, FSDPModule):
        trained.set_requires_gradient_sync(on)


def sum_gradients(module: nn.Module, ranks: Ranks) -> None:
    """Add up the gradients of all ranks, in order of the parameters, for a model that lies whole on each of them."""
    for parameter in module.parameters():
        if ranks.world > 1 and parameter.requires_grad:
            if parameter.grad is None:  # this rank's share had no use for it
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


def reshard(trained: nn.Module) -> None:
    """After a forward pass without a backward one: FSDP would go on with the gathered weights of now."""
    if isinstance(trained, FSDPModule):
        trained.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered (every rank must call it), any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole tensor spread over the ranks as `model` is; every rank must hold it."""
    tensor = tensor.to(model.device, model.dtype)
    if isinstance(model, DTensor) and tensor.ndim:
        return distribute_tensor(tensor, model.device_mesh, model.placements, src_data_rank=None)
    return tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter lies on several ranks."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _runs(process: int) -> bool:
    """Whether a process of this machine lives; one that has ended and was not waited for does not."""
    try:
        os.kill(process, 0)
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:
        return True  # no /proc, or somebody else's
