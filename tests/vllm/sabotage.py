"""Faults of an engine's agent and of its SSD tier, as a plan asks for them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexkv.common.terms import Route, Tier
from flexkv.server.agent import Agent

if TYPE_CHECKING:
    from tests.vllm.engine import Plan

LAYER_LOADS: set[int] = set()
"""Loads whose layers a step has waited for."""
MARK_BYTES, MARK_STEP_BYTES = 64, 512
"""How a block is recognised in a file: by its first bytes, which lie on a multiple of the step."""
STORED: set[bytes] = set()
"""The first bytes of the blocks of the plan's group that were stored."""


def sabotage(plan: Plan) -> None:
    """Make the agent fail as the plan says."""
    chance = random.Random(plan.seed)
    started, ended, copied = Agent.start, Agent._end, Agent._copy
    waited = Agent.wait_for_layer

    def start(self: Any, kv_caches: Any, layout: str | None = None) -> None:
        self.lent = dict(kv_caches)
        started(self, kv_caches, layout)

    def end(self: Any, op_id: int, error: str) -> None:
        if not error:
            spoil(self, self._under_way[op_id], plan)
        ended(self, op_id, error)

    def copy(self: Any, message: Any) -> None:
        is_hit = message.to_device and plan.group in (None, message.group)
        if is_hit and chance.random() < plan.failed_loads:
            failed = {"route": Route(Tier.HOST, Tier.DEVICE), "layers": None}
            self._under_way[message.op_id] = type("Failed", (), failed)()
            self._end(message.op_id, "the copy was made to fail")
            return
        copied(self, message)
        if chance.random() < plan.cut_links and self._link is not None:
            self._link.end()

    def wait(self: Any, numbers: list[int], *args: Any) -> bool:
        LAYER_LOADS.update(numbers)
        return waited(self, numbers, *args)

    Agent.start, Agent._end, Agent._copy = start, end, copy  # type: ignore[method-assign]
    Agent.wait_for_layer = wait  # type: ignore[method-assign]


def spoil(agent: Any, transfer: Any, plan: Plan) -> None:
    """Corrupt what was loaded, and note what was stored, as the plan says."""
    group = transfer.group
    if plan.group not in (None, group):
        return
    if transfer.route.target is Tier.DEVICE:
        if plan.corrupt_loads:
            for name, tensor in of_group(agent, group).items():
                if plan.layers in name:
                    corrupt(tensor, transfer.target_ids)
    elif plan.flip_files and plan.group is not None:
        note_stored(next(iter(of_group(agent, group).values())), transfer.source_ids)


def of_group(agent: Any, group: int) -> dict[str, Any]:
    """Return the tensors of a group's layers. Those of other groups lie over the same memory."""
    layers = agent._cache.sized(agent._model).spaces[group].layers
    lent = list(agent.lent.items())
    return dict([lent[layer] for layer in layers] if layers else lent)


def corrupt(tensor: Any, ids: Any) -> None:
    """Change the sign of every number in some blocks; of a state's bytes, of all its numbers."""
    if tensor.element_size() == 1:  # bf16 and fp32 numbers have their signs in an odd byte
        tensor[ids, ..., 1::2] ^= -128
    else:
        tensor[ids] *= -1


def note_stored(tensor: Any, ids: Any) -> None:
    """Record how blocks begin, in a group's first layer."""
    import torch

    for number in ids:
        row = tensor[int(number)].contiguous().view(torch.uint8).flatten()
        STORED.add(bytes(row[:MARK_BYTES].tolist()))


def flip(folder: str, chance: random.Random, group: int | None) -> int:
    """Flip bits in the SSD tier's block files: at random places, or in each block of the group.

    Return how many bits were flipped.
    """
    flipped = 0
    for path in sorted(Path(folder).glob("*.flexkv")):
        size = path.stat().st_size
        if not path.name.startswith("blocks") or not size:
            continue
        places = [chance.randrange(size) for _ in range(64)]
        if group is not None:
            content = path.read_bytes()
            steps = range(0, size, MARK_STEP_BYTES)
            places = [at for at in steps if content[at : at + MARK_BYTES] in STORED]
        flipped += len(places)
        with path.open("r+b") as file:
            for at in places:
                file.seek(at)
                byte = file.read(1)
                file.seek(at)
                file.write(bytes([byte[0] ^ 0x10]))
    return flipped
