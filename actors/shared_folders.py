"""Does every node of the run see what all of them work with? Asked before anything starts there."""

import asyncio
import time
import uuid
from contextlib import suppress
from pathlib import Path

import ray

from actors.launch import ActorSpec, Cluster, ready
from actors.remote import kill
from async_rlhf.errors import ConfigError
from async_rlhf.run_plan import RunPlan

VISIBLE_S = 10.0
"""How long a file may take to be seen on other nodes of a network file system."""


class FolderProbe:
    """On one node: looks, and writes back."""

    def look(self, run_folder: str, word: str, model_folder: str) -> tuple[str, str]:
        """Find the driver's probe, and leave an answer beside it.

        Returns:
            The node's address, and what is wrong there; nothing when all is well.
        """
        address, probe = ray.util.get_node_ip_address(), Path(run_folder) / word
        if not _seen(probe):
            return address, f"does not see run.dir {run_folder}"
        try:
            probe.with_name(f"{word}.{ray.get_runtime_context().get_node_id()}").write_text(word, encoding="utf-8")
        except OSError as error:
            return address, f"cannot write to run.dir {run_folder} ({error.strerror})"
        if not (Path(model_folder) / "config.json").is_file():
            return address, f"does not see the model folder {model_folder}"
        return address, ""


async def check_folders(cluster: Cluster, plan: RunPlan) -> None:
    """Have every node that was reserved on look for the run folder and for the model's; nothing where that is this node alone.

    Raises:
        ConfigError: one does not see them, or cannot write there.
    """
    own = ray.get_runtime_context().get_node_id()
    places = {node: place for place, node in cluster.placement.nodes().items() if node != own}
    if not places:
        return
    word = f".probe-{uuid.uuid4().hex}"
    (plan.run_folder / word).write_text(word, encoding="utf-8")
    try:
        await asyncio.gather(*(_ask(cluster, plan, word, node, place) for node, place in places.items()))
    finally:
        for file in plan.run_folder.glob(f"{word}*"):
            with suppress(OSError):
                file.unlink()


async def _ask(cluster: Cluster, plan: RunPlan, word: str, node: str, place: str) -> None:
    probe = cluster.start(ActorSpec(name=f"folder_probe.{plan.session}.{node[:12]}", cls=FolderProbe, args=(), place=place))
    try:
        await ready(probe, plan.config.timeouts.start_s, lambda name: None)
        arguments = str(plan.run_folder), word, str(plan.model_folder)
        address, problem = await probe.call("look", *arguments, timeout_s=VISIBLE_S + plan.config.timeouts.call_s)
    finally:
        kill(probe)
    answer = plan.run_folder / f"{word}.{node}"
    if not problem and not await asyncio.to_thread(_seen, answer):
        problem = f"writes to another run.dir {plan.run_folder} than this one"
    if problem:
        raise ConfigError(
            f"node {address} {problem}; both must be on storage that every node sees at the same path: set run.dir, and model.path or "
            "sft.cache_dir, to folders there"
        )


def _seen(file: Path) -> bool:
    ends = time.monotonic() + VISIBLE_S
    while not file.is_file():
        if time.monotonic() > ends:
            return False
        time.sleep(0.2)
    return True
