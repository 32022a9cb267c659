/* The calls of Ring for I/O: submit, stream, nop, reap. */
#include "ring.h"

#include <errno.h>

/* The kernel's limit (UIO_MAXIOV). */
#define STREAM_EXTENTS_MAX 1024

/* Return the index of the lent buffer that holds [address, address + bytes), or -1. */
static Py_ssize_t lent_index(Ring *self, uint64_t address, uint64_t bytes)
{
    for (Py_ssize_t i = 0; i < self->lent_count; i++) {
        Py_ssize_t index = (self->lent_hint + i) % self->lent_count;
        uint64_t start = (uintptr_t)self->lent[index].buf;
        uint64_t length = (uint64_t)self->lent[index].len;

        if (address >= start && bytes <= length && address - start <= length - bytes) {
            self->lent_hint = index;
            return index;
        }
    }
    return -1;
}

/* Check one extent and fill its slot. Return 0, or -1 with ValueError. */
static int extent_read(Ring *self, const struct int64_view *extents, Py_ssize_t row,
                       struct slot *slot)
{
    int64_t file = int64_at(extents, row * 4), offset = int64_at(extents, row * 4 + 1);
    int64_t address = int64_at(extents, row * 4 + 2), bytes = int64_at(extents, row * 4 + 3);
    Py_ssize_t buffer = -1;
    const char *why = NULL;

    if (file < 0 || file >= self->file_count)
        why = "the file is not registered";
    else if (bytes < 1)
        why = "the length is below 1";
    else if (offset < 0 || offset > INT64_MAX - bytes)
        why = "the file offset is out of range";
    else if ((buffer = lent_index(self, (uint64_t)address, (uint64_t)bytes)) < 0)
        why = "the memory was not lent";
    if (why)
        return raise_value("extent %zd (%lld, %lld, %lld, %lld): %s", row, (long long)file,
                           (long long)offset, (long long)address, (long long)bytes, why);
    slot->address = (char *)(intptr_t)address;
    slot->offset = (uint64_t)offset;
    slot->bytes = (uint64_t)bytes;
    slot->file = (unsigned)file;
    slot->buffer = (unsigned)buffer;
    slot->fixed = self->registered;
    return 0;
}

/* Start the first `count` taken slots; return the number started, or NULL with OSError. */
static PyObject *taken_start(Ring *self, unsigned count, uint64_t bytes)
{
    PyThreadState *saved = gil_leave(bytes > GIL_HOLD_BYTES_MAX);
    int error;
    unsigned started = queue_start(&self->queue, self->taken, count, &error);

    gil_return(saved);
    /* A kernel short of memory may accept more later; if I/O is in flight, its end tells when. */
    if (error && !started && !((error == EAGAIN || error == EBUSY) && self->queue.running))
        return raise_errno(error);
    return PyLong_FromUnsignedLong(started);
}

/* Read `op_id`, the op id of the first of `count` operations. */
static int op_id_read(PyObject *object, int64_t count, int64_t *op_id)
{
    return integer_read(object, "op_id", 0, INT64_MAX - count, op_id);
}

/* Read the extents of a stream into a slot. Return 0, or -1 with an exception. */
static int stream_read(Ring *self, const struct int64_view *extents, struct slot *slot)
{
    Py_ssize_t count = extents->count / 2;

    if (extents->count % 2 || count < 1 || count > STREAM_EXTENTS_MAX)
        return raise_value("extents must be 1 to %d rows of two integers", STREAM_EXTENTS_MAX);
    slot->message = message_new((size_t)count);
    if (!slot->message) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t row = 0; row < count; row++) {
        int64_t address = int64_at(extents, row * 2), bytes = int64_at(extents, row * 2 + 1);

        if (bytes < 1 || lent_index(self, (uint64_t)address, (uint64_t)bytes) < 0)
            return raise_value("extent %zd (%lld, %lld): %s", row, (long long)address,
                               (long long)bytes,
                               bytes < 1 ? "the length is below 1" : "the memory was not lent");
        slot->message->vectors[row].iov_base = (void *)(intptr_t)address;
        slot->message->vectors[row].iov_len = (size_t)bytes;
        slot->bytes += (uint64_t)bytes;
    }
    return 0;
}

static unsigned least(int64_t count, unsigned limit)
{
    return count < (int64_t)limit ? (unsigned)count : limit;
}

/* Take, check and start as many extents as there are free slots; the lock is held. The rows are
 * copied to slots before the GIL is released, as another thread may change their buffer then. */
static PyObject *extents_submit(Ring *self, int64_t op_id, bool write,
                                const struct int64_view *extents)
{
    unsigned count = least(extents->count, self->queue.free_count);
    uint64_t bytes = 0;

    for (unsigned i = 0; i < count; i++) {
        unsigned index = self->taken[i] = queue_take(&self->queue);
        struct slot *slot = &self->queue.slots[index];

        slot->op_id = op_id + i;
        slot->kind = write ? SLOT_WRITE : SLOT_READ;
        if (extent_read(self, extents, i, slot) < 0) {
            for (unsigned back = i + 1; back > 0; back--)
                queue_give(&self->queue, self->taken[back - 1]);
            return NULL;
        }
        bytes += slot->bytes;
    }
    return taken_start(self, count, bytes);
}

