"""`glassgpt bench inspect`: capturing and patching here and in TransformerLens, each in a process of its own, taking turns."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import tokenizers
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from glassgpt.config import ModelConfig, UserError, preset
from glassgpt.config.bench import BenchInspect
from glassgpt.interpret.hooks import capture
from glassgpt.interpret.page.html import page
from glassgpt.interpret.page.report import MOST_TOKENS, collect
from glassgpt.interpret.patching import logit_difference, patch_sweep
from glassgpt.lab.bench.hf_peer import hf_peer
from glassgpt.lab.bench.train import answer
from glassgpt.model import GPT
from glassgpt.text import Tokenizer
from glassgpt.train import machine

PEER = "TransformerLens"
WORK = {"forward": "forward pass", "capture": "everything captured", "patch": "patching, layers x positions"}
WARMED = ("forward", "capture")
"""Timed after a turn to warm up; patching takes too long for that."""
ALONE = {"page": "page of inspect --html"}
"""What the peer has not."""
SAME = 1e-3
"""Both sides' numbers must be as close as this, in float32."""
ANSWER, AGAINST = 1, 2  # token ids whose logits' difference is the metric


@dataclass(frozen=True)
class Timing:
    """What one system took for one piece of work, in each turn."""

    seconds: list[float]
    peak_bytes: list[int]
    """Most memory that it held meanwhile, above what it held before, with the model."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance of the slowest from the fastest as a share of the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


@dataclass(frozen=True)
class Result:
    """What `bench inspect` measured."""

    config: BenchInspect
    threads: int
    timings: dict[str, dict[str, Timing]]
    """By piece of work, then by system."""
    difference: dict[str, float]
    """The largest difference of the two sides' numbers."""
    page_bytes: int
    """Size of the page of `tokens` tokens."""

    @property
    def cost_of_capture(self) -> float:
        """Capturing everything over the plain forward pass."""
        return self.timings["capture"]["glassgpt"].median / self.timings["forward"]["glassgpt"].median

    def ratio(self, work: str) -> float:
        """The peer's time over ours: above 1, ours is faster."""
        return self.timings[work][PEER].median / self.timings[work]["glassgpt"].median


def bench_inspect(config: BenchInspect) -> Result:
    """Time both sides, and our page.

    Raises UserError for texts that are too long, when TransformerLens is not installed, or the sides' numbers differ.
    """
    shape = preset(config.preset, dropout=0.0)
    longest = max(config.tokens, config.prompt_tokens)
    if longest > shape.context_tokens:
        raise UserError(
            f"tokens and prompt_tokens must fit in the context of {config.preset}, {shape.context_tokens}; got {longest}"
        )
    if config.tokens > MOST_TOKENS:
        raise UserError(f"tokens must be at most {MOST_TOKENS}, which is what the timed page can show; got {config.tokens}")
    if config.peer and find_spec("transformer_lens") is None:
        raise UserError("the peer `transformer_lens` is not installed; pip install 'glassgpt[bench]', or use --no-peer")
    threads = config.threads or torch.get_num_threads()
    with _workers(shape, config, threads) as pipes:
        timings = {work: {system: Timing([], []) for system in pipes} for work in WORK} | {"page": {"glassgpt": Timing([], [])}}
        numbers = {work: {system: _turn(pipe, system, work) for system, pipe in pipes.items()} for work in WARMED}
        for _ in range(config.repeats):
            for work in WARMED:
                for system, pipe in pipes.items():
                    _turn(pipe, system, work, timings[work][system])
        for _ in range(config.patch_repeats):
            numbers["patch"] = {system: _turn(pipe, system, "patch", timings["patch"][system]) for system, pipe in pipes.items()}
            size = _turn(pipes["glassgpt"], "glassgpt", "page", timings["page"]["glassgpt"])
    difference = {work: _difference(work, found) for work, found in numbers.items()} if config.peer else {}
    result = Result(config, threads, timings, difference, int(size))
    _show(result)
    return result


def _turn(pipe: Connection, system: str, work: str, timing: Timing | None = None) -> Tensor:
    """Let a system do a piece of work once; its numbers."""
    pipe.send(work)
    told = answer(pipe, system)
    if timing is not None:
        timing.seconds.append(told["seconds"])
        timing.peak_bytes.append(told["bytes"])
    return torch.tensor(told["numbers"])


def _difference(work: str, numbers: dict[str, Tensor]) -> float:
    found = float((numbers["glassgpt"] - numbers[PEER]).abs().max())
    if found > SAME:
        raise UserError(f"{WORK[work]}: the two sides differ by {found:.1e}; their times mean nothing")
    return found


# ---------------------------------------------------------------------- in the child processes

Job = Callable[[], Tensor]


