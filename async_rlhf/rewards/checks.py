"""Everything about the rewards that can be known before a run begins."""

from pathlib import Path

from async_rlhf.config.rewards import RewardConfig
from async_rlhf.rewards.functions import load_reward
from async_rlhf.rewards.http import check_http
from async_rlhf.rewards.judge import check_judge
from async_rlhf.rewards.model import check_reward_model


def check_rewards(config: RewardConfig, default: str) -> None:
    """Import the functions, look into the folders, and ask the services whether they are there.

    Args:
        default: import path of the function where the config names none.
    Raises:
        ConfigError: a part cannot work; names it, and says what to do.
    """
    if not config.parts:
        load_reward(config.function or default)
    for name, part in config.parts.items():
        key = f"reward.parts.{name}"
        match part.kind:
            case "function":
                load_reward(part.function or default)
            case "model":
                check_reward_model(f"{key}.path", Path(part.path))
            case "http":
                check_http(key, part)
            case "judge":
                check_judge(f"{key}.judge", part.judge)
