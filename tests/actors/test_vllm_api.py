"""Every name of vLLM's update API that actors.vllm_weights calls is there, and takes what it is given: releases change it."""

import inspect
from dataclasses import fields

import pytest

from async_rlhf.types import Meeting

pytestmark = pytest.mark.slow  # imports vllm


def parameters(function: object) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]  # type: ignore[arg-type]


def test_the_engine_takes_the_calls_that_an_update_makes() -> None:
    from vllm.v1.engine.llm_engine import LLMEngine

    assert parameters(LLMEngine.collective_rpc) == ["method", "timeout", "args", "kwargs"]
    assert parameters(LLMEngine.set_weight_version) == ["weight_version"]
    assert "reset_running_requests" in parameters(LLMEngine.reset_prefix_cache)


def test_a_worker_has_the_methods_that_an_update_calls_by_name() -> None:
    from vllm.v1.worker.gpu_worker import Worker

    expected = {"init_weight_transfer_engine": ["init_info"], "start_weight_update": [], "update_weights": ["update_info"]}
    assert {name: parameters(getattr(Worker, name)) for name in expected} == expected
    assert parameters(Worker.finish_weight_update) == []
    assert callable(Worker.reload_weights)


def test_our_transfer_engine_is_what_the_base_class_asks_for_and_is_found_by_its_name() -> None:
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from actors.vllm_weights import BACKEND, TRANSFER, GroupWeights

    assert not getattr(GroupWeights, "__abstractmethods__", None)
    assert TRANSFER.backend == BACKEND and WeightTransferEngineFactory._registry[BACKEND]() is GroupWeights
    assert parameters(WeightTransferEngine.__init__) == ["config", "vllm_config", "device", "model"]
    assert {field.name for field in fields(GroupWeights.init_info_cls)} == {field.name for field in fields(Meeting)}


def test_layerwise_reload_takes_a_model() -> None:
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload
    from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_processing

    assert parameters(initialize_layerwise_reload) == ["model"]
    assert parameters(finalize_layerwise_processing) == ["model", "model_config"]
