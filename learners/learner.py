"""One learner rank: a DeepSpeed engine, the update, the snapshot and the export. Every method is called on all ranks at once."""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from async_rlhf.batching import Microbatch, Unit, collate, empty_microbatch, split_units, with_proximal
from async_rlhf.config import Config
from async_rlhf.errors import RunError
from async_rlhf.losses.base import Mean, kl_metrics, mean_of
from async_rlhf.metrics import derive, over_steps
from async_rlhf.policy import score_microbatch
from async_rlhf.snapshot import choose_canary, score_canary
from async_rlhf.types import ScoredGroup, StepReport, WeightsVersion
from learners.engine import make_engine, own_grad_norm, policy_of
from learners.objective import Totals, make_objective
from learners.weights import full_state_dict, snapshot


class Learner:
    """Trains the policy on shards of batches. The process group must exist."""

    def __init__(self, config: Config, model_folder: Path) -> None:
        """Load the policy of `model_folder` into a DeepSpeed engine."""
        self._config = config
        self._folder = model_folder
        self._objective = make_objective(config)
        self._engine = make_engine(config, model_folder)
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._device = torch.device(self._engine.device)
        self._optimizer_steps = 0
        self._canary_ids = choose_canary(int(policy_of(self._engine).config.vocab_size))

    def train_step(self, update: int, minibatches: Sequence[Sequence[ScoredGroup]]) -> StepReport:
        """Update `update`: every epoch and minibatch of this rank's shard.

        Args:
            minibatches: this rank's groups of each minibatch; as many minibatches on every rank.
        Returns:
            The report of version update + 1; its metrics are global and equal on all ranks.
        """
        started = time.perf_counter()
        units = [[unit for unit in map(self._objective.select, groups) if unit] for groups in minibatches]
        num_groups = [len(groups) for groups in minibatches]
        if self._config.algorithm.epochs_per_batch * len(minibatches) > 1:
            units = [self._add_proximal(of_minibatch) for of_minibatch in units]
        steps: list[dict[str, float]] = []
        num_tokens = 0.0
        for _ in range(self._config.algorithm.epochs_per_batch):
            for of_minibatch, count in zip(units, num_groups, strict=True):
                metrics, tokens = self._optimize(of_minibatch, count)
                steps.append(metrics)
                num_tokens += tokens
        return StepReport(
            version=update + 1,
            optimizer_steps=self._optimizer_steps,
            num_tokens=int(num_tokens),
            train_s=time.perf_counter() - started,
            metrics=derive(over_steps(steps)),
        )

    def snapshot(self, version: int) -> WeightsVersion | None:
        """An immutable copy of the policy, with canary, in the generators' dtype; None on ranks other than 0."""
        logprobs = score_canary(self._engine, self._canary_ids, self._device)
        return snapshot(
            policy_of(self._engine),
            version=version,
            dtype=self._config.generator.dtype,
            keep=self._rank == 0,
            canary_ids=self._canary_ids,
            canary_logprobs=logprobs,
        )

    def save_pretrained(self, folder: Path) -> None:
        """Write the policy as an ordinary Hugging Face folder: weights, tokenizer, generation config."""
        weights = full_state_dict(policy_of(self._engine), keep=self._rank == 0)
        if self._rank != 0:
            return
        model = policy_of(self._engine)
        model.generation_config = GenerationConfig.from_model_config(model.config)
        model.generation_config.update(do_sample=True, temperature=self._config.generator.temperature)
        model.save_pretrained(folder, state_dict=weights)
        AutoTokenizer.from_pretrained(self._folder).save_pretrained(folder)

    def _optimize(self, units: Sequence[Unit], num_groups: int) -> tuple[dict[str, float], float]:
        """One optimizer step over this rank's share of a minibatch; returns global metrics and the global token count."""
        sequences = [sequence for unit in units for sequence in unit]
        local = [num_groups, len(sequences), sum(len(s.completion_ids) for s in sequences), sum(s.num_tokens for s in sequences)]
        groups, completions, completion_tokens, tokens = self._sum_over_ranks(torch.tensor(local, dtype=torch.float64)).tolist()
        totals = Totals(groups=groups, sequences=max(1.0, completions), tokens=max(1.0, completion_tokens))
        shares = [collate(share) for share in split_units(units, self._config.learner.max_tokens_per_microbatch)]
        # Under ZeRO-3 every forward gathers parameters from all ranks: each rank must run as many of them.
        num_forwards = max(1, int(self._max_over_ranks(len(shares))))
        learning_rate = float(self._engine.get_lr()[0])
        sums: dict[str, Mean] = {}
        loss_sum, grad_norm = 0.0, None
        for index in range(num_forwards):
            microbatch = shares[index] if index < len(shares) else None
            self._engine.set_gradient_accumulation_boundary(index == num_forwards - 1)
            loss, metrics = self._forward(microbatch, totals)
            loss_sum += float(loss.detach())
            # DeepSpeed averages gradients over ranks; ours are shares of one global loss, to be summed.
            self._engine.backward(loss * self._world_size)
            grad_norm = own_grad_norm(self._engine) if index == num_forwards - 1 else None
            self._engine.step()
            for key, part in metrics.items():
                known = sums.get(key)
                sums[key] = part if known is None else Mean(known.total + part.total, known.weight + part.weight)
        self._optimizer_steps += 1
        means = self._reduce(sums)
        means["train/loss"] = float(self._sum_over_ranks(torch.tensor([loss_sum], dtype=torch.float64))[0])
        means["train/grad_norm"] = float(self._engine.get_global_grad_norm() or 0.0) if grad_norm is None else grad_norm
        means["train/learning_rate"] = learning_rate
        if not (math.isfinite(means["train/loss"]) and math.isfinite(means["train/grad_norm"])):
            raise RunError(
                f"optimizer step {self._optimizer_steps}: the loss is {means['train/loss']} and the gradient norm "
                f"{means['train/grad_norm']}; the policy is lost: lower learner.learning_rate, or raise learner.warmup_steps"
            )
        return means, tokens

    def _forward(self, microbatch: Microbatch | None, totals: Totals) -> tuple[Tensor, dict[str, Mean]]:
        if microbatch is None:
            logprobs, _ = score_microbatch(self._engine, empty_microbatch(), 1.0, self._device)
            return logprobs.sum() * 0.0, {}
        microbatch = microbatch.to(self._device)
        logprobs, entropy = score_microbatch(self._engine, microbatch, self._config.generator.temperature, self._device)
        output = self._objective.loss(logprobs, microbatch, totals)
        mask = microbatch.loss_mask
        proximal = logprobs.detach() if microbatch.proximal_logprobs is None else microbatch.proximal_logprobs
        watched = {
            "policy/entropy_nats": mean_of(entropy, mask),
            **kl_metrics("policy/kl", logprobs, microbatch.reference_logprobs, mask),
            **kl_metrics("mismatch/kl", microbatch.behavior_logprobs, proximal, mask),
        }
        return output.loss, {**output.metrics, **watched}

    @torch.no_grad()
    def _add_proximal(self, units: Sequence[Unit]) -> list[Unit]:
        """Score a minibatch before its first optimizer step: `proximal` when the batch takes several."""
        shares = split_units(units, self._config.learner.max_tokens_per_microbatch)
        scored: list[Unit] = []
        for index in range(max(1, int(self._max_over_ranks(len(shares))))):
            microbatch = collate(shares[index]) if index < len(shares) else empty_microbatch()
            logprobs, _ = score_microbatch(self._engine, microbatch, self._config.generator.temperature, self._device)
            rows = iter(logprobs.cpu().numpy())
            for unit in shares[index] if index < len(shares) else ():
                scored.append(with_proximal(unit, [next(rows)[: len(s.completion_ids)] for s in unit]))
        return scored

    def _reduce(self, sums: dict[str, Mean]) -> dict[str, float]:
        """Global means. A rank without data has no keys of its own and still takes part."""
        keys = self._all_keys(sorted(sums))
        pairs = [(float(sums[key].total), float(sums[key].weight)) if key in sums else (0.0, 0.0) for key in keys]
        totals = self._sum_over_ranks(torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2))
        return {key: float(total / weight) if weight else 0.0 for key, (total, weight) in zip(keys, totals.tolist(), strict=True)}

    def _all_keys(self, keys: list[str]) -> list[str]:
        if self._world_size == 1:
            return keys
        gathered: list[list[str]] = [[] for _ in range(self._world_size)]
        dist.all_gather_object(gathered, keys)
        return sorted({key for of_rank in gathered for key in of_rank})

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        values = values.to(self._device)
        dist.all_reduce(values)
        return values.cpu()

    def _max_over_ranks(self, value: int) -> int:
        tensor = torch.tensor([value], device=self._device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor[0])
