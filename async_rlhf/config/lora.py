"""Low-rank adapters instead of all weights."""

from dataclasses import dataclass, field

from async_rlhf.config.fields import number


@dataclass(frozen=True)
class LoraConfig:
    """Trained through PEFT; the base model is the reference."""

    rank: int = number(0, ge=0, le=4096)
    """Of the update matrices; 0: all weights are trained."""
    alpha: float = number(16.0, gt=0.0, le=1e6)
    """Their product is scaled by alpha / rank."""
    target_modules: list[str] = field(default_factory=list[str])
    """Names of the linear layers that get adapters; empty: all but the head."""
