"""ONNX Runtime: a graph of its fused operators, its own quantisers, and a key/value cache that it writes in place."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

VARIANTS = ("float32", "int8", "int4")
PACKAGES = ("onnx", "onnxruntime", "onnx_ir")
BLOCK = 128
"""Inputs that share a scale in `int4`: its default, and faster than 32."""
INT8_ACTIVATIONS = 4
"""Its name ("accuracy level") for products of 8-bit activations with the 4-bit weights, the fastest on a CPU."""


def missing() -> str | None:
    return None if all(find_spec(name) for name in PACKAGES) else "pip install onnx onnxruntime onnx-ir"


def prepare(hf_folder: Path, files: Path, variant: str) -> None:
    from glassgpt.lab.bench.generate.peers.gpt2_files import read_gpt2
    from glassgpt.lab.bench.generate.peers.onnx_graph import write_onnx

    quantise = {"int8": _quantise_dynamic, "int4": _quantise_blocks}.get(variant)
    plain = files / ("plain.onnx" if quantise else "model.onnx")
    write_onnx(read_gpt2(hf_folder), plain)
    if quantise:
        quantise(plain, files / "model.onnx")
        plain.unlink()
        plain.with_name("plain.onnx.data").unlink()


def _quantise_dynamic(plain: Path, target: Path) -> None:
    """Weights of matrix products in 8 bits with a scale per output channel; activations in 8 bits as they come."""
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        plain,
        target,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
        extra_options={"DefaultTensorType": TensorProto.FLOAT},  # of the values behind the fused operators
    )


def _quantise_blocks(plain: Path, target: Path) -> None:
    """Every matrix in 4 bits with a scale per block, the embeddings too."""
    import onnx
    from onnxruntime.quantization import matmul_nbits_quantizer

    logging.getLogger(matmul_nbits_quantizer.__name__).setLevel(logging.WARNING)  # it tells of every node
    quantiser = matmul_nbits_quantizer.MatMulNBitsQuantizer(
        onnx.load(plain),
        bits=4,
        block_size=BLOCK,
        is_symmetric=True,
        accuracy_level=INT8_ACTIVATIONS,
        op_types_to_quantize=("MatMul", "Gather"),
    )
    quantiser.process()
    quantiser.model.save_model_to_file(str(target), use_external_data_format=True)


class System:
    def __init__(self, files: Path, variant: str, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3  # errors only
        self.new_value = onnxruntime.OrtValue.ortvalue_from_numpy
        self.session = onnxruntime.InferenceSession(files / "model.onnx", options, providers=["CPUExecutionProvider"])

    def generate(self, prompts: list[list[int]], new_tokens: int, stamp: Callable[[], None]) -> list[list[int]]:
        rows, length = len(prompts), len(prompts[0])
        binding = self._bind_cache(rows, length + new_tokens)
        ids, written = np.array(prompts), []  # (B, T)
        for filled in range(length, length + new_tokens):
            inputs = {
                "ids": ids,
                "positions": np.arange(filled - ids.shape[1], filled),
                "last": np.full(rows, filled - 1, np.int32),
                "filled": np.array(filled, np.int32),
            }
            for name, values in inputs.items():
                binding.bind_cpu_input(name, values)
            self.session.run_with_iobinding(binding)
            ids = binding.get_outputs()[0].numpy().argmax(axis=1)[:, None]  # of logits (B, V)
            written.append(ids)
            stamp()
        found: list[list[int]] = np.concatenate(written, axis=1).tolist()
        return found

    def _bind_cache(self, rows: int, room: int) -> Any:
        """Past and present are one buffer with room for everything, so no step copies the cache."""
        binding = self.session.io_binding()
        binding.bind_output("logits", "cpu")
        for value in self.session.get_inputs():
            if value.name.startswith("past_"):
                heads, size = value.shape[1], value.shape[3]
                buffer = self.new_value(np.zeros((rows, heads, room, size), np.float32))
                binding.bind_ortvalue_input(value.name, buffer)
                binding.bind_ortvalue_output(value.name.replace("past", "present"), buffer)
        return binding
