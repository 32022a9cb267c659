"""What the CUDA device port needs of the driver: a small protocol, and the driver behind it.

The functions of the hot path are called by their addresses, so that a batch of 100,000 copies is
three arrays and one call, without the GIL.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from flexkv._ext import notify_address
from flexkv.common.errors import BackendUnavailableError, DeviceError
from flexkv.io.cuda import kernel

Runs = NDArray[np.uint64]
"""uint64[3, n]: addresses of targets and sources, and bytes of each."""


class Launch(NamedTuple):
    """The arguments of the paged-copy kernel, in its order; addresses are the device's."""

    pieces: int
    parts: int
    piece_count: int
    ids: int
    pairs: int
    host: int
    host_stride: int
    to_host: int


class CudaDriver(Protocol):
    """One device, and work on its streams. Every call may raise DeviceError."""

    def open_stream(self, urgent: bool) -> int:
        """Give a new stream that orders itself against no other; urgent work goes first."""
        ...

    def close_stream(self, stream: int) -> None:
        """Wait for a stream, and close it."""
        ...

    def register(self, address: int, size: int) -> None:
        """Let the device read and write host memory under its own address."""
        ...

    def unregister(self, address: int) -> None:
        """Take that back."""
        ...

    def upload(self, table: NDArray[np.int64]) -> int:
        """Give the device address of a copy of a table."""
        ...

    def free(self, address: int) -> None:
        """Let go of what `upload` gave."""
        ...

    def copy(self, runs: Runs, stream: int) -> None:
        """Queue copies, in no order among them."""
        ...

    def launch(self, launch: Launch, thread_blocks: int, stream: int) -> None:
        """Queue a paged copy by the kernel."""
        ...

    def notify(self, stream: int, eventfd: int) -> None:
        """Add 1 to an eventfd once all that is queued by now has ended well."""
        ...

    def order(self, stream: int, after: int) -> None:
        """Let a stream wait, from now on, for what is queued on another by now."""
        ...

    def check(self, stream: int) -> None:
        """Raise DeviceError if a stream will never end what is queued."""
        ...

    def close(self) -> None:
        """Let go of the device. Idempotent."""
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
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_longlong,
    ctypes.c_void_p,
    ctypes.c_longlong,
    ctypes.c_int,
)
"""Of the fields of `Launch`."""