static PyObject *submit(Ring *self, struct value *values)
{
    PyObject *result;
    int64_t op_id;

    if (op_id_read(values[0].object, values[2].view.count, &op_id) < 0 || !ring_enter(self))
        return NULL;
    result = extents_submit(self, op_id, values[1].integer, &values[2].view);
    ring_unlock(self);
    return result;
}

CALL(ring_, submit, Ring, 3, OBJECT("op_id"), READ("write", read_flag), READ("extents", read_rows))

/* Start one stream; the lock is held, and there is a free slot. */
static PyObject *stream_submit(Ring *self, int64_t op_id, int kind, int64_t file,
                               const struct int64_view *extents)
{
    unsigned index = self->taken[0] = queue_take(&self->queue);
    struct slot *slot = &self->queue.slots[index];
    PyObject *started;
    int accepted;

    slot->op_id = op_id;
    slot->file = (unsigned)file;
    if (stream_read(self, extents, slot) < 0) {
        queue_give(&self->queue, index);
        return NULL;
    }
    slot->kind = (unsigned char)kind;
    /* Kernel threads move all bytes of a ring in the background. Others may be moved at once. */
    started = taken_start(self, 1, self->queue.in_background ? 0 : slot->bytes);
    if (!started)
        return NULL;
    accepted = PyObject_IsTrue(started);
    Py_DECREF(started);
    return PyBool_FromLong(accepted);
}

static PyObject *stream(Ring *self, struct value *values)
{
    int kind = values[1].integer ? SLOT_SEND : SLOT_RECEIVE;
    int64_t op_id, file = values[2].integer;
    PyObject *result;

    if (op_id_read(values[0].object, 1, &op_id) < 0 || !ring_enter(self))
        return NULL;
    if (file >= self->socket_count) {
        raise_value("socket %lld: the ring has room for %zd", (long long)file, self->socket_count);
        result = NULL;
    } else if (queue_uses(&self->queue, (unsigned)file, kind)) {
        result = raise_errno(EBUSY);
    } else if (self->queue.free_count == 0) {
        result = Py_NewRef(Py_False);
    } else {
        result = stream_submit(self, op_id, kind, file, &values[3].view);
    }
    ring_unlock(self);
    return result;
}

CALL(ring_, stream, Ring, 4, OBJECT("op_id"), READ("write", read_flag),
     INTEGER("socket", 0, INT32_MAX), READ("extents", read_int64s))

static PyObject *nop(Ring *self, struct value *values)
{
    PyObject *result;
    int64_t op_id;
    unsigned take;

    if (op_id_read(values[0].object, values[1].integer, &op_id) < 0 || !ring_enter(self))
        return NULL;
    take = least(values[1].integer, self->queue.free_count);
    for (unsigned i = 0; i < take; i++) {
        self->taken[i] = queue_take(&self->queue);
        self->queue.slots[self->taken[i]].op_id = op_id + i;
    }
    result = taken_start(self, take, 0);
    ring_unlock(self);
    return result;
}

CALL(ring_, nop, Ring, 2, OBJECT("op_id"), INTEGER("count", 0, PY_SSIZE_T_MAX))

/* Return (op id, result) of the slots that ended; none is freed before all are in the list. */
static PyObject *ended_tell(struct ring_queue *queue)
{
    PyObject *list = PyList_New((Py_ssize_t)queue->ended_count);
    unsigned index = queue->ended_first;

    for (unsigned i = 0; list && i < queue->ended_count; i++) {
        const struct slot *slot = &queue->slots[index];
        PyObject *pair = Py_BuildValue("(LL)", (long long)slot->op_id, (long long)slot->result);

        if (pair)
            PyList_SetItem(list, (Py_ssize_t)i, pair);
        else
            Py_CLEAR(list);
        index = slot->next;
    }
    if (!list)
        return NULL;
    for (; queue->ended_count; queue->ended_count--) {
        queue_give(queue, queue->ended_first);
        queue->ended_first = queue->slots[queue->ended_first].next;
    }
    return list;
}

PyObject *ring_reap(Ring *self, PyObject *Py_UNUSED(none))
{
    PyObject *list;
    int collects;

    ring_lock(self);
    if (self->open) {
        queue_hush(&self->queue);
        queue_absorb(&self->queue);
    }
    /* Python 3.11 collects garbage in PyList_New: a finalizer that uses this ring would wait for
     * the mutex, which is held here. */
    collects = PyGC_Disable();
    list = ended_tell(&self->queue);
    if (collects)
        PyGC_Enable();
    ring_unlock(self);
    return list;
}
