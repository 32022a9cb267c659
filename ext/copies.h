/* Copies between device pages and host blocks, and checksums of host blocks: what to do, and any
 * byte range of it.
 *
 * A device block is scattered in pieces; a host block is contiguous. Work is n pairs of blocks.
 * Its bytes are numbered in order of pair and piece, so that any range of the numbers is a unit
 * that a thread can copy, however large or small the pieces are.
 */
#ifndef FLEXKV_COPIES_H
#define FLEXKV_COPIES_H

#include <stddef.h>
#include <stdint.h>

enum direction { TO_HOST = 0, TO_DEVICE = 1, CHECKSUM = 2 };

struct piece {
    char *base;    /* where the piece of device block 0 is */
    size_t stride; /* from there to the piece of device block 1 */
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
};

struct copy_work {
    const struct layout *layout;
    enum direction direction;
    size_t bytes; /* of all pairs together */
    const int64_t *device_ids;
    const int64_t *host_ids;
    uint64_t *sums; /* CHECKSUM: XXH3-64 of each pair's host block */
};

/* How many bytes to do at a time: whole blocks when they are summed. */
size_t unit_bytes(const struct copy_work *work);

/* Copy the bytes numbered [first, last), and publish them; or sum their blocks. */
void copy_range(const struct copy_work *work, size_t first, size_t last);

#endif
