"""PyTorch computes: the network as it is, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glassgpt.config.generate import Sampling
from glassgpt.config.speculation import MOST_PROPOSALS
from glassgpt.generation.cache import KVCache, as_batch
from glassgpt.generation.generator import Generator
from glassgpt.generation.sampling import choose, exact
from glassgpt.model import GPT


class TensorScores:
    """`Scores` of a tensor."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self._best: list[int] | None = None
        self._log_total: list[float] | None = None

    @property
    def best(self) -> list[int]:
        if self._best is None:
            self._best = self.logits.argmax(-1).tolist()
        return self._best

    @property
    def log_total(self) -> list[float]:
        if self._log_total is None:
            self._log_total = self.logits.logsumexp(-1).tolist()
        return self._log_total

    def logits_of(self, ids: Sequence[int]) -> list[float]:
        index = torch.tensor(ids, device=self.logits.device)[:, None]
        found: list[float] = self.logits.gather(-1, index).squeeze(-1).tolist()
        return found

    @torch.inference_mode()
    def draw(self, sampling: Sampling, generators: Sequence[Generator]) -> list[int]:
        drawn: list[int] = choose(self.logits, sampling, generators).tolist()
        return drawn

    def of(self, places: Sequence[int]) -> TensorScores:
        return TensorScores(self.logits[torch.tensor(places, device=self.logits.device)])


class PlainRunner:
    """The network as it is, with a key/value cache; rows of different length are padded on the left."""

    def __init__(self, model: GPT, n_ids: int | None = None) -> None:
        self.config = model.config
        self._device = next(model.parameters()).device
        self._model, self._n_ids = model, n_ids
        self._cache = KVCache(model.config, spare=MOST_PROPOSALS + 1)
        self._padding: list[int] = []
        self._pad: Tensor | None = None

    @property
    def lengths(self) -> list[int]:
        return [self._cache.length - padding for padding in self._padding]

    @torch.inference_mode()
    def feed(self, tokens: Sequence[Sequence[int]], every: bool = False) -> TensorScores:
        """After the first call, each row must get as many tokens as the others (ValueError)."""
        counts = list(map(len, tokens))
        if not self._padding:
            self._padding = [max(counts) - count for count in counts]
            ids, self._pad = as_batch(tokens, self._device)  # (B, T), (B,)
        elif len(counts) != len(self._padding) or len(set(counts)) > 1:
            raise ValueError(f"each of {len(self._padding)} rows must get as many tokens as the others; got {counts}")
        else:
            ids = torch.tensor(tokens, device=self._device)  # (B, T)
        hidden = self._model.hidden(ids, self._cache, self._pad)  # (B, T, D)
        takes = counts if every else [1] * len(counts)
        wanted = torch.cat([row[-n:] for row, n in zip(hidden, takes, strict=True)])  # (n, D)
        return TensorScores(exact(self._model.logits(wanted)[:, : self._n_ids]))

    def keep(self, rows: Sequence[int]) -> None:
        padding = [self._padding[row] for row in rows]
        common = min(padding)  # the longest row then starts at position 0, so the padded length never passes the context
        self._padding = [count - common for count in padding]
        self._pad = torch.tensor(self._padding, device=self._device) if any(self._padding) else None
        self._cache.keep(torch.tensor(rows, device=self._device), common)

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
