"""What every view is made of, and the marks that several of them draw."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from glassgpt import charts
from glassgpt.config import ModelConfig, UserError
from glassgpt.generation.sampling import exact
from glassgpt.interpret.tokens import Piece, label, pieces
from glassgpt.model import GPT
from glassgpt.text import Tokenizer

SHADES = " ░▒▓█"
BLUE, ORANGE = "#2f5d9b", "#c8622d"
SEQUENTIAL = "Blues"
"""Colour map from nothing to much; what has two sides goes from orange (less) to blue (more)."""
LARGEST_INCHES = 32.0
"""A picture's longest side."""
MOST_LAYERS, MOST_PLACES = 13, 64
"""Columns and lines of a table of percents."""


@dataclass(frozen=True)
class View:
    """One view of a model and a prompt."""

    facts: dict[str, Any]
    """Its numbers, as --json prints them."""
    shown: tuple[RenderableType, ...]
    """What a terminal shows, from top to bottom."""
    draw: Callable[[], Any]
    """Its picture, a matplotlib figure."""


@dataclass(frozen=True)
class Read:
    """A model and the prompt that it reads."""

    name: str
    model: GPT
    tokenizer: Tokenizer
    ids: Tensor
    """(T,)"""

    def pieces(self) -> list[Piece]:
        """Each token of the prompt."""
        return pieces(self.tokenizer, self.ids.tolist())

    def labels(self) -> list[str]:
        """Each token of the prompt for people to look at: what it says, or its bytes, the last ones with their character."""
        found = self.pieces()
        ends = [here.group != after.group for here, after in itertools.pairwise(found)] + [True]
        return [
            f"{piece.text}={piece.character}" if piece.is_fragment and piece.character and is_end else piece.text
            for piece, is_end in zip(found, ends, strict=True)
        ]

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
        return exact(self.model(self.ids.unsqueeze(0))[0, :, : self.tokenizer.vocab_size])


def encode(prompt: str, tokenizer: Tokenizer, model: ModelConfig) -> list[int]:
    """Ids of a prompt. Raises UserError for one that is too long."""
    ids = tokenizer.encode_start(prompt)
    if len(ids) > model.context_tokens:
        raise UserError(f"the prompt has {len(ids)} tokens and the context is {model.context_tokens}; shorten it")
    return ids


def token_id(tokenizer: Tokenizer, text: str, option: str) -> int:
    """The one token that `text` is. Raises UserError when it is none or several."""
    ids = tokenizer.encode(text)
    if len(ids) == 1:
        return ids[0]
    parts = " ".join(repr(tokenizer.decode([i])) for i in ids) or "nothing"
    hint = f"; a word inside a text begins with a space: {option} {' ' + text!r}" if text and text[0] != " " else ""
    raise UserError(f"{option} {text!r} must be one token of this vocabulary; it is {len(ids)}: {parts}{hint}")


def last_look(pattern: Tensor, labels: Sequence[str]) -> dict[str, Any]:
    """Where the last token of a head's pattern (T, T) looks most."""
    weight, place = pattern[-1].max(dim=-1)
    return {"last_looks_at": labels[int(place)], "place": int(place), "weight": float(weight)}


def table(*columns: str) -> Table:
    """A table without a frame; columns whose name starts with > are flush right."""
    made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for number, column in enumerate(columns):
        flush = "right" if column.startswith(">") else "left"
        made.add_column(Text(column.removeprefix(">")), justify=flush, no_wrap=True, min_width=7 if number == 0 else 1)  # type: ignore[arg-type]
    return made


def title(text: str, note: str = "") -> Text:
    return Text.assemble("\n", (text, "bold"), ("  " + note if note else "", "dim"))


def rule(text: str) -> Text:
    """The line that parts one model from the other."""
    return Text(f"\n━━━ {text}", style="bold blue")


def bar(share: float, width: int = 20, style: str = "blue") -> Text:
    """A bar as long as a share between 0 and 1."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    return Text("█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8], style=style)


def percent(p: float) -> str:
    """A probability with what digits it needs: never 0 % for what is more than nothing."""
    if p == 0 or p >= 0.0001:
        return f"{p:.2%}"
    return f"{100 * p:.0e}%"


def percents(shares: Tensor, layers: Sequence[str], places: Sequence[str]) -> tuple[Table, str]:
    """Shares (R, C) as a table of percents that fits a terminal: a line for each of C places, a column for each of R layers.

    Also says what is left out: of many layers all but every nth, of many places those where nothing reaches 1 %.
    """
    R, C = shares.shape
    step = -(-R // MOST_LAYERS)
    shown_layers = sorted({*range(0, R, step), R - 1})
    strongest = shares.abs().amax(dim=0)  # (C,)
    shown_places = [place for place in range(C) if C <= MOST_PLACES or strongest[place] >= 0.01]
    made = table("", *(f">{layers[layer].removeprefix('layer ')}" for layer in shown_layers))
    for place in shown_places:
        cells = [Text(str(round(100 * x)), style=_strength(x)) for x in shares[shown_layers, place].tolist()]
        made.add_row(Text(places[place][:20]), *cells)
    left_out = "" if step == 1 else f"; every {step}th layer"
    return made, left_out if len(shown_places) == C else f"{left_out}; {C - len(shown_places)} places below 1 % left out"


def _strength(share: float) -> str:
    if abs(share) < 0.1:
        return "dim"
    colour = "blue" if share > 0 else "yellow"
    return f"bold {colour}" if abs(share) > 0.5 else colour


def clamped(inches: float, least: float = 3.0) -> float:
    """A side of a picture, whatever is to be on it."""
    return min(LARGEST_INCHES, max(least, inches))


def heat_map(
    values: Tensor, rows: Sequence[str], columns: Sequence[str], heading: str, colour_label: str, diverging: bool = False
) -> Any:
    """A figure of numbers (R, C): rows from the bottom up, as layers lie."""
    from matplotlib.colors import LinearSegmentedColormap

    R, C = values.shape
    figure, axes = charts.figure(size=(clamped(0.52 * C + 2.4, 5.0), clamped(0.34 * R + 1.6, 3.2)))
    values = values.masked_fill(values.isinf(), float("nan"))  # is left white
    reach = float(values.nan_to_num().abs().max()) or 1.0
    two_sided = LinearSegmentedColormap.from_list("", [ORANGE, "#f7f7f5", BLUE])
    colours = {"cmap": two_sided, "vmin": -reach, "vmax": reach} if diverging else {"cmap": SEQUENTIAL, "vmin": 0.0}
    picture = axes.imshow(values.tolist(), origin="lower", aspect="auto", **colours)
    turned: dict[str, Any] = {"rotation": 60, "ha": "right"} if max(map(len, columns)) > 3 else {}
    charts.label_axis(axes.xaxis, columns, **turned)
    charts.label_axis(axes.yaxis, rows)
    axes.set_title(charts.drawable(heading), fontsize=11)
    figure.colorbar(picture, label=colour_label)
    return figure
