"""What surrounds the arithmetic of every training stage: folder, log, progress, signals, bad steps, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from glassgpt.config import OptimConfig, ParallelConfig, UserError
from glassgpt.config.files import CONFIG_FILE, read_yaml, to_plain, write_yaml
from glassgpt.loading import complete_checkpoints
from glassgpt.text import Tokenizer
from glassgpt.train import checkpoint, guard, machine, optim, parallel
from glassgpt.train.parallel import Ranks
from glassgpt.train.run import LOG_FILE, Log, Progress, Silent, Trackers, plot_loss

PLOT_SECONDS = 30.0
MOST_SKIPPED = 100
"""Steps in a row that `--bad_steps skip` leaves out before it gives up."""


class Settings(Protocol):
    """What every stage's configuration has."""

    @property
    def out_dir(self) -> str: ...
    @property
    def resume(self) -> bool: ...
    @property
    def optim(self) -> OptimConfig: ...
    @property
    def seed(self) -> int: ...
    @property
    def save_interval(self) -> int: ...
    @property
    def keep_checkpoints(self) -> int: ...
    @property
    def spike_deviations(self) -> float: ...
    @property
    def track(self) -> tuple[str, ...]: ...


Config = TypeVar("Config", bound=Settings)


@contextlib.contextmanager
def joined(run: Path, config: ParallelConfig, device: str) -> Iterator[Ranks]:
    """This process's place in the job. When another rank ends, the first that is left says who, and where to go on from."""
    with parallel.joined(config, device) as ranks:
        machine.keep_freed_memory()
        try:
            yield ranks
        except (RuntimeError, ConnectionError) as error:
            if lost := _lost_rank(run, ranks, error):
                raise lost from error
            raise


def open_folder(run: Path, config: Config, fixed: tuple[str, ...], resolve: Callable[[Config | None], Config]) -> Config:
    """Make the run folder and write the resolved configuration, or check that a resumed run asks for the same in `fixed`.

    `resolve(before)` gives the configuration with nothing left to choose: from what the run was started with, or afresh (None).
    """
    path = run / CONFIG_FILE
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 and path.exists()  # by torchrun, after a rank ended
    if config.resume and not path.exists():
        raise UserError(f"nothing to resume: {run} holds no run (no {path})")
    if config.resume or restarted:
        before = read_yaml(path, type(config))
        for name in fixed:
            asked, was = getattr(config, name), getattr(before, name)
            if asked != was and asked != "auto":
                raise UserError(
                    f"{run} was started with {name} = {was}; resuming asks for {asked}."
                    " Leave it as it was, or start a new run in another out_dir"
                )
        return resolve(before)
    if path.exists() and (run / LOG_FILE).exists():
        raise UserError(f"{run} holds a run already; continue it with --resume, or choose another out_dir")
    if not path.exists() and run.exists() and any(run.iterdir()):
        raise UserError(f"{run} is not empty and holds no run; choose another out_dir")
    resolved = resolve(None)
    try:
        run.mkdir(parents=True, exist_ok=True)
        write_yaml(path, resolved)
    except OSError as error:
        raise UserError(f"cannot make the run folder {run}: {error.strerror}") from error
    return resolved


