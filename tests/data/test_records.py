"""Examples out of files: every shape by its fields, in every container the same; every mistake named with its place."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loopback import ALONE

from glassgpt.config import UserError
from glassgpt.data import records
from glassgpt.data.records import ROLES, Record, recognised
from glassgpt.text.chat import Message

FIXTURE = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ROLE_OF = {"S": "system", "U": "user", "A": "assistant", "T": "tool"}


def turns(*texts: str) -> tuple[Message, ...]:
    """'U hello' -> Message('user', 'hello')"""
    return tuple(Message(ROLE_OF[text[0]], text[2:]) for text in texts)


def read(*paths: object) -> list[Record]:
    return records.read([str(path) for path in paths])


def write_lines(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def role_content(*texts: str) -> list[dict[str, str]]:
    return [message._asdict() for message in turns(*texts)]


def from_value(*texts: str) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[message.role], "value": message.content} for message in turns(*texts)]


# ---------------------------------------------------------------------- every shape

Expected = tuple[str, tuple[Message, ...], tuple[Message, ...], tuple[Message, ...], bool | None]


def said(shape: str, *texts: str) -> Expected:
    return shape, turns(*texts), (), (), None


def preferred(asked: Sequence[str], chosen: Sequence[str], rejected: Sequence[str]) -> Expected:
    return "preference", turns(*asked), turns(*chosen), turns(*rejected), None


def judged(asked: Sequence[str], answer: str, label: bool) -> Expected:
    return "labelled", turns(*asked), turns(answer), (), label


HUMAN = "\n\nHuman: q\n\nAssistant:"
SHAPES: dict[str, tuple[dict[str, Any], Expected]] = {
    # Alpaca
    "alpaca": ({"instruction": "i", "input": "x", "output": "o"}, said("alpaca", "U i\n\nx", "A o")),
    "no input": ({"instruction": "i", "output": "o"}, said("alpaca", "U i", "A o")),
    "empty input": ({"instruction": "i", "input": "", "output": "o"}, said("alpaca", "U i", "A o")),
    "blank input": ({"instruction": "i", "input": " \n", "output": "o"}, said("alpaca", "U i", "A o")),
    "null input": ({"instruction": "i", "input": None, "output": "o"}, said("alpaca", "U i", "A o")),
    "as it stands": ({"instruction": " i\n", "input": "\tx ", "output": " o\n"}, said("alpaca", "U  i\n\n\n\tx ", "A  o\n")),
    "alpaca in full": (
        {"system": "s", "history": [["a", "b"], ["c", "d"]], "instruction": "i", "input": "x", "output": "o", "id": 7},
        said("alpaca", "S s", "U a", "A b", "U c", "A d", "U i\n\nx", "A o"),
    ),
    "empty system and history": (
        {"system": "", "history": [], "instruction": "i", "input": "", "output": "o"},
        said("alpaca", "U i", "A o"),
    ),
    "one instance": (
        {"instruction": "i", "instances": [{"input": "x", "output": "o"}], "is_classification": False},
        said("alpaca", "U i\n\nx", "A o"),
    ),
    # ShareGPT
    "sharegpt": (
        {"conversations": from_value("U q", "A a", "U r", "A b"), "id": "x"},
        said("sharegpt", "U q", "A a", "U r", "A b"),
    ),
    "sharegpt, system": ({"conversations": from_value("S s", "U q", "A a")}, said("sharegpt", "S s", "U q", "A a")),
    "sharegpt, empty system": ({"conversations": from_value("S ", "U q", "A a")}, said("sharegpt", "U q", "A a")),
    "sharegpt, system apart": (
        {"system": "s", "conversations": from_value("U q", "A a")},
        said("sharegpt", "S s", "U q", "A a"),
    ),
    "sharegpt, other names": (
        {"conversation": [{"from": "user", "value": "q"}, {"from": "chatgpt", "value": "a"}]},
        said("sharegpt", "U q", "A a"),
    ),
    "sharegpt, names of chats": ({"conversations": role_content("U q", "A a")}, said("sharegpt", "U q", "A a")),
    "gpt begins": ({"conversations": from_value("A hi", "U q", "A a")}, said("sharegpt", "A hi", "U q", "A a")),
    # messages
    "messages": (
        {"messages": role_content("S s", "U q", "A a", "U r", "A b")},
        said("messages", "S s", "U q", "A a", "U r", "A b"),
    ),
    "beside their prompt": ({"prompt": "q", "messages": role_content("U q", "A a")}, said("messages", "U q", "A a")),
    "two in a row": ({"messages": role_content("U q", "U r", "A a", "A b")}, said("messages", "U q", "U r", "A a", "A b")),
    "a tool": ({"messages": role_content("U q", "A a", "T t", "A b")}, said("messages", "U q", "A a", "T t", "A b")),
    "ends with a question": ({"messages": role_content("U q", "A a", "U r")}, said("messages", "U q", "A a", "U r")),
    # prompt and completion, and what people call them
    "prompt-completion": ({"prompt": "2+2=", "completion": " 4"}, said("prompt-completion", "U 2+2=", "A  4")),
    "of messages": (
        {"prompt": role_content("S s", "U q"), "completion": role_content("A a")},
        said("prompt-completion", "S s", "U q", "A a"),
    ),
    "text and messages": ({"prompt": "q", "completion": role_content("A a", "U r", "A b")},
                          said("prompt-completion", "U q", "A a", "U r", "A b")),
    "gsm8k": ({"question": "q", "answer": "a"}, said("prompt-completion", "U q", "A a")),
    "dolly": (
        {"instruction": "i", "context": "x", "response": "a", "category": "open_qa"},
        said("prompt-completion", "U i\n\nx", "A a"),
    ),
    "openorca": ({"system_prompt": "s", "question": "q", "response": "a"}, said("prompt-completion", "S s", "U q", "A a")),
    "for rewards": ({"prompt": "q", "answer": "a"}, said("prompt-completion", "U q", "A a")),
    "dialogue": ({"prompt": HUMAN, "completion": " a"}, said("prompt-completion", "U q", "A a")),
    "no dialogue": (
        {"prompt": "Say:\n\nHuman: x", "completion": "Human: a"},
        said("prompt-completion", "U Say:\n\nHuman: x", "A Human: a"),
    ),
    # preference
    "pair": ({"prompt": "q", "chosen": "a", "rejected": "b"}, preferred(["U q"], ["A a"], ["A b"])),
    "pair, input": ({"prompt": "q", "input": "x", "chosen": "a", "rejected": "b"}, preferred(["U q\n\nx"], ["A a"], ["A b"])),
    "pair, empty input": ({"prompt": "q", "input": "", "chosen": "a", "rejected": "b"}, preferred(["U q"], ["A a"], ["A b"])),
    "pair, orca": (
        {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
        preferred(["S s", "U q"], ["A a"], ["A b"]),
    ),
    "pair of messages": (
        {"prompt": role_content("U q"), "chosen": role_content("A a"), "rejected": role_content("A b")},
        preferred(["U q"], ["A a"], ["A b"]),
    ),
    "pair of conversations": (
        {"chosen": role_content("S s", "U q", "A a"), "rejected": role_content("S s", "U q", "A b")},
        preferred(["S s", "U q"], ["A a"], ["A b"]),
    ),
    "and their prompt": (
        {"prompt": "q", "system": "s", "chosen": role_content("U q", "A a"), "rejected": role_content("U q", "A b"),
         "messages": role_content("U q", "A a"), "score_chosen": 9.0},
        preferred(["S s", "U q"], ["A a"], ["A b"]),
    ),
    "the last question": (
        {"prompt": "r", "chosen": role_content("U q", "A a", "U r", "A b"), "rejected": role_content("U q", "A a", "U r", "A c")},
        preferred(["U q", "A a", "U r"], ["A b"], ["A c"]),
    ),
    "questions part": (  # both go on with an answer where they part
        {"chosen": role_content("U q", "A a", "U r", "A b"), "rejected": role_content("U q", "A a", "U s", "A b")},
        preferred(["U q"], ["A a", "U r", "A b"], ["A a", "U s", "A b"]),
    ),
    "one goes on": (
        {"chosen": role_content("U q", "A a"), "rejected": role_content("U q", "A a", "U r", "A b")},
        preferred(["U q"], ["A a"], ["A a", "U r", "A b"]),
    ),
    "tie": (
        {"chosen": role_content("U q", "A a"), "rejected": role_content("U q", "A a")},
        preferred(["U q"], ["A a"], ["A a"]),
    ),
    "hh": (
        {"prompt": "\n\nHuman: q\n\nAssistant: Human: a\n\nHuman: r\n\nAssistant:", "chosen": " b ", "rejected": "c\n\nd"},
        preferred(["U q", "A Human: a", "U r"], ["A b"], ["A c\n\nd"]),
    ),
    "hh, whole": (
        {"chosen": f"{HUMAN} a\n\nHuman: r\n\nAssistant: b", "rejected": f"{HUMAN} a\n\nHuman: r\n\nAssistant: c"},
        preferred(["U q", "A a", "U r"], ["A b"], ["A c"]),
    ),
    "hh, without line ends": (
        {"chosen": "Human: q\n\nAssistant: a", "rejected": "Human: q\n\nAssistant: b"},
        preferred(["U q"], ["A a"], ["A b"]),
    ),
    "hh, further turns": (
        {"prompt": HUMAN, "chosen": " a\n\nHuman: r\n\nAssistant: b", "rejected": "\n\nAssistant: c"},
        preferred(["U q"], ["A a", "U r", "A b"], ["A c"]),
    ),
    # labels
    "good": ({"prompt": "q", "completion": "a", "label": True}, judged(["U q"], "A a", True)),
    "bad": ({"prompt": "q", "completion": "a", "label": 0}, judged(["U q"], "A a", False)),
    "bad, alpaca": ({"instruction": "i", "input": "x", "output": "o", "label": False}, judged(["U i\n\nx"], "A o", False)),
    "bad, messages": (
        {"messages": role_content("U q", "A a", "U r", "A b"), "label": False},
        judged(["U q", "A a", "U r"], "A b", False),
    ),
    # prompts
    "prompt": ({"prompt": "q", "test": "t", "entry_point": "f"}, said("prompt", "U q")),
    "prompt of messages": ({"prompt": role_content("U q", "A a", "U r")}, said("prompt", "U q", "A a", "U r")),
    "prompt of a dialogue": ({"prompt": HUMAN, "reference_answer": "a"}, said("prompt", "U q")),
}  # fmt: skip


def parts(record: Record) -> Expected:
    return record.shape, record.messages, record.chosen, record.rejected, record.label


def wrong(module: Any, folder: Path) -> list[str]:
    """The shapes of the table that a module reads as something else."""
    found = []
    for name, (row, expected) in SHAPES.items():
        try:
            got: list[object] = [parts(record) for record in module.read([str(write_lines(folder / "a.jsonl", [row]))])]
        except Exception as error:  # of a mutant anything
            got = [error]
        if got != [expected]:
            found.append(name)
    return found


def test_every_shape_is_recognised(tmp_path: Path) -> None:
    assert wrong(records, tmp_path) == []
    for row, _ in SHAPES.values():
        (record,) = read(write_lines(tmp_path / "a.jsonl", [row]))
        assert record.fields == row  # whole, for reward functions
        assert record.place == f"{tmp_path / 'a.jsonl'}, line 1"


@pytest.mark.parametrize(
    ("name", "prompt", "is_tie"),
    [
        ("alpaca", ["U i\n\nx"], False),
        ("sharegpt", ["U q", "A a", "U r"], False),
        ("two in a row", ["U q", "U r", "A a"], False),
        ("ends with a question", ["U q", "A a", "U r"], False),
        ("of messages", ["S s", "U q"], False),
        ("pair", ["U q"], False),
        ("one goes on", ["U q"], False),
        ("tie", ["U q"], True),
        ("bad, messages", ["U q", "A a", "U r"], False),
        ("prompt of messages", ["U q", "A a", "U r"], False),
    ],
)
def test_prompts_and_ties(tmp_path: Path, name: str, prompt: list[str], is_tie: bool) -> None:
    (record,) = read(write_lines(tmp_path / "a.jsonl", [SHAPES[name][0]]))
    assert record.prompt == turns(*prompt)
    assert record.is_tie == is_tie


MUTANTS = [
    (r'f"{text}\n\n{more}"', r'f"{text}\n{more}"'),
    ('if more.strip() else text', 'if more else text'),
    ('(*_history(row), *turns)', '(*turns, *_history(row))'),
    ('(Message("system", text), *messages)', '(*messages, Message("system", text))'),
    ('if not text.strip():\n        return tuple(messages)', 'if field is None:\n        return tuple(messages)'),
    ('return self.fields.get(name) is not None', 'return name in self.fields'),
    ('"gpt": "assistant"', '"gpt": "user"'),
    ('"chatgpt": "assistant",', ''),
    ('may_be_empty=role == "system"', 'may_be_empty=False'),
    ('better, worse = (_answer', 'worse, better = (_answer'),
    ('chosen[same:], rejected[same:]', 'rejected[same:], chosen[same:]'),
    ('while same and not', 'while False and not'),
    ('zip(chosen[:-1], rejected[:-1], strict=False)', 'zip(chosen, rejected, strict=False)'),
    ('lambda pair: pair[0] == pair[1]', 'lambda pair: pair[0].role == pair[1].role'),
    ('if is_prompt and turns[-1] == ("Assistant", "")', 'if False'),
    ('(role, content.strip()) for', '(role, content) for'),
    (r'(?:\A\s*|\n\n)(Human|Assistant):', r'(?:\A|\n*)\s*(Human|Assistant):'),
    (r'|\s*Human:.*\n\nAssistant:"', '"'),
    (r'begins = r"\s*\n\n(?:Human|Assistant):', r'begins = r".*\n\n(?:Human|Assistant):'),
    ('return bool(value)', 'return not value'),
    ('messages, chosen = messages[:-1], messages[-1:]', 'messages, chosen = messages, messages[-1:]'),
    ('return "preference", row.one_of(PROMPTS), None', 'return "messages", "chosen", None'),
    ('("labelled" if row.has("label") else shape), prompt', 'shape, prompt'),
    ('("labelled" if row.has("label") else shape), conversation', 'shape, conversation'),
    ('if conversation := row.one_of(CONVERSATIONS):', 'conversation = row.one_of(CONVERSATIONS)\n    if not row.has("prompt"):'),
    ('asked[len(asked) - len(given) :]', 'asked[:0]'),
    ('INPUTS = ("input", "context")', 'INPUTS = ("input",)'),
    ('SYSTEMS = ("system", "system_prompt")', 'SYSTEMS = ("system",)'),
    ('return _with_system(row, "chosen", asked)', 'return asked'),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), MUTANTS)
def test_the_table_would_notice(tmp_path: Path, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(records.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, old
    mutant = types.ModuleType("mutant")
    monkeypatch.setitem(sys.modules, "mutant", mutant)  # where dataclasses look for the names in annotations
    exec(compile(source.replace(old, new), "mutant.py", "exec"), mutant.__dict__)
    assert wrong(mutant, tmp_path) != []


def test_several_instances_are_several_examples(tmp_path: Path) -> None:
    rows = [
        {"instruction": "i", "instances": [{"input": "x", "output": "o"}, {"input": "", "output": "p"}]},
        {"instruction": "j", "instances": [{"output": "q"}]},
    ]
    found = read(write_lines(tmp_path / "a.jsonl", rows))
    assert [record.messages for record in found] == [turns("U i\n\nx", "A o"), turns("U i", "A p"), turns("U j", "A q")]
    places = ["line 1, instance 1", "line 1, instance 2", "line 2"]
    assert [record.place for record in found] == [f"{tmp_path / 'a.jsonl'}, {place}" for place in places]
    assert recognised(found) == [f"{tmp_path / 'a.jsonl'}: 3 examples recognised as alpaca by instruction, instances"]


# ---------------------------------------------------------------------- what is recognised, and why


def test_what_was_recognised_is_said_per_file(tmp_path: Path) -> None:
    one = write_lines(tmp_path / "one, line 1.jsonl", [{"id": 1, **SHAPES["alpaca"][0]}, {"url": None, **SHAPES["no input"][0]}])
    two = write_lines(tmp_path / "two.json", [SHAPES["tie"][0]])
    three = write_lines(tmp_path / "three.jsonl", [SHAPES["beside their prompt"][0]] * 1500)
    assert recognised(read(one, two, three)) == [
        f"{one}: 2 examples recognised as alpaca by instruction, input, output; not read: id",
        f"{two}: 1 example recognised as preference by chosen, rejected; 1 with two equal answers",
        f"{three}: 1,500 examples recognised as messages by messages; not read: prompt",
    ]


def test_the_shared_files(shared: Path) -> None:
    files = {
        "instruct/rasbt_instruction_data.json": (1100, "alpaca by instruction, input, output"),
        "instruct/self_instruct_seed_tasks.jsonl": (
            175,
            "alpaca by instruction, instances; not read: id, name, is_classification",
        ),
        "instruct/dolly_open_qa.jsonl.gz": (3742, "prompt-completion by instruction, response"),
        "instruct/gsm8k_train.jsonl.gz": (7473, "prompt-completion by question, answer"),
        "preference/rasbt_politeness_preference.jsonl.gz": (
            1100,
            "preference by prompt, input, chosen, rejected; 6 with two equal answers",
        ),
        "preference/hh_rlhf_harmless_subset.jsonl.gz": (823, "preference by prompt, chosen, rejected; not read: source_line"),
        "eval/HumanEval.jsonl.gz": (164, "prompt by prompt; not read: task_id, entry_point, canonical_solution, test"),
    }
    found = {name: read(shared / name) for name in files}
    assert recognised([record for some in found.values() for record in some]) == [
        f"{shared / name}: {count:,} examples recognised as {why}" for name, (count, why) in files.items()
    ]
    assert {name: len(some) for name, some in found.items()} == {name: count for name, (count, _) in files.items()}

    alpaca = found["instruct/rasbt_instruction_data.json"]
    assert sum(record.messages[0].content == record.fields["instruction"] for record in alpaca) == 775
    assert all(record.messages[1].content == record.fields["output"] for record in alpaca)
    tasks = found["instruct/self_instruct_seed_tasks.jsonl"]
    assert sum(record.messages[0].content == record.fields["instruction"] for record in tasks) == 50
    for record in found["eval/HumanEval.jsonl.gz"]:
        assert record.prompt == (Message("user", record.fields["prompt"]),)  # not a space less
    humans = {"user": "Human", "assistant": "Assistant"}
    patterns = Counter()
    for record in found["preference/hh_rlhf_harmless_subset.jsonl.gz"]:
        whole = "".join(f"\n\n{humans[role]}:{content}" for role, content in record.messages) + "\n\nAssistant:"
        assert re.sub(r"\s", "", whole) == re.sub(r"\s", "", record.fields["prompt"])
        assert record.chosen == (Message("assistant", record.fields["chosen"].strip()),)
        assert record.rejected == (Message("assistant", record.fields["rejected"].strip()),)
        roles = "".join(role[0] for role, _ in record.messages)
        patterns[re.fullmatch("(ua)*u", roles) is not None] += 1
    assert patterns == {True: 822, False: 1}  # in one the assistant speaks twice
    sums = found["instruct/gsm8k_train.jsonl.gz"]
    assert (sums[2].place, len(sums[2].messages)) == (f"{shared / 'instruct' / 'gsm8k_train.jsonl.gz'}, line 3", 2)
    with pytest.raises(UserError, match=r"mmlu_subset_test\.jsonl\.gz, line 1: `answer` must be text"):
        read(shared / "eval" / "mmlu_subset_test.jsonl.gz")
    with pytest.raises(UserError, match=r"mt_bench_questions\.jsonl, line 1: no known shape"):
        read(shared / "eval" / "mt_bench_questions.jsonl")


# ---------------------------------------------------------------------- containers

CONTAINERS: dict[str, Callable[[list[Any]], bytes]] = {
    "lines.jsonl": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
    "list.json": lambda rows: json.dumps(rows).encode(),
    "indented.json": lambda rows: json.dumps(rows, indent=2, ensure_ascii=False).replace("\n", "\r\n").encode(),
    "lines.json": lambda rows: "\n\n".join(map(json.dumps, rows)).encode() + b"\n",
    "list.jsonl": lambda rows: b"\n " + json.dumps(rows).encode(),
    "mark.jsonl": lambda rows: b"\xef\xbb\xbf" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode(),
    "mark.json": lambda rows: b"\xef\xbb\xbf" + json.dumps(rows, indent=1).encode(),
    "lines.jsonl.gz": lambda rows: gzip.compress("\r\n".join(map(json.dumps, rows)).encode(), 1),
    "mark.json.gz": lambda rows: gzip.compress(b"\xef\xbb\xbf" + json.dumps(rows).encode(), 1),
}


@pytest.mark.parametrize("container", [*CONTAINERS, "table.parquet"])
def test_every_container_holds_the_same(tmp_path: Path, container: str) -> None:
    path = tmp_path / container
    word = "line" if container.startswith("lines") or container == "mark.jsonl" else "record"
    for name, (row, expected) in SHAPES.items():
        rows = [{**row, "note": text} for text in ("một", "\U0001f30d\u2028\x85", "c")]
        if container == "table.parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
            word = "row"
        else:
            path.write_bytes(CONTAINERS[container](rows))
        found = read(path)
        assert [parts(record) for record in found] == [expected] * 3, name
        numbers = (1, 3, 5) if container == "lines.json" else (1, 2, 3)
        assert [record.place for record in found] == [f"{path}, {word} {number}" for number in numbers]
        assert [record.fields["note"] for record in found] == [row["note"] for row in rows]
        if container != "table.parquet" or name != "null input":
            assert [dict(record.fields) for record in found] == rows, name


def test_a_folder_by_name_and_sources_in_order(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write_lines(tmp_path / "b.jsonl", [{"prompt": "2", "completion": "b"}])
    (tmp_path / "a.json").write_text('[{"question": "1", "answer": "a"}]')
    pq.write_table(pa.table({"prompt": ["3"], "completion": ["c"]}), tmp_path / "deep" / "c.parquet")
    (tmp_path / "deep" / "d.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "4", "completion": "d"}', mtime=0))
    for name in ("notes.md", "a.txt", "b.csv"):
        (tmp_path / name).write_text("nothing to read")
    assert [record.prompt[0].content for record in read(tmp_path)] == ["1", "2", "3", "4"]
    mixed = read(tmp_path / "deep", tmp_path / "a.json", write_lines(tmp_path / "p.jsonl", [{"prompt": "5"}]))
    assert [record.prompt[0].content for record in mixed] == ["3", "4", "1", "5"]
    assert [record.shape for record in mixed] == ["prompt-completion"] * 3 + ["prompt"]


def test_a_column_that_only_some_rows_have(tmp_path: Path) -> None:
    """In a table, and in a dataset, what one row lacks is null there, also inside messages."""
    rows = [
        {"prompt": "q", "chosen": None, "completion": "a", "input": None, "label": None},
        {"prompt": "r", "chosen": None, "completion": "b", "input": "x", "label": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [record.messages for record in read(tmp_path / "a.parquet")] == [turns("U q", "A a"), turns("U r\n\nx", "A b")]
    talk = [{"from": None, "value": None, **turn, "weight": None} for turn in role_content("U q", "A a")]
    kind = pa.list_(pa.struct([(name, pa.string()) for name in ("from", "value", "role", "content", "weight")]))
    pq.write_table(pa.table({"messages": pa.array([talk], kind)}), tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet")[0].messages == turns("U q", "A a")


READ = """
import json, socket, sys
socket.getaddrinfo = None  # nothing of this is the network's business
from glassgpt.config import UserError
from glassgpt.data import records
for source in sys.argv[1:]:
    try:
        found = records.read([source])
        print(json.dumps([records.recognised(found), [record.messages for record in found], found[-1].place]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def test_data_sets(tmp_path: Path, root: Path) -> None:
    chats = {"messages": [[*role_content("U q", "A a")], [*role_content("U r", "A b")]], "n": [1, 2]}
    (tmp_path / "chats").mkdir()
    pq.write_table(pa.table(chats), tmp_path / "chats" / "train.parquet")
    (tmp_path / "nulls").mkdir()
    pq.write_table(pa.table({"prompt": ["q"], "completion": pa.array([None], pa.string())}), tmp_path / "nulls" / "test.parquet")
    (tmp_path / "lines").mkdir()
    write_lines(tmp_path / "lines" / "train.jsonl", [SHAPES["alpaca"][0], {**SHAPES["alpaca"][0], "input": ""}])
    given = ("hf:./chats", "hf:./nulls:test", "hf:./lines:train", "hf:./lines:dev", "hf:lines")
    environment = ALONE | {"HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path), "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", READ, *given]
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    whole, null, lines, split, name = map(json.loads, done.stdout.splitlines())
    assert whole == [
        ["hf:./chats: 2 examples recognised as messages by messages; not read: n"],
        [[["user", "q"], ["assistant", "a"]], [["user", "r"], ["assistant", "b"]]],
        "hf:./chats, row 2",
    ]
    assert "hf:./nulls:test, row 1: `prompt` has no" in null and "its `completion` is null" in null
    assert lines[1] == [[["user", "i\n\nx"], ["assistant", "o"]], [["user", "i"], ["assistant", "o"]]]
    assert "no split 'dev'; it has train" in split
    assert "expected hf:OWNER/NAME" in name


# ---------------------------------------------------------------------- what cannot be read

TALK = role_content("U q", "A a")
ROWS: list[tuple[Any, str]] = [
    (5, "expected an object with named fields; got the number 5"),
    ("text", "expected an object with named fields; got 'text'"),
    (None, "expected an object with named fields; got null"),
    # unknown, missing and misspelt fields
    ({}, "no known shape: its fields: no fields. Known are instruction + output (Alpaca), conversations (ShareGPT), messages,"),
    ({"text": "a", "id": 1}, "no known shape: its fields: text, id. Known are"),
    ({"instuction": "i", "input": "x", "output": "o"},
     "`output` has no `prompt`, `instruction` or `question` beside it; its fields:"
     " instuction, input, output (is `instuction` meant to be `instruction`?)"),
    ({"instruction": "i", "input": "x", "ouput": "o"},
     "`instruction` has no `completion`, `output`, `response` or `answer` beside"
     " it; its fields: instruction, input, ouput (is `ouput` meant to be `output`?)"),
    ({"mesages": TALK}, "no known shape: its fields: mesages (is `mesages` meant to be `messages`?)"),
    ({"instruction": "i"}, "`instruction` has no `completion`, `output`, `response` or `answer` beside it"),
    ({"question": "q"}, "`question` has no"),
    ({"completion": "a", "label": True}, "`completion` has no `prompt`, `instruction` or `question` beside it"),
    ({"prompt": "q", "completion": None}, "beside it; its `completion` is null; its fields: prompt, completion"),
    ({"prompt": "q", "chosen": "a"}, "`chosen` has no `rejected` beside it; its fields: prompt, chosen."),
    ({"prompt": "q", "chosen": "a", "rejected": None}, "`chosen` has no `rejected` beside it; its `rejected` is null"),
    ({"prompt": "q", "rejected": "a", "choosen": "b"},
     "`rejected` has no `chosen` beside it; its fields: prompt, rejected, choosen"
     " (is `choosen` meant to be `chosen`?)"),
    ({"promt": "q", "chosen": "a", "rejected": "b"},
     "has no `prompt`, so `chosen` and `rejected` must be whole conversations: lists"
     " of messages, or text that begins with 'Human:' (is `promt` meant to be `prompt`?)"),
    ({"prompt": "q", "completoin": "a"}, "unknown field `completoin`; is it meant to be `completion`? Rename it"),
    ({"prompt": "q", "completions": TALK}, "unknown field `completions`; is it meant to be `completion`?"),
    ({"prompt": "q", "choosen": "a", "regected": "b"}, "unknown field `choosen`; is it meant to be `chosen`?"),
    ({"instruction": "i", "inputs": "x", "output": "o"}, "unknown field `inputs`; is it meant to be `input`?"),
    ({"prompt": "q", "imput": "x", "chosen": "a", "rejected": "b"}, "unknown field `imput`; is it meant to be `input`?"),
    ({"messages": TALK, "sytem": "s"}, "unknown field `sytem`; is it meant to be `system`?"),
    ({"prompt": "q", "completion": "a", "lable": False}, "unknown field `lable`; is it meant to be `label`?"),
    ({"instruction": "i", "output": "o", "histroy": [["a", "b"]]}, "unknown field `histroy`; is it meant to be `history`?"),
    ({"prompt": "q", "question": "r", "answer": "a"},
     "has both `prompt` and `question`, which mean the same; rename or drop one"),
    ({"prompt": "q", "response": "a", "answer": "b"}, "has both `response` and `answer`"),
    ({"instruction": "i", "input": "x", "context": "y", "output": "o"}, "has both `input` and `context`"),
    ({"messages": TALK, "conversations": TALK}, "has both `messages` and `conversations`"),
    ({f"f{n}": n for n in range(99)}, "its fields: f0, f1, f2, f3, f4, f5, f6, f7, f8, f9, f10, f11, .... Known"),
    ({"a\ud800\n": 1, "x" * 99: 2}, rf"its fields: 'a\ud800\n', {'x' * 40}. Known"),
    # wrong types
    ({"instruction": 5, "output": "o"}, "`instruction` must be text or a list of messages; got the number 5"),
    ({"instruction": {"text": "i"}, "output": "o"}, "`instruction` must be text or a list of messages; got an object with text"),
    ({"instruction": "i", "output": True}, "`output` must be text or a list of messages; got true"),
    ({"instruction": "i", "output": float("nan")}, "`output` must be text or a list of messages; got the number nan"),
    ({"instruction": "i", "output": 10**4000}, f"got the number 1{'0' * 39}"),
    ({"instruction": "i", "input": ["x"], "output": "o"}, "`input` must be text; got a list of 1"),
    ({"instruction": "i", "system": 0, "output": "o"}, "`system` must be text; got the number 0"),
    ({"instruction": "i", "history": "a", "output": "o"}, "`history` must be a list of pairs [user, assistant]; got 'a'"),
    ({"instruction": "i", "history": [["a"]], "output": "o"}, "`history` must be a list of pairs"),
    ({"instruction": "i", "history": [["a", "b"], ["c", 5]], "output": "o"},
     "`history`, pair 2, of the assistant must be text; got the number 5"),
    ({"instruction": "i", "instances": {}},
     "`instances` must be a list of objects with `input` and `output`; got an object with no"),
    ({"instruction": "i", "instances": []}, "`instances` must be a list of objects"),
    ({"instruction": "i", "instances": [{"output": "o"}, {"input": "x"}]},
     ", instance 2: an instance of `instances` has no `output`"),
    ({"messages": "q"}, "`messages` must be a list of messages; got 'q'"),
    ({"messages": {"role": "user"}}, "`messages` must be a list of messages; got an object with role"),
    ({"messages": ["q"]}, "`messages`, turn 1 must be an object with `role` and `content` (or `from` and `value`); got 'q'"),
    ({"messages": [*TALK, {"role": "user", "contnet": "r"}]},
     "`messages`, turn 3 has no `content`; its fields: role, contnet (did you mean 'content'?)"),
    ({"messages": [{"content": "q"}]}, "`messages`, turn 1 has no `role`; its fields: content"),
    ({"messages": [{}]}, "`messages`, turn 1 has no `role`; its fields: no fields"),
    ({"conversations": [{"from": "human"}]}, "`conversations`, turn 1 has no `value`; its fields: from"),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": []}]},
     "`messages`, turn 2: `content` must be text; got null"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]},
     "turn 1: `content` must be text; got a list of 1"),
    ({"messages": [{"role": 1, "content": "q"}]},
     "turn 1: unknown `role` the number 1; known are system, user, human, assistant,"),
    ({"messages": [{"role": "asistant", "content": "q"}]},
     "unknown `role` 'asistant'; known are system, user, human, assistant, gpt,"
     " chatgpt, tool (did you mean 'assistant'?)"),
    ({"conversations": [{"from": "Human", "value": "q"}]}, "unknown `from` 'Human'"),
    ({"prompt": "q", "completion": "a", "label": "good"},
     "`label` must be true or false (or 1 or 0), whether the answer is good; got 'good'"),
    ({"prompt": "q", "completion": "a", "label": 2},
     "`label` must be true or false (or 1 or 0), whether the answer is good; got the"),
    ({"prompt": "q", "completion": "a", "label": 1.0}, "got the number 1.0"),
    ({"prompt": "q", "chosen": "a", "rejected": 5}, "`rejected` must be text or a list of messages; got the number 5"),
    # nothing there
    ({"instruction": "", "output": "o"}, "`instruction` is empty"),
    ({"instruction": "i", "output": " \n"}, "`output` is empty"),
    ({"prompt": "", "completion": "a"}, "`prompt` is empty"),
    ({"prompt": "q", "completion": ""}, "`completion` is empty"),
    ({"prompt": "q", "chosen": "a", "rejected": ""}, "`rejected` is empty"),
    ({"prompt": []}, "`prompt` is empty; expected messages"),
    ({"messages": []}, "`messages` is empty; expected messages"),
    ({"messages": [{"role": "system", "content": " "}]}, "`messages` has no turn but an empty system message"),
    ({"messages": role_content("U q", "A ")}, "`messages`, turn 2: `content` is empty"),
    ({"conversations": from_value("U  ", "A a")}, "`conversations`, turn 1: `value` is empty"),
    ({"prompt": "\n\nHuman: q\n\nAssistant:\n\nHuman: r\n\nAssistant:"}, "`prompt`, turn 2: nothing after 'Assistant:'"),
    ({"chosen": f"{HUMAN} a", "rejected": HUMAN}, "`rejected`, turn 2: nothing after 'Assistant:'"),
    ({"instruction": "i", "history": [["", "b"]], "output": "o"}, "`history`, pair 1, of the user is empty"),
    # what makes no conversation
    ({"messages": role_content("U q")},
     "`messages` has no turn of the assistant's; a question without an answer goes into a field"),
    ({"conversations": from_value("S s", "A a")}, "`conversations` has no turn of the user's before the assistant's answer"),
    ({"messages": role_content("A a", "U q")}, "`messages` has no turn of the user's before the assistant's answer"),
    ({"messages": role_content("U q", "A a", "U r"), "label": True},
     "`messages` ends with a turn of the user's, so `label` is about"),
    ({"system": "s", "messages": role_content("S t", "U q", "A a")},
     "has a system message in `system` and another in `messages`"),
    ({"system": "s", "prompt": role_content("S t", "U q")}, "has a system message in `system` and another in `prompt`"),
    ({"system": "s", "chosen": role_content("S t", "U q", "A a"), "rejected": role_content("S t", "U q", "A b")},
     "has a system message in `system` and another in `chosen`"),
    ({"prompt": TALK}, "`prompt` ends with an answer; if it is a whole conversation, call the field `messages`"),
    ({"prompt": role_content("S s")}, "`prompt` has no turn of the user's, so nothing is asked"),
    ({"prompt": "\n\nAssistant:", "completion": "a"}, "`prompt` has no turn of the user's"),
    ({"prompt": TALK[:1], "input": "x"}, "`input` belongs to a `prompt` of plain text, not to one of several turns"),
    ({"prompt": HUMAN, "input": "x"}, "`input` belongs to a `prompt` of plain text"),
    ({"prompt": "q", "completion": role_content("U q", "A a")},
     "`completion` must begin with a turn of the assistant's; it does with"
     " one of the user's"),
    ({"prompt": "q", "completion": role_content("A a", "U q")}, "`completion` must end with a turn of the assistant's"),
    ({"prompt": "q", "chosen": TALK, "rejected": "b"}, "`chosen` is a whole conversation, but `rejected` an answer alone"),
    ({"prompt": "q", "chosen": "a", "rejected": f"{HUMAN} b"},
     "`rejected` is a whole conversation, but `chosen` an answer alone"),
    ({"chosen": "a", "rejected": "b"}, "has no `prompt`, so `chosen` and `rejected` must be whole conversations"),
    ({"chosen": TALK, "rejected": role_content("U r", "A a")},
     "`chosen` and `rejected` have no common beginning, in which the user"),
    ({"chosen": role_content("S s", "A a"), "rejected": role_content("S s", "A b")}, "have no common beginning"),
    ({"chosen": TALK, "rejected": role_content("U q", "A a", "U r")},
     "`rejected` must end with a turn of the assistant's; it does"),
    ({"prompt": "r", "chosen": TALK, "rejected": role_content("U q", "A b")},
     "`chosen` and `rejected` do not begin with `prompt`: 'r'"),
    # half a character
    ({"prompt": "q", "completion": "a\ud83d"},
     r"`completion` holds '\ud83d', half of a surrogate pair, which is not Unicode text"),
    ({"messages": [{"role": "user", "content": "\udc00"}, *TALK]}, r"`messages`, turn 1: `content` holds '\udc00', half of a"),
    ({"prompt": "q", "input": "\ud83d", "completion": "a"}, r"`input` holds '\ud83d', half of a surrogate pair"),
    ({"prompt": f"{HUMAN}\ud83d"}, r"`prompt` holds '\ud83d', half of"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), ROWS, ids=[message[:50] for _, message in ROWS])
