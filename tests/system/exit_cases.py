"""Programs that leave a manager in every possible way: `python exit_cases.py DIRECTORY [CASE …]`.

Each case puts a prompt and leaves. It must end by itself, print on stderr only what the case
expects, and leave the directory free for the next engine. It runs in a process of its own, forked
before there is any manager. This file needs numpy and flexkv alone, so that it runs on every Python
that there is a wheel for.
"""

from __future__ import annotations

import asyncio
import atexit
import faulthandler
import gc
import json
import os
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.common.errors import ClosedError
from flexkv.kvmanager import KVManager

PER_BLOCK, BLOCKS = 4, 8
MODEL = ModelConfig(num_layers=2, num_kv_heads=2, head_size=8, dtype="float16", model_id="exits")
PROMPT = np.arange(BLOCKS * PER_BLOCK)
SLOTS = np.arange(BLOCKS * PER_BLOCK)
CACHES = [np.ones((2, 2 * BLOCKS, PER_BLOCK, 2, 8), np.float16) for _ in range(2)]

CASES: dict[str, Callable[[], Any]] = {}
LOUD = {
    "forgotten", "forgotten_collected", "forgotten_cycle", "forgotten_async", "dropped_at_exit",
    "forgotten_async_collected", "forgotten_on_its_own_loop", "forgotten_on_its_own_thread",
    "forgotten_in_a_failure",
}  # fmt: skip
"""Cases that warn of a manager that was not closed."""
UNFLUSHED = {"forgotten_async", "forgotten_async_collected", "forgotten_on_its_own_loop",
             "forgotten_on_its_own_thread", "left_on_another_loop", "loop_closed", "atexit_async",
             "interrupted_shutdown", "interrupted_twice", "shutdown_on_its_own_loop"}  # fmt: skip
"""Cases that may leave puts out of the SSD, for want of a running loop or of time."""
STATUS = {"forgotten_in_a_failure": 1, "interrupted": 1, "interrupted_twice": 1}


def case(work: Callable[[], Any]) -> Callable[[], Any]:
    """Register a case under its name."""
    CASES[work.__name__] = work
    return work


def made() -> KVManager:
    """Return a manager that is not started."""
    cache = CacheConfig(
        tokens_per_block=PER_BLOCK, num_cpu_blocks=32, num_ssd_blocks=64,
        ssd_cache_dir=os.environ["DIRECTORY"], shutdown_flush_s=2.0,
    )  # fmt: skip
    return KVManager(MODEL, cache)


def started() -> KVManager:
    """Return a manager that runs in a thread and has stored the prompt."""
    manager = made()
    manager.start()
    manager.register_kv_caches(CACHES)
    (response,) = manager.wait(manager.put_async(PROMPT, SLOTS)).values()
    assert response.return_mask.all(), response
    return manager


async def entered() -> KVManager:
    """Return a manager that runs on the current loop and has stored the prompt."""
    manager = made()
    await manager.__aenter__()
    manager.register_kv_caches(CACHES)
    response = await manager.put(PROMPT, SLOTS)
    assert response.return_mask.all(), response
    return manager


def check_free() -> None:
    """Check that the directory can be opened again."""
    again = made()
    again.start()
    again.shutdown()


@case
def shutdown() -> None:
    """The program calls `shutdown`, as it should; a second call does nothing."""
    manager = started()
    manager.shutdown()
    manager.shutdown()
    check_free()


@case
def atexit_thread() -> None:
    """A callback at exit shuts the manager down."""
    atexit.register(started().shutdown)


@case
def atexit_async() -> None:
    """A callback at exit shuts the manager down after its loop was closed."""
    atexit.register(asyncio.run(entered()).shutdown)


class Holder:
    """A user's object that shuts its manager down when it is dropped."""

    def __init__(self) -> None:
        self.manager = started()

    def __del__(self) -> None:
        self.manager.shutdown()


@case
def dropped() -> None:
    """`__del__` shuts the manager down."""
    holder = Holder()
    del holder
    check_free()


@case
def dropped_at_exit() -> None:
    """`__del__` runs at the interpreter's very end, after the manager was closed at exit."""
    global kept
    kept = Holder()


@case
def dropped_in_a_cycle() -> None:
    """`__del__` runs in the garbage collector, in a thread unrelated to the manager."""
    holder: Any = Holder()
    holder.itself = holder
    del holder
    collecting = threading.Thread(target=gc.collect)
    collecting.start()
    collecting.join()
    check_free()


