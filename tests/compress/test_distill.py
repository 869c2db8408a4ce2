"""`glassgpt distill` on a tiny teacher: what a step does, how a student begins, resuming, the comparison, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from exact import add_noise
from tiny import caller

from glassgpt.compress import distill_compare
from glassgpt.compress.distill import distill, flow, losses, on
from glassgpt.compress.distill_compare import Arm, Comparison, compare, verdict
from glassgpt.compress.matching import hidden_loss, soft_loss
from glassgpt.compress.student import Guided, begin, open_teacher
from glassgpt.config import DataConfig, ModelConfig, OptimConfig, Pretrain, UserError
from glassgpt.config.distill import Distill, StudentConfig
from glassgpt.config.files import write_yaml
from glassgpt.config.quantize import Recipe
from glassgpt.data import Batch, Stream, Windows, corpus
from glassgpt.loading import complete_checkpoints, load
from glassgpt.model import GPT, weights
from glassgpt.model.quantised import put, round_to_nearest, targets
from glassgpt.text import Tokenizer
from glassgpt.train.pretrain import pretrain
from glassgpt.train.run import read_log

SHAPE = ModelConfig(300, 16, n_layer=3, n_head=2, width=16, spans=("full", "window", "full"), window_tokens=4)
CPU = torch.device("cpu")
WORDS = "the a cat dog fox hen sat ran saw ate on in under mat log box pen big red old new and then but so".split()


def sentences(seed: int) -> str:
    draw = random.Random(seed)
    return "".join(" ".join(draw.choices(WORDS, k=8)) + ".\n" for _ in range(100))


def write_teacher(folder: Path, shape: ModelConfig = SHAPE, seed: int = 0) -> Path:
    """A random model with noise on every parameter and a tokenizer of its own."""
    tokenizer = Tokenizer.train([sentences(seed)], shape.vocab_size)
    torch.manual_seed(seed)
    model = GPT(dataclasses.replace(shape, vocab_size=tokenizer.vocab_size))
    add_noise(model)
    folder.mkdir(parents=True)
    weights.save(model, folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture a run takes longer than the run."""
    monkeypatch.setattr("glassgpt.train.session.plot_loss", lambda run: [])


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher and a text."""
    folder = tmp_path_factory.mktemp("distill")
    write_teacher(folder / "teacher")
    (folder / "text.txt").write_text(sentences(1))
    return folder


def settings(home: Path, out_dir: Path, **changes: Any) -> Distill:
    """Six steps of a student of two blocks."""
    values: dict[str, Any] = {
        "teacher": str(home / "teacher"),
        "out_dir": str(out_dir),
        "data": DataConfig(sources=(str(home / "text.txt"),)),
        "optim": OptimConfig(learning_rate=0.003, warmup_steps=2, weight_decay=0.0),
        "max_steps": 6,
        "batch_size": 4,
        "eval_interval": 0,
        "save_interval": 0,
        "device": "cpu",
        "precision": "fp64",
    }
    return Distill(**{**values, **changes})


NARROW: dict[str, Any] = {"student": StudentConfig(n_layer=2, width=8, n_head=2), "init": "random", "hidden_weight": 0.7}


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Everything that the newest checkpoint of a run holds."""
    files = sorted(complete_checkpoints(run)[-1].glob("*.safetensors"))
    return {f"{file.name}:{name}": t for file in files for name, t in safetensors.torch.load_file(file).items()}


