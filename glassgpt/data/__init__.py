"""Text to token shards, and shards to batches."""

from glassgpt.data import corpus, shards
from glassgpt.data.corpus import Corpus
from glassgpt.data.sources import EMBEDDED, documents
from glassgpt.data.stream import Batch, InOrder, Place, Stream, Windows

__all__ = ["EMBEDDED", "Batch", "Corpus", "InOrder", "Place", "Stream", "Windows", "corpus", "documents", "shards"]
