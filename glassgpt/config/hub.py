"""Knobs of `glassgpt download`, `glassgpt export` and `glassgpt merge`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Download:
    """Fetch a model's configuration, weights and tokenizer from the Hugging Face hub into its cache (HF_HOME)."""

    repo: Annotated[str, Positional, arg(metavar="REPO")]
    """Model id on the hub, such as gpt2 or distilbert/distilgpt2."""
    revision: str = "main"
    """Branch, tag or commit; a name alone opens `main`, another revision opens by its folder."""


@dataclass(frozen=True)
class Export:
    """Write a model as a folder that other programs open."""

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    """A bundled model, a run folder, a Hugging Face folder or a downloaded hub id."""
    out_dir: Annotated[str, Positional, arg(metavar="DIR")]
    """Folder to make; it must not exist."""
    to: Literal["hf", "gguf", "glassgpt"] = "hf"
    """hf: Hugging Face layout (config.json, model.safetensors, tokenizer.json), which `transformers` and vLLM open;
    gguf: model.gguf, tokenizer included, which llama.cpp runs; glassgpt: our own (model.json in place of config.json)."""
    dtype: Literal["as-is", "float32", "bfloat16", "float16"] = "as-is"
    """Precision of the written weights; as-is keeps that of the source (float32 for a quantised one)."""


@dataclass(frozen=True)
class Merge:
    """Add an adapter to the weights of its base model and write the sum, a plain model.

    Prints how far the logits of the sum are from those of base and adapter side by side: nothing but rounding.
    """

    adapter: Annotated[str, Positional, arg(metavar="ADAPTER")]
    """A folder with adapter_config.json (ours or `peft`'s), or a run that was tuned with adapters."""
    out_dir: str
    """Folder to make; it must not exist."""
    to: Literal["glassgpt", "hf", "gguf"] = "glassgpt"
    """Layout, as `glassgpt export` has them."""
    dtype: Literal["as-is", "float32", "bfloat16", "float16"] = "float32"
    """Precision of the sum; as-is takes that of the base, which may round away much of what the adapter adds."""
