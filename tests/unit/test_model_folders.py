"""Model folders that cannot work are refused by name before any work starts."""

import json
from pathlib import Path

import pytest

from async_rlhf.errors import ConfigError
from async_rlhf.model_folders import check_critic_folder, check_critic_vocabulary, check_model_folder


def write_model_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="ascii")
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "tokenizer.json").write_text("{}", encoding="ascii")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}), encoding="ascii")
    return folder


def test_folder_with_config_weights_tokenizer_and_end_token_is_accepted(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    assert check_model_folder(folder) is None


@pytest.mark.parametrize(
    ("missing", "got", "remedy"),
    [
        ("config.json", "holds no config.json", "save_pretrained"),
        ("model.safetensors", r"holds no \*.safetensors weights", "save_pretrained"),
        ("tokenizer.json", "holds no tokenizer", "tokenizer.save_pretrained"),
        ("tokenizer_config.json", "no end-of-sequence token", "set tokenizer.eos_token"),
    ],
)
def test_missing_part_of_a_model_folder_is_named_with_the_folder_and_a_remedy(tmp_path: Path, missing: str, got: str, remedy: str) -> None:
    folder = write_model_folder(tmp_path / "model")
    (folder / missing).unlink()
    with pytest.raises(ConfigError, match=got) as caught:
        check_model_folder(folder)
    assert str(folder) in str(caught.value)
    assert remedy in str(caught.value)


def test_model_path_that_does_not_exist_says_so_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path must be a folder.*nowhere, which does not exist.*leave it empty"):
        check_model_folder(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"eos_token": null}', "no end-of-sequence token"),
        ("{}", "no end-of-sequence token"),
        ('{"eos_token": "<e', "is not valid JSON"),
    ],
)
def test_tokenizer_settings_without_a_readable_end_token_are_refused(tmp_path: Path, text: str, expected: str) -> None:
    folder = write_model_folder(tmp_path / "model")
    (folder / "tokenizer_config.json").write_text(text, encoding="ascii")
    with pytest.raises(ConfigError, match=expected):
        check_model_folder(folder)


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "spiece.model"])
def test_tokenizers_of_other_kinds_are_accepted(tmp_path: Path, name: str) -> None:
    folder = write_model_folder(tmp_path / "model")
    (folder / "tokenizer.json").rename(folder / name)
    assert check_model_folder(folder) is None


def test_a_reward_model_is_no_policy(tmp_path: Path) -> None:
    """transformers would give it a random head, and say nothing that anybody sees."""
    folder = write_model_folder(tmp_path / "model")
    (folder / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}', encoding="ascii")
    with pytest.raises(ConfigError, match="must hold a language model, got LlamaForSequenceClassification"):
        check_model_folder(folder)


# The critic's folder.


def write_critic(folder: Path, **settings: object) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "config.json").write_text(json.dumps({"vocab_size": 20, **settings}), encoding="ascii")
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"architectures": ["LlamaForCausalLM"]},
        {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}},
        {},
    ],
)
def test_a_policy_and_a_reward_model_with_one_label_can_start_a_critic(tmp_path: Path, settings: dict[str, object]) -> None:
    folder = write_critic(tmp_path / "critic", **settings)
    assert check_critic_folder(folder) is None
    assert check_critic_vocabulary(folder, write_critic(tmp_path / "policy")) is None


@pytest.mark.parametrize("labels", [{}, {"id2label": {"0": "bad", "1": "good", "2": "?"}}])
def test_a_classifier_of_several_labels_is_no_critic(tmp_path: Path, labels: dict[str, object]) -> None:
    """transformers leaves two labels, its default, out of config.json."""
    folder = write_critic(tmp_path / "critic", architectures=["LlamaForSequenceClassification"], **labels)
    with pytest.raises(ConfigError, match=f"one label, got {len(labels.get('id2label', 'xx'))}; train it with num_labels=1"):  # type: ignore[arg-type]
        check_critic_folder(folder)


def test_a_critic_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    critic, policy = write_critic(tmp_path / "critic"), write_critic(tmp_path / "policy", vocab_size=24)
    with pytest.raises(ConfigError, match=r"reads another vocabulary \(20 tokens\) than the policy \(24\).*same tokenizer"):
        check_critic_vocabulary(critic, policy)


def test_a_missing_or_damaged_critic_folder_is_named_with_its_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.ppo\.critic\.path must be a folder.*nowhere, which does not exist"):
        check_critic_folder(tmp_path / "nowhere")
    folder = write_critic(tmp_path / "critic")
    (folder / "config.json").write_text("{", encoding="ascii")
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON"):
        check_critic_folder(folder)


# The vocabulary.


def write_vocabulary(folder: Path, *, rows: int, vocab: object, added: list[dict[str, object]], **settings: object) -> Path:
    write_model_folder(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": rows}), encoding="ascii")
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": added}), encoding="ascii")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", **settings}), encoding="ascii")
    return folder


EOS = {"content": "<eos>", "id": 2, "special": True}


@pytest.mark.parametrize("vocab", [{"a": 0, "b": 1}, [["a", -1.0], ["b", -2.0]]])
def test_a_tokenizer_whose_tokens_all_have_rows_is_accepted(tmp_path: Path, vocab: object) -> None:
    assert check_model_folder(write_vocabulary(tmp_path / "model", rows=3, vocab=vocab, added=[EOS])) is None


@pytest.mark.parametrize(
    ("rows", "added", "named"),
    [
        (1, [], r"has 1 rows and the tokenizer gives 'b' the number 1"),
        (2, [EOS], r"gives '<eos>' the number 2"),
        (3, [EOS, {"content": "<think>", "id": 3, "special": False}], r"gives '<think>' the number 3"),
        (3, [EOS, {"content": "<user>", "id": 3, "special": True}], r"gives '<user>' the number 3"),
    ],
)
@pytest.mark.parametrize("vocab", [{"a": 0, "b": 1}, [["a", -1.0], ["b", -2.0]]])
def test_a_token_without_a_row_is_named_with_both_numbers(
    tmp_path: Path, rows: int, added: list[dict[str, object]], named: str, vocab: object
) -> None:
    folder = write_vocabulary(tmp_path / "model", rows=rows, vocab=vocab, added=added, chat_template="<user>{{ messages }}")
    with pytest.raises(ConfigError, match=rf"{named}.*do not belong together.*resize_token_embeddings"):
        check_model_folder(folder)


def test_a_special_token_that_nothing_names_may_go_without_a_row(tmp_path: Path) -> None:
    """Some text models keep the token for images of their larger siblings."""
    image = {"content": "<image>", "id": 3, "special": True}
    folder = write_vocabulary(tmp_path / "model", rows=3, vocab={"a": 0, "b": 1}, added=[EOS, image], added_tokens_decoder={"3": image})
    assert check_model_folder(folder) is None


def test_a_template_in_its_own_file_counts(tmp_path: Path) -> None:
    folder = write_vocabulary(
        tmp_path / "model", rows=3, vocab={"a": 0, "b": 1}, added=[EOS, {"content": "<user>", "id": 3, "special": True}]
    )
    assert check_model_folder(folder) is None
    (folder / "chat_template.jinja").write_text("<user>{{ messages }}", encoding="ascii")
    with pytest.raises(ConfigError, match="'<user>' the number 3"):
        check_model_folder(folder)
