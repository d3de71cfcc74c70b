"""A reward model on a GPU scores what it scores on the CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

from async_rlhf.config.rewards import RewardPartConfig
from async_rlhf.rewards.model import ModelReward
from async_rlhf.types import Prompt
from tests.support.reward_models import save_reward_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU on this machine")


def test_scores_equal_those_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = RewardPartConfig(kind="model", path=str(save_reward_model(tmp_path)), batch_size=3)
    prompts = [Prompt(prompt_id="p", text="1+1=", token_ids=np.zeros(0, np.int32))] * 5
    completions = ["2", "12 + 30 = 42", "", "(7)*(8)-1", "3/4"]

    on_gpu = ModelReward("reward.parts.x", part)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = ModelReward("reward.parts.x", part)

    np.testing.assert_allclose(on_gpu.rate(prompts, completions).scores, on_cpu.rate(prompts, completions).scores, rtol=1e-4, atol=1e-4)
