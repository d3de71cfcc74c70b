"""The losses: one small file each, pure functions of tensors and floats."""

from async_rlhf.losses.base import LossOutput, Mean, Peak
from async_rlhf.losses.bok import bok_loss
from async_rlhf.losses.dpo import dpo_loss
from async_rlhf.losses.grpo import grpo_advantages, grpo_loss
from async_rlhf.losses.listwise import listwise_loss
from async_rlhf.losses.ppo import generalized_advantages, ppo_loss, token_rewards, value_loss, whiten
from async_rlhf.losses.rloo import rloo_advantages, rloo_loss

__all__ = [
    "LossOutput",
    "Mean",
    "Peak",
    "bok_loss",
    "dpo_loss",
    "generalized_advantages",
    "grpo_advantages",
    "grpo_loss",
    "listwise_loss",
    "ppo_loss",
    "rloo_advantages",
    "rloo_loss",
    "token_rewards",
    "value_loss",
    "whiten",
]
