/* Copies between device pages and host blocks, and checksums of host blocks, for any byte range of
 * the work.
 *
 * A device block is scattered in pieces; a host block is contiguous. Work is n pairs of blocks.
 * Its bytes are numbered in order of pair and piece, so that a thread can copy any range of the
 * numbers, however large or small the pieces are.
 *
 * The sum of a host block covers the bytes of its pieces, and nothing behind them. It adds up the
 * XXH3-64 of each chunk of SUM_CHUNK_BYTES, seeded with the chunk's offset. So different threads
 * can sum the chunks of a block, while the bytes are in the cache because they are being copied.
 */
#ifndef FLEXKV_COPIES_H
#define FLEXKV_COPIES_H

#include <stddef.h>
#include <stdint.h>

/* Bytes of a block that are summed in one go; also the most bytes of a unit. */
#define SUM_CHUNK_BYTES ((size_t)512 << 10)

enum direction { TO_HOST = 0, TO_DEVICE = 1, CHECKSUM = 2 };

struct piece {
    char *base;    /* where the piece of device block 0 is */
    size_t stride; /* bytes from there to the piece of device block 1 */
    size_t bytes;
    size_t offset; /* inside the host block */
    size_t start;  /* bytes of the pieces before this one */
};

struct layout {
    struct piece *pieces;
    size_t piece_count;
    size_t block_bytes; /* of all pieces together */
    size_t device_blocks;
    char *host;
    size_t host_stride;
    size_t host_blocks;
    uint64_t *sums; /* the sum of each host block; NULL if sums are not kept */
    int shared;     /* whether others may write to the device's blocks while they are copied */
};

struct copy_work {
    const struct layout *layout;
    enum direction direction;
    size_t bytes; /* of all pairs together */
    const int64_t *device_ids;
    const int64_t *host_ids;
};

/* Return the end of the unit that begins at byte `first`. A unit is one or more whole blocks, or a
 * part of a block that begins at a chunk. */
size_t unit_end(const struct copy_work *work, size_t first);

/* Zero the sums of the blocks that the work will sum. Call it before the first copy_range. */
void sums_begin(const struct copy_work *work);

/* Copy the bytes numbered [first, last), which must be whole units, and publish them. If sums are
 * kept, also sum what lands in host memory; for CHECKSUM only sum what is there. */
void copy_range(const struct copy_work *work, size_t first, size_t last);

#endif
