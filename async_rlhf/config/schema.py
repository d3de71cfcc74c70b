"""Every setting, its default, its range and its meaning; those of the algorithms, tasks, prompts, rewards and stages stand in the
files beside this one.

Nowhere else is a default written down.
Users state intent at the top level (`updates`, `batch_groups`, `completions_per_prompt`, `max_staleness`); sizes that
follow from it are derived properties. Ranges stand in the field's metadata and are enforced by `config.checks`.
"""

from dataclasses import dataclass, field
from typing import Literal

from async_rlhf.config.algorithms import AlgorithmConfig
from async_rlhf.config.fields import number
from async_rlhf.config.lora import LoraConfig
from async_rlhf.config.prompts import EvaluationConfig, PromptsConfig
from async_rlhf.config.rewards import RewardConfig
from async_rlhf.config.stages import RelabelConfig, RewardModelConfig, SFTConfig
from async_rlhf.config.tasks import TaskConfig
from async_rlhf.config.wandb import WandbConfig


@dataclass(frozen=True)
class RunConfig:
    name: str = "run"
    """Names the run folder and Ray's namespace; letters, digits, `.`, `_` and `-`."""
    dir: str = ""
    """Run folder; empty: runs/<name>-<time>. On a cluster: storage that every node sees."""
    local_cpus: int = number(0, ge=0, le=4096)
    """Logical CPUs of a local Ray; 0: what the actors ask for, or the machine's cores if those are more."""
    object_store_mib: int = number(256, ge=80, le=1 << 20)
    """Ray's shared memory on a local run, MiB."""
    metrics_port: int = number(0, ge=0, le=65535)
    """Port of a local Ray's metrics, for Prometheus; 0: any free one, which RUN/prometheus.json names."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    autoscale: bool = False
    """Nodes come when they are asked for: a cluster that is too small today is waited for, up to timeouts.place_s."""


@dataclass(frozen=True)
class ModelConfig:
    path: str = ""
    """Hugging Face model folder of the initial policy; empty: the task's own supervised start, made once and cached."""
    family: Literal["llama", "qwen3", "gpt_neox", "gemma", "gemma3"] = "llama"
    """Architecture of the task's own start; like the sizes below without effect when `path` is given."""
    hidden_size: int = number(128, ge=16, le=16384)
    num_layers: int = number(4, ge=1, le=256)
    num_heads: int = number(4, ge=1, le=256)
    intermediate_size: int = number(384, ge=16, le=65536)
    tie_embeddings: bool = False
    """One matrix for the embedding and the head; Gemma's always are."""
    initializer_range: float = number(0.02, gt=0.0, le=10.0)
    """Standard deviation of the random weights before the supervised stage."""


@dataclass(frozen=True)
class GeneratorConfig:
    engine: Literal["vllm", "transformers"] = "vllm"
    """`transformers` is the slow reference engine, for tests and for machines without a vLLM build."""
    count: int = number(1, ge=1, le=4096)
    tensor_parallel_size: int = number(1, ge=1, le=64)
    """GPUs that share the weights of one generator; all on one node."""
    max_inflight: int = number(128, ge=1, le=65536)
    """Completions sampled at once by one generator."""
    max_new_tokens: int = number(8, ge=1, le=1 << 20)
    """Length limit of a completion, tokens."""
    max_model_len: int = number(512, ge=8, le=1 << 22)
    """Prompt and completion together, tokens."""
    temperature: float = number(1.0, gt=0.0, le=100.0)
    dtype: Literal["float32", "bfloat16"] = "float32"
    kv_cache_mib: int = number(64, ge=1, le=1 << 22)
    """Memory of the engine's key/value cache, MiB."""
    enforce_eager: bool = True
    """No torch.compile: right for short runs."""
    num_cpus: float = number(1.0, ge=0.0, le=4096.0)
    num_gpus: float = number(0.0, ge=0.0, le=64.0)
    """Of one generator: a share of a GPU, one, or as many as tensor_parallel_size."""


@dataclass(frozen=True)
class ScorerConfig:
    count: int = number(1, ge=1, le=4096)
    num_cpus: float = number(1.0, ge=0.0, le=4096.0)
    num_gpus: float = number(0.0, ge=0.0, le=64.0)


