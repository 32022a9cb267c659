/* Theory of operation.
 *
 *            take            start                     absorb                     give
 *   free ──────────> taken ──────────> running ─────────────────> ended ──────────────> free
 *     ^                │ refused         ^  │ short, EINTR, EAGAIN  ^
 *     └────────────────┘                 └──┴── refused: its errno ─┘
 *
 * There are as many slots as completion entries, so the completion queue cannot overflow. The
 * submission queue is empty between calls: entries that the kernel does not accept are taken back
 * (`retract`) and accounted for at once. So every slot that was started ends exactly once.
 */
#include "ring_queue.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

/* One request moves at most this much: the kernel's limit is 2 GiB less a page. */
#define REQUEST_BYTES_MAX ((uint64_t)1 << 30)

/* After this many EINTR and EAGAIN in a row, without a byte moved, the error is reported. */
#define RETRIES_MAX 100

/* A direct read that ends off this boundary has reached the end of its file. */
#define SECTOR_BYTES 512

#define COMPLETION_BATCH 64

static int slots_allocate(struct ring_queue *queue)
{
    size_t capacity = queue->capacity;

    queue->slots = calloc(capacity, sizeof(*queue->slots));
    queue->free = calloc(capacity, sizeof(*queue->free));
    queue->unfinished = calloc(capacity, sizeof(*queue->unfinished));
    if (!queue->slots || !queue->free || !queue->unfinished)
        return ENOMEM;
    for (unsigned i = 0; i < queue->capacity; i++)
        queue->free[i] = queue->capacity - 1 - i;
    queue->free_count = queue->capacity;
    return 0;
}

static const int file_operations[] = {IORING_OP_NOP, IORING_OP_READ, IORING_OP_WRITE,
                                      IORING_OP_READ_FIXED, IORING_OP_WRITE_FIXED};
static const int socket_operations[] = {IORING_OP_RECVMSG, IORING_OP_SENDMSG};

/* Check that the kernel knows some operations; return a positive errno if not. */
static int operations_check(struct io_uring *ring, const int *needed, size_t count)
{
    struct io_uring_probe *probe = io_uring_get_probe_ring(ring);
    bool known = probe != NULL;

    for (size_t i = 0; known && i < count; i++)
        known = io_uring_opcode_supported(probe, needed[i]);
    io_uring_free_probe(probe);
    return known ? 0 : EOPNOTSUPP;
}

int queue_open(struct ring_queue *queue, unsigned entries, unsigned flags)
{
    int error;

    memset(queue, 0, sizeof(*queue));
    queue->eventfd = -1;
    error = -io_uring_queue_init(entries, &queue->ring, flags);
    if (error)
        return error;
    queue->capacity = queue->ring.cq.ring_entries;
    queue->eventfd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (queue->eventfd < 0)
        error = errno;
    else
        error = -io_uring_register_eventfd(&queue->ring, queue->eventfd);
    if (!error)
        error = operations_check(&queue->ring, file_operations,
                                 sizeof(file_operations) / sizeof(*file_operations));
    if (!error)
        error = slots_allocate(queue);
    if (error) {
        queue_close(queue);
        queue_free(queue);
    }
    return error;
}

int queue_check_sockets(struct ring_queue *queue)
{
    return operations_check(&queue->ring, socket_operations,
                            sizeof(socket_operations) / sizeof(*socket_operations));
}

bool queue_uses(const struct ring_queue *queue, unsigned file, int kind)
{
    for (unsigned i = 0; i < queue->capacity; i++) {
        const struct slot *slot = &queue->slots[i];

        if (slot->taken && slot->kind != SLOT_NOP && slot->file == file &&
            (kind == SLOT_ANY || slot->kind == kind))
            return true;
    }
    return false;
}

unsigned queue_take(struct ring_queue *queue)
{
    unsigned index = queue->free[--queue->free_count];

    memset(&queue->slots[index], 0, sizeof(queue->slots[index]));
    queue->slots[index].taken = true;
    return index;
}