def test_errors_name_the_line_and_the_field(tmp_path: Path, row: Any, message: str) -> None:
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps(row))
    with pytest.raises(UserError) as caught:
        read(tmp_path / "a.jsonl")
    assert str(caught.value).startswith(f"{tmp_path / 'a.jsonl'}, line 2")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()  # can be printed
    (tmp_path / "a.json").write_text(json.dumps([row]))
    with pytest.raises(UserError, match=r"a\.json, record 1") as again:
        read(tmp_path / "a.json")
    assert message in str(again.value)


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"prompt": "q", "answers": 5, "completions": [], "label": 3, "test": {"a": [1]}}, "prompt"),
        ({"prompt": "q", "completion": "a", "labels": ["x"], "inputs": [0], "systems": 1, "histories": []}, "prompt-completion"),
        ({"messages": TALK, "inputs": "x", "question_id": "y", "history": 5}, "messages"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "labels": 1, "response": "c", "answers": "d"}, "preference"),
    ],
)  # fmt: skip
def test_other_fields_are_let_be(tmp_path: Path, row: dict[str, Any], shape: str) -> None:
    (record,) = read(write_lines(tmp_path / "a.jsonl", [row]))
    assert (record.shape, record.fields) == (shape, row)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "q"}\n\n{"prompt": \n', ", line 3: not JSON"),
        ("a.json", b'[{"prompt": "q"},\r\n {"prompt" 5}]', ", line 2, column 12: not JSON: Expecting ':' delimiter"),
        ("a.json", b'[{"prompt": "q"}', ", line 1, column 17: not JSON"),
        ("a.json", b'{"data": [\n{"prompt": "q"}]}', ", line 1: not JSON"),
        ("a.json", b'{"data": [{"prompt": "q"}]}', ", line 1: no known shape: its fields: data"),
        ("a.jsonl", b'{"prompt": "q", "n": ' + b"9" * 5000 + b"}", ", line 1: not JSON: Exceeds the limit"),
        ("a.json", b'[{"prompt": "q", "n": ' + b"9" * 5000 + b"}]", ": not JSON: Exceeds the limit"),
        ("a.jsonl", b'{"prompt": ' + b"[" * 100_000, ", line 1: not JSON"),
        ("a.json", b"[" * 100_000, ": not JSON"),
        ("a.json", b'[{"prompt": ' + b"[" * 300 + b"]" * 300 + b"}]", ", record 1: `prompt`, turn 1 must be an object"),
        ("a.jsonl", b"", ": empty: no examples in it"),
        ("a.jsonl.gz", gzip.compress(b"\n \n", mtime=0), ": empty: no examples in it"),
        ("a.json", b"[]", ": empty: no examples in it"),
        ("a.json", b"[[1, 2]]", ", record 1: expected an object with named fields; got a list of 2"),
        ("a.jsonl", '{"prompt": "é"}'.encode("latin-1"), r": not UTF-8 at byte 12 (0xe9)"),
        ("a.jsonl", '{"prompt": "q"}'.encode("utf-16"), ": not UTF-8 at byte 0"),
        ("a.json.gz", b"[]", ": cannot read: "),
        ("a.parquet", b"PAR1 nothing more", ": cannot read after row 0"),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), "gunzip this file"),
        ("a.csv", b"prompt,completion", ": examples are read from .json and .jsonl files (also .gz) and from .parquet"),
        ("a.pkl", b"\x80\x04.", ": examples are read from"),
        ("a", b"[]", ": examples are read from"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}")
    assert message in str(caught.value)


