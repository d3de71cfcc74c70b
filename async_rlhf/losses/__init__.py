"""The losses: one small file each, pure functions of tensors and floats."""

from async_rlhf.losses.base import LossOutput, Mean
from async_rlhf.losses.dpo import dpo_loss
from async_rlhf.losses.rloo import rloo_advantages, rloo_loss

__all__ = ["LossOutput", "Mean", "dpo_loss", "rloo_advantages", "rloo_loss"]