/* What has ended, or was never started, keeps no message. */
static void slot_release(struct slot *slot)
{
    slot->taken = false;
    free(slot->message);
    slot->message = NULL;
}

void queue_give(struct ring_queue *queue, unsigned index)
{
    slot_release(&queue->slots[index]);
    queue->free[queue->free_count++] = index;
}

struct message *message_new(size_t count)
{
    struct message *message = calloc(1, sizeof(*message) + count * sizeof(*message->vectors));

    if (message) {
        message->header.msg_iov = message->vectors;
        message->header.msg_iovlen = count;
    }
    return message;
}

/* Skip the first bytes of what is left of a message. */
static void message_skip(struct message *message, size_t bytes)
{
    struct msghdr *header = &message->header;

    while (header->msg_iovlen && bytes >= header->msg_iov->iov_len) {
        bytes -= header->msg_iov->iov_len;
        header->msg_iov++;
        header->msg_iovlen--;
    }
    if (bytes) {
        header->msg_iov->iov_base = (char *)header->msg_iov->iov_base + bytes;
        header->msg_iov->iov_len -= bytes;
    }
}

static void slot_end(struct ring_queue *queue, unsigned index, int64_t result)
{
    slot_release(&queue->slots[index]);
    queue->slots[index].result = result;
    if (queue->ended_count++ == 0)
        queue->ended_first = index;
    else
        queue->slots[queue->ended_last].next = index;
    queue->ended_last = index;
}

/* Write the request for the remaining bytes of a slot. */
static void request_prepare(struct io_uring_sqe *entry, const struct slot *slot, unsigned index,
                            unsigned flags)
{
    uint64_t left = slot->bytes - slot->moved;
    unsigned bytes = (unsigned)(left < REQUEST_BYTES_MAX ? left : REQUEST_BYTES_MAX);
    char *address = slot->address + slot->moved;
    uint64_t offset = slot->offset + slot->moved;
    int file = (int)slot->file, buffer = (int)slot->buffer;

    if (slot->kind == SLOT_NOP)
        io_uring_prep_nop(entry);
    else if (slot->kind == SLOT_RECEIVE)
        io_uring_prep_recvmsg(entry, file, &slot->message->header, MSG_WAITALL);
    else if (slot->kind == SLOT_SEND)
        io_uring_prep_sendmsg(entry, file, &slot->message->header, MSG_NOSIGNAL | MSG_WAITALL);
    else if (slot->kind == SLOT_READ && slot->fixed)
        io_uring_prep_read_fixed(entry, file, address, bytes, offset, buffer);
    else if (slot->kind == SLOT_READ)
        io_uring_prep_read(entry, file, address, bytes, offset);
    else if (slot->fixed)
        io_uring_prep_write_fixed(entry, file, address, bytes, offset, buffer);
    else
        io_uring_prep_write(entry, file, address, bytes, offset);
    if (slot->kind != SLOT_NOP)
        io_uring_sqe_set_flags(entry, flags);
    io_uring_sqe_set_data64(entry, index);
}

/* Take back the entries that the kernel has not consumed; return how many. This is legal because
 * the kernel reads the queue only inside io_uring_enter (a ring with SQPOLL is refused). */
static unsigned retract(struct io_uring *ring)
{
    unsigned head = io_uring_smp_load_acquire(ring->sq.khead);
    unsigned count = ring->sq.sqe_tail - head;

    ring->sq.sqe_head = ring->sq.sqe_tail = head;
    io_uring_smp_store_release(ring->sq.ktail, head);
    return count;
}

/* Make the kernel consume the submission queue. Return 0, or a positive errno if it does not. */
static int flush(struct io_uring *ring)
{
    while (io_uring_sq_ready(ring)) {
        int accepted = io_uring_submit(ring);

        if (accepted == 0)
            return EAGAIN;
        if (accepted < 0 && accepted != -EINTR)
            return -accepted;
    }
    return 0;
}

