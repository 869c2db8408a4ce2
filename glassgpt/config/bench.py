"""Knobs of `glassgpt bench generate`, `bench speculative`, `bench train`, `bench device`, `bench inspect` and `lab speedrun`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from glassgpt.config.compute import Compute
from glassgpt.config.errors import UserError, check_at_least, check_seed

TrainSystem = Literal["ours", "ours-compiled", "fp32", "fp32-compiled", "bf16", "bf16-compiled"]


@dataclass(frozen=True)
class BenchGenerate:
    """Speed, start and memory of greedy generation beside every other engine that is installed, with equal random weights.

    Every system is a process of its own, and they take turns; one that waits is stopped, so that its threads take nothing from
    another's. Beside the times stands what this machine's memory and arithmetic need at least. When the machine was too noisy,
    that is reported and nothing else.
    """

    preset: str = "gpt2"
    """Shape of the network; its weights are random, as speed does not depend on them."""
    systems: tuple[str, ...] = ("*",)
    """Names or patterns: `ours`, `ours-int8`, `openvino`, `*-int8` ... (default: ours in every precision, and all that is
    installed of transformers, ctranslate2, llama.cpp, xllamacpp, onnxruntime and openvino)."""
    phases: tuple[str, ...] = ("decode-1", "decode-8", "prefill-512", "prefill-1023")
    """What is timed: `decode-B` writes to B prompts at once, `prefill-T` reads one prompt of T tokens."""
    prompt_tokens: int = 32
    """Tokens of the prompts of decode-B."""
    new_tokens: int = 128
    """Tokens that decode-B writes to each."""
    repeats: int = 5
    """Turns of each system in each phase, 3 or more; medians and distances of the quartiles are reported."""
    starts: int = 3
    """Fresh processes of each system, for the time to its first token and its memory (0: none)."""
    threads: int | None = None
    """CPU threads of every system (default: PyTorch's)."""
    work_dir: str | None = None
    """Folder that keeps the converted weights, to start quicker the next time (default: they are deleted)."""
    allow_noise: bool = False
    """Report with a warning even when the machine was too noisy; fewer than 3 repeats are then allowed too."""
    json: bool = False
    """One JSON object instead of tables."""
    png: str | None = None
    """Draw the rates into this PNG file."""
    svg: str | None = None
    """Draw the rates into this SVG file."""
    seed: int = 0
    """Seed of the weights and the prompts."""

    def __post_init__(self) -> None:
        check_at_least(1, self, "prompt_tokens", "repeats", "threads")
        if self.repeats < 3 and not self.allow_noise:
            raise UserError(f"repeats must be at least 3 to tell noise; got {self.repeats}; take more, or use --allow_noise")
        check_at_least(2, self, "new_tokens")  # the time from the first to the last is taken
        check_at_least(0, self, "starts")
        check_seed(self.seed)
        for name in ("systems", "phases"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty; name at least one")
        for phase in self.phases:
            if not re.fullmatch(r"(decode|prefill)-[1-9]\d*", phase):
                raise UserError(f"phases must be decode-B or prefill-T, as decode-8 or prefill-512; got {phase!r}")


@dataclass(frozen=True)
class BenchTrain:
    """Training speed and memory side by side with `transformers`' GPT-2 in plain PyTorch, in one run, as ratios.

    Every system is a process of its own, and they take turns, so a change of the machine's load meets all.
    """

    preset: str = "small"
    """`small` (about 10 M parameters without embeddings: 6 layers of width 384) or a preset such as gpt2."""
    vocab_size: int | None = None
    """Entries of the vocabulary (default: the preset's; 8192 for `small`)."""
    context_tokens: int = 256
    """Tokens of a sequence."""
    batch_size: int = 16
    """Sequences in a step."""
    micro_batch_size: int | None = None
    """Sequences at once, for every system (default: batch_size)."""
    systems: tuple[TrainSystem, ...] = ("ours", "ours-compiled", "fp32", "fp32-compiled", "bf16", "bf16-compiled")
    """ours: this package as `pretrain` runs it, precision chosen by measuring; the others: `transformers`."""
    repeats: int = 5
    """Turns of each system; medians are reported."""
    threads: int | None = None
    """CPU threads (default: PyTorch's)."""
    device: str = "auto"
    """cpu, cuda, or auto for the best there is."""
    json: bool = False
    """One JSON object instead of a table."""

    def __post_init__(self) -> None:
        check_at_least(1, self, "context_tokens", "batch_size", "repeats", "vocab_size", "micro_batch_size", "threads")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise UserError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        if not self.systems:
            raise UserError("systems is empty; name at least one")


@dataclass(frozen=True)
class BenchDevice:
    """Forward, training step and generation on every device and precision of this machine, in one table."""

    preset: str = "gpt2"
    """Shape of the network; its weights are random."""
    context_tokens: int = 256
    """Tokens of a sequence."""
    batch_size: int = 4
    """Sequences at once."""
    new_tokens: int = 32
    """Tokens to generate, one sequence."""
    repeats: int = 3
    """Medians are reported."""
    json: bool = False
    """One JSON object instead of a table."""

    def __post_init__(self) -> None:
        check_at_least(1, self, "context_tokens", "batch_size", "new_tokens", "repeats")


@dataclass(frozen=True)
class Speedrun:
    """Time to a loss: nanoGPT's character recipe, then ours until it is as good, on the same text and machine."""

    source: str
    """The text; nanoGPT's recipes are for tiny shakespeare."""
    recipe: Literal["cpu", "gpu"] = "cpu"
    """Which of nanoGPT's recipes is the baseline: cpu (4 layers, width 128, context 64, 2,000 steps) or gpu (6 layers, width 384,
    context 256, 5,000 steps)."""
    baseline_steps: int | None = None
    """Stop the baseline after this many steps of its schedule and take the loss it has then (default: all)."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One pair of runs for each."""
    ablate: bool = False
    """Also train ours with each trick taken away in turn (first seed), to show what each one brings."""
    out_dir: str = "runs/speedrun"
    """Folder for results and chart."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    json: bool = False
    """One JSON object instead of a table."""

    def __post_init__(self) -> None:
        if not self.seeds:
            raise UserError("seeds is empty; give at least one")
        for seed in self.seeds:
            check_seed(seed)
        check_at_least(1, self, "baseline_steps")


@dataclass(frozen=True)
class BenchInspect:
    """Looking inside side by side with TransformerLens: every activation captured, and activation patching.

    Both have the same random weights, each in a process of its own, and take turns. Their numbers must be equal.
    """

    preset: str = "gpt2"
    """Shape of the network; its weights are random."""
    tokens: int = 64
    """Tokens of the text whose activations are captured."""
    prompt_tokens: int = 15
    """Tokens of the two prompts that are patched, layers by positions; they differ in every token, which is the slowest case."""
    repeats: int = 5
    """Turns of the captures; medians are reported."""
    patch_repeats: int = 1
    """Turns of the patching, which takes the peer minutes."""
    peer: bool = True
    """Also measure TransformerLens."""
    threads: int | None = None
    """CPU threads (default: PyTorch's)."""
    json: bool = False
    """One JSON object instead of a table."""

    def __post_init__(self) -> None:
        check_at_least(1, self, "tokens", "prompt_tokens", "repeats", "patch_repeats", "threads")


@dataclass(frozen=True)
class BenchSpeculative:
    """Plain writing beside speculative decoding: guesses looked up in the text, or a draft model's.

    Two prompts: the beginning of a story, and a quotation: a story that the model wrote itself, then its first words again.
    """

    model: Annotated[str, Positional, arg(metavar="MODEL")] = "storyteller"
    """A bundled model, a run folder, a Hugging Face folder or a downloaded hub id."""
    prompt: str = "Once upon a time"
    """The beginning of a story."""
    quoted_tokens: int = 160
    """Tokens of the story that the second prompt quotes."""
    again_tokens: int = 40
    """Tokens of it that the second prompt repeats."""
    new_tokens: int = 128
    """Tokens to write at most; fewer where the context is full."""
    temperatures: tuple[float, ...] = (0.0, 0.8)
    """0 is greedy: both ways must then write the same."""
    lookups: tuple[int, ...] = (2, 4)
    """Longest runs of tokens that are looked up."""
    drafts: tuple[str, ...] = ()
    """Smaller models with the same tokenizer."""
    proposals: int = 8
    """Tokens that are guessed at a time, at most."""
    compute: OmitArgPrefixes[Compute] = field(default_factory=Compute)
    repeats: int = 5
    """Turns of each way; medians are reported."""
    seed: int = 0
    """Seed of the story and of what is drawn."""
    json: bool = False
    """One JSON object instead of a table."""

    def __post_init__(self) -> None:
        check_at_least(1, self, "quoted_tokens", "again_tokens", "new_tokens", "repeats", "proposals")
        check_at_least(0, self, "seed")
        if not self.temperatures or min(self.temperatures) < 0:
            raise UserError(f"temperatures must be at least 0, and at least one; got {list(self.temperatures)}")
        if any(tokens < 1 for tokens in self.lookups):
            raise UserError(f"lookups must be at least 1; got {list(self.lookups)}")
