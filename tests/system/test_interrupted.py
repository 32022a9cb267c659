"""Tests that a start ends at once if interrupted while memory is touched or files allocated."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flexkv.io.memory import arena as arena_module
from flexkv.io.ssd import allocation
from flexkv.kvmanager import KVManager
from tests.system.conftest import MODEL, cache_config, open_fds
from tests.system.mounted import ROOT

STEPS = 64
STEP_BYTES = 4096


class Interrupter:
    """A counter of steps that cancels a task from another thread at the third step."""

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.steps = 0
        self.loop = asyncio.get_running_loop()

    def step(self) -> None:
        """Count a step; the third one cancels the task, and waits until it has noticed."""
        assert threading.current_thread() is not threading.main_thread()
        self.steps += 1
        if self.steps == 3:
            assert self.task is not None
            self.loop.call_soon_threadsafe(self.task.cancel)
            for _ in range(3):
                asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self.loop).result()


async def interrupted(manager: KVManager, interrupter: Interrupter) -> None:
    """Open a manager whose start gets cancelled; check that no step follows and nothing is left."""

    async def opened() -> None:
        async with manager:
            pytest.fail("it was opened")

    before = open_fds()
    interrupter.task = asyncio.create_task(opened())
    with pytest.raises(asyncio.CancelledError):
        await interrupter.task
    assert interrupter.steps == 3
    assert open_fds() == before


async def test_a_start_is_cancelled_while_memory_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start cancelled while memory is touched touches no further page, and frees everything."""
    monkeypatch.setattr(arena_module, "TOUCH_BYTES", STEP_BYTES)
    interrupter = Interrupter()
    cache = cache_config(tmp_path, num_cpu_blocks=STEPS, use_hugepage_cpu_buffer=False)
    manager = KVManager(MODEL, cache, progress=lambda done, of: interrupter.step())
    await interrupted(manager, interrupter)
    async with KVManager(MODEL, cache_config(tmp_path)) as again:
        assert "disk" in again.statistics().tiers


async def test_a_start_is_cancelled_while_files_are_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start cancelled during allocation frees the files' space; the next one allocates all."""
    monkeypatch.setattr(allocation, "STEP_BYTES", STEP_BYTES)
    allocate, interrupter = os.posix_fallocate, Interrupter()

    def counted(fd: int, start: int, length: int) -> None:
        allocate(fd, start, length)
        interrupter.step()

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", counted)
        await interrupted(KVManager(MODEL, cache_config(tmp_path)), interrupter)
    (path,) = tmp_path.glob("blocks-*")  # noqa: ASYNC240 -- a test
    assert path.stat().st_size == 0
    async with KVManager(MODEL, cache_config(tmp_path)):
        assert path.stat().st_blocks * 512 >= 128 * STEP_BYTES


SLOW = """
import os, sys, time
from flexkv.io.memory import arena
arena.TOUCH_BYTES = 4096
prefault = arena._ext.prefault

class Slow:
    def __getattr__(self, name):
        return getattr(_ext, name)

    def prefault(self, memory):
        os.write(1, b"t")
        time.sleep(0.01)

_ext, arena._ext = arena._ext, Slow()
"""
"""Code that makes touching take ten minutes, and writes a byte to stdout at every step."""
MEMORY_BLOCKS = 60_000
STARTED = """
from flexkv.kvmanager import KVManager
from tests.system.conftest import MODEL, cache_config
manager = KVManager(MODEL, cache_config(sys.argv[1], num_cpu_blocks={blocks}))
{start}
"""
FORMS = {
    "thread": "manager.start()",
    "loop": """
import asyncio
async def main():
    async with manager:
        pass
asyncio.run(main())""",
}
SERVED = """
from flexkv.cli.main import app
sys.argv[1:] = ["--log-level", "info", "serve", sys.argv[1]]
app()
"""


def run_slow(code: str, argument: str, number: int, environment: dict[str, str]) -> tuple[int, str]:
    """Run code until it touches memory, send it a signal; return its exit status and stderr."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SLOW + code, argument], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **environment},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1) == b"t", process.stderr.read().decode()
        process.send_signal(number)
        threading.Thread(target=process.stdout.read, daemon=True).start()
        errors = process.stderr.read().decode()
        return process.wait(60), errors


@pytest.mark.parametrize("form", FORMS)
def test_ctrl_c_ends_a_library_s_start(tmp_path: Path, form: str) -> None:
    """ctrl-C while memory is touched raises KeyboardInterrupt at once from the call that starts."""
    code = STARTED.format(blocks=MEMORY_BLOCKS, start=FORMS[form])
    status, errors = run_slow(code, str(tmp_path), signal.SIGINT, {})
    assert status == -signal.SIGINT
    assert "KeyboardInterrupt" in errors


def test_sigterm_ends_a_server_s_start(tmp_path: Path) -> None:
    """SIGTERM during a server's start ends it with exit status 0, before it listens."""
    model = tmp_path / "model.json"
    model.write_text('{"num_layers": 3, "num_kv_heads": 2, "head_size": 8, "dtype": "float16"}')
    environment = {
        "FLEXKV_TOKENS_PER_BLOCK": "4",
        "FLEXKV_NUM_CPU_BLOCKS": str(MEMORY_BLOCKS),
        "FLEXKV_SERVER_RECV_PORT": f"ipc://{tmp_path}/socket",
    }
    status, errors = run_slow(SERVED, str(model), signal.SIGTERM, environment)
    assert status == 0, errors
    assert "before memory and files were allocated" in errors
    assert "server_listens" not in errors
    assert not (tmp_path / "socket").exists()
