"""Faults of what lies below the run: a node, Ray's head, the object store, the disk. Real runs of the command line."""

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from async_rlhf.audit import audit
from async_rlhf.recorder import read_rows
from tests.support.cluster import OPEN, several_nodes
from tests.support.command import driver, environment, has_rows, rows_of, run_cli, summary_of, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SMALL = ("conf/quickstart.yaml", "batch_groups=16", "completions_per_prompt=2", "task.held_out=50", "checkpoint.every_updates=5")
QUICK = ("supervision.ping_s=1", "supervision.silence_s=10", "supervision.max_restarts=50", "supervision.max_backoff_s=2")


def descendant(process: "subprocess.Popen[bytes]", title: str) -> psutil.Process:
    """The one process below the driver whose command line holds `title`."""
    below = psutil.Process(process.pid).children(recursive=True)
    return next(child for child in below if title in " ".join(child.cmdline()))


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


@pytest.mark.long
def test_a_full_object_store_spills_and_a_full_disk_ends_the_run_by_name_and_loses_nothing(tmp_path: Path) -> None:
    """Somebody else fills Ray's shared memory (80 MiB) more than twice over; later the journal may not grow any more."""
    folder, log = tmp_path / "run", tmp_path / "log"
    with driver(log, "train", *SMALL, "updates=400", f"run.dir={folder}", "run.object_store_mib=80") as process:
        wait_for(has_rows(folder, 3), process, log)
        arguments = [sys.executable, "-c", HOG, str(folder / "ray.json")]
        with subprocess.Popen(arguments, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as hog:
            assert hog.stdout is not None and hog.stdin is not None
            assert hog.stdout.readline().strip() == "full"
            wait_for(has_rows(folder, len(read_rows(folder)) + 5), process, log)
            hog.stdin.close()
        queue = descendant(process, "ReplayQueue")
        written = max(path.stat().st_size for path in (folder / "journal").glob("segment-*"))
        queue.rlimit(resource.RLIMIT_FSIZE, (written + 1000, written + 1000))
        assert process.wait(timeout=400) == 1

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
        assert process.wait(timeout=400) == 1
    assert summary_of(folder)["exit"] == "failed"
    assert "Ray's head" in summary_of(folder)["error"]

    trained = len(rows_of(folder))
    resumed = run_cli("resume", str(folder), f"updates={trained + 5}")
    assert resumed.code == 0, resumed.output
    assert audit(folder).problems == ()


@pytest.mark.long
def test_a_lost_node_costs_no_sample_and_the_run_goes_on_with_the_other_generator_until_there_is_room_again(tmp_path: Path) -> None:
    """Each node holds one generator (2 CPUs) at most; the learner rank has the third CPU of the node that stays."""
    folder, log = tmp_path / "run", tmp_path / "log"
    words = (*SMALL, *QUICK, "updates=100000", f"run.dir={folder}", "generator.count=2", "generator.num_cpus=2", "scorer.num_cpus=0")

    def incidents() -> list[tuple[str, str]]:
        file = folder / "incidents.jsonl"
        entries = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        return [(entry["event"], entry["name"].partition("-")[0]) for entry in entries]

    with (
        several_nodes({"num_cpus": 3}, {"num_cpus": 2}) as nodes,
        driver(log, "train", *words, **OPEN, RAY_ADDRESS=nodes.address) as process,
    ):
        wait_for(has_rows(folder, 6), process, log)
        nodes.lose(1)
        wait_for(lambda: ("no_room", "generator") in incidents(), process, log)
        wait_for(has_rows(folder, len(read_rows(folder)) + 10), process, log)
        assert "lost: the cluster has no room for it" in run_cli("status", str(folder)).output
        nodes.add(num_cpus=2)
        wait_for(lambda: ("back", "generator") in incidents(), process, log)
        wait_for(has_rows(folder, len(read_rows(folder)) + 3), process, log)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=400) == 130, log.read_text()[-4000:]
    assert audit(folder).problems == ()
