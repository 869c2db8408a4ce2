"""Text to token shards, and shards to batches."""

from glassgpt.data import shards
from glassgpt.data.sources import EMBEDDED, documents
from glassgpt.data.stream import Batch, Stream, in_order

__all__ = ["EMBEDDED", "Batch", "Stream", "documents", "in_order", "shards"]
