"""Rows of sources as stages read them: prompts, completions and pairs, their tokens, and what becomes of unusable ones."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from async_rlhf.config.prompts import SourceConfig
from async_rlhf.config.schema import Config
from async_rlhf.config.stages import RewardModelConfig, SFTConfig
from async_rlhf.errors import ConfigError
from async_rlhf.stages.encode import PairEncoder
from async_rlhf.stages.finetune import UNTRAINED, encode_rows
from async_rlhf.stages.pairs import pair_of
from async_rlhf.stages.reward_model import encode_pairs
from async_rlhf.stages.rows import BadRowError, split_held_out
from async_rlhf.tasks.start import build_tokenizer

TEMPLATE = "{% for m in messages %}({{ m['role'][0] }}){{ m['content'] }}<eos>\n{% endfor %}{% if add_generation_prompt %}(a){% endif %}"
"""Writes a line end behind each turn's end."""


def tokenizer(chat_template: str | None = None) -> Any:
    made = build_tokenizer()
    made.chat_template = chat_template
    return made


def jsonl(file: Path, rows: Sequence[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def sft_config(path: str, **settings: Any) -> Config:
    source = SourceConfig(path=path, completion_column="completion")
    return Config(sft=SFTConfig(sources={"rows": source}, **settings))


def pairs_config(path: str, source: dict[str, str] | None = None, **settings: Any) -> Config:
    return Config(reward_model=RewardModelConfig(sources={"pairs": SourceConfig(path=path, **(source or {}))}, **settings))


def test_labels_are_the_completion_and_its_end_alone(tmp_path: Path):
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": "1+2=", "completion": "3"}])
    made = tokenizer()

    examples, notes = encode_rows(sft_config(path), made)

    assert notes == []
    [example] = examples
    assert made.convert_ids_to_tokens(example["input_ids"]) == ["1", "+", "2", "=", "3", "<eos>"]
    assert example["labels"] == [UNTRAINED] * 4 + made.convert_tokens_to_ids(["3", "<eos>"])


def test_chat_completion_ends_with_the_end_of_its_turn_and_not_with_what_the_template_writes_behind_it():
    encoder = PairEncoder(tokenizer(TEMPLATE), system="", max_length=100)

    prompt, completion = encoder.encode([{"role": "user", "content": "1+1="}], "2")

    made = tokenizer()
    assert made.decode(completion) == "2<eos>"
    assert made.decode(prompt).endswith(made.decode(made("(a)")["input_ids"]))
    assert len(prompt) == len("(u)1+1=<") + len("\n(a)")


def test_system_message_comes_before_chat_prompts_that_have_none():
    encoder = PairEncoder(tokenizer(TEMPLATE), system="9", max_length=100)
    own = [{"role": "system", "content": "88"}, {"role": "user", "content": "1"}]

    without, _ = encoder.encode([{"role": "user", "content": "1"}], "2")
    given, _ = encoder.encode(own, "2")

    assert len(given) == len(without) + 1


def test_template_that_writes_an_answered_prompt_otherwise_makes_a_bad_row():
    fickle = "{% for m in messages %}{% if loop.last %}{{ m['content'] }}{% endif %}{% endfor %}"

    with pytest.raises(BadRowError, match="writes otherwise"):
        PairEncoder(tokenizer(fickle), "", 100).encode([{"role": "user", "content": "1"}], "2")


def test_messages_without_a_chat_template_are_refused():
    with pytest.raises(ConfigError, match="chat template"):
        PairEncoder(tokenizer(), "", 100).encode([{"role": "user", "content": "1"}], "2")


def test_row_longer_than_max_length_is_left_out_and_named_but_never_cut(tmp_path: Path):
    """`11+22=` and `33` and the end are nine tokens."""
    rows = [{"prompt": "1+2=", "completion": "3"}, {"prompt": "11+22=", "completion": "33"}]
    path = jsonl(tmp_path / "rows.jsonl", rows)

    examples, notes = encode_rows(sft_config(path, max_length=8, max_bad_share=0.5), tokenizer())
    whole, _ = encode_rows(sft_config(path, max_length=9), tokenizer())

    assert [len(example["input_ids"]) for example in examples] == [6]
    assert notes == ["sft.sources.rows: 1 of 2 rows left out: 1 longer than max_length 8 (row 1: 9 tokens)"]
    assert [len(example["input_ids"]) for example in whole] == [6, 9]


@pytest.mark.parametrize(
    ("completions", "words"),
    [
        (["3", "", "3"], "1 with an empty completion (row 1)"),
        (["3", None, "3"], "1 whose completion is neither text nor chat messages (row 1: nothing)"),
        ([3, 7, 3], "3 whose completion is neither text nor chat messages (row 0: int, ...)"),
    ],
)
def test_too_many_unusable_rows_stop_the_stage_with_their_numbers(completions: list[Any], words: str, tmp_path: Path):
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": "1+2=", "completion": completion} for completion in completions])

    with pytest.raises(ConfigError) as caught:
        encode_rows(sft_config(path), tokenizer())

    assert words in str(caught.value) and "raise sft.max_bad_share (0.1)" in str(caught.value)


def test_missing_column_is_refused_with_those_that_there_are_and_the_setting(tmp_path: Path):
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": "1", "answer": "2"}])

    with pytest.raises(ConfigError, match=r"sft\.sources\.rows has no column 'completion', it has: prompt, answer; .* completion_column"):
        encode_rows(sft_config(path), tokenizer())


def test_template_makes_the_prompt_of_several_columns(tmp_path: Path):
    path = jsonl(tmp_path / "rows.jsonl", [{"a": "1", "b": "2", "completion": "3"}])
    config = Config(sft=SFTConfig(sources={"rows": SourceConfig(path=path, template="{a}+{b}=", completion_column="completion")}))

    [example], _ = encode_rows(config, tokenizer())

    assert tokenizer().decode(example["input_ids"]) == "1+2=3<eos>"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "1=", "chosen": "2", "rejected": "3"}, ("1=", "2", "3")),
        ({"chosen": "Q: 7 A: 8 9", "rejected": "Q: 7 A: 8 3"}, ("Q: 7 A: 8 ", "9", "3")),
        ({"chosen": "7 8 9", "rejected": "7 8"}, ("7 ", "8 9", "8")),
        ({"chosen": "12", "rejected": "13"}, ("", "12", "13")),
    ],
)
def test_prompt_of_a_pair_stands_apart_or_is_what_both_texts_begin_with(row: dict[str, str], expected: tuple[str, str, str]):
    pair = pair_of(SourceConfig(), row)

    assert (pair.prompt, pair.chosen, pair.rejected) == expected


