"""Whole runs on several nodes, all of them on this host: ranks and generator apart, weights crossing between them, a node lost."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from async_rlhf.audit import audit
from tests.support.cluster import OPEN, several_nodes
from tests.support.command import CHECKOUT, command, driver, environment, has_rows, rows_of, summary_of, wait_for
from tests.support.namespaces import Host, hosts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SMALL = (
    *("conf/quickstart.yaml", "batch_groups=8", "completions_per_prompt=2", "task.held_out=20", "checkpoint.every_updates=5"),
    *("generator.engine=transformers", "generator.max_inflight=16", "learner.num_ranks=2", "learner.zero_stage=2"),
    *("supervision.ping_s=1", "supervision.silence_s=10"),
)


def test_a_run_on_three_nodes_loses_one_and_trains_every_sample_exactly_once(tmp_path: Path) -> None:
    """Two CPUs for the generator are on the second node alone; the ranks have the head and the third node, which is lost."""
    folder, log = tmp_path / "run", tmp_path / "log"
    words = (*SMALL, "generator.num_cpus=2", "updates=30", f"run.dir={folder}")
    with (
        several_nodes({"num_cpus": 1}, {"num_cpus": 2}, {"num_cpus": 1}) as nodes,
        driver(log, "train", *words, **OPEN, RAY_ADDRESS=nodes.address) as process,
    ):
        wait_for(has_rows(folder, 7), process, log)
        nodes.lose(2)
        incidents = folder / "incidents.jsonl"
        wait_for(incidents.is_file, process, log)
        nodes.add(num_cpus=1)
        assert process.wait(timeout=600) == 0, log.read_text()[-4000:]

    assert [row["version"] for row in rows_of(folder)] == list(range(1, 31))
    found = audit(folder)
    assert found.problems == () and (found.lost, found.duplicated, found.bound_violations) == (0, 0, 0)
    told = [json.loads(line) for line in incidents.read_text().splitlines()]
    lost = {entry["name"] for entry in told if entry["event"] == "lost"}
    assert "learner" in lost and not lost & {"replay_queue", "training_state"}, "queue and state are on the driver's node"
    assert summary_of(folder)["restarts"]["learner"] >= 1


@contextmanager
def ray_on(hosts: Sequence[Host], folder: Path, private: Path, *num_cpus: int) -> Iterator[str]:
    """A node of one Ray cluster on each host; the last one sees an empty disk of its own at `private`. Yields the head's address."""
    address = f"{hosts[0].address}:6379"
    env = {**environment(), **OPEN, "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))}
    with ExitStack() as stack:
        for index, (host, cpus) in enumerate(zip(hosts, num_cpus, strict=True)):
            line = ["ray", "start", "--block", f"--node-ip-address={host.address}", f"--num-cpus={cpus}", "--object-store-memory=200000000"]
            line += [f"--address={address}"] if index else ["--head", "--port=6379", f"--temp-dir={folder}", "--include-dashboard=false"]
            if index == len(hosts) - 1:
                line = ["sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(private), *line]
            log = folder / f"node-{index}.log"
            with log.open("w") as stream:
                process = subprocess.Popen(host.line(*line), env=env, stdout=stream, stderr=subprocess.STDOUT, cwd=folder)
            stack.callback(process.wait, 60)
            stack.callback(process.terminate)
            wait_for(lambda: "Ray runtime started" in log.read_text(), process, log)  # noqa: B023
        yield address


@pytest.mark.long
def test_a_run_crosses_hosts_whose_addresses_and_loopbacks_are_their_own_but_not_disks(tmp_path: Path) -> None:
    """Two ranks on two hosts, over gloo; vLLM on a third; the driver, the queue and the scorer on the first."""
    folder, private = tmp_path / "run", tmp_path / "private"
    private.mkdir()
    ray_folder = Path(tempfile.mkdtemp(prefix="ns-"))  # short: sockets inside may not have long paths
    words = (*SMALL, "generator.engine=vllm", "generator.num_cpus=2", "updates=6")
    try:
        with hosts(3) as made, ray_on(made, ray_folder, private, 1, 2, 1) as address:

            def train(run: Path) -> tuple[int, str]:
                """Exit code and output of a run that the first host drives."""
                line, env = made[0].line(*command("train", *words, f"run.dir={run}")), {**environment(), **OPEN, "RAY_ADDRESS": address}
                done = subprocess.run(line, cwd=CHECKOUT, env=env, capture_output=True, text=True, timeout=500)
                return done.returncode, done.stdout + done.stderr

            code, output = train(folder)
            refused, why = train(private / "run")
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)

    assert code == 0, output[-4000:]
    assert len(rows_of(folder)) == 6 and audit(folder).problems == ()
    assert list(folder.glob(".probe*")) == []
    assert refused == 2 and f"node {made[2].address} does not see run.dir {private / 'run'}" in why, why[-4000:]
