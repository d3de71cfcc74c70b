"""conf/cluster: each file asks for no more than the machines that its first line names, and goes with every recipe."""

import re
from pathlib import Path

import pytest

from async_rlhf.config import Config, load_config
from async_rlhf.config.load import CONF_FOLDER
from async_rlhf.demand import Demand, demands_of, shortage, total

CLUSTERS = sorted((CONF_FOLDER / "cluster").glob("*.yaml"))
RECIPES = sorted((CONF_FOLDER / "experiment").glob("*.yaml"))
HARDWARE = re.compile(r"# (\d+) machines? with (\d+) CPUs and (?:no GPU|(\d+) GPUs?)(?: each)?:")

each_cluster = pytest.mark.parametrize("file", CLUSTERS, ids=lambda file: file.stem)


def machines(file: Path) -> list[dict[str, float]]:
    """What the first line of a cluster file promises."""
    promised = HARDWARE.match(file.read_text(encoding="utf-8"))
    assert promised, f"{file.name} must begin with `# N machines with C CPUs and G GPUs each: ...`"
    count, cpus, gpus = (int(number or 0) for number in promised.groups())
    return [{"CPU": float(cpus), "GPU": float(gpus)} for _ in range(count)]


def places(demands: list[Demand], nodes: list[dict[str, float]]) -> bool:
    """Whether they fit when each takes the first node with room, largest first."""
    free = [dict(node) for node in nodes]
    for demand in sorted(demands, key=lambda one: one.count * one.num_gpus, reverse=True):
        for _ in range(demand.count):
            node = next((node for node in free if all(node[kind] >= amount for kind, amount in demand.bundle.items())), None)
            if node is None:
                return False
            node.update({kind: node[kind] - amount for kind, amount in demand.bundle.items()})
    return True


def with_cluster(file: Path, *words: str) -> Config:
    return load_config(["conf/quickstart.yaml"], [f"cluster={file.stem}", *words]).config


@each_cluster
def test_cluster_file_fits_the_machines_that_its_first_line_names(file: Path) -> None:
    demands, nodes = demands_of(with_cluster(file)), machines(file)

    assert shortage(demands, nodes) == ""
    assert places(demands, nodes)


@each_cluster
def test_cluster_file_needs_the_gpus_that_it_names(file: Path) -> None:
    gpus = total(demands_of(with_cluster(file)))["GPU"]

    named = sum(node["GPU"] for node in machines(file))
    assert named - 1 <= gpus <= named, "at most one GPU is left, for a reward actor"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_goes_with_every_cluster_file(recipe: Path) -> None:
    for file in CLUSTERS:
        config = load_config([recipe], [f"cluster={file.stem}"]).config
        if config.reward.count == 0:
            assert places(demands_of(config), machines(file)), file.stem


def test_ranks_of_the_largest_file_fill_whole_machines_and_generators_stay_on_one() -> None:
    config = with_cluster(CONF_FOLDER / "cluster" / "several_nodes.yaml")

    (gpus,) = {node["GPU"] for node in machines(CONF_FOLDER / "cluster" / "several_nodes.yaml")}
    assert config.learner.num_ranks % gpus == 0 and config.learner.zero_stage == 3
    assert 1 < config.generator.tensor_parallel_size == config.generator.num_gpus <= gpus
