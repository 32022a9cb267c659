"""An S3 server for tests: moto, or a real store if `S3_SERVER=rgw` (`make test-s3`)."""

from __future__ import annotations

import itertools
import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal
from urllib.parse import urlsplit

import obstore
import pytest
from obstore.store import S3Store

from tests import ceph, moto

KIND = os.environ.get("S3_SERVER", "moto")
"""Which server: "moto", which believes every signature, or "rgw", Ceph's gateway."""
ACCESS_KEY, NEW_ACCESS_KEY, SECRET = "an-access-key", "a-new-access-key", "a-secret-of-tests"
"""Access keys of the same user, with the same secret."""
SIGNED_FOR = timedelta(minutes=5)


class S3Server:
    """A running server.

    Attributes:
        port: where it listens on loopback.
        pid: its process.
        custom: `remote_config_custom` for a bucket of it.
    """

    def __init__(self, port: int, pid: int) -> None:
        self.port, self.pid = port, pid
        self._numbers = itertools.count()

    @property
    def custom(self) -> dict[str, Any]:
        """Return the options of a client."""
        return self.custom_at(self.port)

    def custom_at(self, port: int) -> dict[str, Any]:
        """Return the options of a client that reaches the server by another port."""
        return {
            "endpoint": f"http://127.0.0.1:{port}",
            "region": "us-east-1",
            "access_key_id": ACCESS_KEY,
            "secret_access_key": SECRET,
        }

    def new_bucket(self) -> str:
        """Create a bucket, and return its name."""
        name = f"bucket-{next(self._numbers)}"
        self.request("PUT", name)
        return name

    def request(self, method: Literal["PUT", "DELETE"], path: str) -> None:
        """Make a request that the store's client has no call for, or would refuse to make."""
        url = self._signed_url(method, path)
        with urllib.request.urlopen(urllib.request.Request(url, method=method)):
            pass

    def signed(self, path: str) -> str:
        """Return the target of a request that gets what is at a path, with its signature."""
        url = urlsplit(self._signed_url("GET", path.lstrip("/")))
        return f"{url.path}?{url.query}"

    def _signed_url(self, method: Literal["GET", "PUT", "DELETE"], path: str) -> str:
        """Return a signed URL for any path; the client takes only its last part for the key."""
        folder, _, name = path.rpartition("/")
        client = S3Store(
            "any",
            endpoint=f"http://127.0.0.1:{self.port}/{folder}".rstrip("/"),
            virtual_hosted_style_request=True,
            region=self.custom["region"],
            access_key_id=ACCESS_KEY,
            secret_access_key=SECRET,
            client_options={"allow_http": True},
        )
        return obstore.sign(client, method, name, SIGNED_FOR)


@contextmanager
def running() -> Iterator[S3Server]:
    """Start the server that `S3_SERVER` names on a free port, and stop it afterwards."""
    assert KIND in ("moto", "rgw"), f"S3_SERVER={KIND}"
    keys = ACCESS_KEY, NEW_ACCESS_KEY
    with (ceph.serving(keys, SECRET) if KIND == "rgw" else moto.serving()) as (port, pid):
        yield S3Server(port, pid)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """Yield a running server."""
    with running() as server:
        yield server
