"""Native parts of FlexKV. The contract, with its diagrams, is `ext/README.md`."""

from collections.abc import Sequence
from typing import Any, Final, TypeAlias, final

from numpy.typing import NDArray
from typing_extensions import Buffer

Memory: TypeAlias = Buffer | NDArray[Any]
"""Anything with the buffer protocol; numpy arrays have it, their stubs tell so from 3.12 on."""

TO_HOST: Final[int]
TO_DEVICE: Final[int]

def features() -> dict[str, str | int]:
    """Give what this build and CPU offer: simd ("avx512", "avx2", "none"), liburing, xxhash."""

def disown(mapping: Memory) -> None:
    """Replace a whole memory mapping by private pages of zeros, in a forked child.

    Raises:
        OSError: the kernel refused.
    """

def hash128(data: Memory, seed: int = 0) -> bytes:
    """Give the canonical (big-endian) XXH3-128 digest of `data`: 16 bytes."""

def chain_keys(
    tokens: Memory | list[int], tokens_per_block: int, parent: bytes, secret: bytes
) -> bytes:
    """Return `parent`, then the chained key of each whole block of `tokens`: 16 bytes each.

    key[i] = XXH3-128(key[i-1] || tokens of block i), key[-1] = `parent`. Tokens are little-endian,
    four bytes each.

    Args:
        tokens: int64[n], or a list of integers; each of 0 to 2**32 - 1.
        tokens_per_block: at least 1.
        parent: 16 bytes.
        secret: at least 136 bytes, which take the place of XXH3's public constants
            (`XXH3_128bits_withSecret`); as good as random.

    Raises:
        ValueError: a token is out of range, with (its index, the token).
        TypeError: `tokens` are not 8-byte integers, or a list of integers.
    """

def pack_int64(values: list[int]) -> bytes:
    """Return a list of integers as int64[n].

    Raises:
        ValueError: an integer needs more than 64 bits, with (its index, the integer).
        TypeError: `values` is not a list of integers.
    """

def change_counts(counts: Memory, ids: Memory, by: int) -> int:
    """Add `by` to counts, and return how many of them left zero or reached it.

    Args:
        counts: uint32[n], writable.
        ids: int64[k], each from 0 to n - 1; one that occurs twice is changed twice.
        by: -1, 0 or 1.

    Raises:
        ValueError: an id is out of range; nothing is changed.
    """

def any_counted(counts: Memory, ids: Memory) -> bool:
    """Return whether any of some counts is not zero; arguments and errors as `change_counts`."""

def block_slots(slots: Memory, tokens_per_block: int, num_blocks: int) -> bytes:
    """Give the device block id (int64) of every whole block of `slots` (int64[n]).

    Raises:
        ValueError: args (index, slot, why); why is "range", "alignment" or "contiguity".
    """

def prefault(buffer: Memory) -> None:
    """Touch every page of a writable buffer, with the GIL released, keeping its content."""

@final
class PageMap:
    """Where the pieces of a device block are, and where they go in a host block."""

    def __init__(
        self,
        pieces: Memory,
        device_blocks: int,
        host: Memory,
        host_stride: int,
        owner: object,
        sums: Memory | None = None,
    ) -> None:
        """Describe one device's pages.

        Args:
            pieces: int64[n, 4], a row a piece: address of block 0, stride in bytes between
                blocks, bytes of the piece, offset of the piece inside the host block.
            device_blocks: number of device blocks; ids are checked against it.
            host: the writable host arena, held until the map is gone.
            host_stride: bytes between host blocks; ids are checked against its length.
            owner: whatever keeps the device memory alive, held until the map is gone.
            sums: writable uint64[host blocks], held until the map is gone: of each host block that
                a copy fills or `CopyPool.checksum` looks at. The sum is over all `host_stride`
                bytes: the XXH3-64 of each 512 KiB of them, seeded with their place, added up.

        Raises:
            ValueError: a row, a size or an address that cannot be; pieces that leave gaps in the
                host block although sums are kept.
        """

    @property
    def block_bytes(self) -> int: ...
    @property
    def piece_count(self) -> int: ...

@final
class CopyPool:
    """Standing threads that copy between device pages and host blocks, urgent jobs first."""

    def __init__(self, threads: int) -> None: ...
    def fileno(self) -> int:
        """Give an eventfd, non-blocking, readable while `reap` has something."""

    def submit(
        self,
        op_id: int,
        pages: PageMap,
        direction: int,
        device_ids: Memory,
        host_ids: Memory,
        urgent: bool,
    ) -> None:
        """Queue one job; the id buffers (int64[n]) are copied.

        Raises:
            ValueError: an id out of range, lengths that differ.
            RuntimeError: the pool is closed.
        """

    def checksum(self, op_id: int, pages: PageMap, host_ids: Memory, urgent: bool) -> None:
        """Queue the summing of host blocks, each once, into the sums that `pages` keeps.

        Raises:
            ValueError: an id out of range, or `pages` keeps no sums.
            RuntimeError: the pool is closed.
        """

    def reap(self) -> list[int]:
        """Give the tokens of the jobs that ended since the last call, and clear the eventfd."""

    def copy(self, target: Memory, source: Memory) -> None:
        """Copy bytes with all threads and non-temporal stores; waits with the GIL released."""

    @property
    def in_flight(self) -> int:
        """Give the number of jobs submitted and not reaped."""

    def close(self) -> None:
        """Finish what is queued, join the threads, close the eventfd. Idempotent.

        What ended can still be reaped.
        """

