"""An object store (S3 and what speaks its protocol, Google, Azure, memory) through obstore.

obstore does the requests in threads of its own, which enter Python when a request ends. So all that
it holds is registered with `ForeignCalls`: each future, and each buffer of a put.

The texts of its errors quote requests and answers, which may contain credentials. So only what is
known to be harmless is passed on.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    InvalidPathError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from typing_extensions import Buffer

from flexkv.common.errors import RemoteError
from flexkv.io.memory.copier import Copier
from flexkv.io.memory.host_blocks import HostBlocks
from flexkv.io.remote.landing import BodyLanding, Landing
from flexkv.io.remote.requests import Requests
from flexkv.io.remote.store import Listed
from flexkv.observe.logs import get_logger
from flexkv.process.foreign_calls import ForeignCalls

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult, ObjectMeta
    from obstore.store import ObjectStore as Client

log = get_logger(__name__)

T = TypeVar("T")
_Mode = Literal["create", "overwrite"]

LEAVE_S = 5.0
"""How long requests that were cancelled may take to end when the store is closed: milliseconds."""
_PAGE = 1000
_CHUNK_BYTES = 1 << 20
"""The least size of each chunk of an answer but the last."""
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")
_BUSY = {"429", "503"}
_LASTING = {"400", "401", "403", "405", "501"}
_GONE = ("NoSuchBucket", "ContainerNotFound", "specified bucket does not exist")
_NO_BUCKET = "there is no such bucket"
_METADATA = re.compile(r"://(169\.254\.\d+\.\d+|metadata\.google\.internal)/")
"""Where clients look for the role of a machine if they have found no credentials before."""
_NO_CREDENTIALS = (
    "there are no credentials: in its options, the environment or a role of the machine"
)
_CERTIFICATE = re.compile(r"InvalidCertificate\(\s*(\w{1,32})")
_TOO_LONG = "it answered a range with more bytes"
_UNREACHED = {
    "dns error": "the name of its host cannot be resolved",
    "ConnectionRefused": "nothing listens at its address: the connection was refused",
    "InvalidContentType": "it does not speak TLS: is its endpoint http:// and not https://?",
    "Parse(": "what listens at its address does not speak HTTP",
    "Unreachable": "there is no route to its address",
}
"""Why a request could not be sent, by a sign in what the error says of its sources."""
_REASONS = {
    _TOO_LONG: _TOO_LONG,
    "non-partial": "it answered a range with the whole object",
    "response body error": "its answer broke off",
    "error sending request": "it did not answer",
    "error decoding": "its answer cannot be decoded",
}
_BEYOND = "Wanted range starting at"
_SELF_COPY = "InvalidRequest"


class ObjectStore:
    """A store behind one of obstore's clients."""

    shares_bodies = False

    def __init__(self, client: Client, kind: str, where: str) -> None:
        """Take a client that repeats nothing itself; `where` names it without credentials."""
        self.kind, self.where = kind, where
        self._client = client
        self._calls = ForeignCalls(lambda: repr(client))
        self._copies = True
        """Whether the store lets an object be copied onto itself; S3 mostly does not."""

    def __repr__(self) -> str:
        return f"ObjectStore({self.where})"

    # -- bytes ----------------------------------------------------------------------------------

    def get(self, name: str, first: int, last: int) -> asyncio.Future[Sequence[Buffer]]:
        """Begin to read the bytes from `first` to `last` (exclusive) of an object, in chunks.

        Chunks are not joined: that takes new memory for each answer, and was half as fast for large
        ones (`python -m benchmarks remote`).
        """
        options: GetOptions = {"range": (first, last)}
        getting = self._held(obstore.get_async(self._client, name, options=options))
        return _Chunks(getting, last - first, self._held).all

    async def put(self, name: str, buffers: Sequence[Buffer]) -> bool:
        """Create an object whose bytes are the buffers' in turn; return False if it exists."""
        try:
            await self._put(name, buffers, "create")
        except (AlreadyExistsError, PreconditionError) as exists:
            # obstore drops its future, and with it the error, a little later than the buffers.
            exists.__traceback__ = None
            return False
        except (BaseError, OSError) as error:
            # No variable names the error: its traceback would hold on to the buffers in a cycle.
            raise self._error_of_put(error) from None  # its text may contain credentials
        return True

    def _put(self, name: str, buffers: Sequence[Buffer], mode: _Mode) -> Awaitable[object]:
        views = [self._calls.hold(memoryview(buffer).cast("B")) for buffer in buffers]
        put = obstore.put_async(self._client, name, views, use_multipart=False, mode=mode)
        return self._held(put)

    def _held(self, awaitable: Any) -> asyncio.Future[Any]:
        """Return an awaitable of obstore as what it is: a future, which obstore holds."""
        return self._calls.hold(cast("asyncio.Future[Any]", awaitable))

    async def read(self, name: str) -> bytes:
        """Return a small object's bytes."""
        return await self._done(lambda: self._whole(name), "get")

    async def _whole(self, name: str) -> bytes:
        found = await self._held(obstore.get_async(self._client, name))
        return bytes(await self._held(found.bytes_async()))

    def landing(self, requests: Requests, host: HostBlocks, copier: Copier) -> Landing:
        """Return the landing that brings spans from here."""
        return BodyLanding(self, requests, host, copier)

    # -- names ----------------------------------------------------------------------------------

    async def head(self, name: str) -> Listed:
        """Return an object's size and age."""
        found = await self._done(lambda: self._held(obstore.head_async(self._client, name)), "head")
        return _listed(found)

    async def pages(self, prefix: str) -> AsyncIterator[list[Listed]]:
        """Yield the objects whose names begin with `prefix`, which ends in a slash, by pages."""
        pages = obstore.list(self._client, prefix, chunk_size=_PAGE).__aiter__()

        async def following() -> list[Listed]:
            try:
                return [_listed(each) for each in await self._held(anext(pages))]
            except StopAsyncIteration:
                return []

        while page := await self._listed(following):
            yield page

    async def _listed(self, page: Callable[[], Awaitable[list[Listed]]]) -> list[Listed]:
        try:
            return await self._done(page, "list")
        except FileNotFoundError:
            raise RemoteError(self.where, "list", "there is nothing to list") from None

    async def delete(self, name: str) -> None:
        """Delete an object; one that is not there is no error."""
        try:
            await self._done(
                lambda: self._held(obstore.delete_async(self._client, name)), "delete"
            )
        except FileNotFoundError:
            return

    async def touch(self, name: str) -> None:
        """Make an object as new as if it were written now.

        It is copied onto itself. S3 refuses that unless the copy changes something, such as the
        encryption that the store's options name. If it is refused, the object is written again.
        """
        if self._copies:
            try:
                await self._done(
                    lambda: self._held(obstore.copy_async(self._client, name, name)), "touch"
                )
            except RemoteError as error:
                self._copies = _SELF_COPY not in error.why
                if self._copies:
                    raise
            else:
                return
        await self._done(lambda: self._rewrite(name), "touch")

    async def _rewrite(self, name: str) -> None:
        found = await self._held(obstore.get_async(self._client, name))
        body = await self._held(found.bytes_async())
        if len(body) != found.meta["size"]:
            raise RemoteError(self.where, "touch", "its answer broke off")
        await self._put(name, [body], "overwrite")

    async def sweep(self, prefix: str, age_s: float) -> int:
        """Remove nothing: a put that does not end leaves nothing."""
        return 0

    async def leave(self) -> None:
        """End all requests, and return once obstore holds nothing of them any more."""
        if not await self._calls.ended(LEAVE_S):
            log.warning("remote_requests_left", store=self.where, held=self._calls.held)

    def close(self) -> None:
        """Do nothing: the client ends with its last request, for which the exit waits."""

    # -- errors ---------------------------------------------------------------------------------

    async def _done(self, call: Callable[[], Awaitable[T]], what: str) -> T:
        try:
            return await call()  # no variable holds the future: an error's traceback would keep it
        except (BaseError, OSError) as raised:
            error = self.error_of(raised, what)
            if isinstance(error, EOFError):  # only a range can begin beyond the end
                error = RemoteError(self.where, what, "an answer to another request")
            raise error from None  # its text may contain credentials

    def _error_of_put(self, raised: BaseException) -> RemoteError:
        error = self.error_of(raised, "put")
        if isinstance(error, RemoteError):
            return error
        return RemoteError(self.where, "put", "status 404: is that its endpoint?")

    def error_of(
        self, raised: BaseException, what: str
    ) -> RemoteError | FileNotFoundError | EOFError:
        """Return the error of a request that raised."""
        text = str(raised)
        if any(gone in text for gone in _GONE):
            return RemoteError(self.where, what, _NO_BUCKET, is_lasting=True)
        if isinstance(raised, FileNotFoundError):
            return FileNotFoundError(f"{self.where}: the object is not there")
        found = _STATUS.search(text)
        status = found[1] if found else ""
        if status == "416" or _BEYOND in text:
            return EOFError(f"{self.where}: the object is too short")
        is_lasting = status in _LASTING or isinstance(
            raised, PermissionDeniedError | UnauthenticatedError | InvalidPathError
        )
        return RemoteError(
            self.where, what, _reason(raised, text, status), status in _BUSY, is_lasting
        )


