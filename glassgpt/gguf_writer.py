"""A model and its tokenizer as one GGUF file, which llama.cpp and the programs built on it run.

What the file must hold is llama.cpp's own convention; the `gguf` package has its names for metadata and tensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glassgpt.config import ModelConfig, UserError
from glassgpt.config.model import RopeConfig
from glassgpt.model import GPT, weights
from glassgpt.model.families import Family, complete, family_of
from glassgpt.model.position import rope_speeds
from glassgpt.text import Tokenizer

# Our family -> llama.cpp's architecture. Its `llama` turns neighbouring numbers of a head, ours (as Hugging Face's) the halves.
ARCHITECTURES = {
    "gpt2": "gpt2",
    "llama": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}
NEIGHBOURS_TURN = ("llama",)
# How text is cut before merging: llama.cpp knows each published regular expression by a name.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CUTS = {
    rf"{_SHORT}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_SHORT}|{_WORDS}|\p{{N}}|{_REST}": "qwen2",
}


def write(model: GPT, tokenizer: Tokenizer, path: Path, name: str) -> None:
    """Write `path`. Matrices keep the model's precision (float64 becomes float32), norms and biases are float32.

    Raises UserError when `gguf` is not installed, and for a network or a tokenizer that llama.cpp does not have.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError("writing GGUF needs the package gguf: pip install 'glassgpt[export]'") from error
    config, family = complete(model.config), family_of(model.config)
    if family.model_type not in ARCHITECTURES:
        raise UserError(
            f"GGUF: this network is a {family.architecture}, which this exporter does not write; it writes"
            f" {', '.join(ARCHITECTURES)} (export --to hf keeps everything)"
        )
    if config.window_tokens is not None:
        raise UserError(f"GGUF: llama.cpp has no window_tokens = {config.window_tokens} for {family.architecture}")
    architecture = ARCHITECTURES[family.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(name)
    _add_shape(writer, config, architecture)
    _add_rope(writer, config, architecture, gguf)
    _add_tokenizer(writer, tokenizer, config.vocab_size, gguf)
    dtype = next(model.parameters()).dtype
    writer.add_file_type(
        {torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16, torch.float16: gguf.LlamaFileType.MOSTLY_F16}.get(
            dtype, gguf.LlamaFileType.ALL_F32
        )
    )
    for tensor_name, tensor in _tensors(model, family, architecture, gguf):
        if tensor.ndim == 1 or dtype not in (torch.bfloat16, torch.float16):
            writer.add_tensor(tensor_name, tensor.float().numpy())
        elif dtype == torch.float16:
            writer.add_tensor(tensor_name, tensor.numpy())
        else:
            raw = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(tensor_name, raw, raw_shape=raw.shape, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: Any, config: ModelConfig, architecture: str) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context_tokens)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.kv_heads)
    if config.norm == "rms":
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_key_length(config.head_width)
        writer.add_value_length(config.head_width)
    else:
        writer.add_layer_norm_eps(config.norm_eps)
    if config.moe.experts:
        writer.add_expert_count(config.moe.experts)
        writer.add_expert_used_count(config.moe.top_k)
        if architecture == "qwen3moe":
            writer.add_expert_feed_forward_length(config.expert_width)
            if not config.moe.normalise:
                raise UserError("GGUF: llama.cpp normalises the weights of the chosen experts; moe.normalise is false")


