"""Faults on purpose: start a run, kill or freeze its processes one after another, and look at what is left of the contract.

    kill     SIGKILL
    freeze   SIGSTOP, never continued: the run has to notice by itself, and to do without that process
    driver   killed, and followed by `async-rlhf resume`

A fault has recovered when incidents.jsonl says that the part is back, every other part too, and the run has trained one more update.
Only processes that descend from a driver started here are ever signalled.
"""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from async_rlhf.audit import Audit, audit
from async_rlhf.errors import AsyncRLHFError
from async_rlhf.recorder import read_rows
from tests.support.command import CHECKOUT, command, environment, summary_of

SETTINGS = (
    *("conf/quickstart.yaml", "batch_groups=16", "completions_per_prompt=2", "task.held_out=50", "checkpoint.every_updates=5"),
    *("generator.count=2", "learner.num_ranks=2", "learner.zero_stage=2"),
    *("supervision.silence_s=6", "supervision.ping_s=1", "supervision.max_restarts=1000"),
    *("supervision.backoff_s=0.2", "supervision.max_backoff_s=1"),
)
"""A run with two of everything that can be two, that notices silence soon."""

CLASSES = {
    "generator": "Generator",
    "learner": "LearnerRank",
    "scorer": "Scorer",
    "queue": "ReplayQueue",
    "broadcaster": "WeightBroadcaster",
    "state": "TrainingStateStore",
}
"""What a part's processes are called in their titles."""
NAMES = {
    "generator": "generator-",
    "learner": "learner",
    "scorer": "scorer-",
    "queue": "replay_queue",
    "broadcaster": "weight_broadcaster",
    "state": "training_state",
}
"""How the name of a part begins in incidents.jsonl."""

FAULT_DEADLINE_S = 300.0
"""A fault that has not recovered by then is a hang."""
START_DEADLINE_S = 900.0
"""For the first updates: the supervised start may have to be trained before."""
END_DEADLINE_S = 600.0
"""For the rest of the run after its last fault."""
AGENTS = ("dashboard/agent.py", "DashboardAgent", "runtime_env/agent", "RuntimeEnvAgent")
"""Of Ray: they look for their raylet every half minute only."""
ENDING_S, AGENTS_ENDING_S = 20.0, 90.0
"""How long the processes of a run may outlive it."""
SHARED_MEMORY, SWEEPING_S = Path("/dev/shm"), 10.0
"""Where it is, and how long a segment may outlive its processes: what sweeps up after a killed one notices its end first."""
STOPPED = 130
"""Exit code of a driver that SIGINT ended."""

Kind = Literal["kill", "freeze"]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What to do, and to whom."""

    kind: Kind
    target: str
    """A key of CLASSES, or two of them joined by `+`, at once; or `driver`."""


FAULTS = (
    *(Fault(kind=kind, target=target) for kind in ("kill", "freeze") for target in CLASSES),
    Fault(kind="kill", target="driver"),
)
"""Each kind of fault once."""
DOUBLE_FAULTS = tuple(Fault(kind="kill", target=f"{one}+{other}") for one, other in itertools.combinations(CLASSES, 2))


@dataclass(frozen=True, kw_only=True)
class FaultResult:
    """What became of a fault; seconds count from the signal on."""

    kind: str
    target: str
    detected_s: float | None
    """Until the loss was noticed; None: it never was, or there is nobody to notice it."""
    recovered_s: float | None
    """Until the part was back, or the resumed run had trained its first update; None: never."""
    went_on_s: float | None
    """Until one more update was trained after that."""
    others: tuple[str, ...] = ()
    """Further parts that were lost meanwhile, and why."""
    problem: str = ""


@dataclass(kw_only=True)
class ChaosResult:
    """What became of one run, or of several."""

    faults: list[FaultResult] = field(default_factory=list[FaultResult])
    runs: int = 0
    lost: int = 0
    duplicated: int = 0
    hangs: int = 0
    bound_violations: int = 0
    orphans: int = 0
    problems: list[str] = field(default_factory=list[str])
    """Whatever else should not be."""
    accuracies: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    """Per run that reached its end: held-out accuracy at the start and at the end."""

    def add(self, other: "ChaosResult") -> None:
        """Count another run in."""
        self.faults += other.faults
        self.problems += other.problems
        self.accuracies += other.accuracies
        for name in ("runs", "lost", "duplicated", "hangs", "bound_violations", "orphans"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Ended(Exception):
    """The driver's process ended while something was waited for."""


