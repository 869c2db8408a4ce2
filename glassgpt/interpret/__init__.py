"""Looking inside a model."""

from glassgpt.interpret.anatomy import Anatomy, anatomy, memory

__all__ = ["Anatomy", "anatomy", "memory"]
