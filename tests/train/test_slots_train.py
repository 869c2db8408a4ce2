"""Pretraining with the modern slots filled: it learns, it resumes bit for bit, it adds up, and its checkpoint writes text."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from small import identical, settings

from glassgpt.config import ModelConfig, OptimConfig, Pretrain, preset
from glassgpt.config.generate import Sampling
from glassgpt.config.model import MoeConfig
from glassgpt.generation import complete
from glassgpt.loading import load
from glassgpt.train import checkpoint
from glassgpt.train.pretrain import pretrain
from glassgpt.train.run import read_log

MODERN: dict[str, Any] = {
    "position": "rope", "n_head": 4, "n_kv_head": 2, "norm": "rms", "mlp": "swiglu", "qk_norm": True, "bias": False,
    "spans": ("window", "full"), "window_tokens": 8, "logit_cap": 15.0,
}  # fmt: skip
SHAPES: dict[str, ModelConfig] = {
    "modern": preset("tiny", vocab_size=300, **MODERN),
    "mixture": preset("tiny", vocab_size=300, **MODERN, moe=MoeConfig(experts=4, top_k=2, shared=1)),
    "buckets": preset("tiny", vocab_size=300, position="relative", n_kv_head=1, embedding_norm=True),
}
shapes = pytest.mark.parametrize("name", SHAPES)


def run_of(name: str, folder: Path, text: Path, **changes: Any) -> Pretrain:
    optimizer = OptimConfig("muon" if name in ("modern", "mixture") else "adamw", learning_rate=0.01, warmup_steps=4)
    return settings(folder, text, model=SHAPES[name], optim=optimizer, **{"max_steps": 10} | changes)


def losses(run: Path) -> list[float]:
    return [entry["loss"] for entry in read_log(run)]


@pytest.fixture(scope="module")
def runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One finished run of each shape, made when it is first asked for."""

    @functools.cache
    def run(name: str) -> Path:
        return pretrain(run_of(name, tmp_path_factory.mktemp("runs") / name, text, max_steps=20, save_interval=10, batch_size=4))

    return run


@shapes
def test_it_learns(name: str, runs: Any) -> None:
    seen = losses(runs(name))
    assert len(seen) == 20
    assert abs(seen[0] - 5.7) < 0.7  # ln 300: at first every id is about as likely
    assert seen[-1] < seen[0] - 1


@pytest.mark.parametrize("name", ["modern", "mixture"])
def test_a_resumed_run_is_the_uninterrupted_one(name: str, runs: Any, text: Path, tmp_path: Path) -> None:
    """Stopped after 10 of 20 steps, as a kill after the checkpoint would, and continued: the same bits."""
    config = run_of(name, tmp_path / "run", text, max_steps=20, save_interval=10, batch_size=4)

    real = checkpoint.save

    def save_and_stop(*given: Any, **named: Any) -> None:
        real(*given, **named)
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_stop)
        with pytest.raises(InterruptedError):
            pretrain(config)
    assert len(losses(tmp_path / "run")) == 10 and not identical(tmp_path / "run", runs(name))
    pretrain(dataclasses.replace(config, resume=True))
    assert identical(tmp_path / "run", runs(name))
    assert losses(tmp_path / "run") == losses(runs(name))


@pytest.mark.parametrize("name", ["modern"])
def test_accumulation_changes_no_loss(name: str, text: Path, tmp_path: Path) -> None:
    seen = {}
    for batch_size, accumulation_steps in ((4, 1), (1, 4)):
        config = run_of(name, tmp_path / f"{batch_size}", text, batch_size=batch_size, accumulation_steps=accumulation_steps)
        seen[batch_size] = losses(pretrain(dataclasses.replace(config, max_steps=5, optim=OptimConfig(warmup_steps=2))))
    assert max(abs(a - b) for a, b in zip(seen[1], seen[4], strict=True)) < 1e-5


@pytest.mark.parametrize("name", ["modern", "mixture"])
def test_bf16_learns_too(name: str, text: Path, tmp_path: Path) -> None:
    seen = losses(pretrain(run_of(name, tmp_path / "run", text, precision="bf16", batch_size=4)))
    assert seen[-1] < seen[0] - 0.5


@shapes
def test_the_checkpoint_writes_text(name: str, runs: Any) -> None:
    """Through the cache as by whole forward passes, past its window and up to its context."""
    model, tokenizer = load(str(runs(name)))
    assert model.config == SHAPES[name]
    model = model.double()
    prompts = ["The cat sat", "A dog"]
    found = complete(model, tokenizer, prompts, Sampling(temperature=0), max_new_tokens=18, seed=0, ignore_end=True)
    for prompt, completion in zip(prompts, found, strict=True):
        ids = tokenizer.encode(prompt)
        for token in completion.tokens:
            with torch.no_grad():
                log_p = model(torch.tensor([ids]))[0, -1, : tokenizer.vocab_size].log_softmax(-1)
            assert token.id == int(log_p.argmax())
            assert token.logprob == pytest.approx(float(log_p[token.id]), abs=1e-10)
            ids.append(token.id)
        assert completion.text == tokenizer.decode([token.id for token in completion.tokens])
        assert len(completion.tokens) == 18


def test_the_log_has_what_each_expert_is_given(runs: Any) -> None:
    usage = torch.tensor(read_log(runs("mixture"))[-1]["expert_usage"])
    assert usage.shape == (2, 4)
    assert torch.allclose(usage.sum(dim=1), torch.ones(2), atol=1e-3)
    assert usage.max() < 0.5 + 1e-3  # each token's two choices are two experts
    assert "expert_usage" not in read_log(runs("modern"))[-1]
