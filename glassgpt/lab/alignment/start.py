"""Where all runs of `glassgpt lab alignment` begin: problems in files, a start model taught by `sft`, pairs of its answers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from glassgpt.config import ModelConfig, OptimConfig, UserError
from glassgpt.config.alignment import Alignment
from glassgpt.config.files import complete_folder
from glassgpt.config.tuning import RecordsConfig, Sft
from glassgpt.lab.alignment import arithmetic
from glassgpt.lab.alignment.arithmetic import Problem, Shares
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
PROMPTS, HELD_OUT, FRESH = "prompts.jsonl", "held-out-prompts.jsonl", "fresh"


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
    """Problems to learn from and held-out ones, written as prompts, and as the examples of both lessons."""
    learnt, held = arithmetic.problems(config.prompts, config.seed)
    write_rows(out / PROMPTS, ({"prompt": problem.prompt} for problem in learnt))
    write_rows(out / HELD_OUT, ({"prompt": problem.prompt} for problem in held))
    for name, (steps, shares) in lessons(config).items():
        for some, count, apart in ((learnt, steps * START_BATCH, False), (held, len(held), True)):
            said = arithmetic.examples(some, count, shares, config.seed)
            write_rows(out / chats_file(name, held_out=apart), ({"prompt": asked, "completion": text} for asked, text in said))
    return learnt, held


def lessons(config: Alignment) -> dict[str, tuple[int, Shares]]:
    """What the start model learns, one after the other: steps, and how good the answers are that it imitates."""
    return {
        "school": (config.school_steps, Shares(right=1.0, listed=0.0)),
        "start": (config.start_steps, Shares(config.right_share, config.list_share)),
    }


def chats_file(name: str, *, held_out: bool) -> str:
    return f"{'held-out-' if held_out else ''}{name}.jsonl"


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSONL; the file is there as a whole or not at all."""
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    aside.replace(path)


def write_fresh(folder: Path, seed: int) -> None:
    """A model with random weights, and a tokenizer."""
    tokenizer = Tokenizer.train([TEMPLATE_WORDS] * 8, VOCABULARY)
    torch.manual_seed(seed)
    model = GPT(shape(tokenizer.vocab_size))
    with complete_folder(folder) as aside:
        weights.save(model, aside)
        tokenizer.save(aside)


def lesson(config: Alignment, out: Path, name: str, runs: Path) -> Sft:
    """How the start model is taught: one pass over as many examples as it takes."""
    steps, _ = lessons(config)[name]
    first = name == "school"
    files = [str(out / chats_file(name, held_out=apart)) for apart in (False, True)]
    return Sft(
        out_dir=str(runs / name),
        start=str(out / FRESH if first else runs / "school"),
        data=RecordsConfig((files[0],), (files[1],)),
        optim=OptimConfig(learning_rate=4e-3 if first else 3e-4, warmup_steps=min(20, steps), weight_decay=0.0, stable_share=0.5),
        max_steps=steps,
        batch_size=START_BATCH,
        eval_interval=0,
        save_interval=0,
        seed=config.seed,
        device=config.device,
    )


# ---------------------------------------------------------------------- answers and pairs


def answer(model: GPT, tokenizer: Tokenizer, asked: Sequence[Problem], seeds: Sequence[int]) -> list[rollout.Written]:
    """A sampled answer to each problem, at temperature 1."""
    prompts = prompt_ids(asked, tokenizer)
    return rollout.write(model, prompts, chat.end_ids(tokenizer), seeds, max_new_tokens=ANSWER_TOKENS, n_ids=tokenizer.vocab_size)


def seeds_from(seed: int, place: int) -> int:
    """The first of 2 ** 24 seeds in a row: of the run's seed, the block with this number."""
    return (seed * 8 + place) << 24


def prompt_ids(asked: Sequence[Problem], tokenizer: Tokenizer) -> list[list[int]]:
    """What the model is given for each problem."""
    rendered = {problem: chat.prompt([Message("user", problem.prompt)], tokenizer) for problem in set(asked)}
    return [rendered[problem] for problem in asked]


def texts_of(written: Sequence[rollout.Written], tokenizer: Tokenizer) -> list[str]:
    """What was said, without the tokens that end answers."""
    ends = chat.end_ids(tokenizer)
    return [tokenizer.decode([token for token in one.ids if token not in ends]) for one in written]


def write_pairs(
    config: Alignment, start: Path, learnt: Sequence[Problem], held: Sequence[Problem], rewards: Mapping[str, Reward], out: Path
) -> dict[str, tuple[int, int]]:
    """Pairs for DPO, of the same answers of the start model but judged by each reward; how many to learn from and held out.

    Files that are there stay. Raises UserError when the start's answers make no pair.
    """
    files = {name: [out / pairs_file(name, held_out=apart) for apart in (False, True)] for name in rewards}
    if not all(path.exists() for both in files.values() for path in both):
        model, tokenizer = load(start, device=str(pick_device(config.device)))
        for place, some in enumerate((learnt[:PAIR_PROBLEMS], held)):
            asked = [problem for problem in some for _ in range(config.group_size)]
            first = seeds_from(config.seed, place)
            texts = texts_of(answer(model, tokenizer, asked, range(first, first + len(asked))), tokenizer)
            groups = [(problem, texts[n * config.group_size : (n + 1) * config.group_size]) for n, problem in enumerate(some)]
            for name, reward in rewards.items():
                rows = pairs(groups, reward, config.seed)
                if not rows:
                    raise UserError(
                        f"experiment {name}: the start model's answers are all worth the same, so there is no pair for DPO; it"
                        " has learnt too little (raise school_steps or right_share) or too much (lower right_share)"
                    )
                write_rows(files[name][place], rows)
    counts = {name: [len(path.read_text().splitlines()) for path in both] for name, both in files.items()}
    return {name: (many, few) for name, (many, few) in counts.items()}


def pairs_file(name: str, *, held_out: bool) -> str:
    return f"{'held-out-' if held_out else ''}pairs-{name}.jsonl"


def pairs(groups: Sequence[tuple[Problem, Sequence[str]]], reward: Reward, seed: int) -> list[dict[str, str]]:
    """Two drawn answers of each problem that has two of different worth; an empty answer is none."""
    draw = random.Random(seed)
    found = []
    for problem, drawn in groups:
        texts = [text for text in drawn if text.strip()]
        if not texts:
            continue
        worths = [reward(problem.prompt, text) for text in texts]
        one = draw.randrange(len(texts))
        others = [other for other, worth in enumerate(worths) if worth != worths[one]]
        if others:
            better, worse = sorted((one, draw.choice(others)), key=lambda n: -worths[n])
            found.append({"prompt": problem.prompt, "chosen": texts[better], "rejected": texts[worse]})
    return found
