"""What the model would say if it stopped after each layer: the logit lens, and the tuned lens that learns each layer's language.

L layers, B rows, T tokens, D width, V vocabulary. Row 0 of a lens is the residual stream before the first block, row l that
after l blocks; row L is the model's own output.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.config import UserError
from glassgpt.config.files import complete_folder
from glassgpt.generation.sampling import entropy, exact
from glassgpt.interpret.hooks import capture
from glassgpt.interpret.next_token import NATS_PER_BIT, ranks
from glassgpt.model import GPT, weights
from glassgpt.model.quantised import dequantised

FACTS_FILE = "tuned_lens.json"
WEIGHTS_FILE = "tuned_lens.safetensors"
SAMPLE = 256
"""Numbers of each parameter that tell one model from another."""


@dataclass(frozen=True, eq=False)
class Lens:
    """What each layer would say at each token of a text."""

    ids: Tensor
    """The k likeliest next tokens, likeliest first, (L + 1, T, k)."""
    probabilities: Tensor
    """Theirs, of the whole vocabulary, (L + 1, T, k)."""
    rank: Tensor
    """Place of the token that really follows among the whole vocabulary, 1 the likeliest, (L + 1, T); 0 where none follows."""
    kl_bits: Tensor
    """How far the layer still is from the output, KL(output || layer), (L + 1, T); exactly 0 in the last row."""
    entropy_bits: Tensor
    """log2 of the number of equally likely choices, (L + 1, T)."""


def logit_lens(model: GPT, residual: Tensor) -> Tensor:
    """Logits (..., V) of a residual stream (..., D), as if the blocks that follow were not there (nostalgebraist 2020).

    The final norm takes its mean and scale from this very residual. Those of the last layer, which direct attribution holds
    fixed, would be far off: the stream grows from layer to layer.
    """
    return model.logits(model.norm_f(residual))


@torch.inference_mode()
def lens(model: GPT, ids: Tensor, k: int = 5, tuned: TunedLens | None = None, n_ids: int | None = None) -> Lens:
    """The lens on every layer and token of a text, ids (T,). One row of logits is held at a time, besides the output's.

    Only the first `n_ids` of the vocabulary count (all if not given): some models have more rows than their tokenizer tokens.
    Raises UserError for an empty or too long text, for a `k` below 1 and for a tuned lens that was trained on another model.
    """
    if len(ids) == 0 or k < 1:
        raise UserError(f"a lens needs a text of at least one token, and k of at least 1; got {len(ids)} tokens and k = {k}")
    if tuned is not None:
        tuned.check(model)
    residuals, logits = residual_stream(model, ids[None])
    output = exact(logits)[0, :, :n_ids].log_softmax(-1)  # (T, V)
    mapped = residuals if tuned is None else [tuned(row, residual) for row, residual in enumerate(residuals)]
    layers = (logit_lens(model, residual) for residual in mapped[:-1])  # (1, T, V), when its turn comes
    rows = [_row(exact(layer)[0, :, :n_ids], output, ids, k) for layer in itertools.chain(layers, [logits])]
    return Lens(*(torch.stack(column) for column in zip(*rows, strict=True)))


def _row(logits: Tensor, output: Tensor, ids: Tensor, k: int) -> tuple[Tensor, ...]:
    """One layer's part of `Lens`, of its logits (T, V) and the output's log-probabilities (T, V)."""
    log_p = logits.log_softmax(-1)
    top = log_p.topk(min(k, log_p.size(-1)))  # (T, k)
    rank = F.pad(ranks(logits[:-1], ids[1:]), (0, 1))  # (T,)
    return top.indices, top.values.exp(), rank, kl_bits(output, log_p), entropy(logits) / NATS_PER_BIT


def kl_bits(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) (...) of log-probabilities (..., V): bits that are lost by taking q for p."""
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1) / NATS_PER_BIT


