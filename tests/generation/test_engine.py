"""Prompts to text: the engine against a loop without cache and `transformers`, in batches of every kind."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VIETNAMESE, disturbed, few_merges, random_ids, scripted
from transformers import GPT2Config, GPT2LMHeadModel

from glassgpt.config import ModelConfig, UserError
from glassgpt.config.generate import Sampling
from glassgpt.generation import Completion, Token, complete, stream
from glassgpt.generation.engine import fit
from glassgpt.generation.generator import Generator
from glassgpt.generation.sampling import penalised
from glassgpt.generation.writer import StopText
from glassgpt.model import GPT, weights

TOKENIZER = few_merges()
CONFIG = ModelConfig(TOKENIZER.vocab_size, context_tokens=24, n_layer=2, n_head=2, width=16)
GREEDY = Sampling(temperature=0)
FREE = Sampling()
PENALTIES = Sampling(repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2)
SETTINGS = [
    GREEDY,
    FREE,
    Sampling(temperature=0.9, top_k=60, top_p=0.9, min_p=0.01),
    dataclasses.replace(PENALTIES, temperature=1.1, top_p=0.95),
]
EXACT = 1e-10
PROMPTS = ["the cat", "Một chú mèo", "7", "trà, the other mat"]  # four lengths


@pytest.fixture(scope="module")
def model() -> GPT:
    model = disturbed(CONFIG)
    with torch.no_grad():
        model.token_embedding.weight[TOKENIZER.end_id] *= 2  # tied: the end of the text becomes likely enough to happen
    return model


def logits_after(model: GPT, ids: Sequence[int]) -> torch.Tensor:
    """Logits (V,) of what follows, from one whole forward pass."""
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, -1]


def greedy(model: GPT, prompt: Sequence[int], tokens: int, sampling: Sampling = GREEDY) -> list[int]:
    """The likeliest token after each whole forward pass, with penalties from counts; no cache."""
    written: list[int] = []
    for _ in range(tokens):
        logits = logits_after(model, [*prompt, *written])[None]
        seen, counts = torch.zeros_like(logits, dtype=torch.bool), torch.zeros_like(logits)
        seen[0, [*prompt, *written]] = True
        for token, count in Counter(written).items():
            counts[0, token] = count
        written.append(int(penalised(logits, sampling, seen, counts).argmax()))
    return written


def run(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling = GREEDY,
    max_new_tokens: int = 100,
    ends: Callable[[Token], bool] = lambda token: False,
    seeds: Sequence[int] | None = None,
    n_top: int = 0,
) -> list[list[Token]]:
    """The tokens of each row."""
    generators = [Generator(seed) for seed in seeds or range(len(prompts))]
    rows: list[list[Token]] = [[] for _ in prompts]
    for token in stream(model, prompts, sampling, generators, max_new_tokens, ends, n_top):
        rows[token.row].append(token)
    return rows


def ids_of(tokens: Sequence[Token]) -> list[int]:
    return [token.id for token in tokens]


def write(model: GPT, prompts: Sequence[str], sampling: Sampling = FREE, **options: object) -> list[Completion]:
    given_or_usual: dict[str, Any] = {"max_new_tokens": 100, "seed": 5} | options
    return complete(model, TOKENIZER, prompts, sampling, **given_or_usual)


# ---------------------------------------------------------------------- the right tokens


@pytest.mark.parametrize("lengths", [(5,), (5, 5), (9, 2, 1, 6)])
def test_greedy_is_argmax_of_the_whole_text(model: GPT, lengths: tuple[int, ...]) -> None:
    """Alone and in a batch padded on the left, without a cache the same tokens come."""
    prompts = [random_ids(CONFIG, n, seed=n).tolist() for n in lengths]
    assert [ids_of(tokens) for tokens in run(model, prompts, max_new_tokens=15)] == [
        greedy(model, prompt, 15) for prompt in prompts
    ]


@pytest.mark.parametrize("name", ["repetition_penalty", "presence_penalty", "frequency_penalty", "all"])
def test_penalties_look_at_the_text_so_far(model: GPT, name: str) -> None:
    """Counted step by step, also for rows that others have left: the same as counting each text from the start."""
    sampling = dataclasses.replace(PENALTIES, temperature=0)
    if name != "all":
        sampling = dataclasses.replace(GREEDY, **{name: 1.7})
    prompts = [random_ids(CONFIG, n, seed=n).tolist() for n in (18, 3, 5)]
    expected = [greedy(model, prompt, 25 - len(prompt), sampling) for prompt in prompts]
    assert [ids_of(tokens) for tokens in run(model, prompts, sampling)] == expected
    assert expected != [greedy(model, prompt, 25 - len(prompt)) for prompt in prompts]


def hugging_face(model: GPT) -> GPT2LMHeadModel:
    """`transformers`' GPT-2 with the same weights."""
    oracle = GPT2LMHeadModel(GPT2Config(**weights.config_to_hf(model.config, None, torch.float64))).double().eval()
    missing, unexpected = oracle.load_state_dict(weights.hf_tensors(model), strict=False)
    assert missing == ["lm_head.weight"]  # tied
    assert not unexpected
    return oracle


