"""A sequence-classification model as a reward: what it reads, and what it is refused for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForSequenceClassification

from async_rlhf.config.rewards import RewardPartConfig
from async_rlhf.errors import ConfigError
from async_rlhf.rewards.model import ModelReward, check_reward_model
from async_rlhf.types import Prompt
from tests.support.reward_models import save_reward_model
from tests.support.tiny_policy import save_tiny_policy

KEY = "reward.parts.helpful"
COMPLETIONS = ["2", "12 + 30 = 42", "", "(7)*(8)-1", "3/4", "999, 1000, 1001, 1002"]


def prompt_of(text: str = "1+1=", **columns: Any) -> Prompt:
    return Prompt(prompt_id="p", text=text, token_ids=np.zeros(0, np.int32), columns=columns)


def one_by_one(folder: Path, texts: list[str], *, eos: bool = True) -> list[float]:
    """The oracle: each text alone, without padding, and the score read at its last token."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), LlamaForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    scores: list[float] = []
    for text in texts:
        ids = tokenizer(text)["input_ids"] + ([tokenizer.eos_token_id] if eos else [])
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state
            scores.append(float(model.score(hidden[0, -1])[0]))
    return scores


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reward_model(tmp_path_factory.mktemp("reward"))


def test_each_text_scores_what_it_scores_alone_and_without_padding(folder: Path):
    prompts = [prompt_of("1+1="), prompt_of("12*3=")] * 3
    expected = one_by_one(folder, [prompt.text + completion for prompt, completion in zip(prompts, COMPLETIONS, strict=True)])

    for batch_size in (1, 2, 6):
        rating = ModelReward(KEY, RewardPartConfig(kind="model", path=str(folder), batch_size=batch_size)).rate(prompts, COMPLETIONS)
        np.testing.assert_allclose(rating.scores, expected, rtol=1e-5, atol=1e-5)
        assert rating.scores.dtype == np.float32 and not rating.parts["cut"].any()
    assert np.std(expected) > 0.05, "a model that scores everything alike would show nothing"


def test_the_end_of_sequence_token_is_left_out_where_that_is_asked_for(folder: Path):
    rating = ModelReward(KEY, RewardPartConfig(path=str(folder), add_eos=False)).rate([prompt_of()] * 2, ["2", "13"])

    np.testing.assert_allclose(rating.scores, one_by_one(folder, ["1+1=2", "1+1=13"], eos=False), rtol=1e-5, atol=1e-5)


def test_a_model_without_a_padding_token_scores_batches_all_the_same(tmp_path: Path):
    folder = save_reward_model(tmp_path, pad=False)

    rating = ModelReward(KEY, RewardPartConfig(path=str(folder), add_eos=False)).rate([prompt_of()] * 6, COMPLETIONS)

    expected = one_by_one(folder, ["1+1=" + completion for completion in COMPLETIONS], eos=False)
    np.testing.assert_allclose(rating.scores, expected, rtol=1e-5, atol=1e-5)


def test_a_chat_prompt_goes_through_the_reward_models_own_template(tmp_path: Path):
    folder = save_reward_model(tmp_path, chat=True)
    chat = prompt_of("<whatever the policy reads>", messages=[{"role": "user", "content": "1+1="}])

    rating = ModelReward(KEY, RewardPartConfig(path=str(folder))).rate([chat, prompt_of()], ["2", "2"])

    expected = [*one_by_one(folder, ["u:1+1=;a:2;"], eos=False), *one_by_one(folder, ["1+1=2"])]
    np.testing.assert_allclose(rating.scores, expected, rtol=1e-5, atol=1e-5)


def test_a_text_longer_than_the_model_reads_loses_its_beginning_and_is_counted(folder: Path):
    long = "1+" * 50
    reward = ModelReward(KEY, RewardPartConfig(path=str(folder), max_length=8))

    rating = reward.rate([prompt_of(long + "1="), prompt_of("9=")], ["22", "9"])

    np.testing.assert_allclose(rating.scores, one_by_one(folder, ["1+1+1=22"[-7:], "9=9"]), rtol=1e-5, atol=1e-5)
    assert rating.parts["cut"].tolist() == [1.0, 0.0]


def test_the_models_positions_bound_what_it_reads(folder: Path):
    rating = ModelReward(KEY, RewardPartConfig(path=str(folder))).rate([prompt_of("1" * 62 + "="), prompt_of("1" * 63 + "=")], ["", ""])

    assert rating.parts["cut"].tolist() == [0.0, 1.0], "63 characters and the end token fill 64 positions"


def test_nothing_to_score_is_scored(folder: Path):
    assert ModelReward(KEY, RewardPartConfig(path=str(folder))).rate([], []).scores.shape == (0,)


def test_a_model_with_two_labels_is_refused_with_the_remedy(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"reward.parts.helpful.path .* one label, got 2; train it with num_labels=1"):
        check_reward_model(f"{KEY}.path", save_reward_model(tmp_path, num_labels=2))


def test_a_language_model_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="must hold a sequence-classification model, got LlamaForCausalLM"):
        check_reward_model(f"{KEY}.path", save_tiny_policy(tmp_path))


def test_a_tokenizer_that_says_more_than_the_model_knows_is_refused(tmp_path: Path):
    folder = save_reward_model(tmp_path, vocab_size=16)

    with pytest.raises(ConfigError, match=r"the tokenizer has \d+ tokens, but the model knows 16; save the tokenizer"):
        check_reward_model(f"{KEY}.path", folder)


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors", "tokenizer"])
def test_a_folder_that_lacks_something_is_refused_by_what_it_lacks(tmp_path: Path, lost: str):
    folder = save_reward_model(tmp_path)
    for file in folder.glob(f"{lost}*"):
        file.unlink()

    with pytest.raises(ConfigError, match=r"config.json|safetensors|holds no tokenizer"):
        check_reward_model(f"{KEY}.path", folder)


def test_a_folder_whose_head_has_no_weights_is_refused(tmp_path: Path):
    folder = save_reward_model(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "score.weight"}
    model.save_pretrained(folder, state_dict=state)

    with pytest.raises(ConfigError, match=r"holds no weights for score.weight: it was not trained as a reward model"):
        ModelReward(KEY, RewardPartConfig(path=str(folder)))


def test_a_max_length_beyond_the_models_positions_is_refused(folder: Path):
    with pytest.raises(ConfigError, match=r"max_length \(65\) is more than the 64 positions"):
        ModelReward(KEY, RewardPartConfig(path=str(folder), max_length=65))
