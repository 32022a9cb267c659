"""Programs that leave a manager in every way there is: `python exit_cases.py DIRECTORY [CASE …]`.

Each puts a prompt, leaves, and must end by itself, say nothing on stderr but what its case expects,
and leave the directory to whoever comes next. It runs in a process of its own, which is forked
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
"""Those that warn of a manager that was not closed."""
UNFLUSHED = {"forgotten_async", "forgotten_async_collected", "forgotten_on_its_own_loop",
             "forgotten_on_its_own_thread", "left_on_another_loop", "loop_closed", "atexit_async",
             "interrupted_shutdown", "interrupted_twice", "shutdown_on_its_own_loop"}  # fmt: skip
"""Those after which the SSD may lack what was put: no loop was there to write it, or no time."""
STATUS = {"forgotten_in_a_failure": 1, "interrupted": 1, "interrupted_twice": 1}


def case(work: Callable[[], Any]) -> Callable[[], Any]:
    """Add a case by its name."""
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
    """Return one that runs in a thread, and has the prompt."""
    manager = made()
    manager.start()
    manager.register_kv_caches(CACHES)
    (response,) = manager.wait(manager.put_async(PROMPT, SLOTS)).values()
    assert response.return_mask.all(), response
    return manager


async def entered() -> KVManager:
    """Return one on the running loop, which has the prompt."""
    manager = made()
    await manager.__aenter__()
    manager.register_kv_caches(CACHES)
    response = await manager.put(PROMPT, SLOTS)
    assert response.return_mask.all(), response
    return manager


def check_free() -> None:
    """Open the directory again."""
    again = made()
    again.start()
    again.shutdown()


@case
def shutdown() -> None:
    """As it should be; twice does no harm."""
    manager = started()
    manager.shutdown()
    manager.shutdown()
    check_free()


@case
def atexit_thread() -> None:
    """By a callback at exit."""
    atexit.register(started().shutdown)


@case
def atexit_async() -> None:
    """By a callback at exit, when the loop is closed."""
    atexit.register(asyncio.run(entered()).shutdown)


class Holder:
    """A user's object that shuts its manager down when it is dropped."""

    def __init__(self) -> None:
        self.manager = started()

    def __del__(self) -> None:
        self.manager.shutdown()


@case
def dropped() -> None:
    """By `__del__`."""
    holder = Holder()
    del holder
    check_free()


@case
def dropped_at_exit() -> None:
    """By `__del__`, when the interpreter has almost ended: it is closed at exit before that."""
    global kept
    kept = Holder()


@case
def dropped_in_a_cycle() -> None:
    """By `__del__`, in the garbage collector, and in a thread that has nothing to do with it."""
    holder: Any = Holder()
    holder.itself = holder
    del holder
    collecting = threading.Thread(target=gc.collect)
    collecting.start()
    collecting.join()
    check_free()


@case
def finalized() -> None:
    """By a finalizer, at exit."""
    global kept
    kept = set()
    weakref.finalize(kept, started().shutdown)


@case
def finalized_early() -> None:
    """By a finalizer, when its object is dropped."""
    weakref.finalize(object.__new__(type("Object", (), {})), started().shutdown)
    check_free()


@case
def forgotten() -> None:
    """By nobody, until exit."""
    global kept
    kept = started()


@case
def forgotten_collected() -> None:
    """By nobody, until it is collected."""
    started()
    check_free()


@case
def forgotten_cycle() -> None:
    """By nobody, until the garbage collector finds it."""
    manager: Any = started()
    manager.itself = manager
    del manager
    gc.collect()
    check_free()


@case
def forgotten_on_its_own_thread() -> None:
    """By nobody, until the engine's own thread drops the last reference."""
    manager = [started()]
    thread, over = manager[0]._thread, threading.Event()
    assert thread is not None
    thread.post(lambda: (manager.clear(), over.set()))
    over.wait()
    check_free()


@case
def forgotten_async() -> None:
    """By nobody, though its loop has ended; until exit."""
    global kept
    kept = asyncio.run(entered())


@case
def forgotten_async_collected() -> None:
    """By nobody, though its loop has ended; until it is collected."""
    asyncio.run(entered())
    check_free()


@case
def forgotten_on_its_own_loop() -> None:
    """By nobody, while its loop runs."""

    async def main() -> None:
        await entered()
        async with made():
            pass

    asyncio.run(main())
    check_free()


@case
def forgotten_in_a_failure() -> None:
    """By nobody, as the program fails."""
    manager = started()
    raise LookupError(f"as planned, with {manager.is_ready()}")


@case
def left_on_another_loop() -> None:
    """`__aexit__` on another loop than `__aenter__`: released, and said."""
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
    """`__aexit__` on another loop, while the manager's own runs in another thread."""
    with elsewhere() as manager:
        asyncio.run(manager.__aexit__(None, None, None))
    check_free()


@case
def shutdown_while_its_loop_runs_elsewhere() -> None:
    """`shutdown` of a manager on a loop in another thread."""
    with elsewhere() as manager:
        manager.shutdown()
    check_free()


@case
def shutdown_on_its_own_loop() -> None:
    """`shutdown` within `async with`: released at once; leaving does no harm."""

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
    """`shutdown` when the loop was closed before."""
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
    """In a signal handler, while the main thread waits for a request."""
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
    """In another thread, while this one waits; several at once."""
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
    """ctrl-C within asyncio.run: `async with` is left, and everything is written."""

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
    """ctrl-C again, while leaving waits: what can be released is."""

    async def main() -> None:
        async with made() as manager:
            manager.register_kv_caches(CACHES)
            put = manager.put_layerwise(PROMPT, SLOTS)
            close = manager._engine._durability.finish

            async def finish(wait_s: float) -> None:
                os.kill(os.getpid(), signal.SIGINT)
                await close(wait_s)

            manager._engine._durability.finish = finish  # type: ignore[method-assign]
            os.kill(os.getpid(), signal.SIGINT)
            await put

    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        check_free()
        sys.exit(1)


@case
def interrupted_shutdown() -> None:
    """ctrl-C within `shutdown`: released all the same."""
    manager = started()
    finish = manager._engine._durability.finish

    async def interrupting(wait_s: float) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.2)  # where the main thread hears of it
        await finish(wait_s)

    manager._engine._durability.finish = interrupting  # type: ignore[method-assign]
    try:
        manager.shutdown()
    except KeyboardInterrupt:
        check_free()
    else:
        raise AssertionError("it was not interrupted")


@case
def a_call_on_its_own_thread() -> None:
    """Something that the engine calls may not wait for the engine."""
    manager = started()
    thread, told = manager._thread, []
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
"""What hangs is killed; on an idle machine each case takes less than a second."""


class Ended(NamedTuple):
    """How a case ended."""

    status: int
    stdout: str
    stderr: str
    resident_tokens: int
    """Of the prompt, for whoever opens the directory next."""

    def faults(self, name: str) -> list[str]:
        """Return what is not as it should be."""
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
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
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
    warnings.simplefilter("ignore", DeprecationWarning)  # some Pythons: a process with threads
    folder, *names = sys.argv[1:]
    for name in names or CASES:
        ended = run(name, Path(folder))
        told = {"name": name, **ended._asdict(), "faults": ended.faults(name)}
        sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
