"""The parts of the CUDA device that need no device: choices, grids, runs, and the kernel."""

from __future__ import annotations

import ctypes
import os
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flexkv._ext import TO_DEVICE, TO_HOST, PageMap, list_runs, notify_address
from flexkv.common.errors import BackendUnavailableError
from flexkv.io.cuda import kernel
from flexkv.io.cuda.choice import (
    Choice,
    Choices,
    CopyMethod,
    CopyPreference,
    decide,
    decode,
    encode,
    measure,
)
from flexkv.io.cuda.driver import why_no_gds
from flexkv.io.cuda.grids import grids

# -- choices ------------------------------------------------------------------------------------


def test_the_way_that_costs_least_is_taken() -> None:
    """Of the methods about as fast as the best, the one that costs the device least is chosen.

    The copy engine comes first, then the kernel with the fewest thread blocks.
    """
    engine, staged = Choice(CopyMethod.ENGINE), Choice(CopyMethod.STAGED, 16)
    few, some, many = (Choice(CopyMethod.KERNEL, count) for count in (2, 4, 8))
    assert decide({engine: 97.5, some: 100.0, many: 99.0}) == engine
    assert decide({engine: 90.0, few: 50.0, some: 98.0, many: 100.0}) == some
    assert decide({few: 1.0, some: 3.0, many: 3.0}) == some
    assert decide({engine: 7.0, staged: 41.0, some: 50.0}) == staged
    assert decide({engine: 7.0, staged: 39.0, some: 50.0}) == some


def test_choices_hang_on_the_number_of_chunks() -> None:
    """The choice depends on the number of chunks, and survives encoding as JSON.

    Each measured count determines the choice up to halfway to the next count.
    """
    engine, kernel_8 = Choice(CopyMethod.ENGINE), Choice(CopyMethod.KERNEL, 8)

    def timed(choice: Choice, count: int) -> float:
        fast = engine if count < 100 else kernel_8
        return 1.0 if choice == fast else 2.0

    choices = measure(timed, 100_000)
    assert [choices.of(count).method for count in (1, 16, 90, 512, 10**6)] == [
        *[CopyMethod.ENGINE] * 3,
        *[CopyMethod.KERNEL] * 2,
    ]
    assert decode(encode([choices, Choices.always(CopyMethod.STAGED)])) == [
        choices, Choices.always(CopyMethod.STAGED),
    ]  # fmt: skip
    for wrong in (b"", b"[", b"[1]", b'[[[["engine", 8]], [5]]]', b'[[[["none", 8]], []]]'):
        assert decode(wrong) is None


def test_a_wish_is_as_measured_but_for_what_it_says() -> None:
    """A preference overrides what it names (engine or kernel, thread blocks) in measured choices.

    If it names all of that, there is nothing to measure.
    """
    found = Choices((Choice(CopyMethod.STAGED, 16), Choice(CopyMethod.KERNEL, 4)), (100,))
    assert CopyPreference().made_of(found) == found
    assert CopyPreference(use_engine=True).settled == Choices.always(CopyMethod.ENGINE)
    assert CopyPreference(use_engine=False, thread_blocks=3).settled == Choices.always(
        CopyMethod.KERNEL, 3
    )
    assert CopyPreference(use_engine=False).settled is None
    by_kernel = CopyPreference(use_engine=False).made_of(found)
    assert [each.method for each in by_kernel.choices] == [CopyMethod.KERNEL] * 2
    assert CopyPreference(thread_blocks=9).made_of(found).of(200) == Choice(CopyMethod.KERNEL, 9)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(1, 3)), max_size=12))
