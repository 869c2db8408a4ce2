"""Byte-level BPE: text to ids and back, over Hugging Face `tokenizers` (Radford et al. 2019, §2.2)."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from glassgpt.config import UserError
from glassgpt.text.template import Template

END_OF_TEXT = "<|endoftext|>"
ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>")
"""What ends a text in published vocabularies; ours have the first."""
# (vocabulary, merges): Hugging Face's names and OpenAI's.
VOCABULARY_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


@lru_cache
def byte_characters() -> dict[str, int]:
    """GPT-2's table of printable stand-ins, character -> byte: the 256 bytes as characters that are never spaces."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + n): byte for n, byte in enumerate(others)}


class Tokenizer:
    """Encode and decode text. In a byte-level vocabulary every byte string has ids, and ids give back exactly those bytes.

    One of SentencePiece's kind, with bytes for what no token has, puts a space before the text, and some normalise it.
    """

    def __init__(self, backend: tokenizers.Tokenizer, template: Template | None = None) -> None:
        self._backend = backend if template is None else _with_marks(backend, template)
        self.template = template
        """The words around the messages of a chat, where the model brings its own."""
        backend.no_truncation()  # some published files carry a training run's limits
        backend.no_padding()

    # ------------------------------------------------------------------ load, train, save

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read `tokenizer.json` (a file, or in a folder) or a folder with vocab.json + merges.txt or encoder.json + vocab.bpe.

        Raises UserError saying what was looked for when none is there or a file cannot be read.
        """
        path = Path(path)
        try:
            if path.is_file():
                return cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
            if (path / "tokenizer.json").is_file():
                return cls(cls.load(path / "tokenizer.json")._backend, Template.read(path))
            for vocabulary, merges in VOCABULARY_FILES:
                if (path / vocabulary).is_file() and (path / merges).is_file():
                    return cls(cls._from_merges(path / vocabulary, path / merges)._backend, Template.read(path))
        except UserError:
            raise
        except Exception as error:  # the backend raises bare Exception on a malformed file
            raise UserError(f"{path}: cannot read the tokenizer: {error}") from error
        names = ["tokenizer.json", *(f"{vocabulary} + {merges}" for vocabulary, merges in VOCABULARY_FILES)]
        raise UserError(f"{path}: no tokenizer found; looked for {', '.join(names)}")

    @classmethod
    def _from_merges(cls, vocabulary: Path, merges: Path) -> Tokenizer:
        ids = json.loads(vocabulary.read_text(encoding="utf-8"))
        lines = merges.read_text(encoding="utf-8").splitlines()
        lines = [line for line in lines if line and not line.startswith("#version")]
        if bad := [line for line in lines if line.count(" ") != 1]:
            raise UserError(f"{merges}: a merge is two tokens on a line; got {bad[0]!r}")
        pairs = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
        return cls(_byte_level(models.BPE(ids, pairs)))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn a byte-level BPE of `vocab_size` ids (256 bytes, merges, one end-of-text token) from `texts`."""
        if vocab_size < 257:
            raise UserError(f"vocab_size must be at least 257 (256 bytes and the end-of-text token); got {vocab_size}")
        backend = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` into `folder`, and the chat template if there is one."""
        (Path(folder) / "tokenizer.json").write_text(self.to_json(), encoding="utf-8")
        if self.template is not None:
            self.template.save(Path(folder))

    def with_template(self, template: Template | None) -> Tokenizer:
        """The same vocabulary with other words around the messages of a chat, or none."""
        return Tokenizer(self._backend, template)

    def to_json(self) -> str:
        return self._backend.to_str()

    @cached_property
    def sha256(self) -> str:
        """Identity of the tokenizer: two with equal hashes give equal ids. Stored with every shard and checkpoint."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    # ------------------------------------------------------------------ encode

    @property
    def vocab_size(self) -> int:
        """One more than the largest id (a vocabulary may leave ids out)."""
        return len(self._bytes_of_id)

    @property
    def end_id(self) -> int | None:
        """Id of the end-of-text token, None when the vocabulary has none."""
        return None if self.end_token is None else self._backend.token_to_id(self.end_token)

    @property
    def end_token(self) -> str | None:
        """The end-of-text token itself: the first of ENDS that is there."""
        return next((token for token in ENDS if self._backend.token_to_id(token) is not None), None)

    @cached_property
    def begin_id(self) -> int | None:
        """Id of the token that its model wants before every text (Llama's <s>), None where there is none."""
        ids = self._backend.encode("", add_special_tokens=True).ids
        return ids[0] if len(ids) == 1 and ids[0] != self.end_id else None

    def encode_start(self, text: str) -> list[int]:
        """Ids of a text from its start on: the token that begins texts, if there is one, and `encode(text)`."""
        return [*([] if self.begin_id is None else [self.begin_id]), *self.encode(text)]

    def encode(self, text: str, *, allow_special: bool = False, inside: bool = False) -> list[int]:
        """Ids of `text`. `<|endoftext|>` in it is ordinary text unless `allow_special`: users' text must not end documents.

        `inside` is for text that goes on another: SentencePiece's kind then puts no space before it.
        """
        if inside and self._falls_back:
            for first in ("\n", "\x01"):  # what is cut off again must not have merged with the text
                before, ids = self.encode(first), self.encode(f"{first}{text}", allow_special=allow_special)
                if ids[: len(before)] == before:
                    return ids[len(before) :]
        return self.encode_batch([text], allow_special=allow_special)[0]

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = False) -> list[list[int]]:
        """Ids of each text, on all cores. Raises UserError for text that is not valid Unicode (lone surrogates)."""
        self._backend.encode_special_tokens = not allow_special
        try:
            return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        except (UnicodeEncodeError, TypeError) as error:
            raise UserError(f"text is not valid Unicode ({error}); decode bytes as UTF-8, or use encode_bytes") from error

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes: valid UTF-8 as `encode`, every other byte as its own token."""
        ids: list[int] = []
        pending = ""
        for character in data.decode("utf-8", errors="surrogateescape"):
            if "\udc80" <= character <= "\udcff":  # surrogateescape's stand-in for a byte that is not UTF-8
                ids += [*(self.encode(pending) if pending else ()), self._byte_ids[ord(character) - 0xDC00]]
                pending = ""
            else:
                pending += character
        return ids + (self.encode(pending) if pending else [])

    # ------------------------------------------------------------------ decode

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 show as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of `ids`. Raises UserError for an id outside the vocabulary."""
        return b"".join(map(self.token_bytes, ids))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token."""
        if not 0 <= token_id < len(self._bytes_of_id):
            raise UserError(f"token id {token_id} is outside the vocabulary (0 to {len(self._bytes_of_id) - 1})")
        return self._bytes_of_id[token_id]

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text piece by piece as ids arrive, one piece per id; an incomplete character waits for its last byte."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token_id in ids:
            yield decoder.decode(self.token_bytes(token_id))
        if rest := decoder.decode(b"", final=True):
            yield rest

    def pieces(self) -> list[str]:
        """The vocabulary by id, each token in `byte_characters`; empty where the vocabulary leaves an id out."""
        by_id = {token_id: token for token, token_id in self._backend.get_vocab(with_added_tokens=True).items()}
        return [by_id.get(token_id, "") for token_id in range(max(by_id) + 1)]

    def byte_lengths(self) -> list[int]:
        """Bytes of text behind each id, 0 for special tokens: what bits per byte divides by."""
        return [0 if token_id in self._special else len(data) for token_id, data in enumerate(self._bytes_of_id)]

    @property
    def special_tokens(self) -> list[str]:
        """Tokens that are no text, such as the one that ends texts."""
        return list(self._special.values())

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    @cached_property
    def _special(self) -> dict[int, str]:
        return {token_id: str(token) for token_id, token in self._backend.get_added_tokens_decoder().items() if token.special}

    @cached_property
    def _bytes_of_id(self) -> list[bytes]:
        to_bytes = _fallback_bytes if self._falls_back else _byte_level_bytes
        return [piece.encode() if i in self._special else to_bytes(piece) for i, piece in enumerate(self.pieces())]

    @cached_property
    def _falls_back(self) -> bool:
        """Whether tokens are text, with one for each byte beside them (SentencePiece's way), in place of byte characters."""
        return bool(json.loads(self.to_json())["model"].get("byte_fallback"))  # not every kind of model has it as an attribute

    @cached_property
    def _byte_ids(self) -> list[int]:
        characters = [character for character, _ in sorted(byte_characters().items(), key=lambda c: c[1])]
        names = [f"<0x{byte:02X}>" for byte in range(256)] if self._falls_back else characters
        ids = [self._backend.token_to_id(name) for name in names]
        known = [token_id for token_id in ids if token_id is not None]
        if len(known) < 256:
            raise UserError(f"the tokenizer is not byte-level: it has tokens for {len(known)} of 256 bytes")
        return known


def _with_marks(backend: tokenizers.Tokenizer, template: Template) -> tokenizers.Tokenizer:
    """The same vocabulary, in which every added token that the template writes is special: no message can then forge one."""
    facts = json.loads(backend.to_str())
    marks = [
        token
        for token in facts.get("added_tokens", [])
        if not token["special"] and (token["content"] in template.source or token["content"] in (template.begin, template.end))
    ]
    if not marks:
        return backend
    for token in marks:
        token["special"] = True
    return tokenizers.Tokenizer.from_str(json.dumps(facts))


def _byte_level_bytes(piece: str) -> bytes:
    """`Ġthe` -> b" the"; a piece with other characters in it is text."""
    table = byte_characters()
    return bytes(table[c] for c in piece) if all(c in table for c in piece) else piece.encode()


def _fallback_bytes(piece: str) -> bytes:
    """`▁the` -> b" the", `<0x0A>` -> b"\\n"."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id(END_OF_TEXT) is not None:
        backend.add_special_tokens([END_OF_TEXT])
    return backend
