/* An io_uring with a slot for every request, which continues short transfers. Knows no Python. */
#ifndef FLEXKV_RING_QUEUE_H
#define FLEXKV_RING_QUEUE_H

#include <liburing.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

enum slot_kind { SLOT_NOP, SLOT_READ, SLOT_WRITE, SLOT_RECEIVE, SLOT_SEND };

/* What a request of a socket moves: several ranges of memory, in order. */
struct message {
    struct msghdr header; /* names the vectors that are left */
    struct iovec vectors[];
};

struct slot {
    int64_t op_id;
    int64_t result; /* once ended: bytes moved or -errno */
    char *address;
    uint64_t offset;
    uint64_t bytes;
    uint64_t moved;
    unsigned file;      /* index in the registered files */
    unsigned buffer;    /* index in the registered buffers */
    unsigned next;      /* in the list of ended slots */
    struct message *message; /* of SLOT_RECEIVE and SLOT_SEND, until the slot ends */
    unsigned char kind; /* enum slot_kind */
    unsigned char retries;
    bool fixed; /* the buffer is registered */
    bool taken; /* it is neither free nor ended */
};

struct ring_queue {
    struct io_uring ring;
    int eventfd;
    bool in_background; /* requests are handed to kernel threads at once */
    unsigned capacity;
    struct slot *slots;   /* [capacity] */
    unsigned *free;       /* [capacity], a stack */
    unsigned free_count;
    unsigned *unfinished; /* [capacity]: scratch of queue_absorb */
    unsigned ended_first, ended_last, ended_count;
    unsigned running; /* slots that the kernel has */
};

/* Open a ring with an eventfd. Return 0, or a positive errno with nothing left behind. */
int queue_open(struct ring_queue *queue, unsigned entries, unsigned flags);

/* Check that the kernel knows the operations of sockets. Return 0, or a positive errno. */
int queue_check_sockets(struct ring_queue *queue);

/* Return whether a slot of a file is taken and has not ended: any one, or one of a kind. */
bool queue_uses(const struct ring_queue *queue, unsigned file, int kind);
#define SLOT_ANY (-1)

/* Return a message of `count` vectors, to be filled, or NULL. */
struct message *message_new(size_t count);

/* Take a free slot, zeroed; there must be one (free_count > 0). */
unsigned queue_take(struct ring_queue *queue);

/* Free a slot that was taken and not started, or that ended and was reported. */
void queue_give(struct ring_queue *queue, unsigned index);

/* Start slots, in order. Return how many the kernel has now; the others are freed, and *error is
 * the reason (a positive errno, or 0 if all were started). */
unsigned queue_start(struct ring_queue *queue, const unsigned *indices, unsigned count,
                     int *error);

/* Move completed slots to the list of ended slots, and continue short transfers. */
void queue_absorb(struct ring_queue *queue);

/* Clear the eventfd. Call it before queue_absorb, so that no later completion goes unnoticed. */
void queue_hush(struct ring_queue *queue);

/* Wait until the kernel has no slot. Return 0, or a positive errno if waiting fails. */
int queue_drain(struct ring_queue *queue);

/* Release the ring and the eventfd; the slots stay, for those that ended. */
void queue_close(struct ring_queue *queue);

/* Release the slots. */
void queue_free(struct ring_queue *queue);

#endif
