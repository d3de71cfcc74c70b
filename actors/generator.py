"""The generator: takes tickets, samples K completions for each, hands the groups on as they finish."""

import math
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from actors.canary import canary_error, check_manifest, check_tensors, perturbed, shapes_of_versions, tolerance_of
from actors.engine_loop import EngineLoop, EngineUsage
from async_rlhf import traffic
from async_rlhf.config import Config
from async_rlhf.errors import EngineError, WeightsError
from async_rlhf.protocols import Engine, SampleRequest
from async_rlhf.types import InstallReport, Prompt, Rollout, RolloutGroup, Ticket, WeightsManifest, WeightsVersion

Load = Callable[[bool], None]
"""Puts a version into the engine; given True, visibly disturbed."""

ROUNDS_OF_PROOF = 3
"""How often the first version is loaded: to measure the engine's own error, disturbed, and for good."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Collected:
    """What one collect() brought, without the groups themselves."""

    tickets: tuple[Ticket, ...]
    num_inflight: int
    """Groups still being sampled."""
    usage: EngineUsage


class Generator:
    """Hosts one engine. Thread-safe: collect() may wait while submit() and install() come in."""

    def __init__(self, config: Config, model_folder: str, incarnation: str) -> None:
        """Start the engine. It samples nothing sensible until the first install().

        Args:
            incarnation: this process's name in leases; a restarted generator has a new one.
        """
        self._config = config
        self._incarnation = incarnation
        self._expected_shapes = shapes_of_versions(Path(model_folder), config.learner.lora)
        self._tolerance: float | None = None
        self._inflight: dict[str, Ticket] = {}
        self._answers: dict[str, tuple[Rollout, ...] | None] = {}
        self._groups: list[RolloutGroup] = []
        self._first_finished_s = 0.0
        self._changed = threading.Condition()
        self._num_evaluations = 0
        self._loop = EngineLoop(make_engine(config, Path(model_folder)), self._on_finished, _clock(config))

    def submit(self, tickets: Sequence[Ticket], wait_s: float = 0.0) -> int:
        """Start sampling; all of them join the batch before its next step. With the answer the next may be asked for: one call, not two.

        Returns:
            Groups that it may have more, as soon as there are any (traffic.room); 0 after `wait_s`.
        Raises:
            EngineError: the engine failed.
        """
        requests = [
            SampleRequest(
                request_id=f"{ticket.ticket_id}.{ticket.attempt}",
                prompt_ids=ticket.prompt.token_ids,
                num_samples=self._config.completions_per_prompt,
                seed=ticket.seed,
                temperature=self._config.generator.temperature,
            )
            for ticket in tickets
        ]
        with self._changed:
            self._inflight.update({request.request_id: ticket for request, ticket in zip(requests, tickets, strict=True)})
        if requests:
            self._loop.call(lambda engine: [engine.add(request) for request in requests])
        return self._room(wait_s)

    def collect(self, gather_s: float, wait_s: float) -> tuple[Collected, list[RolloutGroup]]:
        """Finished groups in ticket order, as soon as none is left in flight, or `gather_s` after the first of them finished.

        Returns nothing after `wait_s`.
        Raises:
            EngineError: the engine failed.
        """
        ends = time.monotonic() + wait_s
        with self._changed:
            while (rest_s := min(self._gathered_in(gather_s), ends - time.monotonic())) > 0:
                self._check()
                # Short waits: the engine's thread may die without anybody to notify.
                self._changed.wait(min(rest_s, 1.0))
            groups: list[RolloutGroup] = []
            if self._gathered_in(gather_s) <= 0:
                groups, self._groups = sorted(self._groups, key=lambda group: group.ticket.ticket_id), []
            else:
                self._check()
            num_inflight = len(self._inflight)
        tickets = tuple(group.ticket for group in groups)
        return Collected(tickets=tickets, num_inflight=num_inflight, usage=self._loop.usage), groups

    def install(self, *buckets: WeightsVersion) -> InstallReport:
        """Replace the weights between two tokens, and verify them; see `weights.on_update` for what running requests do.

        Args:
            buckets: of one version, in order.
        Raises:
            WeightsError: wrong tensors, damaged bytes, or a canary that does not sing. The engine must not be used again.
        """
        started = time.perf_counter()
        weights = WeightsVersion.of(buckets)
        if self._config.weights.verify:
            check_manifest(weights.manifest, self._expected_shapes)
            check_tensors(weights)
        drain = self._config.weights.on_update == "drain"
        report = self._loop.call(
            lambda engine: self._load(engine, weights.manifest, lambda noise: engine.load(perturbed(weights) if noise else weights)),
            when_idle=drain,
        ).result()
        return replace(report, install_s=time.perf_counter() - started)

    def evaluate(self, prompts: Sequence[Prompt], temperature: float) -> list[Rollout]:
        """One completion of each prompt (temperature 0: greedy), sampled in the same engine as everything else; may be called by several.

        Raises:
            EngineError: the engine failed.
        """
        with self._changed:
            self._num_evaluations += 1
            names = [f"evaluation-{self._num_evaluations}-{index}" for index in range(len(prompts))]
            self._answers.update(dict.fromkeys(names))
        requests = [
            SampleRequest(request_id=name, prompt_ids=prompt.token_ids, num_samples=1, seed=_seed_of(prompt), temperature=temperature)
            for name, prompt in zip(names, prompts, strict=True)
        ]
        self._loop.call(lambda engine: [engine.add(request) for request in requests])
        with self._changed:
            while any(self._answers[name] is None for name in names):
                self._check()
                self._changed.wait(1.0)
            answers = [self._answers.pop(name) for name in names]
        return [completions[0] for completions in answers if completions is not None]

    def usage(self) -> EngineUsage:
        """The engine's counters; also a sign of life."""
        self._check()
        return self._loop.usage

    def close(self) -> None:
        """End the engine's thread and free its memory."""
        self._loop.close()

    def _room(self, wait_s: float) -> int:
        self._check()
        waiting = self._loop.when(self._room_in)
        try:
            return waiting.result(wait_s)
        except TimeoutError:
            waiting.cancel()
            return 0

    def _room_in(self, engine: Engine) -> int | None:
        occupancy = engine.occupancy
        return traffic.room(self._config, occupancy.num_running + occupancy.num_waiting) or None

    def _load(self, engine: Engine, manifest: WeightsManifest, load: Load) -> InstallReport:
        """On the loop's thread; install_s, which began before, is left at 0."""
        if self._config.weights.verify and self._tolerance is None:
            self._tolerance = self._prove_canary(engine, manifest, load)
        started = time.perf_counter()
        load(False)
        pause_s = time.perf_counter() - started
        if not self._config.weights.verify:
            return InstallReport(version=manifest.version, install_s=0.0, pause_s=pause_s, canary_error=0.0, canary_s=0.0)
        error = canary_error(manifest, engine.score(manifest.canary_ids))
        assert self._tolerance is not None
        if not error <= self._tolerance:
            raise WeightsError(
                f"{self._incarnation}: after installing version {manifest.version} the canary's log-probabilities differ "
                f"from the learner's by {error:.3g} nats, allowed {self._tolerance:.3g}; the engine samples from other weights"
            )
        canary_s = time.perf_counter() - started - pause_s
        return InstallReport(version=manifest.version, install_s=0.0, pause_s=pause_s, canary_error=error, canary_s=canary_s)

    def _prove_canary(self, engine: Engine, manifest: WeightsManifest, load: Load) -> float:
        """Measure the engine's own error, and show that the canary notices wrong weights. Returns the tolerance, nats."""
        load(False)
        baseline = canary_error(manifest, engine.score(manifest.canary_ids))
        tolerance = tolerance_of(self._config.generator.dtype, baseline, self._config.weights.canary_tolerance)
        load(True)
        seen = canary_error(manifest, engine.score(manifest.canary_ids))
        if not seen > tolerance:
            raise WeightsError(
                f"{self._incarnation}: perturbed weights moved the canary by only {seen:.3g} nats, less than the tolerance "
                f"{tolerance:.3g}: the canary cannot fail, so it proves nothing; lower weights.canary_tolerance"
            )
        return tolerance

    def _on_finished(self, request_id: str, completions: tuple[Rollout, ...]) -> None:
        with self._changed:
            if request_id in self._answers:
                self._answers[request_id] = completions
            else:
                self._first_finished_s = self._first_finished_s if self._groups else time.monotonic()
                self._groups.append(RolloutGroup(ticket=self._inflight.pop(request_id), rollouts=completions))
            self._changed.notify_all()

    def _gathered_in(self, gather_s: float) -> float:
        """Seconds until the finished groups may go; never by themselves while there is none."""
        if not self._groups:
            return math.inf
        return self._first_finished_s + gather_s - time.monotonic() if self._inflight else 0.0

    def _check(self) -> None:
        failure = self._loop.failure
        if failure is not None:
            raise EngineError(f"{self._incarnation}: the engine failed: {failure!r}") from failure
        if self._loop.closed:
            raise EngineError(f"{self._incarnation}: the engine is closed")


def _seed_of(prompt: Prompt) -> int:
    """The prompt's own seed, whoever is asked, and beside which others."""
    return zlib.crc32(f"{prompt.prompt_id}\n{prompt.text}".encode(errors="replace"))


def _clock(config: Config) -> Callable[[], float]:
    """For what a step costs: processor time where it is computed on the loop's own thread."""
    own = config.generator.num_gpus == 0 and config.generator.tensor_parallel_size == 1
    return time.thread_time if own else time.perf_counter


def make_engine(config: Config, model_folder: Path) -> Engine:
    """The engine that `generator.engine` asks for. Imports it here: vllm alone takes seconds."""
    from transformers import AutoTokenizer

    eos_token_id = int(AutoTokenizer.from_pretrained(model_folder).eos_token_id)
    if config.generator.engine == "vllm":
        from actors.engine_vllm import VLLMEngine

        return VLLMEngine(model_folder, config, eos_token_id=eos_token_id)
    from actors.engine_transformers import TransformersEngine

    return TransformersEngine(model_folder, config, eos_token_id=eos_token_id)
