"""An engine's state by parameter, whatever its ZeRO stage and number of ranks: out of the engine, and into it.

Of every parameter that is trained, which with adapters is theirs alone, three full fp32 tensors: `master/NAME`, the weight, and Adam's
`exp_avg/NAME` and `exp_avg_sq/NAME`; NAME is that of the Hugging Face model, tied parameters come once. All else follows from the
number of optimizer steps: Adam's bias correction, the learning rate, DeepSpeed's own counters. Every function is called by all ranks
at once.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from async_rlhf.adapters import trained_parameters
from learners.checkpoint import MASTER, MOMENTS
from learners.engine import Engine, model_of


def shapes_of(engine: Engine) -> dict[str, tuple[int, ...]]:
    """The full shape of every trained parameter, by name, in layer order."""
    return {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in trained_parameters(model_of(engine))}


def capture(engine: Engine, num_steps: int) -> dict[str, Tensor]:
    """This rank's share of the state, by key, on the CPU; the shares of all ranks are the whole, in about equal parts.

    One tensor at a time is gathered, so that no rank ever holds more than its share and one parameter.

    Args:
        num_steps: optimizer steps behind the engine; before the first one there are no moments, and they are zeros here.
    """
    rank, shares = dist.get_rank(), [0] * dist.get_world_size()
    steps = {int(state["step"]) for state in engine.basic_optimizer.state.values() if num_steps}
    assert steps <= {num_steps}, f"Adam counts {steps} steps, the model {num_steps}"
    captured: dict[str, Tensor] = {}
    for name, parameter in trained_parameters(model_of(engine)):
        keeper = shares.index(min(shares))
        shares[keeper] += getattr(parameter, "ds_numel", parameter.numel())
        for kind in (MASTER, *MOMENTS):
            value = _gathered(engine, parameter, kind) if num_steps or kind == MASTER else None
            if rank == keeper:
                zeros = torch.zeros(getattr(parameter, "ds_shape", parameter.shape))
                captured[f"{kind}/{name}"] = zeros if value is None else value.detach().to("cpu", torch.float32, copy=True)
    return captured


def restore(engine: Engine, read: Callable[[str], Tensor], num_steps: int, idle_step: Callable[[], None]) -> None:
    """Set the state to what `read` says.

    Args:
        read: the full tensor of a key; asked on every rank.
        num_steps: optimizer steps behind the state.
        idle_step: an optimizer step of the engine with zero gradients; the learning rate is 0 while it runs.
    """
    parameters = list(trained_parameters(model_of(engine)))
    for name, parameter in parameters:
        _set(engine, parameter, MASTER, read(f"{MASTER}/{name}"))
    for group in engine.basic_optimizer.param_groups:
        group["lr"] = 0.0
    # It changes no master. It makes Adam's state, which exists from the first step on only, and, DeepSpeed's own way, brings
    # the masters to whatever else holds the weights: low-precision copies, ZeRO's partitions, persistent parameters.
    idle_step()
    for name, parameter in parameters:
        for kind in MOMENTS:
            _set(engine, parameter, kind, read(f"{kind}/{name}"))
    for state in engine.basic_optimizer.state.values():
        state["step"].fill_(num_steps)
    engine.global_steps = num_steps
    engine.global_samples = num_steps * engine.train_batch_size()
    # The rate is a function of the configuration and the step alone (learning_rate_share); step() goes to last_epoch + 1.
    engine.lr_scheduler.last_epoch = num_steps - 1
    engine.lr_scheduler.step()


def _gathered(engine: Engine, parameter: nn.Parameter, kind: str) -> Tensor:
    """The full tensor, bit by bit; where nothing is partitioned, the engine's own."""
    if hasattr(parameter, "ds_id"):
        full = safe_get_full_fp32_param(parameter) if kind == MASTER else safe_get_full_optimizer_state(parameter, kind)
        assert full is not None, "every parameter is trained"
        return full
    if not hasattr(parameter, "_hp_mapping"):
        return parameter if kind == MASTER else engine.basic_optimizer.state[parameter][kind]
    # What safe_get_full_* does, but on integers: a sum of floats with the other ranks' zeros loses the sign of -0.
    bits = torch.zeros(parameter.numel(), dtype=torch.int32, device=parameter.device)
    mapping = parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]  # DeepSpeed's: this rank's part, None without one
    if mapping is not None:
        address = mapping.lp_fragment_address
        own = mapping.get_hp_fragment(None if kind == MASTER else kind)
        bits.narrow(0, address.start, address.numel).copy_(own.detach().view(torch.int32))
    dist.all_reduce(bits)
    return bits.view(torch.float32).view(parameter.shape)


@torch.no_grad()
def _set(engine: Engine, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
    """Set what this rank holds of the full tensor."""
    if hasattr(parameter, "ds_id"):
        # safe_set_full_* would narrow past the end of a tensor that the ranks do not share evenly.
        size = parameter.ds_tensor.numel()  # pyright: ignore[reportAttributeAccessIssue]  # DeepSpeed's: this rank's part, padded
        padded = torch.nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
        own = padded.narrow(0, size * dist.get_rank(), size)
        if kind == MASTER:
            safe_set_local_fp32_param(parameter, own)
        else:
            safe_set_local_optimizer_state(parameter, own, kind)
    elif not hasattr(parameter, "_hp_mapping"):
        (parameter if kind == MASTER else engine.basic_optimizer.state[parameter][kind]).copy_(value)
    elif kind == MASTER:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, kind)