class Session:
    """One run from its newest checkpoint on, as a context manager; the stage's own loop stays flat:

    ```
    with Session(...) as session:
        for step in session.steps():
            ...                                     # forward and backward, micro-batch by micro-batch
            loss = session.update(nats, count)      # over all ranks: check, clip, step
            session.finish({"loss": loss, ...}, "what the progress line says")
    ```
    """

    def __init__(
        self,
        command: str,
        config: Settings,
        ranks: Ranks,
        model: nn.Module,
        tokenizer: Tokenizer,
        optimizers: list[Optimizer],
        total_steps: int,
        *,
        skip_bad: bool = False,
        sums_gradients: bool = True,
        saved_as: Mapping[str, Any] | None = None,
    ) -> None:
        """`model` is what is trained and saved: a GPT, or a module that holds one as `model`. `sums_gradients` adds up the
        ranks' gradients here (otherwise the model does so itself); `saved_as` is handed to `checkpoint.save`."""
        self.run, self.step, self.total_steps = Path(config.out_dir), 0, total_steps
        self.ranks, self.is_stopping = ranks, False
        self._command, self._config, self._model = command, config, model
        self._tokenizer, self._optimizers, self._skip_bad = tokenizer, optimizers, skip_bad
        self._sums_gradients, self._saved_as = sums_gradients, saved_as or {}
        self._saved = complete_checkpoints(self.run)
        self._plotted, self._left_out, self._began = 0.0, 0, 0.0
        self._marks: dict[str, bool] = {}
        self.kept: dict[str, Any] = {}
        """What a stage knows beside its weights: every checkpoint holds it, and it is here again when a run goes on."""
        if self._saved:
            self.step = checkpoint.restore(self._saved[-1], model, optimizers)
            self.kept = checkpoint.facts(self._saved[-1]).get("kept", {})

    def __enter__(self) -> Session:
        with contextlib.ExitStack() as stack:
            is_first, config = self.ranks.is_first, self._config
            self._stop = stack.enter_context(guard.Stop(has_mates=self.ranks.world > 1))
            self.log = stack.enter_context(contextlib.closing(Log(self.run, self.step, writes=is_first)))
            tracked = config.track if is_first else ()
            self._trackers = stack.enter_context(contextlib.closing(Trackers(tracked, self.run, to_plain(config))))
            self.progress = stack.enter_context(Progress(self.run.name, self.total_steps, self.step) if is_first else Silent())
            self._spikes = guard.Spikes(config.spike_deviations, [entry["loss"] for entry in self.log.before])
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    def say(self, text: str) -> None:
        """Print a line above the progress view."""
        self.progress.say(text)

    def is_due(self, interval: int) -> bool:
        """Whether something that happens every so many steps (0: only at the end) is due after the step that is under way."""
        return self.step + 1 == self.total_steps or bool(interval and (self.step + 1) % interval == 0)

    def steps(self) -> Iterator[int]:
        """The numbers of the steps that are left, from 0. Dropout and every other draw follow from step and rank."""
        while self.step < self.total_steps and not self.is_stopping:
            self._began, self._marks = time.perf_counter(), {}
            torch.manual_seed((self._config.seed * 1_000_003 + self.step) * 4096 + self.ranks.data_rank)
            self.rate = optim.learning_rate(self.step, self.total_steps, self._config.optim)
            optim.set_rate(self._optimizers, self.rate)
            yield self.step

    def update(self, total: float, count: float, tell: Callable[[], str] | None = None) -> float:
        """Apply the gradients; returns the loss: the sum of this rank's `total` over all ranks, divided by `count`.

        A loss or gradient that is not finite is never applied: it stops the run with a UserError, or is left out. `tell` says
        which text was the worst.
        """
        if self._sums_gradients:
            parallel.sum_gradients(self._model, self.ranks)
        nats, stopping = self.ranks.total([total, float(self._stop.signal is not None)])
        loss, self.is_stopping = nats / count, self.is_stopping or bool(stopping)
        self.norm = optim.clip(self._model, self._config.optim.grad_clip)
        is_finite = math.isfinite(loss) and math.isfinite(self.norm)
        is_spike = self._spikes.sees(loss)
        if not is_finite or is_spike:
            what = f"a spike: typical is {self._spikes.typical()[0]:.4f}" if is_finite else "not finite"
            told = f". The worst row: {tell()}" if tell else ""
            self.say(f"step {self.step + 1}: loss {loss:.4f}, gradient norm {self.norm:.4g}: {what}{told}")
        if not is_finite and not self._skip_bad:
            raise self.ranks.error(self._diverged(loss))
        skipped = self._skip_bad and (not is_finite or is_spike)
        self._left_out = self._left_out + 1 if skipped else 0
        if self._left_out > MOST_SKIPPED:
            raise self.ranks.error(
                f"step {self.step + 1}: the last {self._left_out} steps were all left out, so nothing is learned any more. Last"
                f" complete checkpoint: {self._saved[-1] if self._saved else 'none'} (try a lower optim.learning_rate, now"
                f" {self._config.optim.learning_rate}, or --spike_deviations 0)"
            )
        for optimizer in self._optimizers:
            if not skipped:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._marks |= {name: True for name, true in (("spike", is_spike), ("skipped", skipped)) if true}
        return loss

    def _diverged(self, loss: float) -> str:
        good = self._saved
        if not math.isfinite(loss):  # the weights of a checkpoint written by the step before are the ones that have just failed
            good = [folder for folder in good if folder.name != f"step-{self.step:06d}"]
        more = ", or --bad_steps skip" if self._command == "pretrain" else ""
        return (
            f"step {self.step + 1}: loss {loss}, gradient norm {self.norm}: training has diverged; this step was not applied."
            f" Last good checkpoint: {good[-1] if good else 'none'}"
            f" (try a lower optim.learning_rate, now {self._config.optim.learning_rate}{more})"
        )

    def entry(self, loss: float, **count: float) -> dict[str, Any]:
        """The beginning of the log's line for the step under way, of so many tokens or pairs."""
        seconds = round(time.perf_counter() - self._began, 4)
        first = {"step": self.step + 1, "loss": loss, "grad_norm": self.norm, "lr": self.rate}
        return first | count | {"seconds": seconds} | self._marks

    def finish(self, entry: dict[str, Any], speed: str) -> None:
        """End the step: log, progress line, and where it is due, or a signal has come, checkpoint and plot.

        The checkpoint notes what of the entry begins with `val_`.
        """
        self.step += 1
        self.log.write(entry)
        self._trackers.send(entry)
        self.progress.update(self.step, entry["loss"], speed, machine.memory_bytes(self.ranks.device))
        last, interval = self.step == self.total_steps, self._config.save_interval
        if last or self.is_stopping or (interval and self.step % interval == 0):
            self.save({key: value for key, value in entry.items() if key.startswith("val_")})
            if self.ranks.is_first and (last or self.is_stopping or time.perf_counter() - self._plotted > PLOT_SECONDS):
                plot_loss(self.run)
                self._plotted = time.perf_counter()
        if self.is_stopping and not last:
            resume = resume_command(self._command, self.run, self.ranks.world)
            self.say(f"stopped after step {self.step}, which is saved; continue with\n  {resume}")
            if self._stop.signal == signal.SIGINT:
                raise KeyboardInterrupt

    def save(self, facts: dict[str, Any]) -> None:
        """Write a checkpoint of the steps that are done, if there is none."""
        if self._saved and self._saved[-1].name == f"step-{self.step:06d}":
            return
        state = (self._model, self._optimizers, self._tokenizer)
        facts |= {"stage": self._command, "total_steps": self.total_steps} | ({"kept": self.kept} if self.kept else {})
        folder = checkpoint.save(self.run, self.step, *state, facts, self.ranks, **self._saved_as)
        self._saved.append(folder)
        if self.ranks.is_first:
            checkpoint.prune(self.run, self._config.keep_checkpoints)


