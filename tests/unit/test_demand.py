"""What a run asks of a cluster, and when no cluster of that shape can ever hold it."""

from hypothesis import given, settings
from hypothesis import strategies as st

from async_rlhf.demand import Demand, demands_of, describe, describe_nodes, shortage, total
from tests.support.settings import load


def generators(count: int, *, cpus: float = 0.0, gpus: float = 0.0) -> Demand:
    return Demand(part="generator", count=count, num_cpus=cpus, num_gpus=gpus)


def ranks(count: int, *, cpus: float = 0.0, gpus: float = 0.0) -> Demand:
    return Demand(part="learner rank", count=count, num_cpus=cpus, num_gpus=gpus)


NODE = {"CPU": 16.0, "GPU": 2.0, "memory": 1e9}


def test_a_run_asks_for_every_part_that_reserves_anything() -> None:
    config = load("generator.count=2", "generator.num_gpus=0.5", "learner.num_ranks=4", "scorer.num_cpus=0", "reward.count=3")

    assert describe(demands_of(config)) == (
        "4 learner ranks x 1 CPU, 2 generators x 1 CPU and 0.5 GPU, 3 reward actors x 1 CPU (together 9 CPU and 1 GPU)"
    )
    assert total(demands_of(config)) == {"CPU": 9.0, "GPU": 1.0}


def test_a_cluster_is_told_by_its_sum_and_by_its_largest_node() -> None:
    assert describe_nodes([{"CPU": 2.0}]) == "2 CPU and 0 GPU"
    assert describe_nodes([{"CPU": 2.0, "GPU": 1.0}, {"CPU": 6.0}]) == "8 CPU and 1 GPU, at most 6 CPU and 1 GPU on one of its 2 nodes"


def test_a_bundle_larger_than_every_node_is_a_shortage_however_many_nodes_there_are() -> None:
    assert "no node has 4 GPU for one generator" in shortage([generators(1, gpus=4)], [NODE] * 8)


def test_cpus_and_gpus_of_one_part_must_be_on_the_same_node() -> None:
    assert "no node has 4 CPU and 1 GPU for one generator" in shortage([generators(1, cpus=4, gpus=1)], [{"CPU": 8.0}, {"GPU": 8.0}])


def test_what_is_left_over_on_each_node_does_not_add_up_to_a_bundle() -> None:
    three = {"GPU": 3.0}
    assert "room for 3 of the 4 generators" in shortage([generators(4, gpus=2)], [three] * 3)
    assert shortage([generators(3, gpus=2)], [three] * 3) == ""


def test_parts_that_fit_alone_and_not_together_are_a_shortage_that_names_the_kind() -> None:
    demands = [ranks(2, cpus=1, gpus=1), generators(3, cpus=1, gpus=1)]

    assert shortage(demands, [NODE, NODE]).endswith("on one of its 2 nodes: too few GPUs")
    assert shortage(demands, [NODE] * 3) == ""


def test_shares_of_one_gpu_fill_it_exactly() -> None:
    assert shortage([generators(1, gpus=0.5), ranks(1, gpus=0.5)], [{"GPU": 1.0}]) == ""
    assert shortage([generators(10, gpus=0.1)], [{"GPU": 1.0}]) == ""
    assert "too few GPUs" in shortage([generators(1, gpus=0.5), ranks(1, gpus=0.6)], [{"GPU": 1.0}])


SIZES = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 4.0])
DEMANDS = st.lists(st.builds(generators, st.integers(1, 5), cpus=SIZES, gpus=SIZES).filter(lambda one: bool(one.bundle)), max_size=4)
NODES = st.lists(st.fixed_dictionaries({"CPU": SIZES, "GPU": SIZES}), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(demands=DEMANDS, nodes=NODES)
def test_what_first_fit_can_place_is_never_called_a_shortage(demands: list[Demand], nodes: list[dict[str, float]]) -> None:
    free = [dict(node) for node in nodes]
    for demand in demands:
        for _ in range(demand.count):
            fitting = (node for node in free if all(node[kind] >= amount for kind, amount in demand.bundle.items()))
            if (node := next(fitting, None)) is None:
                return
            node.update({kind: node[kind] - amount for kind, amount in demand.bundle.items()})

    assert shortage(demands, nodes) == ""
