/* Copies any range of a job's bytes, piece by piece. */
#include "copies.h"

#include "moves.h"

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

void copy_range(const struct copy_work *work, size_t first, size_t last)
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
