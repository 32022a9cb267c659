"""The devices of every instance, which live in the instances' own processes.

    FleetPort ──epoch of the device ids──▶ RanksPort ──▶ AgentPort ──link──▶ agent of rank 0
                                                    └──▶ AgentPort ──link──▶ agent of rank 1

An instance has an epoch while its client and all its ranks are connected. Its device blocks then
have ids of their own, `epoch << EPOCH_SHIFT | block`. When one of them disconnects, the epoch ends
for good: its ids can never mean anything else, and what puts were reading in it is discarded.
A client may reuse device blocks without waiting for the puts that read them, but it closes its
connection first; the server checks for that whenever such a read has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from msgspec import structs

from flexkv.common.errors import AgentGoneError, ConfigError
from flexkv.common.layout import NATURAL, is_order
from flexkv.common.space import BlockSpace
from flexkv.common.terms import BlockIds, Tier, Transfer
from flexkv.io.device.ranks import RanksPort
from flexkv.io.ports import Completion
from flexkv.links.link import Link
from flexkv.observe.logs import get_logger
from flexkv.server.agent_port import AgentPort, RemoteDevice
from flexkv.server.wire import Message, ProtocolError, ToServer

log = get_logger(__name__)

GONE = "the instance is no longer connected"
EPOCH_SHIFT = 40
BLOCK_MASK = (1 << EPOCH_SHIFT) - 1


class _UnderWay(NamedTuple):
    transfer: Transfer
    epoch: int


class Instance:
    """The ranks of one instance that are connected.

    Attributes:
        ranks: the port to all ranks; None while one is missing. It outlives a client.
        epoch: the epoch of its device blocks; None while a rank or the client is missing.
        num_blocks: how many blocks every rank has.
        stuck: why no request is begun on its devices, if they do not end their copies; else empty.
    """

    def __init__(self) -> None:
        self.stuck = ""
        self.ports: dict[int, AgentPort] = {}
        self.ranks: RanksPort | None = None
        self.client: Link[ToServer] | None = None
        self.epoch: int | None = None
        self.num_blocks = 0


class FleetPort(RemoteDevice):
    """A transfer port over the devices of every instance."""

    num_blocks = 1 << EPOCH_SHIFT

    def __init__(self, spaces: Sequence[BlockSpace], host_blocks: int) -> None:
        self._spaces, self._host_blocks = spaces, host_blocks
        self.instances: dict[int, Instance] = {}
        self.order: str | None = None
        self._epochs: dict[int, RanksPort] = {}
        self._under_way: dict[int, _UnderWay] = {}
        self.begun: Callable[[], None] = lambda: None
        """Called when agents get something to do, so that their deadlines are checked."""
        self._next_epoch = 1
        self._ended: list[Completion] = []
        self._wake: Callable[[], None] | None = None

    # -- ranks come and go ----------------------------------------------------------------------

    def check(self, number: int, tp_rank: int, num_blocks: int, order: str) -> None:
        """Check that a rank may join.

        Raises:
            ConfigError: there is no such rank, it is connected already, or its blocks differ.
        """
        tp_size = self._spaces[0].ranks
        if not 0 <= tp_rank < tp_size:
            raise ConfigError("tp_rank", tp_rank, f"must be from 0 to tp_size - 1 ({tp_size - 1})")
        if not 0 < num_blocks <= BLOCK_MASK:
            raise ConfigError("num_blocks", num_blocks, f"must be from 1 to {BLOCK_MASK}")
        instance = self.instances.get(number)
        if instance is not None and tp_rank in instance.ports:
            why = f"is already connected for instance {number}: engines need different instance_ids"
            raise ConfigError("tp_rank", tp_rank, why)
        if not is_order(order):
            why = f"must be an element order made of these axes: {', '.join(NATURAL)}, splits=N"
            raise ConfigError("kv_caches", order, why)
        if any(each.ports for each in self.instances.values()) and order != self.order:
            why = f"must have the same element order as the other ranks: {self.order}"
            raise ConfigError("kv_caches", order, why)

    def join(self, number: int, tp_rank: int, port: AgentPort, order: str) -> None:
        """Add a rank; with the last one its instance gets an epoch.

        Raises:
            ConfigError: the rank may not join.
        """
        self.check(number, tp_rank, port.num_blocks, order)
        instance = self.instances.setdefault(number, Instance())
        self.order = order
        instance.ports[tp_rank] = port
        self._begin_epoch(instance)

    def leave(self, number: int, tp_rank: int) -> None:
        """Remove a rank, and dismiss the others; the instance has no epoch until all are back."""
        instance = self.instances[number]
        port, instance.ranks, instance.epoch = instance.ports.pop(tp_rank), None, None
        port.gone()
        if not port.is_dismissed:  # otherwise the others are dismissed, too, or joined later
            for other in instance.ports.values():
                other.dismiss()
        self._forget_if_empty(number)

    def client_of(self, number: int) -> Link[ToServer] | None:
        """Return an instance's client, if it has one."""
        instance = self.instances.get(number)
        return None if instance is None else instance.client

    def attach(self, number: int, client: Link[ToServer]) -> None:
        """Set an instance's client; if all ranks are there, the instance gets a new epoch."""
        instance = self.instances.setdefault(number, Instance())
        instance.client = client
        self._begin_epoch(instance)

    def detach(self, number: int) -> None:
        """Remove an instance's client, and end its epoch."""
        instance = self.instances[number]
        instance.client = instance.epoch = None
        self._forget_if_empty(number)

    def _forget_if_empty(self, number: int) -> None:
        instance = self.instances[number]
        if not instance.ports and instance.client is None:
            del self.instances[number]

    def _begin_epoch(self, instance: Instance) -> None:
        if len(instance.ports) < self._spaces[0].ranks or instance.client is None:
            return
        if any(port.is_dismissed for port in instance.ports.values()):
            return
        if instance.ranks is None:
            instance.ranks = self._joined(instance.ports)
        instance.num_blocks = min(port.num_blocks for port in instance.ports.values())
        instance.epoch = self._next_epoch
        self._epochs[instance.epoch] = instance.ranks
        self._next_epoch += 1

    def _joined(self, ports: dict[int, AgentPort]) -> RanksPort:
        by_rank = [port for _, port in sorted(ports.items())]
        ranks = RanksPort(by_rank, self._spaces, self._host_blocks)
        if self._wake is not None:
            ranks.connect(self._wake)
        return ranks

    def ids_of(
        self, instance: Instance, local_ids: BlockIds, field: str = "device_ids"
    ) -> BlockIds:
        """Return the ids of an instance's device blocks among those of all instances.

        Raises:
            ConfigError: one of them is no block of its devices; the error names `field`.
        """
        assert instance.epoch is not None
        if len(local_ids) and not 0 <= local_ids.min() <= local_ids.max() < instance.num_blocks:
            wrong = next(int(i) for i in local_ids if not 0 <= i < instance.num_blocks)
            why = f"is not a device block of the instance, which has {instance.num_blocks}"
            raise ConfigError(field, wrong, why)
        return local_ids | (instance.epoch << EPOCH_SHIFT)

    def tell(self, number: int, message: Message) -> None:
        """Send a message to every rank of an instance; dismiss them if one does not read."""
        instance = self.instances.get(number)
        ports = [] if instance is None else list(instance.ports.values())
        behind = [port for port in ports if not (port.tell(message) or port.is_dismissed)]
        if behind:
            log.warning("agents_dismissed", instance=number, reason="one of them does not read")
            for port in ports:
                port.dismiss()

    # -- the port -------------------------------------------------------------------------------

    def connect(self, wake: Callable[[], None]) -> None:
        """Attach to the running event loop; `wake` is called on it when `reap` has something."""
        self._wake = wake
        for ranks in self._epochs.values():
            ranks.connect(wake)

    def submit(self, transfer: Transfer) -> None:
        """Start one transfer, all of whose blocks are of one instance."""
        _, theirs = transfer.sides
        epoch = int(theirs[0]) >> EPOCH_SHIFT
        ranks, instance = self._epochs.get(epoch), self._live(epoch)
        if ranks is None or instance is None or instance.stuck:
            why = GONE if instance is None else instance.stuck or GONE
            self._ended.append(Completion(transfer.op_id, _failed(transfer, why)))
            if self._wake is not None:
                self._wake()
            return
        side = "target_ids" if transfer.route.target is Tier.DEVICE else "source_ids"
        self._under_way[transfer.op_id] = _UnderWay(transfer, epoch)
        ranks.submit(structs.replace(transfer, **{side: theirs & BLOCK_MASK}))
        self.begun()

    def _live(self, epoch: int) -> Instance | None:
        """Return the instance that has an epoch, if its client is connected."""
        for each in self.instances.values():
            if each.epoch == epoch and each.client is not None:
                return None if each.client.has_hung_up else each
        return None

    def reap(self) -> list[Completion]:
        """Return every transfer that ended since the last call, each exactly once."""
        ended, self._ended = self._ended, []
        for ranks in dict.fromkeys(self._epochs.values()):  # epochs may share a port
            for op_id, error, *_ in ranks.reap():
                transfer, epoch = self._under_way.pop(op_id)
                if error is None and transfer.route.target is Tier.HOST and not self._live(epoch):
                    # Other requests may have written to its device blocks by then.
                    error = _failed(transfer, GONE)
                ended.append(Completion(op_id, error))
        if over := self._epochs.keys() - {each.epoch for each in self.instances.values()}:
            for epoch in over - {each.epoch for each in self._under_way.values()}:
                del self._epochs[epoch]
        return ended

    def close(self) -> None:
        """Forget all ports. Only legal with nothing in flight."""
        self._epochs.clear()


def _failed(transfer: Transfer, why: str) -> AgentGoneError:
    return AgentGoneError(transfer.op_id, str(transfer.route), transfer.block_count, why)


def ids_from(blob: bytes) -> BlockIds:
    """Return the ids in the bytes of a message.

    Raises:
        ProtocolError: they are not a whole number of ids.
    """
    if len(blob) % 8:
        raise ProtocolError(f"{len(blob)} bytes are not a whole number of ids of 8 bytes")
    return np.frombuffer(blob, np.int64)