@contextlib.contextmanager
def _workers(shape: ModelConfig, config: BenchInspect, threads: int) -> Iterator[dict[str, Connection]]:
    """A pipe to each system's process."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "WANDB_MODE": "disabled"}  # read when modules are imported
    spawn, pipes, processes = get_context("spawn"), {}, []
    try:
        for system in ("glassgpt", PEER) if config.peer else ("glassgpt",):
            pipes[system], theirs = spawn.Pipe()
            process = spawn.Process(target=_worker, args=(theirs, system, shape, config, threads), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
        for system, pipe in pipes.items():
            answer(pipe, system)
        yield pipes
    finally:
        for process in processes:
            process.terminate()


def _worker(pipe: Connection, system: str, shape: ModelConfig, config: BenchInspect, threads: int) -> None:
    """One system: says when its model is there, then does the work that it is asked for."""
    sys.stdout = sys.stderr
    try:
        torch.set_num_threads(threads)
        jobs = (_ours if system == "glassgpt" else _theirs)(shape, config)
        pipe.send({})
        cpu = torch.device("cpu")
        while True:
            job = jobs[pipe.recv()]
            _forget_peak()
            before, start = machine.memory_bytes(cpu), time.perf_counter()
            with torch.inference_mode():
                numbers = job()
            seconds = time.perf_counter() - start
            pipe.send({"seconds": seconds, "bytes": machine.memory_bytes(cpu) - before, "numbers": numbers.tolist()})
    except EOFError:
        pass
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def _forget_peak() -> None:
    """On Linux: give back what was freed, and count the most memory held from here."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _model_and_tokens(shape: ModelConfig, config: BenchInspect) -> tuple[GPT, Tensor, Tensor]:
    """The model, the text (1, tokens), and both prompts (2, prompt_tokens)."""
    torch.manual_seed(0)
    model = GPT(shape).eval()
    text = torch.randint(shape.vocab_size, (1, config.tokens))
    clean = torch.randint(shape.vocab_size, (config.prompt_tokens,))
    return model, text, torch.stack((clean, (clean + 1) % shape.vocab_size))


def _ours(shape: ModelConfig, config: BenchInspect) -> dict[str, Job]:
    model, text, (clean, corrupted) = _model_and_tokens(shape, config)

    def captured() -> Tensor:
        with capture(model, "**") as seen:
            model(text)
        return seen[f"blocks.{shape.n_layer - 1}"][0, -1]

    def patched() -> Tensor:
        return patch_sweep(model, clean, corrupted, logit_difference(ANSWER, AGAINST)).values[:-1]

    words = _words(shape.vocab_size)
    prompt = " ".join(f"w{token_id}" for token_id in text[0].tolist())

    def paged() -> Tensor:
        return torch.tensor(len(page(collect(model, words, prompt, name=config.preset)).encode("utf-8")))

    return {"forward": lambda: model(text)[0, -1], "capture": captured, "patch": patched, "page": paged}


def _words(count: int) -> Tokenizer:
    """A vocabulary of w0, w1, w2 ..."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{number}": number for number in range(count)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return Tokenizer(words)


def _theirs(shape: ModelConfig, config: BenchInspect) -> dict[str, Job]:
    """`TransformerBridge` on the same weights, nothing folded or centred, and its `get_act_patch_resid_pre`."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.patching import get_act_patch_resid_pre

    model, text, (clean, corrupted) = _model_and_tokens(shape, config)
    hf = hf_peer(model, shape).eval()
    del model
    hf.config.architectures = [type(hf).__name__]
    with tempfile.TemporaryDirectory() as folder:
        bridge = TransformerBridge.boot_transformers("gpt2", hf_model=hf, tokenizer=_some_tokenizer(folder))

    def captured() -> Tensor:
        _, cache = bridge.run_with_cache(text)
        last: Tensor = cache["resid_post", shape.n_layer - 1][0, -1]
        return last

    def patched() -> Tensor:
        _, cache = bridge.run_with_cache(clean.unsqueeze(0))

        def difference(logits: Tensor) -> Tensor:
            return logits[0, -1, ANSWER] - logits[0, -1, AGAINST]

        found: Tensor = get_act_patch_resid_pre(bridge, corrupted.unsqueeze(0), cache, difference)
        return found

    return {"forward": lambda: bridge(text)[0, -1], "capture": captured, "patch": patched}


def _some_tokenizer(folder: str) -> Any:
    """One that the bridge can open again from files, as it does: given none, it asks the network for one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    words = Tokenizer(models.WordLevel({end: 0}, unk_token=end))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), end)
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


# ---------------------------------------------------------------------- table


def _show(result: Result) -> None:
    config = result.config
    if config.json:
        ratios = {work: result.ratio(work) for work in WORK} if config.peer else {}
        print(json.dumps(asdict(result) | {"cost_of_capture": result.cost_of_capture, "ratio": ratios}))
        return
    table = Table("work", "system", title=f"{config.preset}, random weights, {result.threads} threads", title_justify="left")
    for column in ("seconds", "spread", "memory"):
        table.add_column(column, justify="right")
    for work, timings in result.timings.items():
        for number, (system, timing) in enumerate(timings.items()):
            memory = f"{max(timing.peak_bytes) / 1e6:,.0f} MB"
            table.add_row("" if number else (WORK | ALONE)[work], system, f"{timing.median:.3f}", f"{timing.spread:.0%}", memory)
        table.add_section()
    console = Console()
    console.print(table)
    told = [
        f"capturing everything costs {result.cost_of_capture:.2f}x the forward pass",
        f"the page of {config.tokens} tokens has {result.page_bytes / 1e6:.2f} MB",
    ]
    if config.peer:
        told += [f"{WORK[work]}: {result.ratio(work):.2f}x as fast as {PEER}" for work in WORK if work != "forward"]
    console.print("\n".join(told), highlight=False)
    console.print(
        f"{config.tokens} tokens captured, {config.prompt_tokens} patched; medians of {config.repeats} and"
        f" {config.patch_repeats} turns; spread: slowest to fastest",
        highlight=False,
    )
