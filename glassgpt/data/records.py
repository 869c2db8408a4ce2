"""Examples of instructions and preferences out of files: their shape recognised by their fields, checked, made messages.

What a file means is decided here once; everything after it sees a prompt, an answer or two, and where they stand.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glassgpt.config import UserError, nearest
from glassgpt.data import sources as files
from glassgpt.text.chat import Message

SUFFIXES = (".json", ".jsonl", ".parquet")
PROMPTS = ("prompt", "instruction", "question")
ANSWERS = ("completion", "output", "response", "answer")
INPUTS = ("input", "context")
SYSTEMS = ("system", "system_prompt")
CONVERSATIONS = ("messages", "conversations", "conversation")
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
}
"""What files call the roles, and what we do."""

_ASKED = (*PROMPTS, *INPUTS, *SYSTEMS, "history")
READ = {
    "alpaca": ("instruction", *INPUTS, *SYSTEMS, "history", "output", "instances"),
    "sharegpt": ("conversations", "conversation", *SYSTEMS),
    "messages": ("messages", *SYSTEMS),
    "prompt-completion": (*_ASKED, *ANSWERS),
    "preference": (*_ASKED, "chosen", "rejected"),
    "labelled": (*_ASKED, *ANSWERS, *CONVERSATIONS, "label"),
    "prompt": _ASKED,
}
"""Which fields each shape reads; the others are kept for reward functions."""

KNOWN = tuple(dict.fromkeys(itertools.chain.from_iterable(READ.values())))
SHAPES = (
    "instruction + output (Alpaca), conversations (ShareGPT), messages, prompt + completion, prompt + chosen + rejected,"
    " prompt + completion + label, prompt"
)
ALIKE = 0.8
"""Names at least this alike (difflib's ratio) are taken for a slip of the pen: `instuction`, `imput`, `ouput`, `labels`."""


@dataclass(frozen=True)
class Record:
    """One example, whatever its shape in the file."""

    shape: str
    """alpaca, sharegpt, messages, prompt-completion, preference, labelled or prompt."""
    place: str
    """Where it stands: `file.jsonl, line 3`, `file.json, record 3` or `file.parquet, row 3`."""
    messages: tuple[Message, ...]
    """A conversation as a whole (alpaca, sharegpt, messages, prompt-completion); otherwise the prompt."""
    chosen: tuple[Message, ...] = ()
    """preference: the better answer; labelled: the answer."""
    rejected: tuple[Message, ...] = ()
    """preference: the worse answer."""
    label: bool | None = None
    """labelled: whether the answer is good."""
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """The row as it was: reward functions read `answer`, `test` and the like."""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """What stands before the last answer; all of a conversation that ends with a question."""
        is_answered = not self.chosen and self.messages[-1].role == "assistant"
        return self.messages[:-1] if is_answered else self.messages

    @property
    def is_tie(self) -> bool:
        """Whether it is a pair of two equal answers, from which nothing can be learnt."""
        return bool(self.rejected) and self.chosen == self.rejected


def read(sources: Sequence[str]) -> list[Record]:
    """The examples of every source in order.

    A source is a file (.json, .jsonl, .gz of them, .parquet), a folder of them, or `hf:OWNER/NAME[@CONFIG][:SPLIT]`. Whatever it
    is called, a file that begins with `[` is one JSON list, and any other has an object a line. All examples of a file have one
    shape. Files and folders are looked up before anything is read.

    Raises UserError naming the file, the line (record, row) and the field of whatever is not as it should be.
    """
    found = [file for source in sources for file in _files(source)]  # a list: a wrong name is told at once
    return [record for name, rows in found for record in _of_file(name, rows)]


def recognised(records: Sequence[Record]) -> list[str]:
    """A line for each file: how many examples of which shape, by which fields, and which fields are not read."""
    lines = []
    for name, some in itertools.groupby(records, key=lambda record: _file_name(record.place)):
        group = list(some)
        shape = group[0].shape
        names = dict.fromkeys(key for record in group for key, value in record.fields.items() if value is not None)
        used, others = ([key for key in names if (key in READ[shape]) == wanted] for wanted in (True, False))
        ties = sum(record.is_tie for record in group)
        notes = [
            f"{len(group):,} example{'s' * (len(group) > 1)} recognised as {shape} by {', '.join(used)}",
            *([f"not read: {', '.join(others)}"] if others else []),
            *([f"{ties:,} with two equal answers"] if ties else []),
        ]
        lines.append(f"{name}: {'; '.join(notes)}")
    return lines


def _file_name(place: str) -> str:
    return re.sub(r", (?:line|record|row) \d+(?:, instance \d+)?\Z", "", place)


# ---------------------------------------------------------------------- rows out of files


def _files(source: str) -> list[tuple[str, Iterator[tuple[str, Any]]]]:
    """Each file of a source with its rows and their places; nothing of it is read yet."""
    if source.startswith(files.HUB):
        dataset = files.dataset_of(source)
        return [(source, _placed(f"{source}, row", files.dataset_rows(source, dataset)))]
    paths = files.files_of(source, SUFFIXES, f"a JSON, JSONL or Parquet file, a folder of them, or {files.HUB}OWNER/NAME")
    for path in paths:
        if files.suffix_of(path) not in SUFFIXES:
            raise UserError(f"{path}: examples are read from .json and .jsonl files (also .gz) and from .parquet")
    return [(str(path), _rows(path)) for path in paths]


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    if files.suffix_of(path) == ".parquet":
        yield from _placed(f"{path}, row", files.parquet_rows(path))
        return
    text = "".join(files.read_text(path))
    if not text.lstrip().startswith("["):
        for number, value, _ in files.json_lines(path, [text]):
            yield f"{path}, line {number}", value
        return
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        place = f", line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path}{place}: not JSON: {getattr(error, 'msg', error)}") from error
    yield from _placed(f"{path}, record", rows)


