"""`glassgpt lab compression`: a model in many smaller forms, by size on disk, speed and held-out loss."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from glassgpt import charts
from glassgpt.compress.prune import write
from glassgpt.compress.quality import Quality, Yardstick
from glassgpt.compress.windows import windows
from glassgpt.config import UserError
from glassgpt.config.compression import Compression
from glassgpt.config.compute import Compute
from glassgpt.config.files import to_plain
from glassgpt.config.folder import WEIGHTS_FILE
from glassgpt.generation import native
from glassgpt.generation.opening import same_tokens
from glassgpt.interpret.inspect import check_path
from glassgpt.lab.bench.generate.result import spread
from glassgpt.lab.compression import report
from glassgpt.lab.compression.pareto import front
from glassgpt.lab.compression.speed import Ready, opened, rates
from glassgpt.lab.compression.variants import NAMES, is_calibrated, made, named, stored_dtype
from glassgpt.loading import find, load, pick_device
from glassgpt.model import GPT
from glassgpt.model.quantised import parameter_count, recipe_of
from glassgpt.text import Tokenizer

SPEED_MARGIN = 0.05
"""Speeds that differ by less count as equal: nobody gets on the front by the noise of the machine."""


@dataclass(frozen=True)
class Variant:
    """One form of the model."""

    name: str
    parameters: int
    bytes: int
    """Of its file of weights."""
    quality: Quality
    """By PyTorch, in float32."""
    engine: str
    """What its speed is of: native, or plain (PyTorch)."""
    precision: str
    tokens_per_second: float
    """Written greedily, one text at a time: the median."""
    spread: float
    """Distance of its quartiles over it."""
    is_on_front: bool
    """No other variant is at least as small, as fast and as good, and better in one of these."""


@dataclass(frozen=True)
class Result:
    """What the experiment found."""

    config: dict[str, Any]
    original: Quality
    threads: int
    prompt_tokens: int
    new_tokens: int
    """Written after the prompt in a turn, as many as every context has room for; all but the first are timed."""
    margin: float
    """Speeds that differ by a smaller share count as equal."""
    variants: list[Variant]
    left_out: dict[str, str]
    """Why, by name."""

    def change(self, variant: Variant) -> float:
        """Bits per byte more than the original's, as a share of them."""
        return variant.quality.bits_per_byte / self.original.bits_per_byte - 1


class Written(NamedTuple):
    """A variant in its scratch folder."""

    folder: Path
    bytes: int
    parameters: int
    quality: Quality


def compression(config: Compression) -> Result:
    """Make, write, open and measure every variant; print, draw and return what was found.

    Raises UserError for an unknown model or one that is not plain, for unknown variants, for an extra model that has other tokens
    or a shorter context, for text that cannot be read, and when no variant can be made.
    """
    for path, suffix in ((config.png, ".png"), (config.svg, ".svg")):
        check_path(path, suffix)
    wanted, extras = named(config.variants), extra_names(config.extra)
    compute, device = compute_of(config), str(pick_device(config.device))
    model, tokenizer = load(config.model, device=device)
    if recipe_of(model) is not None:
        raise UserError(f"{config.model} is quantised already; give the model that it was made from")
    context = model.config.context_tokens
    ids = windows(config.text, "val", config.holdout_share, tokenizer, context, config.text_tokens, config.seed)
    for source in extras.values():
        check_extra(source, tokenizer, ids.size(1) - 1)
    prompt = ids[0, : max(1, min(config.prompt_tokens, ids.size(1) - 2))].tolist()  # leaves room for two tokens
    with tempfile.TemporaryDirectory(prefix="glassgpt-") as scratch:
        yardstick = Yardstick(model, ids, torch.tensor(tokenizer.byte_lengths()))
        written, left_out = write_variants(config, wanted, model, tokenizer, yardstick, Path(scratch))
        del model
        for name, source in extras.items():
            written[name] = write_extra(source, yardstick, Path(scratch) / str(len(written)), device)
        if not written:
            raise UserError("no variant can be made: " + "; ".join(f"{name}: {why}" for name, why in left_out.items()))
        ready = {name: opened(one.folder, compute, device) for name, one in written.items()}
        room = min(one.model.config.context_tokens for one in ready.values()) - len(prompt) + 1
        new_tokens = min(config.new_tokens, room)
        turns = rates(ready, prompt, new_tokens, config.repeats)
    variants = assembled(written, ready, turns)
    timed = (config.threads or native.default_threads(), len(prompt), new_tokens)
    result = Result(to_plain(config), yardstick.original, *timed, SPEED_MARGIN, variants, left_out)
    print(json.dumps(asdict(result))) if config.json else report.show(result)
    for path in filter(None, (config.png, config.svg)):
        charts.save(report.draw(result), Path(path))
        print(f"picture: {path}", file=sys.stderr)
    return result


