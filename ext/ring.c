/* Ring: the Python face of ring_queue. Holds the memory that I/O may touch. */
#include "ext.h"
#include "ring_queue.h"

#include <errno.h>

typedef struct {
    PyObject_HEAD
    struct ring ring;
    Py_buffer *buffers;
    Py_ssize_t buffer_count;
    Py_ssize_t file_count;
    bool registered;
    bool open;
} Ring;

static PyObject *ring_closed(void)
{
    PyErr_SetString(PyExc_RuntimeError, "the ring is closed");
    return NULL;
}

static PyObject *ring_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"entries", "flags", NULL};
    unsigned entries, flags = 0;
    Ring *self;
    int error;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "I|I:Ring", names, &entries, &flags))
        return NULL;
    self = (Ring *)PyType_GenericAlloc(type, 0);
    if (!self)
        return NULL;
    error = ring_open(&self->ring, entries, flags);
    if (error) {
        Py_DECREF(self);
        return raise_errno(error);
    }
    self->open = true;
    return (PyObject *)self;
}

static void buffers_release(Ring *self)
{
    for (Py_ssize_t i = 0; i < self->buffer_count; i++)
        PyBuffer_Release(&self->buffers[i]);
    PyMem_Free(self->buffers);
    self->buffers = NULL;
    self->buffer_count = 0;
}

static void ring_shut(Ring *self)
{
    if (!self->open)
        return;
    self->open = false;
    Py_BEGIN_ALLOW_THREADS
    ring_close(&self->ring);
    Py_END_ALLOW_THREADS
    buffers_release(self);
}

static PyObject *ring_close_method(Ring *self, PyObject *Py_UNUSED(none))
{
    ring_shut(self);
    return Py_NewRef(Py_None);
}

static void ring_dealloc(Ring *self)
{
    ring_shut(self);
    instance_free((PyObject *)self);
}

static PyObject *ring_fileno(Ring *self, PyObject *Py_UNUSED(none))
{
    return self->open ? PyLong_FromLong(self->ring.eventfd) : ring_closed();
}

/* Hold every buffer of a sequence. 0, or -1 with an exception and nothing held. */
static int buffers_hold(Ring *self, PyObject *sequence)
{
    Py_ssize_t count = PySequence_Size(sequence);

    if (count < 0)
        return -1;
    self->buffers = PyMem_Calloc((size_t)count + 1, sizeof(*self->buffers));
    if (!self->buffers) {
        PyErr_NoMemory();
        return -1;
    }
    while (self->buffer_count < count) {
        PyObject *item = PySequence_GetItem(sequence, self->buffer_count);
        int error = item ? PyObject_GetBuffer(item, &self->buffers[self->buffer_count],
                                              PyBUF_WRITABLE)
                         : -1;

        Py_XDECREF(item);
        if (error < 0) {
            buffers_release(self);
            return -1;
        }
        self->buffer_count++;
    }
    return 0;
}

/* Register the held buffers with the kernel; gives an errno. */
static int buffers_register(Ring *self)
{
    struct iovec *vectors = PyMem_Calloc((size_t)self->buffer_count + 1, sizeof(*vectors));
    int error;

    if (!vectors)
        return ENOMEM;
    for (Py_ssize_t i = 0; i < self->buffer_count; i++) {
        vectors[i].iov_base = self->buffers[i].buf;
        vectors[i].iov_len = (size_t)self->buffers[i].len;
    }
    error = -io_uring_register_buffers(&self->ring.uring, vectors, (unsigned)self->buffer_count);
    PyMem_Free(vectors);
    return error;
}

static PyObject *ring_lend(Ring *self, PyObject *const *args, Py_ssize_t count, PyObject *keywords)
{
    static const char *const names[] = {"buffers", "register"};
    static const struct signature signature = {"lend", names, 2, 2};
    PyObject *values[2];
    int registers, error;

    if (args_unpack(&signature, args, count, keywords, values) < 0)
        return NULL;
    if (!self->open)
        return ring_closed();
    if (self->buffers)
        return PyErr_Format(PyExc_RuntimeError, "memory is lent already");
    registers = PyObject_IsTrue(values[1]);
    if (registers < 0 || buffers_hold(self, values[0]) < 0)
        return NULL;
    if (registers) {
        error = buffers_register(self);
        if (error) {
            buffers_release(self);
            return raise_errno(error);
        }
        self->registered = true;
    }
    return Py_NewRef(Py_None);
}

