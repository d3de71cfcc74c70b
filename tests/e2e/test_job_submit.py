"""`ray job submit` against a local head, with nothing but the checkout."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.command import CHECKOUT, Finished, environment, ray_processes, summary_of, wait_gone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Head:
    """A Ray head as a user starts it."""

    dashboard: str
    env: dict[str, str]

    def submit(self, *words: str) -> Finished:
        """`ray job submit ... -- python -m async_rlhf WORDS`, followed to its end."""
        line = ["ray", "job", "submit", "--address", self.dashboard, "--working-dir", ".", "--", "python", "-m", "async_rlhf", *words]
        ends = time.monotonic() + 90
        while True:
            done = subprocess.run(line, cwd=CHECKOUT, env=self.env, capture_output=True, text=True, timeout=300)
            # The dashboard answers before the head's job agent has come up; nothing was submitted then.
            if "No available agent" not in done.stderr or time.monotonic() > ends:
                return Finished(done.returncode, done.stdout + done.stderr)
            time.sleep(2)


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2)
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head with two CPUs and token authentication, in a session folder of its own."""
    before = ray_processes()
    folder = Path(tempfile.mkdtemp(prefix="rj-"))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    port, dashboard, agent = free_port(), free_port(), free_port()
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    env = {**environment(), "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    del env["PYTHONPATH"]
    line = ["ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2"]
    # The agent takes the jobs, and has one port for the whole machine unless it is told another.
    line += [f"--temp-dir={folder}", "--object-store-memory=300000000", f"--dashboard-agent-listen-port={agent}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(line, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    try:
        ends = time.monotonic() + 90
        while not answers(f"http://127.0.0.1:{dashboard}/api/version"):
            assert process.poll() is None and time.monotonic() < ends, (folder / "log").read_text()
            time.sleep(0.5)
        yield Head(dashboard=f"http://127.0.0.1:{dashboard}", env=env)
    finally:
        process.terminate()
        process.wait(timeout=60)
        left = wait_gone(before, 30)
        shutil.rmtree(folder, ignore_errors=True)
    assert not left, "the head left processes behind"


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """The head outlives each test of this module; its fixture looks at the end."""


def test_a_submitted_job_trains_and_its_log_shows_the_progress(head: Head, tmp_path: Path) -> None:
    done = head.submit("train", "conf/quickstart.yaml", f"run.dir={tmp_path / 'run'}", "updates=3", "batch_groups=16")

    assert done.code == 0, done.output
    assert "joining Ray" in done.output and "update 3/3" in done.output and "succeeded" in done.output
    assert summary_of(tmp_path / "run")["exit"] == "success"


def test_a_failing_run_fails_the_job(head: Head, tmp_path: Path) -> None:
    done = head.submit("train", "conf/quickstart.yaml", f"run.dir={tmp_path / 'run'}", "max_stalenes=1")

    assert done.code != 0
    assert "did you mean 'max_staleness'" in done.output and "failed" in done.output


def test_a_cluster_that_is_too_small_is_refused_with_the_numbers(head: Head, tmp_path: Path) -> None:
    done = head.submit("train", "conf/quickstart.yaml", f"run.dir={tmp_path / 'run'}", "generator.count=8")

    assert done.code != 0
    assert "8 generators x 1 CPU (together 9 CPU); the Ray cluster has 2 CPU and 0 GPU" in done.output


@pytest.mark.long
def test_a_submitted_stage_joins_the_cluster_and_shows_its_progress(head: Head, tmp_path: Path) -> None:
    sizes = ("model.hidden_size=32", "model.num_layers=1", "model.num_heads=2", "model.intermediate_size=64")
    words = (
        "task.max_operand=6",
        "task.held_out=20",
        "sft.batch_size=16",
        "sft.learning_rate=1e-2",
        "sft.eval_every=5",
        "sft.max_steps=300",
    )
    done = head.submit("sft", *sizes, *words, "sft.target_accuracy=0.35", "--out", str(tmp_path / "start"))
    refused = head.submit("sft", *sizes, *words, "sft.num_cpus=8", "--out", str(tmp_path / "other"))

    assert done.code == 0 and "sft step 5: loss" in done.output and f"start: {tmp_path / 'start'} (held-out accuracy" in done.output, (
        done.output
    )
    assert (tmp_path / "start" / "model.safetensors").is_file()
    assert refused.code != 0
    assert (
        "the run asks for 1 sft x 8 CPU; the Ray cluster has 2 CPU and 0 GPU: no node has 8 CPU for one sft; lower the stage"
        in refused.output
    )