def compute_of(config: Compression) -> Compute:
    """The engine, and the threads of everything. Where no kernels can be had, that is said once."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    engine = config.engine
    if engine == "auto":
        try:
            native.kernels()
        except native.Unavailable as error:
            print(f"note: {error}; the speed is PyTorch's", file=sys.stderr)
            engine = "plain"
    return Compute(engine=engine, threads=config.threads)


def extra_names(sources: tuple[str, ...]) -> dict[str, str]:
    """What each extra model is called: the last word of its path, or all of it where several, or a variant, are called so.

    Raises UserError for one whose whole path is the name of a variant, or that is given twice.
    """
    taken = [*NAMES, *(Path(source).name for source in sources)]
    found: dict[str, str] = {}
    for source in sources:
        name = source if taken.count(Path(source).name) > 1 else Path(source).name
        if name in NAMES:
            raise UserError(f"extra {source} is called like a variant; give its whole path, such as ./{source}")
        if name in found:
            raise UserError(f"extra {source} is given twice; give it once")
        found[name] = source
    return found


# ---------------------------------------------------------------------- writing and measuring


def write_variants(
    config: Compression, wanted: list[str], model: GPT, tokenizer: Tokenizer, yardstick: Yardstick, scratch: Path
) -> tuple[dict[str, Written], dict[str, str]]:
    """Those that can be made of this model, and why others cannot."""
    written: dict[str, Written] = {}
    left_out: dict[str, str] = {}
    for number, name in enumerate(wanted, 1):
        if is_calibrated(name) and not config.calibration:
            left_out[name] = "decides by text: give --calibration FILES"
            continue
        try:
            small = made(name, config, model, tokenizer)
        except UserError as error:
            left_out[name] = str(error)
            continue
        folder = scratch / str(len(written))
        write(small, tokenizer, folder, stored_dtype(name))
        title = f"{name} ({number} of {len(wanted)})"
        written[name] = measured(folder, title, yardstick, str(model.head.weight.device))
    return written, left_out


def check_extra(source: str, tokenizer: Tokenizer, window: int) -> None:
    """Raises UserError for an extra model that is nowhere, has other tokens or cannot read a window at once."""
    found = find(source)
    if not same_tokens(tokenizer, found.tokenizer()):
        raise UserError(f"extra {source} has other tokens than the model; give one with the same tokenizer")
    context = found.config().context_tokens
    if context < window:
        raise UserError(f"extra {source} has a context of {context} tokens, and {window} are read at once; leave it out")


def write_extra(source: str, yardstick: Yardstick, folder: Path, device: str) -> Written:
    """An extra model, in the numbers that it is stored in; an adapter added to its base in float32."""
    model, tokenizer = load(source, dtype=torch.float32 if find(source).base is not None else None)
    write(model, tokenizer, folder, None)
    return measured(folder, source, yardstick, device)


def measured(folder: Path, title: str, yardstick: Yardstick, device: str) -> Written:
    """What was written, opened again."""
    model, _ = load(folder, device=device)
    return Written(folder, (folder / WEIGHTS_FILE).stat().st_size, parameter_count(model), yardstick.measure(model, title))


def assembled(written: dict[str, Written], ready: dict[str, Ready], turns: dict[str, list[float]]) -> list[Variant]:
    """Every variant with its numbers, and whether it is on the front."""
    variants = []
    for name, one in written.items():
        about, rate = ready[name], median(turns[name])
        numbers = (rate, spread(turns[name]))
        variants.append(Variant(name, one.parameters, one.bytes, one.quality, about.engine, about.precision, *numbers, False))
    points = [(one.bytes, one.quality.bits_per_byte, 1 / one.tokens_per_second) for one in variants]
    on_front = front(points, margins=(0, 0, SPEED_MARGIN))
    return [replace(variant, is_on_front=is_on) for variant, is_on in zip(variants, on_front, strict=True)]
