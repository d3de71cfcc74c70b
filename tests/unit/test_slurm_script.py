"""deploy/slurm.sbatch between programs that only pretend: what it starts where, whom it tells to stop, and when the job queues again."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.deployment import DEPLOY

RECORD = 'echo "$(basename "$0") $*" >>"$SHIMS/calls"\n'
SRUN = (
    RECORD
    + """
case "$*" in
  *" rm "*) exit "${RM_CODE:-0}" ;;
  *) exec sleep 60 ;;
esac
"""
)
SCONTROL = f"""
{RECORD}
if [ "$1" != requeue ]; then
  printf "%s\\n" node1 node2 node3
else
  [ -e "$RAY_AUTH_TOKEN_PATH" ] && echo "the token is still there" >>"$SHIMS/calls"
  kill -KILL "$PPID"
fi
"""
"""A job that is to queue again is killed on the spot."""
PYTHON = """
case "$*" in
  *token_hex*) echo -n 0123456789abcdef ;;
  *get_node_ip_address*) echo 192.0.2.7 ;;
  -m*)
    stat -c "%a %n" "$RAY_AUTH_TOKEN_PATH" >"$SHIMS/token"
    echo "driver $RAY_ADDRESS $RAY_AUTH_MODE $*" >>"$SHIMS/calls"
    trap 'echo told >>"$SHIMS/calls"; touch "$SHIMS/told"; sleep 0.2; exit 143' TERM
    [ -z "${DRIVER_CODE:-}" ] || exit "$DRIVER_CODE"
    touch "$SHIMS/driving"
    while :; do sleep 0.05; done ;;
  *) # waits for as many nodes as it is told: the head, or all, by one more step
    cat >/dev/null
    until [ "$(grep -c " ray start " "$SHIMS/calls" 2>/dev/null)" -ge "$(($2 > 1 ? 2 : 1))" ]; do sleep 0.02; done ;;
esac
"""


class Job:
    """The script as Slurm's batch step starts it, on three nodes."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder = folder
        programs = folder / ".venv" / "bin"
        programs.mkdir(parents=True)
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": PYTHON}.items():
            (programs / name).write_text(f"#!/bin/bash\n{text}")
            (programs / name).chmod(0o755)
        env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
        env |= {"SHIMS": str(folder), "SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "4217", "SLURM_JOB_NAME": "mine"}
        env |= {
            "SLURM_JOB_NODELIST": "node[1-3]",
            "SLURM_JOB_NUM_NODES": "3",
            "SLURM_CPUS_PER_TASK": "8",
            "SLURM_GPUS_ON_NODE": "4",
            **variables,
        }
        self.output = folder / "output"
        line = ["/bin/bash", DEPLOY / "slurm.sbatch", "conf/quickstart.yaml", "updates=5"]
        with self.output.open("w") as output:
            self.process = subprocess.Popen(line, env=env, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)

    def when(self, name: str) -> "Job":
        """Wait until a program has left its mark."""
        ends = time.monotonic() + 30
        while not (self.folder / name).exists():
            assert self.process.poll() is None and time.monotonic() < ends, self.output.read_text()
            time.sleep(0.02)
        return self

    def end(self) -> int:
        """Its exit code."""
        return self.process.wait(timeout=30)

    @property
    def calls(self) -> list[str]:
        """Command lines in the order in which they came."""
        return (self.folder / "calls").read_text().splitlines()


Start = Callable[..., Job]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    jobs: list[Job] = []

    def begin(**variables: str) -> Job:
        jobs.append(Job(tmp_path, **variables))
        return jobs[0]

    yield begin
    for job in jobs:
        if job.process.poll() is None:
            job.process.kill()
            job.process.wait()


def test_head_starts_on_the_first_node_the_workers_on_the_others_and_then_the_driver(start: Start) -> None:
    job = start(DRIVER_CODE="0")

    assert job.end() == 0
    starts = [call for call in job.calls if " ray start " in call]
    head, workers = sorted(starts, key=lambda call: "--head" not in call)
    (driver,) = [call for call in job.calls if call.startswith("driver")]
    assert "--nodes=1 --nodelist=node1 " in head and "--num-gpus=4" in head and "--head --node-ip-address=192.0.2.7 --port=24217" in head
    assert "--nodes=2 --nodelist=node2,node3 " in workers and "--num-cpus=8" in workers and "--address=192.0.2.7:24217" in workers
    assert driver.startswith("driver 192.0.2.7:24217 token -m async_rlhf train timeouts.stop_s=120 conf/quickstart.yaml updates=5 run.dir=")
    assert driver.endswith("/runs/mine-4217 --resume")


def test_token_is_readable_for_its_user_alone_and_is_gone_afterwards(start: Start, tmp_path: Path) -> None:
    job = start(DRIVER_CODE="0")
    job.end()
    mode, _, path = (tmp_path / "token").read_text().strip().partition(" ")

    assert mode == "600" and not Path(path).parent.exists()
    assert not any("0123456789abcdef" in call for call in job.calls), "a token in a command line is there for all to see"


@pytest.mark.parametrize(
    ("signum", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)], ids=["end of its time", "stopped by its user"]
)
def test_signal_stops_the_driver_and_only_the_end_of_its_time_queues_the_job_again(
    start: Start, signum: signal.Signals, requeued: bool
) -> None:
    job = start().when("driving")

    job.process.send_signal(signum)

    assert job.end() == (-signal.SIGKILL if requeued else 143), "the driver's own exit code, unless the job goes back to the queue"
    assert job.calls.count("told") == 1
    assert ("scontrol requeue 4217" in job.calls) == requeued
    assert "the token is still there" not in job.calls


def test_user_who_stops_the_job_before_its_time_is_up_has_the_last_word(start: Start) -> None:
    job = start().when("driving")

    job.process.send_signal(signal.SIGTERM)
    job.when("told")
    job.process.send_signal(signal.SIGUSR1)

    assert job.end() == 143
    assert job.calls.count("told") == 1 and not any("requeue" in call for call in job.calls)


@pytest.mark.parametrize("code", ["1", "2"])
def test_run_that_failed_fails_the_job_and_does_not_queue_again(start: Start, code: str) -> None:
    job = start(DRIVER_CODE=code)

    assert job.end() == int(code)
    assert not any("requeue" in call for call in job.calls)


@pytest.mark.parametrize("rm_code", ["0", "1"], ids=["done", "a node is gone"])
def test_session_folder_of_ray_goes_from_every_node_once_ray_has_ended(start: Start, rm_code: str) -> None:
    job = start(DRIVER_CODE="0", RM_CODE=rm_code)

    assert job.end() == 0
    assert job.calls[-1] == "srun --overlap --ntasks-per-node=1 --cpus-per-task=8 --nodes=3 rm -rf /tmp/ray-4217"
    assert sum(" rm " in call for call in job.calls) == 1


def test_nothing_of_the_job_is_left_when_it_ends(start: Start, tmp_path: Path) -> None:
    job = start().when("driving")
    job.process.send_signal(signal.SIGTERM)
    job.end()

    left = [process.cmdline() for process in psutil.process_iter() if environment_of(process).get("SHIMS") == str(tmp_path)]
    assert left == []


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:  # it has ended, or is another user's
        return {}
