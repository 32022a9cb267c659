"""Tests of log sinks and outputs whose reader goes away, stops, or takes only ASCII."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flexkv.observe.logs import PIECE_BYTES, _Sink
from flexkv.server.launch import told_of
from flexkv.server.operator import command

from .conftest import MODEL
from .serving import Peer, eventually, settings_in

FLEXKV = [sys.executable, "-m", "flexkv.cli.main"]


@contextmanager
def closed_pipe() -> Iterator[int]:
    """Yield the writing end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        yield writer
    finally:
        os.close(writer)


@contextmanager
def full_disk() -> Iterator[int]:
    """Yield a descriptor of a file whose disk is full."""
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def run(
    words: list[str], preparation: str = "", **options: Any
) -> subprocess.CompletedProcess[bytes]:
    """Run words through a shell; `preparation` may redirect their streams first."""
    shell = ["sh", "-c", f'{preparation or "exec"} "$@"', "sh", *words]
    return subprocess.run(shell, timeout=120, check=False, **options)


LIBRARY = """
import sys
from flexkv.observe.logs import configure_logging, get_logger
{configured}
log = get_logger("test")
{spoiled}
for _ in range(3):
    log.warning("é → \\udcff", blocks=3)
try:
    1 / 0
except ZeroDivisionError:
    log.exception("failed")
sys.stderr = sys.stdout = None
open({path!r}, "w").write("went on")
"""


@pytest.mark.parametrize(
    "configured", ["", "configure_logging(as_json=True)", "configure_logging()"]
)
@pytest.mark.parametrize("sink", ["closed", "full", "ascii", "closed file", "none"])
def test_a_sink_that_fails_costs_the_line_and_nothing_else(
    configured: str, sink: str, tmp_path: Path
) -> None:
    """A sink that fails costs the line and nothing else, whether logging is configured or not."""
    path, spoiled = tmp_path / "told", ""
    if sink == "closed file":
        spoiled = "sys.stderr.close(); sys.stdout.close()"
    code = LIBRARY.format(configured=configured, spoiled=spoiled, path=str(path))
    words, environment = [sys.executable, "-c", code], {**os.environ, "FLEXKV_LOG_LEVEL": "debug"}
    if sink == "ascii":
        done = run(
            words, env={**environment, "PYTHONIOENCODING": "ascii:strict"}, capture_output=True
        )
        assert not configured or b"blocks" in done.stderr
    elif sink == "none":
        done = run(words, "exec >&- 2>&-;", env=environment)
    else:
        with full_disk() if sink == "full" else closed_pipe() as fd:
            done = run(words, env=environment, stdout=fd, stderr=fd)
    assert path.read_text() == "went on"
    assert done.returncode == 0


