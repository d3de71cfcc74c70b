"""deploy/slurm.sbatch with a real Ray on two "nodes" of this machine; `srun` and `scontrol` alone pretend."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from async_rlhf.audit import audit
from async_rlhf.checkpoints import newest
from async_rlhf.state import read_state
from tests.support.command import CHECKOUT, environment, summary_of
from tests.support.deployment import DEPLOY

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1200)]

SRUN = """
while [[ "$1" == --* ]]; do
  case "$1" in --nodelist=*) IFS=, read -ra nodes <<<"${1#*=}" ;; esac
  shift
done
port() { python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }
trap 'kill $(jobs -p) 2>/dev/null; wait' TERM
for node in "${nodes[@]}"; do
  own=(--dashboard-agent-listen-port="$(port)" --object-store-memory=200000000)
  case "$*" in *--head*) own+=(--dashboard-port="$(port)" --ray-client-server-port="$(port)") ;; esac
  echo "$node: $*" >>"$SHIMS/calls"
  "$@" "${own[@]}" >>"$SHIMS/$node.log" 2>&1 &
done
wait
"""
SCONTROL = """
if [ "$1" = show ]; then printf "%s\\n" node1 node2; else echo "scontrol $*" >>"$SHIMS/calls"; fi
"""


class Slurm:
    """A job of two nodes with one CPU each; it keeps its number when it queues again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder / "shared" / "run"
        programs = folder / "programs"
        programs.mkdir()
        for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
            (programs / name).write_text(f"#!/usr/bin/env bash\n{text}")
            (programs / name).chmod(0o755)
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = str(probe.getsockname()[1])
        env = {name: value for name, value in environment().items() if not name.startswith("SLURM_") and name != "PYTHONPATH"}
        path = os.pathsep.join((str(programs), str(Path(sys.executable).parent), os.environ["PATH"]))
        # Numbers of real jobs are smaller: the session folder in /tmp is nobody else's.
        self.number = str(10**9 + os.getpid())
        env |= {"SHIMS": str(folder), "PATH": path, "RAY_PORT": port, "RUN_DIR": str(self.run), "SLURM_SUBMIT_DIR": str(CHECKOUT)}
        env |= {"SLURM_JOB_ID": self.number, "SLURM_JOB_NAME": "test", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "1"}
        self.env = env

    def start(self, *words: str) -> "subprocess.Popen[bytes]":
        """The batch step."""
        with (self.folder / "output").open("a") as output:
            line = ["bash", DEPLOY / "slurm.sbatch", *words]
            return subprocess.Popen(line, env=self.env, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)

    @property
    def output(self) -> str:
        """Everything that the job has said, over all its starts."""
        logs = [self.folder / "output", *sorted(self.folder.glob("node*.log"))]
        return "\n".join(log.read_text() for log in logs if log.exists())

    @property
    def calls(self) -> list[str]:
        """What was asked of Slurm."""
        return (self.folder / "calls").read_text().splitlines()


def test_job_at_the_end_of_its_time_makes_a_checkpoint_queues_again_and_goes_on_to_the_end(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path)
    words = ("conf/quickstart.yaml", "updates=20", "batch_groups=16", "task.held_out=50", "checkpoint.every_updates=0")
    processes: list[subprocess.Popen[bytes]] = []
    try:
        processes.append(slurm.start(*words))
        ends = time.monotonic() + 600
        while "update 3/20" not in slurm.output:
            assert processes[0].poll() is None and time.monotonic() < ends, slurm.output
            time.sleep(0.2)
        processes[0].send_signal(signal.SIGUSR1)
        code = processes[0].wait(timeout=400)
        checkpoint, _ = newest(slurm.run)

        assert code == 143, slurm.output
        assert [call.split()[0] for call in slurm.calls if "ray start" in call] == ["node1:", "node2:"]
        assert f"scontrol requeue {slurm.number}" in slurm.calls
        assert (summary_of(slurm.run)["exit"], read_state(slurm.run).phase) == ("terminated", "interrupted")
        assert checkpoint is not None and checkpoint.version >= 3
        assert [path.name for path in slurm.run.parent.iterdir()] == ["run"], "the token is gone"

        processes.append(slurm.start(*words))
        assert processes[1].wait(timeout=600) == 0, slurm.output
        assert summary_of(slurm.run)["exit"] == "success"
        assert "going on with it, by its own settings" in slurm.output
        found = audit(slurm.run)
        assert found.problems == () and found.updates == 20
        assert sum("requeue" in call for call in slurm.calls) == 1
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait(timeout=180)
        shutil.rmtree(f"/tmp/ray-{slurm.number}", ignore_errors=True)
