"""Text out of a model: cache, sampling, engine, writer."""

import importlib
from typing import TYPE_CHECKING, Any

from glassgpt.generation.engine import Token, stream
from glassgpt.generation.generator import Generator
from glassgpt.generation.writer import Completion, complete, generate

if TYPE_CHECKING:
    from glassgpt.generation.cache import KVCache
    from glassgpt.generation.sampling import distribution, draw

_OF_TENSORS = {"KVCache": "cache", "distribution": "sampling", "draw": "sampling"}  # imported with PyTorch, when asked for

__all__ = ["Completion", "Generator", "KVCache", "Token", "complete", "distribution", "draw", "generate", "stream"]


def __getattr__(name: str) -> Any:
    if name not in _OF_TENSORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_OF_TENSORS[name]}"), name)
