"""Sparse autoencoders: an activation as a sum of few directions out of many, which are easier to read than neurons.

Two ways to make the codes sparse: the k largest alone (Gao et al. 2024, "Scaling and evaluating sparse autoencoders"), or an L1
penalty (Bricken et al. 2023, "Towards Monosemanticity"). `fit` learns one from numbers, `train_sae` from a model's activation;
`sae_report.py` says what it is worth and what its features answer to.

N tokens, D width of the activation, M features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.config import ModelConfig, UserError
from glassgpt.config.errors import check_at_least, check_seed
from glassgpt.config.files import complete_folder, from_plain, to_plain
from glassgpt.interpret.activations import activations
from glassgpt.model import GPT
from glassgpt.model.weights import read_file

WEIGHTS_FILE = "sae.safetensors"
FACTS_FILE = "sae.json"
LAST_REVIVAL = 0.8
"""Share of the training after which no feature starts anew: there would be no time to learn."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SaeConfig:
    """A sparse autoencoder and its training. Raises UserError at construction for values that make none."""

    features: int = 2048
    """Directions to learn."""
    k: int | None = 32
    """Features active for each token (top-k)."""
    l1: float | None = None
    """Or the weight of the codes' sum in the loss, with k=None; 2 left about 30 of 1,024 features active on the bundled model."""
    learning_rate: float = 4e-3
    """Of Adam; falls linearly to 0 over the last fifth of the steps."""
    steps: int = 2000
    batch_tokens: int = 2048
    """Tokens a step, drawn anew from all activations."""
    dead_steps: int = 100
    """Every so many steps, features that were silent throughout start anew, at what the others miss."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(1, self, "features", "k", "steps", "batch_tokens", "dead_steps", prefix="sae.")
        check_seed(self.seed)
        if (self.k is None) == (self.l1 is None):
            raise UserError(f"give either sae.k or sae.l1; got k {self.k} and l1 {self.l1}")
        if self.k is not None and self.k > self.features:
            raise UserError(f"sae.k {self.k} is more than sae.features {self.features}; lower k or add features")
        for name in ("l1", "learning_rate"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise UserError(f"sae.{name} must be above 0; got {getattr(self, name)}")


class Sae(nn.Module):
    """x -> codes = relu(W (x / scale - b_pre) + b), the k largest of them if there is a k -> scale * (codes V + b_pre).

    Rows of V, the decoder, have length 1. `scale` makes the mean length of activations √D.
    """

    def __init__(self, width: int, features: int, k: int | None = None) -> None:
        super().__init__()
        self.k = k
        self.encoder = nn.Linear(width, features)
        self.decoder = nn.Parameter(torch.empty(features, width))
        self.pre_bias = nn.Parameter(torch.zeros(width))
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(()))

    def encode(self, x: Tensor) -> Tensor:
        """Activations (..., D) to codes (..., M): never below 0, and most of them 0."""
        scores = self.encoder(x / self.scale - self.pre_bias)  # (..., M)
        if self.k is None:
            return scores.relu()
        values, chosen = scores.topk(self.k, dim=-1)
        return torch.zeros_like(scores).scatter(-1, chosen, values.relu())

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (..., M) to activations (..., D)."""
        return (codes @ self.decoder + self.pre_bias) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


@dataclass(frozen=True, eq=False)
class TrainedSae:
    """A sparse autoencoder, and what it was trained on."""

    sae: Sae
    name: str
    """The activation, as `capture` names it."""
    config: SaeConfig
    model: ModelConfig
    """Shape of the network that the activation is of."""


# ---------------------------------------------------------------------- training


