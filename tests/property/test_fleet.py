"""The devices of instances whose clients and ranks come and go while transfers are under way.

The fleet and its ports are real, and are called as the server calls them. Agents and clients are
simulated: a copy that an agent is asked for stays open until a rule answers it, in any order.
"""

from __future__ import annotations

import os
from random import Random

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from flexkv.common.config import ModelConfig
from flexkv.common.errors import ConfigError
from flexkv.common.terms import Route, Tier, Transfer
from flexkv.server.fleet import EPOCH_SHIFT, FleetPort
from flexkv.server.wire import Copied, ProtocolError
from tests.property.fleet_model import MODELS, Place, Rank, Sent, Slot, Wire

ORDER, HOST_BLOCKS, INSTANCES = "kv tokens heads dim", 1000, 2
TO_DEVICE, TO_HOST = Route(Tier.HOST, Tier.DEVICE), Route(Tier.DEVICE, Tier.HOST)

RUNS = int(os.environ.get("FLEET_RUNS", "100"))
INSTANCE, BLOCKS = st.integers(0, INSTANCES - 1), st.integers(1, 5)
ROUTE, ERROR = st.sampled_from((TO_HOST, TO_DEVICE)), st.sampled_from(("", "", "", "it cannot"))


class FleetMachine(RuleBasedStateMachine):
    """A state machine in which hypothesis chooses who connects, disconnects and answers."""

    def __init__(self) -> None:
        super().__init__()
        self.places = [Place() for _ in range(INSTANCES)]
        self.epochs: list[Slot] = []
        self.sent: dict[int, Sent] = {}
        self.next_op_id = 0
        self.is_woken = False

    @initialize(model=st.sampled_from(list(MODELS.values())))
    def open(self, model: ModelConfig) -> None:
        """Start with all instances complete."""
        self.model = model
        self.space = model.spaces(16)[0]
        self.fleet = FleetPort([self.space], HOST_BLOCKS)
        self.fleet.connect(lambda: setattr(self, "is_woken", True))
        for instance in range(INSTANCES):
            self.mend(instance)

    # -- connections ----------------------------------------------------------------------------

    @rule(instance=INSTANCE, hangs_up=st.booleans())
    def client_goes(self, instance: int, hangs_up: bool) -> None:
        """Disconnect a client, or let it hang up without the server having noticed yet."""
        place = self.places[instance]
        if hangs_up and place.client is not None:
            place.client.has_hung_up = True
        elif place.client is not None:
            place.client = place.epoch = None
            self.fleet.detach(instance)

    @rule(instance=INSTANCE)
    def client_comes(self, instance: int) -> None:
        """Connect a client; the server has noticed that the one before is gone."""
        self.client_goes(instance, False)
        assert self.fleet.client_of(instance) is None
        client = self.places[instance].client = Wire()
        self.fleet.attach(instance, client)
        self._note_epoch(instance)

    @rule(instance=INSTANCE)
    def mend(self, instance: int) -> None:
        """Reconnect every client and rank of an instance that is missing or no longer usable."""
        place = self.places[instance]
        for rank in range(self.model.tp_size):
            if rank in place.ranks and not place.ranks[rank].wire.is_open:
                self.rank_leaves(instance, rank)
        for rank in range(self.model.tp_size):
            if rank not in place.ranks:
                self.rank_joins(instance, rank, 8)
        if place.client is None or place.client.has_hung_up:
            self.client_comes(instance)

    @rule(instance=INSTANCE, rank=st.integers(0, 2), blocks=st.integers(5, 9))
    def rank_joins(self, instance: int, rank: int, blocks: int) -> None:
        """Connect an agent; a second agent of the same rank is refused."""
        place, number = self.places[instance], rank % self.model.tp_size
        joining = Rank(self.space.part_of(number).number, blocks)
        if number in place.ranks:
            with pytest.raises(ConfigError, match="is already connected"):
                self.fleet.join(instance, number, joining.port, ORDER)
            return
        self.fleet.join(instance, number, joining.port, ORDER)
        place.ranks[number] = joining
        self._note_epoch(instance)

    @rule(instance=INSTANCE, rank=st.integers(0, 2))
    def rank_leaves(self, instance: int, rank: int) -> None:
        """End an agent's connection with its copies unanswered; the others are dismissed."""
        place, number = self.places[instance], rank % self.model.tp_size
        if (leaving := place.ranks.pop(number, None)) is not None:
            others = [each.port for each in place.ranks.values()]
            dismissed = [not leaving.port.is_dismissed or port.is_dismissed for port in others]
            place.epoch = None
            self.fleet.leave(instance, number)
            leaving.wire.asked.clear()
            assert [port.is_dismissed for port in others] == dismissed

    @rule(instance=INSTANCE, rank=st.integers(0, 2))
    def rank_errs(self, instance: int, rank: int) -> None:
        """Let an agent break the protocol; nothing that it sends later is processed."""
        erring = self.places[instance].ranks.get(rank)
        if erring is not None and erring.is_heard:
            with pytest.raises(ProtocolError, match="not under way"):
                erring.port.copied(Copied(-1))
            erring.wire.end()
            erring.is_heard = False

    def _note_epoch(self, number: int) -> None:
        """Check that an instance has an epoch, never used before, exactly when it is complete."""
        place, instance = self.places[number], self.fleet.instances[number]
        ranks = place.ranks.values()
        assert place.epoch is None
        is_whole = place.client is not None and len(ranks) == self.model.tp_size
        if not is_whole or any(rank.port.is_dismissed for rank in ranks):
            assert instance.epoch is None
            return
        assert instance.epoch is not None
        assert instance.epoch not in {epoch.number for epoch in self.epochs}
        place.epoch = instance.epoch
        self.epochs.append(Slot(place.epoch, place))
        assert instance.num_blocks == self.epochs[-1].num_blocks

    # -- transfers ------------------------------------------------------------------------------

    @rule(ages=st.lists(st.integers(0, 3), min_size=1, max_size=3), route=ROUTE, blocks=BLOCKS)
    def submit(self, ages: list[int], route: Route, blocks: int) -> None:
        """Begin transfers for slots of recent epochs, which may have ended."""
        for age in ages:
            self._submit(self.epochs[-1 - age % len(self.epochs)], route, blocks)

    def _submit(self, epoch: Slot, route: Route, blocks: int) -> None:
        op_id = self.next_op_id
        self.next_op_id += 1
        host = np.arange(blocks) + op_id % (HOST_BLOCKS - blocks)
        local = (np.arange(blocks) + op_id) % epoch.num_blocks
        device = local | (epoch.number << EPOCH_SHIFT)
        sides = (host, device) if route == TO_DEVICE else (device, host)
        transfer = Transfer(op_id, 0, route, *sides)
        pairs = list(zip(host.tolist(), local.tolist(), strict=True))
        self.sent[op_id] = Sent(transfer, epoch, pairs)
        self.fleet.submit(transfer)
        assert self.sent[op_id].is_taken or self.sent[op_id].is_over

    @rule(numbers=st.lists(st.integers(0, 99), min_size=1, max_size=4), error=ERROR)
    def answer(self, numbers: list[int], error: str) -> None:
        """Let agents answer some of their copies, even agents that were dismissed meanwhile."""
        ranks = [rank for place in self.places for rank in place.ranks.values() if rank.is_heard]
        for number in numbers:
            asked = [(rank, op_id) for rank in ranks for op_id in rank.wire.asked]
            if asked:
                rank, op_id = asked[number % len(asked)]
                copy = rank.wire.asked.pop(op_id)
                if not error:
                    self.sent[op_id].note_moved(rank, copy)
                rank.port.copied(Copied(op_id, error))

    @rule()
    def reap(self) -> None:
        """Reap exactly the transfers that are over; only those that may be trusted succeed."""
        self.is_woken = False
        ended = self.fleet.reap()
        over = {op_id for op_id, sent in self.sent.items() if sent.is_over}
        assert sorted(op_id for op_id, *_ in ended) == sorted(over)
        for op_id, error, *_ in ended:
            sent = self.sent.pop(op_id)
            is_believed = sent.is_whole and (sent.to_device or sent.epoch.is_live)
            assert (error is None) == is_believed, (op_id, error)
        kept = {sent.epoch.number for sent in self.sent.values()}
        kept |= {place.epoch for place in self.places if place.epoch is not None}
        assert self.fleet._epochs.keys() == kept

    @invariant()
    def agrees(self) -> None:
        """The fleet wakes its waiter, and its instances and busy ranks match the model."""
        assert self.is_woken or not any(sent.is_over for sent in self.sent.values())
        instances = self.fleet.instances.items()
        seen = {number: (each.client, each.epoch, each.ports) for number, each in instances}
        assert seen == {number: each.shape for number, each in enumerate(self.places) if each}
        for place in self.places:
            for rank in place.ranks.values():
                assert rank.port.is_busy == bool(rank.wire.asked)

    def teardown(self) -> None:
        """Disconnect everyone and close the fleet; nothing is left."""
        for number, place in enumerate(self.places):
            self.client_goes(number, False)
            for rank in list(place.ranks):
                place.ranks[rank].wire.end()
                self.rank_leaves(number, rank)
        if hasattr(self, "fleet"):
            self.reap()
            left = self.sent, self.fleet._epochs, self.fleet._under_way, self.fleet.instances
            assert left == ({}, {}, {}, {})
            self.fleet.close()


