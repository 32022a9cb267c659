"""FlexKV's errors, except `ProtocolError`, which is defined with its protocol in `server/wire.py`.

Each error carries the values that a handler or a reader needs.

A miss, a full pool on prefetch and a partial hit are outcomes and are never raised; a response's
`error` may name their cause. Every error can be copied and pickled with its fields, so that it
reaches the process that waits for it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from errno import errorcode
from typing import Any, TypeAlias, TypeVar

E = TypeVar("E", bound=BaseException)


class FlexKVError(Exception):
    """Anything that FlexKV raises on purpose."""

    def __reduce__(self) -> tuple[Callable[..., FlexKVError], tuple[Any, ...]]:
        """Return how to rebuild the error; a field that cannot be pickled becomes its `repr`."""
        fields = {name: _portable(value) for name, value in self.__dict__.items()}
        return rebuilt, (type(self), tuple(map(_portable, self.args)), fields)


def rebuilt(kind: type[E], args: tuple[Any, ...], fields: Mapping[str, Any]) -> E:
    """Return an error with these fields, without running the `__init__` that makes its message."""
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(fields)
    return error


def _portable(value: Any) -> Any:
    """Return the value if it can be pickled; else, as for a lock or a generator, its `repr`."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    try:
        pickle.dumps(value)
    except (pickle.PicklingError, TypeError, AttributeError, ValueError, RuntimeError):
        return repr(value)
    return value


Cause: TypeAlias = tuple[str, Mapping[str, Any]]
"""An error's class and fields, as plain values that fit in a message."""


def cause_of(error: FlexKVError) -> Cause:
    """Return an error's class and fields; a field that is no plain value becomes its `repr`."""
    return type(error).__name__, {name: _plain(value) for name, value in error.__dict__.items()}