def _placed(what: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(rows, 1):
        yield f"{what} {number}", row


def _of_file(name: str, rows: Iterable[tuple[str, Any]]) -> list[Record]:
    records: list[Record] = []
    for place, fields in rows:
        if not isinstance(fields, dict):
            raise UserError(f"{place}: expected an object with named fields; got {_shown(fields)}")
        row = _Row(place, fields)
        new = _examples(row)
        if records and new[0].shape != records[0].shape:
            raise UserError(
                f"{place}: recognised as {new[0].shape} by its fields {row.names}, but {records[0].place} as {records[0].shape};"
                " all examples of a file must have one shape"
            )
        records += new
    if not records:
        raise UserError(f"{name}: empty: no examples in it")
    return records


# ---------------------------------------------------------------------- rows to examples


@dataclass(frozen=True)
class _Row:
    place: str
    fields: dict[str, Any]

    def error(self, message: str) -> UserError:
        return UserError(f"{self.place}: {message}")

    @property
    def names(self) -> str:
        return _listed(self.fields)

    def has(self, name: str) -> bool:
        """Null is as good as missing: tables have it where other rows have a field."""
        return self.fields.get(name) is not None

    def one_of(self, names: Sequence[str]) -> str | None:
        """The one of several names that the row has. Raises UserError when it has two: which one is meant cannot be told."""
        found = [name for name in names if self.has(name) and self.fields[name] != ""]
        if len(found) > 1:
            raise self.error(f"has both `{found[0]}` and `{found[1]}`, which mean the same; rename or drop one of them")
        return found[0] if found else next((name for name in names if self.has(name)), None)


def _examples(row: _Row) -> list[Record]:
    """What a row holds: one example, but for several instances of one instruction."""
    shape, prompt, answer = _recognise(row)
    _check_spelling(row, shape)
    if answer == "instances":
        return _instances(row)
    label = _label(row) if shape == "labelled" else None
    rejected: tuple[Message, ...] = ()
    if shape == "preference":
        messages, chosen, rejected = _pair(row, prompt)
    elif prompt in CONVERSATIONS:
        messages, chosen = _conversation(row, prompt), ()
        if shape == "labelled":
            if messages[-1].role != "assistant":
                raise row.error(f"`{prompt}` ends with a turn of the {messages[-1].role}'s, so `label` is about no answer")
            messages, chosen = messages[:-1], messages[-1:]
    else:
        assert prompt is not None
        messages, chosen = _prompt(row, prompt), ()
        if answer:
            chosen = _answer(row, answer, in_dialogue=_is_dialogue(row.fields[prompt]))
        elif messages[-1].role == "assistant":
            raise row.error(f"`{prompt}` ends with an answer; if it is a whole conversation, call the field `messages`")
        if shape != "labelled":
            messages, chosen = (*messages, *chosen), ()
    return [Record(shape, row.place, messages, chosen, rejected, label, row.fields)]


def _recognise(row: _Row) -> tuple[str, str | None, str | None]:
    """(shape, field of the prompt or the conversation, field of the answer)"""
    pair = [name for name in ("chosen", "rejected") if row.has(name)]
    if len(pair) == 2:
        return "preference", row.one_of(PROMPTS), None
    if pair:
        other = "rejected" if pair == ["chosen"] else "chosen"
        raise row.error(f"`{pair[0]}` {_lacks(row, [other])}")
    if conversation := row.one_of(CONVERSATIONS):
        shape = "messages" if conversation == "messages" else "sharegpt"
        return ("labelled" if row.has("label") else shape), conversation, None
    prompt = row.one_of(PROMPTS)
    if prompt == "instruction" and row.has("instances"):
        return "alpaca", prompt, "instances"
    answer = row.one_of(ANSWERS)
    if prompt and answer:
        shape = "alpaca" if (prompt, answer) == ("instruction", "output") else "prompt-completion"
        return ("labelled" if row.has("label") else shape), prompt, answer
    if prompt == "prompt" and not any(name in row.fields for name in ANSWERS):
        return "prompt", prompt, None
    if prompt:
        raise row.error(f"`{prompt}` {_lacks(row, ANSWERS)}")
    if answer:
        raise row.error(f"`{answer}` {_lacks(row, PROMPTS)}")
    raise row.error(f"no known shape: its fields: {row.names}{_slip(row)}. Known are {SHAPES}")


def _lacks(row: _Row, wanted: Sequence[str]) -> str:
    """What is missing, and what may have been meant by it."""
    *most, last = (f"`{name}`" for name in wanted)
    null = next((f"; its `{name}` is null" for name in wanted if name in row.fields), "")
    names = f"{', '.join(most)} or {last}" if most else last
    return f"has no {names} beside it{null}; its fields: {row.names}{_slip(row)}. Known are {SHAPES}"


def _slip(row: _Row) -> str:
    slips = ((name, _resembled(name)) for name in row.fields)
    slip = next(((name, known) for name, known in slips if known and not row.has(known)), None)
    return f" (is `{_listed([slip[0]])}` meant to be `{slip[1]}`?)" if slip else ""


@functools.lru_cache(maxsize=4096)
def _resembled(name: str) -> str | None:
    """The known name that an unknown one is nearly."""
    close = [] if name in KNOWN or len(name) > 40 else difflib.get_close_matches(name, KNOWN, n=1, cutoff=ALIKE)
    return close[0] if close else None


def _check_spelling(row: _Row, shape: str) -> None:
    """A misspelt field that need not be there would be passed over: `imput` of an instruction, `completoin` of a prompt."""
    kinds: dict[str, type | tuple[type, ...]] = {"input": str, "system": str, "history": list}
    wanted = {name: kind for name, kind in kinds.items() if name in READ[shape]}
    if shape == "prompt":
        wanted |= dict.fromkeys((*ANSWERS, "chosen", "rejected"), (str, list))
    elif shape != "preference":
        wanted["label"] = int
    for name, value in row.fields.items():
        known = _resembled(name)
        if known in wanted and not row.has(known) and isinstance(value, wanted[known]) and value not in ("", []):
            raise row.error(
                f"unknown field `{_listed([name])}`; is it meant to be `{known}`? Rename it, to that or to something less alike"
            )


def _instances(row: _Row) -> list[Record]:
    """Self-Instruct: one instruction with several inputs and outputs."""
    instances = row.fields["instances"]
    if not (isinstance(instances, list) and instances and all(isinstance(instance, dict) for instance in instances)):
        raise row.error(f"`instances` must be a list of objects with `input` and `output`; got {_shown(instances)}")
    records = []
    for number, instance in enumerate(instances, 1):
        place = f"{row.place}, instance {number}" if len(instances) > 1 else row.place
        inside = _Row(place, {**row.fields, "input": instance.get("input"), "output": instance.get("output")})
        if not inside.has("output"):
            raise inside.error("an instance of `instances` has no `output`")
        messages = (*_prompt(inside, "instruction"), *_answer(inside, "output"))
        records.append(Record("alpaca", place, messages, fields=row.fields))
    return records


# ---------------------------------------------------------------------- prompts, answers, pairs


def _prompt(row: _Row, name: str) -> tuple[Message, ...]:
    messages = _with_system(row, name, _asked(row, name))
    if not any(message.role == "user" for message in messages):
        raise row.error(f"`{name}` has no turn of the user's, so nothing is asked")
    return messages


def _asked(row: _Row, name: str) -> tuple[Message, ...]:
    """Earlier turns and what is asked: text with Alpaca's input after a blank line, a dialogue, or messages."""
    value = row.fields[name]
    extra = row.one_of(INPUTS)
    more = _string(row, f"`{extra}`", row.fields[extra], may_be_empty=True) if extra else ""
    if isinstance(value, str) and not _is_dialogue(value):
        text = _string(row, f"`{name}`", value)
        turns = [Message("user", f"{text}\n\n{more}" if more.strip() else text)]
    elif more.strip():
        raise row.error(f"`{extra}` belongs to a `{name}` of plain text, not to one of several turns; drop it or join them")
    elif isinstance(value, str):
        turns = _dialogue(row, name, value, is_prompt=True)
    elif isinstance(value, list):
        turns = _turns(row, name)
    else:
        raise row.error(f"`{name}` must be text or a list of messages; got {_shown(value)}")
    return (*_history(row), *turns)


def _with_system(row: _Row, name: str, messages: Sequence[Message]) -> tuple[Message, ...]:
    """Messages after what the row's own field has for the system."""
    field = row.one_of(SYSTEMS)
    text = _string(row, f"`{field}`", row.fields[field], may_be_empty=True) if field else ""
    if not text.strip():
        return tuple(messages)
    if any(message.role == "system" for message in messages):
        raise row.error(f"has a system message in `{field}` and another in `{name}`; keep one")
    return (Message("system", text), *messages)


def _history(row: _Row) -> list[Message]:
    """Alpaca's earlier turns: [[what the user said, what the assistant said], ...]."""
    history = row.fields.get("history")
    if history is None:
        return []
    if not (isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)):
        raise row.error(f"`history` must be a list of pairs [user, assistant]; got {_shown(history)}")
    return [
        Message(role, _string(row, f"`history`, pair {number}, of the {role}", text))
        for number, pair in enumerate(history, 1)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _answer(row: _Row, name: str, *, in_dialogue: bool = False) -> tuple[Message, ...]:
    """Text or messages of the assistant's; after a dialogue, text may go on with further turns."""
    value = row.fields[name]
    if isinstance(value, list):
        messages = _turns(row, name)
    elif isinstance(value, str):
        text = _string(row, f"`{name}`", value)
        if not in_dialogue:
            return (Message("assistant", text),)
        messages = _dialogue(row, name, text if _is_dialogue(text) else f"\n\nAssistant:{text}")
    elif name == "answer" and _is_number(value) and "choices" not in row.fields:  # of a sum, not one of several choices
        return (Message("assistant", str(value)),)
    else:
        raise row.error(f"`{name}` must be text or a list of messages; got {_shown(value)}")
    for which, message in (("begin", messages[0]), ("end", messages[-1])):
        if message.role != "assistant":
            raise row.error(f"`{name}` must {which} with a turn of the assistant's; it does with one of the {message.role}'s")
    return tuple(messages)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _label(row: _Row) -> bool:
    value = row.fields["label"]
    if not (isinstance(value, int) and value in (0, 1)):
        raise row.error(f"`label` must be true or false (or 1 or 0), whether the answer is good; got {_shown(value)}")
    return bool(value)


def _conversation(row: _Row, name: str) -> tuple[Message, ...]:
    """A conversation has an answer to something. Beyond that turns need not alternate: people write twice, tools come between.

    It may end with a question; what answers it is not there, and the turns before are learnt.
    """
    messages = _with_system(row, name, _turns(row, name))
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise row.error(f"`{name}` has no turn of the assistant's; a question without an answer goes into a field `prompt`")
    if "user" not in roles[: len(roles) - roles[::-1].index("assistant")]:
        raise row.error(f"`{name}` has no turn of the user's before the assistant's answer, so nothing is asked")
    return messages


def _pair(row: _Row, prompt: str | None) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """(prompt, better, worse): answers beside their prompt, or two whole conversations that begin alike."""
    chosen, rejected = _whole(row, "chosen"), _whole(row, "rejected")
    if (chosen is None) != (rejected is None):
        whole, other = ("chosen", "rejected") if rejected is None else ("rejected", "chosen")
        raise row.error(f"`{whole}` is a whole conversation, but `{other}` an answer alone; both must be the same")
    if chosen is None or rejected is None:
        if prompt is None:
            raise row.error(
                "has no `prompt`, so `chosen` and `rejected` must be whole conversations: lists of messages, or text that begins"
                f" with 'Human:'{_slip(row)}"
            )
        in_dialogue = _is_dialogue(row.fields[prompt])
        better, worse = (_answer(row, name, in_dialogue=in_dialogue) for name in ("chosen", "rejected"))
        return _prompt(row, prompt), better, worse
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1].role != "assistant":
            raise row.error(f"`{name}` must end with a turn of the assistant's; it does with one of the {messages[-1].role}'s")
    same = _common(chosen, rejected)
    asked = chosen[:same]
    if not any(message.role == "user" for message in asked):
        raise row.error("`chosen` and `rejected` have no common beginning, in which the user asks something")
    if prompt is not None:  # it may be the whole of what is asked, or the last question without the system message
        given = _asked(row, prompt)
        if given not in (asked[: len(given)], asked[len(asked) - len(given) :]):
            raise row.error(f"`chosen` and `rejected` do not begin with `{prompt}`: {given[-1].content[:40]!r}")
    return _with_system(row, "chosen", asked), chosen[same:], rejected[same:]


