"""Records to tokens to batches: what is learnt, what is left out, and that packing changes nothing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from stages import LORA, run, settings

from glassgpt.config import ModelConfig, UserError
from glassgpt.config.tuning import DataInspect, Sft
from glassgpt.data.records import read
from glassgpt.loading import load
from glassgpt.model import GPT, weights
from glassgpt.text import Tokenizer, chat
from glassgpt.train.loss import IGNORE, Scored, token_loss
from glassgpt.tuning import examples
from glassgpt.tuning.data_inspect import data_inspect
from glassgpt.tuning.examples import Example, Order, collate, fit


def example(question: int, answer: int, name: str = "here") -> Example:
    """So many tokens of instruction, then so many of response; the last one, 0, ends it."""
    draw = np.random.default_rng(question * 1000 + answer)
    ids = [*draw.integers(1, 50, question + answer - 1).tolist(), 0]
    return Example(ids, [False] * question + [True] * answer, name)


# ---------------------------------------------------------------------- which ones fit


def test_dropping_is_told_of() -> None:
    audit = fit([example(5, 5), example(5, 6), example(11, 1)], 10, "drop", [0])
    assert len(audit.examples) == 1 and audit.dropped == Counter({"too long": 2}) and audit.truncated == 0
    assert (audit.supervised, audit.masked, audit.ended) == (5, 5, 1)


def test_truncating_cuts_the_response_and_never_the_instruction() -> None:
    audit = fit([example(5, 5), example(6, 9), example(10, 3), example(12, 3)], 10, "truncate", [0])
    assert [(e.n_instruction, e.n_response) for e in audit.examples] == [(5, 5), (6, 4)]
    assert audit.truncated == 1 and audit.ended == 1  # what is cut does not learn to stop there
    assert audit.dropped == Counter({"its instruction alone is too long": 2})


def test_truncating_leaves_no_instruction_without_its_answer() -> None:
    turns = Example([1] * 12, [False] * 3 + [True] * 2 + [False] * 4 + [True] * 3, "here")
    assert fit([turns], 8, "truncate", [0]).examples[0].ids == [1] * 5
    assert fit([turns], 11, "truncate", [0]).examples[0].ids == [1] * 11


def test_error_names_the_place_and_both_lengths() -> None:
    with pytest.raises(UserError, match=r"file.json, record 7: 6 tokens of instruction and 9 of response are more than 10"):
        fit([example(6, 9, "file.json, record 7")], 10, "error", [0])


def test_nothing_to_learn_is_refused() -> None:
    silent = Example([1, 2, 3], [False] * 3, "here")
    with pytest.raises(UserError, match=r"of 2 examples none is left \(1 nothing to learn in it, 1 too long\)"):
        fit([silent, example(6, 9)], 10, "drop", [0])
    assert len(fit([silent, example(2, 2)], 10, "drop", [0]).examples) == 1


# ---------------------------------------------------------------------- batches


def test_targets_are_the_next_tokens_of_the_response() -> None:
    one = Example([7, 8, 9, 0], [False, False, True, True], "here")
    batch = collate([[one]])
    assert batch.ids.tolist() == [[7, 8, 9]] and batch.targets.tolist() == [[IGNORE, 9, 0]]
    assert batch.weights.tolist() == [[0, 1, 1]] and batch.count == 2 and batch.segments is None
    weighted = collate([[one]], 0.25)
    assert weighted.targets.tolist() == [[8, 9, 0]] and weighted.weights.tolist() == [[0.25, 1, 1]] and weighted.count == 2.25
    each = collate([[one], [example(1, 9)]], 0.0, "example")
    assert each.weights.sum(1).tolist() == pytest.approx([1, 1]) and each.count == pytest.approx(2)


lengths_of = st.lists(st.integers(2, 30), min_size=1, max_size=60)


@given(lengths_of, st.integers(0, 5), st.integers(30, 64))
def test_packing_visits_every_example_once_and_never_overfills(lengths: list[int], seed: int, room: int) -> None:
    order = Order(tuple(lengths), seed, room)
    rows = order.rows(0, order.rows_per_epoch())
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] - 1 for index in row) <= room for row in rows)


@given(lengths_of, st.sampled_from([None, 40]), st.integers(0, 7))
def test_a_step_is_the_same_rows_however_it_is_shared_out(lengths: list[int], room: int | None, step: int) -> None:
    order = Order(tuple(lengths), 1, room)
    whole = order.share(step, 0, 0, 8, 1, 1)
    assert [row for micro in range(8) for row in order.share(step, micro, 0, 1, 8, 1)] == whole
    assert [row for rank in (0, 1) for micro in (0, 1) for row in order.share(step, micro, rank, 2, 2, 2)] == whole


def test_epochs_differ_and_follow_from_the_seed() -> None:
    order = Order((5,) * 40, 0)
    first, second = order.rows(0, 40), order.rows(40, 40)
    assert sorted(first) == sorted(second) and first != second
    assert Order((5,) * 40, 0).rows(35, 10) == first[35:] + second[:5] and Order((5,) * 40, 1).rows(0, 40) != first


def test_packed_is_unpacked(tokenizer: Tokenizer) -> None:
    """Loss and every gradient to 1e-10 in float64, for positions of every kind that a network may have."""
    some = [example(3, 4), example(2, 6), example(5, 2), example(1, 3), example(4, 4)]
    for config in (
        ModelConfig(60, 32, 2, 2, 16),
        ModelConfig(60, 32, 2, 2, 16, position="rope", n_kv_head=1, norm="rms", mlp="swiglu"),
        ModelConfig(60, 32, 2, 2, 16, position="alibi", spans=("window", "full"), window_tokens=4),
    ):
        torch.manual_seed(0)
        scored = Scored(GPT(config)).double()
        with torch.no_grad():
            for parameter in scored.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        found = []
        for rows in ([[e] for e in some], [some[:2], some[2:]], [some]):
            scored.zero_grad()
            batch = collate(rows, 0.3)
            loss = scored(batch.ids, batch.targets, batch.segments, weights=batch.weights) / batch.count
            loss.backward()
            found.append([loss.detach(), *(p.grad.clone() for p in scored.parameters() if p.grad is not None)])
        for packed in found[1:]:
            for a, b in zip(found[0], packed, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
        # the mutant that peers ship: examples that see one another
        batch = collate([some], 0.3)
        loss = scored(batch.ids, batch.targets, None, weights=batch.weights) / batch.count
        assert abs((loss - found[0][0]).item()) > 1e-4


def test_weighted_loss_is_the_plain_maths() -> None:
    torch.manual_seed(0)
    scored = Scored(GPT(ModelConfig(60, 32, 2, 2, 16))).double()
    batch = collate([[example(3, 4)], [example(6, 2)]], 0.2, "example")
    logits = scored.model(batch.ids)
    each = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="none")
    wanted = (each * batch.weights.flatten()).sum()
    mine = scored(batch.ids, batch.targets, weights=batch.weights)
    torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-12)
    ours, theirs = (torch.autograd.grad(loss, list(scored.parameters())) for loss in (mine, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    plain = scored(batch.ids, batch.targets, weights=torch.ones_like(batch.weights))
    torch.testing.assert_close(plain, token_loss(logits, batch.targets).sum, rtol=0, atol=1e-11)


# ---------------------------------------------------------------------- against transformers


def test_sft_is_what_transformers_computes(home: Path, tmp_path: Path) -> None:
    """One step of plain gradient descent's loss on real records: their labels, their mean over the step."""
    import transformers

    model, tokenizer = load(home / "model", dtype=torch.float64)
    weights.save_hf(model, tmp_path, tokenizer.end_id)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    some = examples.conversations(read([str(home / "chats.jsonl")])[:6], tokenizer, "chat")
    batch = collate([[e] for e in some])
    ids, labels = (torch.full((6, max(len(e.ids) for e in some)), fill) for fill in (0, IGNORE))
    for row, e in enumerate(some):
        ids[row, : len(e.ids)] = torch.tensor(e.ids)
        labels[row, : len(e.ids)] = torch.where(torch.tensor(e.mask), torch.tensor(e.ids), IGNORE)
    found = oracle(ids, labels=labels)
    theirs = F.cross_entropy(found.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    mine = Scored(model)(batch.ids, batch.targets, weights=batch.weights) / batch.count
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    assert mine.item() == pytest.approx(found.loss.item(), abs=1e-5)  # its own is float32
    mean_of_means = torch.stack([F.cross_entropy(x[:-1], y[1:]) for x, y in zip(found.logits, labels, strict=True)]).mean()
    assert abs((mean_of_means - theirs).item()) > 1e-4  # the usual mistake


# ---------------------------------------------------------------------- training is serving


def test_the_string_that_is_trained_on_is_the_one_that_is_served(home: Path, tmp_path: Path) -> None:
    """After `sft` the run's own template asks for an answer exactly as the training text had it, to the byte and to the id."""
    folder = run("sft", home, tmp_path / "run", max_steps=1)
    _, tokenizer = load(folder)
    assert tokenizer.template is not None
    for record in read([str(home / "chats.jsonl")]):
        whole, asked = chat.text_of(record.messages, tokenizer), chat.text_of(record.prompt, tokenizer, reply=True)
        assert whole.encode().startswith(asked.encode())
        assert whole == f"{asked}{record.messages[-1].content}{tokenizer.end_token}"
        encoded, served = chat.render(record.messages, tokenizer), chat.prompt(record.prompt, tokenizer)
        assert encoded.ids[: len(served)] == served and not any(encoded.mask[: len(served)])
        assert all(encoded.mask[len(served) :]) and encoded.ids[-1] == tokenizer.end_id


def test_plain_text_goes_without_template(home: Path, tmp_path: Path) -> None:
    _, tokenizer = load(home / "model")
    (record, *_) = read([str(home / "chats.jsonl")])
    ids, mask = examples.encode(record.prompt, record.messages[-1:], tokenizer, "none")
    assert tokenizer.decode(ids[:-1]) == record.prompt[0].content + record.messages[-1].content and ids[-1] == tokenizer.end_id
    assert mask == [False] * len(tokenizer.encode(record.prompt[0].content)) + [True] * (len(ids) - mask.count(False))
    config = settings("sft", home, tmp_path / "run", max_steps=1)
    assert isinstance(config, Sft)


@pytest.mark.parametrize("given", ["answer", "weighted:", "weighted:-1", "weighted:nan", "response:1"])
def test_a_loss_that_is_none_is_refused(given: str) -> None:
    with pytest.raises(UserError, match=r"loss must be response, full or weighted:W"):
        Sft(loss=given)


# ---------------------------------------------------------------------- inspect


def test_inspect_counts_what_is_there_with_pictures(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config: dict[str, Any] = {"files": (str(home / "chats.jsonl"),), "model": str(home / "model")}
    found = data_inspect(DataInspect(**config, chart=str(tmp_path / "lengths.png")))
    out = capsys.readouterr().out
    _, tokenizer = load(home / "model")
    every = examples.conversations(read([str(home / "chats.jsonl")]), tokenizer, "chat")
    assert found["tokens_learnt"] == sum(sum(e.mask) for e in every) and found["texts"] == 40
    assert found["tokens_only_read"] == sum(len(e.ids) for e in every) - found["tokens_learnt"]
    assert found["A"]["mean"] == pytest.approx(np.mean([sum(e.mask) for e in every]), abs=0.005)
    assert found["end_token_learnt"] == 40 and (tmp_path / "lengths.png").stat().st_size > 1000
    assert out.count("⟦") == out.count("⟧") == 5 and "chats.jsonl, line 1" in out
    data_inspect(DataInspect(**config, json=True))
    assert json.loads(capsys.readouterr().out)["tokens_learnt"] == found["tokens_learnt"]
    short = data_inspect(DataInspect(**config, max_tokens=20, show=0))
    assert short["dropped"]["too long"] == 40 - short["texts"] > 0
    for name, texts, learnt in (("pairs", 80, True), ("prompts", 40, False)):
        found = data_inspect(DataInspect(files=(str(home / f"{name}.jsonl"),), model=str(home / "model"), show=1))
        assert found["texts"] == texts and bool(found["tokens_learnt"]) == learnt


def test_two_equal_answers_are_left_out_and_told_of(home: Path) -> None:
    _, tokenizer = load(home / "model")
    (one, other, *_) = examples.pairs(read([str(home / "pairs.jsonl")]), tokenizer, "chat")
    tie = examples.Pair(one.chosen, one.chosen)
    kept, audit = examples.fit_together([one, tie, other], 64, "drop", [0])
    assert [number for number, _ in kept] == [0, 2] and audit.dropped == Counter({"two equal answers": 1})
    assert len(audit.examples) == 4
    long = examples.Pair(one.chosen, example(30, 60))  # an item goes as a whole
    kept, audit = examples.fit_together([long, other], 64, "drop", [0])
    assert [number for number, _ in kept] == [1] and audit.dropped == Counter({"too long": 1}) and len(audit.examples) == 2


def test_an_exported_run_is_served_by_others_as_it_was_trained(home: Path, tmp_path: Path) -> None:
    """transformers renders the template of an exported run to our string and to our ids, and ends where we do."""
    import transformers

    from glassgpt.config.hub import Export
    from glassgpt.exporting import export

    folder = run("sft", home, tmp_path / "run", max_steps=1)
    export(Export(str(folder), str(tmp_path / "hf"), to="hf"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    _, tokenizer = load(folder)
    spoken = [chat.Message("user", "the cat"), chat.Message("assistant", "sat"), chat.Message("user", "and then?")]
    plain = [message._asdict() for message in spoken]
    text = theirs.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    assert text == chat.text_of(spoken, tokenizer, reply=True)
    ids = theirs.apply_chat_template(plain, add_generation_prompt=True)["input_ids"]
    assert ids == chat.prompt(spoken, tokenizer)
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == chat.end_ids(tokenizer)[0]


def test_runs_lists_every_stage(home: Path, tmp_path: Path) -> None:
    from glassgpt.config.runs import Runs
    from glassgpt.train.runs import runs

    for stage, more in (("sft", {"lora": LORA}), ("reward", {}), ("dpo", {}), ("ppo", {}), ("grpo", {})):
        run(stage, home, tmp_path / stage, max_steps=2, **more)
    found = {one.name.rpartition("/")[2]: one for one in runs(Runs((str(tmp_path),), json=True))}
    assert set(found) == {"sft", "reward", "dpo", "ppo", "grpo"} and {one.state for one in found.values()} == {"done"}
    assert all(one.parameters == 37_120 for one in found.values())