def same(a: Path, b: Path) -> bool:
    ours, theirs = tensors(a), tensors(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def log(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in read_log(run)]


# ---------------------------------------------------------------------- what a step does


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_three_steps_written_out(kind: str, home: Path, tmp_path: Path) -> None:
    """All logits at once, the plain losses, both models' hidden states by hand, AdamW: what the loop must come to."""
    optimizer = OptimConfig(learning_rate=0.01, warmup_steps=2, weight_decay=0.0, grad_clip=0.0)
    config = settings(home, tmp_path / "run", **NARROW, hidden_loss=kind, max_steps=3, accumulation_steps=2, optim=optimizer)
    run = distill(config)
    teacher, tokenizer = open_teacher(config, CPU)
    model = begin(config, teacher, tokenizer)
    guide = Guided(model, teacher.config)
    (domain,) = corpus.read(run / "shards", tokenizer).domains
    stream = Stream([Windows(domain.shards.tokens("train"), 16, (config.seed,))], [1.0], batch_size=8)
    adamw = torch.optim.AdamW(guide.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step, rate in enumerate((0.005, 0.01, 0.01)):
        batch = stream.batch(step)
        count = batch.count
        (own, own_states), (its, its_states) = flow(model, batch), flow(teacher, batch)
        soft = soft_loss(model.logits(own), teacher.logits(its), batch.targets, config.alpha, config.temperature)
        first = hidden_loss(guide.head[0](own_states[0]), its_states[1], batch.targets, config.hidden_loss)
        second = hidden_loss(guide.head[1](own_states[1]), its_states[2], batch.targets, config.hidden_loss)
        loss = (soft.sum + 0.7 * (first + second) / 2) / count
        entry = read_log(run)[step]
        expected = (loss, soft.nats / count, soft.divergence / count, (first + second) / 2 / count)
        for name, value in zip(("loss", "next_token_loss", "divergence", "hidden_distance"), expected, strict=True):
            assert entry[name] == pytest.approx(value.item(), rel=0, abs=1e-10)
        adamw.zero_grad()
        loss.backward()
        adamw.param_groups[0]["lr"] = rate
        adamw.step()
    found, expected_weights = tensors(run), dict(model.named_parameters()) | {"head.safetensors:0": guide.head[0].weight}
    for name, parameter in expected_weights.items():
        ours = found["head.safetensors:0.weight"] if "safetensors" in name else found[f"model.safetensors:{name}"]
        assert (ours - parameter).abs().max() < 1e-9, name
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_flow_is_the_models_own_way(home: Path) -> None:
    model = load(home / "teacher")[0].double()
    ids = torch.randint(280, (3, 16), generator=torch.Generator().manual_seed(0))
    hidden, states = flow(model, Batch(ids, ids))
    assert torch.equal(hidden, model.hidden(ids)) and len(states) == 3
    assert torch.equal(model.norm_f(states[-1]), hidden)


def test_neither_student_nor_teacher_sees_another_document(home: Path, tmp_path: Path) -> None:
    """Two documents in one row give the loss of two rows, with nothing of the first known to the second."""
    config = settings(home, tmp_path, hidden_weight=0.5)
    teacher, tokenizer = open_teacher(config, CPU)
    model = begin(config, teacher, tokenizer)
    add_noise(model)
    guide = Guided(model, teacher.config)
    ids = torch.randint(280, (1, 16), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, 1)
    segments = (torch.arange(16) >= 6).long().unsqueeze(0)
    together, parts = losses(config, model, teacher, guide, on(Batch(ids, targets, segments), CPU))
    alone = [losses(config, model, teacher, guide, Batch(ids[:, a:b], targets[:, a:b]))[0] for a, b in ((0, 6), (6, 16))]
    mixed, _ = losses(config, model, teacher, guide, Batch(ids, targets))
    assert abs(together - sum(alone)) < 1e-10 and abs(together - mixed) > 1e-3
    assert all(part > 0 for part in parts)


def test_a_copy_of_the_teacher_has_nothing_to_learn_from_it(home: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"student": StudentConfig(n_layer=3), "alpha": 1.0, "hidden_weight": 1.0, "max_steps": 2}
    run = distill(settings(home, tmp_path / "run", **changes))
    (first, second), teacher = read_log(run), load(home / "teacher")[0]
    for entry in (first, second):
        assert abs(entry["divergence"]) < 1e-12 and abs(entry["hidden_distance"]) < 1e-12 and entry["next_token_loss"] > 1
    assert first["grad_norm"] < 1e-12
    assert load(run)[0].config == teacher.config


def test_the_student_alone_is_pretraining(home: Path, tmp_path: Path) -> None:
    """alpha 0: the teacher gives tokenizer and shape, and nothing else. The weights are `pretrain`'s, to the bit."""
    config = settings(home, tmp_path / "alone", alpha=0.0, init="random", precision="fp32", accumulation_steps=2)
    run = distill(config)
    shape = StudentConfig().shape(load(home / "teacher")[0].config)
    data = dataclasses.replace(config.data, tokenizer=str(home / "teacher"))
    values = {name: getattr(config, name) for name in ("max_steps", "batch_size", "accumulation_steps", "seed", "optim")}
    values |= {"eval_interval": 0, "save_interval": 0, "device": "cpu", "precision": "fp32", "compile": "off"}
    other = pretrain(Pretrain(out_dir=str(tmp_path / "pretrain"), model=shape, data=data, **values))
    assert same(run, other) and len(tensors(run)) > 50
    assert log(run)[-1]["val_bits_per_byte"] == pytest.approx(log(other)[-1]["val_bits_per_byte"], rel=0, abs=1e-6)
    taught = distill(dataclasses.replace(config, out_dir=str(tmp_path / "taught"), alpha=0.1))
    assert not same(taught, other)


def test_accumulation_is_one_batch(home: Path, tmp_path: Path) -> None:
    one, many = (
        distill(settings(home, tmp_path / str(size), **NARROW, batch_size=size, accumulation_steps=4 // size)) for size in (4, 1)
    )
    ours, theirs = tensors(one), tensors(many)
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-9


def test_it_comes_nearer_to_its_teacher(home: Path, tmp_path: Path) -> None:
    optimizer = OptimConfig(learning_rate=0.01, warmup_steps=2)
    changes: dict[str, Any] = {"init": "random", "alpha": 1.0, "hidden_weight": 1.0, "precision": "fp32"}
    run = distill(settings(home, tmp_path / "run", **changes, max_steps=40, optim=optimizer))
    first, last = read_log(run)[0], read_log(run)[-1]
    assert last["divergence"] < 0.5 * first["divergence"] and last["hidden_distance"] < 0.5 * first["hidden_distance"]


# ---------------------------------------------------------------------- resuming, saving


@pytest.mark.parametrize("changes", [{}, NARROW, {"alpha": 0.0}], ids=["logits", "hidden", "alone"])
def test_a_resumed_run_is_the_uninterrupted_one(changes: dict[str, Any], home: Path, tmp_path: Path) -> None:
    """To the bit: weights, the maps between widths, optimisers, and every number of the log but the seconds."""
    calm = distill(settings(home, tmp_path / "calm", **changes, save_interval=3))
    cut = tmp_path / "cut"
    shutil.copytree(calm, cut)
    shutil.rmtree(cut / "checkpoints" / "step-000006")
    distill(settings(home, cut, **changes, save_interval=3, resume=True))
    assert same(calm, cut) and log(calm) == log(cut) and len(log(cut)) == 6
    assert any(name.startswith("head.safetensors") for name in tensors(calm)) == (changes is NARROW)


def test_maps_that_are_forgotten_would_be_seen(home: Path, tmp_path: Path) -> None:
    run = distill(settings(home, tmp_path / "run", **NARROW, save_interval=3))
    before = tensors(run)
    shutil.rmtree(run / "checkpoints" / "step-000006")
    path = run / "checkpoints" / "step-000003" / "head.safetensors"
    held = safetensors.torch.load_file(path)
    safetensors.torch.save_file({name: torch.zeros_like(tensor) for name, tensor in held.items()}, path)
    distill(settings(home, run, **NARROW, save_interval=3, resume=True))
    assert (before["model.safetensors:token_embedding.weight"] - tensors(run)["model.safetensors:token_embedding.weight"]).any()


def test_the_student_is_an_ordinary_run(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = caller("distill", capsys)
    arguments = ["--device", "cpu", "--data.sources", home / "text.txt", "--max_steps", 2, "--batch_size", 4, "--json"]
    done = call(home / "teacher", "--out_dir", tmp_path / "run", *arguments)
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert (told["step"], told["out_dir"]) == (2, str(tmp_path / "run")) and told["val_bits_per_byte"] > 0
    model, tokenizer = load(tmp_path / "run")
    assert model.config == dataclasses.replace(load(home / "teacher")[0].config, n_layer=2, spans=("full",), window_tokens=None)
    assert tokenizer.sha256 == Tokenizer.load(home / "teacher").sha256
    assert "2 blocks; teacher" in done.err and "the teacher: held-out loss" in done.err
    assert call("--resume", "--out_dir", tmp_path / "run").code == 0
    refused = call("--resume", "--out_dir", tmp_path / "run", "--alpha", 0.9)
    assert refused.code == 2 and "was started with alpha = 0.5; resuming asks for 0.9" in refused.err


def test_a_run_can_teach_and_its_name_stays_the_same_checkpoint(home: Path, tmp_path: Path) -> None:
    first = distill(settings(home, tmp_path / "first", student=StudentConfig(n_layer=2), max_steps=2))
    second = distill(settings(home, tmp_path / "second", teacher=str(first), init="random", max_steps=2))
    assert load(second)[0].config.n_layer == 1
    assert "first/checkpoints/step-000002" in (second / "config.yaml").read_text()


@pytest.mark.slow
def test_two_ranks_are_one(home: Path, tmp_path: Path) -> None:
    one = distill(settings(home, tmp_path / "one", **NARROW, max_steps=3))
    write_yaml(tmp_path / "config.yaml", settings(home, tmp_path / "two", **NARROW, max_steps=3))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--", "glassgpt"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = ["distill", "--config", str(tmp_path / "config.yaml")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = tensors(one), tensors(tmp_path / "two")
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-9
    for a, b in zip(log(one), log(tmp_path / "two"), strict=True):
        assert all(a[name] == pytest.approx(b[name], abs=1e-9) for name in a)


# ---------------------------------------------------------------------- how a student begins


def test_layers_are_the_teachers(home: Path, tmp_path: Path) -> None:
    config = settings(home, tmp_path)
    teacher, tokenizer = open_teacher(config, CPU)
    model = begin(config, teacher, tokenizer)
    assert model.config.spans == ("full",) and model.training and not teacher.training
    for own, its in zip(model.blocks, (teacher.blocks[0], teacher.blocks[2]), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own.parameters(), its.parameters(), strict=True))
    assert torch.equal(model.head.weight, teacher.head.weight) and torch.equal(model.norm_f.bias, teacher.norm_f.bias)
    ids = torch.randint(280, (2, 16))
    whole = begin(dataclasses.replace(config, student=StudentConfig(n_layer=3)), teacher, tokenizer)
    assert torch.equal(whole(ids), teacher(ids))
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert not torch.equal(model.token_embedding.weight, teacher.token_embedding.weight)  # a copy


def test_the_shape_is_the_teachers_but_for_what_is_given() -> None:
    teacher = ModelConfig(300, 16, n_layer=5, n_head=8, n_kv_head=2, width=64, norm="rms", mlp_width=100, attention_width=128)
    assert StudentConfig().shape(teacher) == dataclasses.replace(teacher, n_layer=3)
    found = StudentConfig(n_layer=7, width=32).shape(teacher)
    assert (found.n_layer, found.width, found.n_head, found.kv_heads, found.mlp_width) == (7, 32, 2, 2, None)
    assert found.norm == "rms" and found.attention_width is None
    many = ModelConfig(300, 16, n_layer=4, n_head=4, width=32)
    assert StudentConfig(width=16).shape(many) == dataclasses.replace(many, n_layer=2, width=16, n_head=2)


def test_another_model_can_be_the_student(home: Path, tmp_path: Path) -> None:
    run = distill(settings(home, tmp_path / "small", **NARROW, max_steps=2))
    again = distill(settings(home, tmp_path / "again", init=str(run), max_steps=2))
    before, after = load(run)[0], load(again)[0]
    assert after.config == before.config and not torch.equal(after.head.weight, before.head.weight)


def quantised_teacher(home: Path, folder: Path) -> Path:
    """The teacher in 8 bits."""
    model, tokenizer = load(home / "teacher")
    matrices = {name: round_to_nearest(model.get_parameter(f"{name}.weight"), 8, None) for name in targets(model)}
    put(model, matrices, Recipe(dict.fromkeys(matrices, 8)))
    folder.mkdir()
    weights.save(model, folder)
    tokenizer.save(folder)
    return folder


def test_a_quantised_model_can_teach_but_not_learn(home: Path, tmp_path: Path) -> None:
    small = quantised_teacher(home, tmp_path / "small")
    config = settings(home, tmp_path / "run", teacher=str(small), max_steps=1)
    teacher, tokenizer = open_teacher(config, CPU)
    ids = torch.randint(280, (2, 16), generator=torch.Generator().manual_seed(0))
    assert (teacher(ids) - load(small)[0](ids)).abs().max() < 1e-4 * teacher(ids).abs().max()
    assert torch.equal(begin(config, teacher, tokenizer).head.weight, teacher.head.weight)
    assert log(distill(config))[0]["divergence"] > 0
    with pytest.raises(UserError, match="is quantised, and codes cannot be trained"):
        distill(settings(home, tmp_path / "other", init=str(small)))


def test_a_larger_student_is_allowed_and_said(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    distill(settings(home, tmp_path / "run", student=StudentConfig(n_layer=4), init="random", max_steps=1))
    assert "the student is larger than its teacher" in capsys.readouterr().err


# ---------------------------------------------------------------------- the comparison


def test_the_comparison(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "both"
    config = settings(home, out, compare=True, hidden_weight=0.5, seeds=2, eval_interval=3, json=True)
    distill(config)
    told = json.loads(capsys.readouterr().out)
    assert json.loads((out / "comparison.json").read_text()) == told
    assert [(arm["name"], arm["seed"]) for arm in told["arms"]] == [
        (name, seed) for seed in (0, 1) for name in ("alone", "logits", "logits-hidden")
    ]
    ends = {(arm["name"], arm["seed"]): arm["bits_per_byte"] for arm in told["arms"]}
    assert len(set(ends.values())) == 6
    for name in ("logits", "logits-hidden"):
        assert told["gains"][name] == [ends["alone", seed] - ends[name, seed] for seed in (0, 1)]
    assert [point[0] for point in told["arms"][0]["curve"]] == [3 * 4 * 16, 6 * 4 * 16]
    assert all((out / f"comparison{suffix}").stat().st_size > 5000 for suffix in (".svg", ".png"))

    # each arm is the run that it says it is, over the same shards
    alone = distill(settings(home, tmp_path / "alone", alpha=0.0, seed=1, eval_interval=3))
    taught = distill(settings(home, tmp_path / "taught", seed=1, eval_interval=3, hidden_weight=0.5))
    assert same(alone, out / "alone-1") and same(taught, out / "logits-hidden-1")
    assert not (same(taught, out / "logits-1") or same(taught, out / "logits-hidden-0"))

    # a second call trains only what is missing
    trained: list[str] = []
    monkeypatch.setattr(distill_compare, "train", lambda arm: trained.append(Path(arm.out_dir).name) or distill(arm))
    shutil.rmtree(out / "logits-1" / "checkpoints")
    (out / "logits-1" / "log.jsonl").unlink()
    again = compare(dataclasses.replace(config, resume=True, json=False))
    assert trained == ["logits-1"] and [arm.bits_per_byte for arm in again.arms] == [arm["bits_per_byte"] for arm in told["arms"]]
    assert "less than alone" in (shown := capsys.readouterr().out) and max(map(len, shown.splitlines())) <= 130
    monkeypatch.setattr(distill_compare, "train", lambda arm: None)
    with pytest.raises(UserError, match="alone-2 was told to stop and is saved; the same command with --resume goes on"):
        compare(dataclasses.replace(config, resume=True, seeds=3))
    with pytest.raises(UserError, match="holds a comparison already; continue it with --resume"):
        compare(config)
    with pytest.raises(UserError, match=r"was started with alpha = 0.5; resuming asks for 0.9"):
        compare(dataclasses.replace(config, resume=True, alpha=0.9))


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ([0.02], "0.0200 bits per byte better than alone at equal tokens, with one seed"),
        ([-0.02, -0.04], "0.0300 bits per byte worse than alone at equal tokens on average, with the same sign for all 2 seeds"),
        ([0.02, -0.01], "no difference that 2 seeds agree on"),
    ],
)
def test_a_gain_is_called_one_only_if_seeds_agree(gains: list[float], said: str) -> None:
    assert verdict(gains).startswith(said)
    arms = [Arm(name, n, 2.0 - gain * (name != "alone"), 1.0, []) for n, gain in enumerate(gains) for name in ("alone", "logits")]
    assert Comparison({}, 1.0, 2, 1, arms).gains("logits") == pytest.approx(gains)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"alpha": 2.0}, r"alpha must be between 0 \(the student alone\) and 1 \(the teacher alone\); got 2.0"),
        ({"alpha": float("nan")}, "alpha must be between 0"),
        ({"temperature": 0.0}, "temperature must be positive; got 0.0"),
        ({"hidden_weight": -1.0}, "hidden_weight must be at least 0"),
        ({"hidden_loss": "l1"}, "hidden_loss must be one of cosine, mse"),
        ({"data": DataConfig(tokenizer="x")}, "leave data.tokenizer out"),
        ({"compare": True, "alpha": 0.0}, "nothing to compare it with"),
        ({"seeds": 2}, "seeds is 2, which is for --compare"),
        ({"teacher": "no-such-model"}, "no-such-model"),
        ({"init": "no-such-model"}, "no-such-model"),
        ({"student": StudentConfig(width=8, n_head=2)}, "the student's n_head|the student's width"),
        ({"student": StudentConfig(n_layer=4)}, "has 3 blocks to copy and the student 4"),
        ({"student": StudentConfig(width=17), "init": "random"}, "n_head must divide width"),
        ({"data": DataConfig(sources=("no-such-file.txt",))}, "no-such-file.txt"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], said: str, home: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as error:
        distill(settings(home, tmp_path / "run", **changes))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("checkpoints"))


def test_a_start_that_failed_leaves_nothing_of_its_text(home: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("The cat sat.")
    for compare_too in (False, True):
        out = tmp_path / f"run-{compare_too}"
        with pytest.raises(UserError, match=r"too short|fewer than two tokens"):
            distill(settings(home, out, data=DataConfig(sources=(str(short),)), compare=compare_too))
        assert (out / "shards").is_dir()
        distill(settings(home, out, compare=compare_too, max_steps=1))
        assert log(out / "logits-0" if compare_too else out)[-1]["val_tokens"] > 50


def test_students_that_a_teacher_cannot_teach(home: Path, tmp_path: Path) -> None:
    other = write_teacher(tmp_path / "other", seed=7)  # as many ids, which mean something else
    with pytest.raises(UserError, match="have different vocabularies"):
        distill(settings(home, tmp_path / "a", init=str(other)))
    with pytest.raises(UserError, match="keeps that model's shape; leave --student out"):
        distill(settings(home, tmp_path / "b", init=str(other), student=StudentConfig(n_layer=1)))
