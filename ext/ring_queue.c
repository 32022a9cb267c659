/* Theory of operation.
 *
 *   stage ──> staged ──flush──> kernel ──> CQ ──collect──> ended ──> caller
 *               ^                                  │ short, EINTR, EAGAIN
 *               └──────────────────────────────────┘
 *
 * A request holds one place of the table from stage to end, so every accepted request ends exactly
 * once. There are no more places than completion entries: the completion queue cannot overflow.
 * The kernel takes submission entries in order, so `staged` tells which it has not taken. If it
 * refuses for good, those end with its errno and the ring accepts nothing more. */
#include "ring_queue.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

/* Direct I/O moves whole sectors: a file's end inside one stops a read there for good. */
#define SECTOR_BYTES 512

static void ring_free(struct ring *ring)
{
    free(ring->requests);
    free(ring->free);
    free(ring->staged);
    free(ring->ended);
    memset(ring, 0, sizeof(*ring));
    ring->eventfd = -1;
}

static bool tables_allocate(struct ring *ring)
{
    size_t capacity = ring->capacity;

    ring->requests = calloc(capacity, sizeof(*ring->requests));
    ring->free = calloc(capacity, sizeof(*ring->free));
    ring->staged = calloc(capacity, sizeof(*ring->staged));
    ring->ended = calloc(capacity, sizeof(*ring->ended));
    if (!ring->requests || !ring->free || !ring->staged || !ring->ended)
        return false;
    while (ring->free_count < ring->capacity) {
        ring->free[ring->free_count] = ring->capacity - 1 - ring->free_count;
        ring->free_count++;
    }
    return true;
}

int ring_open(struct ring *ring, unsigned entries, unsigned flags)
{
    int error;

    memset(ring, 0, sizeof(*ring));
    ring->pid = getpid();
    ring->eventfd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (ring->eventfd < 0)
        return errno;
    error = -io_uring_queue_init(entries, &ring->uring, flags);
    if (error == 0) {
        ring->capacity = ring->uring.cq.ring_entries;
        error = tables_allocate(ring) ? -io_uring_register_eventfd(&ring->uring, ring->eventfd)
                                      : ENOMEM;
        if (error)
            io_uring_queue_exit(&ring->uring);
    }
    if (error) {
        close(ring->eventfd);
        ring_free(ring);
    }
    return error;
}

static void entry_fill(struct io_uring_sqe *sqe, const struct request *request, unsigned place)
{
    char *address = request->address + request->moved;
    unsigned bytes = (unsigned)(request->bytes - request->moved);
    uint64_t offset = (uint64_t)(request->offset + request->moved);

    if (request->kind == REQUEST_NOP)
        io_uring_prep_nop(sqe);
    else if (request->kind == REQUEST_WRITE && request->buffer >= 0)
        io_uring_prep_write_fixed(sqe, request->file, address, bytes, offset, request->buffer);
    else if (request->kind == REQUEST_WRITE)
        io_uring_prep_write(sqe, request->file, address, bytes, offset);
    else if (request->buffer >= 0)
        io_uring_prep_read_fixed(sqe, request->file, address, bytes, offset, request->buffer);
    else
        io_uring_prep_read(sqe, request->file, address, bytes, offset);
    if (request->kind != REQUEST_NOP)
        sqe->flags |= IOSQE_FIXED_FILE;
    sqe->user_data = place;
}

static void request_end(struct ring *ring, unsigned place, int64_t result)
{
    struct request_end end = {ring->requests[place].token, result};

    ring->ended[ring->ended_count++] = end;
    ring->free[ring->free_count++] = place;
}

/* Give the submission queue an entry for the request in this place; false when it has no room. */
static bool place_stage(struct ring *ring, unsigned place)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->uring);

    if (!sqe) {
        ring_flush(ring);
        sqe = ring->broken ? NULL : io_uring_get_sqe(&ring->uring);
    }
    if (!sqe)
        return false;
    entry_fill(sqe, &ring->requests[place], place);
    ring->staged[(ring->staged_first + ring->staged_count++) % ring->capacity] = place;
    return true;
}

bool ring_stage(struct ring *ring, const struct request *request)
{
    unsigned place;

    /* Undelivered ends keep their place in `ended`: leave room for one more. */
    if (ring->broken || ring_pending(ring) + ring->ended_count >= ring->capacity)
        return false;
    place = ring->free[ring->free_count - 1];
    ring->requests[place] = *request;
    ring->free_count--;
    if (place_stage(ring, place))
        return true;
    ring->free_count++;
    return false;
}

void ring_flush(struct ring *ring)
{
    while (ring->staged_count && !ring->broken) {
        int taken = io_uring_submit(&ring->uring);

        if (taken == -EINTR)
            continue;
        if ((taken == -EAGAIN || taken == -EBUSY) && ring_pending(ring) > ring->staged_count)
            return; /* the next completion wakes the caller, who flushes again */
        if (taken <= 0) {
            ring->broken = taken ? -taken : EIO;
            break;
        }
        if ((unsigned)taken > ring->staged_count)
            taken = (int)ring->staged_count;
        ring->staged_first = (ring->staged_first + (unsigned)taken) % ring->capacity;
        ring->staged_count -= (unsigned)taken;
    }
    if (ring->broken && ring->staged_count) {
        for (; ring->staged_count; ring->staged_count--) {
            request_end(ring, ring->staged[ring->staged_first], -ring->broken);
            ring->staged_first = (ring->staged_first + 1) % ring->capacity;
        }
        eventfd_write(ring->eventfd, 1);
    }
}

/* Take one result: end the request, or stage what is left of it. */
static void result_take(struct ring *ring, unsigned place, int result)
{
    struct request *request = &ring->requests[place];
    bool again;

    if (request->kind == REQUEST_NOP) {
        request_end(ring, place, result);
        return;
    }
    if (result > 0)
        request->moved += result;
    again = (result > 0 && request->moved < request->bytes) || result == -EINTR ||
            result == -EAGAIN;
    if (again && place_stage(ring, place))
        return;
    if (again)
        request_end(ring, place, ring->broken ? -ring->broken : -EBUSY);
    else if (result == -EINVAL && request->moved % SECTOR_BYTES)
        request_end(ring, place, request->moved);
    else
        request_end(ring, place, result < 0 ? result : request->moved);
}

void ring_collect(struct ring *ring)
{
    struct io_uring_cqe *cqe;
    eventfd_t count;

    eventfd_read(ring->eventfd, &count);
    while (io_uring_peek_cqe(&ring->uring, &cqe) == 0) {
        unsigned place = (unsigned)cqe->user_data;
        int result = cqe->res;

        io_uring_cqe_seen(&ring->uring, cqe);
        result_take(ring, place, result);
    }
    ring_flush(ring);
}

void ring_close(struct ring *ring)
{
    struct io_uring_cqe *cqe;

    if (ring->pid == getpid()) {
        ring_flush(ring);
        while (ring_pending(ring)) {
            int error = io_uring_wait_cqe(&ring->uring, &cqe);

            if (error == -EINTR)
                continue;
            if (error)
                break;
            ring->requests[cqe->user_data].bytes = 0; /* nobody waits for the rest */
            ring->free[ring->free_count++] = (unsigned)cqe->user_data;
            io_uring_cqe_seen(&ring->uring, cqe);
            ring_flush(ring);
        }
    }
    io_uring_queue_exit(&ring->uring);
    close(ring->eventfd);
    ring_free(ring);
}
