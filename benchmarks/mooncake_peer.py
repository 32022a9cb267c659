"""Mooncake's own client, for `benchmarks.mooncake`: a process that reads objects when it is asked.

Each line of its input is the number of objects for each call. For each line it reads all objects,
and prints the seconds that this took, and the seconds of CPU.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import time

from mooncake.store import MooncakeDistributedStore


def main(master: str, nbytes: int, names: list[str]) -> None:
    """Connect to a store, and read objects of `nbytes` each until the input ends."""
    client = MooncakeDistributedStore()
    assert client.setup("127.0.0.1", "P2PHANDSHAKE", 0, 0, "tcp", "", master) == 0
    memory = mmap.mmap(-1, len(names) * nbytes)
    memory.write(bytes(len(memory)))
    at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    places = [at + number * nbytes for number in range(len(names))]
    assert client.register_buffer(at, len(memory)) == 0
    for line in sys.stdin:
        begin_s, begin_cpu_s, at_once = time.perf_counter(), time.process_time(), int(line)
        for first in range(0, len(names), at_once):
            chosen = slice(first, first + at_once)
            sizes = [nbytes] * len(names[chosen])
            read = client.batch_get_into(names[chosen], places[chosen], sizes)
            assert read == sizes, read
        print(time.perf_counter() - begin_s, time.process_time() - begin_cpu_s, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
