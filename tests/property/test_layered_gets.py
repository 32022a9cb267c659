"""What an agent knows of its gets by layer, against a model, with ends in any order."""

from __future__ import annotations

import os
from random import Random

import pytest

from flexkv.common.terms import Layers
from flexkv.server.layered_gets import ENDED_MAX, LayeredGets
from flexkv.server.wire import GetEnded, GetPlanned

LAYERS, NUMBERS = 5, 6
RUNS = int(os.environ.get("LAYER_RUNS", "200"))


class Known:
    """What one get should look like to a worker."""

    def __init__(self) -> None:
        self.ended: int | None = None
        """How many blocks it has moved, once it has ended."""
        self.pieces: dict[int, set[int]] = {}
        """The layers that are there, by copy."""

    def has(self, layer: int) -> bool:
        """Return whether a layer, and all before it, are there."""
        first = set(range(layer + 1))
        return bool(self.pieces) and all(first <= there for there in self.pieces.values())


class Machine:
    """The messages of a server, the pieces of an agent, and the waits of a worker, by chance."""

    def __init__(self, random: Random) -> None:
        self.random, self.gets = random, LayeredGets(LAYERS, 0)
        self.model: dict[int, Known] = {}
        self.is_connected = False
        self.next_op = 0
        self.left: list[tuple[int, Layers]] = []
        """Pieces that are under way, with their gets."""

    def known(self, number: int) -> Known:
        """Return the expected state of a get."""
        return self.model.setdefault(number, Known())

    def connection(self) -> None:
        """Connect or disconnect; by then no piece is under way."""
        self.left.clear()
        self.is_connected = not self.is_connected
        if self.is_connected:
            self.gets.connected()
            return
        self.gets.disconnected()
        for get in self.model.values():
            get.ended = get.ended or 0

    def plan(self, number: int) -> None:
        """Plan a get that has not ended, perhaps again, in copies of some pieces each."""
        if not self.is_connected or (get := self.known(number)).ended is not None:
            return
        op_ids = range(self.next_op, self.next_op + self.random.randint(0, 3))
        self.next_op = op_ids.stop
        get.pieces = {op_id: set() for op_id in op_ids}
        self.gets.plan(GetPlanned(number, tuple(op_ids)))
        for op_id in op_ids:
            ends = sorted({LAYERS, *self.random.sample(range(1, LAYERS), 2)})
            for first, last in zip([0, *ends], ends, strict=False):
                self.left.append((number, Layers(first, last, op_id)))

    def piece(self) -> None:
        """End a piece, which may be of an earlier plan or of a get that is over."""
        if not self.left:
            return
        number, layers = self.left.pop(self.random.randrange(len(self.left)))
        get, watch = self.model[number], self.gets.watch_of(layers)
        is_followed = layers.whole in get.pieces and get.ended is None
        assert (watch is not None) == is_followed
        if watch is not None:
            watch.moved(layers.whole, layers.first, layers.last)
            get.pieces[layers.whole] |= set(range(layers.first, layers.last))

    def end(self, number: int) -> None:
        """End a get, known or not, perhaps again."""
        if self.is_connected:
            moved, get = self.random.randint(0, 9), self.known(number)
            self.gets.end(GetEnded(number, moved))
            get.ended = moved if get.ended is None else get.ended

    def look(self, number: int) -> None:
        """Check what a worker sees that asks without waiting."""
        if number in self.model or self.is_connected:
            get = self.known(number)
        else:
            get = Known()
            get.ended = 0
        for layer in range(LAYERS):
            if get.ended is None and not get.has(layer):
                with pytest.raises(TimeoutError):
                    self.gets.wait([number], layer, 0.0, None)
            else:
                assert self.gets.wait([number], layer, 0.0, None) == get.has(layer)
        if get.ended is None:
            with pytest.raises(TimeoutError):
                self.gets.wait_end(number, 0.0)
        else:
            assert self.gets.wait_end(number, 0.0) == get.ended

    def step(self) -> None:
        """Do something by chance."""
        number, choice = self.random.randrange(NUMBERS), self.random.random()
        if choice < 0.05:
            self.connection()
        elif choice < 0.2:
            self.plan(number)
        elif choice < 0.7:
            self.piece()
        elif choice < 0.75:
            self.end(number)
        else:
            self.look(number)


def test_a_worker_sees_what_the_agent_has_seen() -> None:
    """A layer is there once all copies of its get have it; no wait outlives the get."""
    for seed in range(RUNS):
        machine = Machine(Random(seed))
        try:
            for _ in range(150):
                machine.step()
            if machine.is_connected:
                machine.connection()
            assert machine.gets._of_op == {}
            assert all(get.over for get in machine.gets._gets.values())
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise


def test_only_so_many_ends_are_remembered() -> None:
    """The oldest ends are forgotten, so a server cannot make an agent keep more and more."""
    gets = LayeredGets(LAYERS, 0)
    gets.connected()
    for number in range(ENDED_MAX + 10):
        gets.plan(GetPlanned(number, (number,)))
        gets.end(GetEnded(number, 1))
        gets.end(GetEnded(number, 2))
    assert len(gets._gets) == len(gets._ended) == ENDED_MAX
    assert gets.wait_end(10, 0.0) == 1
    assert gets._of_op == {}
