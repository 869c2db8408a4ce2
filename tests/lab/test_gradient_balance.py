"""Gradients taken apart: the pieces are the whole to the last digits, known ones come out as known, and a small run is kept."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glassgpt.config import ModelConfig, UserError
from glassgpt.config.gradient_balance import GradientBalance, weight_of
from glassgpt.config.model import MoeConfig
from glassgpt.config.tuning import RecordsConfig, Sft
from glassgpt.lab.gradient_balance import gradient_balance as lab
from glassgpt.lab.gradient_balance.compare import Part, Point, Result, findings
from glassgpt.lab.gradient_balance.split import (
    END,
    INSTRUCTION,
    KINDS,
    MEANING,
    RESPONSE,
    TEMPLATE,
    WHOLE,
    Marked,
    Split,
    batch,
    figures,
    gradients,
    kind_figures,
    layer_of,
    mark,
    split,
    spread,
)
from glassgpt.loading import load
from glassgpt.model import GPT, blocked, plain, use_attention, weights
from glassgpt.text import Tokenizer, chat
from glassgpt.text.chat import Message
from glassgpt.text.template import Template
from glassgpt.train.loss import Scored
from glassgpt.train.run import read_log
from glassgpt.tuning import examples
from glassgpt.tuning.examples import Example, Rows, collate
from glassgpt.tuning.sft import sft

WORDS = "the a cat dog fox hen sat ran saw ate on in under mat log box pen big red old new and then but so".split()
V = 13
SHAPES = {
    "tied": {},
    "untied, capped": {"tied_head": False, "logit_cap": 3.0},
    "rope, swiglu": {"position": "rope", "mlp": "swiglu", "norm": "rms"},
    "experts": {"moe": MoeConfig(experts=3, top_k=2)},
}


def noisy(**changes: Any) -> GPT:
    """A small GPT in float64 with noise on every parameter."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**{"vocab_size": V, "context_tokens": 32, "n_layer": 2, "n_head": 2, "width": 8} | changes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def drawn(count: int = 4, seed: int = 0) -> list[Marked]:
    """Examples of random tokens: template, instruction, template, response, end."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        parts = [(TEMPLATE, 2), (INSTRUCTION, draw.randint(1, 5)), (TEMPLATE, 3), (RESPONSE, draw.randint(1, 6)), (END, 1)]
        kinds = [kind for kind, length in parts for _ in range(length)]
        ids = [draw.randrange(V) for _ in kinds]
        found.append(Marked(Example(ids, [kind in (RESPONSE, END) for kind in kinds], f"line {number}"), kinds))
    return found


def whole_gradient(model: GPT, rows: Rows, worth: Tensor) -> dict[str, Tensor]:
    """The gradient of Σ worth * loss in plain maths: all logits, one backward pass."""
    logits = model(rows.ids)  # (B, T, V)
    nats = F.cross_entropy(logits.flatten(0, 1), rows.targets.flatten(), reduction="none", ignore_index=-100)  # (B T,)
    named = dict(model.named_parameters())
    found = torch.autograd.grad((nats * worth.flatten()).sum(), list(named.values()), materialize_grads=True)
    return dict(zip(named, found, strict=True))


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of any number."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def total(some: list[dict[str, Tensor]], factors: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)) -> dict[str, Tensor]:
    return {name: sum(f * own[name] for f, own in zip(factors, some, strict=True)) for name in some[0]}  # type: ignore[misc]


# ---------------------------------------------------------------------- the pieces are the whole


@pytest.mark.parametrize("attention", [plain, blocked])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_pieces_are_the_whole_gradient(shape: str, attention: Any) -> None:
    model = noisy(**SHAPES[shape])
    use_attention(model, attention)
    rows, kinds = batch(drawn())
    pieces = gradients(model, rows, kinds)
    whole = whole_gradient(model, rows, rows.weights)
    assert apart(total(pieces), whole) < 1e-12 < 1 < max(float(each.abs().max()) for each in whole.values())
    for kind, piece in enumerate(pieces):
        assert apart(piece, whole_gradient(model, rows, (kinds == kind).double())) < 1e-12
    # what training sums: the full loss, and the loss on responses, as `sft` computes them
    for weight in (1.0, 0.1, 0.0):
        given = collate([[item.example] for item in drawn()], weight)
        model.zero_grad()
        Scored(model).eval()(given.ids, given.targets, weights=given.weights).backward()
        trained = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
        assert apart(total(pieces, (weight, weight, 1.0, 1.0)), trained) < 1e-12


def test_wrong_ways_to_take_it_apart_are_noticed() -> None:
    """The comparisons above would fail for each of these."""
    model, items = noisy(), drawn()
    rows, kinds = batch(items)
    pieces, whole = gradients(model, rows, kinds), whole_gradient(model, rows, rows.weights)
    answer = whole_gradient(model, rows, collate([[item.example] for item in items]).weights)
    assert apart(total(pieces, (0, 0, 1, 1)), answer) < 1e-12
    swapped = gradients(model, rows, torch.where(kinds < 0, kinds, 3 - kinds))
    of_inputs = torch.full_like(kinds, -1)  # the kind of the token read in place of the one foretold
    for number, item in enumerate(items):
        of_inputs[number, : len(item.kinds) - 1] = torch.tensor(item.kinds[:-1])
    for wrong in (swapped, gradients(model, rows, of_inputs)):
        assert apart(total(wrong, (0, 0, 1, 1)), answer) > 0.1
    counts = [int((kinds == kind).sum()) for kind in range(4)]
    tokens = sum(counts)
    means = total(pieces, tuple(1 / count for count in counts))  # type: ignore[arg-type]
    of_mean = {name: each / tokens for name, each in whole.items()}
    assert apart(total(pieces, (1 / tokens,) * 4), of_mean) < 1e-13  # type: ignore[arg-type]
    assert apart(means, of_mean) > 0.1  # each divided by its own count
    without_padding = gradients(model, rows, kinds.clamp(min=0))  # padding taken for template
    assert apart(total(without_padding), whole) < 1e-12  # it has no target, so it gives nothing


def test_a_kind_that_is_not_there_gives_nothing() -> None:
    model = noisy()
    rows, kinds = batch(drawn())
    pieces = gradients(model, rows, torch.where(kinds == END, -1, kinds))
    assert all(not each.any() for each in pieces[END].values())
    found = split(model, rows, torch.where(kinds >= RESPONSE, -1, kinds))
    at = figures(found.products[WHOLE], found.counts)
    assert (at["share"], at["cosine"], at["tokens"], at["response_per_token"], at["part"]) == (0, 0, 0, 0, 0)


# ---------------------------------------------------------------------- by hand


def constant(vocabulary: int = V) -> GPT:
    """A model whose hidden state is one vector b = 2 everywhere, and whose logits are 0: every token has probability 1 / V."""
    model = noisy(tied_head=False, vocab_size=vocabulary)
    with torch.no_grad():
        model.head.weight.zero_()
        model.norm_f.weight.zero_()
        model.norm_f.bias.fill_(2.0)
    return model


def test_gradients_that_are_known() -> None:
    """The head's gradient from n targets is Σ (1 / V - e_target) b', so targets that are all one token give n (1 / V - e) b' of
    norm n √(1 - 1 / V) |b|, and two such tokens have the cosine -1 / (V - 1)."""
    model = constant()
    kinds = [TEMPLATE, *[INSTRUCTION] * 6, *[RESPONSE] * 3]
    items = [Marked(Example([0] + [5] * 6 + [7] * 3, [False] * 7 + [True] * 3, "line 1"), kinds) for _ in range(2)]
    found = split(model, *batch(items))
    assert found.counts == [0, 12, 6, 0]
    at = figures(found.products["head"], found.counts)
    norm = math.sqrt(1 - 1 / V) * math.sqrt(8 * 2.0**2)  # |b| of width 8
    expected = {
        "instruction": 12 * norm / 18,
        "response": 6 * norm / 18,
        "share": 1 / 3,
        "tokens": 1 / 3,
        "cosine": -1 / (V - 1),
        "instruction_per_token": norm,
        "response_per_token": norm,
        "part": (36 - 72 / (V - 1)) / (144 + 36 - 2 * 72 / (V - 1)),
        "content_share": 1 / 3,
        "content_tokens": 1 / 3,
        "content_cosine": -1 / (V - 1),
    }
    assert at == pytest.approx(expected, rel=1e-12)
    for layer, products in found.products.items():  # nothing reaches what is before the head
        assert layer in (WHOLE, "head") or not np.array(products).any()
    assert found.products[WHOLE] == found.products["head"]
    halved = figures(found.products["head"], found.counts, prompt_weight=0.5)
    assert halved["share"] == pytest.approx(0.5) and halved["tokens"] == pytest.approx(0.5)
    assert halved["response"] == pytest.approx(6 * norm / 12) and halved["cosine"] == pytest.approx(at["cosine"])
    # tokens of one kind that want different words partly cancel, so a longer text has not always more gradient
    mixed = [Marked(Example([0, 1, 2, 3, 4, 7, 7, 7], [False] * 5 + [True] * 3, "line 1"), kinds[:5] + [RESPONSE] * 3)]
    found = split(model, *batch(mixed))
    at = figures(found.products["head"], found.counts)
    cancelled = math.sqrt(4 * (1 - 4 / V) ** 2 + (V - 4) * (4 / V) ** 2)
    assert at["share"] == pytest.approx(3 * math.sqrt(1 - 1 / V) / (3 * math.sqrt(1 - 1 / V) + cancelled), rel=1e-12)
    assert at["tokens"] == 3 / 7 < 0.5 < at["share"]


def test_figures_are_those_of_the_gradients_themselves() -> None:
    model = noisy()
    rows, kinds = batch(drawn(seed=3))
    found, pieces = split(model, rows, kinds), gradients(model, rows, kinds)
    flat = torch.stack([torch.cat([each.flatten() for each in own.values()]) for own in pieces])  # (4, parameters)
    q, a, tokens = flat[:2].sum(0), flat[2:].sum(0), sum(found.counts)
    assert found.counts == [int((kinds == kind).sum()) for kind in range(4)] and tokens == rows.count
    expected = {
        "instruction": q.norm() / tokens,
        "response": a.norm() / tokens,
        "share": a.norm() / (a.norm() + q.norm()),
        "part": a @ (a + q) / (a + q).square().sum(),
        "cosine": a @ q / (a.norm() * q.norm()),
        "instruction_per_token": q.norm() / sum(found.counts[:2]),
        "response_per_token": a.norm() / sum(found.counts[2:]),
        "tokens": sum(found.counts[2:]) / tokens,
        "content_share": flat[2].norm() / (flat[1].norm() + flat[2].norm()),
        "content_tokens": found.counts[2] / (found.counts[1] + found.counts[2]),
        "content_cosine": flat[1] @ flat[2] / (flat[1].norm() * flat[2].norm()),
    }
    at = figures(found.products[WHOLE], found.counts)
    assert at == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-12)
    assert at.keys() == MEANING.keys()
    by_kind = kind_figures(found.products[WHOLE], found.counts)
    for name, own, count in zip(KINDS, flat, found.counts, strict=True):
        expected = {"tokens": count / tokens, "norm": own.norm() / tokens, "per_token": own.norm() / count}
        assert by_kind[name] == pytest.approx({key: float(value) for key, value in expected.items()}, rel=1e-12)
    layers = [np.array(products) for layer, products in found.products.items() if layer != WHOLE]
    assert np.allclose(sum(layers), found.products[WHOLE], rtol=1e-13, atol=0)


def test_layers_hold_every_parameter_once_and_stand_in_order() -> None:
    rows, kinds = batch(drawn())
    blocks = [f"block {n} {part}" for n in range(2) for part in ("attention", "MLP")]
    found = list(split(noisy(), rows, kinds).products)
    assert found == [WHOLE, "embedding = head", "positions", *blocks, "final norm"]
    found = list(split(noisy(tied_head=False, position="rope", n_layer=11), rows, kinds).products)
    assert found[:4] == [WHOLE, "embedding", *blocks[:2]] and found[-4:] == [
        "block 10 attention",
        "block 10 MLP",
        "final norm",
        "head",
    ]
    assert layer_of("blocks.3.norm_2.weight", tied=True) == "block 3 MLP"
    assert layer_of("blocks.3.norm_1.bias", tied=True) == "block 3 attention"
    assert layer_of("embedding_norm.weight", tied=False) == "embedding norm"


def test_spread_is_the_quartiles() -> None:
    found = spread([1.0, 2.0, 3.0, 4.0, 9.0])
    assert (found.low, found.median, found.high) == (2, 3, 4)
    assert spread([7.0]) == dataclasses.replace(found, low=7, median=7, high=7)


# ---------------------------------------------------------------------- kinds


@pytest.fixture(scope="module")
def chats() -> Tokenizer:
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=8)) + ".\n### User:\n### Assistant:\n" for _ in range(60)]
    tokenizer = Tokenizer.train(lines, 300)
    return tokenizer.with_template(chat.template_of(tokenizer))


def texts(item: Marked, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Stretches of one kind, as text."""
    found: list[tuple[int, list[int]]] = []
    for kind, token in zip(item.kinds, item.example.ids, strict=True):
        if not found or found[-1][0] != kind:
            found.append((kind, []))
        found[-1][1].append(token)
    return [(KINDS[kind], tokenizer.decode(ids)) for kind, ids in found]


