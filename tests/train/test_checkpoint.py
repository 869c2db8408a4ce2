"""Checkpoints: complete or absent, never overwritten, and exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from glassgpt.config import OptimConfig, UserError, preset
from glassgpt.loading import complete_checkpoints
from glassgpt.model import GPT, weights
from glassgpt.text import Tokenizer
from glassgpt.train import checkpoint, optim
from glassgpt.train.loss import token_loss
from glassgpt.train.parallel import Ranks

ALONE = Ranks(torch.device("cpu"))
State = tuple[GPT, list[Optimizer]]


def a_state(seed: int = 0, optimizer: str = "adamw") -> State:
    torch.manual_seed(seed)
    model = GPT(preset("tiny", vocab_size=300))
    return model, optim.build(model, OptimConfig(optimizer=optimizer, learning_rate=0.01))


def train(state: State, steps: range) -> State:
    model, optimizers = state
    for step in steps:
        ids = torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(step))
        token_loss(model(ids[:, :-1]), ids[:, 1:]).sum.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return state


def names(run: Path) -> list[str]:
    return [folder.name for folder in complete_checkpoints(run)]


def test_a_saved_checkpoint_is_complete_and_loadable(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert names(tmp_path) == []
    model, optimizers = train(a_state(), range(2))
    folder = checkpoint.save(tmp_path, 2, model, optimizers, tokenizer, {"val_loss": 1.5}, ALONE)
    assert folder == tmp_path / "checkpoints" / "step-000002"
    assert complete_checkpoints(tmp_path) == [folder]
    facts = json.loads((folder / "complete.json").read_text())
    assert (facts["step"], facts["val_loss"]) == (2, 1.5)
    assert facts["files"].keys() == {path.name for path in folder.iterdir()} - {"complete.json"}
    assert not [path for path in folder.iterdir() if path.suffix in (".pt", ".bin", ".pkl")]
    loaded = weights.load(folder)
    assert loaded.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert Tokenizer.load(folder).sha256 == tokenizer.sha256


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "tokenizer.json", "model.json"])
def test_half_written_folders_are_no_checkpoints(tokenizer: Tokenizer, tmp_path: Path, file: str) -> None:
    model, optimizers = train(a_state(), range(1))
    checkpoint.save(tmp_path, 1, model, optimizers, tokenizer, {}, ALONE)
    path = checkpoint.save(tmp_path, 2, model, optimizers, tokenizer, {}, ALONE) / file
    content = path.read_bytes()
    assert names(tmp_path) == ["step-000001", "step-000002"]
    path.write_bytes(content[:-1])
    assert names(tmp_path) == ["step-000001"]
    path.unlink()
    assert names(tmp_path) == ["step-000001"]
    path.write_bytes(content)
    assert names(tmp_path) == ["step-000001", "step-000002"]
    (path.parent / "complete.json").write_text('{"step": 2, "fil')
    assert names(tmp_path) == ["step-000001"]
    (path.parent / "complete.json").unlink()
    assert names(tmp_path) == ["step-000001"]


def test_prune_keeps_the_newest_complete_ones(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, optimizers = train(a_state(), range(1))
    for step in (8, 9, 10, 999_999, 1_000_000, 11):
        checkpoint.save(tmp_path, step, model, optimizers, tokenizer, {}, ALONE)
    folders = tmp_path / "checkpoints"
    (folders / ".tmp-step-000012-4711").mkdir()  # what a killed save leaves
    (folders / "step-1000000" / "model.safetensors").write_bytes(b"")  # and one that is damaged does not count
    checkpoint.prune(tmp_path, 2)
    assert names(tmp_path) == ["step-000011", "step-999999"]
    assert sorted(path.name for path in folders.iterdir()) == ["step-000011", "step-1000000", "step-999999"]


def test_the_newest_is_the_one_with_the_largest_step(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, optimizers = train(a_state(), range(1))
    for step in (1_000_000, 999_999, 2_000_000):
        checkpoint.save(tmp_path, step, model, optimizers, tokenizer, {}, ALONE)
    assert names(tmp_path) == ["step-999999", "step-1000000", "step-2000000"]


def test_a_checkpoint_is_never_overwritten(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 1, *train(a_state(), range(1)), tokenizer, {}, ALONE)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="never overwritten"):
        checkpoint.save(tmp_path, 1, *train(a_state(1), range(3)), tokenizer, {}, ALONE)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("size", [500, 20_000, 100_000])
def test_a_full_disk_leaves_the_earlier_ones(tokenizer: Tokenizer, tmp_path: Path, full_disk: Any, size: int) -> None:
    model, optimizers = train(a_state(), range(1))
    checkpoint.save(tmp_path, 1, model, optimizers, tokenizer, {}, ALONE)
    with full_disk(size), pytest.raises(UserError, match=r"cannot write .*step-000002: .*(large|written)"):
        checkpoint.save(tmp_path, 2, model, optimizers, tokenizer, {}, ALONE)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert names(tmp_path) == ["step-000001"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_restored_run_continues_bit_for_bit(tokenizer: Tokenizer, tmp_path: Path, optimizer: str) -> None:
    state = train(a_state(optimizer=optimizer), range(3))
    folder = checkpoint.save(tmp_path, 3, *state, tokenizer, {}, ALONE)
    train(state, range(3, 6))
    other = a_state(seed=9, optimizer=optimizer)
    assert checkpoint.restore(folder, *other) == 3
    assert other[0].head.weight is other[0].token_embedding.weight
    train(other, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(state[0].parameters(), other[0].parameters(), strict=True))
    ours, theirs = optim.state(*state), optim.state(*other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "complete.json"])
def test_a_damaged_checkpoint_is_refused(tokenizer: Tokenizer, tmp_path: Path, file: str) -> None:
    folder = checkpoint.save(tmp_path, 1, *train(a_state(), range(1)), tokenizer, {}, ALONE)
    path = folder / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="step-000001"):
        checkpoint.restore(folder, *a_state())


def test_the_best_one_is_kept_however_old(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, optimizers = train(a_state(), range(1))
    losses = {1: 3.0, 2: 1.5, 3: None, 4: 2.0, 5: 1.9, 6: 1.6}
    for step, val_loss in losses.items():
        facts = {} if val_loss is None else {"val_loss": val_loss}
        checkpoint.save(tmp_path, step, model, optimizers, tokenizer, facts, ALONE)
        checkpoint.prune(tmp_path, 2)
    assert names(tmp_path) == ["step-000002", "step-000005", "step-000006"]
    assert checkpoint.best(complete_checkpoints(tmp_path)) == tmp_path / "checkpoints" / "step-000002"
    checkpoint.save(tmp_path, 7, model, optimizers, tokenizer, {"val_loss": 1.0}, ALONE)
    checkpoint.prune(tmp_path, 2)
    assert names(tmp_path) == ["step-000006", "step-000007"]  # a better one, and the old best goes
    assert checkpoint.best([]) is None
