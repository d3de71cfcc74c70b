"""The table of algorithms: `algorithm.name` -> what it is to the learner."""

from async_rlhf.config import Config
from learners.bok import BoK
from learners.dpo import DPO
from learners.grpo import GRPO
from learners.listwise import Listwise
from learners.objective import Objective
from learners.ppo import PPO
from learners.rloo import RLOO

ALGORITHMS: dict[str, type[Objective]] = {
    "dpo": DPO,
    "ppo": PPO,
    "rloo": RLOO,
    "grpo": GRPO,
    "bok": BoK,
    "listwise": Listwise,
}


def make_objective(config: Config) -> Objective:
    """The objective that `algorithm.name` asks for."""
    return ALGORITHMS[config.algorithm.name](config)
