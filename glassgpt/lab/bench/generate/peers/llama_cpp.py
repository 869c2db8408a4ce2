"""llama.cpp through llama-cpp-python, whose wheel is built for the machine that installs it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from glassgpt.lab.bench.generate.peers.gguf_files import MODEL_FILE, VARIANTS, write_float

__all__ = ["VARIANTS", "System", "missing", "prepare"]


def missing() -> str | None:
    return None if find_spec("llama_cpp") else "pip install llama-cpp-python (it is compiled here)"


def prepare(hf_folder: Path, files: Path, variant: str) -> None:
    """Our GGUF export in float16, and llama.cpp's own quantiser on that."""
    import llama_cpp

    if variant == "f16":
        write_float(hf_folder, files / MODEL_FILE)
        return
    write_float(hf_folder, files / "f16.gguf")
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{variant}")
    source, target = str(files / "f16.gguf").encode(), str(files / MODEL_FILE).encode()
    if llama_cpp.llama_model_quantize(source, target, ctypes.byref(options)):
        raise RuntimeError(f"llama.cpp could not quantise to {variant}")
    (files / "f16.gguf").unlink()


class System:
    """Its C interface, so that nothing of Python's stands between two steps but one call."""

    def __init__(self, files: Path, variant: str, threads: int) -> None:
        import llama_cpp

        self.llama, self.threads = llama_cpp, threads
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(files / MODEL_FILE).encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load the {variant} file")
        self.vocab_size: int = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.context: Any = None
        self.room = (0, 0)

    def generate(self, prompts: list[list[int]], new_tokens: int, stamp: Callable[[], None]) -> list[list[int]]:
        self._make_context(len(prompts), len(prompts[0]) + new_tokens)
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)
        step, start = prompts, 0
        ids: list[list[int]] = [[] for _ in prompts]
        for _ in range(new_tokens):
            for row, token_id in enumerate(self._decode(step, start)):
                ids[row].append(token_id)
            stamp()
            start += len(step[0])
            step = [row[-1:] for row in ids]
        return ids

    def _make_context(self, rows: int, tokens: int) -> None:
        """One that is large enough; a larger one than before replaces it."""
        if self.context and self.room[0] == rows and self.room[1] >= tokens:
            return
        if self.context:
            self.llama.llama_free(self.context)
        options = self.llama.llama_context_default_params()
        options.n_ctx, options.n_seq_max, options.n_batch = rows * tokens, rows, max(512, rows * tokens)
        options.n_threads = options.n_threads_batch = self.threads
        self.context, self.room = self.llama.llama_init_from_model(self.model, options), (rows, tokens)
        if not self.context:
            raise RuntimeError(f"llama.cpp could not make a context of {rows} x {tokens} tokens")

    def _decode(self, step: list[list[int]], start: int) -> list[int]:
        """Feed each row its tokens, which begin at position `start`; the likeliest next ids. Logits of the last tokens only."""
        import numpy

        total = sum(map(len, step))
        batch = self.llama.llama_batch_init(total, 0, 1)
        last, place = [], 0
        for row, tokens in enumerate(step):
            for offset, token_id in enumerate(tokens):
                batch.token[place], batch.pos[place], batch.n_seq_id[place] = token_id, start + offset, 1
                batch.seq_id[place][0], batch.logits[place] = row, offset == len(tokens) - 1
                place += 1
            last.append(place - 1)
        batch.n_tokens = total
        failed = self.llama.llama_decode(self.context, batch)
        self.llama.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama.cpp could not decode {total} tokens (code {failed})")
        logits = (self.llama.llama_get_logits_ith(self.context, place) for place in last)
        return [int(numpy.ctypeslib.as_array(row, (self.vocab_size,)).argmax()) for row in logits]
