"""Knobs of `glassgpt lab temperature`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from glassgpt.config.errors import UserError, check_at_least, check_seed
from glassgpt.config.generate import Sampling


@dataclass(frozen=True)
class Temperature:
    """What temperature and top-p do to a model's texts, measured beside real text: repeats, variety, perplexity, broken words.

    With `--reference` the same measures of real text are the yardstick, and a range of temperatures is called usable or not.
    """

    model: Annotated[str, Positional, arg(metavar="MODEL")] = "storyteller"
    """A bundled model, a run folder, a Hugging Face folder or a downloaded hub id."""
    temperatures: tuple[float, ...] = (0.1, 0.5, 0.7, 1.0, 1.5, 2.0, 5.0, 10.0)
    """Logits are divided by it; 0 is greedy."""
    top_p: tuple[float, ...] = (0.5, 0.8, 0.95, 1.0)
    """Draw from the smallest set of tokens whose probabilities reach p; 1 leaves nothing out."""
    prompt_file: str | None = None
    """A UTF-8 file with one prompt a line (default: eight beginnings of stories)."""
    samples: int = 2
    """Texts of each prompt in each cell."""
    new_tokens: int = 64
    """Tokens of each text."""
    second: str | None = None
    """Another model that judges the texts (default: a 3-gram model made from the reference)."""
    reference: tuple[str, ...] = ()
    """Real text that the model has not learnt from: files or folders as for `pretrain --data.sources`."""
    holdout_share: float = 1.0
    """Read only the documents of the reference that `pretrain` holds out for this share (1: all of them)."""
    groups: int = 10
    """Groups of real texts, each as large as a cell: their lowest and highest values are the band of real text."""
    factor: float = 1.5
    """How far outside the band a usable cell may be, as a factor."""
    out_dir: str = "runs/temperature"
    """Folder for results.json, cells.csv, report.md and the pictures; they replace those of an earlier call."""
    seed: int = 0
    """Seed of the texts, the same in every cell, and of the choice of real texts."""
    device: str = "auto"
    """cpu, cuda, mps, or auto for the best there is."""
    json: bool = False
    """One JSON object instead of a table."""

    def __post_init__(self) -> None:
        check_at_least(1, self, "samples", "groups", "factor")
        check_at_least(8, self, "new_tokens")
        check_seed(self.seed)
        for name in ("temperatures", "top_p"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise UserError(f"{name} must name at least one value, and each once; got {' '.join(map(str, values)) or 'none'}")
        for temperature in self.temperatures:
            Sampling(temperature=temperature)
        for top_p in self.top_p:
            Sampling(top_p=top_p)
        if not 0 < self.holdout_share <= 1:
            raise UserError(f"holdout_share must be above 0 and at most 1; got {self.holdout_share}")
