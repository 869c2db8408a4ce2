"""`glassgpt chat` as people use it: in a true terminal, with messages given, with lines of standard input."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tiny import VIETNAMESE, Result, Run, caller, disturbed, few_merges, scripted

from glassgpt import load
from glassgpt.cli import main
from glassgpt.config import ModelConfig, UserError
from glassgpt.config.generate import Sampling
from glassgpt.generation import chat, complete
from glassgpt.generation.chat import NO_TEMPLATE, Conversation, fit
from glassgpt.model import GPT, weights
from glassgpt.text import Tokenizer
from glassgpt.text.chat import Message, prompt, render
from glassgpt.text.template import Template

SHORT = Template(
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    "{{ '<a>' if add_generation_prompt }}",
    "",
    "<|endoftext|>",
)
PLAIN = few_merges()
TOKENIZER = PLAIN.with_template(SHORT)
TALK = [
    Message("user", "Chào"),
    Message("assistant", VIETNAMESE[:40]),
    Message("user", "the cat"),
    Message("assistant", " sat on the mat 🐈.\n\n### User: là nó "),
    Message("user", "there"),
    Message("assistant", "too"),
]
GREEDY = ("--temperature", 0)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`glassgpt chat ...` in this process."""
    return caller("chat", capsys)


@pytest.fixture
def typed(run: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """`glassgpt chat ...` in this process, with lines typed into a terminal and Ctrl-D after them; the output is no terminal."""
    with contextlib.ExitStack() as stack:

        def call(lines: list[str], *arguments: object) -> Result:
            keyboard, screen = pty.openpty()
            stack.callback(os.close, keyboard)
            os.write(keyboard, "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape") + b"\x04")
            monkeypatch.setattr(sys, "stdin", stack.enter_context(os.fdopen(screen, encoding="utf-8")))
            return run(*arguments)

        yield call


def saved(model: GPT, tokenizer: Tokenizer, folder: Path) -> Path:
    folder.mkdir()
    weights.save(model, folder)
    tokenizer.save(folder)
    return folder


def parrot(messages: list[Message], tokenizer: Tokenizer = TOKENIZER, context_tokens: int = 256) -> GPT:
    """A model that knows one conversation by heart: every token, from the one before it."""
    return scripted(tokenizer, render(messages, tokenizer).ids[1:], context_tokens=context_tokens)


@pytest.fixture(scope="module")
def by_heart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that answers TALK."""
    return saved(parrot(TALK), TOKENIZER, tmp_path_factory.mktemp("models") / "parrot")


@pytest.fixture(scope="module")
def noise() -> GPT:
    """A random model of 64 tokens of context."""
    return disturbed(ModelConfig(TOKENIZER.vocab_size, context_tokens=64, n_layer=2, n_head=2, width=16))


@pytest.fixture(scope="module")
def random(noise: GPT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(noise, TOKENIZER, tmp_path_factory.mktemp("models") / "random")


@pytest.fixture(scope="module")
def base(noise: GPT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One without a chat template."""
    return saved(noise, PLAIN, tmp_path_factory.mktemp("models") / "base")


def conversation(model: GPT, tokenizer: Tokenizer = TOKENIZER, **options: Any) -> Conversation:
    options = {"sampling": Sampling(temperature=0), "max_new_tokens": 256, "seed": 0} | options
    return Conversation(model, tokenizer, options.pop("sampling"), **options)


def said(messages: list[Message], role: str = "assistant") -> list[str]:
    return [message.content for message in messages if message.role == role]


QUESTIONS, ANSWERS = said(TALK, "user"), said(TALK)


def in_json(result: Result) -> dict[str, Any]:
    assert (result.code, result.err) == (0, "")
    return dict(json.loads(result.out))


# ---------------------------------------------------------------------- messages that are given


def test_answers_are_printed_one_after_the_other(run: Run, by_heart: Path) -> None:
    """The model answers only what it was trained on, token for token: the prompt that is served is that of training."""
    assert run(by_heart, "--message", *QUESTIONS, *GREEDY) == (0, "".join(f"{answer}\n" for answer in ANSWERS), "")


def stripped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are kept otherwise than they were said."""
    monkeypatch.setattr(chat, "Message", lambda role, content: Message(role, content.strip()))


def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt ends before the template asks for an answer."""
    monkeypatch.setattr(chat, "prompt", lambda messages, tokenizer: prompt(messages, tokenizer)[: -len("<a>")])


def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "end_ids", lambda tokenizer: [])


def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "prompt", lambda messages, tokenizer: prompt(messages[-1:], tokenizer))