def fit(x: Tensor, config: SaeConfig, progress: Progress | None = None) -> Sae:
    """A sparse autoencoder of numbers x (N, D): minimises |x - x̂|² / D (+ l1 * Σ codes / D) with x scaled to mean length √D.

    The decoder starts at random rows of length 1, the encoder at its transpose, the pre-bias at the mean.
    Raises UserError for fewer than 2 tokens, or numbers that are all alike or not finite.
    """
    if x.dim() != 2 or len(x) < 2:
        raise UserError(f"expected activations of at least 2 tokens, shape (N, D); got {tuple(x.shape)}")
    if not x.isfinite().all() or bool((x == x[0]).all()):
        raise UserError("the activations are all alike or not finite, so there is nothing to learn; choose another one")
    generator = torch.Generator().manual_seed(config.seed)
    sae = _started(x, config, generator)
    optimizer = torch.optim.Adam(sae.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 5 * (1 - step / config.steps)))
    silent = torch.zeros(config.features, dtype=torch.long, device=x.device)  # steps since a feature was active
    for step in range(1, config.steps + 1):
        batch = x[torch.randint(len(x), (config.batch_tokens,), generator=generator).to(x.device)]
        codes = sae.encode(batch)
        missed = (batch - sae.decode(codes)) / sae.scale
        loss = missed.square().mean() + (config.l1 or 0.0) * codes.sum(dim=-1).mean() / x.size(1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            sae.decoder.copy_(F.normalize(sae.decoder, dim=-1))
            silent = torch.where((codes > 0).any(dim=0), 0, silent + 1)
            if step % config.dead_steps == 0 and step <= LAST_REVIVAL * config.steps:
                _revive(sae, optimizer, missed, silent >= config.dead_steps, generator)
        if progress is not None:
            progress(step, config.steps)
    return sae.requires_grad_(False)


@torch.no_grad()
def _started(x: Tensor, config: SaeConfig, generator: torch.Generator) -> Sae:
    sae = Sae(x.size(1), config.features, config.k).to(x)
    sae.scale.copy_(x.norm(dim=-1).mean() / x.size(1) ** 0.5)
    sae.pre_bias.copy_(x.mean(dim=0) / sae.scale)
    sae.decoder.copy_(F.normalize(torch.randn(sae.decoder.shape, generator=generator), dim=-1))
    sae.encoder.weight.copy_(sae.decoder)
    sae.encoder.bias.zero_()
    return sae


def _revive(sae: Sae, optimizer: torch.optim.Optimizer, missed: Tensor, dead: Tensor, generator: torch.Generator) -> None:
    """Point dead features (M,) at what was missed (N, D), where most was, as new to Adam (Bricken et al. 2023, resampling)."""
    count = int(dead.sum())
    if count in (0, len(dead)):
        return
    errors = missed.square().sum(dim=-1).cpu()  # (N,)
    chosen = torch.multinomial(errors, count, replacement=True, generator=generator).to(missed.device)
    rows = F.normalize(missed[chosen], dim=-1)
    sae.decoder[dead] = rows
    sae.encoder.weight[dead] = rows * sae.encoder.weight[~dead].norm(dim=-1).mean()
    sae.encoder.bias[dead] = 0
    for parameter in (sae.decoder, sae.encoder.weight, sae.encoder.bias):
        for moment in ("exp_avg", "exp_avg_sq"):
            optimizer.state[parameter][moment][dead] = 0


def train_sae(
    model: GPT, name: str, batches: Sequence[Tensor], config: SaeConfig, progress: Progress | None = None
) -> TrainedSae:
    """Train on the activation `name`, (B, T, D), over all batches of ids (B, T).

    It is captured once and held whole: B * T * D numbers of 4 bytes a batch. Raises UserError for a name that the model has
    not, an activation of another shape, and as `fit` does.
    """
    x = held(model, name, batches)
    return TrainedSae(fit(x, config, progress), name, config, model.config)


def held(model: GPT, name: str, batches: Sequence[Tensor]) -> Tensor:
    """The activation `name` over all batches of ids (B, T): (N, D) in float32."""
    if not batches:
        raise UserError("there is no batch of token ids; give at least one")
    return torch.cat([activations(model, [name], ids)[name].flatten(0, 1).float() for ids in batches])


# ---------------------------------------------------------------------- files


def save_sae(trained: TrainedSae, folder: Path) -> None:
    """Write a folder that there is not yet: `sae.safetensors`, and `sae.json` with the activation, the options and the model."""
    facts = {"name": trained.name, "sae": asdict(trained.config), "model": to_plain(trained.model)}
    tensors = {name: x.detach().cpu().contiguous() for name, x in trained.sae.state_dict().items()}
    with complete_folder(folder) as aside:
        safetensors.torch.save_file(tensors, aside / WEIGHTS_FILE, metadata={"format": "pt"})
        (aside / FACTS_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def load_sae(folder: Path) -> TrainedSae:
    """Read what `save_sae` wrote. Raises UserError for a folder that is none, or damaged."""
    try:
        facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        name, config = str(facts["name"]), from_plain(SaeConfig, facts["sae"])
        trained_on = from_plain(ModelConfig, facts["model"])
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        raise UserError(f"{folder / FACTS_FILE}: no sparse autoencoder here: {error}") from error
    tensors = read_file(folder / WEIGHTS_FILE)
    shape = tensors["decoder"].shape if "decoder" in tensors else (0, 0)
    sae = Sae(shape[1], config.features, config.k)
    expected = {key: tuple(x.shape) for key, x in sae.state_dict().items()}
    if {key: tuple(x.shape) for key, x in tensors.items()} != expected:
        raise UserError(f"{folder / WEIGHTS_FILE}: tensors do not fit {FACTS_FILE}; expected {expected}")
    sae.load_state_dict(tensors)
    return TrainedSae(sae.requires_grad_(False), name, config, trained_on)
