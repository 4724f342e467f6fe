"""The device side of a lookup: several requests in one launch, lanes that are used again, a device that fails.

"cpu:0" goes the way of a GPU's tensors, without pinned memory and streams; tests marked gpu need the real thing.
"""

# Shapes: B ids of a part, D embedding_dim.

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.scheme_cases import Case, every_case, same, served, stored_tensors
from torch import Tensor

from embstore import device as device_module
from embstore.device import LANES_KEPT, LEAST_IDS, Device, Part, device_failure, device_named, hand_out, in_batches
from embstore.errors import DeviceFailed, Overloaded
from embstore.schemes import Full

N, D = 50, 8
WEIGHT = torch.arange(N * D, dtype=torch.float32).view(N, D) + 1
KEPT = -0.5
"""What vectors hold that nobody may touch."""


@pytest.fixture(params=["cpu:0", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest) -> str:
    """Each kind of device that has tensors of its own."""
    name: str = request.param
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device here")
    return name


@pytest.fixture(autouse=True)
def _own_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that fails in one test is well again in the next."""
    monkeypatch.setattr(device_module, "_DEVICES", {})


def gather(place: str) -> Any:
    """The lookup of a full table on a device."""
    return partial(Full.lookup, Full(N, D).config, {"weight": WEIGHT.to(place)})


def part(*rows: int) -> Part:
    """Rows, and vectors full of KEPT."""
    return np.array(rows, np.int64), np.full((len(rows), D), KEPT, np.float32)


def expected(rows_B: Any) -> Any:
    """What a part of these rows holds after a lookup."""
    vectors_BD = WEIGHT.numpy()[np.maximum(rows_B, -1)]
    vectors_BD[rows_B < 0] = KEPT
    return vectors_BD


def check(parts: list[Part]) -> None:
    """Every part has its own rows' vectors."""
    for rows_B, vectors_BD in parts:
        np.testing.assert_array_equal(vectors_BD, expected(rows_B))


@every_case
def test_every_scheme_gives_each_part_the_vectors_of_a_lookup_alone(case: Case, place: str) -> None:
    """Three requests in one launch get what the compiled loop gives each of them."""
    module = case.filled()
    lookup = partial(case.cls.lookup, module.export()[0], stored_tensors(module, "float32", place))
    rows = [torch.tensor(some) for some in ([0, 3, 3, module.num_embeddings - 1], [5], [7, 0, 2])]
    parts = [(ids.numpy(), np.empty((len(ids), module.embedding_dim), np.float32)) for ids in rows]
    Device(place).compose(lookup, parts)
    rtol = max(case.variant.rtol, 1e-5) if place == "cuda" else case.variant.rtol
    assert all(
        same(torch.from_numpy(vectors), served(module, ids), rtol)
        for ids, (_, vectors) in zip(rows, parts, strict=True)
    )


def test_missing_rows_keep_the_callers_vectors_whatever_the_lane_held_before(place: str) -> None:
    """A lane is used again, and no vector of the request before is seen by the next."""
    device, lookup = Device(place), gather(place)
    before = [part(*range(N))]
    device.compose(lookup, before)
    parts = [part(-1, 4, -7), part(-1), part(9, 9), part(), part(-(2**63), 0)]
    device.compose(lookup, parts)
    check(before + parts)


def test_read_only_ids_are_taken_as_they_are(place: str) -> None:
    """Ids of a request are a view of its body."""
    rows_B, vectors_BD = part(1, 2, -1)
    rows_B.flags.writeable = False
    Device(place).compose(gather(place), [(rows_B, vectors_BD)])
    check([(rows_B, vectors_BD)])


def test_no_parts_and_no_rows_need_no_launch(place: str) -> None:
    """Nothing asked, nothing done."""

    def lookup(ids: Tensor, out: Tensor) -> None:
        raise AssertionError("launched")

    Device(place).compose(lookup, [])
    Device(place).compose(lookup, [part(), part()])


def test_what_does_not_fit_a_lane_goes_in_several_launches(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors are the same, and no launch has more than a lane holds."""
    monkeypatch.setattr(device_module, "STAGED_BYTES", 4 * D * 7)
    sizes: list[int] = []
    lookup = gather(place)

    def counted(ids: Tensor, out: Tensor) -> None:
        sizes.append(len(ids))
        lookup(ids, out)

    parts = [part(1, 2, 3), part(*range(20), -1), part(5)]
    Device(place).compose(counted, parts)
    check(parts)
    assert sizes == [7, 7, 7, 4]


def test_a_lane_grows_by_powers_of_two_and_is_used_again(place: str) -> None:
    """Memory is asked for when a lookup is larger than all before it, and not otherwise."""
    device, lookup = Device(place), gather(place)
    sizes, buffers = [], []
    for num_ids in (1, 900, 1025, 700, 2048, 1):
        parts = [part(*(i % N for i in range(num_ids)))]
        device.compose(lookup, parts)
        check(parts)
        (lane,) = device._idle
        sizes.append((len(lane.ids), len(lane.vectors)))
        buffers.append((lane.ids.data_ptr(), lane.vectors_down.data_ptr()))
    assert [ids for ids, _ in sizes] == [LEAST_IDS, LEAST_IDS, 2048, 2048, 2048, 2048]
    assert [floats for _, floats in sizes] == [8, 8192, 16384, 16384, 16384, 16384]
    assert buffers[2] == buffers[3] == buffers[4] == buffers[5]


def test_lookups_at_once_have_lanes_of_their_own_and_few_are_kept(place: str) -> None:
    """Eight lookups that are all inside their launch at the same time do not disturb each other."""
    device, lookup = Device(place), gather(place)
    all_in = threading.Barrier(8, timeout=30)

    def together(ids: Tensor, out: Tensor) -> None:
        all_in.wait()
        lookup(ids, out)
        all_in.wait()

    parts = [part(n, -1, n + 8, *range(n)) for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda one: device.compose(together, [one]), parts))
    check(parts)
    assert len(device._idle) == LANES_KEPT


class FakeEvent:
    """Stands for a CUDA event: the device is done when it is waited for, not before."""

    def __init__(self, log: list[str], vectors_BD: Any) -> None:
        self.log, self.vectors_BD = log, vectors_BD

    def record(self) -> None:
        self.log.append("recorded")

    def synchronize(self) -> None:
        assert (self.vectors_BD == KEPT).all(), "vectors were read before the device was done"
        self.log.append("waited")


def test_vectors_are_read_once_the_event_is_over() -> None:
    """Launch, record, wait, and only then are vectors handed out."""
    device, log = Device("cpu:0"), list[str]()
    lane, one = device._lane(), part(3, 1)
    lane.done = FakeEvent(log, one[1])  # type: ignore[assignment]
    device._idle.append(lane)
    lookup = gather("cpu:0")

    def logged(ids: Tensor, out: Tensor) -> None:
        log.append("launched")
        lookup(ids, out)

    device.compose(logged, [one])
    check([one])
    assert log == ["launched", "recorded", "waited"]


def fails(error: Exception) -> Any:
    """A lookup that raises."""

    def lookup(ids: Tensor, out: Tensor) -> None:
        raise error

    return lookup


def test_too_little_memory_is_overload_and_the_device_goes_on(place: str) -> None:
    """Out of memory is Overloaded, whoever says so (the allocator, CUDA, cuBLAS), and the device goes on."""
    device = Device(place)
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ):
        with pytest.raises(Overloaded, match="no memory left for this lookup"):
            device.compose(fails(error), [part(1)])
    one = part(1)
    device.compose(gather(place), [one])
    check([one])
    assert device.failure is None


def test_an_error_of_the_launch_alone_is_raised_as_it_is_and_its_lane_is_dropped(place: str) -> None:
    """An error of the launch is raised as it is while the device still answers, and its lane is not used again."""
    device = Device(place)
    device.compose(gather(place), [part(1)])
    with pytest.raises(ValueError, match="a bug"):
        device.compose(fails(ValueError("a bug")), [part(1)])
    assert device.failure is None
    assert device._idle == []


def test_a_device_that_does_not_answer_is_sick_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first error says why, later lookups are refused before they touch the device, and the process knows."""
    device = device_named("cpu:0")
    assert device_named("cpu:0") is device
    assert device_failure() is None
    lost = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(torch, "zeros", fails_always(lost))
    with pytest.raises(DeviceFailed, match=r"device cpu:0 has failed; the process has to be started again") as caught:
        device.compose(fails(lost), [part(1)])
    assert caught.value.__cause__ is lost
    monkeypatch.undo()  # a context that failed stays so, whatever it answers
    monkeypatch.setitem(device_module._DEVICES, "cpu:0", device)
    with pytest.raises(DeviceFailed):
        device.compose(fails(AssertionError("launched")), [part(1)])
    with pytest.raises(DeviceFailed), device.watched():
        raise AssertionError("ran")
    assert device_failure() == "device cpu:0 has failed; the process has to be started again"


def fails_always(error: Exception) -> Any:
    """Stands for every call to a device that is lost."""

    def call(*args: Any, **options: Any) -> None:
        raise error

    return call


rows = st.lists(st.integers(-3, N - 1), max_size=12)


@given(st.lists(rows, max_size=8), st.integers(1, 20))
def test_parts_are_cut_into_batches_and_put_together_again(many: list[list[int]], limit: int) -> None:
    """Whatever the sizes: every batch but the last is full, order is kept, and every part gets its own vectors."""
    parts = [part(*some) for some in many]
    batches = list(in_batches(parts, limit))
    sizes = [sum(len(rows_B) for rows_B, _ in batch) for batch in batches]
    assert all(size == limit for size in sizes[:-1])
    assert sum(sizes) == sum(len(some) for some in many)
    assert all(len(rows_B) for batch in batches for rows_B, _ in batch)
    assert [row for batch in batches for rows_B, _ in batch for row in rows_B] == [row for some in many for row in some]
    for batch in batches:
        rows_S = np.concatenate([rows_B for rows_B, _ in batch])
        composed_SD = WEIGHT.numpy()[rows_S]
        composed_SD[rows_S < 0] = np.nan
        hand_out(composed_SD, batch)
    check(parts)


@pytest.fixture
def cuda() -> Device:
    """The real thing."""
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device here")
    return Device("cuda")


@pytest.mark.gpu
def test_a_lookup_on_a_gpu_has_pinned_memory_and_stays_off_the_default_stream(cuda: Device) -> None:
    """Copies are asynchronous only from pinned memory; the default stream is left to whoever loads versions."""
    streams: list[int] = []
    lookup = gather("cuda")

    def noted(ids: Tensor, out: Tensor) -> None:
        streams.append(torch.cuda.current_stream().cuda_stream)
        lookup(ids, out)

    one = part(1, -1, 3)
    cuda.compose(noted, [one])
    check([one])
    (lane,) = cuda._idle
    assert lane.ids_up.is_pinned()
    assert lane.vectors_down.is_pinned()
    assert lane.vectors.is_cuda
    assert streams == [lane.stream.cuda_stream]  # type: ignore[union-attr]
    assert streams != [torch.cuda.default_stream().cuda_stream]


@pytest.mark.gpu
def test_lookups_go_on_while_the_default_stream_is_busy(cuda: Device) -> None:
    """A version that is being loaded there does not hold a lookup up."""
    lookup = gather("cuda")
    cuda.compose(lookup, [part(1)])
    torch.cuda._sleep(4_000_000_000)  # about two seconds
    one = part(*range(N))
    cuda.compose(lookup, [one])
    check([one])
    assert not torch.cuda.default_stream().query()
    torch.cuda.synchronize()


BROKEN = """
import numpy as np, torch
from embstore.device import device_named, device_failure
from embstore.errors import DeviceFailed

def lookup(ids, out):
    torch.zeros(4, device="cuda")[torch.tensor([2**40], device="cuda")]

device, one = device_named("cuda"), (np.zeros(1, np.int64), np.zeros((1, 4), np.float32))
for _ in range(2):
    try:
        device.compose(lookup, [one])
    except DeviceFailed as error:
        print(error, device_failure() == str(error))
"""


@pytest.mark.gpu
def test_a_broken_context_is_told_from_a_bug(cuda: Device) -> None:
    """A real assertion on the device, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True, timeout=200)
    line = "device cuda has failed; the process has to be started again True"
    assert done.stdout.splitlines() == [line, line], done.stderr
