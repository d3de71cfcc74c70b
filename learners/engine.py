"""DeepSpeed, set up for one rank: process group, optimizer, schedule, engine. All settings that took finding stand here."""

import datetime
import math
import os
from typing import Any, cast

import deepspeed
import torch
from deepspeed.ops import __compatible_ops__ as compatible_ops
from torch import nn
from torch.distributed import distributed_c10d
from transformers import PreTrainedModel

from async_rlhf.adapters import trained_parameters
from async_rlhf.config.schema import LearnerConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What each learner.precision loads its weights in."""

Engine = Any
"""deepspeed.DeepSpeedEngine, which ships no types."""


def join_process_group(*, rank: int, world_size: int, address: str, port: int, timeout_s: float, interface: str = "") -> None:
    """Meet the other ranks. Gloo on CPU, NCCL on GPU; every later collective fails after `timeout_s`.

    Args:
        address: of rank 0's node; port: of the store there.
        interface: the network interface at which the other ranks reach this one; empty: Gloo guesses it.
    """
    if interface and world_size > 1:
        # Gloo's guess is what the host's own name resolves to: on many systems a loopback address, at which no other node reaches it.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK="0",
        LOCAL_SIZE="1",
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )
    # Without this DeepSpeed compiles a shared-memory kernel at start: minutes, a compiler, and a lock file that can hang.
    compatible_ops["deepspeed_shm_comm"] = False
    timeout = datetime.timedelta(seconds=timeout_s)
    # new_group ignores the timeout given to init_distributed and waits half an hour instead.
    distributed_c10d.default_pg_timeout = timeout
    # The rendezvous store is rank 0's already (LearnerRank.rendezvous): every rank, rank 0 too, connects to it as a client.
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)


def make_engine(module: nn.Module, settings: LearnerConfig, learning_rate: float, num_steps: int) -> Engine:
    """A DeepSpeed engine around a scorer, with AdamW and the schedule over `num_steps` optimizer steps."""
    optimizer = torch.optim.AdamW(
        [parameter for _, parameter in trained_parameters(module)],
        lr=learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.weight_decay,
    )
    engine, _, _, _ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        lr_scheduler=cast(Any, lambda wrapped: _schedule(wrapped, settings, num_steps)),  # its stub wants a class
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": settings.max_grad_norm,
            "zero_optimization": {"stage": settings.zero_stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": settings.precision == "bfloat16"},
            "wall_clock_breakdown": False,
            "steps_per_print": 10**9,
        },
        dist_init_required=False,
    )
    # For good: with dropout the policy that is trained would not be the one that samples. Gradients flow all the same.
    engine.eval()
    return engine


def _schedule(optimizer: torch.optim.Optimizer, settings: LearnerConfig, num_steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_share(step, settings, num_steps))


def learning_rate_share(step: int, settings: LearnerConfig, num_steps: int) -> float:
    """The rate of optimizer step `step` (0-based) as a share of learning_rate; positive at every step, the last included."""
    warmup = min(settings.warmup_steps, num_steps // 2)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if settings.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, num_steps - 1 - warmup))
    fall = 1 - progress if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return settings.final_learning_rate_share + (1 - settings.final_learning_rate_share) * fall


def model_of(engine: Engine) -> PreTrainedModel:
    """The Hugging Face model inside the engine's scorer."""
    return engine.module.model


def own_grad_norm(engine: Engine) -> float | None:
    """The global gradient norm after the last backward where DeepSpeed does not keep one (stage 0, fp32); else None."""
    if engine.zero_optimization() or engine.bfloat16_enabled():
        return None
    norms = [parameter.grad.norm() for parameter in engine.module.parameters() if parameter.grad is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0
