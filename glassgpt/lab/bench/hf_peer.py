"""`transformers`' GPT-2 with our weights: the peer of `bench train` and `bench inspect`."""

from __future__ import annotations

from typing import Any

import torch

from glassgpt.config import ModelConfig, UserError
from glassgpt.model import GPT, weights


def hf_peer(model: GPT | None, shape: ModelConfig) -> Any:
    """`transformers`' GPT-2 with the same weights (None: only its shape). Raises UserError when it is not installed."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel, logging

        logging.set_verbosity_error()
    except ImportError as error:
        raise UserError("the peer `transformers` is not installed; pip install 'glassgpt[bench]'") from error
    values = weights.config_to_hf(shape, end_id=None, dtype=torch.float32)
    with torch.device("meta"):
        peer = GPT2LMHeadModel(GPT2Config(**values))
    if model is not None:
        peer.load_state_dict(weights.hf_tensors(model), assign=True, strict=False)
        peer.tie_weights()
    return peer
