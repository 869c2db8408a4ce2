"""Text to token shards, and shards to batches."""

from glassgpt.data import corpus, shards
from glassgpt.data.corpus import Corpus
from glassgpt.data.sources import EMBEDDED, documents
from glassgpt.data.stream import Batch, Place, Stream, Windows, in_order

__all__ = ["EMBEDDED", "Batch", "Corpus", "Place", "Stream", "Windows", "corpus", "documents", "in_order", "shards"]
