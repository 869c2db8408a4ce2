"""Proximal policy optimisation: sampled answers, a reward for each, and a value head that says what was to be expected."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from glassgpt.config import ParallelConfig
from glassgpt.config.tuning import Ppo
from glassgpt.train import machine, optim
from glassgpt.train.parallel import Ranks
from glassgpt.train.session import Session, joined
from glassgpt.tuning import objectives, rollout, stage
from glassgpt.tuning.rollout import Sampler
from glassgpt.tuning.scalar import Headed


def ppo(config: Ppo) -> Path:
    """Make rewarded answers likelier; returns the run folder. Under `torchrun` every process calls it.

    Raises UserError for bad input, and after a checkpoint for a reward that fails on an answer.
    """
    with joined(Path(config.out_dir), ParallelConfig(), config.device) as ranks:
        return _train(config, ranks)


def _train(config: Ppo, ranks: Ranks) -> Path:
    config = stage.opened(config, ranks)
    model, tokenizer = stage.start(config, ranks)
    headed = Headed(model).eval()  # dropout would change the policy between writing and learning
    optimizers = optim.build(headed, config.optim)
    low_precision = machine.autocast(ranks.device, config.precision)

    with contextlib.ExitStack() as stack:
        rewards = stack.enter_context(rollout.open_rewards(config, ranks))
        sampler = Sampler(config, ranks, model, tokenizer, rewards)
        session = stack.enter_context(
            Session("ppo", config, ranks, headed, tokenizer, optimizers, sampler.total_steps, saved_as=stage.saved_as(config))
        )
        session.say(stage.banner(config, headed, ranks))
        session.say(sampler.told())
        beta = session.kept.setdefault("beta", config.beta)
        for step in session.steps():
            with rollout.saved_before(session):
                seen = sampler.step(step)
            # what each token has brought, and how much more than the value head expected
            with torch.no_grad(), low_precision:
                both = zip(seen.hidden, seen.batches, strict=True)
                values = [headed.numbers(hidden) * batch.is_token for hidden, batch in both]  # (B, T) each
            learnt = []
            for batch, score, old, start, value in zip(seen.batches, seen.scores, seen.old, seen.start, values, strict=True):
                earned = objectives.token_rewards(score, old - start, batch.is_token, beta)  # (B, T); as a reward k1, not k3
                learnt.append(objectives.gae(earned, value, batch.is_token, config.discount, config.gae_lambda))
            masks = [batch.is_token for batch in seen.batches]
            sums = [[float(a[m].sum()), float(a[m].square().sum())] for (a, _), m in zip(learnt, masks, strict=True)]
            first, second = (total / seen.tokens for total in ranks.total([sum(some) for some in zip(*sums, strict=True)]))
            variance = max(0.0, second - first**2)

            for _ in range(config.updates):
                total, told = 0.0, [0.0, 0.0]
                for batch, old, value, (advantages, returns) in zip(seen.batches, seen.old, values, learnt, strict=True):
                    with low_precision:
                        hidden = model.hidden(batch.ids)
                        logp, now = sampler.logps_of(hidden, batch), headed.numbers(hidden)
                    gain = objectives.whiten(advantages, first, variance)
                    policy, clipped = objectives.clipped_policy(logp, old, gain, config.clip)
                    worth = objectives.clipped_value(now, value, returns, config.value_clip)
                    part = ((policy + config.value_weight * worth) * batch.is_token).sum() / seen.tokens
                    part.backward()
                    total += part.item()
                    told[0] += float((clipped * batch.is_token).sum())
                    told[1] += (worth.detach() * batch.is_token).sum().item()
                loss = session.update(total, 1.0)
            entry = session.entry(loss, tokens=seen.tokens) | seen.facts | {"beta": beta}
            entry["clipped"], entry["value_loss"] = (number / seen.tokens for number in ranks.total(told))
            if config.target_kl:
                beta = session.kept["beta"] = objectives.adapted_beta(beta, entry["kl"], config.target_kl, sampler.answers)
            speed = f"reward {entry['reward']:+.3f}  KL {entry['kl']:.3f}  {seen.tokens / entry['seconds']:,.0f} tokens/s"
            sampler.finish(session, entry, speed)
    return Path(config.out_dir)
