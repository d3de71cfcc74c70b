"""Measuring a model's greedy accuracy on held-out problems, and moving its weights to a wanted accuracy.

Private to `sft`. Imports torch only where weights are mixed.
"""

# pyright: reportUnknownMemberType=false
# (transformers and torch type their methods partially.)

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from async_rlhf.rewards import call_reward, load_reward
from async_rlhf.tasks.base import ExactTask, Problem, Task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

GENERATE_BATCH = 500
"""Problems answered at once."""
LANDING_TOLERANCE = 0.02
"""Distance from the target accuracy that is good enough: the standard error of 500 problems at accuracy 0.4."""
LANDING_LOOKS = 8
"""Halvings of the line between two looks, at most."""


class Exam:
    """Asks a model the task's held-out problems, greedily."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", task: Task, max_problems: int | None = None) -> None:
        """
        Args:
            max_problems: the first so many held-out problems; None: all.
        """
        self.exact = isinstance(task, ExactTask)
        """Answers are right or wrong."""
        self._tokenizer = tokenizer
        self._problems = task.held_out()[:max_problems]
        self._max_new_tokens = task.max_answer_tokens + 1
        self._metric = load_reward(task.reward)

    def accuracy(self, model: "PreTrainedModel") -> float:
        """Mean score of the greedy completions by the task's own metric; the share of right answers where that is 0 or 1."""
        total = sum(
            self._total_score(model, self._problems[start : start + GENERATE_BATCH])
            for start in range(0, len(self._problems), GENERATE_BATCH)
        )
        return total / len(self._problems)

    def _total_score(self, model: Any, problems: Sequence[Problem]) -> float:
        asked = self._tokenizer([problem.text for problem in problems], padding=True, return_tensors="pt")
        training = model.training
        model.eval()
        answered = model.generate(**asked, do_sample=False, max_new_tokens=self._max_new_tokens)
        model.train(training)
        texts = self._tokenizer.batch_decode(answered[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        scores = call_reward(self._metric, [problem.text for problem in problems], texts, [problem.columns for problem in problems])
        return float(scores.sum())


def land(model: "PreTrainedModel", exam: Exam, below: "Mapping[str, Tensor]", *, target: float) -> float:
    """Bisect the straight line from `below` (accuracy under the target) to the model's weights (over it).

    Returns:
        The accuracy of the weights that the model then has: the nearest to the target among those tried.
    """
    import torch

    above = copy_weights(model)
    low, high = 0.0, 1.0
    best_error, best_share, best_accuracy = float("inf"), 1.0, 1.0

    def move_to(share: float) -> None:
        model.load_state_dict({name: torch.lerp(below[name], above[name], share) for name in above})

    for _ in range(LANDING_LOOKS):
        share = (low + high) / 2
        move_to(share)
        accuracy = exam.accuracy(model)
        if abs(accuracy - target) < best_error:
            best_error, best_share, best_accuracy = abs(accuracy - target), share, accuracy
        if best_error <= LANDING_TOLERANCE:
            break
        low, high = (share, high) if accuracy < target else (low, share)
    move_to(best_share)
    return best_accuracy


def copy_weights(model: "PreTrainedModel") -> "dict[str, Tensor]":
    """A copy of the state dict that later optimizer steps do not change."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
