"""Losses of preference tuning and reinforcement learning: pure functions of tensors, nothing averaged.

Each gives one number per example or per token; the loop sums them and divides once, by the count of the whole step. B examples,
T positions, a "logp" is the log-probability in nats of a token or, summed over its tokens, of an answer. What is the same
before and after an update (references, samples' own log-probabilities, advantages) gets no gradient here, whatever comes in.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from glassgpt.model.gpt import capped
from glassgpt.train.loss import IGNORE

CHUNK_LOGITS = 2**24
"""Logits that exist at once in `token_logprobs`: 64 MiB in float32, 333 positions of a vocabulary of 50,257."""

# ---------------------------------------------------------------------- preferences


def bradley_terry(better: Tensor, worse: Tensor) -> Tensor:
    """-log σ(better - worse), (B,), of two answers' scores (B,): Stiennon et al. 2020, section 3.4; Ouyang et al. 2022, eq. 1.

    Only the difference counts: nothing says where the scores' zero is. σ first and its logarithm after is inf at a difference
    of -104, with a gradient of NaN.
    """
    return -F.logsigmoid(better - worse)


def dpo(
    better: Tensor,
    worse: Tensor,
    reference_better: Tensor,
    reference_worse: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct preference optimisation: losses (B,) of the answers' logps (B,), summed over tokens. Rafailov et al. 2023, eq. 7.

    `label_smoothing` is the share of pairs taken to be the wrong way round: "conservative DPO" (Mitchell 2023). The sum
    is the answer's own probability; a mean over its tokens is another loss. log 2 while the model is the reference.
    """
    margin = beta * ((better - reference_better.detach()) - (worse - reference_worse.detach()))  # (B,)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def ipo(better: Tensor, worse: Tensor, reference_better: Tensor, reference_worse: Tensor, beta: float) -> Tensor:
    """Identity preference optimisation: losses (B,). Azar et al. 2023, eq. 17, where beta is called τ.

    All four (B,) are means over the answers' tokens: the equation has sums, but its authors ran it with means (so trl says, who
    asked them), and with sums the goal, a margin of 1 / (2 beta), is nearer the longer the answers are.
    """
    margin = (better - reference_better.detach()) - (worse - reference_worse.detach())  # (B,)
    return (margin - 1 / (2 * beta)).square()