@pytest.mark.parametrize("mutate", [stripped, unasked, endless, forgetful])
def test_mistakes_are_noticed(monkeypatch: pytest.MonkeyPatch, mutate: Callable[[pytest.MonkeyPatch], None]) -> None:
    """A model that goes by heart answers nothing but the very tokens that it was trained on."""

    def answers() -> list[str]:
        talk = conversation(parrot(TALK), max_new_tokens=80)
        return [talk.answer(talk.ask(question)).text for question in QUESTIONS]

    assert answers() == ANSWERS
    mutate(monkeypatch)
    assert answers() != ANSWERS


def test_json_is_one_object_that_can_be_loaded(run: Run, by_heart: Path, tmp_path: Path) -> None:
    answer = in_json(run(by_heart, "--message", *QUESTIONS[:2], *GREEDY, "--seed", 5, "--json"))
    assert [Message(**message) for message in answer["messages"]] == TALK[:4]
    assert (answer["model"], answer["seed"], answer["template"], answer["forgotten"]) == (str(by_heart), 5, True, 0)
    assert answer["sampling"] == vars(Sampling(temperature=0))
    assert answer["options"] == {"max_new_tokens": 256}
    assert (answer["engine"] in ("plain", "native"), answer["precision"]) == (True, "float32")
    for n, reply in enumerate(answer["answers"]):
        assert (reply["text"], reply["finish_reason"]) == (ANSWERS[n], "end")
        assert reply["ids"] == [*TOKENIZER.encode(ANSWERS[n]), TOKENIZER.end_id]
        assert reply["prompt_tokens"] == len(prompt(TALK[: 2 * n + 1], TOKENIZER))
    (tmp_path / "talk.json").write_text(json.dumps(answer))
    rest = run(by_heart, "--load", tmp_path / "talk.json", "--message", QUESTIONS[2], *GREEDY)
    assert rest == (0, f"{ANSWERS[2]}\n", "")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_of_standard_input(run: Run, by_heart: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """Blank ones are no messages; the last needs no line end."""
    data = f"{QUESTIONS[0]}{end}{end}  {end}{QUESTIONS[1]}{end}{QUESTIONS[2]}".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert run(by_heart, *GREEDY) == (0, "".join(f"{answer}\n" for answer in ANSWERS), "")


def test_a_line_is_answered_before_the_next_is_read(by_heart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So another program can talk with it."""
    reading, writing = os.pipe()
    with open(reading, encoding="utf-8") as source, open(writing, "wb", buffering=0) as typing:
        pieces: list[str] = []

        def show(piece: str) -> int:
            pieces.append(piece)
            if piece == "\n" and pieces.count("\n") == 1:
                typing.write(f"{QUESTIONS[1]}\n".encode())
                typing.close()
            return len(piece)

        screen = io.StringIO()
        monkeypatch.setattr(screen, "write", show)
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setattr(sys, "stdin", source)
        typing.write(f"{QUESTIONS[0]}\n".encode())
        assert main(["chat", str(by_heart), "--temperature", "0"]) == 0
        assert "".join(pieces) == f"{ANSWERS[0]}\n{ANSWERS[1]}\n"
        assert pieces[:4] == list(ANSWERS[0][:4])  # streamed
        assert not any("�" in piece for piece in pieces)


def test_the_system_message(run: Run, tmp_path: Path) -> None:
    """Is said before everything, in place of a loaded one."""
    told = [Message("system", "mèo"), *TALK[:4]]
    folder = saved(parrot(told), TOKENIZER, tmp_path / "model")
    expected = (0, f"{ANSWERS[0]}\n{ANSWERS[1]}\n", "")
    assert run(folder, "--system", "mèo", "--message", *QUESTIONS[:2], *GREEDY) == expected
    for system in ("mèo", "other"):
        (tmp_path / "talk.json").write_text(json.dumps(chat.as_json([told[0]._replace(content=system), *told[1:3]])))
        flags = ("--system", "mèo") if system == "other" else ()
        rest = run(folder, "--load", tmp_path / "talk.json", *flags, "--message", QUESTIONS[1], *GREEDY)
        assert rest == (0, f"{ANSWERS[1]}\n", "")
    assert in_json(run(folder, "--system", "", "--message", "a", "--json"))["messages"][0]["role"] == "user"


# ---------------------------------------------------------------------- how an answer ends


def test_every_token_that_ends_an_answer_ends_it() -> None:
    """What the template puts after an answer, and the vocabulary's own end of text; other special tokens do not."""
    backend = tokenizers.Tokenizer.from_str(PLAIN.to_json())
    backend.add_special_tokens(["<|im_end|>", "<|other|>"])
    tokenizer = Tokenizer(backend, Template(SHORT.source, "", "<|im_end|>"))
    for ending, text in (("<|im_end|>", "mèo"), ("<|endoftext|>", "mèo"), ("<|other|>x<|im_end|>", "mèo<|other|>x")):
        ids = [*prompt(TALK[:1], tokenizer), *tokenizer.encode(f"mèo{ending} và", allow_special=True)]
        talk = conversation(scripted(tokenizer, ids[1:]), tokenizer)
        reply = talk.answer(talk.ask(QUESTIONS[0]))
        assert (reply.text, reply.finish_reason) == (text, "end")
        assert tokenizer.decode(reply.ids) == f"mèo{ending}"
        assert talk.messages == [TALK[0], Message("assistant", text)]


@pytest.mark.parametrize("gap", ["\n\n", "\n", " ", ""])
@pytest.mark.parametrize("role", ["User", "Assistant", "System"])
def test_a_base_model_does_not_play_the_others(gap: str, role: str) -> None:
    question = [Message("user", "mèo")]
    ids = [*prompt(question, PLAIN), *PLAIN.encode(f"là nó{gap}### {role}:\nvà mèo<|endoftext|>", allow_special=True)]
    talk = conversation(scripted(PLAIN, ids[1:]), PLAIN)
    pieces: list[str] = []
    reply = talk.answer(talk.ask("mèo"), pieces.append)
    assert (reply.text, reply.finish_reason) == (f"là nó{' ' if gap == ' ' else ''}", "stop")
    assert "".join(pieces) == reply.text == talk.messages[-1].content
    assert f"{gap}### User:" in ANSWERS[1] or gap in (" ", "\n", "")  # a model with a template may say it: see TALK


def test_limits() -> None:
    """Of an answer, and of the context, in which the last token needs no place."""
    talk = conversation(parrot(TALK), max_new_tokens=3)
    reply = talk.answer(talk.ask(QUESTIONS[0]))
    assert (reply.text, reply.finish_reason, len(reply.ids)) == (ANSWERS[0][:3], "length", 3)
    endless = conversation(scripted(TOKENIZER, TOKENIZER.encode("x y " * 40)[:64], context_tokens=64))
    reply = endless.answer(endless.ask(QUESTIONS[0]))
    assert (reply.finish_reason, reply.prompt_tokens + len(reply.ids)) == ("context", 65)


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_went() -> None:
    talk, shown = conversation(parrot(TALK)), ""

    def show(piece: str) -> None:
        nonlocal shown
        shown += piece
        if shown.endswith("sáng"):
            signal.raise_signal(signal.SIGINT)

    reply = talk.answer(talk.ask(QUESTIONS[0]), show)
    assert (reply.text, reply.finish_reason) == ("Chào buổi sáng", "stopped")
    assert talk.messages == [TALK[0], Message("assistant", shown)]


# ---------------------------------------------------------------------- the words of the model


def test_greedy_answers_are_the_likeliest_tokens(noise: GPT) -> None:
    """Of whole passes over the whole history, without cache or engine."""
    talk = conversation(noise, max_new_tokens=5)
    for question in ("mèo", "the cat"):
        messages = [*talk.messages, Message("user", question)]
        ids = prompt(messages, TOKENIZER)
        expected: list[int] = []
        with torch.no_grad():
            while len(expected) < 5 and expected[-1:] != [TOKENIZER.end_id]:
                expected.append(int(noise(torch.tensor([ids + expected]))[0, -1].argmax()))
        reply = talk.answer(talk.ask(question))
        assert reply.ids == expected
        assert talk.messages == [*messages, Message("assistant", reply.text)]


def test_the_history_is_read_in_one_pass(noise: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    true = GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, ids, *rest: lengths.append(ids.size(1)) or true(self, ids, *rest))
    talk = conversation(noise, max_new_tokens=4)
    first, second = (talk.answer(talk.ask(question)) for question in ("mèo", "và"))
    assert lengths == [first.prompt_tokens, *[1] * (len(first.ids) - 1), second.prompt_tokens, *[1] * (len(second.ids) - 1)]
    assert second.prompt_tokens > first.prompt_tokens + len(first.ids) - 1


def test_seeds(run: Run, random: Path) -> None:
    flags = ("--max-new-tokens", 8, "--json", "--temperature", 1)

    def answers(*arguments: object) -> list[str]:
        return [reply["ids"] for reply in in_json(run(random, *arguments, *flags))["answers"]]

    twice = answers("--message", "mèo", "mèo", "--seed", 1)
    assert answers("--message", "mèo", "mèo", "--seed", 1) == twice
    assert answers("--message", "mèo", "--seed", 1) == twice[:1]
    assert answers("--message", "mèo", "--seed", 2) != twice[:1]
    first = in_json(run(random, "--message", "mèo", *flags))
    assert answers("--message", "mèo", "--seed", first["seed"]) == [first["answers"][0]["ids"]]


def test_the_number_of_the_turn_enters_the_seed(noise: GPT) -> None:
    """Where all else is equal, the turn decides; a conversation that was saved goes on as it would have."""
    flat = parrot(TALK).requires_grad_(False)
    flat.head.weight.zero_()  # every token is equally likely, whatever was said
    options: dict[str, Any] = {"sampling": Sampling(temperature=1), "max_new_tokens": 12, "seed": 3}
    talk = conversation(flat, **options)
    replies = [talk.answer(talk.ask("a")).ids for _ in range(3)]
    assert len({tuple(ids) for ids in replies}) == 3
    loaded = conversation(flat, messages=talk.messages[:4], **options)
    assert loaded.answer(loaded.ask("a")).ids == replies[2]
    again = talk.answer(talk.ask_again())
    assert again.ids not in replies
    assert talk.answer(talk.ask_again()).ids not in (*replies, again.ids)
    talk.reset()
    assert [talk.answer(talk.ask("a")).ids for _ in range(3)] == replies


# ---------------------------------------------------------------------- what fits

LONG = [Message(role, f"{n} mèo và chó {role}"[: 6 + 5 * (n % 3)]) for n in range(8) for role in ("user", "assistant")]


@pytest.mark.parametrize("system", [[], [Message("system", "là")]])
@pytest.mark.parametrize("max_new_tokens", [1, 7, 16, 40, 1000])
def test_the_oldest_turns_make_room(system: list[Message], max_new_tokens: int) -> None:
    """As few of them as will do; the system message always stays, and there is always room to answer."""
    turns = [*LONG, Message("user", "nó?")]
    alone = len(prompt([*system, turns[-1]], TOKENIZER))
    lengths = [len(prompt([*system, *turns[2 * n :]], TOKENIZER)) for n in range(9)]
    seen = set()
    for context in (*range(alone - 2, alone + 30), *range(alone + 30, 2 * lengths[0] + 2, 5)):
        wanted, least = min(max_new_tokens, context // 2), min(max_new_tokens, context // 8)
        if alone + least - 1 > context:
            with pytest.raises(
                UserError, match=rf"prompt of {alone} tokens; in a context of {context} one of {context + 1 - least} "
            ):
                fit(system, turns, TOKENIZER, context, max_new_tokens)
            continue
        forgotten, ids = fit(system, turns, TOKENIZER, context, max_new_tokens)
        assert forgotten == next((n for n, length in enumerate(lengths) if length + wanted - 1 <= context), 8)
        assert ids == prompt([*system, *turns[2 * forgotten :]], TOKENIZER)
        assert fit(system, turns, TOKENIZER, context, max_new_tokens, forgotten) == (forgotten, ids)
        assert fit(system, turns, TOKENIZER, context, max_new_tokens, 8)[0] == 8  # what was forgotten stays so
        seen.add(forgotten)
    assert seen == set(range(9))


def test_a_prompt_that_just_fits_leaves_all_its_room(noise: GPT) -> None:
    """One token less of context and a turn is forgotten: the last token that is written needs no place."""
    turns = [*LONG[2:4], Message("user", "nó?")]
    length = len(prompt(turns, TOKENIZER))
    room = 64 + 1 - length
    assert 8 < room < 32
    for wanted, forgotten in ((room, 0), (room + 1, 1)):
        talk = conversation(noise, max_new_tokens=wanted, messages=turns[:-1], sampling=Sampling(temperature=1))
        talk._ends = frozenset()
        turn = talk.ask("nó?")
        assert turn.forgotten == forgotten
        assert len(talk.answer(turn).ids) == wanted


def test_a_long_conversation_goes_on(noise: GPT) -> None:
    """Every turn is answered, the system message is always read, all of it is kept; what is forgotten only grows."""
    talk = conversation(noise, max_new_tokens=10, messages=[Message("system", "là")], sampling=Sampling(temperature=1))
    counts = []
    for n in range(8):
        turn = talk.ask(f"{n} mèo")
        assert TOKENIZER.decode(turn.ids).startswith("<s>là<u>")
        assert len(turn.ids) + 10 <= 65
        assert talk.answer(turn).ids
        counts.append(talk.forgotten)
    assert counts == sorted(counts) and counts[0] == 0 and 3 < counts[-1] < 8
    assert said(talk.messages, "user") == [f"{n} mèo" for n in range(8)]
    talk.reset()
    assert (talk.forgotten, talk.messages) == (0, [Message("system", "là")])


def test_forgetting_is_told_once(run: Run, typed: Run, random: Path) -> None:
    messages = [f"{n} the cat sat" for n in range(6)]
    told = run(random, "--message", *messages, "--max-new-tokens", 10, "--seed", 0)
    line = r"\(?(note: )?the context of 64 tokens is full: the (oldest turn is|\d oldest turns are) forgotten, and .*\n"
    assert (told.code, len(re.findall(line, told.err))) == (0, 1) and re.fullmatch(line, told.err)
    assert in_json(run(random, "--message", *messages, "--max-new-tokens", 10, "--json"))["forgotten"] > 1
    shown = typed([*messages, "/reset", *messages], random, "--max-new-tokens", 10, "--seed", 0)
    assert len(re.findall(line, shown.out)) == 2  # once more after a new beginning


def test_a_message_that_does_not_fit_can_be_sent_again_shorter(run: Run, typed: Run, by_heart: Path) -> None:
    error = one_line(run(by_heart, "--message", "x" * 300))
    assert "prompt of 306 tokens; in a context of 256 one of 225 leaves room" in error
    shown = typed([QUESTIONS[0], "x" * 300, QUESTIONS[1]], by_heart, *GREEDY)
    assert "in a context of 256" in shown.out
    assert f"Assistant: {ANSWERS[0]}\n" in shown.out
    assert f"Assistant: {ANSWERS[1]}\n" in shown.out  # as if nothing had been
    assert shown.out.count("Assistant: ") == 2


# ---------------------------------------------------------------------- commands


def test_a_conversation_at_the_terminal(typed: Run, by_heart: Path) -> None:
    shown = typed(["", "   ", *QUESTIONS[:2]], by_heart, *GREEDY)
    facts, hint, talk = shown.out.split("\n", 2)
    parameters = sum(p.numel() for p in load(by_heart)[0].parameters())
    assert facts == f"{by_heart}: {parameters:,} parameters, context of 256 tokens, its own chat template"
    assert "/help" in hint
    turns = "".join(f"You: Assistant: {answer}\n" for answer in ANSWERS[:2])
    assert (shown.code, talk, shown.err) == (0, f"You: You: {turns}You: \n", "")


def test_a_base_model_is_announced(run: Run, typed: Run, base: Path) -> None:
    assert NO_TEMPLATE == (
        "this model brings no chat template and was not taught to answer; it is prompted with plain words"
        " (### User: / ### Assistant:) and will often just go on writing"
    )
    shown = typed([], base).out.splitlines()
    assert shown[0].endswith("context of 64 tokens, no chat template")
    assert shown[1] == NO_TEMPLATE
    flags = ("--max-new-tokens", 4, "--message", "a", "b")
    assert run(base, *flags).err.count(NO_TEMPLATE) == 1
    assert in_json(run(base, *flags, "--json"))["template"] is False


def test_retry_and_reset(typed: Run, random: Path, tmp_path: Path) -> None:
    """Another answer takes the place of the last one, here and in what is saved."""
    names = [tmp_path / f"{n}.json" for n in range(4)]
    one, two, three, four = (f"/save {name}" for name in names)
    lines = ["/retry", "mèo", one, "/retry", two, "/retry", three, "/reset", "/save x", "mèo", four]
    flags = ("--max-new-tokens", 8, "--seed", 0, "--temperature", 1.5)
    shown = typed(lines, random, *flags).out
    assert shown.count("(nothing was said yet)") == 2
    first, second, third, fourth = (chat.read(name)[0] for name in names)
    assert first == fourth
    assert len({said(messages)[0] for messages in (first, second, third)}) == 3
    assert all(said(messages, "user") == ["mèo"] for messages in (first, second, third))
    assert not (tmp_path / "x").exists()


def test_system(typed: Run, by_heart: Path, tmp_path: Path) -> None:
    lines = ["/system mèo ơi ", "a", f"/save {tmp_path / 'a'}", "/system", "b", f"/save {tmp_path / 'b'}"]
    shown = typed(lines, by_heart, "--max-new-tokens", 2)
    assert "(the system message is set)" in shown.out and "(there is no system message)" in shown.out
    with_system, without = (chat.read(tmp_path / name)[0] for name in "ab")
    assert with_system[0] == Message("system", "mèo ơi")
    assert without[:2] == with_system[1:]
    assert said(without, "user") == ["a", "b"]


def test_a_template_that_takes_no_system_message(run: Run, typed: Run, tmp_path: Path) -> None:
    refusing = TOKENIZER.with_template(
        Template(
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + SHORT.source, "", SHORT.end
        )
    )
    folder = saved(parrot(TALK[:2], refusing), refusing, tmp_path / "model")
    error = one_line(run(folder, "--system", "a", "--message", "a"))
    assert "chat template refuses this conversation (system, user): no system" in error
    shown = typed(["/system a", QUESTIONS[0]], folder, *GREEDY)
    assert "no system" in shown.out
    assert f"Assistant: {ANSWERS[0]}\n" in shown.out


def test_save_and_load(typed: Run, by_heart: Path, tmp_path: Path) -> None:
    """One line of JSON, the same when it is loaded and saved again; only this conversation's own file is written over."""
    path, other = tmp_path / "talk.json", tmp_path / "other.json"
    other.write_text("mine")
    shown = typed([QUESTIONS[0], f"/save {path}", QUESTIONS[1], f"/save {path}", f"/save {other}"], by_heart, *GREEDY)
    assert f"(1 turn saved in {path})" in shown.out and f"(2 turns saved in {path})" in shown.out
    assert f"({other} exists and is not overwritten; give another name)" in shown.out
    assert other.read_text() == "mine"
    assert json.loads(path.read_text()) == {"messages": [message._asdict() for message in TALK[:4]]}
    assert path.read_text().count("\n") == 1
    assert chat.read(path) == (TALK[:4], True)

    shown = typed([QUESTIONS[2], f"/save {path}"], by_heart, *GREEDY, "--load", path)
    assert "(after 2 turns)" in shown.out
    assert f"Assistant: {ANSWERS[2]}\n" in shown.out
    assert chat.read(path)[0] == TALK

    other.write_text(json.dumps({"messages": [message._asdict() for message in TALK[:4]], "source": "elsewhere"}))
    before = other.read_text()
    assert "exists and is not overwritten" in typed([f"/save {other}"], by_heart, "--load", other).out
    assert other.read_text() == before
    assert sorted(tmp_path.iterdir()) == [other, path]


def test_a_save_that_fails_changes_nothing(typed: Run, by_heart: Path, tmp_path: Path, full_disk: Callable[[int], Any]) -> None:
    path = tmp_path / "talk.json"
    chat.save(path, TALK[:2])
    with path.open(encoding="utf-8") as old:  # who reads it has the old file to the end
        chat.save(path, TALK)
        assert json.load(old) == chat.as_json(TALK[:2])
    with full_disk(100), pytest.raises(UserError, match=f"cannot write {re.escape(str(path))}: File too large"):
        chat.save(path, TALK)
    assert chat.read(path) == (TALK, True)
    shown = typed([QUESTIONS[0], "/save", f"/save {tmp_path}/no/such", f"/save {tmp_path}", QUESTIONS[1]], by_heart, *GREEDY)
    assert "/save needs the name of a file" in shown.out
    assert f"(cannot write {tmp_path}/no/such: No such file or directory)" in shown.out
    assert f"({tmp_path} exists" in shown.out
    assert f"Assistant: {ANSWERS[1]}\n" in shown.out
    assert list(tmp_path.iterdir()) == [path]


def test_help_and_quit_and_what_is_no_command(typed: Run, by_heart: Path) -> None:
    shown = typed(["/help", "/retyr", "/etc/passwd", " /quit", "/quit", QUESTIONS[0]], by_heart, "--max-new-tokens", 1).out
    assert all(f"\n  {name} " in shown.replace("You:   ", "\n  ") for name in ("/reset", "/retry", "/system", "/save", "/quit"))
    assert "(unknown command /retyr (did you mean '/retry'?); /help lists them)" in shown
    assert "(unknown command /etc/passwd; /help lists them)" in shown
    assert shown.count("Assistant: ") == 1  # " /quit" is a message
    assert shown.endswith("You: ")


def test_a_line_that_is_not_utf8_is_not_sent(typed: Run, by_heart: Path) -> None:
    shown = typed(["caf\udce9", QUESTIONS[0]], by_heart, *GREEDY)
    assert "that was not UTF-8" in shown.out
    assert shown.out.count("Assistant: ") <= 1


# ---------------------------------------------------------------------- mistakes


def one_line(result: Result) -> str:
    """The error: exit code 2 and one line on stderr, nothing on stdout."""
    assert (result.code, result.out) == (2, "")
    assert re.fullmatch("glassgpt chat: error: .*\n", result.err)
    return result.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--message", ""], ["a --message is empty"]),
        (["--message", "a", " \n"], ["a --message is empty"]),
        (["--message", "a", "--temperature", "-1"], ["temperature", "at least 0"]),
        (["--message", "a", "--max-new-tokens", "0"], ["max_new_tokens must be at least 1"]),
        (["--message", "a", "--device", "nowhere"], ["device 'nowhere'"]),
        (["--message", "a", "--load", "no/such.json"], ["cannot read the conversation no/such.json: No such file"]),
        (["--message", "a", "--load", "/"], ["cannot read the conversation /", "directory"]),
        (["--message", "caf\udce9"], ["--message is not UTF-8", r"b'caf\xe9'"]),
        (["--message", "a", "--system", "caf\udce9"], ["--system is not UTF-8"]),
    ],
)
def test_a_mistake_is_one_line(run: Run, by_heart: Path, arguments: list[str], said: list[str]) -> None:
    error = one_line(run(by_heart, *arguments))
    assert all(part in error for part in said), error


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"caf\xe9", ["not a conversation in UTF-8 JSON"]),
        (b"{", ["not a conversation in UTF-8 JSON", "expected {"]),
        (b"[" * 100_000, ["not a conversation in UTF-8 JSON"]),
        (b"[]", ['expected {"messages": [']),
        (b'{"messages": {}}', ['expected {"messages": [']),
        (b'{"messages": ["a"]}', ['expected {"messages": [']),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', ["message 1 must be of role 'user'; got 'assistant'"]),
        (b'{"messages": [{"role": "user", "content": "a"}]}', ["the last message has no answer"]),
        (
            b'{"messages": [{"role": "system", "content": "a"}, {"role": "system"}]}',
            ["message 2 must be of role 'user'; got 'system'"],
        ),
        (b'{"messages": [{"content": "a"}]}', ["message 1 must be of role 'user'; got None"]),
        (b'{"messages": [{"role": "user", "content": [1]}]}', ["message 1: content must be text; got [1]"]),
        (b'{"messages": [{"role": "system", "content": "\\ud800"}]}', ["not valid Unicode"]),
    ],
)
def test_a_file_that_is_no_conversation(run: Run, by_heart: Path, tmp_path: Path, data: bytes, said: list[str]) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(data)
    error = one_line(run(by_heart, "--load", path, "--message", "a"))
    assert all(part in error for part in said), error
    assert str(path) in error or "Unicode" in error


