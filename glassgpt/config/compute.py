"""Knobs of what computes a text: `glassgpt generate` and `glassgpt chat` share them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from glassgpt.config.errors import UserError, check_at_least, check_choices
from glassgpt.config.quantize import Recipe

MOST_THREADS = 1024
Precision = Literal["as-is", "float32", "bfloat16", "float64", "int8", "int4"]
Dtype = Literal["float32", "bfloat16", "float64"]


@dataclass(frozen=True)
class Compute:
    """What computes, and in which numbers."""

    engine: Literal["auto", "plain", "native"] = "auto"
    """plain (PyTorch, everywhere), native (compiled kernels, on a CPU), or auto: native where it can be used."""
    precision: Precision = "as-is"
    """Numbers of the weights: as they are stored (the arithmetic is float32), or converted when they are loaded."""
    activations: Literal[16, 8] = 16
    """Bits of what 8- and 4-bit weights are multiplied with; 8 is faster and less exact (native only)."""
    cache: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Numbers of the keys and values that are kept; shorter ones take less memory (native only)."""
    threads: int | None = None
    """CPU threads (default: one for each core, or OMP_NUM_THREADS if that is fewer)."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(1, self, "threads")
        if self.threads is not None and self.threads > MOST_THREADS:
            raise UserError(f"threads must be at most {MOST_THREADS}; got {self.threads}")
        if self.engine == "plain" and self.needs_native:
            raise UserError("--activations 8 and --cache are the native engine's; leave them out, or use --engine native")
        if self.engine == "native" and self.precision == "float64":
            raise UserError("the native engine has no float64; use --engine plain")

    @property
    def needs_native(self) -> bool:
        """Whether something is asked for that PyTorch does not do here."""
        return self.activations != 16 or self.cache != "auto"

    def resolved(self, recipe: Recipe | None) -> Compute:
        """What the native engine is asked for, of a model that was quantised so, or of a plain one: the short numbers of a plain
        model are computed in float32, a quantised one keeps its codes and its activations.

        Raises UserError for 8 or 4 bits of a model that has them already, and for activations of 8 bits without them.
        """
        is_coded = self.precision in ("int8", "int4")
        if recipe is None:
            if self.activations == 8 and not is_coded:
                raise UserError(
                    "--activations 8 is for weights of 8 or 4 bits; give --precision int8 or int4 too, or leave it out"
                )
            return replace(self, precision="float32") if self.precision == "as-is" else self
        if is_coded:
            raise UserError(f"the model is quantised already ({recipe.precision}); leave out --precision {self.precision}")
        return replace(self, activations=8) if recipe.activation_bits == 8 and self.engine != "plain" else self

    def with_dtype(self, dtype: Dtype | None) -> Compute:
        """With the older option in the place of `precision`. Raises UserError when both are given and differ."""
        if dtype is None or dtype == self.precision:
            return self
        if self.precision != "as-is":
            raise UserError(f"--dtype is the older name of --precision; got {dtype} and {self.precision}: give --precision alone")
        return replace(self, precision=dtype)