@pytest.mark.parametrize("with_end", [False, True])
def test_greedy_is_that_of_transformers(model: GPT, with_end: bool) -> None:
    """The same tokens as `generate(do_sample=False)` on a padded batch, also where a row ends before the others."""
    oracle = hugging_face(model)
    prompts = [random_ids(CONFIG, n, seed=n).tolist() for n in (9, 2, 6)]
    longest = max(map(len, prompts))
    end = greedy(model, prompts[1], 4)[-1] if with_end else -1
    theirs = oracle.generate(
        torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts]),
        attention_mask=torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]),
        do_sample=False,
        max_new_tokens=12,
        pad_token_id=0,
        eos_token_id=end if with_end else None,
    )[:, longest:].tolist()
    ours = [ids_of(tokens) for tokens in run(model, prompts, max_new_tokens=12, ends=lambda token: token.id == end)]
    steps = max(map(len, ours))
    assert [ids + [0] * (steps - len(ids)) for ids in ours] == theirs
    assert (min(map(len, ours)) < steps) == with_end


@pytest.mark.parametrize("sampling", SETTINGS)
def test_log_probabilities_are_the_models_own(model: GPT, sampling: Sampling) -> None:
    """log softmax of the whole forward pass, whatever the sampling; alternatives are the largest, in order."""
    prompts = [random_ids(CONFIG, n, seed=n).tolist() for n in (20, 3, 7)]
    for prompt, tokens in zip(prompts, run(model, prompts, sampling, n_top=5), strict=True):
        text = list(prompt)
        for token in tokens:
            expected = logits_after(model, text).log_softmax(-1)
            assert token.logprob == pytest.approx(float(expected[token.id]), abs=EXACT)
            largest = expected.sort(descending=True)
            assert [token_id for token_id, _ in token.top] == largest.indices[:5].tolist()
            assert [value for _, value in token.top] == pytest.approx(largest.values[:5].tolist(), abs=EXACT)
            text.append(token.id)


def test_as_many_alternatives_as_there_are_tokens(model: GPT) -> None:
    (tokens,) = run(model, [[1, 2]], max_new_tokens=2, n_top=10_000)
    assert [len(token.top) for token in tokens] == [CONFIG.vocab_size] * 2
    assert math.fsum(math.exp(value) for _, value in tokens[0].top) == pytest.approx(1, abs=EXACT)
    assert all(not token.top for token in run(model, [[1, 2]], max_new_tokens=2)[0])


@pytest.mark.parametrize("sampling", SETTINGS)
def test_ids_without_a_token_are_never_written(sampling: Sampling) -> None:
    """A vocabulary padded to a round number, as some published models have: its spare rows are no text."""
    padded = disturbed(dataclasses.replace(CONFIG, vocab_size=320))
    completions = write(padded, PROMPTS, sampling, n=5, n_top=500)
    assert max(token.id for completion in completions for token in completion.tokens) < TOKENIZER.vocab_size
    assert {len(token.top) for completion in completions for token in completion.tokens} == {TOKENIZER.vocab_size}
    free = run(padded, [TOKENIZER.encode("the cat")] * 5, FREE)
    assert max(token.id for tokens in free for token in tokens) >= TOKENIZER.vocab_size  # it would have happened


# ---------------------------------------------------------------------- seeds and batch-mates


