"""The network. Imports only `config`."""

from glassgpt.model.attention import blocked, fused, plain, use_attention
from glassgpt.model.gpt import GPT, Block

__all__ = ["GPT", "Block", "blocked", "fused", "plain", "use_attention"]
