"""`glassgpt export` and `glassgpt merge`: a model in the layout that another program opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glassgpt import gguf_writer
from glassgpt.config import UserError
from glassgpt.config.files import complete_folder
from glassgpt.config.hub import Export, Merge
from glassgpt.loading import find, load
from glassgpt.model import GPT, lora, weights
from glassgpt.text import Tokenizer, chat

GGUF_FILE = "model.gguf"


def export(config: Export) -> Path:
    """Write a model in a layout of choice; returns the folder. It appears complete or not at all."""
    model, tokenizer = load(config.model, dtype=_dtype(config.dtype), plain=True)
    return _write(model, tokenizer, config.to, Path(config.out_dir), Path(config.model).name)


def merge(config: Merge) -> Path:
    """Write the sum of a base and its adapter; returns the folder. Raises UserError for a model that is no adapter."""
    if find(config.adapter).base is None:
        raise UserError(f"{config.adapter} holds a whole model and no adapter, so there is nothing to merge; `export` writes it")
    model, tokenizer = load(config.adapter, dtype=_dtype(config.dtype), merge=False)
    beside = _some_logits(model)
    error = float((_some_logits(lora.merge(model)) - beside).abs().max())
    target = _write(model, tokenizer, config.to, Path(config.out_dir), Path(config.adapter).name)
    print(f"largest change of a logit by merging: {error:.1e}, of logits up to {float(beside.abs().max()):.1f}")
    return target


@torch.no_grad()
def _some_logits(model: GPT) -> Tensor:
    """Of random ids, in float64."""
    T = min(64, model.config.context_tokens)
    ids = torch.randint(model.config.vocab_size, (2, T), generator=torch.Generator().manual_seed(0))
    return model(ids).double()  # (2, T, V)


def _dtype(name: str) -> torch.dtype | None:
    return None if name == "as-is" else getattr(torch, name)


def _write(model: GPT, tokenizer: Tokenizer, to: str, target: Path, name: str) -> Path:
    """The folder in the layout that `to` names, complete or not at all."""
    with complete_folder(target) as aside:
        if to == "gguf":
            gguf_writer.write(model, tokenizer, aside / GGUF_FILE, name=name)
        else:
            tokenizer.save(aside)
        if to == "glassgpt":
            weights.save(model, aside)
        elif to == "hf":
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
        ends = chat.end_ids(tokenizer) if tokenizer.template else [tokenizer.end_id]
        facts_of_texts = {"bos_token_id": begin_id, "eos_token_id": ends[0] if len(ends) == 1 else ends}
        (folder / "generation_config.json").write_text(json.dumps(facts_of_texts, indent=2) + "\n")
    if tokenizer.template is not None:  # which writes its own two tokens by these names
        tokens = {"bos_token": tokenizer.template.begin, "eos_token": tokenizer.template.end}
        facts |= {name: token for name, token in tokens.items() if token} | {"chat_template": tokenizer.template.source}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts, indent=2) + "\n")
