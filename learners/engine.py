"""DeepSpeed, set up for one rank: process group, optimizer, schedule, engine. All settings that took finding stand here."""

import datetime
import math
import os
from functools import partial
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops import __compatible_ops__ as compatible_ops
from torch import nn
from torch.distributed import distributed_c10d
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from async_rlhf.adapters import trained_parameters
from async_rlhf.config.schema import LearnerConfig
from async_rlhf.errors import ConfigError

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
    """A DeepSpeed engine around a scorer, with AdamW and the schedule over `num_steps` optimizer steps.

    Raises:
        ConfigError: activation checkpointing, which this architecture does not do.
    """
    if settings.activation_checkpointing:
        checkpoint_activations(module)
    optimizer = torch.optim.AdamW(
        [parameter for _, parameter in trained_parameters(module)],
        lr=learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    engine, _, _, _ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        lr_scheduler=cast(Any, lambda wrapped: _schedule(wrapped, settings, num_steps)),  # its stub wants a class
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": settings.max_grad_norm if settings.zero_stage else 0.0,  # else clip_gradients does it
            "zero_optimization": {"stage": settings.zero_stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": settings.precision == "bfloat16"},
            "wall_clock_breakdown": False,
            "steps_per_print": 10**9,
        },
        dist_init_required=False,
    )
    if settings.zero_stage == 0 and dist.get_world_size() == 1:
        engine.enable_backward_allreduce = False  # two copies of all gradients, for nobody
    # For good: with dropout the policy that is trained would not be the one that samples. Gradients flow all the same.
    engine.eval()
    return engine


def checkpoint_activations(module: nn.Module) -> None:
    """Keep each layer's input alone for the backward pass, which computes the rest again. Not by transformers' own switch: that one asks
    for training mode, and with it comes dropout.

    Raises:
        ConfigError: the model does not say what its layers are.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(f"{type(module).__name__} has no layers to checkpoint; set learner.activation_checkpointing=false")
    for layer in layers:
        cast(Any, layer).forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


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


def clip_gradients(engine: Engine, max_norm: float) -> float | None:
    """Scale the gradients of the last backward to at most `max_norm` where DeepSpeed keeps no norm (stage 0), and return their global norm.

    None: DeepSpeed does both in its step.
    """
    if engine.zero_optimization():
        return None
    parameters = [parameter for parameter in engine.module.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([cast(torch.Tensor, parameter.grad) for parameter in parameters])
    if norm > max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)
