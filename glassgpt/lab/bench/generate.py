"""`glassgpt bench`: speed beside a peer, interleaved in one run, as ratios of medians."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from glassgpt.config import ModelConfig, UserError, preset
from glassgpt.config.generate import Sampling
from glassgpt.config.lab import Bench
from glassgpt.generation import stream
from glassgpt.model import GPT, weights

PEER = "transformers"


@dataclass(frozen=True)
class Timing:
    """Seconds of one system, a value for each repeat."""

    prefill_seconds: list[float]
    """Time to the first new token."""
    decode_seconds: list[float]
    """Time from the first to the last new token."""


@dataclass(frozen=True)
class Result:
    """What `bench generate` measured."""

    config: Bench
    threads: int
    timings: dict[str, Timing]
    same_text: bool
    """Whether both systems wrote the same greedy tokens."""

    def rate(self, system: str, phase: str) -> float:
        """Median tokens a second of `prefill` or `decode`, all rows together."""
        timing = self.timings[system]
        if phase == "prefill":
            return self.config.batch_size * self.config.prompt_tokens / statistics.median(timing.prefill_seconds)
        return self.config.batch_size * (self.config.new_tokens - 1) / statistics.median(timing.decode_seconds)

    def ratio(self, phase: str) -> float:
        """Our rate over the peer's: above 1, ours is faster."""
        return self.rate("glassgpt", phase) / self.rate(PEER, phase)


def bench(config: Bench) -> Result:
    """Time greedy generation with equal random weights here and in `transformers` (eager, float32, its own cache).

    The two take turns, so a change of the machine's load meets both. Raises UserError when the peer is not installed.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    shape = preset(config.preset, dropout=0.0)
    needed = config.prompt_tokens + config.new_tokens
    if needed > shape.context_tokens:
        raise UserError(f"prompt_tokens + new_tokens is {needed}; the context of {config.preset} is {shape.context_tokens}")
    if config.new_tokens < 2:
        raise UserError("new_tokens must be at least 2, so that decoding can be timed")
    torch.manual_seed(0)
    model = GPT(shape).eval()
    peer = hf_peer(model, shape).eval()
    prompts = torch.randint(shape.vocab_size, (config.batch_size, config.prompt_tokens))
    runs: dict[str, Callable[[], tuple[list[float], list[int]]]] = {
        "glassgpt": lambda: _time_ours(model, prompts, config.new_tokens),
        PEER: lambda: _time_peer(peer, prompts, config.new_tokens),
    }
    written = {name: run()[1] for name, run in runs.items()}  # warm-up
    timings = {name: Timing([], []) for name in runs}
    for _ in range(config.repeats):
        for name, run in runs.items():
            stamps, _ids = run()
            timings[name].prefill_seconds.append(stamps[0])
            timings[name].decode_seconds.append(stamps[-1] - stamps[0])
    result = Result(config, torch.get_num_threads(), timings, written["glassgpt"] == written[PEER])
    _show(result)
    return result


def _time_ours(model: GPT, prompts: torch.Tensor, new_tokens: int) -> tuple[list[float], list[int]]:
    """Seconds from the start to each step's end, and the first row's ids."""
    rows = prompts.tolist()
    generators = [torch.Generator().manual_seed(0) for _ in rows]
    stamps, ids = [], []
    start = time.perf_counter()
    for token in stream(model, rows, Sampling(temperature=0), generators, new_tokens):
        if token.row == len(rows) - 1:
            stamps.append(time.perf_counter() - start)
        if token.row == 0:
            ids.append(token.id)
    return stamps, ids


def hf_peer(model: GPT | None, shape: ModelConfig) -> Any:
    """`transformers`' GPT-2 with the same weights (None: only its shape). Raises UserError when it is not installed."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel, logging

        logging.set_verbosity_error()
    except ImportError as error:
        raise UserError("the peer `transformers` is not installed; pip install 'glassgpt[bench]'") from error
    values = weights.config_to_hf(shape, end_id=None, dtype=torch.float32)
    with torch.device("meta"):
        peer = GPT2LMHeadModel(GPT2Config(**values))
    if model is not None:
        peer.load_state_dict(weights.hf_tensors(model), assign=True, strict=False)
        peer.tie_weights()
    return peer


def _time_peer(peer: Any, prompts: torch.Tensor, new_tokens: int) -> tuple[list[float], list[int]]:
    stamps: list[float] = []

    class Stamp:
        """`generate` hands every step's ids to a streamer: the prompt first, then one token a row."""

        def __init__(self) -> None:
            self.prompt_seen = False

        def put(self, value: torch.Tensor) -> None:
            if self.prompt_seen:
                stamps.append(time.perf_counter() - start)
            self.prompt_seen = True

        def end(self) -> None:
            pass

    start = time.perf_counter()
    with torch.inference_mode():
        ids = peer.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=0,
            streamer=Stamp(),
        )
    return stamps, ids[0, prompts.size(1) :].tolist()


def _show(result: Result) -> None:
    if result.config.json:
        rates = {name: {phase: result.rate(name, phase) for phase in ("prefill", "decode")} for name in result.timings}
        ratios = {phase: result.ratio(phase) for phase in ("prefill", "decode")}
        print(json.dumps(asdict(result) | {"tokens_per_second": rates, "ratio": ratios}))
        return
    config = result.config
    title = f"{config.preset}, batch {config.batch_size}: {config.prompt_tokens} + {config.new_tokens} tokens, greedy, float32"
    table = Table("system", "prefill tokens/s", "decode tokens/s", title=title, title_justify="left")
    for name in result.timings:
        table.add_row(name, *(f"{result.rate(name, phase):,.1f}" for phase in ("prefill", "decode")))
    table.add_section()
    table.add_row("ratio", *(f"{result.ratio(phase):.2f}x" for phase in ("prefill", "decode")))
    console = Console()
    console.print(table)
    console.print(
        f"medians of {config.repeats} interleaved repeats, {result.threads} threads; "
        + ("both wrote the same tokens" if result.same_text else "the two wrote different tokens")
    )
