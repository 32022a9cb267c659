from __future__ import annotations
import os, random
from collections import Counter
import pytest
from .test_hybrids import Make, make, prompt
from .test_small_pools import *
from .test_small_pools import start, store, run
__all__ = ["make"]

@pytest.mark.parametrize("with_room", [True, False])
@pytest.mark.parametrize("factor", [1.2, 2.0, 4.0])
def test_m(make: Make, with_room, factor):
    stand = start(make, "windows", num_blocks=int(55*factor), match_wait_ms=5.0)
    if not with_room: stand.side._room = None
    chance = random.Random(5)
    talks = [store(stand, n, chance.randrange(12, 24)) for n in range(12)]
    stand.counts()
    stand.copies.lasts_s = lambda: 0.005
    got = Counter()
    want = 0
    seen = []
    side = stand.side
    orig = side.update_state_after_alloc
    def note(request, blocks, external):
        seen.append((request.request_id, external)); orig(request, blocks, external)
    stand.scheduler.connector.update_state_after_alloc = note
    for n in range(48):
        stand.ask(f"r{n}", talks[n % 12][: chance.randrange(400, 448)], max_tokens=8)
    try:
        run(stand)
        end = "done"
    except StuckError as e:
        end = "STUCK"
    c = stand.counts()
    first = {}
    for name, ext in seen: first.setdefault(name, ext)
    print("RESULT", with_room, factor, end, "admitted", len(first), "loaded", sum(1 for v in first.values() if v), dict(c))
    for r in list(stand.scheduler.requests.values()): stand.abort(r)
    stand.run()
