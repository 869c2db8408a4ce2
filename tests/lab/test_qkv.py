"""Three matrices are the fused one, to the last digits and in gradients; an untied head starts as the tied one; a small run."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.cli import main
from glassgpt.config import ModelConfig, UserError
from glassgpt.config.model import MoeConfig
from glassgpt.config.qkv import Qkv
from glassgpt.lab.qkv import qkv as lab
from glassgpt.lab.qkv import report as qkv_report
from glassgpt.lab.qkv import speed as qkv_speed
from glassgpt.lab.qkv.separate import SeparateQKV, parameters, separate, untie
from glassgpt.lab.qkv.speed import BASE, VARIANTS, Memory
from glassgpt.model import GPT
from glassgpt.train.loss import Scored

EXACT = 1e-12
V = 13
SLOTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared keys, no biases": {"n_kv_head": 2, "bias": False},
    "rope, qk norm, swiglu": {"position": "rope", "qk_norm": True, "mlp": "swiglu", "norm": "rms"},
    "wide heads, alibi": {"attention_width": 24, "position": "alibi"},
    "experts, capped": {"moe": MoeConfig(experts=3, top_k=2), "logit_cap": 3.0},
}


def noisy(**changes: Any) -> GPT:
    """A small GPT in float64 with noise on every parameter."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**{"vocab_size": V, "context_tokens": 16, "n_layer": 2, "n_head": 4, "width": 16} | changes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def drawn() -> Tensor:
    return torch.randint(V, (3, 11), generator=torch.Generator().manual_seed(1))


def loss(model: GPT) -> Tensor:
    ids = drawn()
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


# ---------------------------------------------------------------------- three matrices for one


@pytest.mark.parametrize("name", SLOTS)
def test_three_matrices_are_the_fused_one(name: str) -> None:
    fused = noisy(**SLOTS[name])
    three = separate(copy.deepcopy(fused))
    assert parameters(three) == parameters(fused)
    with torch.no_grad():
        assert float((three(drawn()) - fused(drawn())).abs().max()) < EXACT
    loss(fused).backward()
    loss(three).backward()
    found = dict(three.named_parameters())
    for key, parameter in fused.named_parameters():
        if ".qkv." in key:
            layer, kind = key.split(".qkv.")
            gradients = [found[f"{layer}.qkv.{part}.{kind}"].grad for part in "qkv"]
            together = torch.cat([gradient for gradient in gradients if gradient is not None])
        else:
            together = found[key].grad
        assert parameter.grad is not None and together is not None
        assert float((together - parameter.grad).abs().max()) < EXACT, key


def test_mixed_up_matrices_are_noticed() -> None:
    fused = noisy()
    mixed = separate(copy.deepcopy(fused))
    layer = mixed.blocks[0].attn.qkv
    assert isinstance(layer, SeparateQKV)
    layer.q, layer.k = layer.k, layer.q
    with torch.no_grad():
        assert float((mixed(drawn()) - fused(drawn())).abs().max()) > 1e-3
        biasless = separate(copy.deepcopy(fused))
        biasless.blocks[1].attn.qkv.v.bias.zero_()
        assert float((biasless(drawn()) - fused(drawn())).abs().max()) > 1e-3


def test_only_plain_matrices_are_replaced() -> None:
    model = noisy()
    with pytest.raises(UserError, match="not a plain matrix"):
        separate(separate(model))


# ---------------------------------------------------------------------- heads


def test_an_untied_head_starts_as_the_tied_one_and_learns_by_itself() -> None:
    tied = noisy()
    own = untie(copy.deepcopy(tied))
    assert parameters(own) == parameters(tied) + V * 16
    assert own.config.tied_head is False and tied.config.tied_head is True
    with torch.no_grad():
        assert torch.equal(own(drawn()), tied(drawn()))
    loss(tied).backward()
    loss(own).backward()
    both, first, last = tied.head.weight.grad, own.token_embedding.weight.grad, own.head.weight.grad
    assert both is not None and first is not None and last is not None
    assert float((first + last - both).abs().max()) < EXACT, "a tied matrix gets both gradients"
    assert float(first.abs().max()) > 1e-4 < float(last.abs().max())
    with pytest.raises(UserError, match="not tied"):
        untie(own)


