"""`async-rlhf status` of a folder whose run does not live, or that holds anything at all."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from async_rlhf.commands.status import run_status
from async_rlhf.state import STATE_ACTOR_FILE, TrainingState

STATE = TrainingState(
    run_id="first", phase="training", version=3, num_updates=9, optimizer_steps=3, prompts=24, completions=48, tokens=200, seed=0
)


def said(folder: Path, state: TrainingState = STATE, *, summary: str = "{}", ray: str = "{}") -> str:
    """What the command prints of a run with this state, last word and address."""
    for name, text in (("state.json", state.to_json()), ("summary.json", summary), ("ray.json", ray), (STATE_ACTOR_FILE, "state")):
        (folder / name).write_text(text)
    console = Console(record=True, width=160, file=io.StringIO())
    run_status(folder, console)
    return console.export_text()


@pytest.mark.parametrize("phase", ["failed", "interrupted"])
def test_a_run_that_ended_early_is_told_with_its_reason_and_the_way_on(tmp_path: Path, phase: str) -> None:
    text = said(tmp_path, replace(STATE, phase=phase), summary=json.dumps({"error": "no [GPU] is free"}))

    assert f"{phase}: no [GPU] is free" in text and f"go on: async-rlhf resume {tmp_path}" in text


def test_a_failed_run_without_a_last_word_says_so(tmp_path: Path) -> None:
    assert "failed: its driver did not say why" in said(tmp_path, replace(STATE, phase="failed"), summary="[")


def test_a_finished_run_is_not_told_how_to_go_on(tmp_path: Path) -> None:
    assert "go on" not in said(tmp_path, replace(STATE, phase="finished"))


@pytest.mark.parametrize(
    "entry",
    [
        "{",
        "[]",
        "{}",
        '{"address": "a:1", "namespace": "n", "token_path": "", "pid": "me"}',
        '{"address": 1, "namespace": 2, "token_path": 3, "pid": 1e400}',
    ],
    ids=["cut", "a list", "empty", "a text for a number", "numbers for texts"],
)
def test_a_run_whose_address_is_damaged_is_told_from_its_folder(tmp_path: Path, entry: str) -> None:
    text = said(tmp_path, ray=entry)

    assert "3 of 9 updates" in text and "the run itself does not answer" in text


def test_markup_in_a_strangers_folder_stays_text(tmp_path: Path) -> None:
    text = said(tmp_path, replace(STATE, run_id="[/bold]", actors={"[link=x]": "[/]"}, reward_mean=1.0))

    assert "run [/bold]" in text and "[link=x]: [/]" in text
