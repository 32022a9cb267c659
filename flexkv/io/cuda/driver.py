"""What the CUDA device port needs of the driver: a small protocol, and the real driver behind it.

Functions of the hot path are called by address, so that a batch of 100,000 copies is three arrays
and one call, without the GIL.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from flexkv._ext import notify_address
from flexkv.common.errors import BackendUnavailableError, DeviceError
from flexkv.io.cuda import kernel
from flexkv.io.cuda.grids import Grid, Runs, grids

INVALID_VALUE, NOT_FOUND, NOT_READY = 1, 500, 600
CAPTURING = range(900, 908)
"""Results while another thread captures a graph; nothing is wrong with the stream then."""


class Launch(NamedTuple):
    """The arguments of the paged-copy kernels, in their order; addresses are device addresses.

    `stage_bytes` is the size of a stage for the kernel of bulk copies; 0 if that kernel does not
    suit (`kernel.stage_bytes`).
    """

    pieces: int
    parts: int
    piece_count: int
    ids: int
    pairs: int
    host: int
    host_stride: int
    to_host: int
    stage_bytes: int = 0


class CudaDriver(Protocol):
    """One device, and work on its streams. Every call may raise DeviceError.

    Attributes:
        named: the device and its driver, in words; measurements are kept under it.
    """

    named: str

    def inside(self) -> AbstractContextManager[None]:
        """Enter the device's context once for several calls, instead of once for each call."""
        ...

    def open_stream(self, urgent: bool) -> int:
        """Return a new stream that waits for no other implicitly; urgent work goes first."""
        ...

    def synchronize(self, stream: int) -> None:
        """Return once all work queued on a stream has ended."""
        ...

    def close_stream(self, stream: int) -> None:
        """Wait for the work of a stream to end, and close it."""
        ...

    def register(self, address: int, size: int) -> None:
        """Register host memory, so that the device can use it under its host address."""
        ...

    def unregister(self, address: int) -> None:
        """Undo `register`."""
        ...

    def upload(self, table: NDArray[np.int64]) -> int:
        """Copy a table to device memory, and return its address there."""
        ...

    def allocate(self, size: int) -> int:
        """Allocate device memory, and return its address."""
        ...

    def free(self, address: int) -> None:
        """Free device memory from `upload` or `allocate`."""
        ...

    def copy(self, runs: Runs, stream: int) -> None:
        """Queue copies, which may run in any order."""
        ...

    def launch(self, launch: Launch, thread_blocks: int, stream: int) -> None:
        """Queue a paged copy by one of the kernels."""
        ...

    def notify(self, stream: int, eventfd: int) -> None:
        """Add 1 to an eventfd once all work queued so far on a stream has succeeded."""
        ...

    def current_stream(self) -> int:
        """Return the stream on which the calling thread's framework queues work."""
        ...

    def is_capturing(self, stream: int) -> bool:
        """Return whether a graph is being captured from a stream."""
        ...

    def open_event(self) -> int:
        """Return a new event; waiting for it has no effect until it is recorded."""
        ...

    def record(self, event: int, stream: int) -> None:
        """Record an event: it happens once all work queued so far on a stream has ended."""
        ...

    def wait(self, stream: int, event: int) -> None:
        """Make later work of a stream wait for an event, as it was recorded last."""
        ...

    def drop(self, event: int) -> None:
        """Destroy an event; work that waits for it still does."""
        ...

    def check(self, stream: int) -> None:
        """Raise DeviceError if a stream has failed, so that its queued work will never end."""
        ...

    def close(self) -> None:
        """Release the device. Idempotent."""
        ...


_COPY = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p
)
_POINTERS = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_ATTRIBUTES = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_BATCH = ctypes.CFUNCTYPE(ctypes.c_int, *_POINTERS, *_ATTRIBUTES, ctypes.c_void_p)
_BATCH_12 = ctypes.CFUNCTYPE(
    ctypes.c_int, *_POINTERS, *_ATTRIBUTES, ctypes.c_void_p, ctypes.c_void_p
)
_NOTIFY = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)

_TYPES = (
    ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_longlong,
    ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int, ctypes.c_int, ctypes.c_int,
)  # fmt: skip
"""The C types of the fields of `Launch`, and of the number of stages."""


