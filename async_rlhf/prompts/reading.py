"""From a dataset's row to a Prompt, or to the reason why it makes none."""

import base64
import datetime
import json
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from async_rlhf.config.prompts import PromptsConfig, SourceConfig
from async_rlhf.errors import ConfigError
from async_rlhf.prompts.encoding import Message, PromptTokenizer
from async_rlhf.types import JsonValue, Prompt

TOO_LONG, TOO_SHORT = "prompt_too_long", "prompt_too_short"
EMPTY, MISSING, WRONG_TYPE = "prompt_empty", "prompt_missing", "prompt_wrong_type"
MALFORMED, UNREADABLE = "messages_malformed", "row_unreadable"
BAD = frozenset({EMPTY, MISSING, WRONG_TYPE, MALFORMED, UNREADABLE})
"""Reasons that are a fault of the row; the others are filters that the user chose."""

REFERENCE = "reference"
"""Column of a Prompt that holds the row's completion, where a source has a `completion_column`."""

ASSISTANT = "assistant"

MESSAGES = "messages"
"""Column of a Prompt that holds the messages of a chat."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row as it was drawn."""

    row_id: str
    """Stable name inside its source: a row number, or a file and a row number."""
    columns: Mapping[str, object] | None
    """None: it cannot be read."""
    epoch: int
    """Pass over the source."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """Why a row makes no prompt."""

    reason: str
    detail: str
    """What was found instead."""


class RowReader:
    """Reads the rows of one source."""

    def __init__(self, name: str, source: SourceConfig, prompts: PromptsConfig, tokenizer: PromptTokenizer, max_tokens: int) -> None:
        """
        Args:
            name: of the source.
            max_tokens: longer prompts are skipped.
        """
        self._name = name
        self._source = source
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens

    def read(self, row: Row) -> Prompt | Skipped:
        """The row's prompt.

        Raises:
            ConfigError: it is a chat, and the tokenizer knows none.
        """
        if row.columns is None:
            return Skipped(reason=UNREADABLE, detail="not a JSON object, or no longer there")
        columns = {str(name): json_value(value) for name, value in row.columns.items()}
        asked = fill(self._source.template, columns) if self._source.template else columns.pop(self._source.prompt_column, None)
        made = self._chat(asked, columns) if isinstance(asked, list) else self._text(asked)
        if isinstance(made, Skipped):
            return made
        text, token_ids = made
        if len(token_ids) > self._max_tokens:
            return Skipped(reason=TOO_LONG, detail=f"{len(token_ids)} tokens, at most {self._max_tokens}")
        if len(token_ids) < self._prompts.min_tokens:
            return Skipped(reason=TOO_SHORT, detail=f"{len(token_ids)} tokens, at least {self._prompts.min_tokens}")
        if self._source.completion_column:
            columns[REFERENCE] = last_content(columns.get(self._source.completion_column))
        return Prompt(prompt_id=f"{self._name}/{row.row_id}", text=text, token_ids=np.asarray(token_ids, dtype=np.int32), columns=columns)

    def _text(self, asked: "JsonValue | Skipped") -> tuple[str, Sequence[int]] | Skipped:
        if isinstance(asked, Skipped):
            return asked
        if asked is None:
            return Skipped(reason=MISSING, detail="no value")
        if not isinstance(asked, str):
            return Skipped(reason=WRONG_TYPE, detail=f"{type(asked).__name__}, expected text or chat messages")
        if not asked.strip():
            return Skipped(reason=EMPTY, detail=repr(asked[:20]))
        if not _is_unicode(asked):
            return Skipped(reason=WRONG_TYPE, detail="half a surrogate pair, expected Unicode text")
        return asked, self._tokenizer.encode(asked)

    def _chat(self, asked: list[JsonValue], columns: dict[str, JsonValue]) -> tuple[str, Sequence[int]] | Skipped:
        if self._prompts.chat == "off":
            return Skipped(reason=WRONG_TYPE, detail="a list, expected text (prompts.chat is off)")
        checked = check_messages(asked)
        if isinstance(checked, Skipped):
            return checked
        if checked[-1]["role"] == ASSISTANT:
            columns[REFERENCE] = str(checked.pop()["content"])
        if self._prompts.system and checked[0]["role"] != "system":
            checked = [{"role": "system", "content": self._prompts.system}, *checked]
        if not self._tokenizer.has_chat_template:
            raise ConfigError(without_template(self._name))
        try:
            made = self._tokenizer.render(checked)
        except Exception as error:  # a template may refuse a chat in any way it likes
            return Skipped(reason=MALFORMED, detail=f"the chat template says: {error}")
        columns[MESSAGES] = cast(JsonValue, checked)
        return made


def without_template(name: str) -> str:
    """What to do where chats meet a tokenizer that knows none."""
    return (
        f"prompts.sources.{name} holds chat messages, but the tokenizer of model.path has no chat template; save one with it "
        "(tokenizer.chat_template = ...; tokenizer.save_pretrained), take a model that was trained on chats, or make a text of the row by "
        f"prompts.sources.{name}.template"
    )


def check_messages(asked: Sequence[object]) -> list[Message] | Skipped:
    """The messages of a chat, which may end with the answer that it got, without keys that have no value."""
    if not asked:
        return Skipped(reason=EMPTY, detail="a chat without messages")
    messages: list[Message] = []
    for number, entry in enumerate(asked, 1):
        found = {key: value for key, value in cast(Mapping[str, object], entry).items() if value is not None} if _is_mapping(entry) else {}
        if not isinstance(found.get("role"), str) or not isinstance(found.get("content"), str):
            return Skipped(reason=MALFORMED, detail=f"message {number} is {entry!r:.60}, expected {{role: text, content: text}}")
        if not _is_unicode(str(found["content"])):
            return Skipped(reason=WRONG_TYPE, detail="half a surrogate pair, expected Unicode text")
        messages.append(found)
    asked_last = messages[-2:][0] if messages[-1]["role"] == ASSISTANT else messages[-1]
    if asked_last["role"] == ASSISTANT:
        return Skipped(reason=MALFORMED, detail="nobody but the assistant speaks last, expected a message that it can answer")
    if not str(asked_last["content"]).strip():
        return Skipped(reason=EMPTY, detail="the last message to answer is empty")
    return messages


def fill(template: str, columns: Mapping[str, JsonValue]) -> str | Skipped:
    """The template with the row's values."""
    empty = [name for name in template_columns(template) if columns.get(name) is None]
    if empty:
        return Skipped(reason=MISSING, detail=f"no value in {empty[0]!r}")
    try:
        return template.format(**columns)
    except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        return Skipped(reason=WRONG_TYPE, detail=f"the template cannot take it: {error}")


