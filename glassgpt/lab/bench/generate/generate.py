"""`glassgpt bench generate`: greedy generation here and in other engines, each in a process of its own, taking turns."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from glassgpt.config import ModelConfig, UserError, preset
from glassgpt.config.bench import BenchGenerate
from glassgpt.config.files import complete_folder
from glassgpt.data.progress import steps
from glassgpt.lab.bench.generate import floor, process, report
from glassgpt.lab.bench.generate.phases import Phase, phases_of
from glassgpt.lab.bench.generate.process import Failed, Worker
from glassgpt.lab.bench.generate.random_weights import write_weights
from glassgpt.lab.bench.generate.result import Measured, Result
from glassgpt.lab.bench.generate.systems import System, choose


def bench_generate(config: BenchGenerate) -> Result:
    """Measure and report. Raises UserError for unknown systems, phases that do not fit, and a machine too noisy."""
    report.check_pictures(config)
    shape = preset(config.preset, dropout=0.0)
    phases = phases_of(config, shape)
    systems, left_out = choose(config.systems)
    threads = config.threads or torch.get_num_threads()
    limits = floor.measure(shape, {system.bits for system in systems}, threads)  # which also compiles our kernels, if need be
    with _work_folder(config) as folder:
        found = _Run(config, shape, threads, folder, systems, left_out).measure(phases)
    calibration = found.best_calibration_seconds, found.calibration_seconds
    limits = floor.typical(found.floors or [limits])  # memory is shared: a limit of another minute would be another limit
    result = Result(config, shape, threads, phases, found.systems, found.left_out, *calibration, limits)
    noise = result.noise()
    if noise and not config.allow_noise:
        raise UserError(f"the machine was too noisy to compare on: {'; '.join(noise)}; run it again, or use --allow_noise")
    report.show(result)
    return result


class _Run:
    """Systems on their way through the measurement. One that fails is left out from there on; the phases before stay."""

    def __init__(
        self,
        config: BenchGenerate,
        shape: ModelConfig,
        threads: int,
        folder: Path,
        systems: list[System],
        left_out: dict[str, str],
    ) -> None:
        self.config, self.shape, self.threads, self.folder = config, shape, threads, folder
        self.waiting = {system.name: system for system in systems}
        self.left_out = dict(left_out)
        self.systems: dict[str, Measured] = {}
        self.best_calibration_seconds = min(floor.calibrate(threads) for _ in range(floor.TURNS))
        self.calibration_seconds: list[float] = []
        self.floors: list[floor.Floor] = []
        self.workers: dict[str, Worker] = {}

    def measure(self, phases: list[Phase]) -> _Run:
        """Convert the weights, start each system cold a few times, then let all take turns in each phase."""
        try:
            self._prepare()
            self._start_cold()
            for name in list(self.systems):
                with self._left_out_if_it_fails(name):
                    self.workers[name] = self._worker(name)
            for phase in phases:
                self._take_turns(phase)
        finally:
            for worker in self.workers.values():
                worker.close()
        if not self.systems:
            raise UserError("; ".join(f"{name}: {reason}" for name, reason in self.left_out.items()))
        return self

    def _prepare(self) -> None:
        hf_folder = self.folder / "hf"
        if not hf_folder.exists():
            with complete_folder(hf_folder) as aside:
                write_weights(self.shape, self.config.seed, aside)
        with steps("converting weights") as progress:
            for done, (name, system) in enumerate(self.waiting.items(), 1):
                with self._left_out_if_it_fails(name):
                    files = self.folder / name
                    if not files.exists():
                        with complete_folder(files) as aside:
                            process.prepare(system, hf_folder, aside, self.threads, self._log(name))
                    size = sum(path.stat().st_size for path in files.rglob("*") if path.is_file())
                    self.systems[name] = Measured(system.bits, system.is_ours, size)
                progress(done, len(self.waiting))

    def _start_cold(self) -> None:
        """A fresh process for each system, some times over; the files are in the memory's cache from the first."""
        phase = Phase("decode", 1, self.config.prompt_tokens, self.config.new_tokens)
        needed = phase.prompt_tokens + phase.new_tokens
        if needed > self.shape.context_tokens:  # only prefill phases fit it
            phase = Phase("decode", 1, 1, self.shape.context_tokens - 1)
        prompts = phase.prompts(self.shape.vocab_size, self.config.seed)
        with steps("cold starts") as progress:
            total = self.config.starts * len(self.systems)
            for number in range(self.config.starts):
                for place, (name, found) in enumerate(list(self.systems.items()), 1):
                    with self._left_out_if_it_fails(name):
                        start = time.perf_counter()
                        worker = self.workers[name] = self._worker(name)
                        worker.generate(prompts, 1)
                        found.start_seconds.append(time.perf_counter() - start)
                        found.peak_bytes.append(worker.generate(prompts, phase.new_tokens)["peak_bytes"])
                        found.load_seconds.append(worker.load_again())
                        self.workers.pop(name).close()
                    progress(number * len(self.systems) + place, total)

    def _take_turns(self, phase: Phase) -> None:
        """The first turn warms up: it compiles, plans and allocates; its ids are kept. Only a finished phase counts."""
        ids: dict[str, list[list[int]]] = {}
        seconds: dict[str, list[float]] = {name: [] for name in self.workers}
        prompts = phase.prompts(self.shape.vocab_size, self.config.seed)
        with steps(phase.name) as progress:
            bits = {system.bits for system in self.systems.values()}
            for turn in range(self.config.repeats + 1):
                if turn:
                    self.floors.append(floor.measure(self.shape, bits, self.threads))
                for name in list(self.workers):
                    with self._left_out_if_it_fails(name):
                        if turn:
                            self.calibration_seconds.append(floor.calibrate(self.threads))
                        answer = self.workers[name].generate(prompts, phase.new_tokens, phase.warm_tokens if turn else 0)
                        if turn:
                            seconds[name].append(phase.seconds(answer["seconds"]))
                        else:
                            ids[name] = answer["ids"]
                progress(turn + 1, self.config.repeats + 1)
        for name in self.workers:
            self.systems[name].turns[phase.name], self.systems[name].ids[phase.name] = seconds[name], ids[name]

    @contextlib.contextmanager
    def _left_out_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Failed as error:
            if (found := self.systems.get(name)) and found.turns:
                self.left_out[name] = f"after {list(found.turns)[-1]}: {error}"
            else:
                self.left_out[name] = str(error)
                self.systems.pop(name, None)
            if worker := self.workers.pop(name, None):
                worker.close()

    def _worker(self, name: str) -> Worker:
        return Worker(self.waiting[name], self.folder / name, self.threads, self._log(name))

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"


@contextlib.contextmanager
def _work_folder(config: BenchGenerate) -> Iterator[Path]:
    """Where converted weights lie: a folder of this shape and seed that stays, or one that is deleted."""
    if config.work_dir is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    kept = Path(config.work_dir) / f"{config.preset}-{config.seed}"
    kept.mkdir(parents=True, exist_ok=True)
    yield kept
