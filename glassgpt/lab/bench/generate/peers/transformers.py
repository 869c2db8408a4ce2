"""`transformers`: its own model, attention, cache and `generate`, in PyTorch's eager mode."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

VARIANTS = ("float32", "bfloat16")


def missing() -> str | None:
    return None if find_spec("transformers") else "pip install 'transformers>=5.0'"


def prepare(hf_folder: Path, files: Path, variant: str) -> None:
    """The same weights, in the precision that is loaded."""
    if variant == "float32":
        shutil.copytree(hf_folder, files, dirs_exist_ok=True)
        return
    import torch
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(hf_folder, dtype=getattr(torch, variant)).save_pretrained(files)


class System:
    def __init__(self, files: Path, variant: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(files, dtype=getattr(torch, variant)).eval()

    def generate(self, prompts: list[list[int]], new_tokens: int, stamp: Callable[[], None]) -> list[list[int]]:
        import torch

        given = torch.tensor(prompts)
        with torch.inference_mode():
            ids = self.model.generate(
                given,
                attention_mask=torch.ones_like(given),
                do_sample=False,
                max_new_tokens=new_tokens,
                eos_token_id=None,
                pad_token_id=0,
                streamer=Stamps(stamp),
            )
        found: list[list[int]] = ids[:, given.size(1) :].tolist()
        return found


class Stamps:
    """`generate` hands every step's ids to a streamer: the prompt first, then one token a row."""

    def __init__(self, stamp: Callable[[], None]) -> None:
        self.stamp, self.prompt_seen = stamp, False

    def put(self, value: Any) -> None:
        if self.prompt_seen:
            self.stamp()
        self.prompt_seen = True

    def end(self) -> None:
        pass
