"""Who computes: rows of tokens in, scores of what follows out. Two do: PyTorch (`plain_runner`) and the native engine.

Nothing here, nor in `engine` and `writer`, imports PyTorch before it is needed: a stored model that the native engine reads
answers before PyTorch would have been imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

from glassgpt.config import ModelConfig
from glassgpt.config.generate import Sampling
from glassgpt.generation.generator import Generator

if TYPE_CHECKING:
    from torch import Tensor

    from glassgpt.model import GPT

Model: TypeAlias = "GPT | Engine"


class Scores(Protocol):
    """What may follow n places. What a runner has not computed is computed when it is asked for."""

    @property
    def logits(self) -> Tensor:
        """(n, V), of the ids that can be drawn; float32 or longer."""
        ...

    @property
    def best(self) -> list[int]:
        """The likeliest id of each place; the first of equals."""
        ...

    @property
    def log_total(self) -> list[float]:
        """log of the sum of exp(logits) at each place: a log-probability is a logit less this. NaN where a logit is."""
        ...

    def logits_of(self, ids: Sequence[int]) -> list[float]:
        """The logit of one id at each place."""
        ...

    def draw(self, sampling: Sampling, generators: Sequence[Generator]) -> list[int]:
        """The next token of each place, without penalties, by one number of its generator."""
        ...

    def of(self, places: Sequence[int]) -> Scores:
        """Those of these places, in this order."""
        ...


class Runner(Protocol):
    """Rows of tokens that are being written, with what the model has computed for them.

    One that can copy a row has a method `fork(rows)` as well: row i becomes a copy of row rows[i].
    """

    @property
    def config(self) -> ModelConfig: ...

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row so far."""
        ...

    def feed(self, tokens: Sequence[Sequence[int]], every: bool = False) -> Scores:
        """Append tokens[i] to row i; the first call makes the rows, and their lengths may differ.

        Scores after each row's last token (B, V); with `every`, after every token, row after row (sum of lengths, V). Raises
        UserError when a row would be longer than the context.
        """
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows stay, in this order."""
        ...

    def rewind(self, lengths: Sequence[int]) -> None:
        """Each row forgets all but its first lengths[i] tokens."""
        ...

    def close(self) -> None:
        """Give the memory back; nothing can be fed after it."""
        ...


@runtime_checkable
class Engine(Protocol):
    """A model that computes in its own way."""

    @property
    def config(self) -> ModelConfig: ...

    def start(self, n_ids: int | None = None) -> Runner:
        """A runner without rows. Scores are of the first `n_ids` of the vocabulary alone (all if not given)."""
        ...


def start(model: Model, n_ids: int | None = None) -> Runner:
    """A runner for `model`: its own if it has one, else PyTorch. Only the first `n_ids` of the vocabulary can be drawn."""
    if isinstance(model, Engine):
        return model.start(n_ids)
    from glassgpt.generation.plain_runner import PlainRunner

    return PlainRunner(model, n_ids)
