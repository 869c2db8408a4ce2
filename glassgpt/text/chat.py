"""Chats: messages to ids with a mask of what is to be learnt, the same ids in training and in serving.

The template is rendered once with a mark before and after every message. What lies between the marks is encoded as plain text,
what lies outside with the template's special tokens: no message can forge a turn, and every answer begins on a token of its own,
where the prompt that is served ends.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

from glassgpt.config import UserError
from glassgpt.text.template import BEGIN, DEFAULT, Template
from glassgpt.text.tokenizer import Tokenizer

PRIVATE_PLANES = (0xF0000, 0x100000)
"""First characters of Unicode's two planes for private use: where the marks come from."""


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    """`system`, `user` or `assistant`; templates may know others."""
    content: str


class Encoded(NamedTuple):
    """A conversation as tokens."""

    ids: list[int]
    mask: list[bool]
    """Which of them the assistant writes: its words and what ends them. True is to be learnt."""


class Piece(NamedTuple):
    """A stretch of a rendered conversation."""

    text: str
    author: int | None
    """The message whose content it is; None for the template's own words."""


def template_of(tokenizer: Tokenizer) -> Template:
    """The template that the model brings, or ours with its vocabulary's end-of-text token."""
    if tokenizer.template is not None:
        return tokenizer.template
    begin = "" if tokenizer.begin_id is None else tokenizer.decode([tokenizer.begin_id])
    return Template(f"{BEGIN if begin else ''}{DEFAULT}", begin, tokenizer.end_token or "")


def text_of(messages: Sequence[Message], tokenizer: Tokenizer, *, reply: bool = False) -> str:
    """The conversation as one string; with `reply`, up to where the assistant's next answer begins."""
    return "".join(piece.text for piece in pieces(messages, template_of(tokenizer), reply=reply))


def render(messages: Sequence[Message], tokenizer: Tokenizer) -> Encoded:
    """A whole conversation as ids and a mask that is true on the assistant's words and on the token that ends them.

    Raises UserError when the template does not write, before an answer, exactly what it writes when it asks for that answer:
    the model would be served another text than it was trained on.
    """
    template = template_of(tokenizer)
    parts = pieces(messages, template)
    before = ""
    for part in parts:
        if part.author is not None and messages[part.author].role == "assistant":
            asked = "".join(piece.text for piece in pieces(messages[: part.author], template, reply=True))
            if asked != before:
                raise UserError(
                    "the chat template writes one text for training and another for serving: before the answer"
                    f" {part.text[:40]!r} it has {_ending(before, asked)!r}, and when it asks for it {_ending(asked, before)!r}"
                    " (use --data.template none, or put another chat_template.jinja into the model's folder)"
                )
        before += part.text
    return _encoded(parts, messages, tokenizer)


