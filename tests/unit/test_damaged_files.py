"""Laws of damaged superblocks and journals: any bytes are read or skipped, without errors."""

from __future__ import annotations

import struct
import zlib
from contextlib import ExitStack
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import pytest

from flexkv.common.terms import Tier
from flexkv.index.eviction import Eviction
from flexkv.index.forest import forest
from flexkv.index.residency import Residency
from flexkv.io.ssd import journal, superblock
from flexkv.io.ssd.file_calls import KernelCalls
from flexkv.io.ssd.folders import open_folder
from flexkv.io.ssd.journal import RECORD_BYTES, Journal
from flexkv.io.ssd.superblock import Superblock

WHOLE = Superblock(2, {"model_id": "müller/modell", "num_layers": 2}, 4096, 7)


def mutated(whole: bytes, random: Random) -> bytes:
    """Return bytes with a few random changes, cuts, insertions and repetitions."""
    data = bytearray(whole)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(data) + 1)
        match random.randrange(5):
            case 0 | 1 if at < len(data):
                data[at] = random.choice([0, 0x7F, 0x80, 0xC4, 0xDB, 0xFF, random.randrange(256)])
            case 2:
                del data[at : at + random.randint(1, 8)]
            case 3:
                data[at:at] = random.randbytes(random.randint(1, 8))
            case _:
                data[at:at] = data[: random.randint(0, 40)]
    return bytes(data)


def test_superblocks_of_earlier_releases_are_read(tmp_path: Path) -> None:
    """The names in the file stay what they were, whatever the code calls its fields."""
    text = (
        '{"version": 2, "blocks_are": {"model_id": "müller/modell", "num_layers": 2},'
        ' "block_stride_bytes": 4096, "rows_per_file": 7}'
    )
    with ExitStack() as undo:
        folder = open_folder(tmp_path, undo)
        (tmp_path / superblock.NAME).write_text(text, encoding="utf-8")
        (tmp_path / superblock.NAME).chmod(0o600)
        assert superblock.read(folder) == WHOLE


def test_any_superblock_is_read_or_passed_over(tmp_path: Path) -> None:
    """Random bytes, or a superblock with changed bytes, are read as a superblock or as none."""
    random = Random(1)
    whole = msgspec.json.format(msgspec.json.encode(WHOLE))
    with ExitStack() as undo:
        folder = open_folder(tmp_path, undo)
        superblock.write(folder, WHOLE)
        assert superblock.read(folder) == WHOLE
        for number in range(600):
            some = random.randbytes(random.randrange(200))
            (tmp_path / superblock.NAME).write_bytes(mutated(whole, random) if number % 4 else some)
            found = superblock.read(folder)
            if found is not None:
                assert found.block_stride_bytes >= 1
                assert superblock.differences(found, WHOLE) or found == WHOLE


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace(b"modell", b"\xff\xfe\xfd"),
        lambda text: text.replace(b"modell", b"\\ud800"),
        lambda text: text.replace(b"4096", b"0"),
        lambda text: text.replace(b"4096", b"-1"),
        lambda text: text.replace(b"4096", b"9" * 5000),
        lambda text: text.replace(b"7", b"0"),
        lambda text: b"[" * 100_000,
        lambda text: b" " * (2 << 20) + text,
        lambda text: b"",
    ],
)
def test_a_superblock_that_cannot_be_is_none(tmp_path: Path, damage: object) -> None:
    """Bad UTF-8, impossible sizes, endless nesting and excessive length mean no superblock."""
    assert callable(damage)
    text = msgspec.json.format(msgspec.json.encode(WHOLE))
    (tmp_path / superblock.NAME).write_bytes(damage(text))
    with ExitStack() as undo:
        assert superblock.read(open_folder(tmp_path, undo)) is None