@dataclass(frozen=True)
class QueueConfig:
    order: Literal["ready", "ticket"] = "ready"
    """`ready`: the finished groups of earliest deadline; `ticket`: in the order of issue."""
    ties: Literal["auto", "replace", "keep"] = "auto"
    """What happens to a group whose scores are all equal; auto: replaced, but kept by PPO, which learns from them."""
    max_replacements_per_batch: int = number(-1, ge=-1, le=1_000_000)
    """Tied groups replaced per update before they stay; -1: batch_groups."""
    max_attempts: int = number(3, ge=1, le=1000)
    """Attempts at a ticket, the last of which fails, before its prompt is voided."""
    max_failed_share: float = number(0.2, ge=0.0, le=1.0)
    """Share of issued prompts that may fail before the run stops (looked at after 20 failures)."""
    lease_s: float = number(1200.0, gt=0.0, le=1e6)
    """A ticket not answered for this long goes out again; longer than any completion may take (timeouts.generate_s)."""
    sync_s: float = number(1.0, gt=0.0, le=60.0)
    """Longest time that scored groups are in the journal without being forced to the disk; batch decisions never wait for it."""
    last_batch: Literal["short", "drop"] = "short"
    """When the prompts run out: train the incomplete last batch, or drop it."""
    max_epochs: int = number(0, ge=0, le=1_000_000)
    """Passes over the prompts; 0: as many as `updates` needs."""


@dataclass(frozen=True)
class LearnerConfig:
    num_ranks: int = number(1, ge=1, le=4096)
    zero_stage: int = number(0, ge=0, le=3)
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 keeps an fp32 master copy of the weights."""
    learning_rate: float = number(3e-4, gt=0.0, le=1.0)
    warmup_steps: int = number(5, ge=0, le=1_000_000)
    """Optimizer steps of linear warm-up; in a short run at most half of its steps."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """After warm-up; advances per optimizer step, and its last step is above zero."""
    final_learning_rate_share: float = number(0.1, gt=0.0, le=1.0)
    """Where `linear` and `cosine` end, as a share of learning_rate."""
    weight_decay: float = number(0.0, ge=0.0, le=1.0)
    adam_beta1: float = number(0.9, ge=0.0, lt=1.0)
    adam_beta2: float = number(0.99, ge=0.0, lt=1.0)
    max_grad_norm: float = number(1.0, gt=0.0, le=1e6)
    batching: Literal["packed", "padded"] = "packed"
    """Sequences of a microbatch behind one another without padding, or above one another padded to the longest."""
    max_tokens_per_microbatch: int = number(16384, ge=1, le=1 << 30)
    """Tokens of one forward pass on one rank, padding included; a group larger than this is a microbatch of its own."""
    activation_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again: far less memory, up to a third more time."""
    peak_tflops: float = number(0.0, ge=0.0, le=1e6)
    """Peak of one device, for train/mfu_share; 0: known by the name of the GPU (learners/flops.py), or no such metric."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    num_cpus: float = number(1.0, ge=0.0, le=4096.0)
    num_gpus: float = number(0.0, ge=0.0, le=64.0)


@dataclass(frozen=True)
class WeightsConfig:
    transport: Literal["object_store", "nccl", "gloo"] = "object_store"
    """`object_store`: through Ray's shared memory; `nccl`: from the learner's GPU to the generators' GPUs; `gloo`: the same between
    processes on CPUs."""
    held_on: Literal["gpu", "cpu"] = "gpu"
    """Where the learner's rank 0 holds the version that it sends by nccl; `cpu` when its GPU has no room for a second copy."""
    on_update: Literal["keep", "keep_cache", "drain"] = "keep"
    """`keep`: running requests go on under the new weights, and what they have so far is read anew under them; `keep_cache`: it is not,
    which saves the more the longer completions are, and their keys and values of earlier versions stay (PipelineRL, arXiv 2509.19128);
    `drain`: they finish first."""
    verify: bool = True
    """Checksums, and the canary after every install."""
    canary_tolerance: float = number(0.0, ge=0.0, le=10.0)
    """Allowed canary error in nats; 0: from the engine's own baseline, measured at its start."""

    @property
    def by_group(self) -> bool:
        """Whether the learner sends to each generator through a group of processes."""
        return self.transport != "object_store"

    @property
    def rereads(self) -> bool:
        """Whether what running requests have so far is read anew under each version."""
        return self.on_update != "keep_cache"