class Hung(Exception):
    """Something that was waited for did not come in time."""


class ChaosRun:
    """One run, its driver's process, and every process that came from it."""

    def __init__(self, folder: Path, *settings: str) -> None:
        """
        Args:
            folder: of the run; the drivers' output goes beside it.
            settings: overrides, on top of SETTINGS.
        """
        self.folder = folder
        self.log = folder.with_name(f"{folder.name}.log")
        self._mark = f"{os.getpid()}-{uuid.uuid4().hex}"
        self._shared_memory = _shared_memory()
        self._drivers: list[int] = []
        self._words = ("train", *SETTINGS, *settings, f"run.dir={folder}")
        self.driver = self._start(*self._words)

    def resume(self) -> None:
        """Another driver takes the run over."""
        self.driver = self._start("resume", str(self.folder))

    def inject(self, fault: Fault, rng: random.Random) -> FaultResult | None:
        """Do it, and wait until the run has recovered. None: the run was through before it needed to."""
        others: list[str] = []
        result = {"detected_s": None, "recovered_s": None, "went_on_s": None}
        inflict = self._kill_driver if fault.target == "driver" else self._inflict
        problem = ""
        try:
            inflict(fault, rng, result, others)
        except Hung as error:
            problem = str(error)
        except Ended as error:
            if not self.driver.returncode:
                return None
            problem = str(error)
        return FaultResult(**asdict(fault), **result, others=tuple(others), problem=problem)

    def wait_for(self, what: str, seen: Callable[[], Any], limit_s: float = FAULT_DEADLINE_S) -> Any:
        """What `seen` returns, as soon as it is anything.

        Raises:
            Ended: the run ended before. Hung: the deadline passed.
        """
        ends = time.monotonic() + limit_s
        while not (found := seen()):
            if self.driver.poll() is not None and not (found := seen()):
                raise Ended(f"the driver ended with {self.driver.returncode} before {what}")
            if time.monotonic() > ends:
                raise Hung(f"no sign of {what} within {limit_s:g} s")
            time.sleep(0.1)
        return found

    def wait_for_update(self, version: int, limit_s: float = START_DEADLINE_S) -> None:
        """Wait until this update is trained; see wait_for."""
        self.wait_for(f"update {version}", lambda: self.version >= version, limit_s)

    @property
    def version(self) -> int:
        """Of the last row of metrics.jsonl; 0 without any."""
        rows = read_rows(self.folder)
        return int(rows[-1]["version"]) if rows else 0

    def processes(self, target: str) -> list[psutil.Process]:
        """Living processes of a part, among the descendants of the driver."""
        title = re.compile(rf"ray::{CLASSES[target]}\b")
        found: list[psutil.Process] = []
        with suppress(psutil.Error):
            for process in psutil.Process(self.driver.pid).children(recursive=True):
                with suppress(psutil.Error):
                    if title.match(" ".join(process.cmdline())):
                        found.append(process)
        return found

    def end(self, limit_s: float = END_DEADLINE_S) -> int:
        """Wait for the end; returns the exit code.

        Raises:
            Hung: it does not come.
        """
        try:
            return self.driver.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise Hung(f"the run did not end within {limit_s:g} s after its last fault") from None

    def cut_short(self, more: int) -> int:
        """Stop the run as Ctrl-C does, have another driver train so many more updates, and wait for the end; returns its exit code.

        Raises:
            Ended: the stop did not end it as it should. Hung: an end does not come.
        """
        self.driver.send_signal(signal.SIGINT)
        if (code := self.end()) != STOPPED:
            raise Ended(f"the driver ended with {code} when it was told to stop, expected {STOPPED}")
        self.driver = self._start("resume", str(self.folder), f"updates={self.version + more}")
        return self.end()

    def leftovers(self) -> list[str]:
        """End whatever still lives of this run, and say what should not have: processes, shared memory, session folders."""
        ended = self.driver.poll() is not None
        if not ended:
            self.driver.kill()
            self.driver.wait()
        left = self._outliving()
        said = [f"process {process.pid} is left: {_title(process)}" for process in left]
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        said += [f"/dev/shm/{name} is left" for name in _unused(_shared_memory() - self._shared_memory)]
        for folder in Path(tempfile.gettempdir()).glob("arlhf-*"):
            with suppress(OSError, ValueError):
                owner = int((folder / "owner").read_text())
                if owner in self._drivers and not psutil.pid_exists(owner):
                    said += [f"{folder} is left"] if ended else []  # the next driver sweeps those of the killed ones
                    shutil.rmtree(folder, ignore_errors=True)
        return said

    def last_words(self) -> str:
        """The end of the drivers' output."""
        return self.log.read_text(errors="replace")[-3000:]

    def _start(self, *words: str) -> "subprocess.Popen[bytes]":
        env = {**environment(), _MARK: self._mark}
        with self.log.open("ab") as stream:
            driver = subprocess.Popen(
                command(*words), cwd=CHECKOUT, env=env, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
        self._drivers.append(driver.pid)
        return driver

    def _inflict(self, fault: Fault, rng: random.Random, result: dict[str, float | None], others: list[str]) -> None:
        parts, before = fault.target.split("+"), len(self._incidents())
        victims = [rng.choice(self.wait_for(f"a process of {part}", lambda: self.processes(part))) for part in parts]  # noqa: B023
        for victim in victims:
            victim.send_signal(signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
        at = time.time()

        def entry(event: str, name: str) -> dict[str, Any] | None:
            of_part = [entry for entry in self._incidents()[before:] if entry["name"].startswith(name)]
            return next((entry for entry in of_part if entry["event"] == event), None)

        def last_of(event: str, what: str) -> float:
            return max(self.wait_for(f"{what} of {part}", lambda: entry(event, NAMES[part]))["time"] for part in parts) - at  # noqa: B023

        result["detected_s"] = last_of("lost", "the loss")
        result["recovered_s"] = last_of("back", "the return")
        self.wait_for("the return of every part", lambda: not self._absent())
        self.wait_for("the end of the lost processes", lambda: not any(_is_alive(victim) for victim in victims))
        self.wait_for_update(self.version + 1, FAULT_DEADLINE_S)
        result["went_on_s"] = time.time() - at
        names = tuple(NAMES[part] for part in parts)
        lost = [entry for entry in self._incidents()[before:] if entry["event"] == "lost"]
        others += [f"{entry['name']}: {entry['cause']}" for entry in lost if not entry["name"].startswith(names)]

    def _kill_driver(self, fault: Fault, rng: random.Random, result: dict[str, float | None], others: list[str]) -> None:
        self.driver.kill()
        at = time.time()
        self.driver.wait()
        rows = self.folder / "metrics.jsonl"
        old = rows.stat().st_ino
        self.resume()
        self.wait_for("a resumed run", lambda: rows.stat().st_ino != old)  # rows after the checkpoint are cut off
        self.wait_for_update(self.version + 1, FAULT_DEADLINE_S)
        result["recovered_s"] = result["went_on_s"] = time.time() - at

    def _incidents(self) -> list[dict[str, Any]]:
        with suppress(OSError):
            text = (self.folder / "incidents.jsonl").read_text()
            return [json.loads(line) for line in text.split("\n")[:-1]]
        return []

    def _absent(self) -> set[str]:
        """Parts that were lost and are not back, since the last driver began."""
        absent: set[str] = set()
        began = psutil.Process(self.driver.pid).create_time() if self.driver.poll() is None else 0.0
        for entry in self._incidents():
            if entry["time"] >= began:
                (absent.add if entry["event"] in ("lost", "no_room", "rests") else absent.discard)(entry["name"])
        return absent

    def _outliving(self) -> list[psutil.Process]:
        """Processes of this run that do not end by themselves in time."""
        ends = time.monotonic() + ENDING_S
        last = time.monotonic() + AGENTS_ENDING_S
        while left := self._marked():
            late = time.monotonic() > ends
            strangers = [process for process in left if not any(name in _title(process) for name in AGENTS)]
            if (late and strangers) or time.monotonic() > last:
                return left
            time.sleep(0.5)
        return []

    def _marked(self) -> list[psutil.Process]:
        """Every living process that inherited this run's mark."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if _is_alive(process) and process.environ().get(_MARK) == self._mark:
                    found.append(process)
        return found


_MARK = "ASYNC_RLHF_CHAOS"
"""Environment variable that every process of a run inherits: also those whose parents are dead."""


def disturb(folder: Path, faults: Sequence[Fault], seed: int, *settings: str, more: int | None = None) -> ChaosResult:
    """One run under these faults, one after another at random moments; fewer of them where the run ends first.

    Args:
        more: the run ends so many updates after its last fault, see cut_short(); None: where its settings say.
    """
    rng, result = random.Random(seed), ChaosResult(runs=1)
    run = ChaosRun(folder, *settings)
    code: int | None = None
    try:
        run.wait_for_update(3, START_DEADLINE_S)
        for fault in faults:
            time.sleep(rng.uniform(0.0, 2.0))
            outcome = run.inject(fault, rng)
            if outcome is None:
                break
            result.faults.append(outcome)
            if outcome.problem:
                result.problems.append(f"fault {len(result.faults)}, {fault.kind} {fault.target}: {outcome.problem}\n{run.last_words()}")
                break
        code = run.driver.poll() if result.problems else run.end() if more is None else run.cut_short(more)
    except Hung as error:
        result.problems.append(f"{error}\n{run.last_words()}")
    except Ended as error:
        code = run.driver.returncode
        result.problems.append(f"{error}\n{run.last_words()}")
    result.hangs += code is None
    if code:
        result.problems.append(f"exit code {code}, expected 0")
    left = run.leftovers()
    result.orphans += sum(text.startswith("process") for text in left)
    result.problems += left
    _judge(folder, result, finished=code == 0)
    return result


def _judge(folder: Path, result: ChaosResult, *, finished: bool) -> None:
    try:
        found: Audit = audit(folder)
    except (AsyncRLHFError, OSError) as error:
        result.problems.append(f"the audit failed: {error}")
        return
    result.lost += found.lost
    result.duplicated += found.duplicated
    result.bound_violations += found.bound_violations
    result.problems += found.problems
    if finished:
        summary = summary_of(folder)
        result.accuracies.append((summary["start_accuracy"], summary["final_accuracy"]))


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:200]
    except psutil.Error:
        return ""


def _is_alive(process: psutil.Process) -> bool:
    """Running, sleeping or stopped; not dead, not a zombie, and not another process of the same number."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _shared_memory() -> set[str]:
    return set(os.listdir(SHARED_MEMORY)) if SHARED_MEMORY.is_dir() else set()


def _unused(names: set[str]) -> list[str]:
    """Those segments that no living process has mapped: other runs on this machine have theirs."""
    ends = time.monotonic() + SWEEPING_S
    while left := _unmapped(names):
        if time.monotonic() > ends:
            return sorted(left)
        time.sleep(0.5)
    return []


def _unmapped(names: set[str]) -> set[str]:
    """By inode: a semaphore is mapped under a name of its making, which is gone as soon as it has its own."""
    inodes: dict[int, str] = {}
    for name in names:
        with suppress(FileNotFoundError):
            inodes[(SHARED_MEMORY / name).stat().st_ino] = name
    for process in psutil.process_iter() if inodes else ():
        with suppress(OSError):
            for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                _, _, _, _, inode, *path = line.split(maxsplit=5)
                if path and path[0].startswith(f"{SHARED_MEMORY}/"):
                    inodes.pop(int(inode), None)
    return set(inodes.values()) & _shared_memory()
