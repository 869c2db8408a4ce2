"""Ours: the native kernels in every precision, and the plain PyTorch path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

VARIANTS = ("float32", "bfloat16", "int8", "int8-a8", "int4", "int4-a8", "plain-float32", "plain-bfloat16")
"""a8: activations of 8 bits too; plain: PyTorch."""


def missing() -> str | None:
    """Nothing ever is."""
    return None


def prepare(hf_folder: Path, files: Path, variant: str) -> None:
    """One of our folders: short floats as they are, 8 bits with a scale a row, 4 bits with one for each 32 numbers."""
    import torch
    from torch import Tensor

    from glassgpt.config.quantize import Recipe
    from glassgpt.model import quantised, weights

    model = weights.load_hf(hf_folder)
    if variant.startswith("int"):
        bits, group = (8, None) if "int8" in variant else (4, 32)
        targets = quantised.targets(model)
        matrices = {
            name: quantised.round_to_nearest(cast(Tensor, module.weight), bits, group) for name, module in targets.items()
        }
        quantised.put(model, matrices, Recipe(dict.fromkeys(matrices, bits), group))
    weights.save(model, files, torch.bfloat16 if "bfloat16" in variant else None)


class System:
    """A model of ours, and what runs it."""

    def __init__(self, files: Path, variant: str, threads: int) -> None:
        if not variant.startswith("plain-"):
            from glassgpt.generation import native

            activations: Literal[8, 16] = 8 if variant.endswith("-a8") else 16
            options: dict[str, Any] = {"activations": activations, "threads": threads, "release": True}
            try:
                self.model: Any = native.open_model(native.ModelFile(files), **options)
            except native.Unfit:  # its positions are computed, say
                self.model = native.open_model(self._network(files, 1), **options)
        else:
            self.model = self._network(files, threads)

    def _network(self, files: Path, threads: int) -> Any:
        import torch

        from glassgpt.model import weights

        torch.set_num_threads(threads)
        return weights.load(files).eval()

    def generate(self, prompts: list[list[int]], new_tokens: int, stamp: Callable[[], None]) -> list[list[int]]:
        from glassgpt.config.generate import Sampling
        from glassgpt.generation import Generator, stream

        ids: list[list[int]] = [[] for _ in prompts]
        generators = [Generator() for _ in prompts]
        for token in stream(self.model, prompts, Sampling(temperature=0), generators, new_tokens):
            ids[token.row].append(token.id)
            if token.row == len(prompts) - 1:
                stamp()
        return ids