def copy_now(pages: PageMap, direction: int, device_ids: Memory, host_ids: Memory) -> None:
    """Do one job in the calling thread; the GIL is released when it is more than 64 KiB."""

def list_runs(
    pages: PageMap, direction: int, device_ids: Memory, host_ids: Memory, out: Memory
) -> int:
    """List the runs of bytes of a job for a copy engine; neighbours on both ends are one run.

    Args:
        pages: what the ids are of. Its memory is not touched.
        direction: TO_HOST or TO_DEVICE.
        device_ids: int64[n].
        host_ids: int64[n].
        out: writable uint64[3, m], m at least n times `pages.piece_count`: gets the addresses of
            targets and sources, and the bytes of each.

    Returns:
        How many runs there are.

    Raises:
        ValueError: an id out of range, lengths that differ, `out` too small.
    """

def notify_address() -> int:
    """Give the address of `void notify(void *eventfd)`, which any thread may call without the GIL.

    It adds 1 to the eventfd whose descriptor, not whose address, it gets.
    """

@final
class Ring:
    """An io_uring whose completions are announced on an eventfd."""

    def __init__(self, entries: int, flags: int = 0, in_background: bool = False) -> None:
        """Make a ring; `in_background` hands all I/O to kernel threads, which costs some speed.

        Raises OSError when the kernel refuses, or for flags that the ring cannot work with.

        EOPNOTSUPP: the kernel does not know all operations that a ring does.
        """

    def fileno(self) -> int:
        """Give the eventfd, non-blocking, readable while `reap` has something."""

    def lend(self, buffers: Sequence[Memory], register: bool) -> None:
        """Name the memory that I/O may touch, held until close; `register` it with the kernel.

        At most 1 GiB each when registered. May be called once.

        Raises:
            OSError: the kernel refused to register (the buffers are not lent then).
        """

    def register_files(self, fds: Sequence[int], /) -> None:
        """Register files; extents name them by their index. May be called once."""

    def submit(self, op_id: int, write: bool, extents: Memory) -> int:
        """Queue I/O, and give how many of the extents were taken (a prefix).

        Extent i completes under token + i. Short reads and writes, EINTR and EAGAIN are continued
        inside the ring.

        Args:
            token: name of the first extent, >= 0.
            write: direction.
            extents: int64[n, 4], a row an extent: file index, file offset, address, bytes.

        Raises:
            ValueError: memory that was not lent, a file that is not registered, a length < 1.
            OSError: io_uring_enter failed.
        """

    def nop(self, op_id: int, count: int) -> int:
        """Queue `count` empty operations under token, token + 1, …; gives how many were taken."""

    def reap(self) -> list[tuple[int, int]]:
        """Give (token, bytes moved or -errno) of all that ended, and clear the eventfd.

        Fewer bytes than asked for means that the file ended.
        """

    @property
    def in_flight(self) -> int:
        """Give the number of extents taken and not reaped."""

    @property
    def capacity(self) -> int:
        """Give the most extents that can be in flight."""

    def close(self) -> None:
        """Wait for what is in flight, then release the ring, its buffers and the eventfd.

        What ended can still be reaped. Idempotent.

        Raises:
            OSError: the kernel does not let this thread wait; the ring stays open.
        """

