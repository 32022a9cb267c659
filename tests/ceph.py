"""A real object store for tests: Ceph's S3 gateway over a cluster of one monitor and one OSD.

Everything is below one folder and on loopback, and objects are kept in memory. The programs die
with the process that started them, however that ends.

    radosgw (S3) ──▶ ceph-mon (where is what?)
                └──▶ ceph-osd (the objects)
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

PACKAGES = "ceph-mon", "ceph-osd", "radosgw"
PATIENCE_S = 120.0
DIES_WITH_US = "setpriv", "--pdeathsig", "KILL"
MEMORY_BYTES = 4 << 30
CONFIGURATION = """
[global]
fsid = {fsid}
mon host = {monitors}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
keyring = {folder}/keyring
run dir = {folder}
log file = {folder}/$name.log
admin socket = {folder}/$name.asok
crash dir = {folder}
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pg autoscale mode = off
mon allow pool size one = true
[mon]
mon data = {folder}/mon
[osd]
osd objectstore = memstore
memstore device bytes = {memory_bytes}
osd data = {folder}/osd$id
keyring = {folder}/osd$id/keyring
osd max object name len = 256
[client.rgw]
rgw gc obj min wait = 1
rgw gc processor period = 1
rgw frontends = beast endpoint=127.0.0.1:{port}
"""


class Cluster:
    """A cluster below a folder.

    Attributes:
        port: where the gateway listens on loopback.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        """Take a folder, and what stops the programs."""
        self.port, first, second = _free_ports(3)
        self._folder, self._stack = folder, stack
        self._monitors = f"[v2:127.0.0.1:{first},v1:127.0.0.1:{second}]"
        self._fsid = str(uuid.uuid4())
        self._configuration = folder / "ceph.conf"
        self._configuration.write_text(
            CONFIGURATION.format(
                fsid=self._fsid,
                monitors=self._monitors,
                folder=folder,
                memory_bytes=MEMORY_BYTES,
                port=self.port,
            )
        )

    def start(self, access_keys: Sequence[str], secret_key: str) -> int:
        """Start the programs and make a user; return the gateway's process once it answers."""
        self._start_monitor()
        self._start_osd()
        user = "radosgw-admin", "-n", "client.rgw", "--uid=tests", f"--secret-key={secret_key}"
        for number, key in enumerate(access_keys):
            what = ("key", "create") if number else ("user", "create", "--display-name=tests")
            self._run(*user, *what, f"--access-key={key}")
        gateway = self._serve("radosgw", "-n", "client.rgw")
        self._wait(gateway)
        return gateway.pid

    def _start_monitor(self) -> None:
        folder, tool = self._folder, "ceph-authtool"
        keys, of_monitor = str(folder / "keyring"), str(folder / "keyring.mon")
        rights = "--cap", "mon", "allow *", "--cap", "osd", "allow *"
        self._tool(tool, of_monitor, "--create-keyring", "--gen-key", "-n", "mon.", *rights[:3])
        self._tool(tool, keys, "--create-keyring", "--gen-key", "-n", "client.admin", *rights)
        self._tool(tool, keys, "--gen-key", "-n", "client.rgw", *rights)
        with open(of_monitor, "a") as both:
            both.write(Path(keys).read_text())
        monmap = str(folder / "monmap")
        command = "--create", "--fsid", self._fsid, "--addv", "a", self._monitors, monmap
        self._tool("monmaptool", *command)
        (folder / "mon").mkdir()
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", of_monitor)
        self._serve("ceph-mon", "-i", "a")

    def _start_osd(self) -> None:
        number, home = str(uuid.uuid4()), self._folder / "osd0"
        home.mkdir()
        self._run("ceph", "osd", "new", number)
        rights = "mon", "allow profile osd", "osd", "allow *"
        self._run("ceph", "auth", "get-or-create", "osd.0", *rights, "-o", str(home / "keyring"))
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", number)
        self._serve("ceph-osd", "-i", "0")

    def _run(self, program: str, *arguments: str) -> None:
        self._tool(program, "-c", str(self._configuration), *arguments)

    def _tool(self, *command: str) -> None:
        """Run a program to its end.

        Raises:
            AssertionError: it failed.
        """
        ended = subprocess.run(
            [*DIES_WITH_US, *command], capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert ended.returncode == 0, f"{command[0]}: {ended.stderr}"

    def _serve(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a program that runs until the cluster is stopped."""
        command = [*DIES_WITH_US, program, "-c", str(self._configuration), "-f", *arguments]
        with open(self._folder / f"{program}.out", "wb") as output:
            serving = subprocess.Popen(command, stdout=output, stderr=output)
        self._stack.callback(serving.wait)
        self._stack.callback(serving.kill)
        return serving

    def _wait(self, gateway: subprocess.Popen[bytes]) -> None:
        """Return once the gateway answers."""
        until_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                assert gateway.poll() is None, self._said("radosgw")
                assert time.monotonic() < until_s, self._said("radosgw")
                time.sleep(0.1)
            else:
                return

    def _said(self, program: str) -> str:
        return f"{program}: {(self._folder / f'{program}.out').read_text()[-2000:]}"


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def serving(access_keys: Sequence[str], secret_key: str) -> Iterator[tuple[int, int]]:
    """Start a cluster whose user has these keys; yield the gateway's port and process."""
    for program in PACKAGES:
        assert shutil.which(program), f"{program} is not installed: run `make test-s3`"
    with tempfile.TemporaryDirectory(prefix="flexkv-ceph-") as name, ExitStack() as stack:
        cluster = Cluster(Path(name), stack)
        pid = cluster.start(access_keys, secret_key)
        yield cluster.port, pid
