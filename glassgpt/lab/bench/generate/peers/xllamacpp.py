"""llama.cpp through xllamacpp: a wheel for any x86-64 with AVX2 (no AVX-512), and llama.cpp's server without the network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from glassgpt.lab.bench.generate.peers.gguf_files import MODEL_FILE, VARIANTS, write_float, write_rounded

__all__ = ["VARIANTS", "System", "missing", "prepare"]


def missing() -> str | None:
    return None if find_spec("xllamacpp") else "pip install xllamacpp"


def prepare(hf_folder: Path, files: Path, variant: str) -> None:
    """Our GGUF export in float16, rounded by the `gguf` package where that is asked for: this wheel has no quantiser."""
    write = write_float if variant == "f16" else partial(write_rounded, variant=variant)
    write(hf_folder, files / MODEL_FILE)
    shutil.copy(hf_folder / "tokenizer.json", files)


class System:
    def __init__(self, files: Path, variant: str, threads: int) -> None:
        self.files, self.threads = files, threads
        self.server: Any = None
        self.rows, self.context_tokens = 0, 0
        self._serve(1, 0)
        self.id_of = json.loads((files / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]

    def _serve(self, rows: int, context_tokens: int) -> None:
        """So many rows at once, which share a context (0: the model's); a server that is large enough stays."""
        import xllamacpp

        if self.server and self.rows == rows and self.context_tokens >= context_tokens:
            return
        self.server = None  # frees the one before
        options = xllamacpp.CommonParams()
        options.model.path = str(self.files / MODEL_FILE)
        options.n_parallel, options.kv_unified, options.n_ctx = rows, True, context_tokens
        options.warmup, options.verbosity = False, -1
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = self.threads
        self.server = xllamacpp.Server(options)
        self.rows, self.context_tokens = rows, context_tokens

    def generate(self, prompts: list[list[int]], new_tokens: int, stamp: Callable[[], None]) -> list[list[int]]:
        """The server sends texts; asked for ids, it would sort the vocabulary at each step. Our pieces are whole texts."""
        rows = len(prompts)
        self._serve(rows, rows * (len(prompts[0]) + new_tokens) if rows > 1 else 0)
        ids: list[list[int]] = [[] for _ in prompts]
        done = 0

        def told(part: Any) -> bool:
            nonlocal done
            for choice in part["choices"] if part else ():
                if choice["text"]:
                    ids[choice["index"]].append(self.id_of[choice["text"]])
            while done < min(map(len, ids)):
                done += 1
                stamp()
            return False

        asked = {"prompt": prompts, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        self.server.handle_completions(asked | {"stream": True}, told)
        return ids
