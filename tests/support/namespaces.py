"""Hosts on one host: network namespaces behind a bridge, each with an address of its own, so that loopback reaches nobody else."""

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.programs import program

SUBNET = "10.77.0"


class Host:
    """One namespace."""

    def __init__(self, ip: Path, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self._ip = ip

    def line(self, *words: str) -> list[str]:
        """The command line that runs `words` there."""
        return [str(self._ip), "netns", "exec", self.name, *words]


@contextmanager
def hosts(count: int) -> Iterator[Sequence[Host]]:
    """That many; the first one holds the bridge. Skips the test where namespaces cannot be made."""
    ip = program("ip")
    if os.geteuid() != 0:
        pytest.skip("network namespaces take root")
    made = [Host(ip, f"arlhf-{os.getpid()}-{index}", f"{SUBNET}.{index + 1}") for index in range(count)]
    with ExitStack() as stack:
        for host in made:
            done = subprocess.run([ip, "netns", "add", host.name], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"this machine lets nobody make network namespaces: {done.stderr.strip()}")
            stack.callback(subprocess.run, [ip, "netns", "del", host.name], check=True)
            _in(host, "link set lo up")
        first = made[0]
        _in(first, "link add bridge0 type bridge", "link set bridge0 up", f"addr add {first.address}/24 dev bridge0")
        for index, host in enumerate(made[1:]):
            _in(first, f"link add port{index} type veth peer name eth0 netns {host.name}")
            _in(first, f"link set port{index} master bridge0", f"link set port{index} up")
            _in(host, f"addr add {host.address}/24 dev eth0", "link set eth0 up")
        yield made


def _in(host: Host, *orders: str) -> None:
    for order in orders:
        subprocess.run(host.line("ip", *order.split()), check=True, capture_output=True)