def _add_rope(writer: Any, config: ModelConfig, architecture: str, gguf: Any) -> None:
    if config.position != "rope":
        return
    rope = config.rope
    writer.add_rope_dimension_count(config.head_width)
    writer.add_rope_freq_base(rope.theta)
    if rope.scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    elif rope.scaling == "yarn":
        if (rope.fast_turns, rope.slow_turns, rope.attention_factor) != (32.0, 1.0, None):
            raise UserError("GGUF: llama.cpp takes yarn with fast_turns 32, slow_turns 1 and no attention_factor of its own")
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope.factor)
        writer.add_rope_scaling_orig_ctx_len(rope.original_tokens)
    elif rope.scaling == "smooth" and architecture != "llama":
        raise UserError(f"GGUF: llama.cpp has rope.scaling smooth for llama, not for {architecture}")
    elif rope.scaling == "smooth":
        plain, _ = rope_speeds(RopeConfig(rope.theta), config.head_width, torch.device("cpu"), torch.float64)
        slowed, _ = rope_speeds(rope, config.head_width, torch.device("cpu"), torch.float64)
        writer.add_tensor("rope_freqs.weight", (plain / slowed).float().numpy())  # what each pair's speed is divided by


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, vocab_size: int, gguf: Any) -> None:
    """Byte-level BPE: tokens in byte characters, merges in order, and how text is cut."""
    facts = json.loads(tokenizer.to_json())
    tokens, special = tokenizer.pieces(), {entry["id"]: entry for entry in facts.get("added_tokens", [])}
    kinds = [
        gguf.TokenType.NORMAL
        if token_id not in special
        else gguf.TokenType.CONTROL
        if special[token_id]["special"]
        else gguf.TokenType.USER_DEFINED
        for token_id in range(len(tokens))
    ]
    unused = range(len(tokens), vocab_size)  # rows of the embedding that no token has
    if tokenizer.template is not None:
        writer.add_chat_template(tokenizer.template.source)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_cut(facts))
    writer.add_token_list([*tokens, *(f"[UNUSED{token_id}]" for token_id in unused)])
    writer.add_token_types([*kinds, *(gguf.TokenType.UNUSED for _ in unused)])
    merges = facts["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    if tokenizer.end_id is None or not merges:  # it would take token 11 for the end, or no file at all
        raise UserError("GGUF: llama.cpp needs a tokenizer with merges and an end-of-text token; this one lacks them")
    begin = tokenizer.begin_id
    writer.add_bos_token_id(tokenizer.end_id if begin is None else begin)
    writer.add_eos_token_id(tokenizer.end_id)
    writer.add_add_bos_token(begin is not None)


def _cut(facts: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer cuts text before merging."""
    normalizer = (facts.get("normalizer") or {}).get("type")
    if facts["model"].get("type") != "BPE" or facts["model"].get("byte_fallback") or normalizer not in (None, "NFC"):
        given = f"{facts['model'].get('type')}, normalizer {normalizer}"
        raise UserError(f"GGUF: the tokenizer is no plain byte-level BPE ({given}); only those are written")
    before = facts.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    kinds = [step.get("type") for step in steps]
    is_plain = kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space")
    if is_plain and kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if is_plain and kinds == ["Split", "ByteLevel"] and steps[0]["pattern"].get("Regex") in CUTS:
        return CUTS[steps[0]["pattern"]["Regex"]]
    raise UserError(f"GGUF: llama.cpp has no name for how this tokenizer cuts text ({json.dumps(before)[:200]})")


def _tensors(model: GPT, family: Family, architecture: str, gguf: Any) -> list[tuple[str, Tensor]]:
    """Names and tensors as llama.cpp wants them: matrices (out, in), the experts of a layer in one."""
    config = model.config
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.n_layer)
    found, experts = [], dict[str, list[Tensor]]()
    for theirs, tensor in weights.hf_tensors(model).items():
        if family.transposed and tensor.ndim == 2 and ".h." in theirs:
            tensor = tensor.t()
        if architecture in NEIGHBOURS_TURN and theirs.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = _neighbours(tensor, config.n_head if "q_proj" in theirs else config.kv_heads)
        before, is_expert, after = theirs.partition(".experts.")
        if is_expert:
            experts.setdefault(f"{before}.experts.{after.partition('.')[2]}", []).append(tensor)  # in the order of their numbers
            continue
        found.append((_name(names, theirs), tensor))
    return found + [(_name(names, theirs), torch.stack(parts)) for theirs, parts in experts.items()]


def _name(names: Any, theirs: str) -> str:
    name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise UserError(f"GGUF: the gguf package has no name for {theirs}; install a newer one")
    return str(name)


def _neighbours(weight: Tensor, heads: int) -> Tensor:
    """Rows (heads * W, D) with number i and i + W/2 of each head made neighbours."""
    halves = weight.unflatten(0, (heads, 2, -1))  # (heads, 2, W/2, D)
    return halves.transpose(1, 2).flatten(0, 2)
