"""What every view is made of, and the marks that several of them draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from glassgpt import charts
from glassgpt.config import UserError
from glassgpt.interpret.tokens import label, pieces
from glassgpt.model import GPT
from glassgpt.text import Tokenizer

SHADES = " ░▒▓█"
BLUE, ORANGE = "#2f5d9b", "#c8622d"
SEQUENTIAL, DIVERGING = "Blues", "PuOr_r"
"""Colour maps: one hue from nothing to much; blue through white to orange, for less and more."""


@dataclass(frozen=True)
class View:
    """One view of a model and a prompt."""

    facts: dict[str, Any]
    """Its numbers, as --json prints them."""
    shown: tuple[RenderableType, ...]
    """What a terminal shows, from top to bottom."""
    draw: Callable[[], Any]
    """Its picture, a matplotlib figure."""

    def show(self, console: Console) -> None:
        for part in self.shown:
            console.print(part)


@dataclass(frozen=True)
class Read:
    """A model and the prompt that it reads."""

    name: str
    model: GPT
    tokenizer: Tokenizer
    ids: Tensor
    """(T,)"""

    def labels(self) -> list[str]:
        """Each token of the prompt for people to look at: what it says, or its bytes."""
        return [piece.text for piece in pieces(self.tokenizer, self.ids.tolist())]

    def label(self, token_id: int) -> str:
        """Any token of the vocabulary."""
        return label(self.tokenizer, token_id)

    def place(self, position: int) -> int:
        """A position of the prompt, counted from 0; negative ones count from its end. Raises UserError outside it."""
        length = self.ids.numel()
        if not -length <= position < length:
            raise UserError(f"--position {position} is outside the prompt, which has {length} tokens (0 to {length - 1})")
        return position % length

    @torch.no_grad()
    def logits(self) -> Tensor:
        """(T, V) in float32 or better, of the tokens that the tokenizer has."""
        logits: Tensor = self.model(self.ids.unsqueeze(0))[0, :, : self.tokenizer.vocab_size]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def token_id(tokenizer: Tokenizer, text: str, option: str) -> int:
    """The one token that `text` is. Raises UserError when it is none or several."""
    ids = tokenizer.encode(text)
    if len(ids) == 1:
        return ids[0]
    parts = " ".join(repr(tokenizer.decode([i])) for i in ids) or "nothing"
    hint = f"; a word inside a text begins with a space: {option} {' ' + text!r}" if text and text[0] != " " else ""
    raise UserError(f"{option} {text!r} must be one token of this vocabulary; it is {len(ids)}: {parts}{hint}")


def table(*columns: str) -> Table:
    """A table without a frame; columns whose name starts with > are flush right."""
    made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for number, column in enumerate(columns):
        flush = "right" if column.startswith(">") else "left"
        made.add_column(column.removeprefix(">"), justify=flush, no_wrap=True, min_width=7 if number == 0 else 1)  # type: ignore[arg-type]
    return made


def title(text: str, note: str = "") -> Text:
    return Text.assemble("\n", (text, "bold"), ("  " + note if note else "", "dim"))


def bar(share: float, width: int = 20, style: str = "blue") -> Text:
    """A bar as long as a share between 0 and 1."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    return Text("█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8], style=style)


def percent(p: float) -> str:
    """A probability with what digits it needs: never 0 % for what is more than nothing."""
    if p == 0 or p >= 0.0001:
        return f"{p:.2%}"
    return f"{100 * p:.0e}%"


def matrix(values: Tensor, rows: Sequence[str], columns: Sequence[str], corner: str = "", digits: int = 2) -> Table:
    """Numbers (R, C) as a table, the larger the stronger."""
    made = table(corner, *(f">{column}" for column in columns))
    largest = float(values.abs().max()) or 1.0
    for name, row in zip(rows, values.tolist(), strict=True):
        made.add_row(name, *(Text(f"{x:.{digits}f}", style=_strength(x / largest)) for x in row))
    return made


def _strength(share: float) -> str:
    if abs(share) < 0.1:
        return "dim"
    colour = "blue" if share > 0 else "yellow"
    return f"bold {colour}" if abs(share) > 0.5 else colour


def heat_map(
    values: Tensor, rows: Sequence[str], columns: Sequence[str], heading: str, colour_label: str, diverging: bool = False
) -> Any:
    """A figure of numbers (R, C): rows from the bottom up, as layers lie."""
    R, C = values.shape
    figure, axes = charts.figure(size=(max(5.0, 0.52 * C + 2.4), max(3.2, 0.34 * R + 1.6)))
    reach = float(values.abs().max()) or 1.0
    colours = {"cmap": DIVERGING, "vmin": -reach, "vmax": reach} if diverging else {"cmap": SEQUENTIAL, "vmin": 0.0}
    picture = axes.imshow(values.tolist(), origin="lower", aspect="auto", **colours)
    axes.set_xticks(
        range(C),
        columns,
        rotation=60 if max(map(len, columns)) > 3 else 0,
        ha="right" if max(map(len, columns)) > 3 else "center",
    )
    axes.set_yticks(range(R), rows)
    axes.set_title(heading, fontsize=11)
    figure.colorbar(picture, label=colour_label)
    return figure
