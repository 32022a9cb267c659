"""Native parts of FlexKV. The contract, with its diagrams, is `ext/README.md`."""

from collections.abc import Sequence
from typing import Any, Final, TypeAlias, final

from numpy.typing import NDArray
from typing_extensions import Buffer

Memory: TypeAlias = Buffer | NDArray[Any]
"""Anything with the buffer protocol; numpy's stubs declare it only for Python 3.12 and later."""

Alike: TypeAlias = tuple[int, int, int, bytes | None, tuple[bytes | None, ...]]
"""Blocks of one KV group that have the same states in the same tiers.

(pattern, first position, count, positions or None if unbroken, ids by tier). The pattern has a
base-3 digit for each tier, the lowest for the nearest: 0 nowhere, 1 being filled, 2 ready.
"""

TO_HOST: Final[int]
TO_DEVICE: Final[int]

def features() -> dict[str, str | int]:
    """Return what this build and CPU offer: simd ("avx512", "avx2", "none"), liburing, xxhash."""

def disown(mapping: Memory) -> None:
    """Replace a whole memory mapping with private pages of zeros, in a forked child.

    Raises:
        OSError: the kernel refused.
    """

def hash128(data: Memory, seed: int = 0) -> bytes:
    """Return the canonical (big-endian) XXH3-128 digest of `data`: 16 bytes."""

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
        secret: at least 136 bytes, which must look random: they replace XXH3's public constants
            (`XXH3_128bits_withSecret`).

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
    """Return whether any of the counts at `ids` is not zero; see `change_counts` for the rest."""

def needed(kind: int, window: int, block_tokens: int, end_tokens: int) -> tuple[int, int]:
    """Return which of a KV group's own blocks a prefix needs: the first, and the last, exclusive.

    Args:
        kind: 0 full attention, every block; 1 sliding window, the blocks of the last `window`
            tokens, counting the one that comes next; 2 chunked attention, the blocks of the chunk
            that the next token is in; 3 state, the last block.
        window: tokens of the window or of a chunk, at least 1; 0 for the other kinds.
        block_tokens: tokens of one of the group's blocks, at least 1.
        end_tokens: length of the prefix, a multiple of `block_tokens`.

    Raises:
        ValueError: an argument breaks its rule; the message has its name and value.
    """

def block_slots(slots: Memory, tokens_per_block: int, num_blocks: int) -> bytes:
    """Return the device block id (int64) of every whole block of `slots` (int64[n]).

    Raises:
        ValueError: args (index, slot, why); why is "range", "alignment" or "contiguity".
    """

def prefault(buffer: Memory) -> None:
    """Touch every page of a writable buffer without changing it, with the GIL released."""

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
        shared: bool = False,
    ) -> None:
        """Describe one device's pages.

        Args:
            pieces: int64[n, 4], one row per piece: address of block 0, stride in bytes between
                blocks, bytes of the piece, offset of the piece inside the host block.
            device_blocks: number of device blocks; ids are checked against it.
            host: the writable host arena, held until the map is gone.
            host_stride: bytes between host blocks; ids are checked against its length.
            owner: whatever keeps the device memory alive, held until the map is gone.
            sums: writable uint64[host blocks], held until the map is gone: receives the sum of each
                host block that a copy fills or `CopyPool.checksum` reads. A sum covers the bytes of
                the pieces: it adds up the XXH3-64 of each 512 KiB, seeded with the offset.
            shared: whether other processes may write to the device's memory meanwhile. A sum is
                that of the bytes in the host block even then; copies take up to a third longer.

        Raises:
            ValueError: a row, a size or an address is impossible, or the pieces leave gaps in the
                host block although sums are kept.
        """

    @property
    def block_bytes(self) -> int: ...
    @property
    def piece_count(self) -> int: ...

