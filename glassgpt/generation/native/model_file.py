"""A model's folder as a source of weights, straight from its file: mapped into memory, read once, and PyTorch stays out.

What is unusual in a folder is left to `glassgpt.loading.load`, which reads everything and says what is wrong.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from glassgpt.config import ModelConfig, UserError
from glassgpt.config.folder import SHARDED, WEIGHTS_FILE, read_own
from glassgpt.config.quantize import Recipe
from glassgpt.generation.native.library import NUMBERS, library
from glassgpt.generation.native.packing import CodedRows, Floats, PlainRows, check_group, give_back, matrix_names
from glassgpt.model import families

SIZES = dict.fromkeys(("F64", "I64", "U64"), 8) | dict.fromkeys(("F32", "I32", "U32"), 4)
SIZES |= dict.fromkeys(("F16", "BF16", "I16", "U16"), 2) | dict.fromkeys(("U8", "I8", "BOOL"), 1)
"""Bytes of numbers, by safetensors' names for them."""
HEADER_BYTES = 100_000_000
"""Longer headers are no safetensors'."""


class Unfit(Exception):  # noqa: N818
    """A folder that is not read here, for whatever reason."""


class ModelFile:
    """The configuration, the recipe and the tensors, by our names, of one of our folders or of a Hugging Face one."""

    def __init__(self, folder: Path, is_hf: bool = False) -> None:
        """Raises Unfit for a folder that is not whole, or that has numbers or parts which are not read here."""
        self.config: ModelConfig
        self.recipe: Recipe | None
        kind = None
        try:
            if is_hf:
                (kind, self.config), self.recipe = families.read_hf(folder), None
            else:
                self.config, recipe = read_own(folder)
                self.recipe = recipe if recipe and recipe.matrices else None
        except UserError as error:
            raise Unfit(str(error)) from error
        _require(not (folder / SHARDED).is_dir() and not self.config.moe.experts, "parts, or experts")
        _require(self.config.position in ("learned", "none") and "strided" not in self.config.spans, "computed positions")
        self.coded, wanted = _coded(self.config, self.recipe)
        found = {
            name.removeprefix(kind.prefix if kind else ""): tensor
            for name, tensor in mapped(folder / WEIGHTS_FILE).items()
            if not (kind and name.endswith(kind.ignored))
        }
        self.tensors: dict[str, Parts] = {}
        for name, shape in wanted.items():
            place = kind.stored(self.config, name) if kind else families.Stored((name,))
            self.tensors[name] = _parts(found, place, place.rows(self.config, shape[0]), shape)
        _require(not found, f"{next(iter(found), '')} is in the file")
        for name in self.coded:
            is_grouped = bool(self.recipe and self.recipe.group)
            _require(self.tensors[f"{name}.scales"].kinds == {"BF16" if is_grouped else "F32"}, f"scales of {name}")

    @property
    def parameters(self) -> int:
        """All numbers of the model; shared ones once."""
        return sum(math.prod(shape) for shape in expected(self.config).values())


class FileSource:
    """A model's file as a source of weights."""

    def __init__(self, file: ModelFile, precision: str) -> None:
        """`precision` is what plain matrices become: float32, bfloat16, or what they are. Raises Unfit for those that are not
        kept so here."""
        self.config, self._file, self._asked = file.config, file, precision
        stored = f"int{next(iter(file.recipe.matrices.values()))}" if file.recipe else self._number("token_embedding")
        self.precision = stored if precision == "as-is" else precision

    def _number(self, name: str) -> str:
        """What a plain matrix becomes."""
        if self._asked in ("float32", "bfloat16"):
            return self._asked
        _require(self._asked == "as-is", f"to be rounded to {self._asked}")
        kinds = self._file.tensors[f"{name}.weight"].kinds
        _require(kinds in ({"F32"}, {"BF16"}), f"numbers of {name}")
        return "float32" if kinds == {"F32"} else "bfloat16"

    def matrix(self, name: str) -> FileFloats | FileCodes:
        tensors, recipe = self._file.tensors, self._file.recipe
        if recipe is None or name not in self._file.coded:
            return FileFloats(tensors[f"{name}.weight"], self._number(name))
        check_group(recipe.group)
        codes, scales = tensors[f"{name}.codes"], tensors[f"{name}.scales"]
        return FileCodes(codes, scales, self._file.coded[name], recipe.matrices[name], recipe.group)

    def vector(self, name: str) -> Floats | None:
        return self._file.tensors[name].floats() if name in self._file.tensors else None

    def tables(self) -> Iterator[tuple[int, str, Floats]]:
        if self.config.position == "learned":
            yield 0, "position", self._file.tensors["position_embedding.weight"].floats()


class FileFloats:
    """Floats."""

    def __init__(self, weight: Parts, number: str) -> None:
        N, K = weight.shape
        self.shape, self.number, self.group, self._weight = (N, K), number, None, weight

    def rows(self, first: int, end: int) -> PlainRows:
        return self._weight.rows(first, end)

    def release(self, first: int, end: int) -> None:
        self._weight.release(first, end)


class FileCodes:
    """Codes and scales."""

    def __init__(self, codes: Parts, scales: Parts, shape: tuple[int, int], bits: int, group: int | None) -> None:
        self.shape, self.number, self.group = shape, f"int{bits}", group
        self._codes, self._scales = codes, scales

    def rows(self, first: int, end: int) -> CodedRows:
        """Raises Unfit for a number that is no scale."""
        scales = self._scales.floats(first, end, are_scales=True)
        return CodedRows(self._codes.address(first), scales.address, scales)

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


