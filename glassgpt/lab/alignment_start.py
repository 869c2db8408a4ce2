"""What every run of `glassgpt lab alignment` begins from: problems in files, a start model taught by `sft`, pairs of its answers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from glassgpt.config import ModelConfig, OptimConfig
from glassgpt.config.alignment import Alignment
from glassgpt.config.tuning import RecordsConfig, Sft
from glassgpt.lab import arithmetic
from glassgpt.lab.arithmetic import Problem
from glassgpt.loading import load, pick_device
from glassgpt.model import GPT, weights
from glassgpt.text import Tokenizer, chat
from glassgpt.text.chat import Message
from glassgpt.tuning import rollout

Reward = Callable[[str, str], float]

TEMPLATE_WORDS = "### User:\n\n### Assistant:\n"
VOCABULARY = 272
"""256 bytes, the end-of-text token, and the words of the chat template: every digit stays a token of its own."""
ANSWER_TOKENS = 16
"""Longest answer: five numbers of two digits."""
START_BATCH = 64
PAIR_PROBLEMS = 1024
"""Problems of which the start model's answers are made into pairs."""
CHATS, PROMPTS, HELD_OUT, FRESH = "chats.jsonl", "prompts.jsonl", "held-out.jsonl", "fresh"


def shape(vocab_size: int) -> ModelConfig:
    """The start model: a small modern GPT."""
    return ModelConfig(
        vocab_size=vocab_size,
        context_tokens=48,
        n_layer=2,
        n_head=4,
        width=64,
        position="rope",
        norm="rms",
        mlp="swiglu",
        qk_norm=True,
        bias=False,
    )


def write_problems(config: Alignment, out: Path) -> tuple[list[Problem], list[Problem]]:
    """Problems to learn from and held-out ones, written as examples and as prompts."""
    learnt, held = arithmetic.problems(config.prompts, config.seed)
    count = config.start_steps * START_BATCH
    asked, kept = (arithmetic.examples(some, n, config.list_share, config.seed) for some, n in ((learnt, count), (held, len(held))))
    write_rows(out / CHATS, ({"prompt": prompt, "completion": answer} for prompt, answer in asked))
    write_rows(out / f"held-out-{CHATS}", ({"prompt": prompt, "completion": answer} for prompt, answer in kept))
    write_rows(out / PROMPTS, ({"prompt": problem.prompt} for problem in learnt))
    write_rows(out / HELD_OUT, ({"prompt": problem.prompt} for problem in held))
    return learnt, held


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSONL; the file is there as a whole or not at all."""
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    aside.replace(path)


def write_fresh(folder: Path, seed: int) -> None:
    """A model with random weights, and a tokenizer."""
    tokenizer = Tokenizer.train([TEMPLATE_WORDS] * 8, VOCABULARY)
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    weights.save(GPT(shape(tokenizer.vocab_size)), folder)
    tokenizer.save(folder)


def sft_config(config: Alignment, out: Path, run: Path) -> Sft:
    """How the start model is taught: one pass over as many examples as it takes."""
    return Sft(
        out_dir=str(run),
        start=str(out / FRESH),
        data=RecordsConfig(files=(str(out / CHATS),), held_out=(str(out / f"held-out-{CHATS}"),)),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=min(20, config.start_steps), weight_decay=0.0, final_share=1.0),
        max_steps=config.start_steps,
        batch_size=START_BATCH,
        eval_interval=0,
        save_interval=0,
        seed=config.seed,
        device=config.device,
    )


# ---------------------------------------------------------------------- answers and pairs


def answer(model: GPT, tokenizer: Tokenizer, asked: Sequence[Problem], seeds: Sequence[int]) -> list[rollout.Written]:
    """A sampled answer to each problem, at temperature 1."""
    prompts = [chat.prompt([Message("user", problem.prompt)], tokenizer) for problem in asked]
    return rollout.write(
        model, prompts, chat.end_ids(tokenizer), seeds, max_new_tokens=ANSWER_TOKENS, n_ids=tokenizer.vocab_size
    )


def text_of(written: rollout.Written, tokenizer: Tokenizer) -> str:
    """What was said, without the token that ends it."""
    ends = chat.end_ids(tokenizer)
    return tokenizer.decode([token for token in written.ids if token not in ends])


def write_pairs(
    config: Alignment, start: Path, learnt: Sequence[Problem], held: Sequence[Problem], rewards: Mapping[str, Reward], out: Path
) -> dict[str, tuple[int, int]]:
    """Pairs for DPO, of the same answers of the start model but judged by each reward; how many to learn from and held out."""
    model, tokenizer = load(start, device=str(pick_device(config.device)))
    counts: dict[str, list[int]] = {name: [] for name in rewards}
    for place, some in enumerate((learnt[:PAIR_PROBLEMS], held)):
        asked = [problem for problem in some for _ in range(config.group_size)]
        first = (config.seed * 1_000_003 + place + 1) * 1_000_003
        texts = [text_of(one, tokenizer) for one in answer(model, tokenizer, asked, range(first, first + len(asked)))]
        groups = [(problem, texts[n * config.group_size : (n + 1) * config.group_size]) for n, problem in enumerate(some)]
        for name, reward in rewards.items():
            rows = pairs(groups, reward, config.seed)
            write_rows(out / pairs_file(name, held_out=bool(place)), rows)
            counts[name].append(len(rows))
    return {name: (learnt, held) for name, (learnt, held) in counts.items()}


def pairs_file(name: str, *, held_out: bool) -> str:
    return f"{'held-out-' if held_out else ''}pairs-{name}.jsonl"


def pairs(groups: Sequence[tuple[Problem, Sequence[str]]], reward: Reward, seed: int) -> list[dict[str, str]]:
    """One pair, a drawn answer that is worth 1 and a drawn one that is worth 0, of each problem that has both."""
    draw = random.Random(seed)
    found = []
    for problem, texts in groups:
        good, bad = ([text for text in texts if reward(problem.prompt, text) == worth] for worth in (1.0, 0.0))
        if good and bad:
            found.append({"prompt": problem.prompt, "chosen": draw.choice(good), "rejected": draw.choice(bad)})
    return found
