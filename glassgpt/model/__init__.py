"""The network. Imports only `config`."""

from glassgpt.model.attention import fused, plain, use_attention
from glassgpt.model.gpt import GPT, Block

__all__ = ["GPT", "Block", "fused", "plain", "use_attention"]
