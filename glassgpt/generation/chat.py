"""`glassgpt chat`: conversations, in a terminal or with messages given beforehand."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import importlib
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from glassgpt.config import UserError, nearest
from glassgpt.config.chat import Chat
from glassgpt.config.files import fsync
from glassgpt.config.generate import Sampling
from glassgpt.generation import engine
from glassgpt.generation.acceptance import Acceptance
from glassgpt.generation.generator import Generator
from glassgpt.generation.opening import open_guesses, open_model
from glassgpt.generation.runner import Model
from glassgpt.generation.writer import Row
from glassgpt.text import Tokenizer
from glassgpt.text.chat import Message, end_ids, prompt

if TYPE_CHECKING:
    from glassgpt.generation.speculative import Guesses

NO_TEMPLATE = (
    "this model brings no chat template and was not taught to answer; it is prompted with plain words"
    " (### User: / ### Assistant:) and will often just go on writing"
)
STOPS = tuple(f"{gap}### {role}:" for gap in ("\n\n", "\n", "") for role in ("User", "Assistant", "System"))
"""Where a model that was not taught to end its answer begins to play the others."""
SHAPE = '{"messages": [{"role": ..., "content": ...}, ...]}'
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | dict.fromkeys(range(127, 160), "�")
"""Characters that would command a terminal, as pictures of themselves."""
BOLD, DIM = "1", "2"
HELP = {
    "/reset": "forget what was said; the system message stays",
    "/retry": "answer the last message again, with another seed",
    "/system": "[TEXT]  set the system message, or take it out",
    "/save": "FILE  write the conversation, for --load and for `glassgpt sft`",
    "/help": "this list; a line that begins with a space is always a message",
    "/quit": "end (so does Ctrl-D)",
}

Show = Callable[[str], None]


# ---------------------------------------------------------------------- conversations


class Turn(NamedTuple):
    """A message that is about to be answered."""

    earlier: list[Message]
    """What was said before it."""
    message: Message
    attempt: int
    """How often it was answered before."""
    forgotten: int
    """Earlier messages with their answers that are left out, so that the rest fits."""
    ids: list[int]
    """What the model reads."""


class Reply(NamedTuple):
    """An answer."""

    text: str
    finish_reason: str
    """`end` (the model ended it), `stop` (it began to play the user), `length` (max_new_tokens), `context` or `stopped`."""
    prompt_tokens: int
    ids: list[int]
    """The tokens written, with the one that ends."""


def fit(
    system: Sequence[Message],
    turns: Sequence[Message],
    tokenizer: Tokenizer,
    context_tokens: int,
    max_new_tokens: int,
    forgotten: int = 0,
) -> tuple[int, list[int]]:
    """How many of the oldest messages are left out with their answers, `forgotten` or more, and the ids of the prompt.

    `turns` ends with the message to answer. Earlier ones stay while there is room for `max_new_tokens` or half the context; the
    last one may leave room for an eighth. Raises UserError when it does not.
    """
    wanted, least = (min(max_new_tokens, max(1, context_tokens // part)) for part in (2, 8))

    def served(left_out: int) -> list[int]:
        return prompt([*system, *turns[2 * left_out :]], tokenizer)

    def fits(left_out: int) -> bool:  # the last token that is written is never read
        return len(served(left_out)) + wanted <= context_tokens + 1

    forgotten = bisect.bisect_left(range(len(turns) // 2), True, lo=forgotten, key=fits)
    ids = served(forgotten)
    if len(ids) + least > context_tokens + 1:
        raise UserError(
            f"the message{' and the system message' if system else ''} would be a prompt of {len(ids)} tokens; in a context of"
            f" {context_tokens} one of {context_tokens + 1 - least} leaves room to answer: send it again, shorter"
        )
    return forgotten, ids


class Conversation:
    """What was said to a model and what it answered."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        seed: int,
        messages: Sequence[Message] = (),
        guesses: Guesses | None = None,
    ) -> None:
        """`messages` go before: a system message, if any, then messages and answers in turn. `guesses` make it faster.

        Raises UserError when the template refuses them.
        """
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.turns = [message for message in messages if message.role != "system"]
        """Messages and answers in turn, the forgotten ones too."""
        self.forgotten = 0
        self.acceptance = Acceptance()
        """How good the guesses were."""
        self._guesses = guesses
        self._attempt = 0
        self._ends = frozenset(end_ids(tokenizer))
        self._stops = STOPS if tokenizer.template is None else ()
        self._system: list[Message] = []
        self.system = next((message.content for message in messages if message.role == "system"), "")

    @property
    def system(self) -> str:
        """The system message; empty for none. Setting one that the template refuses raises UserError and changes nothing."""
        return self._system[0].content if self._system else ""

    @system.setter
    def system(self, text: str) -> None:
        system = [Message("system", text)] if text else []
        prompt([*system, *self.turns, Message("user", "a")], self.tokenizer)
        self._system = system

    @property
    def messages(self) -> list[Message]:
        """All that was said, the system message first."""
        return [*self._system, *self.turns]

    def reset(self) -> None:
        """Forget what was said."""
        self.turns, self.forgotten, self._attempt = [], 0, 0

    def ask(self, text: str) -> Turn:
        """The next turn. Raises UserError for a message that leaves no room to answer."""
        return self._turn(self.turns, Message("user", text), 0)

    def ask_again(self) -> Turn:
        """The last turn once more, to be answered with another seed. Raises UserError when nothing was said."""
        if not self.turns:
            raise UserError("nothing was said yet")
        *earlier, message, _ = self.turns
        return self._turn(earlier, message, self._attempt + 1)

    def _turn(self, earlier: list[Message], message: Message, attempt: int) -> Turn:
        context = self.model.config.context_tokens
        turns = [*earlier, message]
        forgotten, ids = fit(self._system, turns, self.tokenizer, context, self.max_new_tokens, self.forgotten)
        return Turn(earlier, message, attempt, forgotten, ids)

    def answer(self, turn: Turn, show: Show = lambda piece: None) -> Reply:
        """Answer, and keep what was said. `show(piece)` gets text as it is written; Ctrl-C ends the answer there."""
        number = len(turn.earlier) // 2
        generator = Generator(self.seed * 1_000_003 + number * 1_009 + turn.attempt)
        row = Row(self._stops, show)

        def ends(token: engine.Token) -> bool:
            return row.add(token, self.tokenizer.token_bytes(token.id), token.id in self._ends)

        limit, n_ids = self.max_new_tokens, self.tokenizer.vocab_size
        stream = engine.stream if self._guesses is None else self._guesses.stream(self.acceptance)
        try:
            for _ in stream(self.model, [turn.ids], self.sampling, [generator], limit, ends, n_ids=n_ids):
                pass
            row.close("length" if len(row.tokens) == limit else "context")
        except KeyboardInterrupt:
            row.close("stopped")
        self.turns = [*turn.earlier, turn.message, Message("assistant", row.text)]
        self.forgotten, self._attempt = turn.forgotten, turn.attempt
        return Reply(row.text, row.finish_reason, len(turn.ids), [token.id for token in row.tokens])


