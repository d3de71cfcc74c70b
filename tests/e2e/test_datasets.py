"""Runs on datasets: two files mixed, text and chats; a resume that goes on at the right rows; a row that comes while a run goes on."""

import json
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from async_rlhf.audit import audit
from async_rlhf.config import load_config
from async_rlhf.prompts import PromptCursor, make_stream
from tests.support.cluster import make_model_folder
from tests.support.command import CHECKOUT, command, environment, run_cli, summary_of
from tests.support.rows import save_tokenizer, write_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SMALL = ("conf/quickstart.yaml", "task.name=dataset", "algorithm=rloo", "batch_groups=4", "completions_per_prompt=2", "queue.ties=keep")

REWARD = '''
import zlib

def score(prompts, completions, **columns):
    """No two alike. Text rows carry `number`, chats `messages` and `kind`: what is missing is None."""
    known = {"number", "messages", "kind", "feedback"}
    assert set(columns) <= known, sorted(columns)
    for index, prompt in enumerate(prompts):
        row = {name: values[index] for name, values in columns.items() if values[index] is not None}
        if "messages" in row:
            assert row["kind"] == "chat" and prompt.endswith("(=)") and row["messages"][0]["role"] == "system", row
        else:
            assert prompt == f"{row['number']}+0=", row
    return [zlib.crc32(text.encode()) / 2**32 for text in completions]
'''


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model_folder(tmp_path_factory.mktemp("model"))
    return save_tokenizer(folder, chat=True)


@pytest.fixture
def reward(tmp_path: Path) -> str:
    (tmp_path / "reward.py").write_text(REWARD)
    return f"{tmp_path / 'reward.py'}:score"


def text_row(number: int) -> dict[str, object]:
    return {"prompt": f"{number}+0=", "number": number}


def trained(folder: Path) -> Mapping[int, tuple[str, int]]:
    """Ticket -> (prompt id, epoch) of every group that was trained, by the rollouts dataset."""
    found: dict[int, tuple[str, int]] = {}
    for part in sorted((folder / "rollouts").glob("part-*.parquet")):
        for row in pq.read_table(part, columns=["ticket_id", "prompt_id", "epoch", "fate"]).to_pylist():
            if row["fate"] == "trained":
                found[row["ticket_id"]] = (row["prompt_id"], row["epoch"])
    return dict(sorted(found.items()))


def test_text_and_chats_are_trained_and_a_resume_goes_on_at_the_right_rows(tmp_path: Path, model_folder: Path, reward: str) -> None:
    folder = tmp_path / "run"
    write_jsonl(tmp_path / "text.jsonl", [*map(text_row, range(9)), {"prompt": "", "number": 9}, {"prompt": "1" * 60, "number": 10}])
    chats = [{"messages": [{"role": "user", "content": f"{number}*2"}], "kind": "chat"} for number in range(8)]
    pq.write_table(pa.Table.from_pylist(chats), tmp_path / "chats.parquet")
    words = (
        *SMALL,
        f"model.path={model_folder}",
        f"reward.function={reward}",
        f"prompts.sources.text.path={tmp_path / 'text.jsonl'}",
        f"prompts.sources.chats.path={tmp_path / 'chats.parquet'}",
        "prompts.sources.chats.prompt_column=messages",
        "prompts.system=1+1=2",
        "prompts.held_out=2",
    )

    first = run_cli("train", *words, f"run.dir={folder}", "updates=3")
    assert first.code == 0, first.output
    before, summary = trained(folder), summary_of(folder)
    resumed = run_cli("resume", str(folder), "updates=5", "generator.engine=transformers")
    assert resumed.code == 0, resumed.output

    config = load_config([CHECKOUT / words[0]], [*words[1:]]).config
    stream = make_stream(config, model_folder, PromptCursor(epoch=0, index=0))
    draws = [stream.draw() for _ in range(20)]
    expected = {number: (draw[0].prompt_id, draw[1]) for number, draw in enumerate(draws) if draw is not None}
    assert list(before.items()) == list(expected.items())[:12]
    assert trained(folder) == expected
    assert {name.partition("/")[0] for name, _ in expected.values()} == {"text", "chats"}
    assert not {name for name, _ in expected.values()} & {"text/0", "text/1", "chats/0", "chats/1", "text/9", "text/10"}
    assert summary_of(folder)["skipped_rows"] == stream.cursor.skipped
    assert sum(summary["skipped_rows"].values()) <= sum(stream.cursor.skipped.values()) > 0
    assert "prompt empty" in (folder / "report.html").read_text() or "prompt too long" in (folder / "report.html").read_text()
    assert audit(folder).problems == ()


def test_a_row_that_is_appended_while_the_run_goes_on_is_sampled(tmp_path: Path, model_folder: Path, reward: str) -> None:
    """Eight rows, each asked once, are two of three batches: the third one waits for the rows that come."""
    folder, rows, log = tmp_path / "run", write_jsonl(tmp_path / "live.jsonl", [text_row(number) for number in range(8)]), tmp_path / "log"
    write_jsonl(tmp_path / "asked.jsonl", [text_row(number) for number in range(100, 103)])
    words = (
        *SMALL,
        f"model.path={model_folder}",
        f"reward.function={reward}",
        f"prompts.sources.live.path={rows}",
        "prompts.sources.live.live=true",
        f"evaluation.sources.asked.path={tmp_path / 'asked.jsonl'}",
        "prompts.poll_s=0.2",
        "queue.max_epochs=1",
        "generator.engine=transformers",
    )

    with log.open("w") as stream:
        process = subprocess.Popen(
            command("train", *words, f"run.dir={folder}", "updates=3"), cwd=CHECKOUT, env=environment(), stdout=stream, stderr=stream
        )
    try:
        ends = time.monotonic() + 400
        while "update 2/" not in log.read_text() and process.poll() is None and time.monotonic() < ends:
            time.sleep(0.2)
        assert process.poll() is None, log.read_text()
        with rows.open("a") as file:
            for number in range(50, 54):
                file.write(json.dumps({**text_row(number), "feedback": "good"}) + "\n")
        assert process.wait(300) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()

    assert trained(folder) == {number: (f"live/{number}", 0) for number in range(12)}
    assert summary_of(folder)["skipped_rows"] == {}
    assert audit(folder).problems == ()


def test_a_missing_column_is_refused_before_anything_starts(tmp_path: Path, model_folder: Path, reward: str) -> None:
    rows = write_jsonl(tmp_path / "x.jsonl", [{"question": "1+1=", "number": number} for number in range(5)])

    done = run_cli(
        *("train", *SMALL, f"model.path={model_folder}", f"reward.function={reward}", f"prompts.sources.tldr.path={rows}"),
        f"run.dir={tmp_path / 'run'}",
    )

    assert done.code == 2, done.output
    assert f"prompts.sources.tldr: {rows} has no column 'prompt'; it has: question, number" in done.output
    assert "Traceback" not in done.output and not (tmp_path / "run").exists()