def test_grids_are_the_runs(places: list[tuple[int, int, int]]) -> None:
    """Grids cover the same bytes as the runs, and evenly spaced rows form one grid."""
    runs = np.array([(1000 + 8 * t, 5000 + 8 * s, n) for t, s, n in places], np.uint64)
    runs = np.ascontiguousarray(runs.reshape(-1, 3).T)
    rows = [
        (grid.target + row * grid.target_pitch, grid.source + row * grid.source_pitch, grid.width)
        for grid in grids(runs)
        for row in range(grid.height)
    ]
    assert sorted(rows) == sorted(map(tuple, runs.T.tolist()))
    apart = np.array([[16 * n for n in range(9)], [900 + 32 * n for n in range(9)], [16] * 9])
    assert [each.height for each in grids(apart.astype(np.uint64))] == [9]


def test_why_there_is_no_direct_storage_is_told() -> None:
    """`why_no_gds` names the missing library, or says that the route is not built."""
    assert "cuFile" in why_no_gds()


# -- runs ----------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 64), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 9)), max_size=12),
    st.sampled_from([TO_HOST, TO_DEVICE]),
    st.booleans(),
)
def test_runs_cover_a_job_and_are_few(
    sizes: list[int], pairs: list[tuple[int, int]], direction: int, dense: bool
) -> None:
    """Runs cover exactly the job's pieces, and neighbours on both ends are always one run."""
    stride = sum(sizes) + (0 if dense else 3)
    host = bytearray(10 * stride)
    host_at = np.frombuffer(host, np.uint8).ctypes.data
    offsets = [sum(sizes[:n]) for n in range(len(sizes))]
    rows = [
        (4096 * (n + 1), size, size, at)
        for n, (size, at) in enumerate(zip(sizes, offsets, strict=True))
    ]
    pages = PageMap(np.array(rows, np.int64), 8, host, stride, None)
    device_ids, host_ids = (np.array([pair[n] for pair in pairs], np.int64) for n in (0, 1))
    out = np.zeros((3, len(pairs) * len(rows) + 1), np.uint64)
    count = list_runs(pages, direction, device_ids, host_ids, out)
    found = [
        (int(target) + byte, int(source) + byte)
        for target, source, size in out[:, :count].T.tolist()
        for byte in range(size)
    ]
    expected = [
        (base + device * step + byte, host_at + block * stride + at + byte)
        for device, block in pairs
        for base, step, size, at in rows
        for byte in range(size)
    ]
    assert found == [(b, a) if direction == TO_HOST else (a, b) for a, b in expected]
    runs = out[:, :count].T.tolist()
    for (target, source, size), following in pairwise(runs):
        assert (target + size, source + size) != tuple(following[:2]), "two runs are one"


def test_runs_that_do_not_fit_are_refused() -> None:
    """Too little room, an id out of range or a buffer of another kind raises."""
    pages = PageMap(np.array([[4096, 8, 8, 0], [8192, 8, 8, 8]]), 4, bytearray(64), 16, None)
    ids = np.arange(2)
    with pytest.raises(ValueError, match="not three times 32"):
        list_runs(pages, TO_HOST, ids, ids, np.zeros((3, 3), np.uint64))
    with pytest.raises(ValueError, match="device_ids"):
        list_runs(pages, TO_HOST, ids + 3, ids, np.zeros((3, 4), np.uint64))
    with pytest.raises(BufferError):
        list_runs(pages, TO_HOST, ids, ids, bytes(96))


def test_a_foreign_thread_adds_to_an_eventfd() -> None:
    """The host function that the driver calls adds one to an eventfd on each call."""
    eventfd = os.eventfd(0, os.EFD_NONBLOCK)
    notify = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(notify_address())
    for _ in range(3):
        notify(eventfd)
    assert os.eventfd_read(eventfd) == 3
    os.close(eventfd)


# -- the kernel ----------------------------------------------------------------------------------