def template_columns(template: str) -> list[str]:
    """Columns that a template names, in order.

    Raises:
        ValueError: it is no format string.
    """
    fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    names = [field.partition(".")[0].partition("[")[0] for field in fields]
    if not all(names):
        raise ValueError("a field without a column's name; write {column}, and {{ }} for braces")
    return list(dict.fromkeys(names))


def last_content(completion: JsonValue) -> JsonValue:
    """The text of a completion that may be given as chat messages."""
    if isinstance(completion, list) and completion and _is_mapping(completion[-1]):
        return cast(Mapping[str, JsonValue], completion[-1]).get("content")
    return completion


def json_value(value: Any) -> JsonValue:
    """A column's value as JSON knows it: dates and the like become strings, bytes base64, numbers that are none become null."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): json_value(item) for key, item in cast(Mapping[object, object], value).items()}
        case list() | tuple():
            return [json_value(item) for item in cast(Sequence[object], value)]
        case bytes():
            return base64.b64encode(value).decode()
        case datetime.datetime() | datetime.date() | datetime.time():
            return value.isoformat()
        case np.ndarray() | np.generic():
            return json_value(value.tolist())
        case _:
            return str(value)


def parse_row(text: bytes | str) -> Mapping[str, object] | None:
    """A line of JSON as a row; None: it is none."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return cast(Mapping[str, object], row) if isinstance(row, dict) else None


def _is_mapping(value: object) -> bool:
    return isinstance(value, Mapping)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