def test_a_reader_that_stops_delays_nobody() -> None:
    """Lines for which a pipe has no room are dropped and counted; later ones are whole."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        sink = _Sink(stream)
        lines = 0
        while not sink.lines_dropped:
            sink.msg("x" * 3 * PIECE_BYTES)
            lines += 1
        sink.msg("lost")
        assert sink.lines_dropped == 2
        said = b""
        os.set_blocking(reader, False)
        while len(said) < (lines - 1) * (3 * PIECE_BYTES + 1):
            said += os.read(reader, 1 << 20)
        sink.msg("heard")
        assert sink.lines_dropped == 0
        said += os.read(reader, 1 << 20)
    os.close(reader)
    *whole, last = said.decode().splitlines()
    assert last == "heard"
    assert set(whole[: lines - 1]) == {"x" * 3 * PIECE_BYTES}


def test_a_stream_without_a_descriptor_is_printed_to(capsys: pytest.CaptureFixture[str]) -> None:
    """Streams without a descriptor, as in tests and notebooks, are written to; None is skipped."""
    _Sink(sys.stderr).msg("heard")
    assert capsys.readouterr().err == "heard\n"
    nothing = _Sink(None)
    nothing.msg("lost")
    assert not nothing.is_terminal


EXPLAIN = ["explain", "get", "--host", "64", "--disk", "32"]


def test_a_command_whose_reader_has_gone_ends_quietly() -> None:
    """A command whose reader has gone, as in `flexkv … | head`, prints nothing and exits with 1."""
    for words in (EXPLAIN, ["--version"], ["--help"], ["doctor", "--json"]):
        with closed_pipe() as fd:
            done = run([*FLEXKV, *words], stdout=fd, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (1, b""), words


def test_a_command_whose_output_is_full_says_so() -> None:
    """A command whose output is full says so in one line, and exits with 1."""
    for words in (EXPLAIN, ["--version"]):
        with full_disk() as fd:
            done = run([*FLEXKV, *words], stdout=fd, stderr=subprocess.PIPE)
        assert done.returncode == 1
        assert done.stderr == b"flexkv: the output cannot be written: No space left on device\n"


def test_an_error_that_nobody_hears_keeps_its_exit_status() -> None:
    """An error keeps its exit status if stderr is closed, full or absent."""
    words = [*FLEXKV, "serve", "/nowhere"]
    with closed_pipe() as fd:
        assert run(words, stderr=fd).returncode == 2
    with full_disk() as fd:
        assert run(words, stderr=fd).returncode == 2
    assert run(words, "exec >&- 2>&- <&-;").returncode == 2


def test_a_command_writes_what_an_ascii_terminal_shows() -> None:
    """On an ASCII terminal other characters are replaced, and the exit status is 0."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C"}
    for words in (EXPLAIN, ["doctor"], ["--help"]):
        done = run([*FLEXKV, *words], env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout


@contextmanager
def served(folder: Path, preparation: str, stderr: int | None) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a `flexkv serve` once it answers; a shell prepares its streams."""
    settings = settings_in(folder)
    (folder / "model.json").write_text(json.dumps(told_of(MODEL)))
    (folder / "flexkv.json").write_text(json.dumps(told_of(settings)))
    environment = {**os.environ, "FLEXKV_CONFIG_PATH": str(folder / "flexkv.json")}
    words = [*FLEXKV, "--log-level", "debug", "serve", str(folder / "model.json")]
    shell = ["sh", "-c", f'{preparation} exec "$@"', "sh", *words]
    with subprocess.Popen(shell, env=environment, stdout=stderr, stderr=stderr) as server:
        try:
            Peer(settings, "control").close()  # waits until it is there
            yield server
        finally:
            server.kill()


def _closed(stack: list[Callable[[], object]]) -> int:
    """Return a pipe's writing end; a function added to `stack` closes its reader."""
    reader, writer = os.pipe()
    stack.append(lambda: os.close(reader))
    return writer


def _unread(stack: list[Callable[[], object]]) -> int:
    """Return the writing end of a full pipe; a function added to `stack` keeps its reader open."""
    reader, writer = os.pipe()
    stack.append(lambda: os.fstat(reader))
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, b"x" * PIECE_BYTES)
    except BlockingIOError:
        os.set_blocking(writer, True)
    return writer


def _full(stack: list[Callable[[], object]]) -> int:
    return os.open("/dev/full", os.O_WRONLY)


def _none(stack: list[Callable[[], object]]) -> None:
    return None


@pytest.mark.parametrize(
    ("sink", "preparation"),
    [(_closed, ""), (_unread, ""), (_full, ""), (_none, "exec >&- 2>&- <&-;")],
)
def test_a_server_goes_on_without_anybody_who_reads_its_log(
    sink: Callable[[list[Callable[[], object]]], int | None], preparation: str, tmp_path: Path
) -> None:
    """A server whose log nobody reads goes on, and SIGTERM ends it with exit status 0."""
    goes: list[Callable[[], object]] = []
    stderr = sink(goes)
    with served(tmp_path, preparation, stderr) as server:
        if stderr is not None:
            os.close(stderr)
        for go in goes:
            go()
        talk_to(server, tmp_path)


def talk_to(server: subprocess.Popen[bytes], tmp_path: Path) -> None:
    """Send nonsense to a server, check that it still answers, and end it by SIGTERM."""
    settings = settings_in(tmp_path)
    for nonsense in (b"hello, world", b"\xff" * 64, b"\x04\x00\x00\x00\x93\x01\x02\x03"):
        for _ in range(20):
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(f"{tmp_path}/socket")
                peer.sendall(nonsense)
    for _ in range(3):
        eventually(lambda: "pid" in command(settings.server_recv_port, "status"))
    assert server.poll() is None
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0
