"""Errors reach other processes and threads with their message, fields and type."""

from __future__ import annotations

import copy
import importlib
import multiprocessing
import pickle
import pkgutil
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import flexkv
from flexkv.cluster.store import ClusterStoreError
from flexkv.cluster.wire import PeerProtocolError
from flexkv.common.errors import (
    AgentGoneError,
    BackendUnavailableError,
    CapacityError,
    ClearedError,
    ClosedError,
    ConfigError,
    CorruptBlockError,
    DeadlineError,
    DeviceError,
    FlexKVError,
    InternalError,
    InvalidTransition,
    InvariantError,
    MalformedError,
    MissingBlockError,
    PeerError,
    RecalledError,
    RemoteError,
    ShortTransferError,
    StorageError,
    TransferError,
    UnfilledError,
)
from flexkv.common.request import KVResponse, KVResponseStatus
from flexkv.io.private import NotPrivateError
from flexkv.server.wire import ProtocolError

FOREIGN = ("flexkv.integration.vllm", "flexkv.cli.main")
"""Modules that need another program, or that are a program."""

EXAMPLES: list[Exception] = [
    FlexKVError("anything"),
    ConfigError("num_layers", -1, "must be positive"),
    CapacityError("host", 4, 1, 2),
    ClearedError(),
    TransferError(7, "host→disk", 3, "why"),
    RecalledError(7, "host→disk", 3, "why"),
    DeadlineError(7, "host→disk", 3, "why"),
    UnfilledError(7, "host→disk", 3, "why"),
    MissingBlockError(7, "remote→host", 3, "why"),
    StorageError("/ssd/blocks-0000.flexkv", 4096, 5, 7),
    ShortTransferError("/ssd/blocks-0000.flexkv", 4096, 10, 5),
    RemoteError("s3://bucket", "get", "status 503", is_busy=True),
    PeerError("10.0.0.2:7001", "want", "its link has ended", is_busy=True, is_own=True),
    DeviceError("cuMemcpyAsync", 700),
    AgentGoneError(7, "host→device", 3, "why"),
    CorruptBlockError("/ssd/blocks-0000.flexkv", 4096, [1, 2]),
    MalformedError(12, "is not JSON"),
    BackendUnavailableError("cuda", "no driver"),
    ClosedError("shut down"),
    InternalError("our mistake"),
    InvalidTransition("READY", "commit", ["reserved", "ready"]),
    InvariantError("two claims"),
    ProtocolError("a peer sent something else"),
    PeerProtocolError("a node sent something else"),
    ClusterStoreError("redis 10.0.0.1:6379", "XADD", "no answer in time"),
    NotPrivateError("is a symbolic link", "/ssd"),
]


def _pickled(error: Exception) -> Exception:
    found: Exception = pickle.loads(pickle.dumps(error))  # noqa: S301 -- our own bytes
    return found


def _raise(error: Exception) -> None:
    raise error


def _every_kind() -> Iterator[type[FlexKVError]]:
    """Yield every error class that a module of the package defines."""
    for module in pkgutil.walk_packages(flexkv.__path__, "flexkv."):
        if not module.name.startswith(FOREIGN):
            importlib.import_module(module.name)
    kinds = [FlexKVError]
    while kinds:
        kind = kinds.pop()
        if kind.__module__.startswith("flexkv."):
            yield kind
        kinds += kind.__subclasses__()


def test_there_is_an_example_of_every_error() -> None:
    """Every error class of the package has an example here."""
    assert set(_every_kind()) == {type(error) for error in EXAMPLES} - {NotPrivateError}


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("way", [_pickled, copy.copy, copy.deepcopy])
def test_errors_keep_kind_message_and_fields(
    way: Callable[[Exception], Exception], error: Exception
) -> None:
    """A pickled, copied or deeply copied error has the same type, message and fields."""
    error.add_note("seen by the first caller")
    again = way(error)
    assert type(again) is type(error)
    assert (str(again), again.args) == (str(error), error.args)
    assert again.__dict__ == error.__dict__


def test_a_value_that_cannot_travel_is_replaced_by_its_text() -> None:
    """A field that cannot be pickled is replaced by its `repr`, so that the error still arrives."""
    for value in (threading.Lock(), (n for n in range(3)), lambda: None, {"deep": [object, print]}):
        error = ConfigError("token_ids", value, "must be integers")
        for again in (_pickled(error), copy.deepcopy(error)):
            assert isinstance(again, ConfigError)
            assert str(again) == str(error)
            assert again.value in (value, repr(value))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_errors_come_out_of_a_pool(method: str) -> None:
    """A pool's worker can raise every error; one that it could not pickle would stall the pool."""
    with multiprocessing.get_context(method).Pool(1) as pool:
        told = [pool.apply_async(_raise, (error,)) for error in EXAMPLES]
        for error, result in zip(EXAMPLES, told, strict=True):
            with pytest.raises(type(error)) as caught:
                result.get(60)
            assert str(caught.value) == str(error)


def test_a_response_travels_with_its_error() -> None:
    """A pickled response keeps its status, task id and error."""
    response = KVResponse(
        KVResponseStatus.FAILED, 3, np.zeros(8, np.bool_), StorageError("/ssd", 0, 5)
    )
    again = pickle.loads(pickle.dumps(response))  # noqa: S301 -- our own bytes
    assert (again.status, again.task_id, str(again.error)) == (
        response.status, 3, str(response.error),
    )  # fmt: skip