class BoundDriver:
    """The driver of this machine, through cuda-python, with a device's primary context.

    Attributes:
        architecture: of the device, such as "sm_90".
    """

    def __init__(self, ordinal: int) -> None:
        """Open a device.

        Raises:
            BackendUnavailableError: no cuda-python, no driver, or no kernel for the device.
            DeviceError: the driver refused.
        """
        try:
            from cuda.bindings import driver

            self._api: Any = driver
            self._call(driver.cuInit, 0)
        except (ImportError, RuntimeError) as error:  # what it raises where there is no driver
            raise BackendUnavailableError("cuda", f"{error}; install flexkv[cuda]") from error
        self._device = self._call(driver.cuDeviceGet, ordinal)
        self._context: Any = self._call(driver.cuDevicePrimaryCtxRetain, self._device)
        self._enter()
        capability = driver.CUdevice_attribute
        major, minor = (
            self._call(driver.cuDeviceGetAttribute, attribute, self._device)
            for attribute in (
                capability.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                capability.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        self.architecture = f"sm_{major}{minor}"
        self._module = self._call(driver.cuModuleLoadData, kernel.cubin(self.architecture))
        self._kernel = self._call(driver.cuModuleGetFunction, self._module, kernel.NAME.encode())
        self._copy_one = _COPY(self._address("cuMemcpyAsync", 4000))
        self._notify = _NOTIFY(self._address("cuLaunchHostFunc", 10000))
        self._batch = self._find_batch()

    def _call(self, function: Callable[..., tuple[Any, ...]], *args: Any) -> Any:
        result, *values = function(*args)
        if result != self._api.CUresult.CUDA_SUCCESS:
            raise DeviceError(function.__name__, int(result))
        return values[0] if values else None

    def _address(self, name: str, version: int) -> int:
        return int(self._call(self._api.cuGetProcAddress, name.encode(), version, 0) or 0)

    def _find_batch(self) -> Callable[[Runs, int], int]:
        """Give the call for many copies: one of the driver's two forms, or a loop."""
        attributes = self._api.CUmemcpyAttributes()
        order = self._api.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        attributes.srcAccessOrder = order
        first = ctypes.c_size_t(0)
        held = (attributes, first)  # as long as the calls below
        at, zero = attributes.getPtr(), ctypes.addressof(first)
        for version, form, more in ((13000, _BATCH, ()), (12080, _BATCH_12, (1,))):
            try:
                function = form(self._address("cuMemcpyBatchAsync", version))
            except DeviceError:
                continue

            def batch(runs: Runs, stream: int, function: Any = function, more: Any = more) -> int:
                fail_index = (ctypes.addressof(ctypes.c_size_t(0)),) if more else ()
                rows = [row.ctypes.data for row in runs]
                assert held
                return int(function(*rows, runs.shape[1], at, zero, 1, *fail_index, stream))

            return batch
        return self._copy_each

    def _copy_each(self, runs: Runs, stream: int) -> int:
        for target, source, size in runs.T.tolist():
            if code := int(self._copy_one(target, source, size, stream)):
                return code
        return 0

    def _enter(self) -> None:
        """Make the context this thread's: another library may have changed it."""
        self._call(self._api.cuCtxSetCurrent, self._context)

    def open_stream(self, urgent: bool) -> int:
        """Give a new stream."""
        self._enter()
        result, least, greatest = self._api.cuCtxGetStreamPriorityRange()
        if result != self._api.CUresult.CUDA_SUCCESS:
            raise DeviceError("cuCtxGetStreamPriorityRange", int(result))
        flags = int(self._api.CUstream_flags.CU_STREAM_NON_BLOCKING)
        priority = greatest if urgent else least
        return int(self._call(self._api.cuStreamCreateWithPriority, flags, priority))

    def close_stream(self, stream: int) -> None:
        """Wait for a stream, and close it."""
        self._enter()
        self._call(self._api.cuStreamSynchronize, stream)
        self._call(self._api.cuStreamDestroy, stream)

    def register(self, address: int, size: int) -> None:
        """Let the device read and write host memory, from any context."""
        self._enter()
        flags = self._api.CU_MEMHOSTREGISTER_PORTABLE | self._api.CU_MEMHOSTREGISTER_DEVICEMAP
        self._call(self._api.cuMemHostRegister, address, size, flags)

    def unregister(self, address: int) -> None:
        """Take that back."""
        self._enter()
        self._call(self._api.cuMemHostUnregister, address)

    def upload(self, table: NDArray[np.int64]) -> int:
        """Give the device address of a copy of a table."""
        self._enter()
        address = int(self._call(self._api.cuMemAlloc, table.nbytes))
        self._call(self._api.cuMemcpyHtoD, address, table.ctypes.data, table.nbytes)
        return address

    def free(self, address: int) -> None:
        """Let go of it."""
        self._enter()
        self._call(self._api.cuMemFree, address)

    def copy(self, runs: Runs, stream: int) -> None:
        """Queue copies."""
        self._enter()
        if runs.shape[1] and (code := self._batch(runs, stream)):
            raise DeviceError("cuMemcpyBatchAsync", code)

    def launch(self, launch: Launch, thread_blocks: int, stream: int) -> None:
        """Queue a paged copy by the kernel."""
        self._enter()
        grid, block = (thread_blocks, 1, 1), (kernel.THREADS, 1, 1)
        arguments = (tuple(launch), _TYPES)
        self._call(self._api.cuLaunchKernel, self._kernel, *grid, *block, 0, stream, arguments, 0)

    def notify(self, stream: int, eventfd: int) -> None:
        """Add 1 to an eventfd once all that is queued by now has ended well."""
        self._enter()
        if code := int(self._notify(stream, notify_address(), eventfd)):
            raise DeviceError("cuLaunchHostFunc", code)

    def order(self, stream: int, after: int) -> None:
        """Let a stream wait for another, by an event that lives as long as it is waited for."""
        self._enter()
        flags = int(self._api.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        event = self._call(self._api.cuEventCreate, flags)
        try:
            self._call(self._api.cuEventRecord, event, after)
            self._call(self._api.cuStreamWaitEvent, stream, event, 0)
        finally:
            self._call(self._api.cuEventDestroy, event)

    def check(self, stream: int) -> None:
        """Raise DeviceError if a stream will never end what is queued."""
        self._enter()
        (result,) = self._api.cuStreamQuery(stream)
        codes = self._api.CUresult
        if result not in (codes.CUDA_SUCCESS, codes.CUDA_ERROR_NOT_READY):
            raise DeviceError("cuStreamQuery", int(result))

    def close(self) -> None:
        """Let go of the device. Idempotent."""
        if self._context is None:
            return
        self._enter()
        self._context = None
        self._call(self._api.cuModuleUnload, self._module)
        self._call(self._api.cuDevicePrimaryCtxRelease, self._device)