@final
class CopyPool:
    """Threads that copy between device pages and host blocks, urgent jobs first."""

    def __init__(self, threads: int) -> None: ...
    def fileno(self) -> int:
        """Return a non-blocking eventfd, which is readable while `reap` has something."""

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
            ValueError: an id is out of range, or the lengths differ.
            RuntimeError: the pool is closed.
        """

    def checksum(self, op_id: int, pages: PageMap, host_ids: Memory, urgent: bool) -> None:
        """Queue the checksumming of host blocks, each named once, into the sums of `pages`.

        Raises:
            ValueError: an id is out of range, or `pages` keeps no sums.
            RuntimeError: the pool is closed.
        """

    def reap(self) -> list[int]:
        """Return the op ids of the jobs that ended since the last call, and clear the eventfd."""

    def copy(self, target: Memory, source: Memory) -> None:
        """Copy bytes with all threads and non-temporal stores, and wait with the GIL released."""

    @property
    def in_flight(self) -> int:
        """Return the number of jobs that are submitted and not reaped."""

    def close(self) -> None:
        """Finish the queued jobs, join the threads, close the eventfd. Idempotent.

        Jobs that ended can still be reaped.
        """

def copy_now(pages: PageMap, direction: int, device_ids: Memory, host_ids: Memory) -> None:
    """Run one job in the calling thread; for more than 64 KiB the GIL is released."""

def list_runs(
    pages: PageMap, direction: int, device_ids: Memory, host_ids: Memory, out: Memory
) -> int:
    """List the byte runs of a job for a copy engine; pieces adjacent on both ends are one run.

    Args:
        pages: the pages that the ids belong to. Their memory is not touched.
        direction: TO_HOST or TO_DEVICE.
        device_ids: int64[n].
        host_ids: int64[n].
        out: writable uint64[3, m], m at least n times `pages.piece_count`: receives the addresses
            of targets and sources, and the bytes of each run.

    Returns:
        The number of runs.

    Raises:
        ValueError: an id is out of range, the lengths differ, or `out` is too small.
    """

def notify_address() -> int:
    """Return the address of `void notify(void *eventfd)`, for threads without the GIL.

    It adds 1 to the eventfd. The pointer that it takes is the descriptor itself, not its address.
    """

@final
class Ring:
    """An io_uring whose completions are announced on an eventfd."""

    def __init__(self, entries: int, flags: int = 0, in_background: bool = False) -> None:
        """Make a ring; `in_background` hands all I/O to kernel threads, which costs some speed.

        Raises:
            OSError: the kernel refuses, or the ring cannot work with the flags. EOPNOTSUPP: the
                kernel lacks an operation that a ring needs.
        """

    def fileno(self) -> int:
        """Return the non-blocking eventfd, which is readable while `reap` has something."""

    def lend(self, buffers: Sequence[Memory], register: bool) -> None:
        """Name the memory that I/O may touch, held until close; `register` it with the kernel.

        Registered buffers have at most 1 GiB each. May be called once.

        Raises:
            OSError: the kernel refused to register (the buffers are not lent then).
        """

    def register_files(self, fds: Sequence[int], /) -> None:
        """Register files; extents name them by their index. May be called once."""

    def submit(self, op_id: int, write: bool, extents: Memory) -> int:
        """Queue I/O, and return how many of the extents were accepted (a prefix).

        Extent i completes under `op_id` + i. The ring itself continues short reads and writes, and
        repeats what ends with EINTR or EAGAIN.

        Args:
            op_id: id of the first extent, >= 0.
            write: whether to write; else read.
            extents: int64[n, 4], one row per extent: file index, file offset, address, bytes.

        Raises:
            ValueError: memory is not lent, a file is not registered, or a length is < 1.
            OSError: io_uring_enter failed.
        """

    def reserve_sockets(self, count: int) -> None:
        """Make room for sockets, instead of files: they come and go while the ring lives.

        Raises:
            OSError: the kernel refused. EOPNOTSUPP: it lacks an operation that sockets need.
        """

    def set_socket(self, socket: int, fd: int) -> None:
        """Put a stream socket in place number `socket`, or remove the one there with an fd of -1.

        The ring keeps a socket open until it is removed.

        Raises:
            OSError: EBUSY: something of the socket there is in flight.
        """

    def stream(self, op_id: int, write: bool, socket: int, extents: Memory) -> bool:
        """Queue one move from or to a socket, and return whether the ring had room for it.

        It ends under `op_id` when all bytes were moved, or the stream ended, or failed. Then its
        result is the bytes moved so far, or -errno.

        Args:
            op_id: at least 0.
            write: whether to send; else receive.
            socket: its place.
            extents: int64[n, 2]: address and bytes of up to 1,024 ranges, filled in order.

        Raises:
            ValueError: memory is not lent, or a length is < 1.
            OSError: EBUSY: the socket already has a move in this direction. Else: the kernel
                refused.
        """

    def nop(self, op_id: int, count: int) -> int:
        """Queue `count` empty operations under `op_id` and up; return how many were accepted."""

    def reap(self) -> list[tuple[int, int]]:
        """Return (op id, bytes moved or -errno) of all that ended, and clear the eventfd.

        Fewer bytes than asked for means that the file or stream ended.
        """

    @property
    def in_flight(self) -> int:
        """Return the number of extents that are accepted and not reaped."""

    @property
    def capacity(self) -> int:
        """Return the most extents that can be in flight."""

    def close(self) -> None:
        """Wait for the I/O in flight, then release the ring, its buffers and the eventfd.

        Extents that ended can still be reaped. Idempotent.

        Raises:
            OSError: the kernel does not let this thread wait; the ring stays open.
        """

@final
class BlockIndex:
    """Which blocks are where, in every tier. Tiers are named by number, nearest first.

    `keys` are those of one request: the root of its namespace, then a key for each block, 16 bytes
    each. `ids` are places in a tier, int64[n]. Arrays are returned as bytes of int64.

    KV group 0 is the prefix chain. A block of another group is a leaf: calls name it by the
    position and the key of its parent, the chain's block that ends where it ends.

    Every call may raise `broken_error`: the caller broke a law of the index.
    """

    def __init__(
        self,
        tiers: tuple[tuple[int, int, int, int], ...],
        broken_error: type[Exception],
        rules: tuple[tuple[int, ...], ...] = (),
    ) -> None:
        """Build an index.

        Args:
            tiers: (blocks, policy, its parameter, blocks per eviction) of each.
            broken_error: the exception for a broken law.
            rules: (group, kind, window, ratio, block_tokens) of each KV group but the chain's, in
                the order of their numbers; see `needed`. A block of the group covers `ratio` blocks
                of the chain, and has the position of the last of them.

        Raises:
            ValueError: a rule is impossible, or contradicts those before it.
        """

    def survey(
        self, keys: bytes, begin: int, end: int, nearest: bool, use: int, group: int = 0
    ) -> list[Alike]:
        """Return where the blocks from `begin` to `end` are.

        Args:
            keys: the keys of the request.
            begin, end: the first position, and the last, exclusive.
            nearest: report a block only in its nearest tier that has it ready, or in the first tier
                while that is being filled; stop before the first block that has no such tier.
            use: 1: count a use of each block found from the root on, in every tier; 2: the same,
                for blocks that are stored after they were asked for; 0: count none.
            group: 0 for the chain. For a group of leaves, the positions in the range at which it
                may have a leaf are reported, up to the first where the chain has no block;
                `nearest` is ignored, and only uses of the reported leaves are counted.
        """

    def reach(
        self,
        keys: bytes,
        begin: int,
        end: int,
        drop: int,
        use: bool,
        unusable: int = 0,
        device: Memory | None = None,
        shunned: Memory | None = None,
    ) -> tuple[int, int, list[Alike], list[tuple[int, list[Alike]]]]:
        """Return the longest prefix up to `end` that every KV group can load.

        Blocks are reported in their nearest tier, as by `survey`, and no leaves before `begin`.

        Args:
            keys: the keys of the request.
            begin, end: the first position, and the last, exclusive.
            drop: how many more blocks of the chain must be there to load, behind the prefix.
            use: whether to count a use of the blocks of the chain from the root on, and of the
                leaves that the prefix needs.
            unusable: a bit for each tier not to load from; what the first has only it can load.
            device: bool[groups - 1, n], for each group but the chain's whether there is a device
                block for its leaf at each position, and for none from position n on: a leaf
                without one cannot be loaded. None: device blocks do not matter.
            shunned: int64[n], ops whose blocks must not be waited for. Blocks that other ops bring
                to the first tier count as if they were ready. None: only ready blocks count.

        Returns:
            Where the prefix ends, at least `begin`; where the chain of ready blocks ends; the
            blocks of the chain; and for each group that needs any, its number and its leaves.
        """

    def group_blocks(self, tier: int, /) -> tuple[int, ...]:
        """Return the number of READY places of a tier, by KV group."""

    def reserve(
        self,
        tier: int,
        keys: bytes,
        begin: int,
        end: int,
        positions: Memory | None,
        how: int,
        group: int = 0,
    ) -> bytes:
        """Reserve places for the blocks from `begin` to `end`, or only for those at `positions`.

        Return the places. If there is too little room, `how` decides: 0 the first blocks get one, 1
        all or none do, 2 the first ones that are worth an eviction do.
        """

    def make_room(self, tier: int, keys: bytes, count: int) -> bool:
        """Evict until a namespace can get `count` places; or evict nothing and return False."""

    def agreeing(self, keys: bytes, /) -> int:
        """Return how many blocks, from the first on, `keys` chains without a contradiction.

        A contradiction is a block that is named twice, or known under another parent. Only keys
        from another process can have one: check them before you pass them to `reserve`.
        """

    def reserve_copies(
        self, source: int, target: int, ids: Memory, keys: Memory, how: int
    ) -> tuple[bytes, bytes]:
        """Reserve places in `target` for blocks that are READY in `source`.

        Args:
            source: the tier that has them.
            target: the tier that lacks them.
            ids: int64[n], their places in `source`.
            keys: 16 bytes each: the places may hold other blocks by now.
            how: as for `reserve`; blocks of one namespace that follow each other are one batch.

        Returns:
            The outcome for each block, uint8[n]: 0 it has a RESERVED place now; 1 `source` lost it;
            2 `target` has it, or is getting it; 3 there is no room, or it is not worth an eviction.
            Then the places of the blocks with outcome 0, in order: int64.
        """

    def lacking(
        self, source: int, target: int, begin: int, end: int, unwritten: bool, /
    ) -> bytes:
        """Return the places of `source` in a range whose READY blocks `target` lacks.

        With `unwritten`, blocks for which it has only a RESERVED place count as lacking.
        """

    def lease(self, tier: int, ids: Memory, op_id: int) -> None:
        """Record the op that fills these RESERVED places."""

    def fillers(self, tier: int, ids: Memory) -> bytes:
        """Return the id of the op that fills each of these RESERVED places: int64[n]."""

    def pin(self, tier: int, ids: Memory) -> None:
        """Forbid the eviction of each place until a matching `unpin`."""

    def unpin(self, tier: int, ids: Memory) -> None:
        """Remove one pin from each place."""

    def commit(self, tier: int, ids: Memory) -> None:
        """Make RESERVED places READY; free those whose block was forgotten."""

    def abort(self, tier: int, ids: Memory) -> None:
        """Free RESERVED places; for a last copy, drop the blocks that continue it, too."""

    def forget(self, tier: int, ids: Memory) -> None:
        """Make blocks unfindable; for a last copy, drop the blocks that continue it, too."""

    def spend(self, tier: int, ids: Memory, keys: Memory) -> int:
        """Make places the next to be evicted if they hold the blocks with these keys, READY.

        They are so until they are asked for. Return how many there are.
        """

    def keys_of(self, tier: int, ids: Memory) -> bytes:
        """Return the keys of places that hold or receive a block."""

    def clear(self, tier: int, /) -> int:
        """Forget all blocks of a tier; return how many places in all tiers lost a block."""

    def clear_root(self, root: bytes, /) -> int:
        """Forget all blocks of a namespace; return how many places in all tiers lost a block."""

    def root_blocks(self, root: bytes, /) -> tuple[int, ...]:
        """Return the number of blocks of a namespace, by tier."""

    def root_ids(self, tier: int, root: bytes, /) -> bytes:
        """Return the READY places of a namespace in a tier, parents before children: int64[n]."""

    def set_quota(self, tier: int, root: bytes, blocks: int, /) -> None:
        """Limit how many places of a tier a namespace may have, and evict blocks beyond the limit.

        Raises:
            ValueError: too many namespaces have quotas.
        """

    def export(self, tier: int, ids: Memory, /) -> bytes:
        """Return what places hold: 36 bytes each, zeros for those that are not READY.

        These are the block's key and its parent's (16 bytes each; the root's key for the first of a
        prompt), and a uint32: bit 0 is set for the first of a prompt, bits 8 and up are the group.
        """

    def spans(self, tier: int, ids: Memory, size: int, /) -> tuple[bytes, bytes]:
        """Return the spans of `size` blocks (1 to 256) whose blocks are all READY in a tier.

        A span ends where the depth in the prompt is a multiple of `size`. Those are returned that
        end with a block at one of these places, or whose other blocks before the end are there.
        Places that hold no READY block of the chain are passed over.

        Returns:
            int64[m, size], the places of the blocks of each span; and their keys, 16 bytes each:
            for each span that of the block before it (or the root), and then those of its blocks.
        """

    def restore(self, tier: int, records: Memory, parents: Memory, ids: Memory, /) -> None:
        """Fill a tier that was never used with blocks that are READY.

        Args:
            tier: number of the tier.
            records: as `export` returns them, parents before children.
            parents: int64[n], the index of each block's parent; -1 for the first of a prompt.
            ids: int64[n], their places, each once.
        """

    def watch(self, limit: int, /) -> None:
        """Record up to `limit` changes from now on, or none with 0; earlier ones are dropped."""

    def changes(self) -> bytes | None:
        """Return the changes since the last call, 24 bytes each; None if too many, and so lost.

        A change is a block's key (16 bytes); in a byte each its tier, whether it is READY there
        now, its KV group, and a bit for each tier that has it READY after the change; and a uint32,
        its depth: how many blocks of the chain it ends. A leaf has the depth of its parent.
        """

    def ends(self, begin: int, count: int, size: int, /) -> bytes | None:
        """Return the ends of spans of `size` blocks that are READY in some tier, and such leaves.

        Nodes are numbered from 0, and each keeps its number for as long as its block is in the
        index. This looks at up to 2**20 of them, from `begin` to `begin + count`.

        Returns:
            A record for each, as in `changes`, as if it had just become READY in its nearest tier;
            None if no node has a number from `begin` on.
        """

    def evict(self, tier: int, count: int, /) -> int:
        """Evict up to `count` blocks, and return how many."""

    def resize(self, tier: int, count: int, /) -> int:
        """Change how many places a tier may use, up to its first capacity; return the result."""

    def counts(self, tier: int, /) -> tuple[int, int, int, int, int, int, int]:
        """Return counts: capacity, free, reserved, ready, draining, pinned, evicted so far."""

    def tick(self, now_s: int, /) -> None:
        """Set the time, in seconds; it must never go back."""

    def validate(self) -> None:
        """Check every law of the index."""

@final
class Hints:
    """Which spans others are said to hold: pairs of a span and a holder.

    Holders are numbers below 4096. Holder 0 is the remote store, the others are nodes. `keys` of
    spans have 16 bytes each, or `size` of 8: only the first 8 bytes of a key are read. `len` counts
    the pairs that are not dead.
    """

    def __init__(self, pairs_max: int, span_blocks: int) -> None:
        """Open an empty table with room for `pairs_max` pairs, of spans of `span_blocks` blocks.

        Raises:
            OSError: there is no memory.
        """

    def __len__(self) -> int: ...
    def note(self, holder: int, tier: int, keys: Memory, size: int = 16) -> int:
        """Remember that a holder has spans, in its tier 0 or 1; return how many it had not yet.

        Nothing is noted for a retired holder.
        """

    def drop(self, holder: int, keys: Memory, size: int = 16) -> int:
        """Forget that a holder has spans; return how many it was said to have."""

    def doubt(self, holder: int, keys: Memory, ticks: int) -> int:
        """Name spans of a holder in no run for 1 to 4095 ticks, or until they are noted again.

        Return how many of them it is said to have.
        """

    def known(self, holder: int, keys: Memory, usable: bool = False) -> bytes:
        """Return for each span whether a holder is said to have it, in doubt or not: bool[n].

        With `usable`, spans in doubt and those of a holder that is down are left out.
        """

    def nodes(self, keys: Memory) -> bytes:
        """Return a node that may be asked for each of some spans: int64[n], -1 if none may be.

        Numbers are as in a run. Spans that one node has are asked of the same one.
        """

    def run(self, keys: Memory, first: int, last: int, use: int = 3) -> bytes:
        """Return who has the blocks of a prompt from `first` on, up to `last`: int64[n].

        For each block that is holder + 4096 * tier. It ends where a span is unknown. Blocks of
        nodes come first where a node has the first one, then those of the store; or, where only the
        store has the first one, those of nodes follow the store's. Nodes are chosen so that they
        change seldom.

        Args:
            keys: the root and the keys of a prompt's blocks.
            first: a position.
            last: a position, exclusive.
            use: 1: the store, 2: nodes, 3: both.
        """

    def tick(self, now: int) -> None:
        """Set the time, in ticks; it must never go back."""

    def avoid(self, holder: int, is_down: bool) -> None:
        """Name a holder in no run while it is down."""

    def retire(self, holder: int) -> None:
        """Declare a holder and all its pairs dead."""

    def revive(self, holder: int) -> None:
        """Use the number of a retired holder again.

        Raises:
            ValueError: it is not retired, or its pairs are not all scrubbed.
        """

    def begin_round(self, holder: int) -> None:
        """Declare all pairs of a holder unseen, each until it is noted again.

        Raises:
            ValueError: the holder is in a round, or what the last one left is not scrubbed.
        """

    def end_round(self, holder: int) -> None:
        """Declare the unseen pairs of a holder dead.

        Raises:
            ValueError: the holder is in no round.
        """

    def scrub(self, lines: int) -> int:
        """Remove the dead pairs of up to some lines of 8; return how many dead pairs are left."""

    def pairs_of(self, holder: int) -> tuple[int, int, int]:
        """Return how many pairs a holder has, dead ones included; unseen ones; dead ones."""

    def counts(self) -> tuple[int, int, int, int]:
        """Return counts: pairs, dead ones included; dead ones; pairs lost so far; bytes of memory.

        A pair is lost when another displaces it.
        """

    def clear(self) -> None:
        """Remove all pairs; rounds go on, and retired holders stay retired."""