def _whole(row: _Row, name: str) -> tuple[Message, ...] | None:
    """A conversation from its beginning on; None for an answer alone."""
    value = row.fields[name]
    if isinstance(value, list):
        messages = _turns(row, name)
    elif isinstance(value, str) and _is_dialogue(value):
        messages = _dialogue(row, name, value)
    else:
        return None
    return None if messages[0].role == "assistant" else tuple(messages)


def _common(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """How many turns both begin with; both then go on with an answer."""
    turns = zip(chosen[:-1], rejected[:-1], strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], turns))
    while same and not chosen[same].role == rejected[same].role == "assistant":
        same -= 1
    return same


# ---------------------------------------------------------------------- messages and text


def _turns(row: _Row, name: str) -> list[Message]:
    """[{"role", "content"}, ...] or [{"from", "value"}, ...]; a system message without words is left out."""
    turns = row.fields[name]
    if not isinstance(turns, list):
        raise row.error(f"`{name}` must be a list of messages; got {_shown(turns)}")
    if not turns:
        raise row.error(f"`{name}` is empty; expected messages")
    messages = []
    for number, turn in enumerate(turns, 1):
        where = f"`{name}`, turn {number}"
        if not isinstance(turn, dict):
            raise row.error(f"{where} must be an object with `role` and `content` (or `from` and `value`); got {_shown(turn)}")
        keys = ("role", "content") if turn.get("from") is None else ("from", "value")
        for key in keys:
            if key not in turn:
                close = next((nearest(other, [key]) for other in turn if nearest(other, [key])), "")
                raise row.error(f"{where} has no `{key}`; its fields: {_listed(turn)}{close}")
        role, content = (turn[key] for key in keys)
        if not (isinstance(role, str) and role in ROLES):
            close = nearest(role, ROLES) if isinstance(role, str) else ""
            raise row.error(f"{where}: unknown `{keys[0]}` {_shown(role)}; known are {', '.join(ROLES)}{close}")
        text = _string(row, f"{where}: `{keys[1]}`", content, may_be_empty=role == "system")
        if text.strip():
            messages.append(Message(ROLES[role], text))
    if not messages:
        raise row.error(f"`{name}` has no turn but an empty system message")
    return messages


