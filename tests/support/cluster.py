"""A local Ray for one test module, clusters of several nodes, and model folders small enough to start anything in seconds."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from actors.launch import Cluster, connect
from actors.session import make_session_folder
from async_rlhf.config import Config, load_config
from async_rlhf.config.schema import ModelConfig
from async_rlhf.tasks.start import build_policy, build_tokenizer
from tests.support.command import environment
from tests.support.tiny_policy import with_character

IMPATIENT = {"period_ms": "1000", "failure_threshold": "3", "timeout_ms": "2000"}
"""How soon Ray takes a silent node for dead."""

OPEN = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", **{f"RAY_health_check_{name}": of for name, of in IMPATIENT.items()}}
"""Environment of the clusters below, and of whoever joins them."""


@contextmanager
def local_cluster() -> Iterator[Cluster]:
    """A Ray of our own, ended at the exit."""
    cluster = connect(Config(), "tests", make_session_folder())
    try:
        yield cluster
    finally:
        cluster.close()


def small_config(*overrides: str) -> Config:
    """The quickstart with overrides."""
    return load_config(["conf/quickstart.yaml"], list(overrides)).config


def make_model_folder(folder: Path, *, seed: int = 0, family: str = "llama", tied: bool = False) -> Path:
    """A random policy of 30k parameters with its tokenizer, as an ordinary Hugging Face folder."""
    tokenizer = build_tokenizer()
    config = ModelConfig(
        family=family,  # type: ignore[arg-type]
        hidden_size=64,
        num_layers=2,
        num_heads=2,
        intermediate_size=64,
        tie_embeddings=tied,
    )
    with_character(build_policy(config, tokenizer, seed)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


_NODES = """
import json, sys
from ray.cluster_utils import Cluster
head, *others = json.loads(sys.argv[1])
cluster = Cluster(initialize_head=True, head_node_args={**head, "include_dashboard": False})
nodes = [cluster.head_node, *(cluster.add_node(**node) for node in others)]
print(cluster.address, flush=True)
for line in sys.stdin:
    order, argument = json.loads(line)
    if order == "lose":
        cluster.remove_node(nodes[argument], allow_graceful=False)
    else:
        nodes.append(cluster.add_node(**argument))
    print("done", flush=True)
cluster.shutdown()
"""


class Nodes:
    """The nodes of a cluster on this host, in a process of their own."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.address = self._answer()
        """Of Ray's head."""

    def lose(self, index: int) -> None:
        """Kill a node, in the order of their start; 0 is the head."""
        self._order("lose", index)

    def add(self, **resources: float) -> None:
        """Another node joins."""
        self._order("add", resources)

    def _order(self, *words: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps(words)}\n")
        self._process.stdin.flush()
        assert self._answer() == "done"

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@contextmanager
def several_nodes(*resources: dict[str, float]) -> Iterator[Nodes]:
    """A Ray cluster on this host, a node for each of `resources` (num_cpus, num_gpus); the first is the head."""
    folder = Path(tempfile.mkdtemp(prefix="nodes-"))  # short: sockets inside may not have long paths
    env = {**environment(), **OPEN, "RAY_TMPDIR": str(folder)}
    arguments = [sys.executable, "-c", _NODES, json.dumps(resources)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    try:
        with subprocess.Popen(arguments, env=env, text=True, **pipes) as process:
            try:
                yield Nodes(process)
            finally:
                assert process.stdin is not None
                process.stdin.close()
                process.wait(timeout=60)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