def test_equal_seeds_equal_text(model: GPT) -> None:
    """Also the n-th of a prompt, however many are asked for; other seeds and numbers give other texts."""
    three = [completion.text for completion in write(model, ["the cat"], n=3)]
    assert three == [completion.text for completion in write(model, ["the cat"], n=3)]
    assert three[:2] == [completion.text for completion in write(model, ["the cat"], n=2)]
    assert len(set(three)) == 3
    assert not set(three) & {completion.text for completion in write(model, ["the cat"], n=3, seed=6)}


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1, 10**30])
def test_any_whole_number_is_a_seed(model: GPT, seed: int) -> None:
    once, again = (write(model, ["the cat"], seed=seed)[0].text for _ in range(2))
    assert once == again


def same(one: Completion, other: Completion) -> bool:
    """The same in every token, log-probabilities up to the rounding of float64."""
    if (one.prompt, one.text, one.finish_reason) != (other.prompt, other.text, other.finish_reason):
        return False
    pairs = list(zip(one.tokens, other.tokens, strict=True))
    return all(a.id == b.id and abs(a.logprob - b.logprob) < EXACT for a, b in pairs)


@pytest.mark.parametrize("sampling", SETTINGS)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 0, 1), (1, 3)])
def test_a_batch_mate_never_changes_a_text(model: GPT, sampling: Sampling, order: tuple[int, ...]) -> None:
    """Two texts of each prompt, among others of other lengths, in any order: what they are alone."""
    alone = {prompt: write(model, [prompt], sampling, n=2) for prompt in PROMPTS}
    prompts = [PROMPTS[i] for i in order]
    together = write(model, prompts, sampling, n=2)
    assert [completion.prompt for completion in together] == [prompt for prompt in prompts for _ in range(2)]
    for place, completion in enumerate(together):
        assert same(completion, alone[prompts[place // 2]][place % 2])


@pytest.mark.parametrize("sampling", SETTINGS[1:])
def test_nor_does_a_mate_that_stops_early(model: GPT, sampling: Sampling) -> None:
    """Some rows meet a stop text or the end token, the others write on as if alone."""
    reasons: Counter[str] = Counter()
    for seed in range(5):
        free = {prompt: write(model, [prompt], sampling, seed=seed)[0] for prompt in PROMPTS}
        stop = [next((c for c in free["7"].text[2:6] if c != "�"), "x")]  # the row "7" meets it within a few tokens
        alone = [write(model, [prompt], sampling, seed=seed, stop=stop)[0] for prompt in PROMPTS]
        together = write(model, PROMPTS, sampling, seed=seed, stop=stop)
        assert all(map(same, together, alone))
        reasons.update(completion.finish_reason for completion in together)
    assert {"stop", "end", "context"} <= set(reasons)  # all of it has happened


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 24), st.integers(1, 24)), min_size=1, max_size=5), st.sampled_from(SETTINGS))
def test_rows_leave_at_any_step(rows: list[tuple[int, int]], sampling: Sampling) -> None:
    """Prompts of any length, each row leaving after its own number of tokens or with the context full: as if alone.

    Long rows that leave first are the hard case: the padding of those that stay must shrink, or it would push them out
    of the context.
    """
    model = disturbed(CONFIG)
    prompts = [random_ids(CONFIG, length, seed=10 * length + i).tolist() for i, (length, _) in enumerate(rows)]
    counts: Counter[int] = Counter()

    def ends(token: Token) -> bool:
        counts[token.row] += 1
        return counts[token.row] == rows[token.row][1]

    together = run(model, prompts, sampling, ends=ends)
    for i, (length, leave) in enumerate(rows):
        (alone,) = run(model, [prompts[i]], sampling, max_new_tokens=leave, seeds=[i])
        assert ids_of(together[i]) == ids_of(alone)
        assert len(alone) == min(leave, CONFIG.context_tokens - length + 1)


def test_a_short_row_runs_on_after_a_long_one_is_full(model: GPT) -> None:
    """20 and 3 tokens in a context of 24: the long row leaves after 5 tokens, the short one writes 22 as if alone."""
    prompts = [random_ids(CONFIG, n, seed=n).tolist() for n in (20, 3)]
    long, short = run(model, prompts, FREE)
    assert (len(long), len(short)) == (5, 22)
    assert ids_of(short) == ids_of(run(model, prompts[1:], FREE, seeds=[1])[0])


def test_tokens_come_step_by_step_rows_in_order(model: GPT) -> None:
    """Two rows take turns until the longer prompt has filled the context."""
    generators = [Generator() for _ in range(2)]
    order = [token.row for token in stream(model, [[1] * 22, [1] * 20], FREE, generators, 100)]
    assert order == [0, 1] * 3 + [1] * 2


