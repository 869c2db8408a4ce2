"""Knobs of `glassgpt plan`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from glassgpt.config.errors import UserError, check_at_least


@dataclass(frozen=True)
class Plan:
    """What training or tuning a model takes, before anything is run: parameters, operations, memory, time and money."""

    model: Annotated[str, Positional, arg(metavar="MODEL")] = "gpt2"
    """A preset (gpt2, gpt3-175b, mixtral-8x7b, ...), or whatever `glassgpt info` takes: its shape is what counts."""
    batch_size: int = 8
    """Sequences of a micro-batch on one GPU."""
    context_tokens: int | None = None
    """Tokens of each; the model's whole context when not given."""
    accumulation_steps: int = 1
    """Micro-batches in a step: from two on, gradients lie beside the activations, and fsdp holds them whole."""
    gpus: int = 1
    """GPUs, each with one rank of `pretrain`."""
    strategy: Literal["ddp", "fsdp"] = "fsdp"
    """How several share the model, as in `pretrain`: ddp, everything on each; fsdp, weights, gradients and state divided."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw for everything, or muon for the blocks' matrices."""
    lora_rank: int = 0
    """Tune with adapters of this rank beside every matrix of the blocks, as `sft --lora.rank` does; 0 trains all weights."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of the forward pass; weights, gradients and state are float32 either way."""
    device: Literal["cuda", "cpu"] = "cuda"
    """A GPU has fused attention, a CPU attends in blocks that keep their patterns."""
    gpu_memory_gb: float = 80.0
    """Memory of one GPU, in 10^9 bytes."""
    training_tokens: float | None = None
    """Tokens to train on, such as 300e9. When not given: 20 for each active parameter (Hoffmann et al. 2022), a million for
    adapters, of which no law tells how many they need."""
    peak_tflops: float = 989.0
    """Operations a second of one GPU at its best, in 10^12 (an H100's bf16 without sparsity; an A100 has 312)."""
    mfu: float = 0.4
    """Share of the peak that the model's own operations reach (PaLM: 0.46; Chowdhery et al. 2022)."""
    price_per_gpu_hour: float = 2.0
    """In whatever money the cost is to be in."""
    check: bool = False
    """Also train a small model of the same make on this machine for a few steps, and compare memory and operations."""
    json: bool = False
    """One JSON object instead of tables."""

    def __post_init__(self) -> None:
        check_at_least(1, self, "batch_size", "context_tokens", "accumulation_steps", "gpus", "training_tokens")
        check_at_least(0, self, "lora_rank")
        if self.lora_rank and self.gpus > 1 and self.strategy == "fsdp":
            raise UserError("adapters are trained whole on every GPU, not divided by fsdp; give --strategy ddp, or --gpus 1")
        if self.lora_rank and self.optimizer == "muon":
            raise UserError("adapters are trained with adamw; give --optimizer adamw")
        for name in ("gpu_memory_gb", "peak_tflops", "training_tokens"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} must be positive; got {value}")
        if not 0 < self.mfu <= 1:
            raise UserError(f"mfu is a share of the peak, above 0 and at most 1; got {self.mfu}")
        if not 0 <= self.price_per_gpu_hour < math.inf:
            raise UserError(f"price_per_gpu_hour must not be negative; got {self.price_per_gpu_hour}")