def test_tables_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for columns, message in (
        ({"prompt": pa.array([], pa.string())}, "empty: no examples in it"),
        ({"prompt": ["q", None]}, "row 2: no known shape"),
        ({"prompt": [b"q"]}, "row 1: `prompt` must be text or a list of messages; got bytes"),
        ({"n": [1, 2], "prompt": pa.array([b"ok", b"caf\xe9"]).view(pa.string())}, "row 2: `prompt` is not UTF-8 at its byte 3"),
        ({"prompt": ["q"], "completion": [5]}, "row 1: `completion` must be text or a list of messages; got the number 5"),
    ):
        pq.write_table(pa.table(columns), path)
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            read(path)
        assert str(caught.value).startswith(str(path))


def test_names_are_looked_up_before_anything_is_read(tmp_path: Path) -> None:
    broken = write_lines(tmp_path / "a.jsonl", [5])
    for other in (tmp_path / "b.jsonl", "embedded", "", "x" * 5000, "\0"):
        with pytest.raises(UserError, match=r"no such file or folder \(give a JSON, JSONL or Parquet file"):
            read(broken, other)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"empty: no \.json, \.jsonl \(also \.gz\) or \.parquet file in this folder"):
        read(broken, tmp_path / "empty")
    with pytest.raises(UserError, match=r"hf:name: expected hf:OWNER/NAME"):
        read(broken, "hf:name")
    assert read() == []


