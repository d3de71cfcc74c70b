"""`ray job submit` against a local head, with nothing but the checkout: the users' daily path, by the commands of the documentation."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from async_rlhf.audit import audit
from async_rlhf.checkpoints import newest
from async_rlhf.state import read_state
from tests.support.command import CHECKOUT, Finished, environment, ray_processes, rows_of, summary_of, wait_gone
from tests.support.deployment import TINY, entrypoint_words
from tests.support.http_server import free_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SMALL = ("conf/quickstart.yaml", "batch_groups=16", "task.held_out=50", "checkpoint.every_updates=0")
SLOW_EVALUATION = """
import time
from pathlib import Path

from async_rlhf.tasks.arithmetic import score as right


def score(prompts, completions, **columns):
    folder = Path(__file__).parent
    if prompts[:1] != prompts[1:2]:  # one completion per prompt: an evaluation
        (folder / "evaluating").open("a").write("x")
        if (folder / "slow").exists():
            time.sleep(120)
    return right(prompts, completions, **columns)
"""


def job_of(done: Finished) -> str:
    """The id of a job that was submitted. What a job said last is in its log: a follower may lose the last lines of one that fails."""
    return next(word.strip("'") for word in done.output.split() if word.strip("'").startswith("raysubmit_"))


@dataclass(frozen=True)
class Head:
    """A Ray head as a user starts it, and the user's shell beside it."""

    dashboard: str
    env: dict[str, str]

    def run(self, *words: str) -> Finished:
        """A command in a shell on the head."""
        done = subprocess.run(words, cwd=CHECKOUT, env=self.env, capture_output=True, text=True, timeout=900)
        return Finished(done.returncode, done.stdout + done.stderr)

    def submit(self, *words: str) -> Finished:
        """`deploy/submit.sh WORDS`: followed to its end, unless `--no-wait` comes first."""
        ends = time.monotonic() + 300
        while True:
            done = self.run("deploy/submit.sh", *words)
            # The dashboard answers before the head's job agent has come up; nothing was submitted then.
            if "No available agent" not in done.output or time.monotonic() > ends:
                return done
            time.sleep(2)

    def start(self, *words: str) -> str:
        """Submit without waiting; returns the job's id."""
        done = self.submit("--no-wait", *words)
        assert done.code == 0, done.output
        return job_of(done)

    def job(self, job: str) -> dict[str, Any]:
        """What Ray's own interface says of a job."""
        token = Path(self.env["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = urllib.request.Request(f"{self.dashboard}/api/jobs/{job}", headers={"Authorization": f"Bearer {token}"})
        return json.load(urllib.request.urlopen(request, timeout=30))

    def logs(self, job: str) -> str:
        """What the job has written so far."""
        token = Path(self.env["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = urllib.request.Request(f"{self.dashboard}/api/jobs/{job}/logs", headers={"Authorization": f"Bearer {token}"})
        return json.load(urllib.request.urlopen(request, timeout=30))["logs"]

    def wait(self, job: str, seen: Callable[[], bool], timeout_s: float = 400) -> None:
        """Until `seen()`, while the job lives."""
        ends = time.monotonic() + timeout_s
        while not seen():
            assert self.job(job)["status"] in ("PENDING", "RUNNING") and time.monotonic() < ends, self.logs(job)
            time.sleep(0.3)

    def end(self, job: str, timeout_s: float = 400) -> tuple[str, int | None]:
        """Wait for the job's end: its status, and its driver's exit code where Ray kept that."""
        ends = time.monotonic() + timeout_s
        while (found := self.job(job))["status"] in ("PENDING", "RUNNING"):
            assert time.monotonic() < ends, self.logs(job)
            time.sleep(0.3)
        return found["status"], found["driver_exit_code"]


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
    port, dashboard, agent = free_ports(3)
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    url = f"http://127.0.0.1:{dashboard}"
    env = {**environment(), "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    del env["PYTHONPATH"]
    line = ["ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2"]
    # The agent takes the jobs, and has one port for the whole machine unless it is told another.
    line += [f"--temp-dir={folder}", "--object-store-memory=300000000", f"--dashboard-agent-listen-port={agent}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(line, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    try:
        ends = time.monotonic() + 300
        while not answers(f"{url}/api/version"):
            assert process.poll() is None and time.monotonic() < ends, (folder / "log").read_text()
            time.sleep(0.5)
        yield Head(dashboard=url, env={**env, "RAY_API_SERVER_ADDRESS": url})
    finally:
        process.terminate()
        process.wait(timeout=60)
        left = wait_gone(before)
        shutil.rmtree(folder, ignore_errors=True)
    assert not left, "the head left processes behind"


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """The head outlives each test of this module; its fixture looks at the end."""


def books(run: Path) -> tuple[str, int, str]:
    """Exit word and code of summary.json, phase of state.json."""
    summary = summary_of(run)
    return summary["exit"], summary["exit_code"], read_state(run).phase


def test_entrypoint_of_the_kuberay_job_trains_as_a_submitted_job_and_its_log_shows_the_progress(head: Head, tmp_path: Path) -> None:
    done = head.submit(*entrypoint_words(), *TINY, f"run.dir={tmp_path / 'run'}")

    assert done.code == 0, done.output
    assert "joining Ray" in done.output and "update 3/3" in done.output and "succeeded" in done.output
    assert books(tmp_path / "run") == ("success", 0, "finished")


@contextmanager
def followed(head: Head, job: str, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A job's log, as a user follows it; where a test fails, the job is stopped: the head goes on to the next test."""
    with log.open("w") as stream:
        follower = subprocess.Popen(["ray", "job", "logs", "-f", job], cwd=CHECKOUT, env=head.env, stdout=stream, stderr=stream)
    try:
        yield follower
    except BaseException:
        head.run("ray", "job", "stop", "--no-wait", job)
        raise
    finally:
        follower.kill()
        follower.wait()


def test_stopped_job_leaves_a_checkpoint_and_a_second_job_goes_on_from_it(head: Head, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = head.start("train", *SMALL, f"run.dir={run}", "updates=500")
    with followed(head, job, tmp_path / "log") as follower:
        head.wait(job, lambda: "update 4/500" in (tmp_path / "log").read_text())
        status = head.run("python", "-m", "async_rlhf", "status", str(run))
        stopped = head.run("ray", "job", "stop", job)
        follower.wait(timeout=180)
    checkpoint, skipped = newest(run)

    assert status.code == 0 and "of 500 updates" in status.output, status.output
    assert stopped.code == 0 and head.end(job) == ("STOPPED", None)
    assert books(run) == ("terminated", 143, "interrupted")
    assert checkpoint is not None and skipped == [] and checkpoint.version == summary_of(run)["checkpoint"] == len(rows_of(run)) >= 4
    assert f"async-rlhf resume {run}" in (tmp_path / "log").read_text(), "the log says how to go on"

    last = checkpoint.version + 2
    resumed = head.submit("resume", str(run), f"updates={last}")

    assert resumed.code == 0 and f"update {last}/{last}" in resumed.output, resumed.output
    assert books(run) == ("success", 0, "finished")
    found = audit(run)
    assert found.problems == () and found.updates == last


def test_failing_run_fails_the_job_with_its_own_exit_code(head: Head, tmp_path: Path) -> None:
    done = head.submit("train", "conf/quickstart.yaml", f"run.dir={tmp_path / 'run'}", "max_stalenes=1")
    job = job_of(done)

    assert done.code == 1, "of whatever failed"
    assert head.end(job) == ("FAILED", 2)
    assert "did you mean 'max_staleness'" in head.logs(job)


def test_cluster_that_is_too_small_is_refused_with_the_numbers(head: Head, tmp_path: Path) -> None:
    done = head.submit("train", "conf/quickstart.yaml", f"run.dir={tmp_path / 'run'}", "generator.count=8")

    assert done.code != 0
    said = head.logs(job_of(done))
    assert "8 generators x 1 CPU" in said and "(together 9 CPU); the Ray cluster has 2 CPU and 0 GPU" in said, said


# Less common moments


@pytest.mark.long
def test_processes_of_a_job_run_the_uploaded_checkout_whatever_is_installed_on_their_node(head: Head) -> None:
    code = (
        "import ray, actors, async_rlhf; ray.init(log_to_driver=False)\n"
        "there = ray.remote(lambda: [__import__(name).__file__ for name in ('actors', 'learners', 'async_rlhf')])\n"
        "print('imported', actors.__file__, async_rlhf.__file__, *ray.get(there.remote()))"
    )
    done = head.run("ray", "job", "submit", "--working-dir", ".", "--runtime-env", "deploy/runtime-env.yaml", "--", "python", "-c", code)

    (line,) = [line for line in done.output.splitlines() if line.startswith("imported ")]
    assert all("/working_dir_files/" in path for path in line.split()[1:]), line


@pytest.mark.long
def test_job_without_the_token_is_refused(head: Head) -> None:
    token = {"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "0" * 64}
    done = Head(head.dashboard, {**head.env, **token}).run("deploy/submit.sh", "train", "conf/quickstart.yaml")

    assert done.code != 0 and "raysubmit_" not in done.output
    assert "401" in done.output or "403" in done.output or "oken" in done.output, done.output


@pytest.mark.long
def test_job_stopped_while_it_starts_ends_and_can_begin_again(head: Head, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = head.start("train", *SMALL, f"run.dir={run}", "updates=4")
    head.wait(job, lambda: "learner rank(s)" in head.logs(job))

    head.run("ray", "job", "stop", job)

    assert head.end(job) == ("STOPPED", None)
    assert books(run) == ("terminated", 143, "interrupted")
    again = head.submit("train", *SMALL, f"run.dir={run}", "updates=4", "--resume")
    assert again.code == 0 and books(run) == ("success", 0, "finished"), again.output
    assert audit(run).problems == ()


@pytest.mark.long
def test_job_stopped_in_its_final_evaluation_has_all_updates_and_a_second_job_finishes_it(head: Head, tmp_path: Path) -> None:
    run, reward = tmp_path / "run", tmp_path / "slow.py"
    reward.write_text(SLOW_EVALUATION)
    job = head.start("train", *SMALL, f"run.dir={run}", "updates=3", "timeouts.stop_s=5", f"reward.function={reward}:score")
    head.wait(job, lambda: "update 1/3" in head.logs(job))
    (tmp_path / "slow").touch()
    done = len((tmp_path / "evaluating").read_text())
    head.wait(job, lambda: len((tmp_path / "evaluating").read_text()) > done)

    head.run("ray", "job", "stop", job)
    (tmp_path / "slow").unlink()

    assert head.end(job) == ("STOPPED", None)
    assert books(run) == ("terminated", 143, "interrupted")
    assert summary_of(run)["updates"] == summary_of(run)["checkpoint"] == 3
    again = head.submit("resume", str(run))
    assert again.code == 0 and books(run) == ("success", 0, "finished"), again.output
    assert audit(run).problems == () and audit(run).updates == 3


@pytest.mark.long
def test_guarded_job_stops_with_a_checkpoint_though_driver_and_guard_are_both_signalled(head: Head, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = head.start("train", *SMALL, f"run.dir={run}", "updates=500", "supervision.driver_restarts=2")
    head.wait(job, lambda: "update 3/500" in head.logs(job))

    head.run("ray", "job", "stop", job)

    assert head.end(job) == ("STOPPED", None)
    assert books(run) == ("terminated", 143, "interrupted")
    checkpoint, _ = newest(run)
    assert checkpoint is not None and checkpoint.version >= 3


@pytest.mark.long
def test_job_that_is_told_to_stop_twice_stops_once(head: Head, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = head.start("train", *SMALL, f"run.dir={run}", "updates=500")
    head.wait(job, lambda: "update 3/500" in head.logs(job))

    first = head.run("ray", "job", "stop", "--no-wait", job)
    second = head.run("ray", "job", "stop", job)

    assert first.code == second.code == 0
    assert head.end(job) == ("STOPPED", None)
    checkpoint, _ = newest(run)
    assert books(run) == ("terminated", 143, "interrupted") and checkpoint is not None


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
