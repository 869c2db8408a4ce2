"""Pretraining end to end on a few sentences: it learns, it adds up, and it survives being killed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import small
import torch
from small import tensors

from glassgpt.config import DataConfig, OptimConfig, Pretrain, UserError, preset
from glassgpt.config.files import read_yaml
from glassgpt.data import Batch, InOrder, Stream, Windows, corpus
from glassgpt.loading import complete_checkpoints
from glassgpt.model import GPT
from glassgpt.text import Tokenizer
from glassgpt.train import checkpoint, ledger
from glassgpt.train.evaluate import measure
from glassgpt.train.loss import Scored, token_loss
from glassgpt.train.parallel import Ranks
from glassgpt.train.pretrain import open_run, prepare, pretrain
from glassgpt.train.run import Log, plot_loss, read_log

CPU = torch.device("cpu")
ALONE = Ranks(CPU)
SHAPE = preset("tiny", vocab_size=300)
POEM = "The cat sat on the mat. The dog sat on the log. The fox sat on a box, and the hen in her pen.\n" * 12


settings = functools.partial(small.settings, compile="auto")


def losses(run: Path) -> list[float]:
    entries = read_log(run)
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))  # each step once, in order
    return [entry["loss"] for entry in entries]


def differing(a: Path, b: Path) -> list[str]:
    """Names of tensors (weights and optimiser state) that are not equal to the last bit."""
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys() and len(ours) > 30
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


# ---------------------------------------------------------------------- it learns


def test_it_learns_a_small_text_by_heart(tmp_path: Path) -> None:
    path = tmp_path / "poem.txt"
    path.write_text(POEM)
    optimizer = OptimConfig(learning_rate=0.02, warmup_steps=5)
    model = dataclasses.replace(SHAPE, width=32)
    config = settings(tmp_path / "run", path, model=model, optim=optimizer, max_steps=80, batch_size=8, eval_interval=40)
    assert pretrain(config) == tmp_path / "run"
    seen = losses(tmp_path / "run")
    assert abs(seen[0] - math.log(300)) < 0.7  # at first every id is about as likely
    assert max(seen[-10:]) < 0.5
    assert [entry["step"] for entry in read_log(tmp_path / "run") if "val_loss" in entry] == [40, 80]


def test_what_a_run_leaves_behind(text: Path, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", text, max_steps=3, accumulation_steps=2)
    run = pretrain(config)
    kept = read_yaml(run / "config.yaml", Pretrain)
    assert kept == dataclasses.replace(config, compile="off")  # what `auto` came to
    (stage,) = ledger.read(run)
    last = {key: read_log(run)[-1][f"val_{key}"] for key in ("loss", "bits_per_byte", "tokens", "bytes")}
    assert stage == {"after": "run", "domains": {"sentences": last}}
    assert (run / "loss.svg").read_text().rstrip().endswith("</svg>")
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG") and (run / "loss.png").stat().st_size > 5000
    (saved,) = complete_checkpoints(run)
    assert json.loads((saved / "complete.json").read_text())["val_loss"] == read_log(run)[-1]["val_loss"]
    entry = read_log(run)[0]
    assert entry.keys() == {"step", "loss", "grad_norm", "lr", "tokens", "seconds", "mfu"}
    assert entry["tokens"] == 2 * 2 * SHAPE.context_tokens
    assert entry["lr"] == 0.01 / 4

    # the last validation reads every held-out target once
    assert read_log(run)[-1]["val_tokens"] == corpus.read(run / "shards", Tokenizer.load(run)).count("val") - 1


# ---------------------------------------------------------------------- it adds up


def test_four_steps_written_out(text: Path, tmp_path: Path) -> None:
    """The whole batch's gradient at once, clipped, and AdamW at the schedule's rates: what the loop must come to."""
    optimizer = OptimConfig(learning_rate=0.01, warmup_steps=2, weight_decay=0.0, grad_clip=0.5)
    config = settings(tmp_path / "run", text, max_steps=4, accumulation_steps=2, optim=optimizer)
    run = pretrain(config)
    (domain,) = corpus.read(run / "shards", Tokenizer.load(run)).domains
    stream = Stream([Windows(domain.shards.tokens("train"), SHAPE.context_tokens, (config.seed,))], [1.0], batch_size=4)
    torch.manual_seed(config.seed)
    model = GPT(SHAPE)
    adamw = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step, rate in enumerate((0.005, 0.01, 0.01, 0.001)):  # warm-up, peak, peak, a tenth of it
        batch = stream.batch(step)
        logits = model(batch.ids)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt().item()
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient * min(1.0, 0.5 / norm)
        adamw.param_groups[0]["lr"] = rate
        adamw.step()
        entry = read_log(run)[step]
        assert norm > 0.5  # so that clipping does something
        assert entry["lr"] == pytest.approx(rate, rel=1e-12)
        assert entry["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert entry["grad_norm"] == pytest.approx(norm, abs=1e-4)
    ours = safetensors.torch.load_file(complete_checkpoints(run)[-1] / "model.safetensors")
    for name, parameter in model.named_parameters():
        if not name.endswith("attn.qkv.bias"):  # a key's bias changes no attention: its gradient is rounding error alone
            assert torch.allclose(ours[name], parameter, rtol=0, atol=1e-4), name


def test_accumulation_changes_no_loss(text: Path, tmp_path: Path) -> None:
    seen = {}
    for batch_size, accumulation_steps in ((8, 1), (1, 8), (2, 4)):
        config = settings(
            tmp_path / f"{batch_size}x{accumulation_steps}", text, max_steps=8,
            batch_size=batch_size, accumulation_steps=accumulation_steps,
        )  # fmt: skip
        seen[batch_size] = losses(pretrain(config))
    assert len(set(seen[8])) == 8
    for other in (1, 2):
        assert max(abs(a - b) for a, b in zip(seen[8], seen[other], strict=True)) < 1e-5


def test_accumulated_gradients_are_the_same_to_1e10_in_float64() -> None:
    torch.manual_seed(0)
    model = GPT(SHAPE).double()
    with torch.no_grad():
        for parameter in model.parameters():  # zero biases would hide mistakes
            parameter += 0.1 * torch.randn_like(parameter)
    ids = np.random.default_rng(0).integers(300, size=2000).astype(np.uint16)

    def gradients(batch_size: int, accumulation_steps: int, world: int = 1) -> list[torch.Tensor]:
        stream = Stream([Windows([ids], SHAPE.context_tokens, (0,))], [1.0], batch_size, accumulation_steps, world)
        batches = [stream.batch(3, micro, rank) for micro in range(accumulation_steps) for rank in range(world)]
        count = sum(batch.count for batch in batches)
        model.zero_grad()
        for batch in batches:
            (token_loss(model(batch.ids), batch.targets).sum / count).backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    whole = gradients(8, 1)
    assert max(gradient.abs().max().item() for gradient in whole) > 1e-3
    for parts in ((1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)):
        for a, b in zip(whole, gradients(*parts), strict=True):
            assert (a - b).abs().max() < 1e-10


# ---------------------------------------------------------------------- it survives being killed

# A real process per kill, forked from a server that has imported PyTorch once.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["glassgpt.train.pretrain", "torch._dynamo", "matplotlib.pyplot"])


def dies_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, but the process kills itself instead of the `call`-th call."""
    calls = itertools.count(1)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    return wrapped