# ---------------------------------------------------------------------- room and reasons


def prompt_of(tokens: int) -> str:
    text = "7" * tokens
    assert len(TOKENIZER.encode(text)) == tokens
    return text


@pytest.mark.parametrize(
    ("length", "max_new_tokens", "written", "reason"),
    [
        (20, 100, 5, "context"),
        (20, 5, 5, "length"),
        (20, 4, 4, "length"),
        (24, 100, 1, "context"),
        (1, 24, 24, "length"),
    ],
)
def test_the_context_is_filled_exactly(length: int, max_new_tokens: int, written: int, reason: str) -> None:
    """The last token may look at a full context; it needs no room itself. (A model that never ends by itself.)"""
    model = disturbed(CONFIG)
    (completion,) = write(model, [prompt_of(length)], GREEDY, max_new_tokens=max_new_tokens, ignore_end=True)
    assert (len(completion.tokens), completion.finish_reason) == (written, reason)
    assert ids_of(completion.tokens) == greedy(model, TOKENIZER.encode(prompt_of(length)), written)


@pytest.mark.parametrize("length", [25, 300])
def test_a_prompt_longer_than_the_context_says_both_numbers(model: GPT, length: int) -> None:
    said = f"the prompt has {length} tokens and the context is 24; .*--overflow drop-oldest"
    with pytest.raises(UserError, match=said):
        write(model, ["the cat", prompt_of(length)])
    with pytest.raises(UserError, match=said):
        run(model, [[7] * length])


def test_an_empty_prompt_is_refused(model: GPT) -> None:
    with pytest.raises(UserError, match="prompt is empty"):
        write(model, ["the cat", ""])
    with pytest.raises(UserError, match="prompt is empty"):
        run(model, [[]])


@given(st.lists(st.integers(0, 60), min_size=1, max_size=60))
def test_drop_oldest_keeps_the_last_tokens(ids: list[int]) -> None:
    assert fit(ids, 24, keep_tokens=20) == (ids if len(ids) <= 24 else ids[-20:])


def test_a_long_prompt_without_its_oldest_tokens(model: GPT) -> None:
    """Is continued as its end alone would be, with room for the new tokens; one that fits is left whole."""
    prompt = "the cat sat " + prompt_of(23)
    long, rest = write(model, [prompt, prompt_of(23)], drop_oldest=True)  # 100 new tokens: half the context is kept
    (expected,) = run(model, [TOKENIZER.encode(prompt)[-12:]], seeds=[5 * 1_000_003], sampling=FREE)
    assert ids_of(long.tokens) == ids_of(expected)
    assert (len(long.tokens), len(rest.tokens)) == (13, 2)
    long, _ = write(model, [prompt, prompt_of(23)], drop_oldest=True, max_new_tokens=5)
    (expected,) = run(model, [TOKENIZER.encode(prompt)[-20:]], seeds=[5 * 1_000_003], sampling=FREE, max_new_tokens=5)
    assert ids_of(long.tokens) == ids_of(expected)


def test_damaged_weights_are_named(model: GPT) -> None:
    damaged = GPT(CONFIG).double().eval()
    damaged.load_state_dict(model.state_dict())
    damaged.norm_f.bias.data[0] = math.nan
    with pytest.raises(UserError, match="not numbers"):
        run(damaged, [[1, 2]])


# ---------------------------------------------------------------------- text: stops, ends, broken characters


def dictate(text: str, **options: object) -> tuple[Completion, list[str]]:
    """What becomes of a text that the model writes token by token, and the pieces in which it was shown."""
    pieces: list[str] = []
    ids = TOKENIZER.encode(text, allow_special=True)
    (completion,) = write(
        scripted(TOKENIZER, ids),
        ["7"],
        GREEDY,
        **({"max_new_tokens": len(ids), "show": lambda row, piece: pieces.append(piece)} | options),
    )
    return completion, pieces


def test_a_dictated_text_is_written_in_whole_characters() -> None:
    """Characters are spread over tokens here; every piece shown is whole, and the pieces are the text."""
    completion, pieces = dictate(VIETNAMESE)
    assert completion.text == VIETNAMESE
    assert "".join(pieces) == VIETNAMESE
    assert not any("�" in piece or piece == "" for piece in pieces)
    assert len(VIETNAMESE) * 0.7 < len(pieces) < len(completion.tokens)
    assert any("�" in TOKENIZER.decode([token.id]) for token in completion.tokens)


