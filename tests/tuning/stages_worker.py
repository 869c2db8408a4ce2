"""What `torchrun` starts in test_stages.py: `worker.py FOLDER` runs FOLDER/NN-STAGE.yaml, one after the other, in one job."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from stages import STAGES

from glassgpt.config.files import read_yaml


def one_store_each() -> None:
    """Let this process join job after job: in the one store of `torchrun` a second job would find the first one's addresses."""
    number, join = itertools.count(), dist.init_process_group

    def init(backend: str, store: dist.Store, **who: int) -> None:
        join(backend, store=dist.PrefixStore(f"job {next(number)}", store), **who)

    dist.init_process_group = init


def main() -> None:
    torch.set_num_threads(1)
    one_store_each()
    for path in sorted(Path(sys.argv[1]).glob("*.yaml")):
        kind, function, *_ = STAGES[path.stem[3:]]
        function(read_yaml(path, kind))


if __name__ == "__main__":
    main()