# ---------------------------------------------------------------------- timings


def test_ratio_by_hand() -> None:
    assert qkv_speed.ratio([2, 4, 6], [1, 2, 3], seed=0) == (2, 2, 2)
    middle, low, high = qkv_speed.ratio([1, 3, 2, 9], [1, 1, 1, 3], seed=0)
    assert (middle, low, high) == (2.5, 1, 3)


def test_turns_begin_with_another_each_time() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "abc"}  # type: ignore[misc]
    done: list[int] = []
    found = qkv_speed.take_turns("x", runs, Qkv(rounds=2), torch.device("cpu"), lambda n, total: done.append(n))
    assert "".join(order) == "abc" + "bca" + "cab", "one turn warms up, two are timed"
    assert [len(timing.seconds) for timing in found] == [2, 2, 2] and done == [1, 2, 3]
    assert found[0].ratio == (1, 1, 1)


def test_verdicts() -> None:
    def said(*ratio: float) -> str:
        return qkv_report.verdict(qkv_speed.Timing("x", "y", [1.0, 1.0], (ratio[0], ratio[1], ratio[2])))

    assert said(1.2, 1.1, 1.3) == "20% slower" and said(0.9, 0.8, 0.95) == "10% faster"
    assert said(1.2, 0.9, 1.3) == "undecided" and said(1, 1, 1) == ""


