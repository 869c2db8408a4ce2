"""A model with one more head that gives a number for each position: rewards and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from glassgpt.config import UserError
from glassgpt.loading import find, load
from glassgpt.model import GPT
from glassgpt.text.chat import Message
from glassgpt.train.checkpoint import HEAD_FILE, facts
from glassgpt.tuning.examples import encode, end_ids
from glassgpt.tuning.rewards import Answer

BATCH = 16


class Headed(nn.Module):
    """A GPT and a scalar head on its last hidden states. The head begins at zero: no answer is better than another."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model
        weight = model.token_embedding.weight
        self.head = nn.Linear(model.config.width, 1, bias=False, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.head.weight)

    def numbers(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, T, D) to a number each, (B, T)."""
        return self.head(hidden).squeeze(-1).to(torch.promote_types(hidden.dtype, torch.float32))

    def scores(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """A number (N,) for each text, read at its last token."""
        T = max(map(len, texts))
        device = self.head.weight.device
        ids = torch.tensor([[*text, *[0] * (T - len(text))] for text in texts], device=device)  # (N, T)
        last = torch.tensor([len(text) - 1 for text in texts], device=device)
        return self.numbers(self.model.hidden(ids))[torch.arange(len(texts), device=device), last]


def open_scorer(name: str, device: torch.device) -> Callable[[Sequence[Answer]], list[float]]:
    """The scores of a trained reward model, a run folder of `glassgpt reward`.

    Raises UserError when it is no reward model, and for an answer that does not fit its context.
    """
    model, tokenizer = load(name, device=str(device))
    path = find(name).folder / HEAD_FILE
    if not path.is_file() or facts(path.parent).get("stage") != "reward":
        raise UserError(f"{name} is no reward model, whose checkpoints hold a {HEAD_FILE}; train one with `glassgpt reward`")
    headed = Headed(model).eval()
    try:
        headed.head.load_state_dict(safetensors.torch.load_file(path))
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot read the reward model's head: {error}") from error
    template = "none" if tokenizer.template is None else "chat"
    ends = end_ids(tokenizer, template)

    @torch.no_grad()
    def score(answers: Sequence[Answer]) -> list[float]:
        texts = []
        for answer in answers:
            ids = encode(answer.messages, [Message("assistant", answer.response)], tokenizer, template).ids
            while not answer.is_whole and len(ids) > 1 and ids[-1] in ends:
                ids.pop()
            if len(ids) > model.config.context_tokens:
                raise UserError(
                    f"the reward model {name} has a context of {model.config.context_tokens} tokens; the prompt of {answer.place}"
                    f" and its answer have {len(ids)} (use a smaller max_new_tokens)"
                )
            texts.append(ids)
        return [x for start in range(0, len(texts), BATCH) for x in headed.scores(texts[start : start + BATCH]).tolist()]

    return score
