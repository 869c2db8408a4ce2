"""Looking inside a model."""

from glassgpt.interpret.anatomy import Anatomy, anatomy, memory
from glassgpt.interpret.hooks import capture, edit

__all__ = ["Anatomy", "anatomy", "capture", "edit", "memory"]
