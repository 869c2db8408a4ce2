"""OpenVINO: a stateful graph, whose key/value cache never leaves it, compiled for low latency."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

VARIANTS = ("float32", "bfloat16", "int8", "int4", "int4-float")
"""Of the weights. Below 16 bits the rest is bfloat16; in `int4-float` it is float32, which decodes batches faster without AMX."""
ACTIVATION_GROUP = 128
"""Activations that share a scale where quantised weights meet them in 8 bits: faster than the default of 32."""


def missing() -> str | None:
    return None if find_spec("openvino") else "pip install openvino"


def prepare(hf_folder: Path, files: Path, variant: str) -> None:
    import openvino

    from glassgpt.lab.bench.generate.peers.gpt2_files import read_gpt2
    from glassgpt.lab.bench.generate.peers.openvino_graph import build

    model = build(read_gpt2(hf_folder), bits={"int8": 8, "int4": 4}.get(variant[:4]))
    openvino.save_model(model, files / "model.xml", compress_to_fp16=variant == "bfloat16")  # its half-size form on disk


def options_of(variant: str, threads: int) -> dict[str, Any]:
    """What to compile with. The key/value cache of all but `float32` has OpenVINO's default of 8 bits."""
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
    options |= {"INFERENCE_PRECISION_HINT": "f32" if variant in ("float32", "int4-float") else "bf16"}
    return options | (
        {"KV_CACHE_PRECISION": "f32"} if variant == "float32" else {"DYNAMIC_QUANTIZATION_GROUP_SIZE": ACTIVATION_GROUP}
    )


class System:
    def __init__(self, files: Path, variant: str, threads: int) -> None:
        import openvino

        compiled = openvino.Core().compile_model(files / "model.xml", "CPU", options_of(variant, threads))
        self.request = compiled.create_infer_request()

    def generate(self, prompts: list[list[int]], new_tokens: int, stamp: Callable[[], None]) -> list[list[int]]:
        self.request.reset_state()
        length, rows = len(prompts[0]), np.arange(len(prompts), dtype=np.int32)
        ids, written = np.array(prompts), []  # (B, T)
        for filled in range(length, length + new_tokens):
            positions = np.arange(filled - ids.shape[1], filled)
            self.request.infer({"ids": ids, "positions": positions, "rows": rows}, share_inputs=True)
            ids = self.request.get_output_tensor().data.argmax(axis=1)[:, None]  # of logits (B, V)
            written.append(ids)
            stamp()
        found: list[list[int]] = np.concatenate(written, axis=1).tolist()
        return found
