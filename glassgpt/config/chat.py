"""Knobs of `glassgpt chat`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from glassgpt.config.compute import Compute, Dtype
from glassgpt.config.errors import UserError, check_at_least
from glassgpt.config.generate import Sampling
from glassgpt.config.speculation import Speculation


@dataclass(frozen=True)
class Chat:
    """Talk with a model, turn by turn, in its own chat template.

    In a terminal, /help lists the commands, Ctrl-C stops an answer and Ctrl-D ends. With --message, or when standard input is no
    terminal (one message a line), the answers alone are printed.
    """

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    """A bundled model, a run folder, a Hugging Face folder or a downloaded hub id."""
    message: tuple[str, ...] = ()
    """Say these, one a turn, print the answers and exit."""
    system: str | None = None
    """What the model is told before the conversation; takes the place of a loaded one."""
    load: str | None = None
    """Continue the conversation in this file, as /save writes it: {"messages": [{"role": ..., "content": ...}, ...]}."""
    max_new_tokens: int = 256
    """Tokens of an answer at most."""
    sampling: OmitArgPrefixes[Sampling] = field(default_factory=lambda: Sampling(temperature=0.8))
    seed: int | None = None
    """Equal seeds give equal conversations; a random one is drawn when not given."""
    device: str = "auto"
    """cpu, cuda, mps, or auto for the best there is."""
    compute: OmitArgPrefixes[Compute] = field(default_factory=Compute)
    dtype: Dtype | None = None
    """The older name of --precision."""
    speculation: OmitArgPrefixes[Speculation] = field(default_factory=Speculation)
    json: bool = False
    """One JSON object instead of text: the conversation, and how each answer ended."""

    def __post_init__(self) -> None:
        check_at_least(1, self, "max_new_tokens")
        if not all(text.strip() for text in self.message):
            raise UserError("a --message is empty; give some text to answer")