static PyObject *ring_register_files(Ring *self, PyObject *fds)
{
    Py_ssize_t count = PySequence_Size(fds);
    int *numbers, error = 0;

    if (!self->open)
        return ring_closed();
    if (count < 0)
        return NULL;
    numbers = PyMem_Calloc((size_t)count + 1, sizeof(*numbers));
    if (!numbers)
        return PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < count && !PyErr_Occurred(); i++) {
        PyObject *item = PySequence_GetItem(fds, i);

        numbers[i] = item ? (int)PyLong_AsLong(item) : -1;
        Py_XDECREF(item);
    }
    if (!PyErr_Occurred())
        error = -io_uring_register_files(&self->ring.uring, numbers, (unsigned)count);
    PyMem_Free(numbers);
    if (PyErr_Occurred())
        return NULL;
    if (error)
        return raise_errno(error);
    self->file_count = count;
    return Py_NewRef(Py_None);
}

/* Find the lent buffer that holds all of [address, address + bytes); -1 if none does. */
static Py_ssize_t buffer_of(const Ring *self, uintptr_t address, uintptr_t bytes)
{
    for (Py_ssize_t i = 0; i < self->buffer_count; i++) {
        uintptr_t start = (uintptr_t)self->buffers[i].buf, length = (uintptr_t)self->buffers[i].len;

        if (address >= start && bytes <= length && address - start <= length - bytes)
            return i;
    }
    return -1;
}

/* Read extent `row` into a request. 0, or -1 with ValueError. */
static int extent_read(const Ring *self, const struct int64_view *extents, Py_ssize_t row,
                       struct request *request)
{
    int64_t file = int64_at(extents, 4 * row), offset = int64_at(extents, 4 * row + 1);
    int64_t address = int64_at(extents, 4 * row + 2), bytes = int64_at(extents, 4 * row + 3);
    const char *why = NULL;
    Py_ssize_t buffer = -1;

    if (file < 0 || file >= self->file_count)
        why = "the file is not registered";
    else if (offset < 0)
        why = "the offset is negative";
    else if (bytes < 1 || bytes > EXTENT_BYTES_MAX)
        why = "the length is outside 1 B..1 GiB";
    else if ((buffer = buffer_of(self, (uintptr_t)address, (uintptr_t)bytes)) < 0)
        why = "the memory was not lent";
    if (why) {
        PyErr_Format(PyExc_ValueError, "extent %zd (%lld, %lld, %lld, %lld): %s", row,
                     (long long)file, (long long)offset, (long long)address, (long long)bytes, why);
        return -1;
    }
    request->file = (int)file;
    request->offset = offset;
    request->address = (char *)(uintptr_t)address;
    request->bytes = bytes;
    request->buffer = self->registered ? (int)buffer : -1;
    return 0;
}

static PyObject *ring_submit(Ring *self, PyObject *const *args, Py_ssize_t count,
                             PyObject *keywords)
{
    static const char *const names[] = {"token", "write", "extents"};
    static const struct signature signature = {"submit", names, 3, 3};
    struct request request = {0};
    struct int64_view extents;
    PyObject *values[3];
    Py_ssize_t taken = 0;
    int64_t token;
    int writes;

    if (args_unpack(&signature, args, count, keywords, values) < 0 ||
        integer_read(values[0], "token", 0, INT64_MAX, &token) < 0)
        return NULL;
    if (!self->open)
        return ring_closed();
    if (self->ring.broken)
        return raise_errno(self->ring.broken);
    writes = PyObject_IsTrue(values[1]);
    if (writes < 0 || int64_rows_hold(values[2], "extents", &extents) < 0)
        return NULL;
    for (Py_ssize_t row = 0; row < extents.count; row++)
        if (extent_read(self, &extents, row, &request) < 0) {
            PyBuffer_Release(&extents.buffer);
            return NULL;
        }
    request.kind = writes ? REQUEST_WRITE : REQUEST_READ;
    for (; taken < extents.count; taken++) {
        extent_read(self, &extents, taken, &request);
        request.token = token + taken;
        if (!ring_stage(&self->ring, &request))
            break;
    }
    PyBuffer_Release(&extents.buffer);
    ring_flush(&self->ring);
    return PyLong_FromSsize_t(taken);
}

