"""The messages that flow through the system, in the order in which they are made.

    Prompt -> Ticket -> RolloutGroup (K Rollouts) -> ScoredGroup -> Batch -> StepReport -> WeightsVersion

All are frozen, hold numpy arrays and plain values only, and pickle. Versions count completed learner updates: 0 is the
initial policy, update u consumes batch u and turns version u into version u + 1.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal, TypeAlias

import numpy as np

JsonValue: TypeAlias = "str | int | float | bool | Sequence[JsonValue] | Mapping[str, JsonValue] | None"
"""What a dataset's column may hold."""


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    """The end-of-sequence token was sampled; it is the last token of the completion."""
    LENGTH = "length"
    """The length limit cut the completion."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One problem to answer. Made by PromptStream."""

    prompt_id: str
    """Stable name of the prompt inside its source."""
    text: str
    """The prompt as the reward function sees it."""
    token_ids: np.ndarray
    """[P] int32 token ids, exactly as the policy reads them."""
    columns: Mapping[str, JsonValue] = field(default_factory=dict[str, JsonValue])
    """Further columns of the dataset row, handed to the reward function by name; `messages` holds a chat prompt's messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ticket:
    """The right, and the duty, to sample one group: a lease. Made by ReplayBuffer, held by one generator."""

    ticket_id: int
    """Counts the prompts ever issued, from 0; a reissued ticket keeps it."""
    prompt: Prompt
    epoch: int
    """How often the prompt source had been gone through completely when this prompt was drawn."""
    seed: int
    """Root of the sampling seeds of the K completions; the same in every attempt."""
    deadline: int
    """The last update that may train this group."""
    attempt: int
    """0 for the first lease; results of earlier attempts are refused."""
    holder: str
    """Incarnation of the generator that holds the lease, for instance `generator-0.2`."""

    def __reduce__(self) -> "tuple[Callable[..., Ticket], tuple[Any, ...]]":
        """What pickle keeps: plain values. Each ticket crosses three processes, and a small array costs more than all the rest."""
        prompt, token_ids = self.prompt, self.prompt.token_ids
        of_prompt = prompt.prompt_id, prompt.text, token_ids.tobytes(), token_ids.dtype.str, prompt.columns
        return _ticket, (*of_prompt, self.ticket_id, self.epoch, self.seed, self.deadline, self.attempt, self.holder)


def _ticket(prompt_id: str, text: str, token_ids: bytes, dtype: str, columns: Mapping[str, JsonValue], *of_ticket: Any) -> Ticket:
    prompt = Prompt(prompt_id=prompt_id, text=text, token_ids=np.frombuffer(token_ids, dtype), columns=columns)
    ticket_id, epoch, seed, deadline, attempt, holder = of_ticket
    return Ticket(ticket_id=ticket_id, prompt=prompt, epoch=epoch, seed=seed, deadline=deadline, attempt=attempt, holder=holder)


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionSpan:
    """Tokens [start, end) of a completion were sampled by policy `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One sampled completion. Made by Generator, read by Scorer and Learner."""

    completion_ids: np.ndarray
    """[T] int32 sampled token ids, end-of-sequence included when it was reached."""
    behavior_logprobs: np.ndarray
    """[T] float32 natural-log probability of each token under the policy that sampled it, at the sampling temperature."""
    version_spans: tuple[VersionSpan, ...]
    """Who sampled what, in order, without gaps."""
    finish_reason: FinishReason

    @property
    def oldest_version(self) -> int:
        """The oldest policy version that sampled any token."""
        return min(span.version for span in self.version_spans)


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutGroup:
    """The K completions of one ticket. Made by Generator."""

    ticket: Ticket
    rollouts: tuple[Rollout, ...]

    @property
    def num_tokens(self) -> int:
        """Completion tokens, all K together."""
        return sum(len(rollout.completion_ids) for rollout in self.rollouts)

    @property
    def num_sequence_tokens(self) -> int:
        """Tokens of all K sequences, the prompt counted with each."""
        return self.num_tokens + len(self.rollouts) * len(self.ticket.prompt.token_ids)

    @property
    def oldest_version(self) -> int:
        """The version of the group's oldest token: it decides the group's staleness."""
        return min([span.version for rollout in self.rollouts for span in rollout.version_spans])


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredGroup:
    """A group with everything that a loss may need. Made by Scorer, kept by ReplayQueue, read by Learner."""

    group: RolloutGroup
    scores: np.ndarray
    """[K] float32 reward of each completion, finite."""
    reference_logprobs: tuple[np.ndarray, ...]
    """K arrays [T] float32: natural-log probability of each token under the frozen start, at the sampling temperature."""
    completions: tuple[str, ...]
    """K decoded completions, special tokens removed: what the reward function saw."""
    reward_parts: Mapping[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    """Where the score is a weighted sum: name -> [K] float32, each part before its weight; else empty."""
    judged_scores: np.ndarray | None = None
    """[K] the scores before a batch shaped them (scores.py); None: nothing did."""

    @property
    def tied(self) -> bool:
        """Several completions, all of the same score before shaping: no preference among them, and none is made of one."""
        judged = (self.scores if self.judged_scores is None else self.judged_scores).tolist()
        return len(judged) > 1 and judged.count(judged[0]) == len(judged)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What one update trains: the decision of ReplayBuffer, read by the learner ranks."""

    update: int
    groups: tuple[ScoredGroup, ...]

    @property
    def staleness(self) -> tuple[int, ...]:
        """Per group: update minus the version of its oldest token."""
        return tuple(self.update - scored.group.oldest_version for scored in self.groups)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one learner rank says after one update. Equal on all ranks but for the times."""

    version: int
    """The policy version that now exists."""
    optimizer_steps: int
    """Optimizer steps taken since the start of the run."""
    num_tokens: int
    """Tokens (prompt and completion) that went through forward and backward on all ranks."""
    train_s: float
    """Seconds inside train_step on this rank."""
    metrics: Mapping[str, float]
    """Global means, keyed as declared in `async_rlhf.metrics`."""
    parts_s: Mapping[str, float] = field(default_factory=dict[str, float])
    """Where `train_s` went on this rank, likewise keyed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One tensor of a weights version, as it travels."""

    name: str
    """Name in the Hugging Face state dict."""
    shape: tuple[int, ...]
    dtype: str
    """`float32`, `bfloat16` or `float16`. bfloat16 travels as int16 bits: numpy has no such type."""
    checksum: int
    """Of the bytes, see checksums.py; over a group of processes, see weight_group.tensor_checksum."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsManifest:
    """What a weights version must be, down to the bytes. Made by the learner, checked by every generator."""

    version: int
    tensors: tuple[TensorSpec, ...]
    """In layer order."""
    canary_ids: tuple[int, ...]
    """The canary text, token ids."""
    canary_logprobs: tuple[float, ...]
    """The learner's log-probability of canary_ids[1:] given what precedes each, temperature 1, in nats."""

    @property
    def digest(self) -> int:
        """CRC-32 over every tensor's name and checksum, in order: equal weights have equal digests, whatever their version."""
        digest = 0
        for spec in self.tensors:
            digest = zlib.crc32(f"{spec.name} {spec.checksum}\n".encode(), digest)
        return digest

    @classmethod
    def of(cls, buckets: "Sequence[WeightsManifest]") -> "WeightsManifest":
        """That of a whole version, from its buckets' in order."""
        return replace(buckets[0], tensors=tuple(spec for bucket in buckets for spec in bucket.tensors))


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsVersion:
    """An immutable snapshot of the policy, or a bucket of one. Made by the learner, owned by the broadcaster, installed by generators."""

    manifest: WeightsManifest
    tensors: Mapping[str, np.ndarray]
    """Name -> array in the manifest's shape (bfloat16 as int16 bits); read-only."""
    gather_s: float = 0.0
    """Seconds that the learner spent on it: canary, gathering and copying."""

    @classmethod
    def of(cls, buckets: "Sequence[WeightsVersion]") -> "WeightsVersion":
        """A whole version of its buckets in order, without a copy."""
        tensors = {name: array for bucket in buckets for name, array in bucket.tensors.items()}
        return cls(manifest=WeightsManifest.of([bucket.manifest for bucket in buckets]), tensors=tensors)


@dataclass(frozen=True, kw_only=True, slots=True)
class InstallReport:
    """What a generator says after it installed, and verified, a version."""

    version: int
    install_s: float
    """From the call to the verified canary; generation pauses for `pause_s` of it."""
    pause_s: float
    """Seconds in which the engine could not step because weights were being replaced."""
    canary_error: float
    """Largest absolute difference of the canary's log-probabilities from the learner's, in nats."""
    canary_s: float = 0.0
    """Part of `install_s`: the canary's own sampling."""
    transfer_s: float = 0.0
    """Before `install_s`: from the request to the weights in the generator's process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Meeting:
    """Where the learner and the workers of one generator meet; see weight_group."""

    backend: Literal["nccl", "gloo"]
    address: str
    port: int
    key: str
    """Of this meeting alone, among all at that address."""
    world_size: int
    """The sender (rank 0), and every worker of the generator."""
    timeout_s: float
    """Of the meeting, and of each transfer."""
