"""The learner group under supervision, around fakes: who learns that a rank is gone, and which ranks may send weights."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from actors.launch import Cluster
from actors.learner_crew import LearnerCrew, LearnerParts
from actors.remote import WEIGHTS_GROUP, RemoteActor
from actors.supervision import Supervisor
from async_rlhf.config import Config
from async_rlhf.errors import LearnerLostError
from async_rlhf.run_plan import RunPlan
from tests.support.cluster import small_config
from tests.support.local_actors import LocalCluster, local_kill

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("local_kill")]
__all__ = ["local_kill"]


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 30))


class FakeRank:
    def __init__(self, config: Config, model_folder: str, rank: int) -> None:
        self.rank = rank


class FakeGroup:
    """Loads nothing."""

    def __init__(self, ranks: Sequence[RemoteActor], config: Config) -> None:
        self.ranks = ranks

    async def join(self, checkpoint: str | None = None) -> int:
        return 0


class Stage:
    """Two ranks of a run without a checkpoint."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        quick = ("supervision.ping_s=0.01", "supervision.silence_s=0.1", "supervision.backoff_s=0.0")
        self.config = small_config("learner.num_ranks=2", *quick, *overrides)
        self.cluster = LocalCluster()
        supervisor = Supervisor(self.cluster, self.config, 0, lambda entry: None)  # type: ignore[arg-type]
        plan = RunPlan(config=self.config, run_folder=folder, model_folder=folder, reward="", metric="")
        self.crew = LearnerCrew(plan, LearnerParts(rank_class=FakeRank, make_group=FakeGroup), supervisor)  # type: ignore[arg-type]

    async def begin(self) -> "asyncio.Task[None]":
        """They have met; returns who watches them."""
        await self.crew.join([self.cluster.start(spec) for spec in self.crew.next_specs()], None)
        return asyncio.create_task(self.crew.watch())


async def until(done: Callable[[], bool]) -> None:
    while not done():
        await asyncio.sleep(0.002)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_while_nobody_calls_it_is_told_of_until_the_group_has_started_again(rank: int, tmp_path: Path):
    async def story() -> None:
        crew = (stage := Stage(tmp_path)).crew
        watching = await stage.begin()
        assert crew.lost is None

        stage.cluster.handles[f"learner-{rank}.0.0"].die()
        await until(lambda: crew.lost is not None)
        lost = crew.lost
        assert isinstance(lost, LearnerLostError) and f"learner-{rank}.0.0" in str(lost)

        await crew.restart(lost)

        assert crew.lost is None and [actor.name for actor in crew.ranks] == ["learner-0.0.1", "learner-1.0.1"]
        await asyncio.sleep(0.1)
        assert crew.lost is None, "whoever watched the old ranks says nothing of the new ones"
        stage.cluster.handles["learner-0.0.1"].freeze()
        await until(lambda: crew.lost is not None)
        watching.cancel()

    run(story())


@pytest.mark.parametrize(("transport", "senders"), [("object_store", []), ("gloo", ["learner-0.0.0"])])
def test_only_rank_0_has_threads_that_send_weights_and_only_where_it_sends_them(
    transport: str, senders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    threads: dict[str, dict[str, int]] = {}

    def remote(concurrency_groups: dict[str, int]) -> Any:
        def options(**of: Any) -> Any:
            threads[of["name"]] = concurrency_groups
            return SimpleNamespace(remote=lambda *args: None)

        return lambda cls: SimpleNamespace(options=options)

    monkeypatch.setattr(ray, "remote", remote)
    placement: Any = SimpleNamespace(strategy=lambda place, near: None)
    cluster = Cluster(namespace="n", address="a:1", local_folder=None, environment={}, has_gpus=False, placement=placement)

    for spec in Stage(tmp_path, f"weights.transport={transport}").crew.next_specs():
        cluster.start(spec)

    assert list(threads) == ["learner-0.0.0", "learner-1.0.0"] and all(groups["control"] == 1 for groups in threads.values())
    assert [name for name, groups in threads.items() if WEIGHTS_GROUP in groups] == senders
