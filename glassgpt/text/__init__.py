"""Text to token ids and back."""

from glassgpt.text.tokenizer import END_OF_TEXT, Tokenizer

__all__ = ["END_OF_TEXT", "Tokenizer"]
