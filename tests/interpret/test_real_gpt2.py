"""What is published of GPT-2's real weights: texts, losses, and which head does what.

The decimals of heads depend on conventions (folded norms, centred weights, the probe), so sets and signs are asserted for them.
Needs `glassgpt download gpt2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import pytest
import torch
from torch import Tensor

import glassgpt
from glassgpt.config import UserError
from glassgpt.config.generate import Sampling
from glassgpt.generation import complete
from glassgpt.generation.engine import stream
from glassgpt.interpret import capture
from glassgpt.interpret.heads import HeadScore, head_class, head_scores, previous_score
from glassgpt.model import GPT
from glassgpt.text import Tokenizer

pytestmark = pytest.mark.needs_weights
Loaded = tuple[GPT, Tokenizer]
Head = tuple[int, int]  # layer, number
END = 50256

# The prompts of TransformerLens's demos, with the name that should follow and the one that should not.
IOI = [
    ("When John and Mary went to the shops, John gave the bag to", " Mary", " John"),
    ("When John and Mary went to the shops, Mary gave the bag to", " John", " Mary"),
    ("When Tom and James went to the park, James gave the ball to", " Tom", " James"),
    ("When Tom and James went to the park, Tom gave the ball to", " James", " Tom"),
    ("When Dan and Sid went to the shops, Sid gave an apple to", " Dan", " Sid"),
    ("When Dan and Sid went to the shops, Dan gave an apple to", " Sid", " Dan"),
    ("After Martin and Amy went to the park, Amy gave a drink to", " Martin", " Amy"),
    ("After Martin and Amy went to the park, Martin gave a drink to", " Amy", " Martin"),
]
NAME_MOVERS = [(9, 9), (10, 0), (9, 6)]
NEGATIVE_NAME_MOVERS = [(10, 7), (11, 10)]
S_INHIBITION = [(7, 3), (7, 9), (8, 6), (8, 10)]
DUPLICATE = [(0, 1), (0, 10), (3, 0)]
INDUCTION = [(5, 1), (5, 5), (6, 9), (7, 2), (7, 10)]
INDUCTION_OF_IOI = [(5, 5), (5, 8), (5, 9), (6, 9)]


@pytest.fixture(scope="module")
def gpt2() -> Loaded:
    try:
        return glassgpt.load("gpt2")
    except UserError:
        pytest.skip("gpt2 is not in the local hub cache")


def greedy(loaded: Loaded, prompts: list[str], new_tokens: int) -> list[str]:
    model, tokenizer = loaded
    settings = Sampling(temperature=0)
    found = complete(model, tokenizer, prompts, settings, max_new_tokens=new_tokens, seed=0, ignore_end=True)
    return [completion.text for completion in found]


@torch.no_grad()
def logits_of(model: GPT, ids: Sequence[int]) -> Tensor:
    """(T, V)."""
    return model(torch.tensor([list(ids)]))[0]


# ---------------------------------------------------------------------- texts and losses


def test_greedy_ids(gpt2: Loaded) -> None:
    """transformers, tests/models/gpt2/test_modeling_gpt2.py."""
    model, _ = gpt2
    prompt = [464, 3290]
    found = stream(model, [prompt], Sampling(temperature=0), [torch.Generator()], 18)
    expected = [373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688, 27262, 13, 198, 198, 464, 3290]
    assert [token.id for token in found] == expected


def test_a_padded_batch_writes_what_its_rows_alone_do(gpt2: Loaded) -> None:
    """The same file."""
    prompts = ["Hello, my dog is a little", "Today, I"]
    expected = [" bit of a mess. I'm not sure if he's going", "'m going to be doing a lot of research on this. I"]
    assert greedy(gpt2, prompts, 13) == expected
    assert [greedy(gpt2, [prompt], 13)[0] for prompt in prompts] == expected


def test_alan_turing(gpt2: Loaded) -> None:
    """The README of picoGPT."""
    (found,) = greedy(gpt2, ["Alan Turing theorized that computers would one day become"], 40)
    assert found == (
        " the most powerful machines on the planet.\n\nThe computer is a machine that can perform complex calculations, and it"
        " can perform these calculations in a way that is very similar to the human brain."
    )


def test_mean_loss(gpt2: Loaded) -> None:
    """TransformerLens, tests/acceptance/test_hooked_transformer.py; here from both sides."""
    model, tokenizer = gpt2
    ids = [END, *tokenizer.encode("Hello world!")]
    loss = torch.nn.functional.cross_entropy(logits_of(model, ids)[:-1], torch.tensor(ids[1:]))
    assert float(loss) == pytest.approx(5.331855773925781, abs=4e-5)


def test_logits_are_those_of_transformers(gpt2: Loaded) -> None:
    """The prompt of minGPT's tests/test_huggingface_import.py."""
    from transformers import AutoModelForCausalLM

    from glassgpt.loading import find

    model, tokenizer = gpt2
    theirs = AutoModelForCausalLM.from_pretrained(find("gpt2").folder).eval()
    prompt = "Hello!!!!!!!!!? 🤗, my dog is a little"
    ids = torch.tensor([tokenizer.encode(prompt)])
    with torch.no_grad():
        assert torch.allclose(model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-3)
    expected = theirs.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=END)[0, ids.size(1) :].tolist()
    found = stream(model, ids.tolist(), Sampling(temperature=0), [torch.Generator()], 20)
    assert [token.id for token in found] == expected


