"""What completions are worth: functions, reward models, HTTP services and judges, alone or as a weighted sum.

open_reward(config) -> Reward -- rate(prompts, completions) --> Rating(scores [N], parts)
compare(judge, prompts, first, second) -> [N] who is better
"""

from async_rlhf.rewards.base import Rating, Reward
from async_rlhf.rewards.checks import check_rewards
from async_rlhf.rewards.functions import RewardFunction, absolute_reward, call_reward, load_reward
from async_rlhf.rewards.judge import compare
from async_rlhf.rewards.sums import absolute_rewards, open_metric, open_reward

__all__ = [
    "Rating",
    "Reward",
    "RewardFunction",
    "absolute_reward",
    "absolute_rewards",
    "call_reward",
    "check_rewards",
    "compare",
    "load_reward",
    "open_metric",
    "open_reward",
]
