"""Which weights.transport goes with what."""

from collections.abc import Iterator

from async_rlhf.config.schema import Config

_INSTEAD = "or set weights.transport=object_store"


def transport_contradictions(config: Config) -> Iterator[str]:
    """What nccl and gloo cannot do with this config."""
    transport, generator, learner = config.weights.transport, config.generator, config.learner
    if transport == "object_store":
        return
    if generator.engine != "vllm":
        yield f"weights.transport {transport} ends in vLLM's workers, got generator.engine {generator.engine}; set it to vllm, {_INSTEAD}"
    if learner.lora.publishes_adapters:
        yield (
            f"weights.transport {transport} sends whole weights, got learner.lora.publish adapter (vLLM takes adapters from files alone, "
            f"and they are small); set learner.lora.publish=merged, {_INSTEAD}"
        )
    if config.weights.on_update == "drain":
        yield f"weights.transport {transport} waits for no request, got weights.on_update drain; set weights.on_update=keep, {_INSTEAD}"
    if transport == "nccl" and min(generator.num_gpus, learner.num_gpus) < 1:
        yield (
            "weights.transport nccl needs whole GPUs on both sides, since two members of an NCCL group cannot share one, got "
            f"generator.num_gpus {generator.num_gpus:g} and learner.num_gpus {learner.num_gpus:g}; give each at least 1, {_INSTEAD}"
        )
    if transport == "gloo" and max(generator.num_gpus, learner.num_gpus) > 0:
        yield (
            f"weights.transport gloo is for machines without GPUs, got generator.num_gpus {generator.num_gpus:g} and learner.num_gpus "
            f"{learner.num_gpus:g}; set weights.transport=nccl, {_INSTEAD}"
        )