def prompt(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """The ids that a model is served to answer a conversation: those that stand before the answer in training."""
    return _encoded(pieces(messages, template_of(tokenizer), reply=True), messages, tokenizer).ids


def end_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens that end an answer: the vocabulary's end of text, and what the template puts after the assistant's words."""
    spoken = [Message("user", "a"), Message("assistant", "b")]
    ids, mask = _encoded(pieces(spoken, template_of(tokenizer)), spoken, tokenizer)
    last = [token_id for token_id, learnt in zip(ids, mask, strict=True) if learnt][-1:]
    ends = [token_id for token_id in last if tokenizer.is_special(token_id)]
    return sorted({*ends, *([] if tokenizer.end_id is None else [tokenizer.end_id])})


def pieces(messages: Sequence[Message], template: Template, *, reply: bool = False) -> list[Piece]:
    """The rendered conversation, parted into messages and the words around them; joined it is what the template writes."""
    parts = _rendered(messages, template, reply)
    gap = _gap(template)
    for place, part in enumerate(parts[1:], 1):
        before = parts[place - 1].text
        if gap and part.author is not None and messages[part.author].role == "assistant" and before.endswith(gap):
            parts[place - 1 : place + 1] = [Piece(before.removesuffix(gap), None), Piece(gap + part.text, part.author)]
    return parts


@functools.lru_cache(maxsize=32)
def _gap(template: Template) -> str:
    """White space that a template has before an answer but not where it asks for one: it is the assistant's to write."""
    question = [Message("user", "a")]
    try:
        before = _rendered([*question, Message("assistant", "b")], template, reply=False)[2].text
        asked = _rendered(question, template, reply=True)[2].text
    except (UserError, IndexError):  # a template that takes no such conversation, or leaves a message out
        return ""
    gap = before.removeprefix(asked)
    return gap if gap.isspace() and asked + gap == before else ""


def _rendered(messages: Sequence[Message], template: Template, reply: bool) -> list[Piece]:
    contents = [message.content for message in messages]
    first = next((plane for plane in PRIVATE_PLANES if not _uses(contents, plane)), None)
    if first is None:
        raise UserError("a message holds characters of both private planes of Unicode; take them out")
    marked = [
        message._replace(content=f"{chr(first + 2 * i)}{message.content}{chr(first + 2 * i + 1)}")
        for i, message in enumerate(messages)
    ]
    whole, with_marks = (template.render([message._asdict() for message in given], reply=reply) for given in (messages, marked))
    parts = _trimmed(_parted(with_marks, first, len(messages)), whole)
    if "".join(part.text for part in parts) != whole:
        raise UserError(
            "the chat template changes the messages that it is given, so it cannot be told which tokens are the assistant's"
        )
    return parts


def _trimmed(parts: Sequence[Piece], whole: str) -> list[Piece]:
    """The pieces as they stand in the text without marks: some templates trim what they are given."""
    found, at = [], 0
    for part, after in zip(parts, [*parts[1:], Piece("", None)], strict=True):
        text = part.text
        if part.author is not None:
            forms = (text, text.strip(), text.lstrip(), text.rstrip())
            text = next((form for form in forms if whole.startswith(form + after.text, at)), text)
        found.append(Piece(text, part.author))
        at += len(text)
    return found


def _uses(contents: Sequence[str], plane: int) -> bool:
    return any(plane <= ord(character) < plane + 0x10000 for content in contents for character in content)


def _parted(marked: str, first: int, count: int) -> list[Piece]:
    """Text with a pair of marks around each message -> its pieces."""
    parts, at = [], 0
    opening = re.compile(f"[{chr(first)}-{chr(first + 2 * count)}]")
    while found := opening.search(marked, at):
        author = (ord(found[0]) - first) // 2
        end = marked.find(chr(first + 2 * author + 1), found.end())
        if end < 0:
            break
        parts += [Piece(marked[at : found.start()], None), Piece(marked[found.end() : end], author)]
        at = end + 1
    return [*parts, Piece(marked[at:], None)]


def _encoded(parts: Sequence[Piece], messages: Sequence[Message], tokenizer: Tokenizer) -> Encoded:
    ids: list[int] = []
    mask: list[bool] = []

    def add(text: str, *, learnt: bool, own: bool) -> None:
        if text:
            new = tokenizer.encode(text, allow_special=own, inside=bool(ids))
            ids.extend(new)
            mask.extend([learnt] * len(new))

    after_answer = False
    for part in parts:
        if part.author is None:
            end = _turn_end(part.text, tokenizer) if after_answer else 0
            add(part.text[:end], learnt=True, own=True)
            add(part.text[end:], learnt=False, own=True)
        else:
            after_answer = messages[part.author].role == "assistant"
            add(part.text, learnt=after_answer, own=False)
    return Encoded(ids, mask)


def _turn_end(text: str, tokenizer: Tokenizer) -> int:
    """How much of the words after an answer belongs to it: up to the special token that they begin with."""
    begun = text.lstrip()
    lengths = (len(token) for token in tokenizer.special_tokens if begun.startswith(token))
    longest = max(lengths, default=0)
    return len(text) - len(begun) + longest if longest else 0


def _ending(text: str, other: str) -> str:
    """The last of a text from where it leaves another."""
    same = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return text[max(0, same - 20) : same + 40]
