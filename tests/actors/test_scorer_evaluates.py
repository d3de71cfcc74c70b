"""The scorer on a tiny real model: metric, texts and the divergence of single completions, as an evaluation asks for them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actors.reference import ReferencePolicy
from actors.scorer import Scorer
from async_rlhf.config import Config, load_config
from async_rlhf.tasks.start import build_tokenizer
from async_rlhf.types import FinishReason, Prompt, Rollout, RolloutGroup, VersionSpan
from tests.support.samples import make_ticket
from tests.support.tiny_policy import save_tiny_policy

METRIC = "async_rlhf.tasks.arithmetic:score"
REWARD = "def score(prompts, completions, **columns):\n    return [float(len(text)) for text in completions]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_tiny_policy(tmp_path_factory.mktemp("tiny"))
    (path / "reward.py").write_text(REWARD)
    return path


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config().config


def asked(text: str, answer: str) -> Prompt:
    ids = np.array(build_tokenizer()(text)["input_ids"], dtype=np.int32)
    return Prompt(prompt_id=text, text=text, token_ids=ids, columns={"answer": answer})


def answered(text: str, logprobs: np.ndarray | None = None) -> Rollout:
    ids = np.array([*build_tokenizer()(text)["input_ids"], build_tokenizer().eos_token_id], dtype=np.int32)
    return Rollout(
        completion_ids=ids,
        behavior_logprobs=np.zeros(len(ids), np.float32) if logprobs is None else logprobs.astype(np.float32),
        version_spans=(VersionSpan(version=0, start=0, end=len(ids)),),
        finish_reason=FinishReason.STOP,
    )


def test_divergence_is_what_the_sampling_policy_gave_more_than_the_reference(folder: Path, config: Config) -> None:
    """Behavior log-probabilities equal to the reference's: 0 nats; larger by 0.25 in each of three tokens: 0.75 nats."""
    prompts = [asked("1+1=", "2"), asked("10+2=", "12")]
    texts = ("2", "13")
    groups = [
        RolloutGroup(ticket=replace(make_ticket(index), prompt=prompt), rollouts=(answered(text),))
        for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    own = ReferencePolicy(folder, config).logprobs(groups)
    rollouts = [answered(texts[0], own[0]), answered(texts[1], own[1] + 0.25)]

    samples = Scorer(config, str(folder), METRIC, METRIC).assess(prompts, rollouts, True)

    assert [sample.kl_nats for sample in samples] == pytest.approx([0.0, 0.75], abs=1e-4)
    assert [(sample.completion, sample.expected, sample.score, sample.num_tokens) for sample in samples] == [
        ("2", "2", 1.0, 2),
        ("13", "12", 0.0, 3),
    ]
    assert Scorer(config, str(folder), METRIC, METRIC).assess(prompts, rollouts, False)[0].kl_nats is None, "greedy"


@pytest.mark.parametrize(("metric", "scores"), [(METRIC, [1.0, 0.0]), ("", [1.0, 2.0])])
def test_metric_is_the_tasks_own_and_the_reward_where_there_is_none(folder: Path, config: Config, metric: str, scores: list[float]) -> None:
    prompts, texts = [asked("1+1=", "2"), asked("10+2=", "12")], ["2", "13"]
    reward = f"{folder / 'reward.py'}:score"
    scorer = Scorer(load_config(overrides=[f"reward.function={reward}"]).config, str(folder), reward, metric)

    assert scorer.grade(prompts, texts) == scores
    assert scorer.rate_texts(prompts, texts) == [1.0, 2.0]
