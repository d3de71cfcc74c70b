"""What is found out about sources before any actor starts, what an evaluation asks, and where rows are read from."""

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from rich.console import Console

from async_rlhf.commands.resume import run_resume
from async_rlhf.config import Config, load_config, to_yaml
from async_rlhf.config.prompts import SourceConfig
from async_rlhf.errors import ConfigError
from async_rlhf.prompts import absolute_sources, check_prompts, held_out_prompts
from async_rlhf.run_plan import reward_and_metric
from async_rlhf.sources import load_rows
from tests.support.rows import dataset_config, drawn, numbered, opened, save_tokenizer, write_jsonl
from tests.support.settings import load, refusal


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("plain"))


def problem(config: Config, tokenizer: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        check_prompts(config, tokenizer)
    return str(caught.value)


def one(path: object, *overrides: str, **source: str) -> Config:
    return dataset_config({"tldr": {"path": path, **source}}, "prompts.held_out=1", *overrides)


# Checks


def test_a_missing_column_is_named_beside_those_that_are_there(tmp_path: Path, plain: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"question": "1", "answer": "2"}] * 3)

    expected = f"prompts.sources.tldr: {path} has no column 'prompt'; it has: question, answer"
    assert problem(one(path), plain) == expected
    assert problem(one(path, streaming="true"), plain) == expected
    assert problem(one(path, "evaluation.sources.e.path=/e", live="true"), plain) == expected
    assert "has no column 'title'" in problem(one(path, template="'{title}'"), plain)
    assert "has no column 'summary'" in problem(one(path, prompt_column="question", completion_column="summary"), plain)
    check_prompts(one(path, prompt_column="question"), plain)


def test_a_template_that_is_none_is_refused(tmp_path: Path, plain: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", numbered(0, 3))

    assert "is no format string" in problem(one(path, template="'{prompt'"), plain)
    assert "a field without a column's name" in problem(one(path, template="'{}'"), plain)


def test_chats_without_a_chat_template_are_refused_and_one_makes_them_good(tmp_path: Path, plain: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": [{"role": "user", "content": "1"}]}] * 3)

    assert "no chat template; save one with it" in problem(one(path), plain)
    check_prompts(one(path), save_tokenizer(tmp_path / "chat", chat=True))


def test_a_source_whose_rows_are_all_held_out_or_all_unusable_is_refused(tmp_path: Path, plain: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [*numbered(0, 1), {"prompt": ""}, {"prompt": "1" * 600}])

    assert "none of 2 rows can be used (1 prompt_empty, 1 prompt_too_long; row 1: prompt_empty" in problem(one(path), plain)
    assert "has no row to train on beside the first 3" in problem(one(path, "prompts.held_out=3"), plain)


def test_nothing_to_evaluate_is_refused(tmp_path: Path, plain: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", numbered(0, 3))

    assert "there is nothing to evaluate" in problem(one(path, "prompts.held_out=0"), plain)
    assert "there is nothing to evaluate" in problem(one(path, live="true"), plain)
    check_prompts(one(path, f"evaluation.sources.e.path={path}", live="true"), plain)


def test_a_column_with_the_name_of_a_reward_s_argument_is_refused(tmp_path: Path, plain: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "1", "completions": "2"}] * 3)

    assert "has a column 'completions'" in problem(one(path), plain)


def test_a_dataset_task_needs_sources_and_a_reward(plain: Path) -> None:
    assert "give prompts.sources.NAME.path" in problem(dataset_config({}), plain)
    with pytest.raises(ConfigError, match=r"task\.name dataset has no reward of its own; give reward\.function"):
        reward_and_metric(load("task.name=dataset"))


def test_the_metric_of_a_dataset_task_is_its_reward_and_that_of_a_built_in_task_its_own() -> None:
    assert reward_and_metric(load("task.name=dataset", "reward.function=a.b:c")) == ("a.b:c", "a.b:c")
    assert reward_and_metric(load("reward.function=a.b:c")) == ("a.b:c", "async_rlhf.tasks.arithmetic:score")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("prompts.sources.a.path=x",), "prompts.sources are read by task.name dataset alone, got task.name arithmetic"),
        (("task.name=dataset", "prompts.sources.a.live=true", "prompts.sources.a.streaming=true"), "prompts.sources.a is live"),
        (("task.name=dataset", "prompts.sources.a.path=sqlite:///f.db?table=t"), "set prompts.sources.a.live=true"),
        (("prompts.max_tokens=600",), "prompts.max_tokens (600) must leave room for generator.max_new_tokens (8)"),
        (("prompts.max_tokens=5", "prompts.min_tokens=6"), "prompts.max_tokens (5) must be at least prompts.min_tokens (6)"),
    ],
)
def test_settings_of_prompts_that_contradict_are_refused(overrides: tuple[str, ...], words: str) -> None:
    assert words in refusal(*overrides)


