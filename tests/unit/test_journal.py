"""The journal against a dict, whole or cut at any byte; superblocks; forests of blocks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv.common.errors import ConfigError, StorageError
from flexkv.index.forest import forest
from flexkv.io.ssd import file_calls, journal, superblock
from flexkv.io.ssd.file_calls import KERNEL, FileCalls
from flexkv.io.ssd.folders import open_folder
from flexkv.io.ssd.journal import RECORD_BYTES, Journal
from flexkv.io.ssd.open import open_journals, refuse
from flexkv.io.ssd.superblock import Superblock
from flexkv.testing.faults import FaultPlan
from flexkv.testing.lossy_files import LossyFiles

Model = dict[int, tuple[int, bytes]]
"""For each row, its checksum and block."""


def random_frames(seed: int, count: int = 30) -> list[tuple[bytes, Model]]:
    """Return random frames, each with the rows that are live after it."""
    random, live = Random(seed), Model()
    told = []
    for _ in range(count):
        rows = random.sample(range(40), random.randint(1, 6))
        kind = random.random()
        if kind < 0.65:
            sums = [random.getrandbits(64) for _ in rows]
            blocks = [random.randbytes(RECORD_BYTES) for _ in rows]
            for row in rows:
                live.pop(row, None)
            live |= {row: (s, b) for row, s, b in zip(rows, sums, blocks, strict=True)}
            content = np.frombuffer(b"".join(blocks), np.uint8)
            frame = journal.stored(np.array(rows), np.array(sums, np.uint64), content)
        elif kind < 0.95:
            for row in rows:
                live.pop(row, None)
            frame = journal.erased(np.array(rows))
        else:
            live = Model()
            frame = journal.cleared()
        told.append((frame, dict(live)))
    return told


def model_of(live: journal.Live) -> Model:
    """Return what a replay found as a dict."""
    return {
        row: (int(s), block.tobytes())
        for row, s, block in zip(live.rows.tolist(), live.sums, live.blocks, strict=True)
    }


@pytest.mark.parametrize("seed", range(20))
def test_replay_gives_the_last_word_on_every_row(seed: int) -> None:
    """Replay returns the last state of every row, after any stores, erasures and clears."""
    told = random_frames(seed)
    content = b"".join(frame for frame, _ in told)
    live, whole = journal.replay(content)
    assert model_of(live) == told[-1][1]
    assert list(model_of(live)) == list(told[-1][1]), "not in the order in which they were stored"
    assert whole == len(content)


def test_replay_ends_where_the_file_does() -> None:
    """A journal cut at any byte says what it said at its last whole frame."""
    told = random_frames(1, 6)
    content, ends = b"".join(frame for frame, _ in told), [0]
    for frame, _ in told:
        ends.append(ends[-1] + len(frame))
    for cut in range(len(content) + 1):
        live, whole = journal.replay(content[:cut])
        frames = max(n for n, end in enumerate(ends) if end <= cut)
        assert whole == ends[frames]
        assert model_of(live) == (told[frames - 1][1] if frames else {})


@pytest.mark.parametrize("seed", range(30))
def test_a_flipped_bit_hides_its_frame_and_what_follows(seed: int) -> None:
    """A flipped bit invalidates its frame and the later ones, and adds nothing."""
    random, told = Random(seed), random_frames(seed, 8)
    content = bytearray(b"".join(frame for frame, _ in told))
    at = random.randrange(len(content))
    content[at] ^= 1 << random.randrange(8)
    live, whole = journal.replay(bytes(content))
    assert whole <= at
    assert model_of(live) in [{}, *(model for _, model in told)]


def test_a_torn_tail_is_cut_and_written_over(tmp_path: Path) -> None:
    """Open cuts off a torn frame, and later frames follow the last whole one."""
    told = random_frames(3, 4)
    content = b"".join(frame for frame, _ in told)
    (tmp_path / journal.NAME).write_bytes(content[:-3])
    opened = Journal(tmp_path)
    assert model_of(opened.live) == told[2][1]
    opened.append(told[3][0])
    opened.sync()
    opened.close()
    again = Journal(tmp_path)
    assert model_of(again.live) == told[3][1]
    again.close()
    again.close()


def test_a_new_journal_takes_the_place_of_the_old(tmp_path: Path) -> None:
    """A new journal has what was appended while it was written; a half-written one is ignored."""
    told = random_frames(4, 9)
    opened = Journal(tmp_path)
    for frame, _ in told[:5]:
        opened.append(frame)
    opened.begin_new()
    kept = journal.replay((tmp_path / journal.NAME).read_bytes())[0]
    opened.append_new(journal.stored(*kept[:3]))
    opened.append(told[5][0])
    before = opened.bytes
    opened.take_new()
    assert opened.bytes != before
    for frame, _ in told[6:]:
        opened.append(frame)
    opened.begin_new()
    opened.append_new(journal.cleared())
    opened.close()
    again = Journal(tmp_path)
    assert model_of(again.live) == told[-1][1]
    again.close()


def test_a_journal_that_takes_no_more_keeps_what_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frame that could be written only in part is cut off again."""
    told = random_frames(5, 3)
    opened = Journal(tmp_path)
    opened.append(told[0][0])
    write = file_calls.os.write
    calls = []

    def failing(fd: int, data: bytes) -> int:
        calls.append(None)
        if len(calls) == 1:
            return write(fd, data[:5])
        raise OSError(28, "no space")

    monkeypatch.setattr(file_calls.os, "write", failing)
    with pytest.raises(StorageError, match="ENOSPC"):
        opened.append(told[1][0])
    monkeypatch.undo()
    opened.append(told[2][0])
    opened.close()
    again = Journal(tmp_path)
    assert len(list(journal.records((tmp_path / journal.NAME).read_bytes()))) == 2
    again.close()