/* Hand slots to the kernel, in order. Return how many it accepted. */
static unsigned post(struct ring_queue *queue, const unsigned *indices, unsigned count, int *error)
{
    unsigned flags = IOSQE_FIXED_FILE | (queue->in_background ? IOSQE_ASYNC : 0);
    unsigned prepared = 0;

    *error = 0;
    while (prepared < count && *error == 0) {
        struct io_uring_sqe *entry = io_uring_get_sqe(&queue->ring);

        if (!entry) {
            *error = flush(&queue->ring);
            continue;
        }
        request_prepare(entry, &queue->slots[indices[prepared]], indices[prepared], flags);
        prepared++;
    }
    if (*error == 0)
        *error = flush(&queue->ring);
    if (*error)
        prepared -= retract(&queue->ring);
    queue->running += prepared;
    return prepared;
}

unsigned queue_start(struct ring_queue *queue, const unsigned *indices, unsigned count, int *error)
{
    unsigned started = post(queue, indices, count, error);

    for (unsigned i = count; i > started; i--)
        queue_give(queue, indices[i - 1]);
    return started;
}

/* Account for one completion. Return whether the slot has to be continued. */
static bool slot_advance(struct ring_queue *queue, unsigned index, int result)
{
    struct slot *slot = &queue->slots[index];

    if ((result == -EINTR || result == -EAGAIN) && slot->retries < RETRIES_MAX) {
        slot->retries++;
        return true;
    }
    if (result > 0) {
        slot->retries = 0;
        slot->moved += (uint64_t)result;
        if (slot->message)
            message_skip(slot->message, (size_t)result);
        if (slot->moved < slot->bytes)
            return true;
    }
    /* O_DIRECT refuses to continue after an unaligned end of a file: that is the end, too. */
    if (result == -EINVAL && slot->kind == SLOT_READ && slot->moved % SECTOR_BYTES)
        result = 0;
    slot_end(queue, index, result < 0 ? result : (int64_t)slot->moved);
    return false;
}

void queue_absorb(struct ring_queue *queue)
{
    struct io_uring_cqe *completions[COMPLETION_BATCH];
    unsigned count, unfinished = 0;
    int error;

    do {
        count = io_uring_peek_batch_cqe(&queue->ring, completions, COMPLETION_BATCH);
        for (unsigned i = 0; i < count; i++) {
            unsigned index = (unsigned)io_uring_cqe_get_data64(completions[i]);

            if (slot_advance(queue, index, completions[i]->res))
                queue->unfinished[unfinished++] = index;
        }
        io_uring_cq_advance(&queue->ring, count);
        queue->running -= count;
    } while (count);
    if (unfinished)
        for (unsigned i = post(queue, queue->unfinished, unfinished, &error); i < unfinished; i++)
            slot_end(queue, queue->unfinished[i], -error);
}

void queue_hush(struct ring_queue *queue)
{
    eventfd_t count;

    eventfd_read(queue->eventfd, &count);
}

int queue_drain(struct ring_queue *queue)
{
    while (queue->running) {
        struct io_uring_cqe *completion;
        int result = io_uring_wait_cqe(&queue->ring, &completion);

        if (result < 0 && result != -EINTR)
            return -result;
        queue_absorb(queue);
    }
    return 0;
}

void queue_close(struct ring_queue *queue)
{
    io_uring_queue_exit(&queue->ring);
    if (queue->eventfd >= 0)
        close(queue->eventfd);
    queue->eventfd = -1;
}

void queue_free(struct ring_queue *queue)
{
    for (unsigned i = 0; queue->slots && i < queue->capacity; i++)
        free(queue->slots[i].message);
    free(queue->slots);
    free(queue->free);
    free(queue->unfinished);
    queue->slots = NULL;
    queue->free = queue->unfinished = NULL;
    queue->capacity = queue->free_count = 0;
}
