"""The network. Imports only `config`."""

from glassgpt.model.attention import Routes, Where, blocked, flexible, fused, plain, use_attention
from glassgpt.model.gpt import GPT, Block

__all__ = ["GPT", "Block", "Routes", "Where", "blocked", "flexible", "fused", "plain", "use_attention"]