def kto(
    logp: Tensor,
    reference_logp: Tensor,
    is_good: Tensor,
    kl: Tensor,
    beta: float,
    good_weight: float = 1.0,
    bad_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimisation: losses (B,) of single answers, good (B,) bool or bad. Ethayarajh et al. 2024, eq. 8.

    `kl`, a scalar, is the mean over the step of logp - reference_logp of *mismatched* answers (each given to another's
    instruction): how far the model has drifted, against which an answer's own gain is held. It is an estimate of something
    never negative, so less than 0 is read as 0, and it gets no gradient.
    """
    gain = logp - reference_logp.detach()  # (B,)
    baseline = kl.detach().clamp(min=0)
    signed = torch.where(is_good, gain - baseline, baseline - gain)
    weight = torch.where(is_good, good_weight, bad_weight).to(gain.dtype)
    return weight * torch.sigmoid(-beta * signed)  # 1 - σ(x), without its rounding


def implicit_rewards(logp: Tensor, reference_logp: Tensor, beta: float) -> Tensor:
    """What a model tuned by `dpo` or `kto` holds answers to be worth, (B,), up to a constant per instruction; no gradient.

    Rafailov et al. 2023, eq. 5. The difference of two, for one instruction, is the margin in `dpo`.
    """
    return beta * (logp - reference_logp).detach()


# ---------------------------------------------------------------------- divergence from the reference


def k3(logp: Tensor, reference_logp: Tensor, old_logp: Tensor | None = None) -> Tensor:
    """KL(model || reference) estimated from each sampled token, (B, T): r - 1 - log r with r = reference / model.

    Schulman 2020, "Approximating KL divergence"; GRPO's eq. 4. Its mean over the model's own samples is the divergence, and it
    is never negative. `k1`, logp - reference_logp, has the same mean and is often negative.

    Without `old_logp` it is as published, and as a *loss* it has the wrong gradient: in the mean that of KL(reference || model)
    (k1's is 0). With `old_logp`, what the tokens had when they were sampled, it is weighted by the ratio model / old
    (DeepSeek-V3.2 2025, and trl unless told otherwise), and value and gradient are right in the mean, old samples or new. As a
    *reward* (detached, see `token_rewards`) it is k1 that has the right gradient.
    """
    difference = reference_logp.detach() - logp
    found = torch.expm1(difference) - difference  # exp(d) - d - 1 is noise below 1e-3 in float32, and negative
    return found if old_logp is None else found * (logp - old_logp.detach()).exp()


def adapted_beta(beta: float, kl: float, target_kl: float, answers: int, horizon: int = 10_000) -> float:
    """The next weight of the divergence, so that `kl` (per answer) comes to `target_kl`: Ziegler et al. 2019, eq. 4.

    The relative error is cut to ±0.2, and a step moves beta by at most 0.2 * answers / horizon of itself. (The paper writes 0.1
    in the place of answers / horizon; its code does as here, so that the batch does not matter.)
    """
    error = min(max(kl / target_kl - 1, -0.2), 0.2)
    return beta * (1 + error * answers / horizon)


# ---------------------------------------------------------------------- PPO


def token_rewards(scores: Tensor, kl: Tensor, is_token: Tensor, beta: float) -> Tensor:
    """Rewards (B, T): -beta * kl of each token, and on an answer's last token its score. Ziegler et al. 2019, eq. 2.

    scores (B,), kl (B, T) = logp - reference_logp of the sampled tokens, is_token (B, T) bool the answer's. The last token is
    the last of the answer, not of the row.
    """
    is_last = is_token & ~F.pad(is_token[:, 1:], (0, 1))  # (B, T)
    return torch.where(is_token, scores[:, None] * is_last - beta * kl, 0.0).detach()


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, is_token: Tensor, discount: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: advantages and returns, (B, T) each, 0 outside answers. Schulman et al. 2016, eq. 16.

    A_t = Σ_k (discount * lam)^k δ_{t+k}, δ_t = r_t + discount * V_{t+1} - V_t; returns = A + V is what the values should
    have been. rewards, values (B, T); is_token (B, T) bool: one run of tokens in each row, instruction before it and padding
    after. An answer ends with its last token: the value after it is 0, whatever the value head says of the padding.
    """
    rewards, values = torch.where(is_token, rewards, 0.0), torch.where(is_token, values, 0.0)
    delta = rewards + discount * F.pad(values[:, 1:], (0, 1)) - values  # (B, T)
    advantages, later = torch.zeros_like(delta), torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.size(1))):
        later = torch.where(is_token[:, t], delta[:, t] + discount * lam * later, 0.0)  # (B,)
        advantages[:, t] = later
    return advantages, advantages + values


def whiten(advantages: Tensor, mean: Tensor | float, variance: Tensor | float) -> Tensor:
    """Advantages (B, T) with mean 0 and variance 1 over the answers' tokens of the whole step, whose moments the loop knows.

    The moments must leave out padding, and be those of all ranks. What stands on padding is not 0 afterwards.
    """
    return (advantages - mean) / (torch.as_tensor(variance, dtype=advantages.dtype, device=advantages.device) + 1e-8).sqrt()