class _Chunks:
    """The chunks of an answer that is on its way.

    Attributes:
        all: done once the last one has come, or the answer has failed. Cancelling it ends the
            request.
    """

    def __init__(
        self,
        getting: asyncio.Future[GetResult],
        nbytes_max: int,
        held: Callable[[Any], asyncio.Future[Any]],
    ) -> None:
        """Take the request, how many bytes it asks for, and what registers futures."""
        self.all: asyncio.Future[Sequence[Buffer]] = asyncio.get_running_loop().create_future()
        self._chunks: list[Buffer] = []
        self._left, self._held = nbytes_max, held
        self._step: asyncio.Future[Any] = getting
        self.all.add_done_callback(lambda _: self._step.cancel())
        getting.add_done_callback(self._answered)

    def _answered(self, getting: asyncio.Future[GetResult]) -> None:
        if self._goes_on(getting):
            self._stream = getting.result().stream(_CHUNK_BYTES)
            self._wait()

    def _wait(self) -> None:
        self._step = self._held(anext(self._stream))
        self._step.add_done_callback(self._arrived)

    def _arrived(self, step: asyncio.Future[Any]) -> None:
        if self._goes_on(step):
            self._chunks.append(step.result())
            self._left -= len(step.result())
            if self._left < 0:
                self.all.set_exception(OSError(_TOO_LONG))
            else:
                self._wait()

    def _goes_on(self, step: asyncio.Future[Any]) -> bool:
        """Return whether a step has succeeded; end the whole if it has not."""
        raised = None if step.cancelled() else step.exception()
        if self.all.done():
            return False
        if step.cancelled():
            self.all.cancel()
        elif isinstance(raised, StopAsyncIteration):
            self.all.set_result(self._chunks)
        elif raised is not None:
            self.all.set_exception(raised)
        else:
            return True
        return False


def _listed(found: ObjectMeta) -> Listed:
    """Return an object. Its time is in whole seconds, since a head has no finer one."""
    return Listed(found["path"], found["size"], float(int(found["last_modified"].timestamp())))


def _reason(raised: BaseException, text: str, status: str) -> str:
    """Return why a request failed, in words that quote nothing secret."""
    if _METADATA.search(text):
        return _NO_CREDENTIALS
    if status:
        code = _CODE.search(text)
        return f"status {status}{f' ({code[1]})' if code else ''}"
    for sign, reason in _REASONS.items():
        if sign in text:
            return _unreached(text) or reason
    return type(raised).__name__


def _unreached(text: str) -> str:
    """Return why a request could not be sent, or "" if its error does not say that."""
    if found := _CERTIFICATE.search(text):
        return f"its certificate is not valid here ({found[1]})"
    return next((reason for sign, reason in _UNREACHED.items() if sign in text), "")
