"""A model of the instances in the server's fleet, with agents that the test answers for."""

from __future__ import annotations

from collections import Counter
from typing import Any

from flexkv.common.config import ModelConfig
from flexkv.common.terms import Tier, Transfer
from flexkv.links.link import Link
from flexkv.server.agent_port import AgentPort
from flexkv.server.fleet import ids_from
from flexkv.server.wire import Copy, Message, ToServer

PART_BYTES = 64
ONE_RANK = ModelConfig(num_layers=1, num_kv_heads=2, head_size=8, dtype="float16")
MODELS = {
    "one rank": ONE_RANK,
    "two parts": ONE_RANK.model_copy(update={"tp_size": 2}),
    "one part": ONE_RANK.model_copy(update={"tp_size": 3, "use_mla": True, "kv_dim": 1}),
}


class Wire(Link[ToServer]):
    """A link without a socket: it keeps each requested copy until the test answers it."""

    is_open, has_hung_up = True, False

    def __init__(self) -> None:
        self.asked: dict[int, Copy] = {}

    def send(self, message: Message) -> None:
        """Keep a copy that the agent is asked for."""
        assert isinstance(message, Copy)
        assert self.is_open
        assert message.op_id not in self.asked
        self.asked[message.op_id] = message

    def end(self) -> None:
        """Close the link: nothing may be sent any more."""
        self.is_open = False


class Rank:
    """An agent: its port in the server, and the copies that it is asked for."""

    def __init__(self, part: int, num_blocks: int) -> None:
        self.part, self.wire, self.is_heard = part, Wire(), True
        self.port = AgentPort(self.wire, [PART_BYTES, PART_BYTES], num_blocks)


class Place:
    """The expected state of one instance in the fleet."""

    def __init__(self) -> None:
        self.client: Wire | None = None
        self.ranks: dict[int, Rank] = {}
        self.epoch: int | None = None

    def __bool__(self) -> bool:
        return self.client is not None or bool(self.ranks)

    @property
    def shape(self) -> tuple[Wire | None, int | None, dict[int, AgentPort]]:
        """Return the client, the epoch and the ports by rank."""
        return self.client, self.epoch, {rank: each.port for rank, each in self.ranks.items()}


class Slot:
    """One epoch of an instance, current or past, with the ranks that it had."""

    def __init__(self, number: int, place: Place) -> None:
        self.number, self.place = number, place
        self.ranks = list(place.ranks.values())
        self.num_blocks = min(rank.port.num_blocks for rank in self.ranks)

    @property
    def is_live(self) -> bool:
        """Return whether this is the current epoch, so that the result of a put is trusted."""
        client = self.place.client
        return self.place.epoch == self.number and client is not None and not client.has_hung_up


class Sent:
    """A transfer, and which of its blocks were moved, by part (put) or by rank (get)."""

    def __init__(self, transfer: Transfer, epoch: Slot, pairs: list[tuple[int, int]]) -> None:
        self.transfer, self.epoch, self.pairs = transfer, epoch, pairs
        self.is_taken = epoch.is_live
        self.to_device = transfer.route.target is Tier.DEVICE
        keys = epoch.ranks if self.to_device else {rank.part for rank in epoch.ranks}
        self.moved: dict[Any, Counter[Any]] = {key: Counter() for key in keys}

    def note_moved(self, rank: Rank, copy: Copy) -> None:
        """Record what a rank has copied."""
        assert copy.to_device == self.to_device
        sides = ids_from(copy.host_ids).tolist(), ids_from(copy.device_ids).tolist()
        self.moved[rank if self.to_device else rank.part].update(zip(*sides, strict=True))

    @property
    def is_over(self) -> bool:
        """Return whether no rank still has a copy of this transfer to answer."""
        return not any(self.transfer.op_id in rank.wire.asked for rank in self.epoch.ranks)

    @property
    def is_whole(self) -> bool:
        """Return whether every rank (get) or every part (put) moved each block once."""
        return all(moved == Counter(self.pairs) for moved in self.moved.values())
