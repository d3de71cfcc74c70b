"""Low-rank adapters instead of all weights."""

from dataclasses import dataclass, field
from typing import Any, Literal

from async_rlhf.config.fields import number


@dataclass(frozen=True)
class LoraConfig:
    """Trained through PEFT, without dropout; the base model is the reference."""

    rank: int = number(0, ge=0, le=4096)
    """Of the update matrices; 0: all weights are trained."""
    alpha: float = number(16.0, gt=0.0, le=1e6)
    """Their product is scaled by alpha / rank."""
    target_modules: list[str] = field(default_factory=list[str])
    """Names of the linear layers that get adapters; empty: all but the head."""
    publish: Literal["merged", "adapter"] = "merged"
    """What the generators get of each version: all weights with the adapters merged in, or the adapters alone, beside the base weights."""

    @property
    def publishes_adapters(self) -> bool:
        """Whether versions hold adapters alone."""
        return self.rank > 0 and self.publish == "adapter"

    @property
    def identity(self) -> dict[str, Any]:
        """What trained adapters mean nothing without."""
        return {"rank": self.rank, "alpha": self.alpha, "target_modules": list(self.target_modules)}
