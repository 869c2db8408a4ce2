"""The native engine: a kernel library in C++ that is compiled when it is first needed, and a GPT packed for it."""

from glassgpt.generation.native.build import Unavailable
from glassgpt.generation.native.library import kernels, measure_bandwidth, measure_rate
from glassgpt.generation.native.model import NativeModel
from glassgpt.generation.native.model_file import ModelFile, Unfit
from glassgpt.generation.native.threads import default_threads

open_model = NativeModel

__all__ = [
    "ModelFile",
    "NativeModel",
    "Unavailable",
    "Unfit",
    "default_threads",
    "kernels",
    "measure_bandwidth",
    "measure_rate",
    "open_model",
]
