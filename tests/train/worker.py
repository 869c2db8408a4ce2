"""What `torchrun` starts in tests/train/test_parallel.py: every run of a list, one after the other, in one job.

`worker.py FOLDER`: FOLDER/*.yaml are `Pretrain` configurations, in the order of their names; what cannot be seen in a run
folder is written to FOLDER/RANK.json.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from glassgpt.config import OptimConfig, ParallelConfig, Pretrain, preset
from glassgpt.config.files import read_yaml
from glassgpt.data import Stream, Windows
from glassgpt.model import GPT, use_attention
from glassgpt.train import checkpoint, guard, machine, optim, parallel
from glassgpt.train.loss import Scored
from glassgpt.train.pretrain import pretrain

ROWS = 8


def curve64(config: ParallelConfig, accumulation_steps: int, rate: float = 0.003, steps: int = 6) -> list[float]:
    """The training loop's arithmetic in float64: loss and gradient norm of each step."""
    import numpy as np

    ids = np.random.default_rng(0).integers(300, size=4000).astype(np.uint16)
    with parallel.joined(config, "cpu") as ranks:
        torch.manual_seed(0)
        model = GPT(preset("tiny", vocab_size=300)).double()
        use_attention(model, machine.attend_by(ranks.device))
        with torch.no_grad():
            for parameter in model.parameters():  # zero biases would hide mistakes
                parameter += 0.05 * torch.randn_like(parameter)
        trained = parallel.spread(Scored(model), config, ranks, compiled=False, checkpoint_activations=False)
        optimizers = optim.build(model, OptimConfig(learning_rate=rate))
        size, micro_batches = parallel.share_batch(ROWS // accumulation_steps, accumulation_steps, ranks.data_world)
        stream = Stream([Windows([ids], 32, (0,))], [1.0], size, micro_batches, ranks.data_world)
        found = []
        for step in range(steps):
            batches = [stream.batch(step, micro, ranks.data_rank) for micro in range(micro_batches)]
            count, nats = sum(batch.count for batch in batches) * ranks.data_world, 0.0
            for micro, batch in enumerate(batches):
                parallel.synchronise(trained, on=micro == micro_batches - 1)
                loss = trained(batch.ids, batch.targets, None)
                (loss * (ranks.data_world / count)).backward()
                nats += loss.item()
            norm = optim.clip(model, 1.0)
            found += [ranks.total([nats])[0] / count, norm]
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    return found


CURVES = {
    "ddp": (ParallelConfig(), 1),
    "ddp, accumulated": (ParallelConfig(), 8),
    "fsdp": (ParallelConfig(strategy="fsdp"), 1),
    "fsdp, accumulated": (ParallelConfig(strategy="fsdp"), 8),
}


def one_store_each() -> None:
    """Let this process join job after job: in the one store of `torchrun` a second job would find the first one's addresses."""
    number, join = itertools.count(), dist.init_process_group

    def init(backend: str, store: dist.Store, **who: int) -> None:
        join(backend, store=dist.PrefixStore(f"job {next(number)}", store), **who)

    dist.init_process_group = init


def save_gathered_too() -> None:
    """Beside each sharded checkpoint the same state gathered, in RUN/gathered."""
    save = checkpoint.save

    def both(run: Path, *rest: Any, sharded: bool) -> Path:
        if sharded:
            save(run / "gathered", *rest, sharded=False)
        return save(run, *rest, sharded=sharded)

    checkpoint.save = both


def call_every_third_step_a_spike() -> None:
    """Its report looks at the batch again, which must not disturb the training."""
    sees, number = guard.Spikes.sees, itertools.count(1)

    def third(spikes: guard.Spikes, loss: float) -> bool:
        sees(spikes, loss)
        return next(number) % 3 == 0

    guard.Spikes.sees = third


def main() -> None:
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    torch.set_num_threads(1)
    one_store_each()
    save_gathered_too()
    call_every_third_step_a_spike()
    for path in sorted(folder.glob("*.yaml")):
        pretrain(read_yaml(path, Pretrain))
    found: dict[str, object] = {}
    if os.environ["WORLD_SIZE"] == "2":
        found["curves"] = {name: curve64(*how) for name, how in CURVES.items()}
        with parallel.joined(ParallelConfig(), "cpu") as ranks:
            found["ranks"] = {**dataclasses.asdict(dataclasses.replace(ranks, device=None, mesh=None)), "gone": ranks.gone()}
            found["total"] = ranks.total([1.0 + ranks.rank, 10.0])
            found["gathered"] = ranks.gather(f"of {ranks.rank}")
            found["first"] = ranks.first(lambda: f"made by {ranks.rank}")
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