def _is_dialogue(value: object) -> bool:
    """Whether text is a conversation as Anthropic writes it: '\\n\\nHuman: ...\\n\\nAssistant: ...'."""
    begins = r"\s*\n\n(?:Human|Assistant):|\s*Human:.*\n\nAssistant:"
    return isinstance(value, str) and re.match(begins, value, re.DOTALL) is not None


def _dialogue(row: _Row, name: str, text: str, *, is_prompt: bool = False) -> list[Message]:
    """The turns of a dialogue without the white space around them; a prompt may end where the assistant is to speak."""
    _, *parts = re.split(r"(?:\A\s*|\n\n)(Human|Assistant):", _string(row, f"`{name}`", text))
    turns = [(role, content.strip()) for role, content in zip(parts[::2], parts[1::2], strict=True)]
    if is_prompt and turns[-1] == ("Assistant", ""):
        turns.pop()
    roles = {"Human": "user", "Assistant": "assistant"}
    for number, (role, content) in enumerate(turns, 1):
        if not content:
            raise row.error(f"`{name}`, turn {number}: nothing after '{role}:'")
    return [Message(roles[role], content) for role, content in turns]


def _string(row: _Row, what: str, value: object, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise row.error(f"{what} must be text; got {_shown(value)}")
    if not (may_be_empty or value.strip()):
        raise row.error(f"{what} is empty")
    files.check_unicode(value, f"{row.place}: {what}")
    return value


def _shown(value: object) -> str:
    """A value in a few words, however large it is."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            return repr(value[:60]) + "..." * (len(value) > 60)
        case int() | float():
            return f"the number {str(value)[:40]}"
        case list():
            return f"a list of {len(value)}"
        case dict():
            return f"an object with {_listed(value)}"
        case _:
            return type(value).__name__


def _listed(names: Iterable[str]) -> str:
    """Names of fields, of which there may be many and anything in them."""
    shown = [name[:40] if name[:40].isprintable() else ascii(name[:40]) for name in itertools.islice(names, 13)]
    return ", ".join([*shown[:12], "..."] if len(shown) > 12 else shown) or "no fields"