def test_conversations_are_split_behind_the_turns_that_both_share():
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}]
    chosen, rejected = [*turns, {"role": "assistant", "content": "4"}], [*turns, {"role": "assistant", "content": "5"}]

    pair = pair_of(SourceConfig(), {"prompt": "ignored", "chosen": chosen, "rejected": rejected})

    assert pair.prompt == turns and pair.chosen == chosen[3:] and pair.rejected == rejected[3:]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"chosen": "1", "rejected": "1"}, "whose completions are equal"),
        ({"chosen": "1", "rejected": [{"role": "assistant", "content": "2"}]}, "text on one side"),
        ({"prompt": "1", "chosen": "2", "rejected": "3", "margin": float("nan")}, "whose margin is no finite number"),
    ],
)
def test_row_that_is_no_pair_is_a_bad_row(row: dict[str, Any], words: str):
    source = SourceConfig(margin_column="margin" if "margin" in row else "")

    with pytest.raises(BadRowError, match=words):
        pair_of(source, row)


def test_reward_model_reads_prompt_and_completion_as_one_text_with_its_end(tmp_path: Path):
    path = jsonl(tmp_path / "pairs.jsonl", [{"prompt": "1=", "chosen": "2", "rejected": "3", "by": 1.5}])

    [plain], _ = encode_pairs(pairs_config(path), tokenizer())
    [with_margin], _ = encode_pairs(pairs_config(path, {"margin_column": "by"}, use_margin=True), tokenizer())

    assert tokenizer().decode(plain["chosen_ids"]) == "1=2<eos>" and tokenizer().decode(plain["rejected_ids"]) == "1=3<eos>"
    assert "margin" not in plain and with_margin["margin"] == 1.5


def test_margins_are_asked_for_only_where_there_is_a_column(tmp_path: Path):
    path = jsonl(tmp_path / "pairs.jsonl", [{"prompt": "1=", "chosen": "2", "rejected": "3"}])

    with pytest.raises(ConfigError, match=r"reward_model\.sources\.pairs\.margin_column"):
        encode_pairs(pairs_config(path, use_margin=True), tokenizer())


def test_held_out_rows_are_drawn_by_the_seed_and_none_is_trained():
    rows = list(range(100))

    train, held_out = split_held_out(rows, 20, 1, "sft")

    assert len(held_out) == 20 and sorted(train + held_out) == rows
    assert split_held_out(rows, 20, 1, "sft") == (train, held_out)
    assert split_held_out(rows, 20, 2, "sft")[1] != held_out
    with pytest.raises(ConfigError, match=r"sft\.held_out must leave at least one row .* got 100 of 100 .* set sft\.held_out=10"):
        split_held_out(rows, 100, 1, "sft")


def test_saved_chat_template_is_found_again(tmp_path: Path):
    tokenizer(TEMPLATE).save_pretrained(tmp_path)

    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == TEMPLATE