def test_nothing_and_bad_bytes_on_standard_input(run: Run, by_heart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for data in (b"", b"\n \n"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert "no message on standard input; give one a line, or use --message" in one_line(run(by_heart))
    monkeypatch.setattr(sys, "stdin", None)  # closed by the shell
    assert "no message on standard input" in one_line(run(by_heart))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\n\ncaf\xe9\n")))
    result = run(by_heart, "--json")
    assert "standard input: line 3 is not UTF-8 at byte 3" in one_line(result)


def test_json_at_a_terminal(typed: Run, by_heart: Path) -> None:
    assert "--json needs --message TEXT" in one_line(typed(["a"], by_heart, "--json"))


def test_unknown_model(run: Run) -> None:
    assert "no model 'no-such-model'" in one_line(run("no-such-model", "--message", "a"))


def test_ctrl_c_ends_what_is_not_typed(run: Run, by_heart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_print_piece", lambda piece: signal.raise_signal(signal.SIGINT))
    assert run(by_heart, "--message", "a", "b") == (130, "", "\ninterrupted\n")


# ---------------------------------------------------------------------- a true terminal


class Console:
    """A process on a terminal of its own."""

    def __init__(self, folder: Path, *arguments: object, **environment: str) -> None:
        self.keyboard, screen = pty.openpty()
        fcntl.ioctl(screen, termios.TIOCSWINSZ, b"\x28\x00\xc8\x00\x00\x00\x00\x00")  # 40 lines of 200 characters
        self.process = subprocess.Popen(
            [sys.executable, "-m", "glassgpt", "chat", *map(str, arguments)],
            stdin=screen,
            stdout=screen,
            stderr=screen,
            cwd=folder,
            env={name: value for name, value in os.environ.items() if name != "NO_COLOR"}
            | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "INPUTRC": "/dev/null"}
            | environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches it
        )
        os.close(screen)
        self.text = ""

    def type(self, keys: str) -> None:
        os.write(self.keyboard, keys.encode())

    def is_heard(self, seconds: float = 5) -> bool:
        """Whether something is written, or the process ends, within so many seconds."""
        return bool(select.select([self.keyboard], [], [], seconds)[0])

    def read(self) -> str:
        """What is written next; empty when the process has ended."""
        assert self.is_heard(60), self.text
        try:
            new = os.read(self.keyboard, 65536).decode(errors="replace")
        except OSError:  # the other end is closed
            return ""
        self.text += new
        return new

    def until(self, text: str) -> str:
        """All that is written up to `text`, which is taken away from the screen with what is before it."""
        while text not in self.text:
            assert self.read(), self.text
        before, _, self.text = self.text.partition(text)
        return before

    def end(self) -> int:
        """The exit code, once the process ends by itself."""
        while self.read():
            pass
        return self.process.wait(60)

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.keyboard)


def shown_text(screen: str) -> str:
    """Without the marks of styles and the terminal's line ends."""
    return re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", screen).replace("\r\n", "\n").replace("\r", "")


def test_a_true_terminal(root: Path, tmp_path: Path) -> None:
    """Streaming, Ctrl-C in an answer, editing and history, /save, Ctrl-D."""
    path = tmp_path / "talk.json"
    with Console(root, "storyteller", "--seed", 1, "--max-new-tokens", 500, "--device", "cpu") as console:
        header = console.until("You: ")
        assert "\x1b[1mstoryteller\x1b[0m: 10,183,680 parameters, context of 512 tokens, no chat template" in header
        assert NO_TEMPLATE in header
        console.type("Kể chuyện: a ship.\n")
        console.until("\x1b[1mAssistant: \x1b[0m")
        reads = 0
        while len(shown_text(console.text)) < 40:
            console.read()
            reads += 1
        assert reads > 3  # a few characters at a time
        console.type("\x03")
        answer = shown_text(console.until("(stopped)"))
        console.until("You: ")
        console.type("/hlep\n")
        console.until("did you mean '/help'?")
        console.until("You: ")
        console.type("\x1b[A\x7f\x7f\x7felp\n")  # the line before, its last three letters typed again
        console.until("/reset ")
        console.until("You: ")
        console.type(f"/save {path}\n")
        console.until("1 turn saved")
        console.until("You: ")
        console.type("\x04")
        assert console.end() == 0
    question, kept = chat.read(path)[0]
    assert question == Message("user", "Kể chuyện: a ship.")
    assert answer.replace("^C", "").rstrip("\n") == kept.content.rstrip("\n")
    assert 40 <= len(answer) < 1000  # of some 2000 that 500 tokens are


def test_a_true_terminal_without_colours(root: Path, tmp_path: Path) -> None:
    """--load, NO_COLOR, and Ctrl-C where nothing is being answered."""
    path = tmp_path / "talk.json"
    chat.save(path, TALK[:2])
    with Console(root, "storyteller", "--load", path, "--max-new-tokens", 4, "--device", "cpu", NO_COLOR="1") as console:
        screen = console.until("You: ")
        assert "(after 1 turn)" in screen
        console.type("And then?\n")
        screen += console.until("cut off after 4 tokens by --max-new-tokens") + console.until("You: ")
        assert "Assistant: " in screen
        console.type("\x03")
        if not console.is_heard():  # Python's line editor misses a signal that comes just before it waits
            console.type("\x03")
        assert console.end() == 0
        assert not re.search(r"\x1b\[[0-9;]*m", screen + console.text)
        assert "Traceback" not in console.text and "interrupted" not in console.text


def test_what_would_command_a_terminal_is_only_shown(by_heart: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pictures of control characters on the screen, the characters themselves in the conversation."""
    evil = [TALK[0], Message("assistant", "\x1b[31m red\x07\r\x9b\ttab\n.")]
    folder = saved(parrot(evil), TOKENIZER, tmp_path / "model")
    for is_terminal in (True, False):
        screen = io.StringIO()
        monkeypatch.setattr(screen, "isatty", lambda is_terminal=is_terminal: is_terminal)
        monkeypatch.setattr(sys, "stdout", screen)
        assert main(["chat", str(folder), "--message", QUESTIONS[0], "--temperature", "0"]) == 0
        assert screen.getvalue() == ("␛[31m red␇␍�\ttab\n.\n" if is_terminal else evil[1].content + "\n")


def test_the_library_answers_the_same(noise: GPT) -> None:
    """Whole prompts through `complete` and turns of a conversation, with one generator's seed."""
    talk = conversation(noise, PLAIN, sampling=Sampling(temperature=0), max_new_tokens=6)
    reply = talk.answer(talk.ask("mèo"))
    text = "### User:\nmèo\n\n### Assistant:\n"
    assert PLAIN.encode(text) == prompt([Message("user", "mèo")], PLAIN)
    (expected,) = complete(noise, PLAIN, [text], Sampling(temperature=0), max_new_tokens=6, seed=0)
    assert reply.ids == [token.id for token in expected.tokens]
    assert (reply.text, reply.finish_reason) == (expected.text, expected.finish_reason)


def test_a_message_without_an_answer_is_not_saved(tmp_path: Path) -> None:
    """`sft` reads what is saved, and an empty answer teaches nothing."""
    from glassgpt.data.records import read as read_records
    from glassgpt.generation.chat import read, save

    said = [("system", "Be kind."), ("user", "Hi"), ("assistant", ""), ("user", "Hello"), ("assistant", "Hello!")]
    messages = [Message(role, content) for role, content in said]
    save(tmp_path / "talk.json", messages)
    kept = [messages[0], *messages[3:]]
    assert read(tmp_path / "talk.json")[0] == kept
    assert list(read_records([str(tmp_path / "talk.json")])[0].messages) == kept
