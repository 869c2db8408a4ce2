"""What a rung of the ladder costs: speed of training and of decoding, memory, cache. All rungs take turns in one process."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glassgpt.config.generate import Sampling
from glassgpt.config.ladder import Ladder, Rung
from glassgpt.data import Batch
from glassgpt.generation import KVCache, stream
from glassgpt.generation.generator import Generator
from glassgpt.model import GPT, plain, use_attention
from glassgpt.train import machine, optim
from glassgpt.train.loss import Scored

TURN_SECONDS = 0.4
"""A turn's training is at least one step, and goes on for so long."""
FIRST_LOSSES = 5
"""Losses that are kept, to compare two ways of computing the same."""
DECODED_TOKENS = 128
"""Tokens that a turn writes at most: half the context if that is less."""


@dataclass(frozen=True)
class Cost:
    """What was measured of one rung."""

    kernel: str
    """Name of the attention function."""
    step_seconds: list[float] = field(default_factory=list)
    """Of every timed training step."""
    token_seconds: list[float] = field(default_factory=list)
    """Of one decoded token, a mean for each turn."""
    peak_bytes: int = 0
    """Most bytes of tensors alive at once in training: weights, gradients, optimiser, activations."""
    cache_bytes_per_token: float = 0.0
    """Keys and values of one sequence as long as the context, over its tokens; float32 or the precision's own."""
    first_losses: list[float] = field(default_factory=list)
    """Nats per token of the first steps from one seed: equal for two ways of computing the same."""

    @property
    def step(self) -> float:
        """Median seconds of a training step."""
        return statistics.median(self.step_seconds)

    @property
    def decode_rate(self) -> float:
        """Median tokens a second, one sequence."""
        return 1 / statistics.median(self.token_seconds)


def measure(
    config: Ladder, rungs: Sequence[Rung], batch: Callable[[int], Batch], device: torch.device, say: Callable[[str], None]
) -> dict[str, Cost]:
    """Costs by rung. `batch(step)` gives the training batches; weights are random.

    In a turn every rung is built, decodes, makes one step that does not count and then steps for TURN_SECONDS: no other is in
    memory beside it, and a moment of other load meets all.
    """
    machine.keep_freed_memory()
    costs = {}
    for rung in rungs:
        peak = _peak_bytes(partial(_Trainee, rung, config, batch, device), device)
        cache_bytes = _cache_bytes(rung, config, device)
        costs[rung.name] = Cost(kernel(rung, device).__name__, peak_bytes=peak, cache_bytes_per_token=cache_bytes)
        trainee = _Trainee(rung, config, batch, device)
        costs[rung.name].first_losses.extend(trainee.step() for _ in range(FIRST_LOSSES))
    for turn in range(config.turns):
        for rung in rungs:
            trainee, cost = _Trainee(rung, config, batch, device), costs[rung.name]
            cost.token_seconds.append(_token_seconds(trainee.model, config, device))
            trainee.step()
            end = time.perf_counter() + TURN_SECONDS
            while (start := time.perf_counter()) < end:
                trainee.step()
                cost.step_seconds.append(time.perf_counter() - start)
        say(f"speed: turn {turn + 1} of {config.turns}")
    return costs


def kernel(rung: Rung, device: torch.device) -> Callable[..., Tensor]:
    """The attention function of a rung."""
    return plain if rung.written_out else machine.attend_by(device)


class _Trainee:
    """A rung's model that trains step by step, as `pretrain` does."""

    def __init__(self, rung: Rung, config: Ladder, batch: Callable[[int], Batch], device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.model = GPT(rung.model).to(device)
        use_attention(self.model, kernel(rung, device))
        self._scored = Scored(self.model)
        self._optimizers: list[Optimizer] = optim.build(self.model, rung.optim)
        self._low_precision = machine.autocast(device, config.precision)
        self._batch, self._device, self._clip, self._steps = batch, device, rung.optim.grad_clip, 0

    def step(self) -> float:
        """Nats per token of the batch, before the update."""
        batch = self._batch(self._steps)
        with self._low_precision:
            loss = self._scored(batch.ids.to(self._device), batch.targets.to(self._device))
        (loss / batch.count).backward()
        optim.clip(self.model, self._clip)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._steps += 1
        _wait(self._device)
        return loss.item() / batch.count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _token_seconds(model: GPT, config: Ladder, device: torch.device) -> float:
    """Of one token after the first, greedy, one sequence, from a prompt of half the context."""
    T = model.config.context_tokens
    prompt = [number % model.config.vocab_size for number in range(max(1, T // 2))]
    new_tokens = max(2, min(DECODED_TOKENS, T // 2))
    with machine.autocast(device, config.precision):  # a token's id is on this side when it is given out, so its step is over
        written = stream(model.eval(), [prompt], Sampling(temperature=0), [Generator()], new_tokens)
        stamps = [time.perf_counter() for _ in written]
    model.train()
    return (stamps[-1] - stamps[0]) / (len(stamps) - 1)


@torch.inference_mode()
def _cache_bytes(rung: Rung, config: Ladder, device: torch.device) -> float:
    """Bytes that a cache holds for a full context, over its tokens: read off the cache itself."""
    T = rung.model.context_tokens
    model, cache = GPT(rung.model).to(device).eval(), KVCache(rung.model)
    with machine.autocast(device, config.precision):
        model.hidden(torch.zeros(1, T, dtype=torch.long, device=device), cache)
    return cache.nbytes / T


def _peak_bytes(make: Callable[[], _Trainee], device: torch.device) -> int:
    """Of building and two steps, the second of which has the optimiser's state from its start."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        trainee = make()
        trainee.step(), trainee.step()
        return torch.cuda.max_memory_allocated(device) - before
    with Held() as held:
        trainee = make()
        trainee.step(), trainee.step()
    return held.peak


class Held(TorchDispatchMode):
    """Bytes of the tensors that operations under it make, while they live: what a GPU's allocator tells by itself.

    The process's own memory would not do: all rungs share it, and beside PyTorch a small model's is nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, lambda _: self._drop(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size
