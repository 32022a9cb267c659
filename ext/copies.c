/* Copies any range of a job's bytes, piece by piece, and sums what lands in host memory. */
#include "copies.h"

#include "moves.h"
#include "sums.h"

#include <string.h>

#define LINE_BYTES 64
/* Bytes that are summed and then copied in one step. Measured speed, relative to the copy alone:
 * steps of 1 KiB 0.95, 4 KiB 0.86, 32 KiB 0.71. */
#define STEP_BYTES 1024

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

static size_t smaller(size_t one, size_t other)
{
    return one < other ? one : other;
}

size_t unit_end(const struct copy_work *work, size_t first)
{
    size_t block = work->layout->block_bytes, end;

    if (block <= SUM_CHUNK_BYTES)
        end = first + SUM_CHUNK_BYTES / block * block;
    else
        end = smaller(first + SUM_CHUNK_BYTES, (first / block + 1) * block);
    return smaller(end, work->bytes);
}

void sums_begin(const struct copy_work *work)
{
    const struct layout *layout = work->layout;

    if (layout->sums && work->direction != TO_DEVICE)
        for (size_t pair = 0; pair < work->bytes / layout->block_bytes; pair++)
            layout->sums[work->host_ids[pair]] = 0;
}

/* Copy the bytes of a block from `within` on and sum them, in steps so small that the CPU sums,
 * loads and stores at the same time. If others may write to them meanwhile, they are read once: the
 * sum must be that of what is stored. */
static void block_copy(const struct layout *layout, int64_t device_id, size_t within, size_t bytes,
                       char *host, struct sum *sum)
{
    _Alignas(LINE_BYTES) char read[STEP_BYTES];
    size_t index = piece_of(layout, within);

    while (bytes > 0) {
        const struct piece *piece = &layout->pieces[index];
        size_t skip = within - piece->start;
        size_t step = smaller(STEP_BYTES - (uintptr_t)host % LINE_BYTES, bytes);
        const char *device = piece->base + (size_t)device_id * piece->stride + skip;

        step = smaller(step, piece->bytes - skip);
        if (layout->shared)
            device = memcpy(read, device, step);
        sum_add(sum, device, step);
        move_bytes(host, device, step);
        index += skip + step == piece->bytes;
        host += step;
        within += step;
        bytes -= step;
    }
}

/* Sum the bytes numbered [first, last); copy them if TO_HOST. */
static void summed_range(const struct copy_work *work, size_t first, size_t last)
{
    const struct layout *layout = work->layout;
    size_t block = layout->block_bytes, stride = layout->host_stride;
    struct sum sum;

    while (first < last) {
        int64_t id = work->host_ids[first / block], device_id = work->device_ids[first / block];
        char *host = layout->host + (size_t)id * stride;
        size_t at = first % block, end = at + smaller(block - at, last - first);
        uint64_t all = 0;

        first += end - at;
        for (size_t next; at < end; at = next) {
            next = smaller(at + SUM_CHUNK_BYTES, end);
            sum_begin(&sum, at);
            if (work->direction == TO_HOST)
                block_copy(layout, device_id, at, next - at, host + at, &sum);
            else
                sum_add(&sum, host + at, next - at);
            all += sum_end(&sum);
        }
        __atomic_fetch_add(&layout->sums[id], all, __ATOMIC_RELAXED);
    }
    moves_publish();
}

void copy_range(const struct copy_work *work, size_t first, size_t last)
{
    if (work->layout->sums && work->direction != TO_DEVICE)
        summed_range(work, first, last);
    else
        pieces_copy(work, first, last);
}