def residual_stream(model: GPT, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """The residual stream of ids (B, T) before the first block and after each, L + 1 of (B, T, D), and the logits (B, T, V)."""
    with capture(model, ["embed", "blocks.*"]) as seen:
        logits = model(ids)
    return [seen["embed"], *(seen[f"blocks.{layer}"] for layer in range(model.config.n_layer))], logits


# ---------------------------------------------------------------------- the tuned lens


class TunedLens(nn.Module):
    """An affine map before the final norm for every layer, x + A x + b (Belrose et al. 2023, eq. 8); none for the last row.

    A and b start at 0, which is the logit lens.
    """

    def __init__(self, model: GPT) -> None:
        super().__init__()
        parameter = model.head.weight
        self.dtype = torch.promote_types(parameter.dtype, torch.float32)
        D = model.config.width
        self.maps = nn.ModuleList(nn.Linear(D, D, device=parameter.device, dtype=self.dtype) for _ in range(model.config.n_layer))
        for zero in self.parameters():
            nn.init.zeros_(zero)
        self.facts = _facts(model)
        self.history_bits: list[list[float]] = []
        """KL(output || layer) of every row but the last, at each step of training before its update."""

    def forward(self, row: int, residual: Tensor) -> Tensor:
        """The residual stream (..., D) of row 0 to L as the last row would have it."""
        if row == len(self.maps):
            return residual
        linear = self.maps[row]
        return residual + linear(residual.to(self.dtype)).to(residual.dtype)

    def check(self, model: GPT) -> None:
        """Raises UserError when the lens was trained on another model."""
        if (given := _facts(model)) != self.facts:
            ours, theirs = _in_words(self.facts), _in_words(given)
            raise UserError(f"the tuned lens was trained on {ours}; the model has {theirs}. Train one on this model")

    def save(self, folder: Path) -> None:
        """Write a new folder of the maps and of the facts about their model. Raises UserError when it exists."""
        with complete_folder(folder) as aside:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.named_parameters()}
            safetensors.torch.save_file(tensors, aside / WEIGHTS_FILE)
            (aside / FACTS_FILE).write_text(json.dumps({**self.facts, "history_bits": self.history_bits}, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path, model: GPT) -> TunedLens:
        """Read a folder. Raises UserError for one that is missing or damaged, or of another model's lens."""
        tuned = cls(model)
        try:
            facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
            tuned.facts = {name: facts[name] for name in tuned.facts}
            tuned.history_bits = facts["history_bits"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder}: not a tuned lens ({type(error).__name__}: {error}); train it again") from error
        tuned.check(model)
        try:
            tuned.load_state_dict(weights.read_file(folder / WEIGHTS_FILE))
        except RuntimeError as error:
            raise UserError(f"{folder / WEIGHTS_FILE}: not the maps of this lens; train it again") from error
        return tuned


def _facts(model: GPT) -> dict[str, Any]:
    """What tells a model from others: its shape, and a hash of every parameter's name and some of its numbers.

    Those are rounded to bfloat16, so that a model is the same in float64, float32 and bfloat16.
    """
    known = hashlib.sha256()
    for name, parameter in dequantised(model).named_parameters():
        numbers = parameter.detach().flatten()[:: max(1, parameter.numel() // SAMPLE)].bfloat16()
        known.update(f"{name} {tuple(parameter.shape)}".encode() + numbers.view(torch.int16).cpu().numpy().tobytes())
    return {"n_layer": model.config.n_layer, "width": model.config.width, "sha256": known.hexdigest()}


def _in_words(facts: dict[str, Any]) -> str:
    return f"{facts['n_layer']} layers of width {facts['width']} (weights {str(facts['sha256'])[:8]})"


def train_tuned_lens(
    model: GPT,
    batches: Iterable[Tensor],
    *,
    steps: int = 250,
    learning_rate: float = 1e-3,
    progress: Callable[[int, int], None] | None = None,
) -> TunedLens:
    """Train the maps of every layer on a batch of ids (B, T) a step, to the least KL(output || layer). The model is frozen.

    Adam, its rate falling to 0 in a line; each layer by itself, so one layer's logits (B, T, V) are held at a time beside the
    output's: about 1,000 tokens a batch are a good size for a vocabulary of 50,000. Raises UserError when the batches run out.
    """
    tuned = TunedLens(model)
    optimizer = torch.optim.Adam(tuned.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    source = iter(batches)
    for step in range(steps):
        ids = next(source, None)
        if ids is None:
            raise UserError(f"the text for the tuned lens ran out after {step} of {steps} steps; give more text, or fewer steps")
        tuned.history_bits.append(_gradients(model, tuned, ids))
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, steps)
    return tuned


def _gradients(model: GPT, tuned: TunedLens, ids: Tensor) -> list[float]:
    """Set the gradient of each map; returns the mean KL (L,) in bits. The model's parameters get none."""
    with torch.no_grad():
        residuals, logits = residual_stream(model, ids)
        output = exact(logits).log_softmax(-1)  # (B, T, V)
    losses = []
    for row, linear in enumerate(tuned.maps):
        layer = exact(logit_lens(model, tuned(row, residuals[row]))).log_softmax(-1)  # (B, T, V)
        loss = kl_bits(output, layer).mean()
        parameters = list(linear.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        losses.append(loss.item())
    return losses
