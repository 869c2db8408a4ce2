"""Text out of a model: cache, sampling, engine, writer."""

from glassgpt.generation.cache import KVCache
from glassgpt.generation.engine import Token, stream
from glassgpt.generation.sampling import distribution, draw
from glassgpt.generation.writer import Completion, complete, generate

__all__ = ["Completion", "KVCache", "Token", "complete", "distribution", "draw", "generate", "stream"]