def test_mixed_shapes_name_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_lines(path, [SHAPES["pair"][0], SHAPES["hh, whole"][0], SHAPES["prompt"][0]])
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value) == (
        f"{path}, line 3: recognised as prompt by its fields prompt, test, entry_point, but {path}, line 1 as preference;"
        " all examples of a file must have one shape"
    )
    write_lines(path, [SHAPES["good"][0], SHAPES["prompt-completion"][0]])
    with pytest.raises(UserError, match=r"line 2: recognised as prompt-completion .*line 1 as labelled"):
        read(path)


# ---------------------------------------------------------------------- properties

WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
SPOKEN = WORDS.map(str.strip).filter(lambda text: "Human:" not in text and "Assistant:" not in text)


@st.composite
def conversations(draw: st.DrawFn, words: st.SearchStrategy[str] = WORDS) -> tuple[Message, ...]:
    """A system message or none, then questions and answers in turn."""
    system = draw(st.booleans())
    pairs = draw(st.lists(st.tuples(words, words), min_size=1, max_size=3))
    spoken = [message for q, a in pairs for message in (Message("user", q), Message("assistant", a))]
    return (*([Message("system", draw(words))] if system else []), *spoken)


def as_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [message._asdict() for message in messages]


def as_dialogue(messages: Sequence[Message]) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[role]}: {content}" for role, content in messages)


