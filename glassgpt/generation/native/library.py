"""The C interface of `src/engine.h`, by ctypes."""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from typing import Any

from glassgpt.generation.native import build

FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
MATRICES = {name: i for i, name in enumerate(("qkv", "out", "up", "gate", "down", "head", "embedding"))}
VECTORS = {
    name: i
    for i, name in enumerate(
        (
            *("norm_1", "norm_1_bias", "norm_2", "norm_2_bias", "q_norm", "q_norm_bias", "k_norm", "k_norm_bias"),
            *("qkv_bias", "out_bias", "up_bias", "gate_bias", "down_bias", "distance"),
            *("norm_f", "norm_f_bias", "embedding_norm", "embedding_norm_bias", "position", "cosine", "sine"),
        )
    )
}
NUMBERS = {"F32": 0, "BF16": 1, "F16": 2}
"""Of files, by safetensors' names for them."""
ACTIVATIONS = {"gelu": 0, "swiglu": 1, "relu2": 2}


class Shape(ctypes.Structure):
    """glass_shape."""

    _fields_ = [
        *((name, c_int32) for name in ("vocab", "context", "layers", "width", "heads", "kv_heads", "head_width", "hidden")),
        *((name, c_int32) for name in ("rms_norm", "gated", "activation", "cache_format", "planes")),
        *((name, c_float) for name in ("epsilon", "scale", "logit_cap")),
    ]


_INTS, _FLOATS = POINTER(c_int32), POINTER(c_float)
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "glass_error": (c_char_p, []),
    "glass_kernels": (c_char_p, []),
    "glass_new": (c_void_p, [POINTER(Shape), c_int32, c_char_p]),
    "glass_free": (None, [c_void_p]),
    "glass_engine_kernels": (c_char_p, [c_void_p]),
    "glass_bytes": (c_int64, [c_void_p]),
    "glass_matrix_new": (c_int32, [c_void_p, *[c_int32] * 6]),
    "glass_matrix_fill": (c_int32, [c_void_p, *[c_int32] * 5, c_void_p, c_int64, c_int64]),
    "glass_matrix_fill_codes": (c_int32, [c_void_p, *[c_int32] * 4, c_void_p, c_void_p]),
    "glass_vector_set": (c_int32, [c_void_p, c_int32, c_int32, c_void_p, c_int64]),
    "glass_window_set": (c_int32, [c_void_p, c_int32, c_int32]),
    "glass_sequence_new": (c_int32, [c_void_p]),
    "glass_sequence_fork": (c_int32, [c_void_p, c_int32]),
    "glass_sequence_rewind": (c_int32, [c_void_p, c_int32, c_int32]),
    "glass_sequence_length": (c_int32, [c_void_p, c_int32]),
    "glass_sequence_free": (c_int32, [c_void_p, c_int32]),
    "glass_cache_bytes": (c_int64, [c_void_p]),
    "glass_forward": (c_int32, [c_void_p, c_int32, _INTS, _INTS, c_int32, _INTS, c_int32, c_void_p, c_int64, c_void_p, c_void_p]),
    "glass_draw": (c_int32, [c_void_p, c_void_p, c_int32, c_int32, c_double, c_int32, c_double, c_double, c_double]),
    "glass_floats": (c_int64, [c_int32, c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p]),
    "glass_bandwidth": (c_double, [c_int64, c_int32]),
    "glass_rate": (c_double, [c_int32, c_int32, c_char_p]),
}


def library() -> Any:
    """The library, compiled if it has to be. Raises Unavailable, each time the same."""
    found = _library()
    if isinstance(found, build.Unavailable):
        raise found
    return found


@functools.cache
def _library() -> Any:
    try:
        return opened(str(build.library()))
    except build.Unavailable as error:
        return error


def opened(path: str) -> Any:
    """A library file with the types of its functions. Raises Unavailable for one that does not load."""
    try:
        found = ctypes.CDLL(path)
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise build.Unavailable(f"the compiled kernels {path} do not load: {error}") from error
    return found


def checked(lib: Any, result: int) -> int:
    """What a function gave, if it is no failure (RuntimeError: a mistake of this package, not of its user)."""
    if result < 0:
        raise RuntimeError(lib.glass_error().decode())
    return result


def kernels() -> list[str]:
    """The instruction sets that can be used here, best first."""
    return list(library().glass_kernels().decode().split())


def measure_bandwidth(size_bytes: int, threads: int) -> float:
    """Bytes a second that so many threads read from `size_bytes` of memory, over and over."""
    return float(library().glass_bandwidth(size_bytes, threads))


def measure_rate(number: str, threads: int) -> float:
    """Operations a second (a multiply-add is two) on `number` (float32, bfloat16 or int8) that never leave the registers."""
    return float(library().glass_rate(FORMATS[number], threads, None))