@case
def finalized() -> None:
    """A finalizer shuts the manager down at exit."""
    global kept
    kept = set()
    weakref.finalize(kept, started().shutdown)


@case
def finalized_early() -> None:
    """A finalizer shuts the manager down when its object is dropped."""
    weakref.finalize(object.__new__(type("Object", (), {})), started().shutdown)
    check_free()


@case
def forgotten() -> None:
    """Nobody shuts the manager down before exit."""
    global kept
    kept = started()


@case
def forgotten_collected() -> None:
    """Nobody shuts the manager down before its last reference is dropped."""
    started()
    check_free()


@case
def forgotten_cycle() -> None:
    """Nobody shuts the manager down before the garbage collector finds it."""
    manager: Any = started()
    manager.itself = manager
    del manager
    gc.collect()
    check_free()


@case
def forgotten_on_its_own_thread() -> None:
    """Nobody shuts the manager down before the engine's own thread drops the last reference."""
    manager = [started()]
    thread, over = manager[0]._bridge.thread, threading.Event()
    assert thread is not None
    thread.post(lambda: (manager.clear(), over.set()))
    over.wait()
    check_free()


@case
def forgotten_async() -> None:
    """Nobody shuts the manager down before exit, though its loop has ended."""
    global kept
    kept = asyncio.run(entered())


@case
def forgotten_async_collected() -> None:
    """Nobody shuts the manager down, whose loop has ended, before its last reference is dropped."""
    asyncio.run(entered())
    check_free()


@case
def forgotten_on_its_own_loop() -> None:
    """Nobody shuts the manager down, and its last reference is dropped while its loop runs."""

    async def main() -> None:
        await entered()
        async with made():
            pass

    asyncio.run(main())
    check_free()


@case
def forgotten_in_a_failure() -> None:
    """The program fails without shutting its manager down."""
    manager = started()
    raise LookupError(f"as planned, with {manager.is_ready()}")


@case
def left_on_another_loop() -> None:
    """`__aexit__` on another loop than `__aenter__` releases everything, and raises an error."""
    manager = asyncio.run(entered())
    told = ""
    try:
        asyncio.run(manager.__aexit__(None, None, None))
    except ClosedError as error:
        told = str(error)
    assert "another event loop" in told
    asyncio.run(manager.__aexit__(None, None, None))
    check_free()


@contextmanager
def elsewhere() -> Iterator[KVManager]:
    """Yield a manager on a loop that another thread runs."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield asyncio.run_coroutine_threadsafe(entered(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@case
def left_while_its_loop_runs_elsewhere() -> None:
    """`__aexit__` is called on another loop while the manager's own runs in another thread."""
    with elsewhere() as manager:
        asyncio.run(manager.__aexit__(None, None, None))
    check_free()


@case
def shutdown_while_its_loop_runs_elsewhere() -> None:
    """`shutdown` is called for a manager on a loop in another thread."""
    with elsewhere() as manager:
        manager.shutdown()
    check_free()


@case
def shutdown_on_its_own_loop() -> None:
    """`shutdown` within `async with` releases everything at once; leaving does nothing more."""

    async def main() -> None:
        async with made() as manager:
            manager.register_kv_caches(CACHES)
            await manager.put(PROMPT, SLOTS)
            putting = asyncio.ensure_future(manager.put(PROMPT + 1000, SLOTS))
            await asyncio.sleep(0)
            manager.shutdown()
            with suppress(ClosedError):
                await putting
            async with made():
                pass

    asyncio.run(main())
    check_free()


@case
def loop_closed() -> None:
    """`shutdown` is called after the loop was closed."""
    loop = asyncio.new_event_loop()
    manager = loop.run_until_complete(entered())
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0.1))
    loop.close()
    manager.shutdown()
    manager.shutdown()
    check_free()


@case
def signalled() -> None:
    """A signal handler calls `shutdown` while the main thread waits for a request."""
    manager = started()
    over = []

    def handler(*_: object) -> None:
        manager.shutdown()
        over.append(True)

    signal.signal(signal.SIGTERM, handler)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with suppress(ClosedError):
        while True:
            manager.wait(manager.prefetch_async(PROMPT))
    assert over
    check_free()


@case
def from_another_thread() -> None:
    """Several threads call `shutdown` at once, while the main thread waits."""
    manager = started()
    threads = [threading.Thread(target=manager.shutdown) for _ in range(4)]
    layerwise = manager.put_layerwise(PROMPT + 1000, SLOTS)
    for thread in threads:
        thread.start()
    with suppress(ClosedError):
        manager.wait(layerwise.task_id, timeout=60)
    for thread in threads:
        thread.join()
    check_free()