def resume_command(command: str, run: Path, world: int = 1) -> str:
    """What continues a run, on as many processes; on several hosts `torchrun` needs what it was given there too."""
    here = os.environ.get("LOCAL_WORLD_SIZE", world)
    start = "glassgpt" if world == 1 else f"torchrun --nproc-per-node {here} -m glassgpt"
    return f"{start} {command} --resume --out_dir {run}"


def without(config: Any, *names: str) -> tuple[str, ...]:
    """The names of a configuration's fields but for these."""
    return tuple(field.name for field in dataclasses.fields(config) if field.name not in names)


def _lost_rank(run: Path, ranks: Ranks, error: Exception) -> UserError | None:
    """What the ranks that are left say: who is gone, and where to go on from. Only the first of them says it aloud.

    None when the error is this rank's own.
    """
    if ranks.world == 1 or getattr(error, "own", False):
        return None
    gone = ranks.gone()
    for _ in range(20 * (not gone)):
        time.sleep(0.1)
        gone = ranks.gone()
    if not gone and "onnection" not in str(error):
        return None
    names = ", ".join(f"rank {rank} (host {ranks.processes[rank][0]}, process {ranks.processes[rank][1]})" for rank in gone)
    saved = complete_checkpoints(run)
    told = UserError(
        f"{names or 'a rank on another host'} has ended, so this job cannot go on. Last complete checkpoint:"
        f" {saved[-1] if saved else 'none'}; continue with the same command and --resume, or start torchrun with --max-restarts"
    )
    is_first_left = ranks.rank == min(rank for rank in ranks.processes if rank not in gone)
    return told if is_first_left else parallel.QuietError(str(told))