def test_what_is_decoded_is_what_is_there() -> None:
    """The cache is wound back after every timing: the same tokens give the same logits each time."""
    model, config = noisy(), Qkv(cached_tokens=4, preset="tiny")
    seen: list[Tensor] = []
    run = qkv_speed.decode_run(model, config)
    handle = model.head.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    run()
    run()
    handle.remove()
    first, second = seen[: qkv_speed.DECODED], seen[qkv_speed.DECODED :]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    ids = torch.randint(V, (1, 4 + qkv_speed.DECODED), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert float((torch.cat(first, dim=1) - model(ids)[:, 4:]).abs().max()) < EXACT


def test_a_training_step_steps() -> None:
    model = noisy().float()
    before = copy.deepcopy(model)
    qkv_speed.train_run(model, Qkv(context_tokens=8))()
    assert all(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_memory_of_a_process() -> None:
    config = Qkv(preset="nano", batch_size=2, context_tokens=64, cached_tokens=8, device="cpu", threads=1)
    found = qkv_speed.memory(config, "fused, untied")
    assert found.parameters == 1_071_872 + 2048 * 128
    assert found.training_bytes > 3 * 4 * found.parameters, "weights and two moments of AdamW"
    assert 4 * found.parameters < found.forward_bytes < found.training_bytes


# ---------------------------------------------------------------------- trainings


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = "the old dog sat on a red mat and saw ten big hens".split()
    lines = [" ".join(words[(i * j) % 12] for j in range(1, 120)) for i in range(1, 60)]
    path.write_text("<|endoftext|>".join(lines))
    return path


SMALL = {"preset": "tiny", "train_preset": "tiny", "batch_size": 2, "context_tokens": 16, "cached_tokens": 8, "rounds": 2}
SMALL |= {"steps": 8, "train_batch_size": 2, "eval_interval": 4, "eval_batches": 2, "seeds": 2, "device": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def tiny() -> Any:
    """`tiny` with as many ids as a tokenizer of bytes has."""
    from glassgpt.config import PRESETS

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", ModelConfig(vocab_size=270, context_tokens=32, n_layer=2, n_head=2, width=16))
        yield


def test_equal_numbers_learn_equally(tiny: Any, text: Path) -> None:
    config = Qkv(**SMALL, sources=(str(text),))  # type: ignore[arg-type]
    tokens = lab.read(config)
    runs = {name: lab.train(config, name, 0, tokens, torch.device("cpu")) for name in VARIANTS}
    apart = [abs(a - b) for a, b in zip(runs[BASE].losses, runs[lab.SEPARATE].losses, strict=True)]
    assert max(apart) < 1e-5
    double = [lab.train(config, name, 0, tokens, torch.device("cpu"), lab.DOUBLE).losses for name in (BASE, lab.SEPARATE)]
    assert max(abs(a - b) for a, b in zip(*double, strict=True)) < EXACT
    assert [steps for steps, _ in runs[BASE].held_out] == [0, 4, 8]
    assert runs[lab.UNTIED].losses[0] == pytest.approx(runs[BASE].losses[0], abs=1e-6), "equal numbers at first"
    assert abs(runs[lab.UNTIED].losses[-1] - runs[BASE].losses[-1]) > 1e-4, "and others later"
    assert lab.train(config, BASE, 1, tokens, torch.device("cpu")).losses != runs[BASE].losses, "another seed"
    assert runs[BASE].losses[-1] < runs[BASE].losses[0]


def test_batches_and_held_out_text(tiny: Any, text: Path) -> None:
    config = Qkv(**SMALL, sources=(str(text),))  # type: ignore[arg-type]
    tokens = lab.read(config)
    batch = tokens.batch("learnt", 3, 9, seed=5)
    assert batch.shape == (3, 9) and torch.equal(batch, tokens.batch("learnt", 3, 9, seed=5))
    whole = tokens.learnt.tolist()
    assert all(row in [whole[i : i + 9] for i in range(len(whole) - 8)] for row in batch.tolist())
    model = GPT(ModelConfig(vocab_size=270, context_tokens=32, n_layer=1, n_head=1, width=8)).eval()
    ids = torch.cat([tokens.batch("held_out", 2, 33, seed) for seed in range(2)])
    expected = Scored(model)(ids[:, :-1], ids[:, 1:]).item() / ids[:, 1:].numel()
    assert lab.measure(config, model, tokens) == pytest.approx(expected, abs=1e-5)


def test_a_small_run(
    tiny: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab, "memory", lambda config, variant: Memory(7, 8_000_000, 9_000_000))  # measured in a test of its own
    options = [[f"--{name}", str(value)] for name, value in SMALL.items()]
    arguments = ["lab", "qkv", *itertools.chain(*options), "--sources", str(text), "--out_dir", str(tmp_path / "out")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "compute the same" in said and "A head of its own" in said
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(found["timings"]) == 15 and len(found["runs"]) == 7
    assert found["largest_difference"]["float64"] < EXACT and found["largest_difference"]["float32"] < 1e-4
    ends = {(run["variant"], run["seed"]): run["held_out"][-1][1] for run in found["runs"] if run["dtype"] == "float32"}
    differences = [ends[lab.UNTIED, seed] - ends[BASE, seed] for seed in (0, 1)]
    assert found["untied_difference"]["mean"] == pytest.approx(sum(differences) / 2, abs=1e-9)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"results.json", "timings.csv", "report.md", "qkv.svg", "qkv.png"}
    assert len((tmp_path / "out" / "timings.csv").read_text().splitlines()) == 1 + 15 * 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds", "1"], "rounds must be at least 2"),
        (["--preset", "llama-2-7b", "--cached_tokens", "5000"], "has a context of 4096"),
        (["--sources", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--learning_rate", "0"], "learning_rate must be positive"),
        (["--preset", "nonsense"], "unknown preset"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [] if "nowhere.txt" in arguments else ["--steps", "0"]
    assert main(["lab", "qkv", "--device", "cpu", *steps, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_layer_of_three_has_no_bias_where_the_fused_one_has_none() -> None:
    layer = SeparateQKV(nn.Linear(4, 6, bias=False), (2, 2, 2))
    assert [name for name, _ in layer.named_parameters()] == ["q.weight", "k.weight", "v.weight"]
