"""Small request traces: random walks down a tree of prefixes, some of them continued."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from flexkv.trace.mooncake import TraceLine


def lines(seed: int, requests: int = 120) -> list[TraceLine]:
    """Return requests that share prefixes: random walks down a tree, some of them continued."""
    random = Random(seed)
    walks: list[list[int]] = []
    for _ in range(requests):
        if walks and random.random() < 0.5:
            walk = random.choice(walks[-20:])[: random.randint(1, 6)]
        else:
            walk = [random.randint(0, 3)]
        walk = walk + [random.randint(0, 5) for _ in range(random.randint(0, 4))]
        walks.append(walk)
    return [TraceLine(1000.0 * n, 512 * len(w), 1, w) for n, w in enumerate(walks)]


def write_trace(file: Path) -> Path:
    """Write such requests to a file, and return its path."""
    fields = ("timestamp", "input_length", "output_length", "hash_ids")
    rows = [{name: getattr(line, name) for name in fields} for line in lines(1)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