static PyObject *ring_nop(Ring *self, PyObject *const *args, Py_ssize_t count, PyObject *keywords)
{
    static const char *const names[] = {"token", "count"};
    static const struct signature signature = {"nop", names, 2, 2};
    struct request request = {.kind = REQUEST_NOP};
    PyObject *values[2];
    int64_t token, wanted, taken = 0;

    if (args_unpack(&signature, args, count, keywords, values) < 0 ||
        integer_read(values[0], "token", 0, INT64_MAX, &token) < 0 ||
        integer_read(values[1], "count", 0, INT32_MAX, &wanted) < 0)
        return NULL;
    if (!self->open)
        return ring_closed();
    for (; taken < wanted; taken++) {
        request.token = token + taken;
        if (!ring_stage(&self->ring, &request))
            break;
    }
    ring_flush(&self->ring);
    return PyLong_FromLongLong(taken);
}

static PyObject *ring_reap(Ring *self, PyObject *Py_UNUSED(none))
{
    PyObject *ends;

    if (!self->open)
        return PyList_New(0);
    ring_collect(&self->ring);
    ends = PyList_New((Py_ssize_t)self->ring.ended_count);
    for (unsigned i = 0; ends && i < self->ring.ended_count; i++) {
        struct request_end end = self->ring.ended[i];
        PyObject *pair = Py_BuildValue("(LL)", (long long)end.token, (long long)end.result);

        if (!pair || PyList_SetItem(ends, (Py_ssize_t)i, pair) < 0)
            Py_CLEAR(ends);
    }
    if (ends)
        self->ring.ended_count = 0; /* else they stay for the next call */
    return ends;
}

static PyObject *ring_in_flight(Ring *self, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLong(self->open ? ring_pending(&self->ring) : 0);
}

static PyObject *ring_capacity(Ring *self, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLong(self->open ? self->ring.capacity : 0);
}

#define METHOD(function) ((PyCFunction)(void (*)(void))(function))

static PyMethodDef ring_methods[] = {
    {"fileno", METHOD(ring_fileno), METH_NOARGS, "fileno($self, /)\n--\n\nGive the eventfd."},
    {"lend", METHOD(ring_lend), METH_FASTCALL | METH_KEYWORDS,
     "lend($self, buffers, register)\n--\n\nName the memory that I/O may touch."},
    {"register_files", METHOD(ring_register_files), METH_O,
     "register_files($self, fds, /)\n--\n\nRegister files; extents name them by index."},
    {"submit", METHOD(ring_submit), METH_FASTCALL | METH_KEYWORDS,
     "submit($self, token, write, extents)\n--\n\nQueue I/O; gives how many were taken."},
    {"nop", METHOD(ring_nop), METH_FASTCALL | METH_KEYWORDS,
     "nop($self, token, count)\n--\n\nQueue empty operations; gives how many were taken."},
    {"reap", METHOD(ring_reap), METH_NOARGS,
     "reap($self, /)\n--\n\nGive (token, bytes moved or -errno) of all that ended."},
    {"close", METHOD(ring_close_method), METH_NOARGS,
     "close($self, /)\n--\n\nWait for what is in flight, then release everything."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef ring_members[] = {
    {"in_flight", (getter)ring_in_flight, NULL, "Operations that have not ended.", NULL},
    {"capacity", (getter)ring_capacity, NULL, "Operations that may be in flight.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot ring_slots[] = {
    {Py_tp_doc, "An io_uring whose completions are announced on an eventfd."},
    {Py_tp_new, ring_new},
    {Py_tp_dealloc, ring_dealloc},
    {Py_tp_methods, ring_methods},
    {Py_tp_getset, ring_members},
    {0, NULL},
};

PyType_Spec ring_spec = {
    .name = "flexkv._ext.Ring",
    .basicsize = sizeof(Ring),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = ring_slots,
};
