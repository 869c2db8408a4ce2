"""Who computes: rows of tokens in, scores of what follows out. `PlainRunner` is PyTorch; another engine brings its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from glassgpt.config import ModelConfig
from glassgpt.config.speculation import MOST_PROPOSALS
from glassgpt.generation.cache import KVCache, as_batch
from glassgpt.generation.sampling import exact
from glassgpt.model import GPT


class Scores:
    """What may follow n places. What a runner has not computed is computed when it is asked for."""

    def __init__(self, logits: Tensor, best: list[int] | None = None, log_total: list[float] | None = None) -> None:
        self.logits = logits
        """(n, V), of the ids that can be drawn; float32 or longer."""
        self._best, self._log_total = best, log_total

    @property
    def best(self) -> list[int]:
        """The likeliest id of each place; the first of equals."""
        if self._best is None:
            self._best = self.logits.argmax(-1).tolist()
        return self._best

    @property
    def log_total(self) -> list[float]:
        """log of the sum of exp(logits) at each place: a log-probability is a logit less this. NaN where a logit is."""
        if self._log_total is None:
            self._log_total = self.logits.logsumexp(-1).tolist()
        return self._log_total

    def logits_of(self, ids: Sequence[int]) -> list[float]:
        """The logit of one id at each place."""
        index = torch.tensor(ids, device=self.logits.device)[:, None]
        found: list[float] = self.logits.gather(-1, index).squeeze(-1).tolist()
        return found

    def of(self, places: Sequence[int]) -> Scores:
        """Those of these places, in this order."""
        logits = self.logits[torch.tensor(places, device=self.logits.device)]
        best, log_total = self._best, self._log_total
        return Scores(logits, best and [best[i] for i in places], log_total and [log_total[i] for i in places])


class Runner(Protocol):
    """Rows of tokens that are being written, with what the model has computed for them.

    One that can copy a row has a method `fork(rows)` as well: row i becomes a copy of row rows[i].
    """

    @property
    def config(self) -> ModelConfig: ...

    @property
    def device(self) -> torch.device:
        """Where the scores are."""
        ...

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


Model = GPT | Engine


def start(model: Model, n_ids: int | None = None) -> Runner:
    """A runner for `model`: its own if it has one, else PyTorch. Only the first `n_ids` of the vocabulary can be drawn."""
    return model.start(n_ids) if isinstance(model, Engine) else PlainRunner(model, n_ids)


class PlainRunner:
    """The network as it is, with a key/value cache; rows of different length are padded on the left."""

    def __init__(self, model: GPT, n_ids: int | None = None) -> None:
        self.config = model.config
        self.device = next(model.parameters()).device
        self._model, self._n_ids = model, n_ids
        self._cache = KVCache(model.config, spare=MOST_PROPOSALS + 1)
        self._padding: list[int] = []
        self._pad: Tensor | None = None

    @property
    def lengths(self) -> list[int]:
        return [self._cache.length - padding for padding in self._padding]

    @torch.inference_mode()
    def feed(self, tokens: Sequence[Sequence[int]], every: bool = False) -> Scores:
        """After the first call, each row must get as many tokens as the others (ValueError)."""
        counts = list(map(len, tokens))
        if not self._padding:
            self._padding = [max(counts) - count for count in counts]
            ids, self._pad = as_batch(tokens, self.device)  # (B, T), (B,)
        elif len(counts) != len(self._padding) or len(set(counts)) > 1:
            raise ValueError(f"each of {len(self._padding)} rows must get as many tokens as the others; got {counts}")
        else:
            ids = torch.tensor(tokens, device=self.device)  # (B, T)
        hidden = self._model.hidden(ids, self._cache, self._pad)  # (B, T, D)
        takes = counts if every else [1] * len(counts)
        wanted = torch.cat([row[-n:] for row, n in zip(hidden, takes, strict=True)])  # (n, D)
        return Scores(exact(self._model.logits(wanted)[:, : self._n_ids]))

    def keep(self, rows: Sequence[int]) -> None:
        padding = [self._padding[row] for row in rows]
        common = min(padding)  # the longest row then starts at position 0, so the padded length never passes the context
        self._padding = [count - common for count in padding]
        self._pad = torch.tensor(self._padding, device=self.device) if any(self._padding) else None
        self._cache.keep(torch.tensor(rows, device=self.device), common)

    fork = keep
    """A row may be named several times."""

    def rewind(self, lengths: Sequence[int]) -> None:
        """All rows must lose equally many tokens; where a layer sees a window, `MOST_PROPOSALS` + 1 at most (ValueError)."""
        cuts = {now - length for now, length in zip(self.lengths, lengths, strict=True)}
        if len(cuts) != 1:
            raise ValueError(f"rows of {self.lengths} tokens cannot lose different numbers of them; got {list(lengths)}")
        self._cache.rewind(self._cache.length - cuts.pop())

    def close(self) -> None:
        """The garbage collector does it."""
