"""GPT-2 as an ONNX graph, written operator by operator with ONNX Runtime's own fused ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from glassgpt.lab.bench.generate.peers.gpt2_files import GPT2

MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators


def write_onnx(gpt2: GPT2, path: Path) -> None:
    """Write `path` and, beside it, `path`.data with the weights.

    Inputs: `ids` (B, T), `positions` (T), `last` (B) = filled positions of the cache - 1, `filled` () = the same without
    the - 1, and `past_key_0` ... (B, H, S, D). Outputs: `logits` (B, V) of the last position and `present_key_0` ...,
    which may be the same memory as the past. The attention operator writes the new keys and values in place then.
    """
    model = _Graph(gpt2).model()
    data = path.name + ".data"
    onnx.save_model(model, path, save_as_external_data=True, location=data, size_threshold=1024)


class _Graph:
    """Collects nodes and weights; every method returns the name of the value it makes."""

    def __init__(self, gpt2: GPT2) -> None:
        self.gpt2 = gpt2
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def add(self, kind: str, inputs: list[str], outputs: list[str] | None = None, domain: str = "", **options: Any) -> str:
        outputs = outputs or [f"value_{len(self.nodes)}"]
        self.nodes.append(helper.make_node(kind, inputs, outputs, f"node_{len(self.nodes)}", domain=domain, **options))
        return outputs[0]

    def weight(self, name: str, values: np.ndarray[Any, Any] | None = None) -> str:
        values = self.gpt2.tensors[name] if values is None else values
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def norm(self, x: str, name: str) -> str:
        inputs = [x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias")]
        return self.add("LayerNormalization", inputs, epsilon=self.gpt2.epsilon)

    def linear(self, x: str, name: str) -> str:
        product = self.add("MatMul", [x, self.weight(f"{name}.weight")])
        return self.add("Add", [product, self.weight(f"{name}.bias")])

    def attention(self, x: str, layer: int) -> str:
        packed = self.linear(x, f"h.{layer}.attn.c_attn")  # (B, T, 3 C)
        past, present = ([f"{when}_{part}_{layer}" for part in ("key", "value")] for when in ("past", "present"))
        out = self.add(
            "GroupQueryAttention", [packed, "", "", *past, "last", "filled"], [f"attention_{layer}", *present], MICROSOFT,
            num_heads=self.gpt2.heads, kv_num_heads=self.gpt2.heads,
        )  # fmt: skip
        return self.linear(out, f"h.{layer}.attn.c_proj")

    def mlp(self, x: str, layer: int) -> str:
        hidden = self.add("FastGelu", [self.linear(x, f"h.{layer}.mlp.c_fc")], domain=MICROSOFT)  # GELU's tanh form
        return self.linear(hidden, f"h.{layer}.mlp.c_proj")

    def logits(self) -> None:
        tokens = self.add("Gather", [self.weight("wte.weight"), "ids"])
        positions = self.add("Gather", [self.weight("wpe.weight"), "positions"])
        x = self.add("Add", [tokens, positions])  # (B, T, C)
        for layer in range(self.gpt2.layers):
            x = self.add("Add", [x, self.attention(self.norm(x, f"h.{layer}.ln_1"), layer)])
            x = self.add("Add", [x, self.mlp(self.norm(x, f"h.{layer}.ln_2"), layer)])
        final = self.add("Gather", [x, self.weight("minus_one", np.array(-1))], axis=1)  # (B, C)
        head = self.weight("head", self.gpt2.tensors["wte.weight"].T)
        self.add("MatMul", [self.norm(final, "ln_f"), head], ["logits"])

    def model(self) -> onnx.ModelProto:
        self.logits()
        layers = range(self.gpt2.layers)
        cache = ["batch", self.gpt2.heads, "room", self.gpt2.width // self.gpt2.heads]
        value, whole, integer = helper.make_tensor_value_info, TensorProto.INT64, TensorProto.INT32
        names = [f"{part}_{layer}" for layer in layers for part in ("key", "value")]
        inputs = [
            value("ids", whole, ["batch", "new"]), value("positions", whole, ["new"]),
            value("last", integer, ["batch"]), value("filled", integer, []),
            *[value(f"past_{name}", TensorProto.FLOAT, cache) for name in names],
        ]  # fmt: skip
        outputs = [
            value("logits", TensorProto.FLOAT, ["batch", len(self.gpt2.tensors["wte.weight"])]),
            *[value(f"present_{name}", TensorProto.FLOAT, cache) for name in names],
        ]
        graph = helper.make_graph(self.nodes, "gpt2", inputs, outputs, self.weights)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)
