"""PPO takes all K completions of each group, one by one, and trains a critic beside the policy."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from async_rlhf.batching import Microbatch, Unit, collate
from async_rlhf.config import Config
from async_rlhf.config.algorithms import PPOConfig
from async_rlhf.losses import LossOutput, generalized_advantages, ppo_loss, token_rewards, value_loss, whiten
from learners.objective import Objective, Totals


class PPO(Objective):
    """The critic's advantages were estimated when the batch arrived."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.critic = PPOCritic(config.algorithm.ppo)

    def loss(self, policy_logprobs: Tensor, microbatch: Microbatch, totals: Totals) -> LossOutput:
        """Sum over the microbatch's tokens / completion tokens of the global minibatch."""
        algorithm = self._config.algorithm
        assert microbatch.advantages is not None, "PPOCritic.estimate comes before the loss"
        return ppo_loss(
            policy_logprobs,
            microbatch.proximal(policy_logprobs),
            microbatch.behavior_logprobs,
            microbatch.loss_mask,
            microbatch.advantages,
            clip_range=algorithm.ppo.clip_range,
            correction=algorithm.correction_used,
            correction_cap=algorithm.correction_cap,
            denominator=totals.tokens,
        )


class PPOCritic:
    """See ValueObjective."""

    def __init__(self, settings: PPOConfig) -> None:
        self._settings = settings

    def estimate(self, units: Sequence[Unit], sum_over_ranks: Callable[[Tensor], Tensor]) -> tuple[list[Unit], dict[str, float]]:
        """GAE on rewards per token, whitened over the global batch."""
        moments = torch.zeros(7, dtype=torch.float64)
        found: Found = None
        if units:
            found = self._advantages(units)
            mask, advantages, returns, errors = found
            a, r, e = (values[mask].double() for values in (advantages, returns, errors))
            moments = torch.stack([column.sum() for column in (torch.ones_like(a), a, a**2, r, r**2, e, e**2)])
        total, *sums = sum_over_ranks(moments).tolist()
        means = [value / max(total, 1.0) for value in sums]
        mean, std = means[0], _std(means[0], means[1])
        metrics = {
            "value/advantage_std": std,
            "value/return_mean": means[2],
            "value/return_std": _std(means[2], means[3]),
            "value/explained_variance": _explained_variance(_std(means[2], means[3]), _std(means[4], means[5])),
        }
        if found is None:
            return [], metrics
        mask, advantages, returns, _ = found
        if self._settings.whiten_advantages:
            advantages = whiten(advantages, mask, mean=mean, std=std)
        rows = iter(zip(advantages.numpy(), returns.numpy(), strict=True))
        done: list[Unit] = []
        for unit in units:
            pairs = [(sequence, *next(rows)) for sequence in unit]
            done.append(tuple(replace(s, advantages=a[: len(s.completion_ids)], returns=r[: len(s.completion_ids)]) for s, a, r in pairs))
        return done, metrics

    def loss(self, values: Tensor, microbatch: Microbatch, totals: Totals) -> LossOutput:
        """vf_coef times the clipped squared error, summed / completion tokens of the global minibatch."""
        assert microbatch.values is not None and microbatch.returns is not None, "estimate comes before the loss"
        output = value_loss(
            values,
            microbatch.values,
            microbatch.returns,
            microbatch.loss_mask,
            clip_range=self._settings.value_clip_range,
            denominator=totals.tokens,
        )
        return replace(output, loss=self._settings.vf_coef * output.loss)

    def _advantages(self, units: Sequence[Unit]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[N, T] mask, advantages, returns, and what the critic's values missed of the returns."""
        rows = collate(units, "padded")
        assert rows.proximal_logprobs is not None and rows.values is not None, "proximal and values come before the advantages"
        rewards = token_rewards(
            rows.scores, rows.proximal_logprobs, rows.reference_logprobs, rows.loss_mask, kl_coef=self._settings.kl_coef
        )
        advantages, returns = generalized_advantages(
            rewards, rows.values, rows.loss_mask, gamma=self._settings.gamma, gae_lambda=self._settings.gae_lambda
        )
        return rows.loss_mask, advantages, returns, returns - rows.values


Found = tuple[Tensor, Tensor, Tensor, Tensor] | None


def _std(mean: float, mean_square: float) -> float:
    """0 where the variance is no more than the rounding of float32 values."""
    variance = mean_square - mean**2
    return variance**0.5 if variance > 1e-12 * mean_square else 0.0


def _explained_variance(of_returns: float, of_errors: float) -> float:
    """1 - Var(return - value) / Var(return), from the standard deviations; 0 where all returns are equal."""
    return 1 - (of_errors / of_returns) ** 2 if of_returns else 0.0
