"""One learner rank: policy, critic where there is one, the update, the snapshot and the export. Called on all ranks at once."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist

from async_rlhf.adapters import add_adapters, published
from async_rlhf.batching import Microbatch, Unit, with_proximal
from async_rlhf.config import Config
from async_rlhf.export import save_policy
from async_rlhf.files import whole_folder
from async_rlhf.losses.base import LossOutput, Mean, Peak, kl_metrics, mean_of
from async_rlhf.losses.correction import mismatch_metrics
from async_rlhf.metrics import derive, over_steps
from async_rlhf.policy import make_scorer, score_microbatch
from async_rlhf.snapshot import choose_canary, score_canary
from async_rlhf.types import ScoredGroup, StepReport, WeightsManifest, WeightsVersion
from learners.algorithms import make_objective
from learners.checkpoint import FACTS_NAME, FORMAT, CheckpointWriter, Content, FileFacts, LearnerFacts, SavedLearner, file_names
from learners.collective import sum_over_ranks
from learners.critic import Critic
from learners.engine import DTYPES, make_engine, model_of
from learners.flops import device_name, peak_flops, size_of, training_flops
from learners.objective import Totals
from learners.random_state import random_state, set_random_state
from learners.sending import HeldVersion
from learners.stopwatch import Stopwatch
from learners.trained_model import Output, TrainedModel
from learners.weights import full_state_dict, held_version, snapshot


class Learner:
    """Trains the policy on shards of batches. The process group must exist."""

    def __init__(self, config: Config, model_folder: Path) -> None:
        """Load the policy of `model_folder`, and the critic where the algorithm has one, into DeepSpeed engines."""
        self._config = config
        self._folder = model_folder
        self._objective = make_objective(config)
        settings = config.learner
        scorer = make_scorer(model_folder, DTYPES[settings.precision], settings.batching, config.generator.max_model_len)
        add_adapters(scorer.model, settings.lora, config.seed)
        engine = make_engine(scorer, settings, settings.learning_rate, config.optimizer_steps)
        self._stopwatch = Stopwatch()
        self._size = size_of(model_of(engine))
        self._policy = TrainedModel(engine, self._score, settings, "learner.learning_rate", self._stopwatch)
        critic = self._objective.critic
        self._critic = None if critic is None else Critic(config, model_folder, critic, self._stopwatch)
        self._models = {"policy": self._policy} if self._critic is None else {"policy": self._policy, "critic": self._critic.model}
        self._optimizer_steps = 0
        self._writer = CheckpointWriter()
        self._canary_ids = choose_canary(int(scorer.model.config.vocab_size))

    def train_step(self, update: int, minibatches: Sequence[Sequence[ScoredGroup]]) -> StepReport:
        """Update `update`: every epoch and minibatch of this rank's shard.

        Args:
            minibatches: this rank's groups of each minibatch; as many minibatches on every rank.
        Returns:
            The report of version update + 1; its metrics are global and equal on all ranks.
        """
        started = time.perf_counter()
        self._stopwatch.start()
        units = [[unit for unit in map(self._objective.select, groups) if unit] for groups in minibatches]
        counts = [self._count(of_minibatch, len(groups)) for of_minibatch, groups in zip(units, minibatches, strict=True)]
        epochs = self._config.algorithm.epochs_per_batch
        num_sequences = epochs * sum(totals.sequences for totals, _ in counts)
        units, steps = self._prepare(units)
        self._stopwatch.lap("train/prepare_s")
        num_tokens = 0.0
        for _ in range(epochs):
            for of_minibatch, (totals, tokens) in zip(units, counts, strict=True):
                steps.append(self._optimize(of_minibatch, totals))
                num_tokens += tokens
        return StepReport(
            version=update + 1,
            optimizer_steps=self._optimizer_steps,
            num_tokens=int(num_tokens),
            train_s=(train_s := time.perf_counter() - started),
            metrics={**derive(over_steps(steps)), **self._utilisation(num_tokens, num_sequences, train_s)},
            parts_s=self._stopwatch.laps,
        )

    def snapshot(self, version: int, *, lent: bool = False) -> Iterator[WeightsVersion]:
        """What the generators get, with canary, in their dtype, bucket by bucket: copied, unless lent; no bucket on ranks other than 0.

        Args:
            lent: whoever takes a bucket copies it at once; see make_buckets.
        """
        started, parts = time.perf_counter(), published(model_of(self._policy.engine), self._config.learner.lora)
        empty, dtype = self._empty_manifest(version), self._config.generator.dtype
        for bucket in snapshot(parts, empty, dtype=dtype, keep=dist.get_rank() == 0, lent=lent):
            yield replace(bucket, gather_s=time.perf_counter() - started)
            started = time.perf_counter()

    def hold(self, version: int, device: torch.device) -> HeldVersion | None:
        """The same as tensors on one device, all at once; None on ranks other than 0."""
        parts, dtype = published(model_of(self._policy.engine), self._config.learner.lora), self._config.generator.dtype
        return held_version(parts, self._empty_manifest(version), dtype=dtype, device=device, keep=dist.get_rank() == 0)

    def save_pretrained(self, folder: Path) -> None:
        """Write the policy, adapters merged, and the critic to `<folder>-critic`, as ordinary Hugging Face folders."""
        model = model_of(self._policy.engine)
        weights = full_state_dict(model, keep=dist.get_rank() == 0)
        if dist.get_rank() == 0:
            with whole_folder(folder, replace=True) as made:
                save_policy(model, weights, made, start=self._folder, temperature=self._config.generator.temperature)
        if self._critic is not None:
            self._critic.save_pretrained(folder.with_name(f"{folder.name}-critic"))

    def save(self, folder: Path, version: int) -> None:
        """Copy the whole state to the CPU, each rank its share, and begin to write it; `saved` waits for the files.

        Training may go on at once: the files hold the state as it is now. Waits first for what is still being written.

        Args:
            version: completed updates in the weights.
        """
        self._writer.settle()
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        names = file_names(num_ranks, rank, self._models)
        files: dict[str, Content] = {names["rank"]: random_state()}
        files |= {names[name]: model.capture() for name, model in self._models.items()}
        if rank == 0:
            facts = LearnerFacts(
                format=FORMAT,
                version=version,
                num_ranks=num_ranks,
                zero_stage=self._config.learner.zero_stage,
                precision=self._config.learner.precision,
                optimizer_steps=self._optimizer_steps,
                lora=self._config.learner.lora.identity,
                model_steps={name: model.num_steps for name, model in self._models.items()},
            )
            files[FACTS_NAME] = asdict(facts)
        self._writer.start(folder, files)

    def saved(self) -> dict[str, FileFacts]:
        """Wait for the files of `save`: those of this rank, name relative to the folder -> (size in bytes, CRC-32).

        Raises:
            RunError: a file could not be written; the learner itself is as it was, and may save again.
        """
        return self._writer.finish()

    def load(self, folder: Path) -> int:
        """Go on exactly where the learner stood that wrote `folder`, whatever its number of ranks and ZeRO stage.

        Returns:
            The version: completed updates in the weights.
        Raises:
            ConfigError: the checkpoint is incomplete, damaged, or of another model or algorithm. Nothing was changed.
        """
        saved = SavedLearner(folder)
        saved.check_models(self._models, self._config.learner.lora)
        opened = {name: saved.model(name, model.shapes) for name, model in self._models.items()}
        randomness = saved.random_state(dist.get_rank())
        for name, model in self._models.items():
            model.restore(opened[name])
        self._optimizer_steps = saved.facts.optimizer_steps
        set_random_state(randomness)
        return saved.facts.version

    def _utilisation(self, num_tokens: float, num_sequences: float, train_s: float) -> dict[str, float]:
        """Of this rank's GPU, whose share of the tokens is an equal one; nothing where the peak is not known."""
        peak = peak_flops(device_name(), self._config.learner.peak_tflops)
        if peak is None:
            return {}
        flops = training_flops(self._size, num_tokens, num_sequences) / dist.get_world_size()
        return {"train/mfu_share": flops / (train_s * peak)}

    def _prepare(self, units: list[list[Unit]]) -> tuple[list[list[Unit]], list[dict[str, float]]]:
        """What is computed once, when the batch arrives: `proximal` where it will differ from the policy, the critic's advantages."""
        num_steps = self._config.algorithm.epochs_per_batch * len(units)
        if num_steps == 1 and self._critic is None:
            return units, []
        flat = [unit for of_minibatch in units for unit in of_minibatch]
        flat = [with_proximal(unit, rows) for unit, rows in zip(flat, self._policy.rows(flat), strict=True)]
        metrics: list[dict[str, float]] = []
        if self._critic is not None:
            flat, of_critic = self._critic.estimate(flat)
            metrics.append(of_critic)
        remaining = iter(flat)
        return [[next(remaining) for _ in of_minibatch] for of_minibatch in units], metrics

    def _optimize(self, units: Sequence[Unit], totals: Totals) -> dict[str, float]:
        """One optimizer step of the policy, and of the critic."""

        def loss(output: Output, microbatch: Microbatch) -> LossOutput:
            own = self._objective.loss(output[0], microbatch, totals)
            return LossOutput(own.loss, {**own.metrics, **_watched(output, microbatch)})

        metrics = self._policy.step(units, loss)
        for key in ("loss", "grad_norm", "learning_rate"):
            metrics[f"train/{key}"] = metrics.pop(key)
        if self._critic is not None:
            metrics |= self._critic.step(units, totals)
        self._optimizer_steps += 1
        return metrics

    def _empty_manifest(self, version: int) -> WeightsManifest:
        logprobs = score_canary(self._policy.engine, self._canary_ids, self._policy.device, self._config.learner.batching)
        return WeightsManifest(version=version, tensors=(), canary_ids=self._canary_ids, canary_logprobs=logprobs)

    def _count(self, units: Sequence[Unit], num_groups: int) -> tuple[Totals, float]:
        """The global minibatch's denominators, and its tokens, prompts included."""
        sequences = [sequence for unit in units for sequence in unit]
        own = [num_groups, len(sequences), sum(len(s.completion_ids) for s in sequences), sum(s.num_tokens for s in sequences)]
        groups, completions, completion_tokens, tokens = sum_over_ranks(
            torch.tensor(own, dtype=torch.float64), self._policy.device
        ).tolist()
        return Totals(groups=groups, sequences=max(1.0, completions), tokens=max(1.0, completion_tokens)), tokens

    def _score(self, microbatch: Microbatch) -> Output:
        return score_microbatch(self._policy.engine, microbatch, self._config.generator.temperature, self._policy.device)


def _watched(output: Output, microbatch: Microbatch) -> dict[str, Mean | Peak]:
    """What is logged whatever the algorithm: entropy, KL to the reference, and how far the data is from the policy."""
    logprobs, entropy = output
    mask = microbatch.loss_mask
    return {
        "policy/entropy_nats": mean_of(entropy, mask),
        **kl_metrics("policy/kl", logprobs, microbatch.reference_logprobs, mask),
        **mismatch_metrics(microbatch.proximal(logprobs), microbatch.behavior_logprobs, mask),
    }
