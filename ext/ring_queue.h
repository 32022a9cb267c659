/* An io_uring with a fixed table of requests. Knows no Python. */
#ifndef FLEXKV_RING_QUEUE_H
#define FLEXKV_RING_QUEUE_H

#include <liburing.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define EXTENT_BYTES_MAX ((int64_t)1 << 30)

enum request_kind { REQUEST_NOP, REQUEST_READ, REQUEST_WRITE };

struct request {
    enum request_kind kind;
    int64_t token;
    char *address;
    int64_t offset;
    int64_t bytes;
    int64_t moved;
    int file;   /* index of a registered file */
    int buffer; /* index of a registered buffer; -1 = memory that is not registered */
};

struct request_end {
    int64_t token;
    int64_t result; /* bytes moved, or -errno */
};

struct ring {
    struct io_uring uring;
    int eventfd;
    pid_t pid;
    unsigned capacity;
    struct request *requests;  /* [capacity] */
    unsigned *free;            /* stack of free places */
    unsigned free_count;
    unsigned *staged;          /* circular: places whose entry the kernel has not taken yet */
    unsigned staged_first, staged_count;
    struct request_end *ended; /* [capacity], not yet given to the caller */
    unsigned ended_count;
    int broken;                /* errno after which the kernel takes nothing any more */
};

/* Set up. 0, or a positive errno with nothing left behind. */
int ring_open(struct ring *ring, unsigned entries, unsigned flags);

/* Count the requests that are accepted and have not ended. */
static inline unsigned ring_pending(const struct ring *ring)
{
    return ring->capacity - ring->free_count;
}

/* Accept one request if there is a place for it; ring_flush hands it on. */
bool ring_stage(struct ring *ring, const struct request *request);

/* Hand what is staged to the kernel; what it does not take now goes with the next flush. */
void ring_flush(struct ring *ring);

/* Move what the kernel has ended to `ended`, continuing what it ended short. */
void ring_collect(struct ring *ring);

/* Wait until nothing is pending, and release everything. In a forked child: release only. */
void ring_close(struct ring *ring);

#endif