def error_from(cause: Cause | None, message: str) -> FlexKVError:
    """Return the error that another process reported; a FlexKVError if its class is unknown."""
    name, fields = cause or ("", {})
    kinds = [FlexKVError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    kind = next((each for each in kinds if each.__name__ == name), FlexKVError)
    lists = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
    return rebuilt(kind, (message,), {**fields, **lists})


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return repr(value)


HIDDEN = "…"
"""The `repr` of a value that an error does not show: it may be secret, or there is no value."""


class ConfigError(FlexKVError):
    """A configuration or argument field has a value that breaks a rule."""

    def __init__(self, field: str, value: object, why: str) -> None:
        shown = repr(value)
        named = field if shown == HIDDEN else f"{field}={shown}"
        super().__init__(f"{named}: {why}")
        self.field, self.value, self.why = field, value, why


class CapacityError(FlexKVError):
    """A tier has no room for the blocks that an operation needs."""

    def __init__(
        self, tier: str, wanted_blocks: int, free_blocks: int, evictable_blocks: int
    ) -> None:
        super().__init__(
            f"{tier}: {wanted_blocks} blocks wanted, {free_blocks} free, "
            f"{evictable_blocks} evictable"
        )
        self.tier = tier
        self.wanted_blocks = wanted_blocks
        self.free_blocks = free_blocks
        self.evictable_blocks = evictable_blocks


class ClearedError(FlexKVError):
    """The cache was cleared after a put had begun, so nothing of the put is stored."""

    def __init__(self) -> None:
        super().__init__("the cache was cleared after the put began: nothing of it is stored")


class TransferError(FlexKVError):
    """A transfer op ended without moving all its bytes.

    Attributes:
        blames_tier: whether the tier at the outer end is at fault, so that its breaker counts it.
        is_miss: whether requests take it for a miss: the tier just does not have the blocks.
    """

    blames_tier, is_miss = True, False

    def __init__(self, op_id: int, route: str, block_count: int, why: str = "") -> None:
        super().__init__(f"op {op_id} {route} ({block_count} blocks) failed: {why}")
        self.op_id, self.route, self.block_count, self.why = op_id, route, block_count, why


class RecalledError(TransferError):
    """A transfer op was recalled before all of its bytes were on their way; nothing is broken."""

    blames_tier = False


class DeadlineError(TransferError):
    """A transfer op did not end in time; hardware may still be working on it."""


class UnfilledError(TransferError):
    """The op that was filling the blocks for which this one waited did not fill them."""

    blames_tier = False


class MissingBlockError(TransferError):
    """A far tier does not have a block that it was said to have."""

    blames_tier, is_miss = False, True


class StorageError(TransferError):
    """A file operation failed with an errno."""

    def __init__(self, path: str, offset_bytes: int, errno: int, op_id: int = -1) -> None:
        FlexKVError.__init__(self, f"{path} at byte {offset_bytes}: {errorcode.get(errno, errno)}")
        self.path, self.offset_bytes, self.errno, self.op_id = path, offset_bytes, errno, op_id


class ShortTransferError(TransferError):
    """A file or peer delivered fewer bytes than the block has, and will not deliver more."""

    def __init__(self, path: str, offset_bytes: int, wanted_bytes: int, moved_bytes: int) -> None:
        FlexKVError.__init__(
            self, f"{path} at byte {offset_bytes}: {moved_bytes} of {wanted_bytes} bytes moved"
        )
        self.path, self.offset_bytes = path, offset_bytes
        self.wanted_bytes, self.moved_bytes = wanted_bytes, moved_bytes


class RemoteError(TransferError):
    """A remote store did not do what it was asked to do, or did not answer in time.

    The text has no bytes of the store's answer: they may contain credentials.

    Attributes:
        is_busy: whether the store asked for fewer requests.
        is_lasting: whether asking again cannot help, as when access is denied.
    """

    def __init__(
        self, store: str, what: str, why: str, is_busy: bool = False, is_lasting: bool = False
    ) -> None:
        FlexKVError.__init__(self, f"{store}: {what} failed: {why}")
        self.store, self.what, self.why = store, what, why
        self.is_busy, self.is_lasting = is_busy, is_lasting


class PeerError(TransferError):
    """Another node did not send blocks that it was said to have; the other peers are not to blame.

    Attributes:
        peer: the address of the node.
        is_busy: whether it asked to be asked later.
        is_own: whether this node lacks something; then the other one is not to blame, either.
    """

    blames_tier = False

    def __init__(
        self, peer: str, what: str, why: str, is_busy: bool = False, is_own: bool = False
    ) -> None:
        FlexKVError.__init__(self, f"peer {peer}: {what} failed: {why}")
        self.peer, self.what, self.why = peer, what, why
        self.is_busy, self.is_own = is_busy, is_own


class DeviceError(TransferError):
    """A device call failed with a driver code."""

    def __init__(self, call: str, code: int) -> None:
        FlexKVError.__init__(self, f"{call} failed with code {code}")
        self.call, self.code = call, code


class AgentGoneError(TransferError):
    """The process that owns the device memory has ended, or is no longer connected."""


class CorruptBlockError(TransferError):
    """Blocks came back with other bytes than were stored; each of them is dropped."""

    blames_tier, is_miss = False, True

    def __init__(self, path: str, offset_bytes: int, block_ids: Sequence[int]) -> None:
        FlexKVError.__init__(
            self, f"{path} at byte {offset_bytes}: checksum mismatch ({len(block_ids)} blocks)"
        )
        self.path, self.offset_bytes, self.block_ids = path, offset_bytes, tuple(block_ids)

    def joined(self, other: CorruptBlockError) -> CorruptBlockError:
        """Return one error for the blocks of both, with the path and offset of this one."""
        block_ids = (*self.block_ids, *other.block_ids)
        return CorruptBlockError(self.path, self.offset_bytes, block_ids)


class MalformedError(FlexKVError):
    """Bytes from a file or a peer cannot be decoded."""

    def __init__(self, length_bytes: int, why: str) -> None:
        super().__init__(f"{length_bytes} bytes cannot be decoded: {why}")
        self.length_bytes, self.why = length_bytes, why


class BackendUnavailableError(FlexKVError):
    """A backend that the configuration asks for is not available."""

    def __init__(self, backend: str, reason: str) -> None:
        super().__init__(f"{backend} is not available: {reason}")
        self.backend, self.reason = backend, reason


class ClosedError(FlexKVError):
    """The engine is not started yet, or is shut down."""


class InternalError(FlexKVError):
    """A mistake in FlexKV itself: please report it with the message."""


class InvalidTransition(InternalError):  # noqa: N818 -- the name that state machines use for it
    """A state machine received an event that cannot happen in its state."""

    def __init__(self, state: object, event: object, story: Sequence[object]) -> None:
        lines = "\n  ".join(str(entry) for entry in story)
        super().__init__(f"no transition from {state} on {event}; the story so far:\n  {lines}")
        self.state, self.event, self.story = state, event, tuple(story)


class InvariantError(InternalError):
    """An invariant of the system does not hold."""
