"""Knobs of `glassgpt prune`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from glassgpt.config.errors import UserError, check_at_least, check_seed


@dataclass(frozen=True)
class Prune:
    """Take weights, attention heads or MLP channels out of a model, see what it costs, and train it back.

    Unstructured pruning (magnitude, wanda) sets weights to zero. They are stored and multiplied like any other number: the model
    is neither smaller nor faster. Structured pruning takes whole heads and channels out, and the model is both.
    `--curve` writes no model: it shows what each method costs at each sparsity.
    """

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    """A bundled model, a run folder, a Hugging Face folder or a downloaded hub id."""
    out_dir: str | None = None
    """Folder for the pruned model. Recovery writes its run into OUT_DIR-recovery beside it."""
    method: Literal["magnitude", "wanda", "structured"] = "wanda"
    """magnitude: the smallest weights of each matrix (Han et al. 2015); wanda: the smallest products of weight and norm of its
    input, in each row (Sun et al. 2023); structured: the heads and channels whose absence the loss would notice least (Michel et
    al. 2019; Molchanov et al. 2017)."""
    sparsity: float | None = None
    """magnitude and wanda: share of each matrix in the blocks that becomes zero (0.5 when not given)."""
    pattern: Literal["2:4"] | None = None
    """magnitude and wanda: 2 of every 4 weights along a row, as some GPUs multiply them."""
    compared: Literal["row", "matrix"] | None = None
    """magnitude and wanda: whether a weight is ranked among those of its row (of its output), or among all of its matrix. As
    published when not given: matrix for magnitude, row for wanda."""
    heads: int = 0
    """structured: query heads taken out of each layer; where heads share keys and values, whole groups of them."""
    mlp_share: float = 0.0
    """structured: share of the channels taken out of each MLP, or of each expert."""
    calibration: tuple[str, ...] = ()
    """Text that wanda and structured look at to decide: files or folders as for `pretrain --data.sources`."""
    calibration_tokens: int = 32768
    """Tokens of it, in windows of the model's context from all over it."""
    text: tuple[str, ...] = ()
    """Text to measure the loss on, before and after."""
    text_tokens: int = 32768
    """Tokens of it."""
    holdout_share: float = 1.0
    """As for `evaluate`: measure on the documents that `pretrain` holds out for this share, calibrate and train on the others
    (1: all of them for each)."""
    recover_steps: int = 0
    """Train the pruned model for so many steps; weights that were set to zero stay zero."""
    sources: tuple[str, ...] = ()
    """Text to train on."""
    batch_size: int = 8
    """Sequences in one step of it."""
    learning_rate: float = 5e-4
    """Peak learning rate of it."""
    curve: tuple[float, ...] = ()
    """Measure every method at each of these sparsities. Without `--calibration`, magnitude alone."""
    svg: str | None = None
    """Draw the curve as this .svg file."""
    png: str | None = None
    """Draw the curve as this .png file."""
    repeats: int = 5
    """How often the speed before and after is measured, in turn (0: not at all)."""
    seed: int = 0
    """Seed of the choice of text and of training."""
    device: str = "auto"
    """cpu, cuda, mps, or auto for the best there is."""
    json: bool = False
    """One JSON object instead of a table."""

    def __post_init__(self) -> None:
        check_at_least(0, self, "heads", "recover_steps", "repeats")
        check_at_least(1, self, "calibration_tokens", "text_tokens", "batch_size")
        check_seed(self.seed)
        for name, value in (("sparsity", self.sparsity), ("mlp_share", self.mlp_share), *(("curve", one) for one in self.curve)):
            if value is not None and not 0 <= value < 1:
                raise UserError(f"{name} must be at least 0 and below 1; got {value}")
        if not 0 < self.holdout_share <= 1:
            raise UserError(f"holdout_share must be above 0 and at most 1; got {self.holdout_share}")
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate must be positive; got {self.learning_rate}")
        if self.curve:
            self._check_curve()
        else:
            self._check_method()

    def _check_curve(self) -> None:
        if len(set(self.curve)) != len(self.curve):
            raise UserError(f"curve must name each sparsity once; got {' '.join(map(str, self.curve))}")
        if not self.text:
            raise UserError("--curve measures a loss; give --text FILES")
        if self.out_dir is not None or self.recover_steps:
            raise UserError("--curve writes no model; leave --out_dir and --recover_steps out, or leave out --curve")

    def _check_method(self) -> None:
        is_structured = self.method == "structured"
        if self.out_dir is None:
            raise UserError("--out_dir DIR is missing: where to write the pruned model")
        if self.svg or self.png:
            raise UserError("--svg and --png draw --curve; give sparsities to it, such as --curve 0.1 0.3 0.5 0.7 0.9")
        if is_structured and (self.sparsity is not None or self.pattern or self.compared):
            raise UserError(
                "--sparsity, --pattern and --compared are for magnitude and wanda; structured takes --heads and --mlp_share"
            )
        if is_structured and not (self.heads or self.mlp_share):
            raise UserError("structured takes nothing out as it is; give --heads, --mlp_share or both")
        if not is_structured and (self.heads or self.mlp_share):
            raise UserError(f"--heads and --mlp_share are for --method structured; {self.method} takes --sparsity or --pattern")
        if self.pattern and self.sparsity not in (None, 0.5):
            raise UserError(f"--pattern {self.pattern} is a sparsity of 0.5; got --sparsity {self.sparsity}: leave it out")
        if self.pattern and self.compared:
            raise UserError(f"--pattern {self.pattern} ranks every four weights by themselves; leave --compared out")
        if self.method != "magnitude" and not self.calibration:
            raise UserError(f"{self.method} decides by what it sees on text; give --calibration FILES, or use --method magnitude")
        if self.recover_steps and not self.sources:
            raise UserError("--recover_steps trains on text; give --sources FILES")