@dataclass(frozen=True)
class CheckpointConfig:
    every_updates: int = number(50, ge=0, le=10_000_000)
    """Updates between two checkpoints; 0: not by updates. The last update makes one in any case."""
    every_minutes: float = number(15.0, ge=0.0, le=1e6)
    """Minutes between two checkpoints; 0: not by time."""
    keep_last: int = number(2, ge=1, le=1000)
    """Checkpoints kept; the journal reaches back to the oldest."""
    asynchronous: bool = True
    """Write to the disk while the next update is trained; false: wait."""


@dataclass(frozen=True)
class SupervisionConfig:
    """What happens when a process dies, or freezes."""

    max_restarts: int = number(8, ge=0, le=1_000_000)
    """Restarts of one actor, or of the learner group, within `window_s`; one more failure ends the run."""
    window_s: float = number(600.0, gt=0.0, le=1e6)
    backoff_s: float = number(1.0, ge=0.0, le=1e6)
    """Wait before the second restart within the window, seconds; doubles with each further one. The first one is immediate."""
    max_backoff_s: float = number(60.0, ge=0.0, le=1e6)
    ping_s: float = number(5.0, gt=0.0, le=1e6)
    """Seconds between two looks at every process."""
    silence_s: float = number(60.0, gt=0.0, le=1e6)
    """A process that does not answer for this long is frozen: it is killed and restarted."""
    driver_restarts: int = number(0, ge=0, le=1_000_000)
    """How often a driver that was killed, or froze, is started again by a guard process; 0: no guard."""


@dataclass(frozen=True)
class TimeoutsConfig:
    """Deadlines of the blocking edges, seconds."""

    start_s: float = number(300.0, gt=0.0, le=1e6)
    place_s: float = number(60.0, gt=0.0, le=1e6)
    """Room on the cluster for all actors, and later for one whose node was lost."""
    generate_s: float = number(600.0, gt=0.0, le=1e6)
    """Longest silence of a generator that holds tickets."""
    leave_s: float = number(120.0, ge=0.0, le=1e6)
    """A generator that shall leave the run may finish its completions for so long; what is left then is sampled by others."""
    score_s: float = number(300.0, gt=0.0, le=1e6)
    batch_s: float = number(900.0, gt=0.0, le=1e6)
    """Longest wait of the learner for a batch."""
    step_s: float = number(900.0, gt=0.0, le=1e6)
    weights_s: float = number(300.0, gt=0.0, le=1e6)
    """Export, transfer and install of one weights version."""
    call_s: float = number(60.0, gt=0.0, le=1e6)
    """Any short call to an actor."""
    stop_s: float = number(25.0, ge=0.0, le=1e6)
    """After SIGINT or SIGTERM: time to finish the update and write a last checkpoint."""


@dataclass(frozen=True)
class Config:
    """One run."""

    updates: int = number(80, ge=1, le=10_000_000)
    """Batches to train."""
    batch_groups: int = number(64, ge=1, le=1_000_000)
    """Groups per batch (B)."""
    completions_per_prompt: int = number(2, ge=1, le=1024)
    """Completions in a group (K)."""
    max_staleness: int = number(1, ge=0, le=1024)
    """Largest allowed update minus version of any trained token (eta); 0 is synchronous training."""
    deterministic: bool = False
    """Bit-equal losses on a second run; needs max_staleness 0 and queue.order ticket."""
    seed: int = number(0, ge=0, lt=2**31)
    run: RunConfig = field(default_factory=RunConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    relabel: RelabelConfig = field(default_factory=RelabelConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    scorer: ScorerConfig = field(default_factory=ScorerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    queue: QueueConfig = field(default_factory=QueueConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    supervision: SupervisionConfig = field(default_factory=SupervisionConfig)
    timeouts: TimeoutsConfig = field(default_factory=TimeoutsConfig)
    env: dict[str, str] = field(default_factory=dict[str, str])
    """Environment variables of the actors; never secrets."""

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole run: updates x epochs x minibatches."""
        return self.updates * self.algorithm.epochs_per_batch * self.algorithm.minibatches_per_batch

    @property
    def max_replacements_per_batch(self) -> int:
        """Tied groups replaced per update, the default resolved."""
        if self.queue.ties == "keep" or (self.queue.ties == "auto" and not self.algorithm.compares):
            return 0
        chosen = self.queue.max_replacements_per_batch
        return self.batch_groups if chosen < 0 else chosen
