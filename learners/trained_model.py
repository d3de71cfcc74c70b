"""One model in its DeepSpeed engine: its numbers for a rank's share of the data, and one optimizer step on them."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from async_rlhf.batching import Microbatch, Unit, collate, empty_microbatch, split_units
from async_rlhf.config.schema import LearnerConfig
from async_rlhf.errors import RunError
from async_rlhf.losses.base import LossOutput, Mean, Peak
from learners import engine_state
from learners.checkpoint import SavedModel
from learners.collective import combine, max_over_ranks, reduce_metrics, sum_over_ranks
from learners.engine import Engine, clip_gradients
from learners.stopwatch import Stopwatch

Output = tuple[Tensor, ...]
"""What the model says of a microbatch: first [N, T], one number per completion token."""


class TrainedModel:
    """A policy or a critic. Every method is called on all ranks at once."""

    def __init__(
        self, engine: Engine, forward: Callable[[Microbatch], Output], settings: LearnerConfig, rate_key: str, stopwatch: Stopwatch
    ) -> None:
        """
        Args:
            engine: of make_engine. forward: the engine's, on a microbatch on its device.
            rate_key: the setting that holds its learning rate, for error messages.
            stopwatch: gets a lap for each part of a step.
        """
        self._stopwatch = stopwatch
        self.engine = engine
        self.device = torch.device(engine.device)
        self._forward = forward
        self._settings = settings
        self._rate_key = rate_key
        self._num_steps = 0

    @property
    def num_steps(self) -> int:
        """Optimizer steps behind it."""
        return self._num_steps

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See engine_state.shapes_of."""
        return engine_state.shapes_of(self.engine)

    @torch.no_grad()
    def rows(self, units: Sequence[Unit]) -> list[list[np.ndarray]]:
        """Per unit and sequence: [T] float32, what the model says of each completion token now."""
        results: dict[int, list[np.ndarray]] = {}
        for share in self._shares(units):
            values = iter(self._forward(self._collate(units, share))[0].cpu().numpy())
            for index in share:
                results[index] = [next(values)[: len(sequence.completion_ids)] for sequence in units[index]]
        return [results[index] for index in range(len(units))]

    def step(self, units: Sequence[Unit], loss: Callable[[Output, Microbatch], LossOutput]) -> dict[str, float]:
        """One optimizer step on this rank's share of a minibatch.

        Args:
            loss: a microbatch's share of the global loss.
        Returns:
            Global metrics: those of `loss`, and loss, grad_norm and learning_rate.
        Raises:
            RunError: the loss or the gradient is not finite.
        """
        learning_rate = float(self.engine.get_lr()[0])
        parts: dict[str, Mean | Peak] = {}
        loss_sum, grad_norm = 0.0, None
        shares = self._shares(units)
        for index, share in enumerate(shares):
            last = index == len(shares) - 1
            self.engine.set_gradient_accumulation_boundary(last)
            microbatch = self._collate(units, share)
            output = self._forward(microbatch)
            of_share = loss(output, microbatch) if share else LossOutput(output[0].sum() * 0.0, {})
            loss_sum += float(of_share.loss.detach())
            # DeepSpeed averages gradients over ranks; ours are shares of one global loss, to be summed.
            self.engine.backward(of_share.loss * dist.get_world_size())
            if last:
                self._stopwatch.lap("train/forward_backward_s")
            grad_norm = clip_gradients(self.engine, self._settings.max_grad_norm) if last else None
            self.engine.step()
            parts |= {key: combine(parts.get(key), part) for key, part in of_share.metrics.items()}
        self._stopwatch.lap("train/optimizer_s")
        self._num_steps += 1
        metrics = reduce_metrics(parts, self.device)
        metrics["loss"] = float(sum_over_ranks(torch.tensor([loss_sum], dtype=torch.float64), self.device)[0])
        metrics["grad_norm"] = float(self.engine.get_global_grad_norm() or 0.0) if grad_norm is None else grad_norm
        metrics["learning_rate"] = learning_rate
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            raise RunError(
                f"optimizer step {self._num_steps}: the loss is {metrics['loss']} and the gradient norm {metrics['grad_norm']}; the "
                f"model is lost: lower {self._rate_key}, or raise learner.warmup_steps"
            )
        return metrics

    def capture(self) -> dict[str, Tensor]:
        """This rank's share of the state; see engine_state.capture."""
        return engine_state.capture(self.engine, self._num_steps)

    def restore(self, saved: SavedModel) -> None:
        """Go on where the saved model stood, exactly."""
        engine_state.restore(self.engine, saved.read, saved.num_steps, self._idle_step)
        self._num_steps = saved.num_steps

    def _idle_step(self) -> None:
        """An optimizer step whose gradients are zero."""
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.backward(self._forward(self._collate((), ()))[0].sum() * 0.0)
        self.engine.step()

    def _shares(self, units: Sequence[Unit]) -> list[list[int]]:
        """Indices of the units of each forward; as many forwards on every rank, the last ones of nothing.

        Under ZeRO-3 every forward gathers parameters from all ranks, so each rank must run as many of them.
        """
        shares = split_units(units, self._settings.max_tokens_per_microbatch, self._settings.batching)
        num_forwards = max(1, int(max_over_ranks(torch.tensor([len(shares)]), self.device)[0]))
        return shares + [[]] * (num_forwards - len(shares))

    def _collate(self, units: Sequence[Unit], share: Sequence[int]) -> Microbatch:
        batching = self._settings.batching
        return (collate([units[index] for index in share], batching) if share else empty_microbatch(batching)).to(self.device)
