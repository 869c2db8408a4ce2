"""The page of `glassgpt inspect --html`: one file that opens from disk, with its data inside and no network.

Beside this file are its parts: index.html, style.css, scripts, and the words of every language. Nothing is built or downloaded.
"""

from __future__ import annotations

import base64
import html
import json
from importlib import resources
from string import Template
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glassgpt.interpret.page.report import Report
from glassgpt.interpret.page.weight_stats import BINS, HISTOGRAM_NUMBERS, SPREAD

LANGUAGES = ("en", "vi")
SCRIPTS = (
    "maths", "data", "language", "colour", "store", "tokens", "heads", "attention", "head", "lens", "why", "weights", "next",
    "main",
)  # fmt: skip
"""Plain scripts in the order in which they are put into the page; what one declares the later ones use."""
KINDS = {torch.uint8: "u1", torch.float16: "f2", torch.float32: "f4", torch.int32: "i4"}


def page(report: Report) -> str:
    """The whole page as one text."""
    words = {language: json.loads(_part(f"{language}.json")) for language in LANGUAGES}
    return Template(_part("index.html")).substitute(
        title=html.escape(report.model),
        style=_part("style.css"),
        words=_embedded(words),
        report=_embedded(payload(report)),
        script="\n".join(_part(f"{name}.js") for name in SCRIPTS),
    )


def _part(name: str) -> str:
    return (resources.files("glassgpt.interpret.page") / name).read_text(encoding="utf-8")


def _embedded(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def payload(report: Report) -> dict[str, Any]:
    """The data of the page: `as_json`, with arrays of numbers packed, and those that it leaves out."""
    plain = report.as_json()
    plain["lens"] = {
        "ids": _packed(report.lens.ids, torch.int32),
        "probabilities": _packed(report.lens.probabilities, torch.float32),
        "rank": _packed(report.lens.rank, torch.int32),
        "kl_bits": _packed(report.lens.kl_bits, torch.float32),
        "entropy_bits": _packed(report.lens.entropy_bits, torch.float32),
    }
    order = report.logits.argsort(descending=True, stable=True)
    return plain | {
        "pattern": _packed(_seen(report.pattern), torch.float16),
        "scores": None if report.scores is None else _packed(report.scores.clamp(-65504, 65504), torch.float16),
        "masked": None if report.masked is None else _packed(_seen(report.masked), torch.float16),
        "slabs": _slab_bytes(report.slabs),
        "slab_shape": list(report.slabs.shape[1:]),
        "logits": _packed(report.logits, torch.float32),
        "likeliest": order[: len(report.next_tokens)].tolist(),
        "bins": BINS,
        "spread": SPREAD,
        "sampled_above": HISTOGRAM_NUMBERS,
    }


def _seen(stage: Tensor) -> Tensor:
    """The lower triangle, row by row, of (L, H, T, T): (L, H, T (T + 1) / 2). What lies above is the future."""
    rows, columns = torch.tril_indices(*stage.shape[-2:])
    return stage[..., rows, columns]


def _slab_bytes(slabs: Tensor) -> dict[str, Any]:
    """In 255 steps, from 0 to each layer's largest."""
    largest = slabs.flatten(1).amax(-1)  # (L,)
    steps = (slabs / largest.clamp(min=1e-30).view(-1, 1, 1, 1) * 255).round()
    return _packed(steps, torch.uint8) | {"largest": largest.tolist()}


def _packed(numbers: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Little-endian numbers in base64."""
    array = numbers.detach().to("cpu", dtype).contiguous().numpy()
    data = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    return {"kind": KINDS[dtype], "data": base64.b64encode(data).decode("ascii")}
