"""CTranslate2: its converter of Hugging Face folders and its generator."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

VARIANTS = ("float32", "int8")


def missing() -> str | None:
    return None if find_spec("ctranslate2") and find_spec("transformers") else "pip install ctranslate2 'transformers>=5.0'"


def prepare(hf_folder: Path, files: Path, variant: str) -> None:
    from ctranslate2.converters import TransformersConverter

    quantization = None if variant == "float32" else variant
    TransformersConverter(str(hf_folder)).convert(str(files), quantization=quantization, force=True)


class System:
    def __init__(self, files: Path, variant: str, threads: int) -> None:
        import json

        import ctranslate2

        self.generator = ctranslate2.Generator(
            str(files), device="cpu", compute_type=variant, inter_threads=1, intra_threads=threads
        )
        self.pieces = json.loads((files / "vocabulary.json").read_text(encoding="utf-8"))

    def generate(self, prompts: list[list[int]], new_tokens: int, stamp: Callable[[], None]) -> list[list[int]]:
        """`min_length` keeps the end of text from being chosen, which no other system does; one token of the vocabulary."""
        last = len(prompts) - 1

        def told(step: Any) -> bool:
            if step.batch_id == last:
                stamp()
            return False

        found = self.generator.generate_batch(
            [[self.pieces[token_id] for token_id in row] for row in prompts],
            beam_size=1,
            min_length=new_tokens,
            max_length=new_tokens,
            include_prompt_in_result=False,
            callback=told,
        )
        return [result.sequences_ids[0] for result in found]