@final
class BlockIndex:
    """Which blocks are where, in every tier. Tiers go by number, nearest first.

    `keys` are those of one request: the root of its namespace, then a key for each block, 16 bytes
    each. `ids` are places in a tier, int64[n]; arrays come back as bytes of int64.

    Every call may raise `broken_error`: a law is broken, by the caller's mistake.
    """

    def __init__(
        self, tiers: tuple[tuple[int, int, int, int], ...], broken_error: type[Exception]
    ) -> None:
        """Take tiers as (capacity in blocks, policy, its parameter, blocks an eviction takes)."""

    def survey(
        self, keys: bytes, begin: int, end: int, nearest: bool, use: int
    ) -> list[tuple[int, int, int, bytes | None, tuple[bytes | None, ...]]]:
        """Tell where the blocks from `begin` to `end` are, alike ones together.

        Gives (pattern, first position, count, positions or None when unbroken, ids by tier). The
        pattern has a base-3 digit for each tier, the nearest first: 0 nowhere, 1 being filled, 2
        ready.

        Args:
            keys: of the request.
            begin: first position.
            end: last position, exclusive.
            nearest: tell only the nearest tier that has a block ready, or is the first and fills
                it; stop before the first block for which there is none.
            use: 1: count a use of each block found from the root on, in every tier; 2: the same,
                of blocks that are stored after they were asked for; 0: count none.
        """

    def reserve(
        self,
        tier: int,
        keys: bytes,
        begin: int,
        end: int,
        positions: Memory | None,
        how: int,
    ) -> bytes:
        """Take places for the blocks from `begin` to `end`, or for those at `positions` of them.

        Gives their ids. `how` says of how many when there is too little room: 0 the first ones,
        1 all or none, 2 the first ones that are worth an eviction.
        """

    def agreeing(self, keys: bytes, /) -> int:
        """Return how many of the first blocks could follow each other as `keys` says.

        A block that is named twice, or known under another parent, ends them. Keys that were
        derived from tokens always agree; keys from another process are checked before `reserve`
        gets them.
        """

    def reserve_copies(
        self, source: int, target: int, ids: Memory, keys: Memory, how: int
    ) -> tuple[bytes, bytes]:
        """Take places in `target` for blocks that are READY in `source`.

        Args:
            source: the tier that has them.
            target: the tier that lacks them.
            ids: int64[n], their places in `source`.
            keys: 16 bytes each: the places may hold other blocks by now.
            how: as for `reserve`; blocks of one namespace that follow each other are one batch.

        Returns:
            For each block, as uint8[n]: 0 it has a place now, RESERVED; 1 `source` lost it; 2
            `target` has it, or it is on its way there; 3 there is no room, or it is not worth an
            eviction. Then the places of the blocks with outcome 0, in order: int64.
        """

    def lacking(self, source: int, target: int, begin: int, end: int, /) -> bytes:
        """Return the places of `source` in a range whose READY blocks `target` lacks."""

    def lease(self, tier: int, ids: Memory, op_id: int) -> None:
        """Name who fills RESERVED places."""

    def fillers(self, tier: int, ids: Memory) -> bytes:
        """Give who fills RESERVED places: int64[n]."""

    def pin(self, tier: int, ids: Memory) -> None:
        """Forbid eviction, until as many `unpin`."""

    def unpin(self, tier: int, ids: Memory) -> None:
        """Take one pin off each."""

    def commit(self, tier: int, ids: Memory) -> None:
        """RESERVED becomes READY, or goes when it was forgotten."""

    def abort(self, tier: int, ids: Memory) -> None:
        """RESERVED goes; what continues a last copy goes along."""

    def forget(self, tier: int, ids: Memory) -> None:
        """Make blocks unfindable; what continues a last copy goes along."""

    def keys_of(self, tier: int, ids: Memory) -> bytes:
        """Give the keys of places that hold, or receive, a block."""

    def clear(self, tier: int, /) -> int:
        """Forget all blocks of a tier, and count the places that were dropped in any tier."""

    def clear_root(self, root: bytes, /) -> int:
        """Forget all blocks of a namespace, and count the places."""

    def root_blocks(self, root: bytes, /) -> tuple[int, ...]:
        """Count the blocks of a namespace by tier."""

    def root_ids(self, tier: int, root: bytes, /) -> bytes:
        """Give the READY places of a namespace in a tier, parents before children: int64[n]."""

    def set_quota(self, tier: int, root: bytes, blocks: int, /) -> None:
        """Bound how many places of a tier a namespace may have, and evict what it has beyond.

        Raises:
            ValueError: too many namespaces have quotas.
        """

    def export(self, tier: int, ids: Memory, /) -> bytes:
        """Tell what places hold: 36 bytes each, zeros for those that are not READY.

        The block's key and its parent's (16 bytes each; the root's for the first of a prompt), and
        whether it is the first (uint32).
        """

    def restore(self, tier: int, records: Memory, parents: Memory, ids: Memory, /) -> None:
        """Fill a tier that was never used with blocks that are READY.

        Args:
            tier: by number.
            records: as `export` gives them, parents before children.
            parents: int64[n], which of the blocks is the parent; -1 for the first of a prompt.
            ids: int64[n], their places, each once.
        """

    def watch(self, limit: int, /) -> None:
        """Remember up to `limit` changes from now on, or none with 0; earlier ones are gone."""

    def changes(self) -> bytes | None:
        """Take the changes since the last call, 24 bytes each; None: too many, they are lost.

        A block's key (16 bytes), its tier, and whether it became READY or is so no more (uint32).
        """

    def evict(self, tier: int, count: int, /) -> int:
        """Evict up to `count` blocks, and count them."""

    def resize(self, tier: int, count: int, /) -> int:
        """Change how many places a tier may use, up to those it has; gives how many it is now."""

    def counts(self, tier: int, /) -> tuple[int, int, int, int, int, int, int]:
        """Count places: capacity, free, reserved, ready, draining, pinned, evicted so far."""

    def tick(self, now_s: int, /) -> None:
        """Tell the time, in seconds; it never goes back."""

    def validate(self) -> None:
        """Check every law."""