@pytest.mark.parametrize("sampling", SETTINGS)
def test_pieces_are_the_text_and_the_text_is_the_tokens(model: GPT, sampling: Sampling) -> None:
    """Also for the noise of a random model, whose bytes are often no characters at all."""
    for seed in range(4):
        shown: dict[int, str] = {}
        for row, completion in enumerate(
            write(model, PROMPTS, sampling, seed=seed, show=lambda row, p, s=shown: s.update({row: s.get(row, "") + p}))
        ):
            assert shown.get(row, "") == completion.text
            ids = [token.id for token in completion.tokens if token.id != TOKENIZER.end_id]
            assert completion.text == TOKENIZER.decode(ids)
            assert (completion.tokens[-1].id == TOKENIZER.end_id) == (completion.finish_reason == "end")


def test_a_text_cut_inside_a_character_shows_it_once_as_broken() -> None:
    """Nothing more can come, so the rest is released: one replacement character, as `decode` gives."""
    ids = TOKENIZER.encode("mèo 🐈")
    completion, pieces = dictate("mèo 🐈", max_new_tokens=len(ids) - 1)
    assert completion.text == "".join(pieces) == TOKENIZER.decode(ids[:-1]) == "mèo �"
    assert completion.finish_reason == "length"


@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        (["ngủ"], "Chào buổi sáng, thế giới! Một chú mèo 🐈 "),
        (["giới! Một"], "Chào buổi sáng, thế "),  # spread over many tokens
        (["🐈"], "Chào buổi sáng, thế giới! Một chú mèo "),  # one character in several tokens
        (["trà", "ngủ", "👧"], "Chào buổi sáng, thế giới! Một chú mèo 🐈 "),  # the earliest of several
        (["i sáng, thế", "buổi"], "Chào "),
        (["Chào"], ""),
        (["C", "Chào buổi"], ""),
    ],
)
def test_a_stop_text_is_never_shown(stop: list[str], shown: str) -> None:
    completion, pieces = dictate(VIETNAMESE, stop=stop)
    assert (completion.text, completion.finish_reason) == (shown, "stop")
    assert "".join(pieces) == shown
    whole = TOKENIZER.decode(ids_of(completion.tokens))
    assert any(s in whole for s in stop)  # written to its end, and no further
    assert not any(s in TOKENIZER.decode(ids_of(completion.tokens)[:-1]) for s in stop)


@pytest.mark.parametrize("stop", [["tra"], ["🍵!"], [". The end"], ["🍵.."]])
def test_what_was_held_back_is_released_at_the_end(stop: list[str]) -> None:
    """The beginning of a stop text that never came belongs to the text."""
    completion, pieces = dictate(VIETNAMESE, stop=stop)
    assert completion.text == "".join(pieces) == VIETNAMESE
    assert completion.finish_reason == "length"


def test_the_end_token() -> None:
    """Ends the text, releases what was held back, is not shown, and can be ignored."""
    completion, _ = dictate("mèo<|endoftext|> the", stop=["mèo the"])
    assert (completion.text, completion.finish_reason) == ("mèo", "end")
    assert completion.tokens[-1].id == TOKENIZER.end_id
    completion, _ = dictate("mèo<|endoftext|> the", ignore_end=True)
    assert (completion.text, completion.finish_reason) == ("mèo<|endoftext|> the", "length")


def first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text up to the stop text that is whole first, and whether there is one: read character by character."""
    for end in range(1, len(text) + 1):
        if whole := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, whole))], True
    return text, False


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text("ab ", max_size=4), max_size=8), st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3))
def test_stops_do_not_depend_on_the_pieces(pieces: list[str], stops: list[str]) -> None:
    """However a text is cut into pieces, the same is shown; what is held back could be the beginning of a stop."""
    expected, is_found = first_stop("".join(pieces), stops)
    watch, shown = StopText(stops), ""
    for i, piece in enumerate(pieces):
        shown += watch.feed(piece)
        if watch.found:
            break
        held = "".join(pieces[: i + 1])[len(shown) :]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)
    assert watch.found == is_found
    assert shown + ("" if is_found else watch.rest()) == expected
