"""How peers.py runs the two sides: our command line, and peers_trl.py by the Python of an environment with TRL."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import CHECKOUT, console

TORCH, TRL = "torch==2.13.0+cpu", "trl==1.16.*"
"""torch is pinned to ours: a range would bring the CUDA build."""
LIMIT_S = 400.0
"""Longest run of one side."""
Rows = list[dict[str, Any]]


def cache() -> Path:
    """Where the supervised starts are, too."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "async_rlhf"


def trl_python() -> Path:
    """The Python of TRL's environment, made where it is missing (a minute, 1.5 GB)."""
    folder = cache() / "peers-trl-1.16"
    python, stamp = folder / "bin" / "python", folder / ".installed"
    if not stamp.is_file():
        console(f"making TRL's environment in {folder}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        for wanted in ([TORCH], [TRL, TORCH]):
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=True)
        # Beside a CUDA build of torchvision no model class can be imported (see .ci/install).
        if subprocess.run([str(python), "-c", "from transformers import LlamaForCausalLM"], capture_output=True).returncode:
            subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision", "torchaudio"], check=True)
        stamp.touch()
    return python


def trl_versions(python: Path) -> str:
    """What is in it, in one line."""
    names = ("trl", "transformers", "torch", "accelerate")
    code = f"from importlib.metadata import version; print(', '.join(f'{{name}} {{version(name)}}' for name in {names}))"
    return f"TRL's environment: {run([str(python), '-c', code]).strip()}"


def train_ours(words: Sequence[str]) -> tuple[Rows, Rows]:
    """One run of `async-rlhf train`: its updates and its evaluations."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["cluster=laptop", "checkpoint.every_updates=0", "checkpoint.every_minutes=0", "queue.ties=keep"]
        fixed += ["learner.schedule=constant", f"run.dir={folder}/run"]
        run([sys.executable, "-m", "async_rlhf", "train", *words, *fixed])
        updates, evaluations = (Path(folder) / "run" / name for name in ("metrics.jsonl", "evaluations.jsonl"))
        return json_lines(updates.read_text(encoding="utf-8")), json_lines(evaluations.read_text(encoding="utf-8"))


def train_trl(python: Path, settings: Mapping[str, Any]) -> Rows:
    """One run of peers_trl.py with these settings: its updates."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "settings.json"
        file.write_text(json.dumps(settings), encoding="utf-8")
        environment = {"OMP_NUM_THREADS": str(settings["threads"]), "PYTHONPATH": "", "PYTHONWARNINGS": "ignore"}
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
        several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(settings["processes"])]
        launcher = several if settings["processes"] > 1 else []
        return json_lines(run([str(python), *launcher, str(CHECKOUT / "benchmarks/peers_trl.py"), str(file)], environment))


def run(line: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """The command's output.

    Raises:
        RuntimeError: it failed; with its last words. TimeoutExpired: it took longer than LIMIT_S.
    """
    own = {**os.environ, **(environment or {})}
    with subprocess.Popen(line, cwd=CHECKOUT, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            output, _ = process.communicate(timeout=LIMIT_S)
        except BaseException:
            # Asked, not killed: both launchers end their own processes then.
            process.terminate()
            raise
    if process.returncode:
        raise RuntimeError(f"{' '.join(line)} failed:\n{output[-3000:]}")
    return output


def json_lines(text: str) -> Rows:
    """The lines of a text that are JSON objects; others are a library's own."""
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"')]