class BoundDriver:
    """The driver of this machine, through cuda-python, with a device's primary context.

    Attributes:
        architecture: the device's architecture, such as "sm_90".
        ordinal: the device's number.
        named: the device and its driver, in words; measurements are kept under it.
    """

    def __init__(self, ordinal: int) -> None:
        """Open a device.

        Raises:
            BackendUnavailableError: cuda-python, the driver or a kernel for the device is missing.
            DeviceError: the driver reported an error.
        """
        try:
            from cuda.bindings import driver

            self._api: Any = driver
            self._call(driver.cuInit, 0)
        except (ImportError, RuntimeError) as error:  # the latter if there is no driver
            raise BackendUnavailableError("cuda", f"{error}; install flexkv[cuda]") from error
        self.ordinal = ordinal
        self._thread = threading.local()
        self._version = int(self._call(driver.cuDriverGetVersion))
        self._device = self._call(driver.cuDeviceGet, ordinal)
        name = bytes(self._call(driver.cuDeviceGetName, 256, self._device)).split(b"\0")[0]
        self.named = f"{name.decode()}, driver {self._version}"
        with ExitStack() as undo:
            self._context: Any = self._call(driver.cuDevicePrimaryCtxRetain, self._device)
            undo.callback(self._call, driver.cuDevicePrimaryCtxRelease, self._device)
            with self.inside():
                self._load()
            self._resources = undo.pop_all()

    def _load(self) -> None:
        """Load the kernels, and find the functions that are called by address."""
        driver = self._api
        major, minor = (self._fact(f"COMPUTE_CAPABILITY_{part}") for part in ("MAJOR", "MINOR"))
        self.architecture = f"sm_{major}{minor}"
        try:
            self._module = self._call(driver.cuModuleLoadData, kernel.cubin(self.architecture))
        except DeviceError:  # the kept code may be cut short
            code = kernel.cubin(self.architecture, anew=True)
            self._module = self._call(driver.cuModuleLoadData, code)
        self._kernel = self._call(driver.cuModuleGetFunction, self._module, kernel.NAME.encode())
        self._stage_memory = 0
        if major >= kernel.BULK_SINCE:
            self._bulk = self._call(
                driver.cuModuleGetFunction, self._module, kernel.BULK_NAME.encode()
            )
            most = self._fact("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
            self._stage_memory = min(kernel.STAGE_MEMORY, most - kernel.STAGE_MEMORY_LESS)
            attribute = driver.CUfunction_attribute
            self._call(
                driver.cuFuncSetAttribute,
                self._bulk,
                attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                self._stage_memory,
            )
        self._copy_one = _COPY(self._address("cuMemcpyAsync", 4000))
        self._notify = _NOTIFY(self._address("cuLaunchHostFunc", 10000))
        self._batch = self._find_batch()

    def _fact(self, name: str) -> int:
        """Return an attribute of the device."""
        attribute = getattr(self._api.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self._call(self._api.cuDeviceGetAttribute, attribute, self._device))

    def _within(self, function: Callable[..., tuple[Any, ...]], *args: Any) -> Any:
        """Call a function of the driver in the device's context."""
        with self.inside():
            return self._call(function, *args)

    def _call(self, function: Callable[..., tuple[Any, ...]], *args: Any) -> Any:
        result, *values = function(*args)
        if result != self._api.CUresult.CUDA_SUCCESS:
            raise DeviceError(function.__name__, int(result))
        return tuple(values) if len(values) > 1 else values[0] if values else None

    def _address(self, name: str, version: int) -> int:
        if version > self._version:
            raise DeviceError(name, NOT_FOUND)
        answer = self._call(self._api.cuGetProcAddress, name.encode(), version, 0)
        address = int((answer[0] if isinstance(answer, tuple) else answer) or 0)
        if not address:  # although the call succeeded
            raise DeviceError(name, NOT_FOUND)
        return address

    def _find_batch(self) -> Callable[[Runs, int], int]:
        """Return a function for many copies: one of the driver's two forms, or a loop."""
        attributes = self._api.CUmemcpyAttributes()
        order = self._api.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        attributes.srcAccessOrder = order
        first = ctypes.c_size_t(0)
        fail_index = ctypes.c_size_t(0)
        held = (attributes, first, fail_index)  # kept alive by `batch`
        at, zero = attributes.getPtr(), ctypes.addressof(first)
        more_of_12 = (ctypes.addressof(fail_index),)
        for version, form, more in ((13000, _BATCH, ()), (12080, _BATCH_12, more_of_12)):
            try:
                function = form(self._address("cuMemcpyBatchAsync", version))
            except DeviceError:
                continue

            def batch(runs: Runs, stream: int, function: Any = function, more: Any = more) -> int:
                rows = [row.ctypes.data for row in runs]
                assert held
                return int(function(*rows, runs.shape[1], at, zero, 1, *more, stream))

            return batch
        return self._copy_each

    def _copy_each(self, runs: Runs, stream: int) -> int:
        """Queue copies if the driver takes no batches: one call for each grid."""
        for grid in grids(runs):
            code = INVALID_VALUE
            if grid.height > 1:
                (result,) = self._api.cuMemcpy2DAsync(self._grid(grid), stream)
                code = int(result)
            if code == INVALID_VALUE:  # its rows may be in several allocations
                code = self._copy_rows(grid, stream)
            if code:
                return code
        return 0

    def _copy_rows(self, grid: Grid, stream: int) -> int:
        for row in range(grid.height):
            target = grid.target + row * grid.target_pitch
            source = grid.source + row * grid.source_pitch
            if code := int(self._copy_one(target, source, grid.width, stream)):
                return code
        return 0

    def _grid(self, grid: Grid) -> Any:
        unified = self._api.CUmemorytype.CU_MEMORYTYPE_UNIFIED
        told = self._api.CUDA_MEMCPY2D()
        told.srcMemoryType = told.dstMemoryType = unified
        told.srcDevice, told.srcPitch = grid.source, grid.source_pitch
        told.dstDevice, told.dstPitch = grid.target, grid.target_pitch
        told.WidthInBytes, told.Height = grid.width, grid.height
        return told

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Make the context current in this thread, unless it is, and restore the former one."""
        if getattr(self._thread, "is_inside", False):
            yield
            return
        self._thread.is_inside = True
        try:
            with self._entered():
                yield
        finally:
            self._thread.is_inside = False

    @contextmanager
    def _entered(self) -> Iterator[None]:
        relaxed = self._api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        self._call(self._api.cuCtxPushCurrent, self._context)
        try:
            # Another thread may be capturing a graph; the calls made here are not part of it.
            mode = self._call(self._api.cuThreadExchangeStreamCaptureMode, relaxed)
            try:
                yield
            finally:
                self._call(self._api.cuThreadExchangeStreamCaptureMode, mode)
        finally:
            self._call(self._api.cuCtxPopCurrent)

    def open_stream(self, urgent: bool) -> int:
        """Return a new stream."""
        with self.inside():
            least, greatest = self._call(self._api.cuCtxGetStreamPriorityRange)
            flags = int(self._api.CUstream_flags.CU_STREAM_NON_BLOCKING)
            priority = greatest if urgent else least
            return int(self._call(self._api.cuStreamCreateWithPriority, flags, priority))

    def synchronize(self, stream: int) -> None:
        """Return once all work queued on a stream has ended."""
        self._within(self._api.cuStreamSynchronize, stream)

    def close_stream(self, stream: int) -> None:
        """Wait for the work of a stream to end, and close it."""
        with self.inside():
            self._call(self._api.cuStreamSynchronize, stream)
            self._call(self._api.cuStreamDestroy, stream)

    def register(self, address: int, size: int) -> None:
        """Register host memory, so that the device can use it in any context."""
        with self.inside():
            flags = self._api.CU_MEMHOSTREGISTER_PORTABLE | self._api.CU_MEMHOSTREGISTER_DEVICEMAP
            self._call(self._api.cuMemHostRegister, address, size, flags)

    def unregister(self, address: int) -> None:
        """Undo `register`."""
        self._within(self._api.cuMemHostUnregister, address)

    def upload(self, table: NDArray[np.int64]) -> int:
        """Copy a table to device memory, and return its address there."""
        with self.inside():
            address = int(self._call(self._api.cuMemAlloc, table.nbytes))
            try:
                self._call(self._api.cuMemcpyHtoD, address, table.ctypes.data, table.nbytes)
                # From pageable memory the call may return before the bytes have arrived.
                self._call(self._api.cuStreamSynchronize, 0)
            except DeviceError:
                self._call(self._api.cuMemFree, address)
                raise
        return address

    def allocate(self, size: int) -> int:
        """Allocate device memory."""
        return int(self._within(self._api.cuMemAlloc, size))

    def free(self, address: int) -> None:
        """Free device memory."""
        self._within(self._api.cuMemFree, address)

    def copy(self, runs: Runs, stream: int) -> None:
        """Queue copies."""
        with self.inside():
            if runs.shape[1] and (code := self._batch(runs, stream)):
                raise DeviceError("cuMemcpyBatchAsync", code)

    def launch(self, launch: Launch, thread_blocks: int, stream: int) -> None:
        """Queue a paged copy by one of the kernels."""
        stages = kernel.stages(launch.stage_bytes, self._stage_memory)
        function, threads, shared = self._kernel, kernel.THREADS, 0
        arguments: tuple[int, ...] = tuple(launch)[:-1]
        if stages:
            function, threads, shared = self._bulk, kernel.LANES, stages * launch.stage_bytes
            arguments = (*launch, stages)
        shape = (thread_blocks, 1, 1, threads, 1, 1, shared)
        told = arguments, _TYPES[: len(arguments)]
        with self.inside():
            self._call(self._api.cuLaunchKernel, function, *shape, stream, told, 0)

    def notify(self, stream: int, eventfd: int) -> None:
        """Add 1 to an eventfd once all work queued so far on a stream has succeeded."""
        with self.inside():
            if code := int(self._notify(stream, notify_address(), eventfd)):
                raise DeviceError("cuLaunchHostFunc", code)

    def current_stream(self) -> int:
        """Return torch's current stream of this thread and device; without torch, the default."""
        torch = sys.modules.get("torch")
        return 0 if torch is None else int(torch.cuda.current_stream(self.ordinal).cuda_stream)

    def is_capturing(self, stream: int) -> bool:
        """Return whether a graph is being captured from a stream."""
        with self.inside():
            result, *status = self._api.cuStreamIsCapturing(stream)
        if int(result) in CAPTURING:  # the default stream waits for one that is captured
            return True
        if int(result):
            raise DeviceError("cuStreamIsCapturing", int(result))
        return bool(int(status[0]))

    def open_event(self) -> int:
        """Return a new event."""
        with self.inside():
            flags = int(self._api.CUevent_flags.CU_EVENT_DISABLE_TIMING)
            return int(self._call(self._api.cuEventCreate, flags))

    def record(self, event: int, stream: int) -> None:
        """Record an event: it happens once all work queued so far on a stream has ended."""
        self._within(self._api.cuEventRecord, event, stream)

    def wait(self, stream: int, event: int) -> None:
        """Make later work of a stream wait for an event."""
        self._within(self._api.cuStreamWaitEvent, stream, event, 0)

    def drop(self, event: int) -> None:
        """Destroy an event; work that waits for it still does."""
        self._within(self._api.cuEventDestroy, event)

    def check(self, stream: int) -> None:
        """Raise DeviceError if a stream has failed, so that its queued work will never end."""
        with self.inside():
            (result,) = self._api.cuStreamQuery(stream)
        if int(result) not in (0, NOT_READY, *CAPTURING):
            raise DeviceError("cuStreamQuery", int(result))

    def close(self) -> None:
        """Release the device. Idempotent."""
        if self._context is None:
            return
        try:
            with self.inside():
                self._call(self._api.cuModuleUnload, self._module)
        finally:
            self._context = None
            self._resources.close()


def why_no_gds() -> str:
    """Return why blocks do not go between SSD and GPU directly. Asks no device, so cannot hang."""
    try:
        from cuda.bindings import cufile

        version = cufile.get_version()
    except (ImportError, RuntimeError) as error:  # the latter if the library is missing
        return f"cuFile is not available: {error}"
    return f"cuFile {version} is available, but not used: it would bypass the checksums"