TestFleet = FleetMachine.TestCase
TestFleet.settings = settings(max_examples=100, stateful_step_count=40)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_random_comings_and_goings(model: ModelConfig) -> None:
    """The fleet agrees with the model in FLEET_RUNS seeded runs of each model."""
    for seed in range(RUNS):
        random, machine = Random(seed), FleetMachine()
        machine.open(model)
        try:
            for _ in range(200):
                random_step(machine, random)
                machine.agrees()
            machine.teardown()
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise


def random_step(machine: FleetMachine, random: Random) -> None:
    """Perform one random operation; answers are likelier than disconnects."""
    choice, instance, rank = random.random(), random.randrange(INSTANCES), random.randrange(3)
    if choice < 0.25:
        ages = random.choices(range(4), k=2)
        machine.submit(ages, random.choice((TO_HOST, TO_DEVICE)), random.randint(1, 5))
    elif choice < 0.5:
        machine.answer(random.choices(range(100), k=3), random.choice(("", "", "", "it cannot")))
    elif choice < 0.7:
        machine.reap()
    elif choice < 0.8:
        machine.mend(instance)
    elif choice < 0.86:
        machine.client_goes(instance, random.random() < 0.5)
    elif choice < 0.92:
        machine.client_comes(instance)
    elif choice < 0.95:
        machine.rank_joins(instance, rank, random.randint(5, 9))
    elif choice < 0.98:
        machine.rank_leaves(instance, rank)
    else:
        machine.rank_errs(instance, rank)
