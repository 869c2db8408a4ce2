"""The smaller forms of a model: names, and how `quantize` and `prune` make each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch

from glassgpt.compress.prune import pruned_model
from glassgpt.compress.quantize import chosen, quantised
from glassgpt.config import UserError, nearest
from glassgpt.config.compression import Compression
from glassgpt.config.prune import Prune
from glassgpt.config.quantize import Quantize
from glassgpt.model import GPT
from glassgpt.text import Tokenizer

FLOATS = ("float32", "bfloat16")
QUANTISED: dict[str, dict[str, Any]] = {
    "int8-row": {"group": 0},
    "int8-row-gptq": {"group": 0, "method": "gptq"},
    "int8": {},
    "int8-gptq": {"method": "gptq"},
    "int8-a8": {"activations": 8},
    "int4": {"bits": 4},
    "int4-gptq": {"bits": 4, "method": "gptq"},
    "int4-a8": {"bits": 4, "activations": 8},
    "int4-head4": {"bits": 4, "head_bits": 4},
    "int4-head4-gptq": {"bits": 4, "head_bits": 4, "method": "gptq"},
}
"""What each asks of `quantize`, beside its defaults: 8 bits, groups of 32, rounding."""
PRUNED: dict[str, dict[str, Any]] = {
    "magnitude-50": {"method": "magnitude", "sparsity": 0.5},
    "magnitude-2:4": {"method": "magnitude", "pattern": "2:4"},
    "wanda-50": {"method": "wanda", "sparsity": 0.5},
    "wanda-2:4": {"method": "wanda", "pattern": "2:4"},
    "structured": {"method": "structured", "mlp_share": 0.25},
}
"""What each asks of `prune`; structured takes a head out, too."""
NAMES = (*FLOATS, *QUANTISED, *PRUNED)
CALIBRATED = ("gptq", "wanda", "structured")
"""Methods that decide by text."""


def named(patterns: Iterable[str]) -> list[str]:
    """The variants that a name or pattern fits, in the order of NAMES. Raises UserError for one that fits none."""
    patterns = list(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in NAMES):
            raise UserError(f"no variant {pattern!r}{nearest(pattern, NAMES)}; there are {', '.join(NAMES)}")
    return [name for name in NAMES if any(fnmatchcase(name, pattern) for pattern in patterns)]


def is_calibrated(name: str) -> bool:
    """Whether a variant needs text to be made."""
    return (QUANTISED | PRUNED).get(name, {}).get("method") in CALIBRATED


def made(name: str, config: Compression, model: GPT, tokenizer: Tokenizer) -> GPT:
    """A variant of a plain float32 model, which stays as it is. Raises UserError where the model does not allow it."""
    if name in FLOATS:
        return model
    if name in QUANTISED:
        quantize = _configured(Quantize, config, QUANTISED[name])
        return quantised(quantize, model, chosen(model, quantize), tokenizer)
    settings = dict(PRUNED[name])
    if name == "structured":
        settings["heads"] = model.config.n_head // model.config.kv_heads  # those that share keys and values leave together
    return pruned_model(_configured(Prune, config, settings), model, tokenizer)


def stored_dtype(name: str) -> torch.dtype:
    """What a variant is stored in, but for its codes and scales."""
    return torch.float32 if name == "float32" else torch.bfloat16


def _configured(kind: Callable[..., Any], config: Compression, settings: dict[str, Any]) -> Any:
    """The configuration of `quantize` or `prune`; it writes nothing here, so its folder is only a word."""
    if settings.get("method") in CALIBRATED:
        names = ("calibration", "calibration_tokens", "holdout_share")
        settings = settings | {name: getattr(config, name) for name in names}
    return kind(model=config.model, out_dir="scratch", seed=config.seed, **settings)
