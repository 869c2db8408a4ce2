"""Knobs of `glassgpt lab compression`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from glassgpt.config.errors import UserError, check_at_least, check_choices, check_seed


@dataclass(frozen=True)
class Compression:
    """Size on disk, speed and held-out loss of one model in many smaller forms, and which of them nothing beats in all three.

    Each variant is made as `quantize` and `prune` make it, written to a scratch folder, opened again and measured. What is not in
    few bits is stored in bfloat16, but for the variant float32. Variants that were trained (a recovered pruned model, a distilled
    student) come by `--extra`.
    """

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    """A bundled model, a run folder, a Hugging Face folder or a downloaded hub id."""
    text: tuple[str, ...] = ()
    """Text to measure the loss on: files or folders as for `pretrain --data.sources`."""
    text_tokens: int = 40960
    """Tokens of it, in windows of the model's context from all over it."""
    holdout_share: float = 1.0
    """As for `evaluate`: measure on the documents that `pretrain` holds out for this share, calibrate on the others (1: all of
    them for each)."""
    calibration: tuple[str, ...] = ()
    """Text that GPTQ, Wanda and structured pruning decide by; without it they are left out."""
    calibration_tokens: int = 16384
    """Tokens of it."""
    variants: tuple[str, ...] = ("*",)
    """Names or patterns: float32, bfloat16, int8 (groups of 32), int8-row (a scale for each output), int4 (head in 8 bits),
    int4-head4; -gptq instead of rounding, -a8 with activations of 8 bits; magnitude-50, magnitude-2:4, wanda-50, wanda-2:4
    (zeros are stored like other numbers); structured (a head and a quarter of the MLP channels taken out). None is retrained."""
    extra: tuple[str, ...] = ()
    """More models with the same tokens, measured as they are stored: anything that can be loaded."""
    engine: Literal["auto", "plain", "native"] = "auto"
    """What the speed is measured of: plain (PyTorch), native (compiled kernels), or auto: native where it can be used."""
    prompt_tokens: int = 32
    """Tokens of the prompt, from the text."""
    new_tokens: int = 128
    """Tokens that are written greedily after it, one text at a time; the time from the first to the last counts."""
    repeats: int = 9
    """Turns of each variant; medians and distances of the quartiles are reported."""
    threads: int | None = None
    """CPU threads (default: one for each core, or OMP_NUM_THREADS if that is fewer)."""
    svg: str | None = None
    """Draw into this .svg file."""
    png: str | None = None
    """Draw into this .png file."""
    seed: int = 0
    """Seed of the choice of text."""
    device: str = "cpu"
    """cpu, cuda, mps, or auto for the best there is. The native engine is for the CPU."""
    json: bool = False
    """One JSON object instead of a table."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(1, self, "text_tokens", "calibration_tokens", "prompt_tokens", "repeats", "threads")
        check_at_least(2, self, "new_tokens")  # the time from the first to the last is taken
        check_seed(self.seed)
        if not 0 < self.holdout_share <= 1:
            raise UserError(f"holdout_share must be above 0 and at most 1; got {self.holdout_share}")
        if not self.text:
            raise UserError("what a smaller model loses is measured on text; give --text FILES")
        if not self.variants and not self.extra:
            raise UserError("variants is empty and there is no extra model; name at least one")