SHIM = """
#define __global__
#define __device__
struct dim { int x; };
static dim blockIdx, gridDim, threadIdx, blockDim;
#include "paged_copy.cu"
extern "C" void run(const piece *pieces, const long long *parts, int piece_count,
                    const long long *ids, long long pairs, char *host, long long stride,
                    int to_host, int blocks, int threads)
{
    gridDim.x = blocks;
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++)
            paged_copy(pieces, parts, piece_count, ids, pairs, host, stride, to_host);
}
"""


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the kernel compiled for this CPU, where its threads run one after another."""
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "shim.cpp").write_text(SHIM)
    (folder / "paged_copy.cu").write_text(kernel.source())
    library = folder / "kernel.so"
    flags = [
        "-std=c++17",
        "-O1",
        "-shared",
        "-fPIC",
        "-Wno-unknown-pragmas",
        "-fsanitize=undefined",
    ]
    subprocess.run(["g++", *flags, "-o", library, folder / "shim.cpp"], check=True)
    return ctypes.CDLL(str(library)).run


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([1, 12, 16, 4096, 32768, 32784, 70_000]), min_size=1, max_size=4),
    st.integers(0, 4),
    st.booleans(),
    st.sampled_from([0, 1, 4]),
    st.integers(1, 5),
)
def test_the_kernel_moves_the_pieces_and_nothing_else(
    on_cpu: Any, sizes: list[int], pairs: int, to_host: bool, skew: int, thread_blocks: int
) -> None:
    """The kernel's arithmetic, at any alignment, moves the same bytes as numpy does."""
    random = np.random.default_rng(sum(sizes) + pairs)
    blocks, stride = 5, sum(sizes) + skew
    device = random.integers(0, 256, skew + blocks * sum(sizes), np.uint8)
    host = random.integers(0, 256, blocks * stride, np.uint8)
    starts = skew + blocks * np.cumsum([0, *sizes[:-1]])
    offsets = np.cumsum([0, *sizes[:-1]])
    pieces = np.stack([device.ctypes.data + starts, sizes, sizes, offsets], axis=1).astype(np.int64)
    parts = kernel.part_starts(np.array(sizes, np.int64))
    ids = np.stack([random.permutation(blocks)[:pairs], random.permutation(blocks)[:pairs]])
    expected_device, expected_host = device.copy(), host.copy()
    for device_id, host_id in ids.T.tolist():
        for start, size, offset in zip(starts.tolist(), sizes, offsets.tolist(), strict=True):
            page = slice(start + device_id * size, start + (device_id + 1) * size)
            block = slice(host_id * stride + offset, host_id * stride + offset + size)
            if to_host:
                expected_host[block] = device[page]
            else:
                expected_device[page] = host[block]

    def address(array: NDArray[np.generic]) -> ctypes.c_void_p:
        return ctypes.c_void_p(array.ctypes.data)

    flat = np.ascontiguousarray(ids, np.int64)
    on_cpu(
        address(pieces), address(parts), len(sizes), address(flat), ctypes.c_longlong(pairs),
        address(host), ctypes.c_longlong(stride), int(to_host), thread_blocks, 64,
    )  # fmt: skip
    assert np.array_equal(device, expected_device)
    assert np.array_equal(host, expected_host)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_the_kernel_compiles_and_is_kept(
    tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVRTC compiles the kernel without a GPU; the result is kept and read the second time."""
    pytest.importorskip("cuda.bindings.nvrtc")
    code = kernel.cubin(architecture, tmp_path)
    assert code.startswith(b"\x7fELF")
    monkeypatch.setattr(kernel, "_compile", None)
    assert kernel.cubin(architecture, tmp_path) == code
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(code[:100])  # a truncated file: a caller that cannot load it passes `anew`
    monkeypatch.undo()
    assert kernel.cubin(architecture, tmp_path, anew=True) == code == kept.read_bytes()


def test_an_architecture_that_is_unknown_is_named(tmp_path: Path) -> None:
    """An unknown architecture is an error that names it, and nothing is kept."""
    pytest.importorskip("cuda.bindings.nvrtc")
    with pytest.raises(BackendUnavailableError, match="sm_12: NVRTC_ERROR"):
        kernel.cubin("sm_12", tmp_path)
    assert not list(tmp_path.iterdir())