@case
def interrupted() -> None:
    """ctrl-C within asyncio.run leaves the `async with`, and everything is written."""

    async def main() -> None:
        async with made() as manager:
            manager.register_kv_caches(CACHES)
            await manager.put(PROMPT, SLOTS)
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(60)

    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        check_free()
        sys.exit(1)


@case
def interrupted_twice() -> None:
    """A second ctrl-C, while leaving waits, still releases what can be, also the directory."""

    async def main() -> None:
        async with made() as manager:
            manager.register_kv_caches(CACHES)
            put = manager.put_layerwise(PROMPT, SLOTS)
            close = manager.engine._durability.finish

            async def finish(wait_s: float) -> None:
                os.kill(os.getpid(), signal.SIGINT)
                await close(wait_s)

            manager.engine._durability.finish = finish  # type: ignore[method-assign]
            os.kill(os.getpid(), signal.SIGINT)
            await put

    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        check_free()
        sys.exit(1)


@case
def interrupted_shutdown() -> None:
    """ctrl-C within `shutdown` still releases everything."""
    manager = started()
    finish = manager.engine._durability.finish

    async def interrupting(wait_s: float) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.2)  # the main thread gets the interrupt meanwhile
        await finish(wait_s)

    manager.engine._durability.finish = interrupting  # type: ignore[method-assign]
    try:
        manager.shutdown()
    except KeyboardInterrupt:
        check_free()
    else:
        raise AssertionError("it was not interrupted")


@case
def a_call_on_its_own_thread() -> None:
    """A call on the engine's own thread, which would wait for itself, is refused."""
    manager = started()
    thread, told = manager._bridge.thread, []
    assert thread is not None

    def work() -> None:
        try:
            manager.statistics()
        except ClosedError as error:
            told.append(str(error))
        finally:
            over.set()

    over = threading.Event()
    thread.post(work)
    over.wait()
    assert told == ["called on the engine's own thread, which would wait for itself"]
    manager.shutdown()


kept: Any = None

END_S = 60
"""A case that takes longer is killed; on an idle machine each takes less than a second."""


class Ended(NamedTuple):
    """How a case ended."""

    status: int
    stdout: str
    stderr: str
    resident_tokens: int
    """How much of the prompt the next manager over the directory finds."""

    def faults(self, name: str) -> list[str]:
        """Return the laws that the case broke."""
        warned = "ResourceWarning: KVManager was not closed" in self.stderr
        planned = name == "forgotten_in_a_failure"
        laws = {
            f"ends with {STATUS.get(name, 0)}": self.status == STATUS.get(name, 0),
            "prints nothing": self.stdout == "",
            "warns if nobody has closed the manager": warned == (name in LOUD),
            "raises nothing": planned or "Traceback" not in self.stderr,
            "has no exception ignored": "Exception ignored" not in self.stderr,
            "ends itself": f"{END_S} s" not in self.stderr,
            "flushes": name in UNFLUSHED or self.resident_tokens == len(PROMPT),
        }
        return [law for law, holds in laws.items() if not holds]


def run(name: str, folder: Path) -> Ended:
    """Run a case in a process of its own, and open its directory afterwards."""
    os.environ["DIRECTORY"] = str(folder / name)
    paths = [folder / f"{name}.{stream}" for stream in ("stdout", "stderr")]
    sys.stdout.flush()
    child = os.fork()
    if not child:
        for fd, path in enumerate(paths, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), fd)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore SIGINT
        faulthandler.dump_traceback_later(END_S, exit=True)
        CASES[name]()
        sys.exit()
    _, status = os.waitpid(child, 0)
    checking = os.fork()
    if not checking:
        manager = made()
        manager.start()
        tokens = manager.match(PROMPT).tokens
        manager.shutdown()
        os._exit(tokens)
    _, tokens = os.waitpid(checking, 0)
    code = os.waitstatus_to_exitcode(status)
    return Ended(code, *(path.read_text() for path in paths), os.waitstatus_to_exitcode(tokens))


def main() -> None:
    """Run cases, and print how each ended as a line of JSON."""
    warnings.simplefilter("ignore", DeprecationWarning)  # some Pythons warn of forks with threads
    folder, *names = sys.argv[1:]
    for name in names or CASES:
        ended = run(name, Path(folder))
        told = {"name": name, **ended._asdict(), "faults": ended.faults(name)}
        sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
