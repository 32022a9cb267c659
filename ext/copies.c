/* Copies any range of a job's bytes, piece by piece. */
#include "copies.h"

#include "moves.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#define UNIT_BYTES ((size_t)512 << 10)

/* Find the piece that holds byte `at` of a block. */
static size_t piece_of(const struct layout *layout, size_t at)
{
    size_t low = 0, high = layout->piece_count;

    while (high - low > 1) {
        size_t middle = low + (high - low) / 2;

        if (layout->pieces[middle].start <= at)
            low = middle;
        else
            high = middle;
    }
    return low;
}

static void pieces_copy(const struct copy_work *work, size_t first, size_t last)
{
    const struct layout *layout = work->layout;
    size_t pair = first / layout->block_bytes, within = first % layout->block_bytes;
    size_t index = piece_of(layout, within);

    while (first < last) {
        const struct piece *piece = &layout->pieces[index];
        size_t skip = within - piece->start, bytes = piece->bytes - skip;
        char *device = piece->base + (size_t)work->device_ids[pair] * piece->stride + skip;
        char *host = layout->host + (size_t)work->host_ids[pair] * layout->host_stride +
                     piece->offset + skip;

        if (bytes > last - first)
            bytes = last - first;
        if (work->direction == TO_HOST)
            move_bytes(host, device, bytes);
        else
            move_bytes(device, host, bytes);
        first += bytes;
        within += bytes;
        if (++index == layout->piece_count) {
            index = 0;
            within = 0;
            pair++;
        }
    }
    moves_publish();
}

size_t unit_bytes(const struct copy_work *work)
{
    size_t block = work->layout->block_bytes;

    if (work->direction != CHECKSUM)
        return UNIT_BYTES;
    return block < UNIT_BYTES ? UNIT_BYTES / block * block : block;
}

static void sum_range(const struct copy_work *work, size_t first, size_t last)
{
    const struct layout *layout = work->layout;

    for (size_t pair = first / layout->block_bytes; pair < last / layout->block_bytes; pair++)
        work->sums[pair] = XXH3_64bits(
            layout->host + (size_t)work->host_ids[pair] * layout->host_stride,
            layout->block_bytes);
}

void copy_range(const struct copy_work *work, size_t first, size_t last)
{
    if (work->direction == CHECKSUM)
        sum_range(work, first, last);
    else
        pieces_copy(work, first, last);
}
