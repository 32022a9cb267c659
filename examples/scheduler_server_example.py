"""An engine of several processes at a FlexKV server: a scheduler, and a worker for each TP rank.

    python examples/run_server.py                # in another terminal, first
    python examples/scheduler_server_example.py

The scheduler stores a prompt's KV, overwrites it on the devices as an engine would, loads it back
into other blocks, and has the workers compare every byte.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from run_server import MODEL, folder_of, settings_in

from flexkv.common.request import Operation
from flexkv.server.agent import Agent
from flexkv.server.client import Client

DEVICE_BLOCKS, PROMPT_BLOCKS = 256, 64


def worker(folder: Path, tp_rank: int, scheduler: Connection) -> None:
    """Own a rank's KV caches: lend them, write a "forward pass" into them, and compare them."""
    settings = settings_in(folder)
    heads = MODEL.num_kv_heads // MODEL.tp_size
    shape = (2, DEVICE_BLOCKS, settings.cache_config.tokens_per_block, heads, MODEL.head_size)
    caches = [np.zeros(shape, np.float16) for _ in range(MODEL.num_layers)]
    agent = Agent(settings.server_recv_port, MODEL, settings.cache_config, tp_rank=tp_rank)
    agent.start(caches)

    def written(seed: int) -> list[np.ndarray]:
        random = np.random.default_rng([seed, tp_rank])
        size = (2, PROMPT_BLOCKS, *shape[2:])
        return [random.random(size, np.float32).astype(np.float16) for _ in caches]

    while (told := scheduler.recv()) is not None:
        verb, seed, first = told[:3]
        blocks = slice(first, first + PROMPT_BLOCKS)
        if verb == "forward":
            for layer, content in zip(caches, written(seed), strict=True):
                layer[:, blocks] = content
            agent.ready(told[3])  # now the server may read the blocks of these puts
        else:
            pairs = zip(caches, written(seed), strict=True)
            scheduler.send(all(np.array_equal(layer[:, blocks], want) for layer, want in pairs))
    agent.close()


def ended(client: Client, number: int) -> str:
    """Wait for a request, and return how it ended. An engine would poll between its steps."""
    while True:
        for done in client.poll():
            if done.number == number:
                return f"{done.status}, {done.moved} blocks{done.error and f': {done.error}'}"
        time.sleep(0.0002)


def main(folder: Path) -> bool:
    """Run the example; return whether every byte came back."""
    settings = settings_in(folder)
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe() for _ in range(MODEL.tp_size)]
    workers = [
        spawn.Process(target=worker, args=(folder, rank, theirs))
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for each in workers:
        each.start()
    ours = [mine for mine, _ in pipes]
    client = Client(settings, MODEL)
    while not client.is_ready:
        client.poll()
        time.sleep(0.01)
    prompt = np.arange(PROMPT_BLOCKS * settings.cache_config.tokens_per_block)
    keys = client.keys(prompt)

    put = client.start(Operation.PUT, keys, 0, np.arange(PROMPT_BLOCKS), when_ready=True)
    for pipe in ours:
        pipe.send(("forward", 1, 0, [put]))
    print("put:", ended(client, put))
    for pipe in ours:
        pipe.send(("forward", 2, 0, []))
    print("match:", client.match(keys).by_tier)
    get = client.start(Operation.GET, keys, 0, np.arange(100, 100 + PROMPT_BLOCKS))
    print("get:", ended(client, get))
    for pipe in ours:
        pipe.send(("compare", 1, 100))
    equal = all(pipe.recv() for pipe in ours)
    print("every byte is back" if equal else "BYTES DIFFER")
    for pipe in ours:
        pipe.send(None)
    for each in workers:
        each.join()
    client.close()
    return equal


if __name__ == "__main__":
    sys.exit(0 if main(folder_of(sys.argv)) else 1)
