"""`glassgpt export`: a model in the layout that another program opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from glassgpt import gguf_writer
from glassgpt.config.files import complete_folder
from glassgpt.config.hub import Export
from glassgpt.loading import load
from glassgpt.model import weights
from glassgpt.text import Tokenizer

GGUF_FILE = "model.gguf"


def export(config: Export) -> Path:
    """Write a model in a layout of choice; returns the folder. It appears complete or not at all."""
    model, tokenizer = load(config.model, dtype=None if config.dtype == "as-is" else getattr(torch, config.dtype))
    target = Path(config.out_dir)
    with complete_folder(target) as aside:
        if config.to == "gguf":
            gguf_writer.write(model, tokenizer, aside / GGUF_FILE, name=Path(config.model).name)
        else:
            tokenizer.save(aside)
        if config.to == "glassgpt":
            weights.save(model, aside)
        elif config.to == "hf":
            weights.save_hf(model, aside, tokenizer.end_id, begin_id=tokenizer.begin_id)
            _save_hf_tokenizer_facts(aside, tokenizer, model.config.context_tokens)
    print(f"wrote {target}")
    return target


def _save_hf_tokenizer_facts(folder: Path, tokenizer: Tokenizer, context_tokens: int) -> None:
    """What `transformers` wants to know beside tokenizer.json: its class, its limit, the special tokens, where texts end."""
    facts: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context_tokens}
    if tokenizer.end_token is not None and tokenizer.end_id is not None:
        begin_id = tokenizer.end_id if tokenizer.begin_id is None else tokenizer.begin_id
        facts |= dict.fromkeys(("eos_token", "unk_token"), tokenizer.end_token) | {"bos_token": tokenizer.pieces()[begin_id]}
        ends = {"bos_token_id": begin_id, "eos_token_id": tokenizer.end_id}
        (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(facts, indent=2) + "\n")