def train_until_killed(config: Pretrain, moment: str) -> None:
    """What the process does."""
    torch.set_num_threads(1)
    if moment == "between saves":
        write = Log.write

        def write_slowly(log: Log, entry: dict[str, Any]) -> None:
            write(log, entry)
            time.sleep(0.05)  # so that the test can hit the step it wants

        Log.write = write_slowly
    elif moment == "half written":  # a save writes two files of tensors; this is the second one of the second save
        safetensors.torch.save_file = dies_at(4, safetensors.torch.save_file)
    elif moment == "all synced":  # renames: the shards, the first save, the second save
        Path.rename = dies_at(3, Path.rename)
    pretrain(config)


VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "dropout": {"model": dataclasses.replace(SHAPE, dropout=0.1)},
    "muon": {"optim": OptimConfig(optimizer="muon", learning_rate=0.01, warmup_steps=4)},
}


@pytest.fixture(scope="module")
def uninterrupted(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The finished run of a variant that nobody killed."""
    done: dict[str, Path] = {}

    def run(variant: str) -> Path:
        if variant not in done:
            out_dir = tmp_path_factory.mktemp("whole") / variant
            done[variant] = pretrain(settings(out_dir, text, save_interval=5, **VARIANTS[variant]))
        return done[variant]

    return run


def wait_for_step(run: Path, step: int, process: Any) -> None:
    deadline = time.monotonic() + 300
    while not any(entry["step"] >= step for entry in read_log(run)):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("variant", "moment", "survives"),
    [
        ("adamw", "between saves", ["step-000005", "step-000010"]),
        ("adamw", "half written", ["step-000005"]),
        ("dropout", "between saves", ["step-000005", "step-000010"]),
        ("muon", "all synced", ["step-000005"]),
    ],
)
def test_a_killed_run_continues_bit_for_bit(
    variant: str, moment: str, survives: list[str], text: Path, tmp_path: Path, uninterrupted: Callable[[str], Path]
) -> None:
    run = tmp_path / "run"
    config = settings(run, text, save_interval=5, **VARIANTS[variant])
    process = processes.Process(target=train_until_killed, args=(config, moment))
    process.start()
    if moment == "between saves":
        wait_for_step(run, 12, process)
        process.kill()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    assert [folder.name for folder in complete_checkpoints(run)] == survives
    assert len(list((run / "checkpoints").glob(".tmp-*"))) == (0 if moment == "between saves" else 1)
    assert read_log(run)[-1]["step"] >= (12 if moment == "between saves" else 10)  # the log is ahead of the checkpoint

    pretrain(dataclasses.replace(config, resume=True))

    whole = uninterrupted(variant)
    assert losses(run) == losses(whole)
    assert len(losses(run)) == 20
    ours, theirs = complete_checkpoints(run), complete_checkpoints(whole)
    assert [folder.name for folder in ours] == [folder.name for folder in theirs] == ["step-000015", "step-000020"]
    assert differing(ours[-1], theirs[-1]) == []
    assert differing(ours[0], theirs[-1]) != []  # the comparison can fail
    assert list((run / "checkpoints").glob(".tmp-*")) == []


def test_dropout_and_muon_make_other_weights(uninterrupted: Any) -> None:
    ends = [losses(uninterrupted(variant))[-1] for variant in VARIANTS]
    assert len(set(ends)) == len(ends)


def test_a_full_disk_keeps_the_earlier_checkpoints(
    text: Path, tmp_path: Path, full_disk: Any, monkeypatch: pytest.MonkeyPatch, uninterrupted: Any
) -> None:
    config = settings(tmp_path / "run", text, save_interval=5)
    save = checkpoint.save

    def save_on_a_disk_that_fills(run: Path, step: int, *rest: Any, **named: Any) -> Path:
        with full_disk(20_000) if step == 10 else contextlib.nullcontext():
            return save(run, step, *rest, **named)

    monkeypatch.setattr(checkpoint, "save", save_on_a_disk_that_fills)
    with pytest.raises(UserError, match=r"cannot write .*step-000010"):
        pretrain(config)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000005"]
    monkeypatch.undo()
    run = pretrain(dataclasses.replace(config, resume=True))  # with space again, it goes on
    assert differing(run / "checkpoints" / "step-000020", uninterrupted("adamw") / "checkpoints" / "step-000020") == []


def test_resuming_a_finished_run_changes_nothing(uninterrupted: Any, text: Path) -> None:
    run = uninterrupted("adamw")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    pretrain(settings(run, text, save_interval=5, resume=True))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


# ---------------------------------------------------------------------- it refuses


def test_a_diverged_run_stops_and_names_the_step(text: Path, tmp_path: Path) -> None:
    huge = OptimConfig(learning_rate=1e30, warmup_steps=0, grad_clip=0)
    config = settings(tmp_path / "run", text, optim=huge, save_interval=1)
    with pytest.raises(UserError) as caught:
        pretrain(config)
    assert len(complete_checkpoints(tmp_path / "run")) == 1  # of step 1: the weights that step 2 fails with are no good ones
    for part in ("step 2: loss nan", "not applied", "checkpoint: none", "optim.learning_rate, now 1e+30"):
        assert part in str(caught.value)
    assert len(losses(tmp_path / "run")) == 1


def test_divergence_without_a_checkpoint(text: Path, tmp_path: Path) -> None:
    huge = OptimConfig(learning_rate=1e30, warmup_steps=0)
    with pytest.raises(UserError, match=r"step 2: .*checkpoint: none"):
        pretrain(settings(tmp_path / "run", text, optim=huge))


def test_a_folder_that_holds_something_else_is_refused(text: Path, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", text)
    open_run(tmp_path / "run", config, CPU)
    (tmp_path / "run" / "log.jsonl").touch()
    with pytest.raises(UserError, match="holds a run already; continue it with --resume"):
        open_run(tmp_path / "run", config, CPU)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("precious")
    for resume, said in ((False, "not empty and holds no run"), (True, "nothing to resume")):
        with pytest.raises(UserError, match=said):
            pretrain(settings(tmp_path / "thesis", text, resume=resume))
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="cannot make the run folder"):
        open_run(tmp_path / "thesis" / "thesis.tex" / "run", config, CPU)


def test_a_start_that_failed_may_be_repeated_with_other_sources(text: Path, tmp_path: Path) -> None:
    """A mistyped source, then one whose shards cannot be cut into windows: the next start is not taken for a resume."""
    run = tmp_path / "run"
    with pytest.raises(UserError, match="no such file"):
        pretrain(settings(run, tmp_path / "mistyped.txt"))
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(UserError, match="too short"):
        pretrain(settings(run, tmp_path / "short.txt"))
    pretrain(settings(run, text, max_steps=1))
    assert read_yaml(run / "config.yaml", Pretrain).data.sources == (str(text),)
    tokenizer = Tokenizer.load(run)
    corpus.read(run / "shards", tokenizer)
    assert tokenizer.vocab_size == 300


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", dataclasses.replace(SHAPE, n_layer=3)),
        ("data", DataConfig(sources=("elsewhere.txt",))),
        ("optim", OptimConfig(learning_rate=0.5)),
        ("max_steps", 21),
        ("batch_size", 3),
        ("accumulation_steps", 2),
        ("seed", 1),
        ("precision", "bf16"),
        ("compile", "on"),
        ("bad_steps", "skip"),
        ("spike_deviations", 3.0),
        ("start", "elsewhere"),
    ],
)
def test_resuming_with_another_setting_names_it(text: Path, tmp_path: Path, field: str, value: Any) -> None:
    config = settings(tmp_path / "run", text)
    open_run(tmp_path / "run", config, CPU)
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=f"was started with {field} = "):
        open_run(tmp_path / "run", dataclasses.replace(config, resume=True, **{field: value}), CPU)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    # what does not matter may change
    open_run(tmp_path / "run", dataclasses.replace(config, resume=True, save_interval=7), CPU)


def test_a_given_tokenizer_is_kept_with_the_run(tokenizer: Tokenizer, text: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    tokenizer.save(tmp_path)
    data = DataConfig(sources=(str(text),), tokenizer=str(tmp_path / "tokenizer.json"))
    made, opened = prepare(tmp_path / "run", data, vocab_size=5000)
    assert made.sha256 == tokenizer.sha256 == Tokenizer.load(tmp_path / "run").sha256
    (tmp_path / "tokenizer.json").unlink()
    again, reopened = prepare(tmp_path / "run", data, vocab_size=5000)  # reads what the run holds
    assert (again.sha256, reopened) == (made.sha256, opened)


def test_text_too_short_to_train_on_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Hello there.")
    with pytest.raises(UserError, match="too short"):
        pretrain(settings(tmp_path / "run", tmp_path / "short.txt"))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"corpus is empty: no text in .*empty\.txt"):
        pretrain(settings(tmp_path / "other", tmp_path / "empty.txt"))


# ---------------------------------------------------------------------- validation


def fixed_model(probabilities: list[float]) -> GPT:
    """A GPT whose every position predicts the same probabilities."""
    model = GPT(preset("tiny", vocab_size=len(probabilities), tied_head=False)).double()
    with torch.no_grad():
        model.norm_f.weight.zero_()
        model.norm_f.bias.zero_()
        model.norm_f.bias[0] = 1.0
        model.head.weight[:, 0] = torch.tensor(probabilities, dtype=torch.float64).log()
    return model


def validate(model: GPT | Scored, batches: list[Batch], byte_lengths: list[int]) -> dict[str, float]:
    scored = model if isinstance(model, Scored) else Scored(model)
    return measure(scored, batches, torch.tensor(byte_lengths), contextlib.nullcontext(), ALONE)


def test_bits_per_byte_by_hand() -> None:
    model = fixed_model([0.5, 0.25, 0.125, 0.125])
    array = np.array([3, 0, 0, 1, 2, 0, 3, 1])  # the first id is predicted by nothing
    bits = 1 + 1 + 2 + 3 + 1 + 3 + 2
    byte_lengths = [1, 2, 5, 0]  # id 3 is the end of a text: it costs bits and stands for no byte
    text_bytes = 1 + 1 + 2 + 5 + 1 + 0 + 2
    for context_tokens, batch_size in ((7, 1), (3, 1), (3, 2), (1, 4)):
        found = validate(model, InOrder([array], context_tokens, batch_size), byte_lengths)
        assert found["loss"] == pytest.approx(bits * math.log(2) / 7, rel=1e-12)
        assert found["bits_per_byte"] == pytest.approx(bits / text_bytes, rel=1e-12)
        assert found["tokens"] == 7


def test_an_untrained_head_costs_the_logarithm_of_the_vocabulary(tokenizer: Tokenizer) -> None:
    model = GPT(dataclasses.replace(SHAPE, vocab_size=tokenizer.vocab_size, tied_head=False))
    torch.nn.init.zeros_(model.head.weight)
    text = "Tiếng Việt 🌍, and the cat sat on the mat."
    ids = np.array([tokenizer.end_id, *tokenizer.encode(text)])
    found = validate(model, InOrder([ids], 32, 4), tokenizer.byte_lengths())
    assert found["loss"] == pytest.approx(math.log(tokenizer.vocab_size), rel=1e-6)
    expected = (len(ids) - 1) * math.log2(tokenizer.vocab_size) / len(text.encode())
    assert found["bits_per_byte"] == pytest.approx(expected, rel=1e-6)


def test_validation_switches_dropout_off_and_training_on_again() -> None:
    scored = Scored(GPT(dataclasses.replace(SHAPE, dropout=0.5)))
    batches = InOrder([np.arange(100)], 32, 2)
    for training in (True, False):
        scored.train(training)
        assert validate(scored, batches, [1] * 300) == validate(scored, batches, [1] * 300)
        assert scored.training is scored.model.training is training
    assert all(parameter.grad is None for parameter in scored.parameters())


# ---------------------------------------------------------------------- the log


def test_a_log_cut_by_a_crash(tmp_path: Path) -> None:
    whole = [json.dumps({"step": step, "loss": 1 / step}) for step in range(1, 8)]
    (tmp_path / "log.jsonl").write_text("\n".join([*whole, '{"step": 8, "lo']))
    assert [entry["step"] for entry in read_log(tmp_path)] == list(range(1, 8))
    with contextlib.closing(Log(tmp_path, 5)) as log:
        log.write({"step": 6, "loss": 0.5})
        assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2, 3, 4, 5, 6]  # readable while it is written
    assert read_log(tmp_path)[-1] == {"step": 6, "loss": 0.5}


def test_a_plot_of_a_run_without_validation(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    svg, png = plot_loss(tmp_path)
    assert ">step<" in svg.read_text() or "<path" in svg.read_text()
    assert png.read_bytes().startswith(b"\x89PNG")
