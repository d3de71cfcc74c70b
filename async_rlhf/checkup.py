"""Is this machine, and what is installed on it, fit for a run? Each check says what it found and, where that is wrong, what to do.

Imports are tried in processes of their own: one that hangs or crashes must not take the check-up with it.
"""

import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
from packaging.requirements import Requirement

WORKING_S = 180.0
"""Longest that an import, or the start of Ray, may take; a cold disk is slow, and a cluster may not answer."""
MIN_OPEN_FILES = 4096
"""Ray opens hundreds of sockets per node."""
MIN_MEMORY_GIB, MIN_DISK_GIB, MIN_SHARED_GIB = 8.0, 5.0, 1.0
GIB = 2.0**30

WORKING = {
    "torch": "import torch; n = torch.cuda.device_count(); "
    "print(torch.__version__, ', '.join(torch.cuda.get_device_name(i) for i in range(n)) or 'no GPU: everything runs on the CPU')",
    "transformers": "from transformers import LlamaForCausalLM; import transformers; print(transformers.__version__)",
    "vllm": "import vllm, vllm.v1.engine.llm_engine; print(vllm.__version__)",
    "deepspeed": "import deepspeed; print(deepspeed.__version__)",
    "ray": "from actors.checkup import look_at_ray; print(look_at_ray())",
}
"""What is tried, and says what it is: models and engines, because a package alone may import where they do not; Ray as a run finds it."""
_QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "DS_LOG_LEVEL": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore",
    "OMP_NUM_THREADS": "1",
}


class Verdict(StrEnum):
    """Of a check."""

    GOOD = "good"
    DOUBTFUL = "doubtful"
    """A run may start, and may suffer."""
    BAD = "bad"
    """No run starts."""


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at."""

    name: str
    verdict: Verdict
    found: str
    remedy: str = ""


def check_up(runs: Path) -> Iterator[Check]:
    """All checks, the slow ones last.

    Args:
        runs: where run folders will be.
    """
    yield check_python(sys.version_info[:2])
    yield from check_packages(_wanted())
    yield check_memory(psutil.virtual_memory().total / GIB, os.cpu_count() or 1)
    yield check_shared_memory(Path("/dev/shm"))
    yield check_disk(runs)
    yield check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield check_host(socket.gethostname())
    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(check_working, WORKING)


def _wanted() -> Sequence[str]:
    """What this package asks for; nothing is known of that in a checkout that was never installed."""
    try:
        return requires("async-rlhf") or []
    except PackageNotFoundError:
        return []


def check_python(found: tuple[int, int]) -> Check:
    """3.11 to 3.13."""
    good = (3, 11) <= found <= (3, 13)
    return Check("Python", _either(good, Verdict.BAD), f"{found[0]}.{found[1]}", "use 3.11 to 3.13: PYTHON=python3.12 make setup")


def check_packages(wanted: Sequence[str]) -> Iterator[Check]:
    """Every requirement that is not met; one line where all are.

    Args:
        wanted: as a package's metadata has them; those of extras are looked at where the package is there.
    """
    wrong = 0
    for requirement in map(Requirement, wanted):
        of_extra = requirement.marker is not None and "extra" in str(requirement.marker)
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = ""
        if (of_extra and not found) or (found and requirement.specifier.contains(found, prereleases=True)):
            continue
        wrong += 1
        asked = f"asked: {requirement.name}{requirement.specifier}"
        yield Check(
            requirement.name,
            Verdict.DOUBTFUL if of_extra else Verdict.BAD,
            f"{found or 'not installed'}, {asked}",
            "install what belongs together: make setup",
        )
    if not wanted:
        yield Check("packages", Verdict.DOUBTFUL, "this checkout was never installed: nobody said what it needs", "make setup")
    elif not wrong:
        yield Check("packages", Verdict.GOOD, f"{len(wanted)} requirements are met")


def check_memory(total_gib: float, cores: int) -> Check:
    """Ray, an engine, a learner and a scorer need some gigabytes before any model."""
    good = total_gib >= MIN_MEMORY_GIB and cores >= 2
    found = f"{total_gib:.0f} GiB, {cores} cores"
    return Check("memory, cores", _either(good, Verdict.DOUBTFUL), found, f"the demo takes {MIN_MEMORY_GIB:.0f} GiB and 2 cores")


def check_shared_memory(folder: Path) -> Check:
    """Ray's object store lies there; where it does not fit Ray takes the disk, many times slower."""
    free = shutil.disk_usage(folder).free / GIB if folder.is_dir() else 0.0
    remedy = "mount it larger: docker run --shm-size, or an in-memory emptyDir (deploy/)"
    return Check("shared memory", _either(free >= MIN_SHARED_GIB, Verdict.DOUBTFUL), f"{free:.1f} GiB free in {folder}", remedy)


def check_disk(runs: Path) -> Check:
    """Checkpoints and journals of a run."""
    place = next(folder for folder in (runs, *runs.parents) if folder.exists())
    free, writable = shutil.disk_usage(place).free / GIB, os.access(place, os.W_OK)
    found = f"{free:.0f} GiB free in {place}" + ("" if writable else ", which may not be written to")
    verdict = _either(free >= MIN_DISK_GIB, Verdict.DOUBTFUL) if writable else Verdict.BAD
    return Check("disk", verdict, found, "give another folder: run.dir=/data/first")


def check_open_files(limit: int) -> Check:
    """How many one process may have open."""
    good = limit >= MIN_OPEN_FILES or limit == resource.RLIM_INFINITY
    return Check("open files", _either(good, Verdict.DOUBTFUL), f"at most {limit}", f"ulimit -n {MIN_OPEN_FILES} before a run")


def check_host(name: str) -> Check:
    """Ray's processes meet at this machine's address."""
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        return Check("host name", Verdict.DOUBTFUL, f"{name} has no address ({error})", "add it to /etc/hosts; torch's ranks look it up")
    return Check("host name", Verdict.GOOD, f"{name} is {address}")


def check_working(name: str) -> Check:
    """Whether a library works here, and what it says it is."""
    remedy = "make setup; beside torch+cpu: pip uninstall torchvision torchaudio torchcodec"
    if name == "ray":
        remedy = "on a cluster: is the token there, and readable (docs/cluster.md)?"
    try:
        done = subprocess.run(
            [sys.executable, "-c", WORKING[name]], capture_output=True, text=True, timeout=WORKING_S, env={**os.environ, **_QUIET}
        )
    except subprocess.TimeoutExpired:
        remedy = "a slow disk, or a cluster that does not answer (RAY_ADDRESS)"
        return Check(name, Verdict.BAD, f"took more than {WORKING_S:.0f} s", remedy)
    said = (done.stdout if not done.returncode else done.stderr).strip().splitlines()
    verdict = Verdict.BAD if done.returncode else Verdict.GOOD
    return Check(name, verdict, said[-1] if said else f"exit code {done.returncode}", remedy)


def _either(good: bool, otherwise: Verdict) -> Verdict:
    return Verdict.GOOD if good else otherwise
