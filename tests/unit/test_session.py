"""Before Ray is imported: which Ray a run belongs to."""

import socket

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