def test_a_journal_that_cannot_be_opened_leaves_no_file_open() -> None:
    """When a call of open fails, the journal raises its error and leaves no file open."""
    for call in ("read", "size", "sync_folder"):
        files = LossyFiles(FaultPlan(0))

        def refused(*_: object) -> None:
            raise OSError(5, "no")

        vars(files)[call] = refused
        with pytest.raises(OSError, match="no"):
            Journal(Path("fake"), files)
        assert files.open_files == 0


@pytest.mark.parametrize("seed", range(300))
def test_a_loss_of_power_keeps_what_was_synced(seed: int) -> None:
    """After a loss of power, the journal says what it said at the last sync or later.

    This holds for a stop before any file system call, even while the journal is written anew.
    """
    random, told = Random(seed), random_frames(seed, 30)
    states, synced, calls = [{}, *(model for _, model in told)], 0, 0
    stop_at, left = random.randint(1, 100), None
    files = LossyFiles(FaultPlan(seed))

    def on_io() -> None:
        nonlocal calls, left
        calls += 1
        if calls == stop_at:
            left = (synced, files.remains(random, power_loss=True))

    one = Journal(Path("fake"), files)
    files.on_io = on_io
    for number, (frame, _) in enumerate(told, 1):
        one.append(frame)
        action = random.random()
        if action < 0.2:
            one.sync()
            synced = number
        elif action < 0.3 and not one.has_new:
            kept = journal.replay(files.read(one._fd))[0]
            one.begin_new()
            one.append_new(journal.stored(*kept[:3]))
        elif action < 0.4:
            one.take_new()
    one.close()
    assert files.open_files == 0
    must, contents = left or (synced, files.remains(random, power_loss=True))
    again = Journal(Path("fake"), LossyFiles(FaultPlan(seed), contents))
    assert model_of(again.live) in states[must:]
    again.close()


