"""A fast S3 server in memory, in a process of its own, so that its client can be measured alone.

    python -m benchmarks.store_server KEPT

It prints its port, and yields to others. It keeps the bodies of the first KEPT spans; later ones
exist, but have no bytes, so that an engine may ship without end. A stopped process (SIGSTOP) is a
store that accepts requests and never answers; SIGCONT has it answer them.
"""

from __future__ import annotations

import os
import re
import signal
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape

from flexkv.process.background import NICER_BY

SPAN_BYTES_MIN = 1 << 12
"""Anything smaller is no span, and is kept in any case."""
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")
_NOTHING = memoryview(b"")
_WRITTEN = "2026-01-01T00:00:00.000Z"


class _Objects:
    """What the server holds, by path."""

    def __init__(self, kept: int) -> None:
        self.bodies: dict[str, bytearray] = {}
        self.lock = threading.Lock()
        self._left = kept

    def create(self, path: str, body: bytearray) -> bool:
        """Keep an object; return False if it exists."""
        with self.lock:
            if path in self.bodies:
                return False
            if len(body) >= SPAN_BYTES_MIN:
                self._left -= 1
                body = body if self._left >= 0 else bytearray()
            self.bodies[path] = body
            return True

    def below(self, prefix: str) -> list[tuple[str, int]]:
        """Return the paths that begin with a prefix, in order, and their objects' sizes."""
        with self.lock:
            return sorted((p, len(b)) for p, b in self.bodies.items() if p.startswith(prefix))


class _Handler(BaseHTTPRequestHandler):
    """Answers one connection's requests."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    objects: _Objects

    def log_message(self, *args: Any) -> None:
        """Log nothing."""

    def do_PUT(self) -> None:
        """Create an object, once."""
        body = bytearray(int(self.headers["Content-Length"]))
        view, at = memoryview(body), 0
        while at < len(body):
            at += self.rfile.readinto(view[at:])  # type: ignore[attr-defined]
        self._answer(200 if self.objects.create(self.path, body) else 412)

    def do_GET(self) -> None:
        """Return an object, a range of it, or a list of objects."""
        url = urlsplit(self.path)
        if "list-type" in url.query:
            self._list(url.path.strip("/"), parse_qs(url.query))
            return
        body = self.objects.bodies.get(self.path)
        if body is None:
            self._answer(404)
        elif found := _RANGE.fullmatch(self.headers.get("Range", "")):
            first, last = int(found[1]), min(int(found[2]) + 1, len(body))
            extent = f"bytes {first}-{last - 1}/{len(body)}"
            self._answer(206, memoryview(body)[first:last], {"Content-Range": extent})
        else:
            self._answer(200, memoryview(body))

    def do_HEAD(self) -> None:
        """Return an object's size."""
        body = self.objects.bodies.get(self.path)
        self._answer(
            404 if body is None else 200,
            _NOTHING if body is None else memoryview(body),
            is_head=True,
        )

    def do_DELETE(self) -> None:
        """Delete an object."""
        with self.objects.lock:
            self.objects.bodies.pop(self.path, None)
        self._answer(204)

    def _list(self, bucket: str, query: dict[str, list[str]]) -> None:
        (prefix,) = query.get("prefix", [""])
        found = "".join(
            f"<Contents><Key>{escape(path.removeprefix(f'/{bucket}/'))}</Key><Size>{size}</Size>"
            f"<LastModified>{_WRITTEN}</LastModified></Contents>"
            for path, size in self.objects.below(f"/{bucket}/{prefix}")
        )
        listing = f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>"
        self._answer(200, memoryview(listing.encode()))

    def _answer(
        self, status: int, body: memoryview = _NOTHING,
        headers: dict[str, str] | None = None, is_head: bool = False,
    ) -> None:  # fmt: skip
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Last-Modified", formatdate(1.7e9, usegmt=True))
        self.send_header("ETag", '"0"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not is_head:
            self.connection.sendall(body)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads, request_queue_size = True, 64

    def handle_error(self, *_: Any) -> None:
        """Say nothing: a client may give up a request."""


class StoreServer:
    """A running server.

    Attributes:
        port: where it listens on loopback.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.port = int(process.stdout.readline())
        self._process = process

    def hang(self) -> None:
        """Answer nothing from now on."""
        self._process.send_signal(signal.SIGSTOP)

    def answer(self) -> None:
        """Answer again, also what was asked meanwhile."""
        self._process.send_signal(signal.SIGCONT)


@contextmanager
def running(kept: int) -> Iterator[StoreServer]:
    """Start a server, and stop it afterwards."""
    command = [sys.executable, "-m", "benchmarks.store_server", str(kept)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield StoreServer(process)
        finally:
            process.kill()


if __name__ == "__main__":
    os.nice(NICER_BY)
    _Handler.objects = _Objects(int(sys.argv[1]))
    with _Server(("127.0.0.1", 0), _Handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()