def test_the_space_needle() -> None:
    """pyvene, Causal_Tracing.ipynb."""
    try:
        model, tokenizer = glassgpt.load("gpt2-xl")
    except UserError:
        pytest.skip("gpt2-xl is not in the local hub cache")
    probabilities = logits_of(model, tokenizer.encode("The Space Needle is in downtown"))[-1].softmax(-1)
    assert float(probabilities[tokenizer.encode(" Seattle")[0]]) == pytest.approx(0.976, abs=0.005)


# ---------------------------------------------------------------------- heads on random tokens


@pytest.fixture(scope="module")
def scores(gpt2: Loaded) -> dict[Head, HeadScore]:
    """20 tokens repeated after an end of text, of the 10,000 most frequent."""
    found = head_scores(gpt2[0], tokens=20, bos=END, n_ids=10_000)
    return {(score.layer, score.head): score for score in found}


def test_the_five_induction_heads(scores: dict[Head, HeadScore]) -> None:
    """The set of ARENA's induction exercise."""
    best = sorted(scores, key=lambda head: scores[head].induction, reverse=True)[:5]
    assert sorted(best) == INDUCTION
    for head in INDUCTION:
        assert scores[head].induction > 0.6 and scores[head].induction_control < 0.05, head
        assert head_class(scores[head]) == "induction", head


def test_the_induction_heads_of_ioi(scores: dict[Head, HeadScore]) -> None:
    """Wang et al. 2022 name others, by another probe: here they only do it more than chance."""
    for head in INDUCTION_OF_IOI:
        assert scores[head].induction > 2 * scores[head].induction_control, head


def test_the_duplicate_token_heads(scores: dict[Head, HeadScore]) -> None:
    for head in DUPLICATE:
        assert scores[head].duplicate > 2 * scores[head].duplicate_control, head


def test_the_previous_token_head(gpt2: Loaded, scores: dict[Head, HeadScore]) -> None:
    """4.11, on text as on random tokens."""
    assert head_class(scores[4, 11]) == "previous-token"
    assert max((score for head, score in scores.items() if head[0] == 4), key=lambda score: score.previous).head == 11
    model, tokenizer = gpt2
    text = "The storm had passed in the night, and in the morning the whole village went down to see what the sea had left."
    with capture(model, "blocks.4.attn.pattern") as seen:
        logits_of(model, tokenizer.encode(text))
    on_text = previous_score(seen["blocks.4.attn.pattern"])[0]  # (H,)
    assert int(on_text.argmax()) == 11
    assert float(on_text[11]) > 0.9


# ---------------------------------------------------------------------- the circuit of indirect objects (Wang et al. 2022)