def marked(messages: list[Message], tokenizer: Tokenizer, template: str) -> Marked:
    example = Example(*examples.encode(messages, (), tokenizer, template), "line 1")
    return mark(example, messages, tokenizer, template, examples.end_ids(tokenizer, template))


def test_every_token_has_the_kind_of_its_text(chats: Tokenizer) -> None:
    end = "<|endoftext|>"
    spoken = [
        Message("user", "the cat"),
        Message("assistant", "sat"),
        Message("user", "### User:\nso"),
        Message("assistant", "but"),
    ]
    assert texts(marked(spoken, chats, "chat"), chats) == [
        ("template", "### User:\n"), ("instruction", "the cat"), ("template", "\n\n### Assistant:\n"), ("response", "sat"),
        ("end", end), ("template", "\n\n### User:\n"), ("instruction", "### User:\nso"), ("template", "\n\n### Assistant:\n"),
        ("response", "but"), ("end", end),
    ]  # fmt: skip
    told = [Message("system", "new"), *spoken[:2]]
    assert texts(marked(told, chats, "chat"), chats)[:2] == [("template", "### System:\n"), ("instruction", "new")]
    plain_text = chats.with_template(None)
    assert texts(marked(spoken[:2], plain_text, "none"), plain_text) == [
        ("instruction", "the cat"), ("response", "sat"), ("end", end)
    ]  # fmt: skip
    endless = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}{{ '[assistant] ' if add_generation_prompt }}"
    )
    other = chats.with_template(Template(endless, "", ""))
    assert texts(marked(spoken[:2], other, "chat"), other) == [
        ("template", "[user] "), ("instruction", "the cat"), ("template", " [assistant] "), ("response", "sat"), ("template", " ")
    ]  # fmt: skip