def clipped_policy(logp: Tensor, old_logp: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """PPO's loss of each token -min(ratio A, clipped ratio A), (B, T), and where clipping took its gradient, (B, T) bool.

    Schulman et al. 2017, eq. 7. logp, old_logp (B, T): of the sampled tokens now and when they were sampled; advantages (B, T)
    or (B, 1). A token is cut only on the side it is pushed to: above 1 + clip if A > 0, below 1 - clip if A < 0; where an
    update overshot the wrong way the gradient brings it back. The share cut is the mask's sum over the tokens.
    """
    advantages = advantages.detach()
    ratio = (logp - old_logp.detach()).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    is_clipped = ((ratio > 1 + clip) & (advantages > 0)) | ((ratio < 1 - clip) & (advantages < 0))
    return loss, is_clipped


def clipped_value(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """The value head's loss, (B, T): half the larger of the squared errors of the values and of them held near the old ones.

    values, old_values, returns (B, T). From the code of Schulman et al. 2017, whose eq. 9 has the square alone. With the
    smaller of the two a value would go on towards its return beyond `clip`, and one that has moved away would never come back.
    """
    old_values, returns = old_values.detach(), returns.detach()
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())


# ---------------------------------------------------------------------- GRPO


def group_advantages(rewards: Tensor, scale: Literal["none", "group"]) -> Tensor:
    """Advantages (N, G) of the G answers to each of N prompts: reward less the group's mean. Shao et al. 2024, section 4.1.2.

    group: divided by the group's standard deviation (that of a sample, G - 1, plus 1e-4, as trl has it), as published; none:
    not ("Dr. GRPO", Liu et al. 2025), so that a prompt on which all answers but one agree does not outweigh the rest. Equal
    rewards give exactly 0.
    """
    rewards = (rewards - rewards[:, :1]).detach()  # or the mean of equal numbers may differ from them in the last bit
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred if scale == "none" else centred / (rewards.std(dim=1, keepdim=True) + 1e-4)


def grpo_weights(
    is_token: Tensor,
    average: Literal["constant", "token", "sequence"],
    max_new_tokens: int,
    tokens_in_step: float,
    answers_in_step: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What each token's loss counts, (B, T): Σ weight * loss over the step's micro-batches and ranks is the loss of the step.

    constant: 1 / (answers * max_new_tokens), trl's "dr_grpo"; token: 1 / tokens, "dapo"; sequence: 1 / (answers * tokens of
    its answer), "grpo". The counts are those of the whole step: per micro-batch they would weigh short ones more.
    """
    weights = is_token.to(dtype)  # (B, T)
    if average == "constant":
        return weights / (answers_in_step * max_new_tokens)
    if average == "token":
        return weights / max(tokens_in_step, 1)
    return weights / (answers_in_step * weights.sum(dim=1, keepdim=True).clamp(min=1))


# ---------------------------------------------------------------------- log-probabilities


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, logit_cap: float | None = None, temperature: float = 1.0
) -> Tensor:
    """log p(target) (B, T) under softmax(capped(hidden @ weight.T, logit_cap) / temperature), 0 where a target is IGNORE.

    hidden (B, T, D), weight (V, D), targets (B, T). Never holds all logits: a chunk of positions at a time makes CHUNK_LOGITS
    of them, and makes them again for the gradient. Positions without a target cost nothing. Half-precision logits are summed
    in float32. The temperature answers were sampled at belongs in here too, or the ratio to the sampling policy is not 1.
    """
    return token_logprobs_entropy(hidden, weight, targets, logit_cap, temperature, with_entropy=False)[0]


def token_logprobs_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    logit_cap: float | None = None,
    temperature: float = 1.0,
    *,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """`token_logprobs`, and the entropy (B, T) in nats of each distribution that has a target (0 elsewhere), without gradient."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    where = (targets != IGNORE).flatten().nonzero().squeeze(1)  # (N,)
    rows = hidden.flatten(0, 1)[where].to(dtype)  # (N, D)
    size = max(1, CHUNK_LOGITS // weight.size(0))
    found = []
    with torch.autocast(kind, enabled=False):
        for chunk, wanted in zip(rows.split(size), targets.flatten()[where].split(size), strict=True):
            arguments = (chunk, weight, wanted, logit_cap, temperature, with_entropy)
            found.append(checkpoint(_logprobs, *arguments, use_reentrant=False, preserve_rng_state=False))
    logps, entropies = (torch.cat(parts) for parts in zip(*found, strict=True))  # (N,)
    zeros = logps.new_zeros(targets.numel())
    return zeros.index_put((where,), logps).view_as(targets), zeros.index_put((where,), entropies).view_as(targets)


def _logprobs(
    rows: Tensor, weight: Tensor, targets: Tensor, logit_cap: float | None, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    """log p(target) (n,) and entropy (n,) of rows (n, D)."""
    logits = rows @ weight.to(rows.dtype).mT  # (n, V); cast here, so that the chunks' gradients of the weight add in its own type
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = capped(logits, logit_cap)
    log_p = (logits if temperature == 1 else logits / temperature).log_softmax(dim=1)  # (n, V)
    logps = -F.nll_loss(log_p, targets, reduction="none")  # (n,)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(dim=1) if with_entropy else torch.zeros_like(logps)
    return logps, entropy
