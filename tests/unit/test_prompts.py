"""The stream of prompts, and the tokenizer file."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rlhf.prompts import PromptCursor, TaskStream, encode_problem, load_encode
from async_rlhf.tasks.base import Problem


class NumberedProblems:
    def __init__(self, num_problems: int) -> None:
        self.num_problems = num_problems

    def problem(self, index: int) -> Problem:
        return Problem(prompt_id=f"p{index}", text=str(index), columns={"answer": str(index + 1)})


def encode(text: str) -> list[int]:
    return [ord(char) for char in text]


def make_stream(num_problems: int = 5, *, seed: int = 0, max_epochs: int = 0, cursor: PromptCursor | None = None) -> TaskStream:
    return TaskStream(NumberedProblems(num_problems), encode, seed=seed, max_epochs=max_epochs, cursor=cursor)


def draw(stream: TaskStream, count: int) -> list[tuple[str, int]]:
    drawn = [stream.draw() for _ in range(count)]
    return [(prompt.prompt_id, epoch) for prompt, epoch in (item for item in drawn if item is not None)]


# Order


def test_each_epoch_holds_every_problem_once_and_has_its_own_order() -> None:
    drawn = draw(make_stream(20), 60)
    epochs = [[name for name, epoch in drawn if epoch == wanted] for wanted in range(3)]
    assert all(sorted(names) == sorted(f"p{i}" for i in range(20)) for names in epochs)
    assert len({tuple(names) for names in epochs}) == 3


def test_order_depends_on_the_seed_alone() -> None:
    assert draw(make_stream(20, seed=3), 40) == draw(make_stream(20, seed=3), 40)
    assert draw(make_stream(20, seed=3), 40) != draw(make_stream(20, seed=4), 40)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(num_problems=st.integers(1, 6), before=st.integers(0, 20), seed=st.integers(0, 99))
def test_stream_resumed_at_a_cursor_goes_on_as_if_it_had_never_stopped(num_problems: int, before: int, seed: int) -> None:
    whole = make_stream(num_problems, seed=seed)
    draw(whole, before)
    resumed = make_stream(num_problems, seed=seed, cursor=whole.cursor)
    assert draw(resumed, 15) == draw(whole, 15)
    assert resumed.cursor == whole.cursor


def test_stream_ends_after_max_epochs_and_stays_ended() -> None:
    stream = make_stream(3, max_epochs=2)
    assert not stream.exhausted
    assert [epoch for _, epoch in draw(stream, 6)] == [0, 0, 0, 1, 1, 1]
    assert stream.exhausted
    assert (stream.draw(), stream.draw()) == (None, None)
    assert stream.cursor == PromptCursor(epoch=2, index=0)


def test_exhausted_is_known_with_the_last_draw_not_one_draw_later() -> None:
    stream = make_stream(2, max_epochs=1)
    assert [(stream.exhausted, stream.draw() is not None) for _ in range(3)] == [(False, True), (False, True), (True, False)]


def test_max_epochs_zero_never_ends() -> None:
    stream = make_stream(2, max_epochs=0)
    assert len(draw(stream, 1000)) == 1000
    assert not stream.exhausted


def test_stream_resumed_past_its_last_epoch_gives_nothing() -> None:
    assert make_stream(2, max_epochs=1, cursor=PromptCursor(epoch=1, index=0)).draw() is None


def test_empty_source_is_refused() -> None:
    with pytest.raises(AssertionError, match="at least one problem"):
        make_stream(0)


# Encoding


def test_prompt_carries_text_columns_and_the_ids_that_the_policy_reads() -> None:
    prompt = encode_problem(NumberedProblems(99).problem(42), encode)
    assert (prompt.prompt_id, prompt.text, prompt.columns) == ("p42", "42", {"answer": "43"})
    assert prompt.token_ids.dtype == np.int32
    assert prompt.token_ids.tolist() == [ord("4"), ord("2")]


def write_tokenizer(folder: Path, *, padding: int = 0, truncation: int = 0) -> None:
    """Digits and `+` to ids 1 to 11, `<pad>` 0."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocabulary = {token: token_id for token_id, token in enumerate(["<pad>", *"0123456789+"])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    if padding:
        tokenizer.enable_padding(length=padding, pad_id=0, pad_token="<pad>")
    if truncation:
        tokenizer.enable_truncation(truncation)
    tokenizer.save(str(folder / "tokenizer.json"))


def test_tokenizer_file_encodes_character_by_character_as_written_in_it(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    assert load_encode(tmp_path)("12+9") == [2, 3, 11, 10]


@pytest.mark.parametrize("left_behind", [{"padding": 8}, {"truncation": 2}])
def test_padding_and_truncation_left_in_the_tokenizer_file_do_not_touch_prompts(tmp_path: Path, left_behind: dict[str, int]) -> None:
    """`save_pretrained` after a padded call writes both into tokenizer.json; transformers resets them in each call."""
    write_tokenizer(tmp_path, **left_behind)
    assert load_encode(tmp_path)("12+9") == [2, 3, 11, 10]


def test_tokenizer_file_is_read_without_importing_transformers(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    code = (
        "import sys, pathlib\n"
        "from async_rlhf.prompts import load_encode\n"
        "ids = load_encode(pathlib.Path(sys.argv[1]))('12')\n"
        "assert ids == [2, 3], ids\n"
        "assert not {'transformers', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parents[2], timeout=120)