class Parts:
    """One of our tensors (N, ...), as a file has it: whole, or in parts whose rows follow one another; turned or not."""

    def __init__(self, parts: Sequence[Mapped], rows: Sequence[int], shape: tuple[int, ...], transposed: bool) -> None:
        """`rows` are those of each part."""
        self.shape, self.kinds = shape, {part.kind for part in parts}
        self._parts, self._rows, self._transposed = parts, rows, transposed
        self._columns = math.prod(shape[1:])

    @property
    def _is_plain(self) -> bool:
        return len(self._parts) == 1 and not self._transposed

    def address(self, row: int) -> int:
        """Where a row is, of a tensor that lies there as it is ours."""
        assert self._is_plain
        return self._parts[0].address + row * self._columns * SIZES[self._parts[0].kind]

    def rows(self, first: int, end: int) -> PlainRows:
        """Rows first ... end - 1, where they lie if they are in one part."""
        if len(self._parts) > 1:
            values = self.floats(first, end)
            return PlainRows(values.address, "F32", self._columns, 1, values)
        (part,), (row_step, column_step) = self._parts, self._steps(self._rows[0])
        return PlainRows(part.address + first * row_step * SIZES[part.kind], part.kind, row_step, column_step, part.file)

    def _steps(self, rows: int) -> tuple[int, int]:
        """Numbers from row to row and from column to column of a part with so many rows."""
        return (1, rows) if self._transposed else (self._columns, 1)

    def floats(self, first: int = 0, end: int | None = None, are_scales: bool = False) -> Floats:
        """Rows first ... end - 1 as float32: where they lie, or copied. Raises Unfit for a scale that is 0 or not finite."""
        end = self.shape[0] if end is None else end
        size = (end - first) * self._columns
        if self._is_plain and self.kinds == {"F32"} and not are_scales:
            return Floats(self.address(first), size, self._parts[0].file)
        room, done, above = (ctypes.c_float * size)(), 0, 0  # above: rows in the parts before
        for part, rows in zip(self._parts, self._rows, strict=True):
            begin, stop = max(first - above, 0), min(end - above, rows)
            if begin < stop:
                steps = self._steps(rows)
                source = part.address + begin * steps[0] * SIZES[part.kind]
                to = ctypes.addressof(room) + 4 * done * self._columns
                useless = library().glass_floats(NUMBERS[part.kind], source, stop - begin, self._columns, *steps, to)
                _require(not are_scales or useless == 0, "numbers that are no scales")
                done += stop - begin
            above += rows
        return Floats(ctypes.addressof(room), size, room)

    def release(self, first: int, end: int) -> None:
        """Give the memory of these rows back; where they do not lie together, that of all after the last of them."""
        if self._is_plain:
            give_back(self.address(first), self.address(end) - self.address(first))
        elif end == self.shape[0]:
            for part in self._parts:
                give_back(part.address, math.prod(part.shape) * SIZES[part.kind])


def _parts(found: dict[str, Mapped], place: families.Stored, rows: Sequence[int], shape: tuple[int, ...]) -> Parts:
    """Takes the tensors of one of ours out of those that were found. Raises Unfit when they are not there, or others."""
    _require(not place.by_head, "heads in another order")
    tensors = []
    for name, count in zip(place.names, rows, strict=True):
        tensor, part = found.pop(name, None), (count, *shape[1:])
        if tensor is None or tensor.shape != (part[::-1] if place.transposed else part):
            raise Unfit(f"{name}: not there, or of another shape")
        _require(tensor.kind == "U8" if name.endswith(".codes") else tensor.kind in NUMBERS, f"{name} in {tensor.kind}")
        tensors.append(tensor)
    return Parts(tensors, rows, shape, place.transposed)


def _coded(config: ModelConfig, recipe: Recipe | None) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, ...]]]:
    """The shapes of the quantised matrices, and those of all tensors, codes and scales in their places."""
    coded: dict[str, tuple[int, int]] = {}
    wanted = expected(config)
    if recipe is None:
        return coded, wanted
    names = matrix_names(config)
    for name, bits in recipe.matrices.items():
        _require(name in names, f"{name} in codes")
        N, K = wanted.pop(f"{name}.weight")
        _require(K % (recipe.group or K) == 0, f"groups of {name}")
        coded[name] = (N, K)
        wanted[f"{name}.codes"], wanted[f"{name}.scales"] = recipe.shapes(bits, N, K)
    return coded, wanted


def mapped(path: Path) -> dict[str, Mapped]:
    """The tensors of a safetensors file (https://github.com/huggingface/safetensors#format), none of them read yet.

    Raises Unfit for a file that is none or not whole.
    """
    try:
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # what is written would stay here; nothing is
        start = 8 + int.from_bytes(memory[:8], "little")
        _require(start <= min(len(memory), HEADER_BYTES), "length of the header")
        header: Any = json.loads(memory[8:start].decode("utf-8"))
        header.pop("__metadata__", None)
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        found, last = {}, 0
        for name, facts in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            kind, shape, (begin, end) = facts["dtype"], tuple(facts["shape"]), facts["data_offsets"]
            _require(all(type(number) is int and number >= 0 for number in (*shape, begin, end)), f"numbers of {name}")
            size = math.prod(shape) * SIZES[kind]
            _require(begin == last and end - begin == size and (start + begin) % SIZES[kind] == 0, f"place of {name}")
            found[name], last = Mapped(kind, shape, base + start + begin, memory), end
        _require(start + last == len(memory), "length")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
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
