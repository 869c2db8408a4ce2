"""Knobs of `glassgpt quantize`, and the recipe that a quantised model's folder keeps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from glassgpt.config.errors import UserError, check_at_least, check_choices, check_seed

VERSION = 1
"""Of the recipe in `model.json`."""
PREFIX = "quantisation."
"""Where it stands there: what messages call its keys."""


@dataclass(frozen=True)
class Recipe:
    """How the matrices of a model were quantised: what `model.json` holds under "quantisation"."""

    matrices: dict = field(default_factory=dict)  # type: ignore[type-arg]
    """Bits of each quantised matrix, by its name; all others have floating point numbers."""
    group: int | None = None
    """How many numbers along a matrix's input share a scale; None: one scale for each output."""
    method: Literal["rtn", "gptq"] = "rtn"
    """How the codes were chosen."""
    calibration_tokens: int = 0
    """Tokens of text that the method has seen."""
    activation_bits: Literal[8, 16] = 16
    """8: what a quantised matrix reads is rounded to 8 bits, too; 16: it is not."""
    version: int = VERSION

    def __post_init__(self) -> None:
        check_choices(self, PREFIX)
        check_at_least(1, self, "group", prefix=PREFIX)
        for name, bits in self.matrices.items():
            if type(bits) is not int or bits not in (4, 8):
                raise UserError(f"{PREFIX}matrices.{name} must have 4 or 8 bits; got {bits!r}")

    @property
    def precision(self) -> str:
        """int8, int4, or int4+8."""
        return "int" + "+".join(str(bits) for bits in sorted(set(self.matrices.values())))

    def shapes(self, bits: int, N: int, K: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of the codes (4 bits two to a byte) and the scales that a file has for an (N, K) matrix; the group must divide K."""
        return (N, K if bits == 8 else -(-K // 2)), (N, K // (self.group or K))

    def kind(self, bits: int) -> str:
        """What stands for the dtype of a matrix: int8 with a scale for each output, int4/32 with one for 32 inputs."""
        return f"int{bits}" if self.group is None else f"int{bits}/{self.group}"


def stored_bytes(kind: str, N: int, K: int) -> int:
    """Bytes of the codes and scales of an (N, K) matrix of a kind that `Recipe.kind` names."""
    bits, _, group = kind.removeprefix("int").partition("/")
    scales = 2 * K // int(group) if group else 4
    return N * (-(-K * int(bits) // 8) + scales)


@dataclass(frozen=True)
class Quantize:
    """Store a model's matrices in 8 or 4 bits: about a half or a third of bfloat16's size, and loaded like any other model.

    Quantised are the linear maps of the blocks and the token embedding with its head. Norms, biases, learned positions and
    routers of experts stay as they are. With `--text` the loss is measured before and after. `--sensitivity` writes no model: it
    shows what each matrix costs when it alone is quantised.
    """

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    """A bundled model, a run folder, a Hugging Face folder or a downloaded hub id."""
    out_dir: str | None = None
    """Folder to make; it must not exist."""
    bits: Literal[8, 4] = 8
    """Of the blocks' matrices."""
    head_bits: Literal[8, 4] = 8
    """Of the token embedding and the head, the matrix whose 4 bits change most greedy choices."""
    group: int = 32
    """How many numbers along a matrix's input share a scale (2 bytes); 0: one scale for each output (4 bytes)."""
    method: Literal["rtn", "gptq"] = "rtn"
    """rtn: each number to the nearest code; gptq: errors are made good by the columns that follow (Frantar et al. 2022), which
    needs text (`--calibration`) and time."""
    activations: Literal[16, 8] = 16
    """8: what a matrix reads is rounded to 8 bits as well, with a scale for each token."""
    keep: tuple[str, ...] = ()
    """Matrices that are not quantised: names or parts of them (token_embedding, blocks.0, blocks.3.mlp.down, down)."""
    calibration: tuple[str, ...] = ()
    """gptq: text like that which the model will read: files or folders as for `pretrain --data.sources`."""
    calibration_tokens: int = 16384
    """Tokens of it, in windows of the model's context from all over it."""
    text: tuple[str, ...] = ()
    """Text to measure on, before and after."""
    text_tokens: int = 40960
    """Tokens of it."""
    holdout_share: float = 1.0
    """As for `evaluate`: measure on the documents that `pretrain` holds out for this share, calibrate on the others (1: all of
    them for each)."""
    sensitivity: bool = False
    """Quantise one part at a time, measure, and write no model."""
    each: Literal["matrix", "layer", "kind"] = "matrix"
    """Parts of `--sensitivity`: every matrix by itself, those of a layer, or those of a kind (qkv, out, up, down)."""
    svg: str | None = None
    """Draw the sensitivity as this .svg file."""
    png: str | None = None
    """Draw the sensitivity as this .png file."""
    seed: int = 0
    """Seed of the choice of text."""
    device: str = "auto"
    """cpu, cuda, mps, or auto for the best there is."""
    json: bool = False
    """One JSON object instead of a table."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(0, self, "group")
        check_at_least(1, self, "calibration_tokens", "text_tokens")
        check_seed(self.seed)
        if not 0 < self.holdout_share <= 1:
            raise UserError(f"holdout_share must be above 0 and at most 1; got {self.holdout_share}")
        if self.sensitivity:
            self._check_sensitivity()
            return
        if self.out_dir is None:
            raise UserError("--out_dir DIR is missing: where to write the quantised model")
        if self.svg or self.png:
            raise UserError("--svg and --png draw what --sensitivity measures; add it, or leave them out")
        if self.method == "gptq" and not self.calibration:
            raise UserError("gptq decides by what it sees on text; give --calibration FILES, or use --method rtn")
        if self.method == "rtn" and self.calibration:
            raise UserError("rtn looks at no text; leave --calibration out, or use --method gptq")

    def _check_sensitivity(self) -> None:
        if not self.text:
            raise UserError("--sensitivity measures a loss; give --text FILES")
        if self.out_dir is not None:
            raise UserError("--sensitivity writes no model; leave --out_dir out")
        if self.method != "rtn" or self.calibration:
            raise UserError("--sensitivity rounds to the nearest; leave --method and --calibration out")
        for name, path in (("svg", self.svg), ("png", self.png)):
            if path is not None and not path.lower().endswith(f".{name}"):
                raise UserError(f"--{name} must end in .{name}; got {path}")
