"""GPT-2 as a stateful OpenVINO graph, with weights compressed as its own tools write them."""

from __future__ import annotations

from typing import Any

import numpy as np
from openvino import Model, PartialShape, Tensor, Type
from openvino import opset15 as op

from glassgpt.lab.bench.generate.peers.gpt2_files import GPT2

GROUP = 128
"""Inputs that share a scale in 4 bits: the default of OpenVINO's own compression."""


def build(gpt2: GPT2, bits: int | None) -> Any:
    """The model: inputs `ids` (B, T), `positions` (T), `rows` (B) = 0, 1, ...; output: logits (B, V) of the last position.

    The keys and values are state of the graph. `rows` reorders it (for beam search); OpenVINO fuses cache and attention only
    when it is there. `bits`: 8 (a scale per channel), 4 (a scale per group) or None (float32). The head and the token
    embedding are one matrix.
    """
    return _Graph(gpt2, bits).model()


class _Graph:
    """Every method returns the node that it makes."""

    def __init__(self, gpt2: GPT2, bits: int | None) -> None:
        self.gpt2, self.bits = gpt2, bits
        self.size = gpt2.width // gpt2.heads  # D
        self.ids = op.parameter([-1, -1], np.int64)
        self.positions = op.parameter([-1], np.int64)
        self.rows = op.parameter([-1], np.int32)
        self.assigned: list[Any] = []

    def vector(self, name: str) -> Any:
        return op.constant(self.gpt2.tensors[name])

    def matrix(self, weight: np.ndarray[Any, np.dtype[np.float32]]) -> Any:
        """`weight` (N, K), kept as codes and scales when there are `bits`: the graph multiplies them, the kernels fuse that."""
        if self.bits is None:
            return op.constant(weight)
        outputs, inputs = weight.shape
        group = min(GROUP, inputs) if self.bits == 4 else inputs
        codes, scales = quantise(weight.reshape(outputs, -1, group), self.bits)  # (N, K / group, group), (N, K / group, 1)
        stored = op.constant(packed(codes), shared_memory=False) if self.bits == 4 else op.constant(codes)
        scale = op.constant(Tensor(scales), shared_memory=False)  # given as an array, float16 would arrive as int16
        product = op.multiply(op.convert(stored, np.float16), scale)
        whole = op.reshape(product, op.constant([outputs, inputs]), False)
        return op.convert(whole, np.float32)

    def linear(self, x: Any, name: str) -> Any:
        weight = self.matrix(self.gpt2.tensors[f"{name}.weight"].T)
        return op.add(op.matmul(x, weight, False, True), self.vector(f"{name}.bias"))

    def norm(self, x: Any, name: str) -> Any:
        standard = op.mvn(x, op.constant([-1]), True, self.gpt2.epsilon, "inside_sqrt")
        return op.add(op.multiply(standard, self.vector(f"{name}.weight")), self.vector(f"{name}.bias"))

    def attention(self, x: Any, layer: int) -> Any:
        joined = self.linear(x, f"h.{layer}.attn.c_attn")  # (B, T, 3 C)
        by_head, heads_first = op.constant([0, 0, self.gpt2.heads, self.size]), op.constant([0, 2, 1, 3])
        query, key, value = (
            op.transpose(op.reshape(part, by_head, True), heads_first) for part in op.split(joined, op.constant(2), 3).outputs()
        )  # (B, H, T, D)
        key, value = self.cached(key, f"key_{layer}"), self.cached(value, f"value_{layer}")  # (B, H, S, D)
        out = op.transpose(op.scaled_dot_product_attention(query, key, value, causal=True), heads_first)
        return self.linear(op.reshape(out, op.constant([0, 0, self.gpt2.width]), True), f"h.{layer}.attn.c_proj")

    def cached(self, new: Any, name: str) -> Any:
        """The state `name` with `new` behind it, which is the next state."""
        batch = op.gather(op.shape_of(self.ids), op.constant([0]), op.constant(0))
        shape = op.concat([batch, op.constant([self.gpt2.heads, 0, self.size])], 0)
        empty = op.broadcast(op.constant(np.float32(0)), shape)
        past = op.read_value(empty, name, np.float32, PartialShape([-1, self.gpt2.heads, -1, self.size]))
        whole = op.concat([op.gather(past, self.rows, op.constant(0)), new], 2)
        self.assigned.append(op.assign(whole, name))
        return whole

    def model(self) -> Any:
        table = self.matrix(self.gpt2.tensors["wte.weight"])  # (V, C)
        places = op.gather(self.vector("wpe.weight"), self.positions, op.constant(0))
        x = op.add(op.gather(table, self.ids, op.constant(0)), places)  # (B, T, C)
        for layer in range(self.gpt2.layers):
            x = op.add(x, self.attention(self.norm(x, f"h.{layer}.ln_1"), layer))
            hidden = op.gelu(self.linear(self.norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc"), "tanh")
            x = op.add(x, self.linear(hidden, f"h.{layer}.mlp.c_proj"))
        final = self.norm(op.gather(x, op.constant(-1), op.constant(1)), "ln_f")  # (B, C)
        inputs = {"ids": self.ids, "positions": self.positions, "rows": self.rows}
        for name, parameter in inputs.items():
            parameter.output(0).tensor.set_names({name})
        return Model([op.result(op.matmul(final, table, False, True))], self.assigned, list(inputs.values()))


def quantise(groups: np.ndarray[Any, np.dtype[np.float32]], bits: int) -> tuple[Any, Any]:
    """Round to nearest: int8 codes and float16 scales (..., 1) of `groups` (..., group), symmetric."""
    largest = 2 ** (bits - 1) - 1
    scales = np.maximum(np.abs(groups).max(axis=-1, keepdims=True) / largest, 1e-6).astype(np.float16)
    codes = np.clip(np.rint(groups / scales.astype(np.float32)), -largest, largest).astype(np.int8)
    return codes, scales


def packed(codes: np.ndarray[Any, np.dtype[np.int8]]) -> Any:
    """Two 4-bit codes to a byte, the first in its low half."""
    low, high = codes.reshape(-1, 2).T & 15
    return Tensor(low | high << 4, codes.shape, Type.i4)
