"""Group-relative policy optimisation: several answers to each prompt, compared with one another. One flat function."""

from __future__ import annotations

import contextlib
from pathlib import Path

from glassgpt.config import ParallelConfig
from glassgpt.config.tuning import Grpo
from glassgpt.train import machine, optim
from glassgpt.train.parallel import Ranks
from glassgpt.train.session import Session, joined
from glassgpt.tuning import objectives, rollout, stage
from glassgpt.tuning.rollout import Sampler


def grpo(config: Grpo) -> Path:
    """Make rewarded answers likelier; returns the run folder. Under `torchrun` every process calls it.

    Raises UserError for bad input, and after a checkpoint for a reward that fails on an answer.
    """
    with joined(Path(config.out_dir), ParallelConfig(), config.device) as ranks:
        return _train(config, ranks)


def _train(config: Grpo, ranks: Ranks) -> Path:
    config = stage.opened(config, ranks)
    model, tokenizer = stage.start(config, ranks)
    model.eval()  # dropout would change the policy between writing and learning
    optimizers = optim.build(model, config.optim)
    low_precision = machine.autocast(ranks.device, config.precision)

    with contextlib.ExitStack() as stack:
        rewards = stack.enter_context(rollout.open_rewards(config, ranks))
        sampler = Sampler(config, ranks, model, tokenizer, rewards, config.group_size)
        session = stack.enter_context(
            Session("grpo", config, ranks, model, tokenizer, optimizers, sampler.total_steps, saved_as=stage.saved_as(config))
        )
        session.say(stage.banner(config, model, ranks))
        session.say(sampler.told())
        for step in session.steps():
            with rollout.saved_before(session):
                seen = sampler.step(step)
            advantages = [
                objectives.group_advantages(some.view(-1, config.group_size), config.scale).view(-1, 1) for some in seen.scores
            ]  # (B, 1) each
            weights = [
                objectives.grpo_weights(
                    batch.is_token, config.average, config.max_new_tokens, seen.tokens, sampler.answers, advantages[0].dtype
                )
                for batch in seen.batches
            ]  # (B, T) each
            for _ in range(config.updates):
                total = outside = 0.0
                for batch, advantage, weight, old, start in zip(
                    seen.batches, advantages, weights, seen.old, seen.start, strict=True
                ):
                    with low_precision:
                        logp = sampler.logps(batch)  # (B, T)
                    loss, clipped = objectives.clipped_policy(logp, old, advantage, config.clip)
                    part = (weight * (loss + config.beta * objectives.k3(logp, start, old))).sum()
                    part.backward()
                    total += part.item()
                    outside += float((clipped * batch.is_token).sum())
                loss_of_step = session.update(total, 1.0)
            entry = session.entry(loss_of_step, tokens=seen.tokens) | seen.facts
            entry["clipped"] = ranks.total([outside])[0] / seen.tokens
            speed = f"reward {entry['reward']:+.3f}  KL {entry['kl']:.3f}  {seen.tokens / entry['seconds']:,.0f} tokens/s"
            sampler.finish(session, entry, speed)
    return Path(config.out_dir)