def test_local_paths_become_absolute_and_hub_ids_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "x.jsonl", [])
    sources = {"a": {"path": "x.jsonl"}, "b": {"path": "owner/name"}, "c": {"path": "sqlite:///f.db?table=t", "live": "true"}}

    made = absolute_sources(dataset_config(sources)).prompts.sources

    assert [made[name].path for name in "abc"] == [f"{tmp_path}/x.jsonl", "owner/name", f"sqlite:///{tmp_path}/f.db?table=t"]


# Held-out rows


def test_rows_held_out_are_the_first_ones_in_order_and_never_drawn(tmp_path: Path, plain: Path) -> None:
    sources = {
        "a": {"path": write_jsonl(tmp_path / "a.jsonl", numbered(0, 9)), "completion_column": "number"},
        "b": {"path": write_jsonl(tmp_path / "b.jsonl", [{"prompt": ""}, *numbered(1, 9)]), "streaming": "true"},
    }
    config = dataset_config(sources, "prompts.held_out=3", "queue.max_epochs=1")

    asked = held_out_prompts(config, plain)

    assert [prompt.prompt_id for prompt in asked] == ["a/0", "b/1", "a/1", "b/2", "a/2"]
    assert asked[0].columns == {"number": 0, "reference": 0}
    assert not {prompt.prompt_id for prompt in asked} & {name for name, _ in drawn(opened(config, plain), 50)}
    few = dataset_config(sources, "prompts.held_out=3", "evaluation.num_prompts=2")
    assert [prompt.prompt_id for prompt in held_out_prompts(few, plain)] == ["a/0", "b/1"]


def test_evaluation_sources_are_asked_instead_and_nothing_is_held_out_then(tmp_path: Path, plain: Path) -> None:
    path, other = write_jsonl(tmp_path / "a.jsonl", numbered(0, 4)), write_jsonl(tmp_path / "e.jsonl", numbered(50, 52))
    config = dataset_config({"a": {"path": path}}, "prompts.held_out=3", f"evaluation.sources.e.path={other}", "queue.max_epochs=1")

    assert [prompt.text for prompt in held_out_prompts(config, plain)] == ["50+0=", "51+0="]
    assert len(drawn(opened(config, plain), 9)) == 4


def test_a_built_in_task_is_asked_its_own_problems(plain: Path) -> None:
    asked = held_out_prompts(load("evaluation.num_prompts=3", "task.held_out=5"), plain)

    assert [prompt.prompt_id for prompt in asked] == ["held-out-0", "held-out-1", "held-out-2"]


# Reading


