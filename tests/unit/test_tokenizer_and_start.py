"""The tokenizers and the random-weight models of the tasks' own starts."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from async_rlhf.config.schema import ModelConfig
from async_rlhf.config.tasks import TaskConfig
from async_rlhf.errors import ConfigError
from async_rlhf.tasks import load_task
from async_rlhf.tasks.arithmetic import CHARACTERS
from async_rlhf.tasks.base import Vocabulary
from async_rlhf.tasks.start import MAX_POSITIONS, build_policy, build_tokenizer

SMALL = ModelConfig(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64)


def _small(family: str, tied: bool) -> ModelConfig:
    return ModelConfig(family=family, tie_embeddings=tied, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64)  # type: ignore[arg-type]


def test_every_known_character_is_one_token_and_decodes_to_itself():
    tokenizer = build_tokenizer()

    token_ids = tokenizer.encode(CHARACTERS)

    assert len(token_ids) == len(set(token_ids)) == len(CHARACTERS)
    assert tokenizer.unk_token_id not in token_ids
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == CHARACTERS


def test_words_are_cut_into_the_longest_tokens_that_fit_and_decode_with_the_separator():
    """`9:b2` is two tokens, the one of the salience and the one of the statement, though `b` is one as well."""
    tokenizer = build_tokenizer(Vocabulary(tokens=("b", ">", "9:", "b2", "k3"), separator=" "))

    cut = tokenizer.tokenize("9:b2 > b  b2k3 x")

    assert cut == ["9:", "b2", ">", "b", "b2", "k3", "<unk>"]
    assert tokenizer.decode([*tokenizer.encode("b2 k3"), tokenizer.eos_token_id], skip_special_tokens=True) == "b2 k3"


def test_prompt_and_completion_of_mini_summary_have_the_same_tokens_apart_and_as_one_text():
    """A reward model reads both as one text; the policy reads the prompt, and writes the completion."""
    task = load_task(TaskConfig(name="mini_summary", num_train=20))
    tokenizer = build_tokenizer(task.vocabulary)

    for problem in (task.problem(index) for index in range(20)):
        prompt, answer = problem.text, str(problem.columns["answer"])
        apart = tokenizer.encode(prompt) + tokenizer.encode(answer)
        assert tokenizer.unk_token_id not in apart
        assert tokenizer.encode(prompt + answer) == apart
        assert tokenizer.decode(tokenizer.encode(answer)) == answer


def test_encoding_adds_no_token_of_its_own():
    """7 characters, 7 tokens: no beginning, no end."""
    tokenizer = build_tokenizer()

    assert len(tokenizer("120+34=")["input_ids"]) == 7
    assert tokenizer.bos_token_id is None


def test_pad_eos_and_unk_are_three_tokens_and_decoding_can_skip_them():
    tokenizer = build_tokenizer()
    special_ids = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]

    assert len(set(special_ids)) == 3
    assert tokenizer.decode([*special_ids, *tokenizer.encode("46"), tokenizer.eos_token_id], skip_special_tokens=True) == "46"


def test_unknown_characters_become_one_unk_each():
    tokenizer = build_tokenizer()

    assert tokenizer.encode("1x\n2") == [*tokenizer.encode("1"), tokenizer.unk_token_id, tokenizer.unk_token_id, *tokenizer.encode("2")]


def test_padding_goes_to_the_left_so_that_generation_can_go_on_at_the_right():
    batch = build_tokenizer()(["1+2=", "11+22="], padding=True)

    assert batch["attention_mask"] == [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]


def test_saved_tokenizer_gives_the_same_ids_through_transformers_and_through_tokenizers(tmp_path: Path):
    tokenizer = build_tokenizer()
    task = load_task(TaskConfig(num_train=50))
    texts = [task.problem(index).text for index in range(50)] + ["x 1", ""]
    tokenizer.save_pretrained(tmp_path)

    loaded = AutoTokenizer.from_pretrained(tmp_path)
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))

    for text in texts:
        assert loaded.encode(text) == plain.encode(text).ids == tokenizer.encode(text)
        assert plain.decode(plain.encode(text).ids) == loaded.decode(tokenizer.encode(text), skip_special_tokens=True)
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id, loaded.padding_side) == (0, 1, 2, "left")


def test_initializer_range_is_the_spread_of_the_random_weights():
    """64k weights: the sample's standard deviation is off by 0.3 %."""
    weights = [build_policy(ModelConfig(initializer_range=spread), build_tokenizer(), seed=0).lm_head.weight for spread in (0.02, 0.08)]

    assert [weight.std().item() for weight in weights] == pytest.approx([0.02, 0.08], rel=0.05)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "gemma", "gemma3"])
def test_saved_policy_is_an_ordinary_model_folder_that_computes_the_same(family: str, tied: bool, tmp_path: Path):
    tokenizer = build_tokenizer()
    model = build_policy(_small(family, tied), tokenizer, seed=0).eval()
    token_ids = torch.tensor([tokenizer.encode("12+34=46")])
    model.save_pretrained(tmp_path)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()

    tied = tied or family.startswith("gemma")
    assert loaded.config.model_type == {"gemma3": "gemma3_text"}.get(family, family)
    with torch.no_grad():
        torch.testing.assert_close(loaded(token_ids).logits, model(token_ids).logits, rtol=0.0, atol=0.0)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied


def test_eos_and_pad_of_the_tokenizer_stand_in_config_and_generation_config():
    tokenizer = build_tokenizer()

    model = build_policy(SMALL, tokenizer, seed=0)

    for settings in (model.config, model.generation_config):
        assert (settings.eos_token_id, settings.pad_token_id, settings.bos_token_id) == (
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
            None,
        )
    assert model.config.max_position_embeddings == MAX_POSITIONS
    assert model.config.vocab_size == len(tokenizer)


def test_seed_decides_the_weights_and_the_global_random_state_stays_untouched():
    tokenizer = build_tokenizer()
    before = torch.random.get_rng_state()

    first, second, other = (build_policy(SMALL, tokenizer, seed=seed).lm_head.weight for seed in (3, 3, 4))

    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_default_sizes_make_a_model_of_0_86_million_parameters():
    """Layer: 4 * 128^2 + 3 * 128 * 384 + 2 * 128 = 213248; four of them, two 23 x 128 embeddings, one norm of 128: 859008."""
    assert sum(tensor.numel() for tensor in build_policy(ModelConfig(), build_tokenizer(), seed=0).parameters()) == 859_008


def test_width_that_the_heads_cannot_share_is_refused_with_one_that_they_can():
    with pytest.raises(ConfigError, match=r"multiple of 2 \* model\.num_heads, got 100 and 8; use model\.hidden_size=96"):
        build_policy(ModelConfig(hidden_size=100, num_heads=8), build_tokenizer(), seed=0)