def test_responses_and_ends_are_what_the_loss_on_responses_learns(chats: Tokenizer) -> None:
    spoken = [Message("user", "the cat ran"), Message("assistant", "under the log")]
    item = marked(spoken, chats, "chat")
    rows, kinds = batch([item])
    assert torch.equal(kinds >= RESPONSE, collate([[item.example]]).weights > 0)
    assert kinds.shape == rows.ids.shape and not (kinds < 0).any()
    with pytest.raises(
        UserError, match=r"line 1: the template's words and the messages cannot be told apart; try --template none"
    ):
        mark(dataclasses.replace(item.example, ids=item.example.ids[:-1]), spoken, chats, "chat", [])


# ---------------------------------------------------------------------- a small run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, chats: Tokenizer) -> Path:
    """A random model and forty examples whose responses are longer than their instructions."""
    folder = tmp_path_factory.mktemp("balance")
    draw = random.Random(1)
    rows = [
        {"prompt": " ".join(draw.choices(WORDS, k=draw.randint(1, 3))), "completion": " ".join(draw.choices(WORDS, k=9))}
        for _ in range(40)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    (folder / "model").mkdir()
    model = GPT(ModelConfig(chats.vocab_size, 64, 2, 2, 16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    weights.save(model, folder / "model")
    chats.save(folder / "model")
    return folder


def small(home: Path, out: Path, **changes: Any) -> GradientBalance:
    values: dict[str, Any] = {
        "files": (str(home / "chats.jsonl"),), "model": str(home / "model"), "out_dir": str(out), "device": "cpu",
        "max_tokens": 0, "held_out": 8, "batch_size": 4, "batches": 2, "points": 2, "steps": 4, "eval_interval": 2, "seeds": 2,
        "learning_rate": 3e-3,
    }  # fmt: skip
    return GradientBalance(**values | changes)


@pytest.fixture(scope="module")
def ran(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return lab.gradient_balance(small(home, tmp_path_factory.mktemp("ran") / "out"))


def test_a_small_run_is_reported_whole(ran: Result, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = ran.config, Path(ran.config.out_dir)
    assert lab.gradient_balance(config) == ran  # everything is read again
    shown = capsys.readouterr().out
    assert max(map(len, shown.replace(str(out), "").splitlines())) <= 100
    for said in ("share of A", "embedding = head", "block 1 MLP", "weighted:0.1", "Held-out loss", "in the loss weighted:0.1"):
        assert said in shown
    for suffix in (".svg", ".png"):
        assert (out / f"gradient-balance{suffix}").stat().st_size > 10_000
    held = json.loads((out / "results.json").read_text())
    assert list(held["along"]) == list(config.modes) == list(held["curves"])
    assert [point["step"] for point in held["along"]["full"]] == [2, 4]
    assert [point["step"] for point in held["curves"]["full"][1]] == [2, 4]
    assert held["answer_share_of_tokens"] == ran.answer_share
    assert held["share_in_the_loss_of"]["response"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    shares = [held["share_in_the_loss_of"][mode]["median"] for mode in ("full", "weighted:0.1", "response")]
    assert shares == sorted(shares) and shares[0] == held["start"]["layers"][WHOLE]["share"]["median"]
    assert held["ends"]["response"]["full"]["difference"]["mean"] == pytest.approx(
        np.mean(
            [held["curves"]["full"][seed][-1]["response"] - held["curves"]["response"][seed][-1]["response"] for seed in (0, 1)]
        )
    )


def test_lengths_are_the_examples_own(home: Path, ran: Result, chats: Tokenizer) -> None:
    model, _ = load(ran.config.model)
    data = lab.read(ran.config, model)
    places = {item.example.place for item in data.held} | {item.example.place for item in data.learnt}
    assert (len(data.held), len(data.learnt), len(places)) == (8, 32, 40)
    mean = np.mean([item.example.n_response for item in data.learnt])
    assert data.lengths["response"] + data.lengths["end"] == pytest.approx(mean) and data.lengths["end"] == 1
    asked = np.mean([item.example.n_instruction - 1 for item in data.learnt])  # the first token is in no loss
    assert ran.answer_share == pytest.approx(mean / (mean + asked))
    assert data.lengths["longer_content"] == 1 and data.lengths["left_out"] == 0
    longest = sorted(len(item.example.ids) for item in [*data.learnt, *data.held])
    fewer = lab.read(dataclasses.replace(ran.config, max_tokens=longest[29]), model).lengths["left_out"]
    assert fewer == pytest.approx(sum(length > longest[29] for length in longest) / 40) and fewer > 0.1


def test_only_missing_parts_are_made_again(home: Path, ran: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Path(ran.config.out_dir)
    names = sorted(path.name for path in (out / "parts").iterdir())
    assert names == sorted(["start.json", *(f"{m}-s{s}.json" for m in ("response", "full", "weighted-0.1") for s in (0, 1))])
    gone, made = out / "parts" / "full-s1.json", []
    before = gone.read_text()
    gone.unlink()
    train, start = lab.train, lab.start
    monkeypatch.setattr(lab, "train", lambda *args: made.append(args[1:3]) or train(*args))
    monkeypatch.setattr(lab, "start", lambda *args: made.append("start") or start(*args))
    assert lab.gradient_balance(ran.config) == ran
    assert made == [("full", 1)] and gone.read_text() == before  # bit for bit
    with pytest.raises(UserError, match=r"with steps = 4; this asks for 5"):
        lab.gradient_balance(dataclasses.replace(ran.config, steps=5))
    (tmp_path / "other").write_text("")
    with pytest.raises(UserError, match="is not empty and holds no gradient-balance"):
        lab.gradient_balance(dataclasses.replace(ran.config, out_dir=str(tmp_path)))


@pytest.mark.parametrize("mode", ["response", "full", "weighted:0.1"])
def test_runs_are_those_of_sft(home: Path, ran: Result, tmp_path: Path, mode: str) -> None:
    """The same losses, step by step, and the same held-out loss at the end, from the same examples in the same order."""
    model, _ = load(ran.config.model)
    data = lab.read(ran.config, model)
    lines = (home / "chats.jsonl").read_text().splitlines()
    number = {record.place: n for n, record in enumerate(lab.reading.read(ran.config.files))}
    for name, items in (("learnt", data.learnt), ("held", data.held)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{lines[number[item.example.place]]}\n" for item in items))
    config = Sft(
        out_dir=str(tmp_path / "run"),
        start=ran.config.model,
        data=RecordsConfig(files=(str(tmp_path / "learnt.jsonl"),), held_out=(str(tmp_path / "held.jsonl"),)),
        optim=dataclasses.replace(Sft().optim, learning_rate=3e-3, warmup_steps=1),
        loss=mode, max_steps=4, batch_size=4, eval_interval=0, save_interval=0, seed=1, device="cpu",
    )  # fmt: skip
    entries, own = read_log(sft(config)), ran.runs[mode][1]
    assert own.trained == pytest.approx([entry["loss"] for entry in entries], rel=1e-6)
    assert own.points[-1].loss("response") == pytest.approx(entries[-1]["val_loss"], rel=1e-6)
    others = [other for other in ran.config.modes if other != mode]
    assert all(abs(ran.runs[other][1].trained[-1] - own.trained[-1]) > 1e-3 for other in others)  # so that the mode is seen
    assert abs(ran.runs[mode][0].trained[0] - own.trained[0]) > 1e-3  # and the seed


def test_held_out_losses_are_means_over_their_tokens(home: Path, ran: Result) -> None:
    model, _ = load(ran.config.model)
    data = lab.read(ran.config, model)
    nats, count = np.zeros(4), np.zeros(4)
    with torch.no_grad():
        for item in data.held:
            ids = torch.tensor(item.example.ids)
            own = F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none").numpy()  # (T - 1,)
            for kind in range(4):
                nats[kind] += own[np.array(item.kinds[1:]) == kind].sum()
                count[kind] += (np.array(item.kinds[1:]) == kind).sum()
    before = ran.before
    assert before.counts == count.tolist()
    assert before.loss("response") == pytest.approx(nats[2:].sum() / count[2:].sum(), rel=1e-5)
    assert before.loss("instruction") == pytest.approx(nats[1] / count[1], rel=1e-5)
    assert before.loss("template") == pytest.approx(nats[0] / count[0], rel=1e-5)


# ---------------------------------------------------------------------- what is said


def made(ends: dict[str, list[float]], answer: float, tokens: int) -> Result:
    """A report on made-up parts: |g_Q| = 1, |g_A| = `answer`, at right angles; Q has 10 tokens, A `tokens`."""
    products = np.zeros((4, 4))
    products[INSTRUCTION, INSTRUCTION], products[RESPONSE, RESPONSE] = 1.0, answer**2
    one = Split([0, 10, tokens, 0], {WHOLE: products.tolist()})
    config = GradientBalance(files=("x",), modes=tuple(ends), seeds=len(next(iter(ends.values()))))
    runs = {mode: [Part([Point(32, [0, 2.0, loss, 0], [0, 1, 1, 0], [])], [1.0]) for loss in own] for mode, own in ends.items()}
    lengths = {
        "template": 0.0,
        "instruction": 10.0,
        "response": float(tokens),
        "end": 0.0,
        "longer_content": 1.0,
        "left_out": 0.0,
    }
    return Result(config, {}, lengths, Part([Point(0, [0, 2.0, 3.0, 0], [0, 1, 1, 0], [one, one])], []), runs)


def test_findings_say_what_the_numbers_say() -> None:
    ends = {"response": [1.0, 1.1, 1.2], "full": [1.5, 1.61, 1.69], "weighted:0.1": [1.1, 1.0, 1.21]}
    said = " ".join(findings(made(ends, 3.0, 30)))
    assert "Responses are longer than what stands before them: 75% of the tokens" in said
    assert "mostly from the response: |g_A| / (|g_Q| + |g_A|) = 0.75 (0.75 to 0.75); a token of A gives 1 times" in said
    assert "full +0.500 ± 0.025 (higher); weighted:0.1 +0.003 ± 0.249 (not distinguishable)" in said
    assert "Held-out loss of the instructions after 24 steps" in said
    short = " ".join(findings(made(ends, 0.25, 5)))
    assert "Responses are not longer" in short and "mostly from the instruction and the template: " in short
    # many tokens that cancel: longer, and yet not where the gradient comes from
    assert "mostly from the instruction" in " ".join(findings(made(ends, 0.25, 30)))
    assert "about as much from either" in " ".join(findings(made(ends, 1.0, 30)))
    shortened = made(ends, 1.0, 30)
    shortened.lengths["left_out"] = 0.29
    assert "29% of the examples have more than max_tokens" in " ".join(findings(shortened))
    backwards = {"response": ends["full"], "full": ends["response"]}
    assert "full -0.500 ± 0.025 (lower)" in " ".join(findings(made(backwards, 1.0, 5)))
    alone = made({"response": [1.0], "full": [2.0]}, 1.0, 5)
    assert "full +1.000 (one seed: no interval)" in " ".join(findings(alone))
    assert alone.outcome("response", "response").difference is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modes": ()}, "modes must name at least one loss, and each once; got none"),
        ({"modes": ("full", "full")}, "each once; got full full"),
        ({"modes": ("some",)}, "loss must be response, full or weighted:W"),
        ({"points": 40}, "points must be at most steps, 24; got 40"),
        ({"learning_rate": math.inf}, "learning_rate must be positive; got inf"),
        ({"batches": 0}, "batches must be at least 1"),
    ],
)
def test_options_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GradientBalance(**changes)
    assert [weight_of(mode) for mode in GradientBalance().modes] == [0.0, 1.0, 0.1]


def test_data_that_does_not_do(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data: name at least one file with --files FILE"):
        lab.gradient_balance(small(home, tmp_path / "out", files=()))
    with pytest.raises(UserError, match=r"40 example\(s\) cannot be parted into 40 held-out ones and others"):
        lab.gradient_balance(small(home, tmp_path / "out", held_out=40))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"run response-s0, step \d: loss nan; try a lower learning_rate"):
        lab.gradient_balance(small(home, tmp_path / "out", learning_rate=1e30))
