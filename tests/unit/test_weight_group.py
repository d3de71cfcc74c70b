"""Groups that carry weights: what arrives is what was sent, and no member waits for one that does not come."""

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import async_rlhf.weight_group as module
from async_rlhf.errors import TransferError
from async_rlhf.types import Meeting, TensorSpec
from async_rlhf.weight_group import WeightGroup, lots, receive, send, tensor_checksum

CPU = torch.device("cpu")
LONG_S = 60.0


@pytest.fixture(scope="module")
def meetings() -> Iterator[Iterator[Meeting]]:
    """Fresh meetings at one store."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = int(listener.getsockname()[1])
    tcp_store: Any = dist.TCPStore  # pyright: ignore
    store = tcp_store("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    yield (Meeting(backend="gloo", address="127.0.0.1", port=port, key=f"{number}", world_size=2, timeout_s=LONG_S) for number in count())
    del store


def version(dtype: torch.dtype) -> tuple[list[TensorSpec], list[torch.Tensor]]:
    torch.manual_seed(0)
    tensors = [torch.randn(shape).to(dtype) for shape in ((3, 5), (7,), (), (2, 2, 2), (64,))]
    name = str(dtype).removeprefix("torch.")
    specs = [TensorSpec(name=f"t{i}", shape=tuple(t.shape), dtype=name, checksum=tensor_checksum(t)) for i, t in enumerate(tensors)]
    return specs, tensors


def in_thread(call: Any) -> "Future[Any]":
    return ThreadPoolExecutor(1).submit(call)


def pair(meeting: Meeting) -> tuple[WeightGroup, WeightGroup]:
    other = in_thread(lambda: WeightGroup(meeting, 1, CPU))
    return WeightGroup(meeting, 0, CPU), other.result(LONG_S)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_arrives_is_what_was_sent_lot_by_lot(meetings: Iterator[Meeting], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(module, "LOT_BYTES", 60)
    specs, tensors = version(dtype)
    sender, receiver = pair(next(meetings))

    for _ in range(2):  # a group serves one version after the other
        received = in_thread(lambda: [(name, tensor.clone()) for name, tensor in receive(receiver, specs, CPU)])
        send(sender, specs, tensors, CPU)

        assert [name for name, _ in received.result(LONG_S)] == [spec.name for spec in specs]
        assert all(torch.equal(got, sent) for (_, got), sent in zip(received.result(), tensors, strict=True))


def test_a_tensor_that_differs_from_the_manifest_is_refused_by_name(meetings: Iterator[Meeting]) -> None:
    specs, tensors = version(torch.float32)
    sender, receiver = pair(next(meetings))
    expected = [*specs[:2], replace(specs[2], checksum=specs[2].checksum ^ 1), *specs[3:]]

    received = in_thread(lambda: list(receive(receiver, expected, CPU)))
    send(sender, specs, tensors, CPU)

    with pytest.raises(TransferError, match="tensor t2 was damaged on its way"):
        received.result(LONG_S)


@pytest.mark.parametrize("silent", [0, 1])
def test_a_member_that_goes_silent_fails_the_other_at_its_deadline(meetings: Iterator[Meeting], silent: int) -> None:
    meeting = replace(next(meetings), timeout_s=0.2)
    groups = pair(replace(meeting, timeout_s=LONG_S))
    groups[1 - silent]._meeting = meeting

    with pytest.raises(TransferError, match=r"not through within 0\.2 s \(timeouts\.weights_s\)"):
        while True:  # the first few may leave before anybody is there to take them
            groups[1 - silent].broadcast(torch.zeros(1 << 20), "t0")
    groups[1 - silent].abort()


def test_a_sender_that_nobody_meets_gives_up_at_its_deadline_or_when_told(meetings: Iterator[Meeting]) -> None:
    told = threading.Event()
    waiting = in_thread(lambda: WeightGroup(next(meetings), 0, CPU, told))
    with pytest.raises(TransferError, match=r"the meeting was not through within 0\.2 s"):
        WeightGroup(replace(next(meetings), timeout_s=0.2), 0, CPU)

    told.set()

    with pytest.raises(TransferError, match="the meeting was given up"):
        waiting.result(LONG_S)


def test_an_abort_from_another_thread_ends_a_transfer(meetings: Iterator[Meeting]) -> None:
    sender, _receiver = pair(next(meetings))
    threading.Timer(0.1, sender.abort).start()

    with pytest.raises(TransferError, match=r"the transfer of t0 (was given up|failed)"):
        while True:  # the first few may leave before anybody is there to take them
            sender.broadcast(torch.zeros(1 << 20), "t0")


@given(st.lists(st.integers(1, 50), max_size=12), st.integers(4, 120))
def test_lots_keep_the_order_and_exceed_the_limit_only_alone(lengths: list[int], limit: int) -> None:
    specs = [TensorSpec(name=str(i), shape=(length,), dtype="float32", checksum=0) for i, length in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LOT_BYTES", limit)
        cut = list(lots(specs))

    assert [spec for lot in cut for spec in lot] == specs
    assert all(len(lot) == 1 or sum(4 * spec.shape[0] for spec in lot) <= limit for lot in cut)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checksum_changes_with_any_element_and_any_swap_and_does_not_depend_on_how_it_is_cut(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    tensor = torch.randn(11, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = tensor_checksum(tensor)
    changed = [tensor.clone() for _ in range(len(tensor))]
    for index, other in enumerate(changed):
        other[index] += 1
    swapped = tensor[[1, 0, *range(2, 11)]]
    monkeypatch.setattr(module, "_CHECKSUM_ELEMENTS", 3)

    assert tensor_checksum(tensor) == whole
    assert len({whole, tensor_checksum(swapped), *map(tensor_checksum, changed)}) == 13
