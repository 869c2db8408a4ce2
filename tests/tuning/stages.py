"""A model and examples small enough for the tests of every stage after pretraining, and each stage's smallest run."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from glassgpt.config import ModelConfig, OptimConfig
from glassgpt.config.tuning import Dpo, Grpo, LoraConfig, Ppo, RecordsConfig, Reward, Sft, Tuning
from glassgpt.loading import complete_checkpoints
from glassgpt.model import GPT, weights
from glassgpt.text import Tokenizer
from glassgpt.tuning.dpo import dpo
from glassgpt.tuning.grpo import grpo
from glassgpt.tuning.ppo import ppo
from glassgpt.tuning.reward import reward
from glassgpt.tuning.sft import sft

WORDS = "the a cat dog fox hen sat ran saw ate on in under mat log box pen big red old new and then but so".split()
LORA = LoraConfig(rank=2, alpha=4.0)
STAGES: dict[str, tuple[type[Tuning], Callable[..., Path], str, dict[str, Any]]] = {
    "sft": (Sft, sft, "chats", {}),
    "sft-packed": (Sft, sft, "chats", {"pack": True, "loss": "weighted:0.3", "average": "example"}),
    "reward": (Reward, reward, "pairs", {}),
    "dpo": (Dpo, dpo, "pairs", {}),
    "ipo": (Dpo, dpo, "pairs", {"loss": "ipo"}),
    "kto": (Dpo, dpo, "pairs", {"loss": "kto"}),
    "ppo": (Ppo, ppo, "prompts", {"reward": ("contains:e", "0.1*length:5"), "max_new_tokens": 6, "updates": 2, "target_kl": 0.1}),
    "grpo": (
        Grpo,
        grpo,
        "prompts",
        {"reward": ("contains:e", "0.1*length:5"), "max_new_tokens": 6, "updates": 2, "group_size": 4},
    ),
}
"""Configuration class, function, kind of examples and options of its own."""


def write_model(folder: Path) -> Path:
    """A random two-layer GPT with noise on every parameter, in float32, and a tokenizer of its own."""
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=8)) + ".\n### User:\n### Assistant:\n" for _ in range(60)]
    tokenizer = Tokenizer.train(lines, 300)
    torch.manual_seed(0)
    model = GPT(ModelConfig(tokenizer.vocab_size, 64, 2, 2, 32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    folder.mkdir(parents=True)
    weights.save(model, folder)
    tokenizer.save(folder)
    return folder


def write_examples(folder: Path, count: int = 40) -> Path:
    """chats.jsonl (prompt, completion), pairs.jsonl (prompt, chosen, rejected), prompts.jsonl (prompt)."""
    draw = random.Random(1)
    rows: dict[str, list[dict[str, str]]] = {"chats": [], "pairs": [], "prompts": []}
    for _ in range(count):
        prompt, good, bad = (" ".join(draw.choices(WORDS, k=draw.randint(1, k))) for k in (4, 6, 6))
        rows["chats"].append({"prompt": prompt, "completion": good})
        rows["pairs"].append({"prompt": prompt, "chosen": f"{good} yes", "rejected": f"{bad} no"})
        rows["prompts"].append({"prompt": prompt})
    folder.mkdir(parents=True, exist_ok=True)
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


def settings(stage: str, home: Path, out_dir: Path, **changes: Any) -> Tuning:
    """Six steps of a stage on the model and the examples in `home`."""
    kind, _, examples, own = STAGES[stage]
    values: dict[str, Any] = {
        "out_dir": str(out_dir),
        "start": str(home / "model"),
        "data": RecordsConfig(files=(str(home / f"{examples}.jsonl"),), holdout_share=0.2),
        "optim": OptimConfig(learning_rate=0.003, warmup_steps=2, weight_decay=0.0),
        "max_steps": 6,
        "batch_size": 4,
        "eval_interval": 0,
        "save_interval": 0,
        "device": "cpu",
        "precision": "fp64",
    }
    return kind(**{**values, **own, **changes})


def run(stage: str, home: Path, out_dir: Path, **changes: Any) -> Path:
    return STAGES[stage][1](settings(stage, home, out_dir, **changes))


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Everything that the newest checkpoint of a run holds, by file and name."""
    folder = complete_checkpoints(run)[-1]
    return {
        f"{path.name}:{name}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in safetensors.torch.load_file(path).items()
    }


def apart(a: Path, b: Path) -> float:
    """The largest difference between any two numbers of the newest checkpoints of two runs."""
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)
