"""The real Weights & Biases, offline: what it was given can be read back from its own transaction log."""

import json
from pathlib import Path

import pytest

from async_rlhf.config import load_config
from async_rlhf.recorder import Recorder, without_secrets
from async_rlhf.wandb_sink import WandbSink

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

HEADER_BYTES, BLOCK_BYTES, RECORD_HEADER_BYTES = 7, 32768, 7
SECRET = "hunter2"


def records_of(file: Path):
    """The records of a transaction log, which is in LevelDB's log format: (checksum, length, kind) and a piece of a record, in blocks."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, pieces = file.read_bytes(), HEADER_BYTES, b""
    assert content.startswith(b":W&B")
    while position + RECORD_HEADER_BYTES <= len(content):
        room = BLOCK_BYTES - position % BLOCK_BYTES
        if room < RECORD_HEADER_BYTES:
            position += room
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        pieces += content[position + RECORD_HEADER_BYTES : position + RECORD_HEADER_BYTES + length]
        position += RECORD_HEADER_BYTES + length
        if kind in (1, 4):  # whole, or the last piece
            record = Record()
            record.ParseFromString(pieces)
            yield record
            pieces = b""


def record(folder: Path, versions: range) -> None:
    """A driver's part of a run."""
    settings = ["run.wandb.mode=offline", "run.wandb.close_s=90", "run.wandb.project=mine", f"env.OPENAI_API_KEY={SECRET}", "seed=7"]
    config = without_secrets(load_config(overrides=settings).config)
    recorder = Recorder(folder, {"wandb": lambda: WandbSink(folder, config)})
    recorder.cut_after(versions.start - 1)
    for version in versions:
        recorder.write({"update": version - 1, "version": version, "train/loss": 1 / version})
    recorder.write_incident({"event": "lost", "name": "generator-0", "cause": f"its reward said {SECRET}"})
    recorder.close()


def test_rows_config_and_incidents_are_in_its_log_under_one_run_id_and_no_secret_is(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()

    record(folder, range(1, 4))
    record(folder, range(3, 5))

    logs = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(logs) == 2, (folder / "wandb" / "writer.log").read_text()
    of_drivers = [list(records_of(log)) for log in logs]
    runs = [next(each.run for each in records if each.HasField("run")) for records in of_drivers]
    assert runs[0].run_id == runs[1].run_id == (folder / "wandb" / "run-id").read_text()
    assert (runs[0].project, runs[0].display_name) == ("mine", "run")
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["seed"] == 7 and config["env"]["OPENAI_API_KEY"] == "***"
    rows = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in each.history.item}
        for records in of_drivers
        for each in records
        if each.HasField("history")
    ]
    assert [(row["version"], row["train/loss"]) for row in rows] == [(version, pytest.approx(1 / version)) for version in (1, 2, 3, 3, 4)]
    assert not [file for file in (folder / "wandb").rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()]
    assert [row["version"] for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())] == [1, 2, 3, 4]
    assert any("generator-0" in item.value_json for each in of_drivers[1] if each.HasField("summary") for item in each.summary.update)
