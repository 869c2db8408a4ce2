"""`glassgpt bench speculative`: the ways it times, and what it refuses."""

from __future__ import annotations

import json

import pytest
from tiny import Run, caller

OPTIONS = ("--quoted_tokens", 40, "--again_tokens", 10, "--new_tokens", 24, "--repeats", 2)


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Run:
    call = caller("bench", capsys)
    return lambda *arguments: call("speculative", *arguments)


def test_every_way_writes_the_same_greedy_text(bench: Run) -> None:
    done = bench("storyteller", *OPTIONS, "--drafts", "storyteller", "--lookups", 2, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert {way["prompt"] for way in found["ways"]} == {"story begun", "quotation"}
    assert len(found["ways"]) == 2 * 2 * 3
    for way in found["ways"]:
        assert way["same_text"] is (True if way["temperature"] == 0 else None)
        assert len(way["seconds"]) == 2 and way["tokens_per_second"] > 0
        assert way["ratio"] == 1 or way["name"] != "plain"
        if way["name"] == "storyteller" and way["temperature"] == 0:  # its own draft is always right
            assert way["acceptance"] == 1 and way["tokens_a_pass"] > 2


def test_the_table_names_prompts_and_ways(bench: Run) -> None:
    done = bench("storyteller", *OPTIONS, "--lookups", 3, "--temperatures", 0)
    assert done.code == 0 and "lookup 3" in done.out and "quotation, " in done.out and "accepted" in done.out


def test_bad_input_is_one_line(bench: Run) -> None:
    for arguments, message in (
        (("--quoted_tokens", 4000), "does not fit the context"),
        (("--drafts", "induction"), "another tokenizer"),
        (("--temperatures", -1), "at least 0"),
        (("--lookups", 0), "lookups must be at least 1"),
    ):
        done = bench("storyteller", *arguments)
        assert done.code == 2 and message in done.err and done.err.count("\n") == 1, done.err
