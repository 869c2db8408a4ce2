"""The network. Imports only `config`; PyTorch comes in with the first name that is asked for."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glassgpt.model.attention import Routes, Where, blocked, flexible, fused, plain, use_attention
    from glassgpt.model.gpt import GPT, Block

__all__ = ["GPT", "Block", "Routes", "Where", "blocked", "flexible", "fused", "plain", "use_attention"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{'gpt' if name in ('GPT', 'Block') else 'attention'}"), name)
