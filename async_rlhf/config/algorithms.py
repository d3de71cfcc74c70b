"""The settings of the algorithms: one section each, and what they share."""

from dataclasses import dataclass, field
from typing import Literal

from async_rlhf.config.fields import number


@dataclass(frozen=True)
class DPOConfig:
    beta: float = number(0.1, gt=0.0, le=100.0)
    """KL strength; larger keeps the policy nearer to the reference."""
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    label_smoothing: float = number(0.0, ge=0.0, lt=0.5)
    """Assumed share of wrong preferences (conservative DPO); sigmoid only."""


@dataclass(frozen=True)
class CriticConfig:
    path: str = ""
    """Hugging Face folder of a reward model, a critic or a policy to start from; empty: the policy's own start."""
    learning_rate: float = number(1e-3, gt=0.0, le=1.0)
    """Its schedule, warm-up and optimizer are the learner's."""


@dataclass(frozen=True)
class PPOConfig:
    kl_coef: float = number(0.05, ge=0.0, le=100.0)
    """Weight of the KL penalty in the reward of each token, in score per nat."""
    clip_range: float = number(0.2, gt=0.0, lt=1.0)
    value_clip_range: float = number(0.2, gt=0.0, le=1e6)
    """How far a value may move from its old one before its gradient stops, in score."""
    vf_coef: float = number(0.1, gt=0.0, le=100.0)
    """Factor of the critic's loss. The critic has an optimizer of its own, so it counts against max_grad_norm only; tune its rate."""
    gamma: float = number(1.0, gt=0.0, le=1.0)
    gae_lambda: float = number(0.95, ge=0.0, le=1.0)
    whiten_advantages: bool = True
    """Mean 0 and standard deviation 1 over the global batch's tokens."""
    critic: CriticConfig = field(default_factory=CriticConfig)


@dataclass(frozen=True)
class RLOOConfig:
    kl_coef: float = number(0.05, ge=0.0, le=100.0)
    """Weight of KL(policy || reference), in score per nat."""
    clip_range: float = number(0.2, gt=0.0, lt=1.0)
    ratio: Literal["sequence", "token"] = "sequence"
    """Importance ratio per completion (the paper's Proximal RLOO) or per token."""


@dataclass(frozen=True)
class GRPOConfig:
    normalize: bool = True
    """Advantages in units of the group's standard deviation; false: centred only (Dr. GRPO)."""
    clip_low: float = number(0.2, gt=0.0, lt=1.0)
    clip_high: float = number(0.28, gt=0.0, le=100.0)
    kl_coef: float = number(0.0, ge=0.0, le=100.0)
    """Weight of k3 in the loss, in score per nat; on-policy its gradient is that of the next token's KL(reference || policy)."""
    loss_norm: Literal["token", "sequence", "constant"] = "token"
    """Denominator: tokens, completions (of each one's mean), or completions x generator.max_new_tokens (Dr. GRPO)."""


@dataclass(frozen=True)
class ListwiseConfig:
    beta: float = number(0.1, gt=0.0, le=100.0)
    """KL strength; larger keeps the policy nearer to the reference."""


@dataclass(frozen=True)
class AlgorithmConfig:
    name: Literal["dpo", "ppo", "rloo", "grpo", "bok", "listwise"] = "dpo"
    minibatches_per_batch: int = number(1, ge=1, le=1024)
    """Optimizer steps per pass over a batch."""
    epochs_per_batch: int = number(1, ge=1, le=64)
    """Passes over a batch."""
    correction: Literal["auto", "behavior", "none", "truncated", "masked", "decoupled"] = "auto"
    """How PPO, RLOO and GRPO correct stale data, see losses/correction.py; auto: truncated. The other losses use no ratios."""
    correction_cap: float = number(2.0, ge=1.0, le=1e6)
    """c of `truncated` and `masked`."""
    dpo: DPOConfig = field(default_factory=DPOConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    rloo: RLOOConfig = field(default_factory=RLOOConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    listwise: ListwiseConfig = field(default_factory=ListwiseConfig)

    @property
    def correction_used(self) -> Literal["behavior", "none", "truncated", "masked", "decoupled"]:
        """The correction, the default resolved."""
        return "truncated" if self.correction == "auto" else self.correction

    @property
    def corrects(self) -> bool:
        """The loss is a policy gradient with ratios, so that stale data can be corrected."""
        return self.name in ("ppo", "rloo", "grpo")

    @property
    def compares(self) -> bool:
        """The loss compares the completions of a prompt: it needs two, and learns nothing from equal scores."""
        return self.name != "ppo"
