"""One of our folders as a source of weights, straight from its file: mapped into memory, read once, and PyTorch stays out.

What is unusual in a folder is left to `glassgpt.loading.load`, which reads everything and says what is wrong.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from glassgpt.config import ModelConfig, UserError
from glassgpt.config.folder import SHARDED, WEIGHTS_FILE, read_own
from glassgpt.generation.native.library import FORMATS, library
from glassgpt.generation.native.packing import Floats, Rows, check_group, give_back

SIZES = {"F32": 4, "BF16": 2, "U8": 1}
"""Bytes of the numbers that are read here, by safetensors' names for them."""


class Unfit(Exception):  # noqa: N818
    """A folder that is not read here, for whatever reason."""


class Stored:
    """Reads `model.json` and `model.safetensors`."""

    def __init__(self, folder: Path, precision: str = "as-is") -> None:
        """`precision` is what plain matrices become: float32 or bfloat16. Raises Unfit for a folder that is not whole, that has
        numbers or parts which are not read here, or whose plain matrices are to be rounded to codes."""
        try:
            self.config, self.recipe = read_own(folder)
        except UserError as error:
            raise Unfit(str(error)) from error
        _require(not (folder / SHARDED).is_dir() and not self.config.moe.experts, "parts, or experts")
        _require(self.config.position in ("learned", "none") and "strided" not in self.config.spans, "computed positions")
        matrices = self.recipe.matrices if self.recipe else {}
        wanted, self._matrices = expected(self.config), {}
        for name, bits in matrices.items():
            N, K = wanted.pop(f"{name}.weight", (0, 0))
            group = self.recipe.group or K if self.recipe else K
            _require(K > 0 and K % group == 0, f"{name} in codes")
            self._matrices[name] = (N, K)
            wanted |= {f"{name}.codes": (N, K if bits == 8 else -(-K // 2)), f"{name}.scales": (N, K // group)}
        scales = ("BF16",) if self.recipe and self.recipe.group else ("F32",)
        self._tensors = mapped(folder / WEIGHTS_FILE)
        _require({name: tensor.shape for name, tensor in self._tensors.items()} == wanted, "names or shapes of tensors")
        for name, tensor in self._tensors.items():
            kinds = ("U8",) if name.endswith(".codes") else scales if name.endswith(".scales") else ("F32", "BF16")
            _require(tensor.kind in kinds, f"{name} in {tensor.kind}")
        self._precision = precision
        stored = f"int{next(iter(matrices.values()))}" if matrices else self._number("token_embedding")
        self.precision = stored if precision == "as-is" else precision

    def _number(self, name: str) -> str:
        if self._precision not in ("as-is", "float32", "bfloat16"):
            raise Unfit(f"matrices are to be rounded to {self._precision}")
        stored = "float32" if self._tensors[f"{name}.weight"].kind == "F32" else "bfloat16"
        return stored if self._precision == "as-is" else self._precision

    @property
    def parameters(self) -> int:
        """All numbers of the model; shared ones once."""
        return sum(math.prod(shape) for shape in expected(self.config).values())

    def matrix(self, name: str) -> PlainMatrix | CodedMatrix:
        if name not in self._matrices:
            return PlainMatrix(self._tensors[f"{name}.weight"], self._number(name))
        assert self.recipe is not None
        check_group(self.recipe.group)
        tensors = self._tensors[f"{name}.codes"], self._tensors[f"{name}.scales"]
        return CodedMatrix(*tensors, self._matrices[name], self.recipe.matrices[name], self.recipe.group)

    def vector(self, name: str) -> Floats | None:
        return self._tensors[name].floats() if name in self._tensors else None

    def tables(self) -> Iterator[tuple[int, str, Floats]]:
        if self.config.position == "learned":
            yield 0, "position", self._tensors["position_embedding.weight"].floats()


class PlainMatrix:
    """Floats."""

    def __init__(self, weight: Mapped, number: str) -> None:
        N, K = weight.shape
        self.shape, self.number, self.group, self._weight = (N, K), number, None, weight

    def rows(self, first: int, end: int) -> Rows:
        values = self._weight.floats(first, end)
        return Rows(values.address, None, values)

    def release(self, first: int, end: int) -> None:
        self._weight.release(first, end)


class CodedMatrix:
    """Codes and scales."""

    def __init__(self, codes: Mapped, scales: Mapped, shape: tuple[int, int], bits: int, group: int | None) -> None:
        self.shape, self.number, self.group = shape, f"int{bits}", group
        self._codes, self._scales = codes, scales

    def rows(self, first: int, end: int) -> Rows:
        """Raises Unfit for a number that is no scale."""
        scales = self._scales.floats(first, end, are_scales=True)
        return Rows(self._codes.address + first * self._codes.row_bytes, scales.address, scales)

    def release(self, first: int, end: int) -> None:
        self._codes.release(first, end)
        self._scales.release(first, end)


# ---------------------------------------------------------------------- the file


class Mapped(NamedTuple):
    """A tensor of a mapped file."""

    kind: str
    shape: tuple[int, ...]
    address: int
    file: object
    """Mapped as long as this is held."""

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * SIZES[self.kind]

    def floats(self, first: int = 0, end: int | None = None, are_scales: bool = False) -> Floats:
        """Rows first ... end - 1 as float32: where they lie, or widened. Raises Unfit for a scale that is 0 or not finite."""
        rows = (self.shape[0] if end is None else end) - first
        count, address = rows * math.prod(self.shape[1:]), self.address + first * self.row_bytes
        if self.kind == "F32" and not are_scales:
            return Floats(address, count, self.file)
        room = (ctypes.c_float * count)()
        format_ = FORMATS["float32" if self.kind == "F32" else "bfloat16"]
        useless = library().glass_widen(format_, address, count, room)
        _require(not are_scales or useless == 0, "numbers that are no scales")
        return Floats(ctypes.addressof(room), count, room)

    def release(self, first: int, end: int) -> None:
        give_back(self.address + first * self.row_bytes, (end - first) * self.row_bytes)


def mapped(path: Path) -> dict[str, Mapped]:
    """The tensors of a safetensors file (https://github.com/huggingface/safetensors#format), none of them read yet.

    Raises Unfit for a file that is none, that is not whole, or that has numbers which are not read here.
    """
    try:
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # what is written would stay here; nothing is
        start = 8 + int.from_bytes(memory[:8], "little")
        header: Any = json.loads(memory[8:start].decode("utf-8"))
        header.pop("__metadata__", None)
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        found, last = {}, 0
        for name, facts in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            kind, shape, (begin, end) = facts["dtype"], tuple(facts["shape"]), facts["data_offsets"]
            size = SIZES[kind]
            _require(begin == last and end - begin == math.prod(shape) * size and (start + begin) % size == 0, f"place of {name}")
            found[name], last = Mapped(kind, shape, base + start + begin, memory), end
        _require(start + last == len(memory), "length")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unfit(str(error)) from error
    return found


def expected(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of a plain model without experts whose positions are learned or none, with its shape."""
    D, W, hidden = config.width, config.head_width, config.hidden_width
    heads = (config.n_head + 2 * config.kv_heads) * W
    found: dict[str, tuple[int, ...]] = {"token_embedding.weight": (config.vocab_size, D)}

    def linear(name: str, N: int, K: int, bias: bool) -> None:
        found[f"{name}.weight"] = (N, K)
        if bias:
            found[f"{name}.bias"] = (N,)

    def norm(name: str, width: int) -> None:
        found[f"{name}.weight"] = (width,)
        if config.bias and config.norm == "layer":
            found[f"{name}.bias"] = (width,)

    if config.position == "learned":
        found["position_embedding.weight"] = (config.context_tokens, D)
    if config.embedding_norm:
        norm("embedding_norm", D)
    for layer in range(config.n_layer):
        block = f"blocks.{layer}"
        norm(f"{block}.norm_1", D)
        linear(f"{block}.attn.qkv", heads, D, config.has_qkv_bias)
        for name in ("q_norm", "k_norm") if config.qk_norm else ():
            norm(f"{block}.attn.{name}", W)
        linear(f"{block}.attn.out", D, config.n_head * W, config.bias)
        norm(f"{block}.norm_2", D)
        for name in ("up", "gate") if config.mlp == "swiglu" else ("up",):
            linear(f"{block}.mlp.{name}", hidden, D, config.bias)
        linear(f"{block}.mlp.down", D, hidden, config.bias)
    norm("norm_f", D)
    if not config.tied_head:
        found["head.weight"] = (config.vocab_size, D)
    return found


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise Unfit(what)