# ---------------------------------------------------------------------- files


def as_json(messages: Sequence[Message]) -> dict[str, object]:
    """A conversation as /save writes it."""
    return {"messages": [message._asdict() for message in messages]}


def save(path: Path, messages: Sequence[Message]) -> None:
    """Write a conversation, whole or not at all: one line, so that several files joined are JSONL.

    A message that got no answer is left out with it: nothing can be learnt from it.
    """
    unanswered = {place for place, message in enumerate(messages) if message.role == "assistant" and not message.content}
    messages = [message for place, message in enumerate(messages) if not {place, place + 1} & unanswered]
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_text(json.dumps(as_json(messages), ensure_ascii=False) + "\n", encoding="utf-8")
        fsync(aside)
        aside.replace(path)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        with contextlib.suppress(OSError, ValueError):
            aside.unlink(missing_ok=True)


def read(path: Path) -> tuple[list[Message], bool]:
    """A conversation out of a file, and whether that is all the file holds. Raises UserError for anything else in it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the conversation {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a conversation in UTF-8 JSON ({error}); expected {SHAPE}") from error
    found = data.get("messages") if isinstance(data, dict) else None
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise UserError(f"{path}: expected {SHAPE}")
    messages = [Message(entry.get("role"), entry.get("content")) for entry in found]
    begun = bool(messages) and messages[0].role == "system"
    for place, message in enumerate(messages):
        expected = "system" if begun and place == 0 else ("user", "assistant")[(place - begun) % 2]
        if message.role != expected:
            raise UserError(f"{path}: message {place + 1} must be of role {expected!r}; got {message.role!r}")
        if not isinstance(message.content, str):
            raise UserError(f"{path}: message {place + 1}: content must be text; got {message.content!r}")
    if messages and messages[-1].role == "user":
        raise UserError(f"{path}: the last message has no answer; take it out, and say it here")
    return messages, data == as_json(messages)


# ---------------------------------------------------------------------- the command


def chat(config: Chat) -> Conversation:
    """Hold a conversation: with the messages given, with the lines of standard input, or with a person at a terminal."""
    for name, text in (("--system", config.system or ""), *(("--message", text) for text in config.message)):
        if any("\udc80" <= character <= "\udcff" for character in text):  # how Python passes on bytes of the shell
            raise UserError(f"{name} is not UTF-8: {text.encode('utf-8', 'surrogateescape')!r}")
    at_terminal = not config.message and sys.stdin is not None and sys.stdin.isatty()
    if at_terminal and config.json:
        raise UserError("--json needs --message TEXT, or messages on standard input, one a line")
    path = None if config.load is None else Path(os.path.expanduser(config.load))
    messages, is_ours = ([], False) if path is None else read(path)
    if config.system is not None:
        messages = [Message("system", config.system), *(message for message in messages if message.role != "system")]
    compute = config.compute.with_dtype(config.dtype)
    opened = open_model(config.model, config.device, compute)
    conversation = Conversation(
        opened.model,
        opened.tokenizer,
        config.sampling,
        max_new_tokens=config.max_new_tokens,
        seed=secrets.randbelow(2**31) if config.seed is None else config.seed,
        messages=messages,
        guesses=open_guesses(config.speculation, opened.tokenizer, config.device, compute),
    )
    if at_terminal:
        Terminal(conversation, {path.resolve()} if path and is_ours else set()).run(config.model, opened.parameters)
    else:
        _answer_all(config, conversation, config.message or _lines(), opened.used)
    return conversation


def _answer_all(config: Chat, conversation: Conversation, messages: Iterable[str], used: dict[str, object]) -> None:
    """Print the answers, or one JSON object with what was `used`. What else there is to say goes to stderr."""
    replies: list[Reply] = []
    for text in messages:
        turn = conversation.ask(text)
        if not config.json:
            if not replies and conversation.tokenizer.template is None:
                print(f"note: {NO_TEMPLATE}", file=sys.stderr)
            if turn.forgotten and not conversation.forgotten:
                print(f"note: {_full(conversation, turn)}", file=sys.stderr)
        reply = conversation.answer(turn, (lambda piece: None) if config.json else _print_piece)
        if reply.finish_reason == "stopped":
            raise KeyboardInterrupt
        replies.append(reply)
        if not config.json:
            print(flush=True)
    if not replies:
        raise UserError("no message on standard input; give one a line, or use --message TEXT")
    if config.json:
        answer = {
            "model": config.model,
            "seed": conversation.seed,
            "sampling": dataclasses.asdict(config.sampling),
            "options": {"max_new_tokens": config.max_new_tokens},
            **used,
            "template": conversation.tokenizer.template is not None,
            **as_json(conversation.messages),
            "answers": [reply._asdict() for reply in replies],
            "forgotten": conversation.forgotten,
        }
        if config.speculation.is_on:
            answer["speculation"] = dataclasses.asdict(config.speculation) | conversation.acceptance.as_json()
        print(json.dumps(answer, ensure_ascii=False))


def _lines() -> Iterator[str]:
    """The lines of standard input that are not blank."""
    for number, data in enumerate(sys.stdin.buffer if sys.stdin else (), 1):
        try:
            line = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: line {number} is not UTF-8 at byte {error.start}") from error
        if line.strip():
            yield line.rstrip("\r\n")


def _full(conversation: Conversation, turn: Turn) -> str:
    oldest = "the oldest turn is" if turn.forgotten == 1 else f"the {turn.forgotten} oldest turns are"
    context = conversation.model.config.context_tokens
    return f"the context of {context} tokens is full: {oldest} forgotten, and the next oldest will be when room is needed"


# ---------------------------------------------------------------------- a terminal


class Terminal:
    """A conversation with a person: lines in, streamed answers out."""

    def __init__(self, conversation: Conversation, own_files: set[Path]) -> None:
        self._talk = conversation
        self._own_files = own_files
        """Files that hold this conversation, and so may be written again."""
        try:
            importlib.import_module("readline")  # gives input() editing and history
            self._edits = True
        except ImportError:
            self._edits = False

    def run(self, name: str, parameters: int) -> None:
        """Talk until the person ends it."""
        model, has_own = self._talk.model, self._talk.tokenizer.template is not None
        template = "its own chat template" if has_own else "no chat template"
        facts = f"{parameters:,} parameters, context of {model.config.context_tokens} tokens, {template}"
        print(f"{_painted(name, BOLD)}: {facts}")
        if not has_own:
            print(NO_TEMPLATE)
        if self._talk.turns:
            self._note(f"after {_turns(self._talk)}")
        self._note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends")
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            while self._take_line():
                pass
            return
        print()

    def _take_line(self) -> bool:
        """One line of the person's; returns whether the conversation goes on."""
        try:
            line = input(_painted("You: ", BOLD, hidden=self._edits))
            line.encode()  # bytes that are no UTF-8 come as an error or as surrogates, as the locale has it
        except UnicodeError:
            self._note("that was not UTF-8 and is not sent")
            return True
        name, _, rest = line.partition(" ")
        try:
            if name == "/quit":
                return False
            if name in HELP:
                getattr(self, f"_{name[1:]}")(rest.strip())
            elif line.startswith("/"):
                raise UserError(f"unknown command {name}{nearest(name, HELP)}; /help lists them")
            elif line.strip():
                self._answer(self._talk.ask(line))
        except UserError as error:
            self._note(str(error))
        return True

    def _answer(self, turn: Turn) -> None:
        if turn.forgotten and not self._talk.forgotten:
            self._note(_full(self._talk, turn))
        print(_painted("Assistant: ", BOLD), end="", flush=True)
        reply = self._talk.answer(turn, _print_piece)
        print()
        if reply.finish_reason == "stopped":
            self._note("stopped")
        if reply.finish_reason in ("length", "context"):
            limit = "--max-new-tokens" if reply.finish_reason == "length" else "the context"
            self._note(f"cut off after {len(reply.ids)} tokens by {limit}")

    def _reset(self, _: str) -> None:
        self._talk.reset()
        self._note("forgotten")

    def _retry(self, _: str) -> None:
        self._answer(self._talk.ask_again())

    def _system(self, text: str) -> None:
        self._talk.system = text
        self._note("the system message is set" if text else "there is no system message")

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save needs the name of a file")
        if not self._talk.turns:
            raise UserError("nothing was said yet")
        path = Path(os.path.expanduser(name))
        if os.path.lexists(path) and path.resolve() not in self._own_files:
            raise UserError(f"{path} exists and is not overwritten; give another name")
        save(path, self._talk.messages)
        self._own_files.add(path.resolve())
        self._note(f"{_turns(self._talk)} saved in {path}")

    def _help(self, _: str) -> None:
        for name, says in HELP.items():
            print(f"  {name:8} {says}")

    def _note(self, text: str) -> None:
        print(_painted(f"({text})", DIM))


def _turns(conversation: Conversation) -> str:
    count = len(conversation.turns) // 2
    return "1 turn" if count == 1 else f"{count} turns"


def _painted(text: str, style: str, *, hidden: bool = False) -> str:
    """Text in a style, where colours are shown; `hidden` tells the line editor that the marks take no room."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    marks = (f"\x1b[{style}m", "\x1b[0m")
    begin, end = (f"\x01{mark}\x02" for mark in marks) if hidden else marks
    return f"{begin}{text}{end}"


def _print_piece(piece: str) -> None:
    sys.stdout.write(piece.translate(CONTROLS) if sys.stdout.isatty() else piece)
    sys.stdout.flush()
