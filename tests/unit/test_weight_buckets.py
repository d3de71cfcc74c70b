"""A version cut into buckets: nothing is lost, no bucket is too large, and no more than one is made before it is asked for."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import async_rlhf.snapshot as snapshot
from async_rlhf.snapshot import make_buckets, make_snapshot
from async_rlhf.types import WeightsManifest, WeightsVersion

EMPTY = WeightsManifest(version=3, tensors=(), canary_ids=(1, 2), canary_logprobs=(-1.0,))


def parameters(lengths: list[int]) -> list[tuple[str, torch.Tensor]]:
    return [(f"p{index}", torch.arange(float(length))) for index, length in enumerate(lengths)]


@given(st.lists(st.integers(1, 30), max_size=10), st.integers(4, 80))
def test_the_buckets_together_are_the_version_and_only_a_single_tensor_exceeds_the_limit(lengths: list[int], limit: int) -> None:
    whole = make_snapshot(parameters(lengths), version=3, dtype="float32", canary_ids=(1, 2), canary_logprobs=(-1.0,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot, "BUCKET_BYTES", limit)
        buckets = list(make_buckets(parameters(lengths), EMPTY, "float32"))

    together = WeightsVersion.of(buckets)
    assert together.manifest == whole.manifest and together.manifest.digest == whole.manifest.digest
    assert all((together.tensors[name] == array).all() for name, array in whole.tensors.items())
    assert len(buckets) >= 1
    assert all(len(b.tensors) <= 1 or sum(array.nbytes for array in b.tensors.values()) <= limit for b in buckets)


def test_parameters_are_gathered_no_further_than_the_first_one_of_the_next_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "BUCKET_BYTES", 80)
    gathered: list[str] = []

    def gather() -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in parameters([10] * 6):
            gathered.append(name)
            yield name, parameter

    buckets = make_buckets(gather(), EMPTY, "float32")

    assert [spec.name for spec in next(buckets).manifest.tensors] == ["p0", "p1"]
    assert gathered == ["p0", "p1", "p2"]


@pytest.mark.parametrize(("lent", "dtype", "shared"), [(False, "float32", False), (True, "float32", True), (True, "bfloat16", False)])
def test_a_bucket_shares_memory_with_the_parameters_only_where_it_is_lent_and_nothing_is_cast(lent: bool, dtype: str, shared: bool) -> None:
    parameter = torch.arange(6.0)

    (bucket,) = make_buckets([("p", parameter)], EMPTY, dtype, lent=lent)

    before = bucket.tensors["p"].copy()
    parameter += 1
    assert (bucket.tensors["p"] != before).any() == shared
    assert not bucket.tensors["p"].flags.writeable


def test_a_lent_bucket_still_copies_what_is_gathered_from_several_ranks() -> None:
    parameter = torch.arange(6.0)
    parameter.ds_id = 0  # pyright: ignore[reportAttributeAccessIssue]  # DeepSpeed's mark of a partitioned parameter

    (bucket,) = make_buckets([("p", parameter)], EMPTY, "float32", lent=True)

    parameter.zero_()
    assert bucket.tensors["p"].tolist() == [0, 1, 2, 3, 4, 5]
