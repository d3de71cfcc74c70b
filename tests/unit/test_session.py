"""Before Ray is imported: which Ray a run belongs to."""

import socket
from pathlib import Path

import pytest

from actors import session
from async_rlhf.errors import RunError


def test_a_head_that_takes_connections_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{head.getsockname()[1]}")
        assert session.open_session() is None


@pytest.mark.parametrize(
    "address", ["127.0.0.1:{free}", "no-such-host.invalid:6379", "127.0.0.1:99999"], ids=["nobody", "no host", "no port"]
)
def test_a_head_that_is_not_there_is_an_error_and_no_silence(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as used:
        free = used.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", address.format(free=free))
    with pytest.raises(RunError, match=r"no Ray head answers at RAY_ADDRESS=.*is the address right and the cluster up"):
        session.open_session()


def test_the_head_of_our_own_ray_remembers_a_bounded_number_of_calls_or_as_many_as_the_user_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    environment = {"RAY_task_events_max_num_task_in_gcs": "7"}
    monkeypatch.setattr("os.environ", environment)

    assert session.open_session() is not None

    bounds = {name: value for name, value in environment.items() if name.startswith("RAY_task_events_")}
    assert bounds == {
        "RAY_task_events_max_num_task_in_gcs": "7",
        "RAY_task_events_max_dropped_task_attempts_tracked_per_job_in_gcs": "5000",
    }


@pytest.mark.parametrize("name", ["RAY_free_objects_period_milliseconds", "RAY_worker_niceness"])
@pytest.mark.parametrize("wanted", [None, "500"], ids=["by default", "as the user says"])
def test_our_own_ray_frees_memory_at_once_and_keeps_its_workers_niceness_low_unless_the_user_says_otherwise(
    name: str, wanted: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    environment = {} if wanted is None else {name: wanted}
    monkeypatch.setattr("os.environ", environment)

    session.open_session()

    assert environment[name] == (wanted or "0")
