"""What autograd really keeps, to hold the arithmetic against."""

from __future__ import annotations

import torch
from torch import Tensor

from glassgpt.config import ModelConfig
from glassgpt.config.tuning import LoraConfig
from glassgpt.model import GPT, blocked, fused, lora, plain, use_attention
from glassgpt.train.loss import Scored

KERNELS = {"plain": plain, "fused": fused, "blocked": blocked}


def saved_bytes(config: ModelConfig, B: int, T: int, kernel: str = "fused", precision: str = "fp32", lora_rank: int = 0) -> int:
    """Bytes of the storages that autograd keeps for the backward pass of a training step, each once, parameters apart."""
    model = GPT(config)
    if lora_rank:
        lora.add(model, LoraConfig(rank=lora_rank), seed=0)
    use_attention(model, KERNELS[kernel])
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # holding them keeps their addresses from being used again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    ids, targets = torch.randint(config.vocab_size, (2, B, T))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        Scored(model)(ids, targets)
    return sum(storage.nbytes() for storage in kept.values())
