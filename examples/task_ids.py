"""FlexKV in a synchronous engine: a step starts tasks by id, and asks which have ended.

    python examples/task_ids.py                  # SSD tier in ./flexkv-example; or name a directory

An engine's scheduler asks how much of a prompt is stored (`get_match`), decides into which device
blocks it is loaded (`launch`), goes on with other work, and checks now and then (`try_wait`).
"""

from __future__ import annotations

import sys
import time

import numpy as np
from async_library import DEVICE_BLOCKS, MODEL, PER_BLOCK, slots_of

from flexkv.common.config import CacheConfig
from flexkv.common.request import KVResponse
from flexkv.kvmanager import KVManager


def ended(manager: KVManager, task_id: int) -> KVResponse:
    """Return the response to a task. An engine would run a step between two checks."""
    while not (responses := manager.try_wait([task_id])):
        time.sleep(0.001)
    return responses[task_id]


def main(directory: str) -> bool:
    """Run the example; return whether every byte came back."""
    cache = CacheConfig(
        tokens_per_block=PER_BLOCK, num_cpu_blocks=256, num_ssd_blocks=1024, ssd_cache_dir=directory
    )
    random = np.random.default_rng(0)
    shape = (2, DEVICE_BLOCKS, PER_BLOCK, MODEL.num_kv_heads, MODEL.head_size)
    kv_caches = [random.random(shape, np.float32).astype(np.float16) for _ in range(4)]
    manager = KVManager(MODEL, cache)
    manager.start()  # its event loop runs in a thread of its own
    manager.register_kv_caches(kv_caches)
    try:
        prompt = np.arange(64)
        put = manager.put_async(prompt, slots_of(0, 64))
        print("put:", ended(manager, put))

        get, known = manager.get_match(prompt)
        print("match:", int(known.sum()), "tokens")
        manager.launch([get], [slots_of(100, int(known.sum()))])
        print("get:", ended(manager, get))

        unwanted, _ = manager.get_match(prompt)
        manager.cancel([unwanted])  # the request was aborted: nothing is held for it any more
    finally:
        manager.shutdown()
    equal = all(np.array_equal(layer[:, 100:104], layer[:, 0:4]) for layer in kv_caches)
    print("every byte is back" if equal else "BYTES DIFFER")
    return equal


if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 else "flexkv-example"
    sys.exit(0 if main(folder) else 1)