def test_logit_difference(gpt2: Loaded) -> None:
    """TransformerLens, Activation_Patching_in_TL_Demo.ipynb: 3.5519, and the opposite with the names exchanged."""
    model, tokenizer = gpt2
    clean, exchanged = [], []
    for number, (prompt, right, wrong) in enumerate(IOI):
        a, b = tokenizer.encode(right)[0], tokenizer.encode(wrong)[0]
        last = logits_of(model, [END, *tokenizer.encode(prompt)])[-1]
        other = logits_of(model, [END, *tokenizer.encode(IOI[number ^ 1][0])])[-1]
        clean.append(float(last[a] - last[b]))
        exchanged.append(float(other[a] - other[b]))
    assert fmean(clean) == pytest.approx(3.5519, abs=0.02)
    assert fmean(exchanged) == pytest.approx(-3.5519, abs=0.02)
    assert min(clean) > 0


def test_direct_logit_attribution(gpt2: Loaded) -> None:
    """Direct_Logit_Attribution_Demo.ipynb: 9.9 and 9.6 write Mary, the negative name movers write John."""
    from glassgpt.interpret.attribution import attribute

    model, tokenizer = gpt2
    prompt, right, wrong = IOI[0]
    ids = torch.tensor([END, *tokenizer.encode(prompt)])
    found = attribute(model, ids, tokenizer.encode(right)[0], against=tokenizer.encode(wrong)[0])
    assert found.total == pytest.approx(found.logit, abs=1e-3)
    heads = {(part.layer, part.index): part.value for part in found.parts if part.kind == "head"}
    assert len(heads) == 144
    assert set(sorted(heads, key=lambda head: heads[head], reverse=True)[:2]) == {(9, 9), (9, 6)}
    assert all(heads[head] < 0 for head in [*NEGATIVE_NAME_MOVERS, (11, 1)])
    assert all(heads[head] > 0 for head in [*NAME_MOVERS, (10, 10), (8, 10)])


@pytest.fixture(scope="module")
def looks(gpt2: Loaded) -> dict[Head, dict[str, float]]:
    """Mean attention over the prompts: from the end and from the second subject (S2), to the other name (IO), to S1 and to S2."""
    model, tokenizer = gpt2
    rows: dict[Head, dict[str, list[float]]] = {}
    for prompt, right, wrong in IOI:
        ids = [END, *tokenizer.encode(prompt)]
        named = {"IO": ids.index(tokenizer.encode(right)[0]), "S1": ids.index(tokenizer.encode(wrong)[0])}
        named["S2"] = ids.index(tokenizer.encode(wrong)[0], named["S1"] + 1)
        with capture(model, "blocks.*.attn.pattern") as seen:
            logits_of(model, ids)
        for layer in range(12):
            for head, pattern in enumerate(seen[f"blocks.{layer}.attn.pattern"][0]):
                of_head = rows.setdefault((layer, head), {})
                for name, place in named.items():
                    of_head.setdefault(f"end to {name}", []).append(float(pattern[-1, place]))
                    of_head.setdefault(f"S2 to {name}", []).append(float(pattern[named["S2"], place]))
    return {head: {name: fmean(values) for name, values in of_head.items()} for head, of_head in rows.items()}


def test_name_movers_look_at_the_other_name(looks: dict[Head, dict[str, float]]) -> None:
    for head in [*NAME_MOVERS, *NEGATIVE_NAME_MOVERS]:
        assert looks[head]["end to IO"] > max(looks[head]["end to S1"], looks[head]["end to S2"]), head


def test_s_inhibition_heads_look_at_the_second_subject(looks: dict[Head, dict[str, float]]) -> None:
    for head in S_INHIBITION:
        assert looks[head]["end to S2"] > max(looks[head]["end to S1"], looks[head]["end to IO"]), head


def test_duplicate_token_heads_look_from_the_second_subject_to_the_first(looks: dict[Head, dict[str, float]]) -> None:
    for head in DUPLICATE:
        assert looks[head]["S2 to S1"] > looks[head]["S2 to IO"], head