def frames(random: Random) -> bytes:
    """Return a journal of a few random records."""
    content = b""
    for _ in range(random.randint(1, 6)):
        rows = np.array(random.sample(range(40), random.randint(1, 12)))
        blocks = np.frombuffer(random.randbytes(len(rows) * RECORD_BYTES), np.uint8)
        content += random.choice(
            [
                journal.stored(rows, rows.astype(np.uint64), blocks, random.randrange(1 << 40)),
                journal.erased(rows),
                journal.cleared(),
            ]
        )
    return content


def sealed(payload: bytes) -> bytes:
    """Return a frame with a valid checksum, so that only a decoder can reject its payload."""
    return struct.pack("<II", len(payload), zlib.crc32(payload)) + payload


PAYLOADS = [
    b"\x91\xa5\xff\xfe\xfd\xfc\xfb",
    b"\x95\x01\xa2\xff\xfe\xc4\x00\xc4\x00\x00",
    b"\x95\x01\xc4\x00\xc4\x00\xc4\x00\xcf" + b"\xff" * 8,
    b"\x95\x01\xc4\x00\xc4\x00\xc4\x00\xff",
    b"\x95\x01\xc6\xff\xff\xff\xff",
    b"\x91" * 100_000,
    b"",
]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_frame_that_cannot_be_decoded_ends_the_replay(tmp_path: Path, payload: bytes) -> None:
    """Replay keeps what precedes a frame that cannot be decoded, and cuts off the rest."""
    good = journal.stored(np.arange(3), np.arange(3, dtype=np.uint64), np.ones((3, 36), np.uint8))
    (tmp_path / journal.NAME).write_bytes(good + sealed(payload) + good)
    opened = Journal(tmp_path)
    assert opened.live.rows.tolist() == [0, 1, 2]
    assert opened.bytes == len(good)
    opened.close()


def restore(live: journal.Live) -> None:
    """Restore an index from what a journal says, as an engine does when it opens."""
    fits = live.rows < 16
    found = forest(live.blocks[fits])
    residency = Residency({Tier.HOST: 4, Tier.DISK: 16}, Eviction())
    blocks, rows = live.blocks[fits][found.order], live.rows[fits][found.order]
    residency.restore(Tier.DISK, blocks, found.parents, rows)
    residency.validate()


@pytest.mark.parametrize("seed", range(8))
def test_any_journal_is_replayed(tmp_path: Path, seed: int) -> None:
    """An engine opens with changed frames, frames of changed payloads, and random bytes."""
    random = Random(seed)
    with ExitStack() as undo:
        calls = KernelCalls(open_folder(tmp_path, undo))
        for number in range(60):
            content = frames(random)
            match number % 3:
                case 0:
                    content = mutated(content, random)
                case 1:
                    content += sealed(mutated(content[8:80], random)) + frames(random)
                case _:
                    content += random.randbytes(random.randrange(100)) + frames(random)
            (tmp_path / journal.NAME).write_bytes(content)
            opened = Journal(tmp_path, calls)
            assert opened.bytes <= len(content)
            assert opened.live.rows.dtype == opened.live.sequences.dtype == np.int64
            assert len(np.unique(opened.live.rows)) == len(opened.live.rows)
            restore(opened.live)
            opened.append(journal.erased(np.arange(4)))
            opened.close()
            again = Journal(tmp_path, calls)
            assert not (again.live.rows < 4).any()
            again.close()


class NotText:
    """A decoder that fails as some releases of msgspec do where text is not UTF-8."""

    def decode(self, data: object, /) -> None:
        """Raise UnicodeDecodeError, which is not an error of msgspec's own."""
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")


def test_what_a_release_of_the_decoder_raises_is_no_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder's error that is not msgspec's own also ends the replay, or means no superblock."""
    monkeypatch.setattr(journal, "_DECODER", NotText())
    monkeypatch.setattr(superblock, "_DECODER", NotText())
    assert journal.replay(frames(Random(1)))[1] == 0
    with ExitStack() as undo:
        folder = open_folder(tmp_path, undo)
        superblock.write(folder, WHOLE)
        assert superblock.read(folder) is None
