"""A network in PyTorch as a source of weights: plain or quantised, its floats rounded on the way if that is asked for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from glassgpt.generation.native.build import Unavailable
from glassgpt.generation.native.library import FORMATS
from glassgpt.generation.native.packing import CodedRows, Floats, PlainRows, check_group, give_back
from glassgpt.model import GPT
from glassgpt.model.quantised import Quantised, round_to_nearest
from glassgpt.model.quantised import pack as pack_small

INT4_GROUP = 32
"""Inputs that share a scale where a float matrix is rounded to 4 bits."""
KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Network:
    """Reads a GPT from outside."""

    def __init__(self, model: GPT, precision: str) -> None:
        """`precision` is what its plain matrices become, `as-is` what they are; quantised ones stay as they are. Raises
        Unavailable for numbers that there are no kernels for."""
        self.config, self._model = model.config, model
        self._asked = precision
        self.precision = _stored(model) if precision == "as-is" else precision
        self._parameters = dict(model.named_parameters())

    def matrix(self, name: str) -> PlainMatrix | CodedMatrix:
        module = self._model.get_submodule(name)
        if isinstance(module, Quantised):
            check_group(module.matrix.group)
            return CodedMatrix(module)
        if type(module) not in (nn.Linear, nn.Embedding):
            raise Unavailable(f"the native engine does not compute {type(module).__name__}; merge adapters first")
        weight = module.get_parameter("weight").detach()
        return PlainMatrix(weight, _dtype_of(weight) if self._asked == "as-is" else self._asked)

    def vector(self, name: str) -> Floats | None:
        return _floats(self._parameters[name]) if name in self._parameters else None

    def tables(self) -> Iterator[tuple[int, str, Floats]]:
        for name, table in _positions(self._model).items():
            yield 0, name, _floats(table)
        for layer in range(self.config.n_layer):
            if (distance := _by_distance(self._model, layer)) is not None:
                yield layer, "distance", _floats(distance)


class PlainMatrix:
    """Floats, as they are or rounded to codes."""

    def __init__(self, weight: Tensor, number: str) -> None:
        N, K = weight.shape
        self.shape, self.number = (N, K), number
        self.group = INT4_GROUP if number == "int4" and K % INT4_GROUP == 0 else None
        self._weight = weight

    @torch.no_grad()
    def rows(self, first: int, end: int) -> PlainRows | CodedRows:
        part = self._weight[first:end]
        if self.number not in ("int8", "int4"):
            values = part if part.dtype in KINDS else part.float()
            row_step, column_step = values.stride()
            return PlainRows(values.data_ptr(), KINDS[values.dtype], row_step, column_step, values)
        rounded = round_to_nearest(part, int(self.number.removeprefix("int")), self.group)
        codes = (pack_small(rounded.codes) if self.number == "int4" else rounded.codes).contiguous()
        scales = rounded.scales.float().contiguous()
        return CodedRows(codes.data_ptr(), scales.data_ptr(), (codes, scales))

    def release(self, first: int, end: int) -> None:
        _release(self._weight[first:end])


class CodedMatrix:
    """Codes and scales, as they are."""

    def __init__(self, module: Quantised) -> None:
        matrix = module.matrix
        self.shape, self.number, self.group = (len(matrix.codes), matrix.columns), f"int{matrix.bits}", matrix.group
        self._matrix = matrix

    def rows(self, first: int, end: int) -> CodedRows:
        codes, scales = self._matrix.codes[first:end].contiguous(), self._matrix.scales[first:end].float().contiguous()
        return CodedRows(codes.data_ptr(), scales.data_ptr(), (codes, scales))

    def release(self, first: int, end: int) -> None:
        _release(self._matrix.codes[first:end])


def _stored(model: GPT) -> str:
    """What `as-is` stands for: the bits of a quantised model, else the dtype."""
    for module in model.modules():
        if isinstance(module, Quantised):
            return f"int{module.matrix.bits}"
    return _dtype_of(model.norm_f.get_parameter("weight"))


def _dtype_of(weight: Tensor) -> str:
    precision = str(weight.dtype).removeprefix("torch.")
    if precision not in FORMATS:
        raise Unavailable(f"the native engine does not compute in {precision}")
    return precision


def _floats(values: Tensor) -> Floats:
    values = values.detach().float().contiguous()
    return Floats(values.data_ptr(), values.numel(), values)


def _release(tensor: Tensor) -> None:
    if tensor.is_contiguous():
        give_back(tensor.data_ptr(), tensor.nbytes)


@torch.no_grad()
def _positions(model: GPT) -> dict[str, Tensor]:
    """What the position slot adds to embeddings, (context, D), and by what angles it turns, (context, W / 2)."""
    config, slot, tables = model.config, model.position_embedding, {}
    places = torch.arange(config.context_tokens)
    if config.position in ("learned", "sinusoidal"):
        tables["position"] = slot.add(torch.zeros(config.context_tokens, config.width), places)
    if (rotation := slot.rotation(places, torch.float32)) is not None:  # (2, 1, 1, T, W): both halves of W alike
        tables["cosine"], tables["sine"] = rotation.squeeze(2).squeeze(1)[..., : config.head_width // 2]
    return tables


@torch.no_grad()
def _by_distance(model: GPT, layer: int) -> Tensor | None:
    """Added to a score by how far back its key lies, (H, context): a bias, and -inf where a strided layer does not look."""
    config, S = model.config, model.config.context_tokens
    bias = model.position_embedding.bias(1, S, torch.device("cpu"), torch.float32)  # (H, 1, S): of the last query
    table = None if bias is None else bias[:, 0].flip(-1)  # (H, S)
    if config.span(layer) != "strided":
        return table
    back, near = torch.arange(S), config.window_tokens or 1
    seen = (back < near) | (back % near == 0)
    table = torch.zeros(config.n_head, S) if table is None else table
    return table.masked_fill(~seen, float("-inf"))
