"""The critic: a network of its own, in its own DeepSpeed engine with its own learning rate."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from async_rlhf.batching import Unit
from async_rlhf.config import Config
from async_rlhf.export import save_tokenizer
from async_rlhf.files import whole_folder
from async_rlhf.policy import make_value_scorer
from learners.collective import sum_over_ranks
from learners.engine import DTYPES, make_engine, model_of
from learners.objective import Totals, ValueObjective
from learners.stopwatch import Stopwatch
from learners.trained_model import TrainedModel
from learners.weights import full_state_dict


class Critic:
    """Values of states, and what they are trained on. Every method is called on all ranks at once."""

    def __init__(self, config: Config, policy_folder: Path, objective: ValueObjective, stopwatch: Stopwatch) -> None:
        """Start from `algorithm.ppo.critic.path`, or from the policy with a value head of zeros."""
        own, settings = config.algorithm.ppo.critic, config.learner
        folder = Path(own.path) if own.path else policy_folder
        self._tokenizer_folder = policy_folder
        scorer = make_value_scorer(folder, DTYPES[settings.precision], settings.batching, config.generator.max_model_len)
        engine = make_engine(scorer, settings, own.learning_rate, config.optimizer_steps)
        self.model = TrainedModel(engine, engine, settings, "algorithm.ppo.critic.learning_rate", stopwatch)
        self._objective = objective

    def estimate(self, units: Sequence[Unit]) -> tuple[list[Unit], dict[str, float]]:
        """This rank's share of a batch with values, advantages and returns, and global metrics."""
        valued = [
            tuple(replace(sequence, values=row) for sequence, row in zip(unit, rows, strict=True))
            for unit, rows in zip(units, self.model.rows(units), strict=True)
        ]
        return self._objective.estimate(valued, lambda values: sum_over_ranks(values, self.model.device))

    def step(self, units: Sequence[Unit], totals: Totals) -> dict[str, float]:
        """One optimizer step; returns global metrics."""
        metrics = self.model.step(units, lambda output, microbatch: self._objective.loss(output[0], microbatch, totals))
        for key in ("loss", "grad_norm", "learning_rate"):
            metrics[f"value/{key}"] = metrics.pop(key)
        return metrics

    def save_pretrained(self, folder: Path) -> None:
        """Write a sequence-classification folder with the policy's tokenizer, which `algorithm.ppo.critic.path` loads again."""
        model = model_of(self.model.engine)
        weights = full_state_dict(model, keep=dist.get_rank() == 0)
        if dist.get_rank() == 0:
            with whole_folder(folder, replace=True) as made:
                model.save_pretrained(made, state_dict=weights)
                save_tokenizer(self._tokenizer_folder, made)
