"""Faults of what lies below the run: a node, Ray's head, the object store, the disk. Real runs of the command line."""

import json
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from async_rlhf.audit import audit
from tests.support.command import CHECKOUT, command, environment, rows_of, run_cli, summary_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SMALL = ("conf/quickstart.yaml", "batch_groups=16", "completions_per_prompt=2", "task.held_out=50", "checkpoint.every_updates=5")
QUICK = ("supervision.ping_s=1", "supervision.silence_s=10", "supervision.max_restarts=50", "supervision.max_backoff_s=2")


@contextmanager
def driver(log: Path, *words: str, **env: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A running `async-rlhf WORDS`, killed at the exit if it is still there."""
    with log.open("w") as stream:
        process = subprocess.Popen(
            command(*words),
            cwd=CHECKOUT,
            env={**environment(), **env},
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_for(what: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path, timeout_s: float = 120) -> None:
    ends = time.monotonic() + timeout_s
    while not what():
        assert process.poll() is None and time.monotonic() < ends, f"it never came so far:\n{log.read_text()[-3000:]}"
        time.sleep(0.2)


def descendant(process: "subprocess.Popen[bytes]", title: str) -> psutil.Process:
    """The one process below the driver whose command line holds `title`."""
    below = psutil.Process(process.pid).children(recursive=True)
    return next(child for child in below if title in " ".join(child.cmdline()))


def has_rows(folder: Path, count: int) -> Callable[[], bool]:
    return lambda: (folder / "metrics.jsonl").is_file() and len(rows_of(folder)) >= count


HOG = """
import json, os, sys
entry = json.load(open(sys.argv[1]))
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=entry["token_path"])
import numpy as np, ray
ray.init(address=entry["address"], namespace="hog", log_to_driver=False)
held = [ray.put(np.full(5 << 20, i, dtype=np.uint8)) for i in range(40)]
assert all(int(ray.get(ref)[0]) == i for i, ref in enumerate(held))
print("full", flush=True)
sys.stdin.read()
"""


def test_a_full_object_store_spills_and_a_full_disk_ends_the_run_by_name_and_loses_nothing(tmp_path: Path) -> None:
    """Somebody else fills Ray's shared memory (80 MiB) more than twice over; later the journal may not grow any more."""
    folder, log = tmp_path / "run", tmp_path / "log"
    with driver(log, "train", *SMALL, "updates=400", f"run.dir={folder}", "run.object_store_mib=80") as process:
        wait_for(has_rows(folder, 3), process, log)
        arguments = [sys.executable, "-c", HOG, str(folder / "ray.json")]
        with subprocess.Popen(arguments, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as hog:
            assert hog.stdout is not None and hog.stdin is not None
            assert hog.stdout.readline().strip() == "full"
            wait_for(has_rows(folder, len(rows_of(folder)) + 5), process, log)
            hog.stdin.close()
        queue = descendant(process, "ReplayQueue")
        written = max(path.stat().st_size for path in (folder / "journal").glob("segment-*"))
        queue.rlimit(resource.RLIMIT_FSIZE, (written + 1000, written + 1000))
        assert process.wait(timeout=120) == 1

    assert "cannot write the journal: no space" in summary_of(folder)["error"]
    resumed = run_cli("resume", str(folder), f"updates={len(rows_of(folder)) + 5}")
    assert resumed.code == 0, resumed.output
    assert audit(folder).problems == ()


@pytest.mark.long
def test_without_rays_head_the_run_ends_with_that_reason_and_can_be_resumed(tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    with driver(log, "train", *SMALL, "updates=400", f"run.dir={folder}", "generator.max_inflight=32") as process:
        wait_for(has_rows(folder, 6), process, log)
        descendant(process, "gcs_server").kill()
        assert process.wait(timeout=120) == 1
    assert summary_of(folder)["exit"] == "failed"
    assert "Ray's head" in summary_of(folder)["error"]

    trained = len(rows_of(folder))
    resumed = run_cli("resume", str(folder), f"updates={trained + 5}")
    assert resumed.code == 0, resumed.output
    assert audit(folder).problems == ()


@contextmanager
def two_nodes(folder: Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A Ray cluster of two nodes on this host, in a process of its own: `lose` ends the second one, `add` brings a third."""
    script = textwrap.dedent(
        """
        import sys
        from ray.cluster_utils import Cluster
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
        second = cluster.add_node(num_cpus=2)
        print(cluster.address, flush=True)
        for line in sys.stdin:
            if line.strip() == "lose":
                cluster.remove_node(second, allow_graceful=False)
            elif line.strip() == "add":
                cluster.add_node(num_cpus=2)
            print("done", flush=True)
        cluster.shutdown()
        """
    )
    (folder / "ray").mkdir()
    checks = {"period_ms": "1000", "failure_threshold": "3", "timeout_ms": "2000"}
    env = {**environment(), "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": str(folder)}
    env |= {f"RAY_health_check_{name}": value for name, value in checks.items()}
    with subprocess.Popen(
        [sys.executable, "-c", script], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as cluster:
        assert cluster.stdout is not None and cluster.stdin is not None
        try:
            yield cluster, cluster.stdout.readline().strip()
        finally:
            cluster.stdin.close()
            cluster.wait(timeout=60)


@pytest.mark.long
def test_a_lost_node_costs_no_sample_and_the_run_goes_on_with_the_other_generator_until_there_is_room_again() -> None:
    """Each node holds one generator (2 CPUs) at most; the learner rank has the third CPU of the node that stays."""
    base = Path(tempfile.mkdtemp(prefix="2n-"))  # short: sockets inside may not have long paths
    folder, log = base / "run", base / "log"
    words = (*SMALL, *QUICK, "updates=100000", f"run.dir={folder}", "generator.count=2", "generator.num_cpus=2", "scorer.num_cpus=0")

    def incidents() -> list[tuple[str, str]]:
        file = folder / "incidents.jsonl"
        entries = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        return [(entry["event"], entry["name"].partition("-")[0]) for entry in entries]

    with two_nodes(base) as (cluster, address), driver(log, "train", *words, RAY_ADDRESS=address, RAY_AUTH_MODE="disabled") as process:

        def order(word: str) -> None:
            assert cluster.stdin is not None and cluster.stdout is not None
            cluster.stdin.write(f"{word}\n")
            cluster.stdin.flush()
            assert cluster.stdout.readline().strip() == "done"

        wait_for(has_rows(folder, 6), process, log)
        order("lose")
        wait_for(lambda: ("no_room", "generator") in incidents(), process, log)
        wait_for(has_rows(folder, len(rows_of(folder)) + 10), process, log)
        assert "lost: the cluster has no room for it" in run_cli("status", str(folder)).output
        order("add")
        wait_for(lambda: ("back", "generator") in incidents(), process, log)
        wait_for(has_rows(folder, len(rows_of(folder)) + 3), process, log)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=100) == 130, log.read_text()[-4000:]
    assert audit(folder).problems == ()