@FIXTURE
@given(messages=conversations(), data=st.data())
def test_one_conversation_in_every_shape(messages: tuple[Message, ...], data: st.DataObject, tmp_path: Path) -> None:
    names = {role: data.draw(st.sampled_from([name for name in ROLES if ROLES[name] == role])) for role in ROLES.values()}
    told = {"system": messages[0].content} if messages[0].role == "system" else {}
    spoken = messages[len(told) :]
    *earlier, (_, question), (_, answer) = spoken
    history = [[q.content, a.content] for q, a in zip(earlier[::2], earlier[1::2], strict=True)]
    rows = [
        {"messages": as_messages(messages)},
        {"messages": as_messages(spoken), **told},
        {"conversations": [{"from": names[role], "value": content} for role, content in messages]},
        {"prompt": as_messages(messages[:-1]), "completion": as_messages(messages[-1:])},
        {"prompt": as_messages(spoken[:-1]), "answer": answer, **told},
        {"instruction": question, "input": "", "output": answer, "history": history, **told},
        {"question": question, "response": answer, "history": history, **told},
    ]
    for row in rows:
        (record,) = read(write_lines(tmp_path / "a.jsonl", [row]))
        assert (record.messages, record.prompt) == (messages, messages[:-1]), row


@FIXTURE
@given(messages=conversations(SPOKEN), other=SPOKEN)
def test_one_pair_in_every_shape(messages: tuple[Message, ...], other: str, tmp_path: Path) -> None:
    messages = tuple(message for message in messages if message.role != "system")
    asked, chosen, rejected = messages[:-1], messages[-1:], (Message("assistant", other),)
    rows = [
        {"prompt": as_messages(asked), "chosen": as_messages(chosen), "rejected": as_messages(rejected)},
        {"prompt": as_messages(asked), "chosen": chosen[0].content, "rejected": other},
        {"chosen": as_messages((*asked, *chosen)), "rejected": as_messages((*asked, *rejected))},
        {"prompt": asked[-1].content, "chosen": as_messages(messages), "rejected": as_messages((*asked, *rejected))},
        {"prompt": f"{as_dialogue(asked)}\n\nAssistant:", "chosen": f" {chosen[0].content}", "rejected": f" {other}"},
        {"prompt": as_dialogue(asked), "chosen": chosen[0].content, "rejected": other},
        {"chosen": as_dialogue(messages), "rejected": as_dialogue((*asked, *rejected))},
    ]
    for row in rows:
        (record,) = read(write_lines(tmp_path / "a.jsonl", [row]))
        assert parts(record) == ("preference", asked, chosen, rejected, None), row
        assert record.is_tie == (chosen == rejected)


