"""What deploy/ says: its YAML documents, and the command lines that a user, or a cluster, would run."""

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from tests.support.command import CHECKOUT

DEPLOY = CHECKOUT / "deploy"
IN_THE_IMAGE = "/opt/async-rlhf"
"""Where the image holds the checkout."""
ON_A_CPU = ("generator.num_gpus=0", "generator.count=1", "learner.num_gpus=0", "learner.num_ranks=1")
"""Overrides that bring a command line for GPUs down to this machine."""
TINY = (*ON_A_CPU, "updates=3", "batch_groups=16", "task.held_out=50", "checkpoint.every_updates=0", "sft.cache_dir=")


def documents(name: str) -> list[dict[str, Any]]:
    """The YAML documents of a file in deploy/."""
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def document(name: str, kind: str) -> dict[str, Any]:
    """The one document of that kind."""
    (found,) = [item for item in documents(name) if item["kind"] == kind]
    return found


def first_comment(name: str) -> str:
    """The leading comment of a file, without its marks, a line that goes on joined to the next."""
    lines: list[str] = []
    for line in (DEPLOY / name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or line.startswith("#SBATCH"):
            break
        if not line.startswith("#!"):
            lines.append(line.removeprefix("#").removeprefix(" "))
    return "\n".join(lines).replace("\\\n", " ")


def entrypoint_words() -> list[str]:
    """The words behind `python -m async_rlhf` of the RayJob, the image's checkout replaced by this one."""
    words = shlex.split(document("kuberay-rayjob.yaml", "RayJob")["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "async_rlhf"], words
    return [word.replace(IN_THE_IMAGE, str(CHECKOUT)) for word in words[3:]]


def commands_in(text: str) -> list[list[str]]:
    """The words of each `train ...` that follows this project's program, or a script that hands them on, on a line of its own."""
    found = re.findall(r"(?:async-rlhf|async_rlhf|submit\.sh|slurm\.sbatch) ((?:train )?\S*\.yaml [^\n`]*)", text)
    return [["train", *shlex.split(words.removeprefix("train "))] for words in found]


def described_commands() -> dict[str, list[str]]:
    """Per file of deploy/ whose first comment, or entrypoint, runs this project: the words of the command."""
    found = {"kuberay-rayjob.yaml": entrypoint_words()}
    for name in sorted(path.name for path in DEPLOY.iterdir() if path.is_file()):
        for words in commands_in(first_comment(name)):
            found[name] = words
    return found


def lead_s(script: Path) -> int:
    """Seconds between the signal that Slurm sends and the end of the job's time."""
    found = re.search(r"^#SBATCH --signal=B:USR1@(\d+)$", script.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return int(found[1])
