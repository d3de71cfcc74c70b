"""From a row to a prompt, or to the reason why it makes none; and what too many of those do."""

import datetime
import decimal
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from async_rlhf.config.prompts import PromptsConfig, SourceConfig
from async_rlhf.errors import ConfigError
from async_rlhf.prompts.encoding import PromptTokenizer
from async_rlhf.prompts.reading import Row, RowReader, Skipped, json_value
from async_rlhf.types import Prompt
from tests.support.rows import dataset_config, drawn, numbered, opened, save_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("chat"), chat=True)


def read(folder: Path, columns: dict[str, Any] | None, source: SourceConfig | None = None, **prompts: Any) -> Prompt | Skipped:
    reader = RowReader("s", source or SourceConfig(path="x"), PromptsConfig(**prompts), PromptTokenizer(folder), 20)
    return reader.read(Row(row_id="7", columns=columns, epoch=0))


def prompt(*arguments: Any, **named: Any) -> Prompt:
    made = read(*arguments, **named)
    assert isinstance(made, Prompt), made
    return made


def reason(*arguments: Any, **named: Any) -> str:
    made = read(*arguments, **named)
    assert isinstance(made, Skipped), made
    return made.reason


# Text


def test_a_text_prompt_keeps_its_text_and_hands_all_other_columns_on(plain: Path) -> None:
    made = prompt(plain, {"prompt": " 1+1=", "answer": "2", "feedback": {"stars": 4}})

    assert (made.prompt_id, made.text, made.columns) == ("s/7", " 1+1=", {"answer": "2", "feedback": {"stars": 4}})
    assert len(made.token_ids) == 5


def test_a_template_makes_the_text_and_keeps_every_column(plain: Path) -> None:
    made = prompt(plain, {"a": 3, "b": 4}, SourceConfig(path="x", template="{a}+{b}="))

    assert (made.text, made.columns) == ("3+4=", {"a": 3, "b": 4})
    assert reason(plain, {"a": 3, "b": None}, SourceConfig(path="x", template="{a}+{b}=")) == "prompt_missing"
    assert reason(plain, {"a": "x"}, SourceConfig(path="x", template="{a:d}")) == "prompt_wrong_type"


def test_the_completion_is_the_reference_as_text_or_as_the_last_message(plain: Path) -> None:
    source = SourceConfig(path="x", completion_column="answer")

    assert prompt(plain, {"prompt": "1+1=", "answer": "2"}, source).columns == {"answer": "2", "reference": "2"}
    messages = [{"role": "assistant", "content": "2"}]
    assert prompt(plain, {"prompt": "1+1=", "answer": messages}, source).columns["reference"] == "2"


def test_the_answer_at_the_end_of_a_chat_is_its_reference_and_not_read_by_the_policy(chat: Path) -> None:
    asked = [{"role": "user", "content": "1+1="}]

    answered = prompt(chat, {"prompt": [*asked, {"role": "assistant", "content": "2"}]})

    assert answered.columns == {"messages": asked, "reference": "2"}
    assert answered.text == prompt(chat, {"prompt": asked}).text


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (None, "row_unreadable"),
        ({}, "prompt_missing"),
        ({"prompt": None}, "prompt_missing"),
        ({"prompt": ""}, "prompt_empty"),
        ({"prompt": " \n"}, "prompt_empty"),
        ({"prompt": 3}, "prompt_wrong_type"),
        ({"prompt": {"text": "1"}}, "prompt_wrong_type"),
        ({"prompt": "1\ud800"}, "prompt_wrong_type"),
        ({"prompt": "1" * 21}, "prompt_too_long"),
        ({"prompt": "1"}, "prompt_too_short"),
        ({"prompt": []}, "prompt_empty"),
        ({"prompt": ["1+1="]}, "messages_malformed"),
        ({"prompt": [{"role": "user"}]}, "messages_malformed"),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "1"}]}]}, "messages_malformed"),
        ({"prompt": [{"role": "assistant", "content": "2"}]}, "messages_malformed"),
        ({"prompt": [{"role": "assistant", "content": "2"}, {"role": "assistant", "content": "2"}]}, "messages_malformed"),
        ({"prompt": [{"role": "user", "content": " "}]}, "prompt_empty"),
        ({"prompt": [{"role": "user", "content": " "}, {"role": "assistant", "content": "2"}]}, "prompt_empty"),
    ],
    ids=repr,
)
def test_a_row_that_makes_no_prompt_says_why(columns: dict[str, Any] | None, expected: str, chat: Path) -> None:
    assert reason(chat, columns, min_tokens=2) == expected