SCALARS = st.sampled_from([None, True, False, 0, 1, 2.5, "", " ", "a", "\n\nHuman: q\n\nAssistant:", "Human: a", "\ud800"])
TURNS = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from([*ROLES, "bot", None]),
        "content": SCALARS,
        "from": st.sampled_from(["human", "gpt", 1]),
        "value": SCALARS,
    },
)
VALUES = SCALARS | st.lists(TURNS | SCALARS, max_size=3) | st.lists(st.lists(SCALARS, max_size=2), max_size=2) | TURNS
FIELDS = [*records.KNOWN, "imput", "test"]


def broken(record: Record) -> Iterator[str]:
    """What a record must never be, whatever is in a file."""
    pair = bool(record.chosen and record.rejected)
    if pair != (record.shape == "preference"):
        yield "pairs are preferences"
    if (record.label is not None) != (record.shape == "labelled"):
        yield "labels are labelled"
    every = [*record.messages, *record.chosen, *record.rejected]
    if not all(role in ROLES.values() and isinstance(content, str) and content.strip() for role, content in every):
        yield "messages have a role and text"
    if not any(message.role == "user" for message in record.prompt):
        yield "a prompt asks"
    for answer in (record.chosen, record.rejected):
        if answer and not (answer[0].role == answer[-1].role == "assistant"):
            yield "answers are the assistant's"
    if record.shape == "prompt" and record.messages[-1].role == "assistant":
        yield "prompts end with what is to be answered"
    "".join(content for _, content in every).encode()


@settings(FIXTURE, max_examples=250)
@given(row=st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=5))
def test_any_row_gives_a_sound_record_or_an_error(row: dict[str, Any], tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [row])
    try:
        found = read(path)
    except UserError as error:
        found, place = [], str(error)
    else:
        place = found[0].place
    assert place.startswith(f"{path}, line 1")
    assert [list(broken(record)) for record in found] == [[]] * len(found)
    assert [line.startswith(f"{path}: {len(found)} example") for line in recognised(found)] == [True] * bool(found)


def test_a_number_is_an_answer_but_for_choices(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "2+2", "answer": 4}\n{"prompt": "1/2", "answer": 0.5}\n')
    assert [record.messages[-1].content for record in records.read([str(path)])] == ["4", "0.5"]
    path.write_text('{"question": "2+2", "choices": ["3", "4"], "answer": 1}\n')
    with pytest.raises(UserError, match=r"line 1: `answer` must be text"):
        records.read([str(path)])
