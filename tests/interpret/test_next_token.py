"""The table, the surprises and the tree of next tokens: whole vocabulary, every sampling, logits that are hard on floats."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from exact import noisy, shape, tokens
from torch import Tensor

from glassgpt.config import UserError
from glassgpt.config.generate import Sampling
from glassgpt.config.model import MoeConfig
from glassgpt.generation import distribution, stream
from glassgpt.generation.sampling import penalised
from glassgpt.interpret import next_token
from glassgpt.interpret.next_token import Node, Surprise, logits_of, next_tokens, ranks, rest, sampling_tree, surprises

INF = math.inf
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0),
    Sampling(temperature=0.1),
    Sampling(temperature=5),
    Sampling(temperature=0.7, top_k=5),
    Sampling(temperature=1.3, top_p=0.8),
    Sampling(min_p=0.1),
    Sampling(temperature=1e-50, top_k=3, top_p=0.5, min_p=0.2),
]


def hard_logits(count: int, V: int = 60) -> Iterator[Tensor]:
    """Logit vectors of which some have ties, -inf or ±1e4."""
    draw = torch.Generator().manual_seed(0)
    for number in range(count):
        logits = 4 * torch.randn(V, generator=draw)
        if number % 4 == 1:
            logits = logits.round()
        if number % 4 == 2:
            logits[torch.rand(V, generator=draw) < 0.3] = -INF
        if number % 4 == 3:
            logits[torch.randint(V, (4,), generator=draw)] = torch.tensor([1e4, -1e4, 1e4, -INF])
        yield logits


# ---------------------------------------------------------------------- the table


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_table_is_the_distribution_that_is_drawn_from(sampling: Sampling) -> None:
    for logits in hard_logits(200):
        expected = distribution(logits[None], sampling)[0]
        table = next_tokens(logits, sampling, len(logits))
        assert sorted(row.id for row in table) == list(range(len(logits)))
        assert [row.probability for row in table] == expected[[row.id for row in table]].tolist()  # to the bit
        assert [row.kept for row in table] == [row.probability > 0 for row in table]
        assert [row.logit for row in table] == sorted(logits.tolist(), reverse=True)
        assert all(math.isfinite(row.probability) and not math.isnan(row.scaled) for row in table)
        if sampling.temperature:
            assert [row.scaled for row in table] == [row.logit / sampling.temperature for row in table]
        assert next_tokens(logits, sampling, 7) == table[:7]


def test_the_order_is_that_of_the_logits_whatever_the_temperature() -> None:
    for logits in hard_logits(200):
        orders = {tuple(row.id for row in next_tokens(logits, Sampling(temperature=t), 60)) for t in (0, 1e-300, 0.1, 1, 5, 1e30)}
        assert orders == {tuple(sorted(range(60), key=lambda i: (-logits[i], i)))}


def test_temperature_0_takes_the_first_largest_and_tends_to_it() -> None:
    logits = torch.tensor([0.0, 3.0, 3.0, -INF])
    first, second, *_ = next_tokens(logits, Sampling(temperature=0), 4)
    assert (first.id, first.probability, first.scaled, second.id, second.probability) == (1, 1.0, 3.0, 2, 0.0)
    for logits in hard_logits(40):
        distinct = logits + torch.arange(60) * 1e-3
        assert next_tokens(distinct, Sampling(temperature=1e-6), 1)[0].probability == pytest.approx(1.0)


def test_bars_and_the_rest_sum_to_1() -> None:
    for logits, sampling in itertools.product(hard_logits(40), SAMPLINGS):
        shown = next_tokens(logits, sampling, 9)
        left = float(distribution(logits[None].double(), sampling)[0].sort(descending=True).values[9:].sum())
        assert rest(shown) == pytest.approx(left, abs=2e-6)
        assert sum(row.probability for row in shown) + rest(shown) == pytest.approx(1, abs=2e-6)


def test_probabilities_are_of_the_whole_vocabulary() -> None:
    """The mistake of softmax over the tokens that are shown, which hides the rest."""
    logits = 2 * torch.randn(50_257, generator=torch.Generator().manual_seed(1))
    table = next_tokens(logits, Sampling(), 50)
    cut = logits.topk(50).values.softmax(-1)
    assert rest(table) > 0.8
    assert abs(table[0].probability - float(cut[0])) > 0.03
    assert table[0].probability == pytest.approx(float(logits.double().softmax(-1).max()), rel=1e-4)


def test_penalties_look_at_the_prompt() -> None:
    logits = torch.tensor([2.0, 1.5, 1.0, -1.0])
    sampling = Sampling(temperature=0.5, repetition_penalty=4, presence_penalty=9)  # none of these is written yet
    table = next_tokens(logits, sampling, 4, prompt=[0, 3])
    assert [(row.id, row.logit, row.scaled) for row in table] == [(1, 1.5, 3.0), (2, 1.0, 2.0), (0, 2.0, 1.0), (3, -1.0, -8.0)]
    seen = torch.tensor([[True, False, False, True]])
    expected = distribution(penalised(logits[None], sampling, seen, torch.zeros(1, 4)), sampling)[0]
    assert [row.probability for row in table] == expected[[1, 2, 0, 3]].tolist()
    assert [row.scaled for row in next_tokens(logits, sampling, 4)] == [4.0, 3.0, 2.0, -2.0]


def test_short_floats_become_float32() -> None:
    logits = torch.randn(400, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert next_tokens(logits, Sampling(), 400) == next_tokens(logits.float(), Sampling(), 400)


# ---------------------------------------------------------------------- surprises


def test_surprises_from_the_definition() -> None:
    model = noisy(shape())
    ids = tokens(model.config, 1)[0]
    logits = logits_of(model, ids)
    found = surprises(logits, ids)
    assert found[0] is None and len(found) == len(ids)
    for place in range(1, len(ids)):
        p = logits[place - 1].softmax(-1)
        entropy_bits = -float((p * p.log2()).sum())
        order = p.argsort(descending=True).tolist()
        expected = (-math.log2(p[ids[place]]), order.index(int(ids[place])) + 1, entropy_bits)
        surprise = found[place]
        assert surprise is not None
        assert (surprise.surprisal_bits, surprise.rank, surprise.entropy_bits) == pytest.approx(expected, abs=1e-10)
    mean = torch.nn.functional.cross_entropy(logits[:-1], ids[1:]) / math.log(2)
    bits = [surprise.surprisal_bits for surprise in found if surprise is not None]
    assert sum(bits) / len(bits) == pytest.approx(float(mean), abs=1e-10)
    late = torch.nn.functional.cross_entropy(logits[1:], ids[1:]) / math.log(2)  # the logits of the token itself
    assert abs(float(late - mean)) > 0.01


def test_surprises_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(23, 11, generator=draw), torch.randint(11, (23,), generator=draw)
    whole = surprises(logits, ids)
    monkeypatch.setattr(next_token, "ROWS", 4)
    assert surprises(logits, ids) == whole


@pytest.mark.parametrize("length", [0, 1])
def test_a_text_too_short_for_surprises(length: int) -> None:
    assert surprises(torch.zeros(length, 5), torch.zeros(length, dtype=torch.long)) == [None] * length


def test_ranks_with_ties_follow_the_ids() -> None:
    for logits in hard_logits(40):
        order = next_tokens(logits, Sampling(), 60)
        every = ranks(logits.expand(60, 60), torch.arange(60))
        assert [int(every[row.id]) for row in order] == list(range(1, 61))


def test_impossible_and_certain_tokens() -> None:
    logits = torch.tensor([[0.0, -INF, -INF, -INF], [0.0, 0.0, 0.0, 0.0], [1e4, -1e4, 0.0, -1e4], [0.0, 0.0, 0.0, 0.0]])
    found = surprises(logits, torch.tensor([0, 0, 3, 1]))
    assert found[1:] == [Surprise(0.0, 1, 0.0), Surprise(2.0, 4, 2.0), Surprise(pytest.approx(2e4 / math.log(2)), 3, 0.0)]
    assert surprises(logits, torch.tensor([0, 2, 0, 0]))[1] == Surprise(INF, 3, 0.0)


def test_logits_of_an_empty_text() -> None:
    with pytest.raises(UserError, match="the text is empty"):
        logits_of(noisy(shape()), [])


# ---------------------------------------------------------------------- the tree

SLOTS: dict[str, dict[str, Any]] = {
    "as GPT-2": {},
    "rope, grouped, windows": {"position": "rope", "n_kv_head": 2, "spans": ("full", "window"), "window_tokens": 3},
    "alibi, capped, rms": {"position": "alibi", "logit_cap": 3.0, "norm": "rms", "tied_head": False},
    "mixture": {"mlp": "swiglu", "moe": MoeConfig(experts=4, top_k=2)},
}


def walk(node: Node, path: tuple[int, ...] = ()) -> Iterator[tuple[Node, tuple[int, ...]]]:
    """Every node with the ids that lead to it from the root."""
    yield node, path
    for child in node.children:
        yield from walk(child, (*path, child.id))


def leaves_and_rest(node: Node) -> float:
    """Probability of all paths that end at a leaf or leave the tree."""
    return node.path_probability * node.rest + sum(leaves_and_rest(child) for child in node.children)


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("slot", SLOTS)
def test_every_node_is_what_the_whole_text_gives(slot: str, length: int) -> None:
    model, sampling = noisy(shape(**SLOTS[slot])), Sampling(temperature=3, top_k=20)
    ids = tokens(model.config, 1, length)[0]
    tree = sampling_tree(model, ids, depth=3, width=3, sampling=sampling)
    assert (tree.id, tree.probability, tree.path_probability) == (int(ids[-1]), 1, 1)
    nodes = list(walk(tree))
    assert len(nodes) == 1 + 3 + 9 + 27
    worst = 0.0
    for node, path in nodes:
        if len(path) == 3:
            assert not node.children and node.rest == 1
            continue
        p = distribution(logits_of(model, [*ids.tolist(), *path])[-1:], sampling)[0]
        assert [child.id for child in node.children] == p.topk(3).indices.tolist()
        for child in node.children:
            worst = max(worst, abs(child.probability - float(p[child.id])))
            assert child.path_probability == node.path_probability * child.probability
        assert node.rest == pytest.approx(1 - float(p.topk(3).values.sum()), abs=1e-12)
    assert worst < 1e-12
    assert leaves_and_rest(tree) == pytest.approx(1, abs=1e-12)


def test_a_tree_without_the_prompt_is_another() -> None:
    """What the comparison above would notice: paths that forget what came before them."""
    model = noisy(shape())
    ids = tokens(model.config, 1, 9)[0]
    with_prompt, without = (sampling_tree(model, text, depth=1, width=3, sampling=Sampling()) for text in (ids, ids[-1:]))
    assert abs(with_prompt.children[0].probability - without.children[0].probability) > 1e-3


def test_levels_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = noisy(shape())
    ids = tokens(model.config, 1, 5)[0]
    whole = list(walk(sampling_tree(model, ids, depth=4, width=3, sampling=Sampling())))
    monkeypatch.setattr(next_token, "CACHED_TOKENS", 20)
    parts = list(walk(sampling_tree(model, ids, depth=4, width=3, sampling=Sampling())))
    assert [path for _, path in parts] == [path for _, path in whole]
    assert [node.path_probability for node, _ in parts] == pytest.approx([n.path_probability for n, _ in whole], abs=1e-12)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=0, repetition_penalty=5, presence_penalty=2)])
def test_at_temperature_0_it_is_the_greedy_text(sampling: Sampling) -> None:
    model = noisy(shape())
    prompt = tokens(model.config, 1, 6)[0]
    written = [token.id for token in stream(model, [prompt.tolist()], sampling, [torch.Generator()], 8)]
    nodes = list(walk(sampling_tree(model, prompt, depth=8, width=1, sampling=sampling)))
    assert nodes[-1][1] == tuple(written)
    assert all(node.probability == 1 for node, _ in nodes)
    wide = sampling_tree(model, prompt, depth=3, width=5, sampling=sampling)
    assert list(walk(wide))[-1][1] == tuple(written[:3])


def test_tokens_that_are_never_drawn_have_no_node() -> None:
    model = noisy(shape())
    tree = sampling_tree(model, tokens(model.config, 1, 6)[0], depth=2, width=5, sampling=Sampling(top_k=2))
    assert [len(node.children) for node, path in walk(tree) if len(path) < 2] == [2, 2, 2]
    assert tree.rest == pytest.approx(0, abs=1e-12)


def test_nothing_follows_the_end_and_rows_beyond_the_vocabulary_are_not_drawn() -> None:
    model = noisy(shape())
    ids = tokens(model.config, 1, 6)[0]
    end = sampling_tree(model, ids, depth=1, width=1, sampling=Sampling()).children[0].id
    tree = sampling_tree(model, ids, depth=2, width=3, sampling=Sampling(), end_id=end)
    assert [len(child.children) for child in tree.children] == [0, 3, 3]
    small = sampling_tree(model, ids % 4, depth=2, width=9, sampling=Sampling(), n_ids=4)
    assert {node.id for node, _ in walk(small)} <= {0, 1, 2, 3}
    assert [len(node.children) for node, path in walk(small) if len(path) < 2] == [4] * 5 and small.rest < 1e-12


@pytest.mark.parametrize(
    ("length", "depth", "width", "message"),
    [
        (0, 2, 2, "needs a prompt of 1 to 23 tokens in this model's context; got 0"),
        (24, 2, 2, "needs a prompt of 1 to 23 tokens in this model's context; got 24"),
        (3, 0, 2, "depth must be at least 1; got 0"),
        (3, 2, 0, "width must be at least 1; got 0"),
        (3, 13, 2, "has 8,192 leaves; give at most 4,096"),
    ],
)
def test_bad_trees_are_refused(length: int, depth: int, width: int, message: str) -> None:
    model = noisy(shape())
    with pytest.raises(UserError, match=message):
        sampling_tree(model, tokens(model.config, 1, 24)[0, :length], depth=depth, width=width, sampling=Sampling())


def test_the_largest_that_fits() -> None:
    model = noisy(shape())
    tree = sampling_tree(model, tokens(model.config, 1, 24)[0, :23], depth=2, width=2, sampling=Sampling())
    assert len(list(walk(tree))) == 7
    with pytest.raises(UserError, match="count must be at least 1; got 0"):
        next_tokens(torch.zeros(3), Sampling(), 0)