def test_columns_become_what_json_knows() -> None:
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5)
    value = {"when": moment, "day": moment.date(), "raw": b"ab", "price": decimal.Decimal("1.50"), "none": math.nan, "all": (1, 2.5, True)}

    assert json_value(value) == {
        "when": "2026-01-02T03:04:05", "day": "2026-01-02", "raw": "YWI=", "price": "1.50", "none": None, "all": [1, 2.5, True]
    }  # fmt: skip


# Chats


def test_a_chat_is_what_the_template_makes_of_it_token_by_token(chat: Path) -> None:
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": "1+1"}]
    made = prompt(chat, {"prompt": [{**messages[0], "name": None}], "kind": "sum"})

    tokenizer = AutoTokenizer.from_pretrained(chat)
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert made.token_ids.tolist() == expected
    assert (made.text, made.columns) == ("(u-1+1)(=)", {"kind": "sum", "messages": messages})


def test_a_chat_gets_no_second_token_of_beginning(tmp_path: Path) -> None:
    """A tokenizer that puts <eos> before every text, as others put <bos>, with a template that writes it, too."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path, chat=True))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", tokenizer.eos_token_id)])
    tokenizer.chat_template = "<eos>" + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path)

    text, asked = prompt(tmp_path, {"prompt": "1+1="}), prompt(tmp_path, {"prompt": [{"role": "user", "content": "1+1"}]})

    assert [ids.tolist().count(tokenizer.eos_token_id) for ids in (text.token_ids, asked.token_ids)] == [1, 1]


def test_the_system_message_is_put_first_where_there_is_none(chat: Path) -> None:
    alone = [{"role": "user", "content": "1"}]
    own = [{"role": "system", "content": "2"}, *alone]

    assert prompt(chat, {"prompt": alone}, system="3").text == "(s-3)(u-1)(=)"
    assert prompt(chat, {"prompt": alone}, system="3").columns["messages"] == [{"role": "system", "content": "3"}, *alone]
    assert prompt(chat, {"prompt": own}, system="3").text == "(s-2)(u-1)(=)"


def test_chats_are_refused_where_they_are_off_or_the_tokenizer_knows_none(chat: Path, plain: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "1"}]}

    assert reason(chat, row, chat="off") == "prompt_wrong_type"
    with pytest.raises(ConfigError, match=r"prompts\.sources\.s holds chat messages, but the tokenizer .* save one with it"):
        read(plain, row)


def test_a_chat_that_the_template_refuses_is_a_bad_row(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, chat=True)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")

    made = read(tmp_path, {"prompt": [{"role": "user", "content": "1"}]})

    assert isinstance(made, Skipped)
    assert made.reason == "messages_malformed" and "roles must alternate" in made.detail


# Skipped rows


def test_skipped_rows_are_counted_by_reason_and_the_next_usable_one_is_drawn(tmp_path: Path, plain: Path) -> None:
    rows = [*numbered(0, 3), {"prompt": ""}, {"prompt": None}, {"prompt": "1" * 600}]
    config = dataset_config({"s": {"path": write_jsonl(tmp_path / "s.jsonl", rows)}}, "queue.max_epochs=2")
    stream = opened(config, plain)

    assert len(drawn(stream, 100)) == 6
    assert stream.cursor.skipped == {"prompt_empty": 2, "prompt_missing": 2, "prompt_too_long": 2}
    assert stream.cursor.sources["s"].drawn == 6


def test_bad_rows_are_named_a_few_times(tmp_path: Path, plain: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*numbered(0, 200), *[{"prompt": ""}] * 15]
    config = dataset_config({"s": {"path": write_jsonl(tmp_path / "s.jsonl", rows)}}, "queue.max_epochs=1")

    with caplog.at_level(logging.WARNING):
        drawn(opened(config, plain), 300)

    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 5
    assert all(text.startswith("prompts.sources.s, row 2") and "prompt_empty" in text for text in said)


def test_too_many_bad_rows_stop_the_run_with_the_first_ones_named(tmp_path: Path, plain: Path) -> None:
    """Of each three rows one is bad: the 20th bad one is among some 60 rows, far over a share of 0.1."""
    rows = [{"prompt": ""} if number % 3 == 0 else row for number, row in enumerate(numbered(0, 300))]
    config = dataset_config({"s": {"path": write_jsonl(tmp_path / "s.jsonl", rows)}})
    stream = opened(config, plain)

    with pytest.raises(
        ConfigError, match=r"prompts\.sources\.s: 20 of \d+ rows cannot be used.*max_bad_share \(0\.1\).*; row \d+: prompt_empty"
    ):
        drawn(stream, 300)
    assert len(drawn(opened(dataset_config({"s": {"path": tmp_path / "s.jsonl"}}, "prompts.max_bad_share=0.5"), plain), 300)) == 300


def test_filters_never_stop_a_run_that_has_other_rows(tmp_path: Path, plain: Path) -> None:
    rows = [*numbered(0, 2), *[{"prompt": "1" * 600}] * 100]
    stream = opened(dataset_config({"s": {"path": write_jsonl(tmp_path / "s.jsonl", rows)}}), plain)

    assert len(drawn(stream, 20)) == 20


@pytest.mark.parametrize("more", [{}, {"streaming": "true"}], ids=["mapped", "streamed"])
@pytest.mark.parametrize("max_epochs", [0, 1])
def test_a_source_of_which_no_row_can_be_used_is_an_error_and_not_an_endless_search(
    more: dict[str, str], max_epochs: int, tmp_path: Path, plain: Path
) -> None:
    path = write_jsonl(tmp_path / "s.jsonl", [{"prompt": "1" * 600}] * 3)
    stream = opened(dataset_config({"s": {"path": path, **more}}, f"queue.max_epochs={max_epochs}"), plain)

    with pytest.raises(ConfigError, match=r"prompts\.sources\.s: none of \d rows can be used \(\d prompt_too_long\)"):
        stream.draw()


def test_a_live_source_without_usable_rows_waits_for_others(tmp_path: Path, plain: Path) -> None:
    path = write_jsonl(tmp_path / "s.jsonl", [{"prompt": "1" * 600}] * 2)
    stream = opened(dataset_config({"s": {"path": path, "live": "true"}}), plain)

    assert [stream.draw() for _ in range(50)] == [None] * 50
    assert stream.cursor.skipped["prompt_too_long"] < 10, "it does not go through them again and again"
    with path.open("a") as file:
        file.write(json.dumps({"prompt": "1+1="}) + "\n")
    assert drawn(stream, 1) == [("s/2", 0)]


def test_a_line_that_is_no_json_object_is_a_bad_row_of_a_live_source(tmp_path: Path, plain: Path) -> None:
    (tmp_path / "s.jsonl").write_text('{"prompt": "1+1="}\nnonsense\n[1]\n{"prompt": "2+2="}\n')
    stream = opened(dataset_config({"s": {"path": tmp_path / "s.jsonl", "live": "true"}}, "queue.max_epochs=1"), plain)

    assert [name for name, _ in drawn(stream, 5)] == ["s/0", "s/3"]
    assert stream.cursor.skipped == {"row_unreadable": 2}