def numbers(source: SourceConfig) -> list[int]:
    return [row["number"] for row in load_rows("s", source)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_has_the_splits_that_its_files_are_named_after(streaming: bool, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data" / "train-0.jsonl", numbered(0, 3))
    write_jsonl(tmp_path / "data" / "train-1.jsonl", numbered(3, 5))
    write_jsonl(tmp_path / "data" / "test-0.jsonl", numbered(5, 7))

    assert numbers(SourceConfig(path=str(tmp_path / "data"), streaming=streaming)) == [0, 1, 2, 3, 4]
    assert numbers(SourceConfig(path=str(tmp_path / "data"), split="test", streaming=streaming)) == [5, 6]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_saved_set_is_read_with_its_splits_and_slices(streaming: bool, tmp_path: Path) -> None:
    both = DatasetDict({"train": Dataset.from_list(numbered(0, 10)), "test": Dataset.from_list(numbered(10, 14))})
    both.save_to_disk(str(tmp_path / "both"))
    both["test"].save_to_disk(str(tmp_path / "alone"))

    assert numbers(SourceConfig(path=str(tmp_path / "both"), split="train[2:5]", streaming=streaming)) == [2, 3, 4]
    assert numbers(SourceConfig(path=str(tmp_path / "both"), split="train[80%:]", streaming=streaming)) == [8, 9]
    assert numbers(SourceConfig(path=str(tmp_path / "both"), split="test", streaming=streaming)) == [10, 11, 12, 13]
    assert numbers(SourceConfig(path=str(tmp_path / "alone"), streaming=streaming)) == [10, 11, 12, 13]
    with pytest.raises(ConfigError, match=r"has no split 'dev'; it has: train, test"):
        load_rows("s", SourceConfig(path=str(tmp_path / "both"), split="dev"))


def test_a_slice_of_a_file_is_read_and_another_split_of_it_refused(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "x.jsonl", numbered(0, 9)))

    assert numbers(SourceConfig(path=path, split="train[2:4]")) == [2, 3]
    with pytest.raises(ConfigError, match=r"a single file has one split, train .* got split 'test'"):
        load_rows("s", SourceConfig(path=path, split="test"))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("", "has no path"),
        ("/no/such.jsonl", "there is no file or folder /no/such.jsonl"),
        ("data/x.parquet", "there is no file or folder data/x.parquet"),
        ("no-owner-xyz/no-name-xyz", "so it must be a dataset of the Hugging Face hub"),
    ],
)
def test_what_cannot_be_read_is_said_with_a_remedy(path: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    with pytest.raises(ConfigError) as caught:
        load_rows("s", SourceConfig(path=path))
    assert str(caught.value).startswith("prompts.sources.s") and words in str(caught.value)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"prompt": "1"}\n{"prompt": \n')

    with pytest.raises(ConfigError, match=r"prompts\.sources\.s \(.*x\.jsonl\) cannot be read"):
        load_rows("s", SourceConfig(path=str(tmp_path / "x.jsonl")))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(json.dumps({}))

    with pytest.raises(ConfigError, match=r"must end in \.parquet, \.jsonl, .* got \.txt"):
        load_rows("s", SourceConfig(path=str(tmp_path / "x.txt")))


# Resume and documentation


@pytest.mark.parametrize(
    ("word", "fixed"),
    [
        ("prompts.sources.tldr.path=/other", True),
        ("prompts.sources.tldr.streaming=true", True),
        ("prompts.sources.tldr.split=test", True),
        ("prompts.held_out=7", True),
        ("evaluation.sources.e.path=/asked", True),
        ("prompts.sources.tldr.weight=2", False),
        ("prompts.sources.more.path=/more", False),
        ("prompts.poll_s=9", False),
    ],
)
def test_a_resume_keeps_the_rows_of_a_source_and_may_change_the_mixture(word: str, fixed: bool, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(one("/rows")))

    with pytest.raises(ConfigError) as caught:
        run_resume(tmp_path, [word], None, Console(quiet=True))

    assert (f"resume cannot change {word.partition('=')[0].removesuffix('.e.path')}" in str(caught.value)) == fixed, caught.value


def test_every_example_of_the_documentation_is_a_config_that_is_accepted(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "prompts.md").read_text(encoding="utf-8")
    examples = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)

    assert len(examples) == 4
    for number, example in enumerate(examples):
        (tmp_path / f"{number}.yaml").write_text(example)
        assert load_config([tmp_path / f"{number}.yaml"], ["task.name=dataset"]).config.prompts.sources