def call_at_random(calls: FileCalls, folder: Path, random: Random) -> Iterator[object]:
    """Make the calls that one seed determines; yield the results and all contents after each."""
    names, fds = [folder / "a", folder / "b"], [calls.open(folder / "a")]
    there = {names[0]}

    def rename() -> None:
        if names[0] in there:
            calls.rename(*names)
            there.symmetric_difference_update(names if names[1] not in there else names[:1])

    def remove() -> None:
        calls.remove(names[1])
        there.discard(names[1])

    def reopen() -> None:
        name = random.choice(names)
        fds.append(calls.open(name))
        there.add(name)

    def close() -> None:
        if len(fds) > 1:
            calls.close(fds.pop(random.randrange(len(fds))))

    actions = [
        lambda fd: calls.write(fd, memoryview(random.randbytes(random.randint(1, 50)))),
        lambda fd: calls.cut(fd, calls.size(fd) // 2),
        lambda fd: calls.sync(fd),
        lambda _: calls.sync_folder(folder),
        lambda _: rename(),
        lambda _: remove(),
        lambda _: reopen(),
        lambda _: close(),
    ]
    for _ in range(80):
        gave = random.choice(actions)(random.choice(fds))
        yield gave, [(calls.size(fd), calls.read(fd)) for fd in fds]
    for fd in fds:
        calls.close(fd)


@pytest.mark.parametrize("seed", range(20))
def test_lossy_files_are_like_the_kernel_s(tmp_path: Path, seed: int) -> None:
    """The same calls to lossy files and to the kernel return and leave the same."""
    real = call_at_random(KERNEL, tmp_path, Random(seed))
    fake = call_at_random(LossyFiles(FaultPlan(0)), tmp_path, Random(seed))
    assert list(real) == list(fake)


# -- superblocks ---------------------------------------------------------------------------------

WANTED = Superblock(1, {"dtype": "float16", "num_layers": 2}, 4096, None)


def opened(folder: Path, wanted: Superblock) -> journal.Live:
    """Return what a directory's journal says to an engine with this superblock."""
    with ExitStack() as undo:
        (one,) = open_journals([open_folder(folder, undo)], wanted, undo)
        if not len(one.live.rows):
            one.append(random_frames(1, 3)[0][0])
        return one.live


@pytest.mark.parametrize(
    "other",
    [
        Superblock(2, WANTED.block_identity, 4096, None),
        Superblock(1, {"dtype": "bfloat16", "num_layers": 2}, 4096, None),
        Superblock(1, {"dtype": "float16"}, 4096, None),
        Superblock(1, WANTED.block_identity, 8192, None),
        Superblock(1, WANTED.block_identity, 4096, 7),
        Superblock(1, WANTED.block_identity, 4096, None, (100, 50)),
    ],
)
def test_blocks_of_another_kind_are_not_believed_in(tmp_path: Path, other: Superblock) -> None:
    """A directory for another model, stride, file size or version is emptied, or refused."""
    opened(tmp_path, WANTED)
    assert len(opened(tmp_path, WANTED).rows)
    with pytest.raises(ConfigError, match="another kind") as caught:
        refuse([tmp_path], other)
    assert " was " in caught.value.why
    assert len(opened(tmp_path, WANTED).rows), "a refusal changes nothing"
    assert not len(opened(tmp_path, other).rows)
    with ExitStack() as undo:
        assert superblock.read(open_folder(tmp_path, undo)) == other


def test_a_directory_of_an_older_version_is_named(tmp_path: Path) -> None:
    """A superblock without the fields of later versions is read, and refused for its version."""
    old = (
        '{"version":2,"blocks_are":{"dtype":"float16"},"block_stride_bytes":4096,"rows_per_file":7}'
    )
    opened(tmp_path, WANTED)
    (tmp_path / superblock.NAME).write_text(old)
    with pytest.raises(ConfigError, match=r"version was 2, is now 3"):
        refuse([tmp_path], Superblock(superblock.FORMAT_VERSION, {"dtype": "float16"}, 4096, 7))
    with ExitStack() as undo:
        assert superblock.read(open_folder(tmp_path, undo)) == Superblock(
            2, {"dtype": "float16"}, 4096, 7, ()
        )


def test_a_journal_without_a_superblock_is_not_believed_in(tmp_path: Path) -> None:
    """A journal without a superblock is not used, since the kind of its blocks is unknown."""
    opened(tmp_path, WANTED)
    (tmp_path / superblock.NAME).write_bytes(b"[" * 100_000)
    with pytest.raises(ConfigError, match="superblock is missing"):
        refuse([tmp_path], WANTED)
    assert not len(opened(tmp_path, WANTED).rows)


def test_a_record_that_is_not_whole_ends_the_replay() -> None:
    """A record whose lists differ in length ends the replay, even in a whole frame."""
    good = random_frames(2, 1)[0][0]
    for record in (
        journal.Stored(b"1234", b"12345678", b"short"),
        journal.Stored(b"12345", b"", b""),
        journal.Erased(b"123"),
    ):
        live, whole = journal.replay(good + journal.frame(record) + good)
        assert (whole, model_of(live)) == (len(good), random_frames(2, 1)[0][1])


def test_what_is_too_long_for_a_frame_goes_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than fit one frame are written as several frames."""
    monkeypatch.setattr(journal, "FRAME_ROWS_MAX", 3)
    rows, blocks = np.arange(8), np.arange(8 * RECORD_BYTES, dtype=np.uint8)
    content = journal.stored(rows, rows.astype(np.uint64), blocks, 5)
    assert len(list(journal.records(content))) == 3
    live = journal.replay(content)[0]
    assert live.rows.tolist() == rows.tolist()
    assert live.sequences.tolist() == [5] * 8
    assert np.array_equal(live.blocks.ravel(), blocks)
    assert not len(journal.replay(content + journal.erased(rows))[0].rows)


def test_a_new_journal_that_takes_no_more_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new journal that cannot be written is given up, and the old one goes on."""
    told = random_frames(7, 6)
    one = Journal(tmp_path)
    one.append(told[0][0])
    one.begin_new()
    new_fd, write = one._new_fd, file_calls.os.write

    def full(fd: int, data: bytes) -> int:
        if fd == new_fd:
            raise OSError(28, "no space")
        return write(fd, data)

    monkeypatch.setattr(file_calls.os, "write", full)
    one.append(told[1][0])
    assert not one.has_new
    one.take_new()
    one.append(told[2][0])
    one.close()
    assert model_of(Journal(tmp_path).live) == told[2][1]


def test_a_journal_is_a_file_of_ours(tmp_path: Path) -> None:
    """A pipe or a link in the journal's place is refused."""
    place = tmp_path / journal.NAME
    os.mkfifo(place)
    with pytest.raises(ConfigError, match="regular"):
        Journal(tmp_path)
    place.unlink()
    place.symlink_to(tmp_path / "other")
    with pytest.raises(ConfigError, match="symbolic link"):
        Journal(tmp_path)


# -- forests -------------------------------------------------------------------------------------


def blocks_of(tree: list[tuple[int, int, bool]]) -> NDArray[np.uint8]:
    """Return (key, parent's key, whether it is a first block) as the index exports them."""
    content = b"".join(
        key.to_bytes(8, "little") * 2 + above.to_bytes(8, "little") * 2
        + bytes([first, 0, 0, 0])
        for key, above, first in tree
    )  # fmt: skip
    return np.frombuffer(content, np.uint8).reshape(-1, RECORD_BYTES)


@pytest.mark.parametrize("seed", range(40))
def test_a_forest_is_what_first_blocks_lead_to(seed: int) -> None:
    """A forest has the blocks reachable from first blocks; of a repeated key, the last one counts.

    Orphans and cycles are left out.
    """
    random = Random(seed)
    keys = range(1, random.randint(2, 60))
    tree = [
        (key, random.choice([0, key - 1, random.choice(keys), 99]), random.random() < 0.2)
        for key in random.sample(keys, len(keys))
    ]
    tree += random.choices(tree, k=random.randint(0, 5))
    last = {key: n for n, (key, _, _) in enumerate(tree)}
    reached: set[int] = set()
    for key, n in last.items():
        path, at = set(), key
        while at in last and at not in path and not tree[last[at]][2]:
            path.add(at)
            at = tree[last[at]][1]
        if at in last and tree[last[at]][2]:
            reached.add(n)
    found = forest(blocks_of(tree))
    assert set(found.order.tolist()) == reached
    for number, (at, parent) in enumerate(zip(found.order, found.parents, strict=True)):
        assert parent < number
        if tree[at][2]:
            assert parent == -1
        else:
            assert tree[found.order[parent]][0] == tree[at][1]
    assert len(forest(blocks_of([])).order) == 0
