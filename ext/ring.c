/* Ring: its life, and the memory and files that are lent to it. */
#include "ring.h"

#include <errno.h>
#include <sys/uio.h>
#include <unistd.h>

/* Flags that change which thread runs completions. The others change the layout of the rings, need
 * more arguments, or (SQPOLL, IOPOLL) break the accounting or the eventfd. */
#define FLAGS_ALLOWED                                                                              \
    (IORING_SETUP_CLAMP | IORING_SETUP_SUBMIT_ALL | IORING_SETUP_COOP_TASKRUN |                    \
     IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN)

static PyObject *ring_closed(void)
{
    return PyErr_Format(PyExc_RuntimeError, "the ring is closed");
}

void ring_lock(Ring *self)
{
    if (pthread_mutex_trylock(&self->lock) == 0)
        return;
    Py_BEGIN_ALLOW_THREADS
    pthread_mutex_lock(&self->lock);
    Py_END_ALLOW_THREADS
}

void ring_unlock(Ring *self)
{
    pthread_mutex_unlock(&self->lock);
}

bool ring_enter(Ring *self)
{
    ring_lock(self);
    if (self->open)
        return true;
    ring_unlock(self);
    ring_closed();
    return false;
}

static PyObject *ring_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"entries", "flags", "in_background", NULL};
    unsigned flags = 0;
    int entries, error, in_background = 0;
    Ring *self;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "i|Ip:Ring", names, &entries, &flags,
                                     &in_background))
        return NULL;
    if (entries < 1 || flags & ~(unsigned)FLAGS_ALLOWED)
        return raise_errno(EINVAL);
    self = (Ring *)PyType_GenericAlloc(type, 0);
    if (!self)
        return NULL;
    /* Without this flag, a completion that the kernel has not posted yet would go unnoticed. */
    if (flags & IORING_SETUP_DEFER_TASKRUN)
        flags |= IORING_SETUP_TASKRUN_FLAG;
    self->pid = getpid();
    pthread_mutex_init(&self->lock, NULL);
    error = queue_open(&self->queue, (unsigned)entries, flags);
    if (error) {
        Py_DECREF(self);
        return raise_errno(error);
    }
    self->queue.in_background = in_background;
    self->open = true;
    self->taken = PyMem_Calloc(self->queue.capacity, sizeof(*self->taken));
    if (!self->taken) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void lent_release(Py_buffer *lent, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++)
        PyBuffer_Release(&lent[i]);
    PyMem_Free(lent);
}

/* Wait for the I/O in flight and release the kernel's side; return 0 or a positive errno. The lock
 * is held, the GIL is not. After a fork the I/O is the parent's, and is not waited for. */
static int ring_shut(Ring *self)
{
    bool own = getpid() == self->pid;
    int error = own ? queue_drain(&self->queue) : 0;

    if (error)
        return error;
    /* Exiting a ring releases its memory later, in the background; this does it now. */
    if (own && self->registered)
        io_uring_unregister_buffers(&self->queue.ring);
    queue_close(&self->queue);
    self->open = false;
    return 0;
}

/* In a forked child, the thread that held the mutex does not exist and cannot unlock it. */
static void ring_inherit(Ring *self)
{
    if (getpid() != self->pid)
        pthread_mutex_init(&self->lock, NULL);
}

static PyObject *ring_close(Ring *self, PyObject *Py_UNUSED(none))
{
    Py_buffer *lent = NULL;
    Py_ssize_t lent_count = 0;
    int error = 0;

    ring_inherit(self);
    ring_lock(self);
    if (self->open) {
        Py_BEGIN_ALLOW_THREADS
        error = ring_shut(self);
        Py_END_ALLOW_THREADS
    }
    if (!error) {
        lent = self->lent;
        lent_count = self->lent_count;
        self->lent = NULL;
        self->lent_count = 0;
    }
    ring_unlock(self);
    if (error)
        return raise_errno(error);
    lent_release(lent, lent_count);
    return Py_NewRef(Py_None);
}

static void ring_dealloc(Ring *self)
{
    int error = 0;

    if (self->open) {
        Py_BEGIN_ALLOW_THREADS
        error = ring_shut(self);
        Py_END_ALLOW_THREADS
    }
    /* The kernel may still write to the buffers, so they must never be released. */
    if (error)
        queue_close(&self->queue);
    else
        lent_release(self->lent, self->lent_count);
    queue_free(&self->queue);
    PyMem_Free(self->taken);
    pthread_mutex_destroy(&self->lock);
    instance_free((PyObject *)self);
}

static PyObject *ring_fileno(Ring *self, PyObject *Py_UNUSED(none))
{
    return self->open ? PyLong_FromLong(self->queue.eventfd) : ring_closed();
}

/* Hold every buffer of a sequence, or return NULL with an exception. */
static Py_buffer *buffers_hold(PyObject *sequence, Py_ssize_t count)
{
    Py_buffer *buffers = PyMem_Calloc((size_t)count, sizeof(*buffers));

    if (!buffers)
        return (Py_buffer *)PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PySequence_GetItem(sequence, i);
        int result = item ? PyObject_GetBuffer(item, &buffers[i], PyBUF_WRITABLE) : -1;

        Py_XDECREF(item);
        if (result < 0) {
            lent_release(buffers, i);
            return NULL;
        }
    }
    return buffers;
}

/* Register held buffers with the kernel; return 0 or a positive errno. Slow, as it pins memory. */
static int buffers_register(Ring *self, const Py_buffer *buffers, Py_ssize_t count)
{
    struct iovec *vectors = PyMem_Calloc((size_t)count, sizeof(*vectors));
    int error;

    if (!vectors)
        return ENOMEM;
    for (Py_ssize_t i = 0; i < count; i++) {
        vectors[i].iov_base = buffers[i].buf;
        vectors[i].iov_len = (size_t)buffers[i].len;
    }
    Py_BEGIN_ALLOW_THREADS
    error = -io_uring_register_buffers(&self->queue.ring, vectors, (unsigned)count);
    Py_END_ALLOW_THREADS
    PyMem_Free(vectors);
    return error;
}

/* Take over held buffers; the lock is held. Return false with an exception. */
static bool buffers_lend(Ring *self, Py_buffer *buffers, Py_ssize_t count, bool registered)
{
    int error;

    if (self->lent) {
        PyErr_SetString(PyExc_RuntimeError, "memory was lent already");
        return false;
    }
    error = registered ? buffers_register(self, buffers, count) : 0;
    if (error) {
        raise_errno(error);
        return false;
    }
    self->lent = buffers;
    self->lent_count = count;
    self->registered = registered;
    return true;
}

static PyObject *lend(Ring *self, struct value *values)
{
    Py_ssize_t count = PySequence_Size(values[0].object);
    Py_buffer *buffers;
    bool lent = false;

    if (count < 0)
        return NULL;
    if (count == 0 || count > INT32_MAX)
        return PyErr_Format(PyExc_ValueError, "%zd buffers cannot be lent", count);
    buffers = buffers_hold(values[0].object, count);
    if (!buffers)
        return NULL;
    if (ring_enter(self)) {
        lent = buffers_lend(self, buffers, count, values[1].integer);
        ring_unlock(self);
    }
    if (lent)
        return Py_NewRef(Py_None);
    lent_release(buffers, count);
    return NULL;
}

static CALL(ring_, lend, Ring, 2, OBJECT("buffers"), READ("register", read_flag))

/* Read file descriptors, or return NULL with an exception. */
static int *descriptors_read(PyObject *sequence, Py_ssize_t count)
{
    int *descriptors = PyMem_Calloc((size_t)count, sizeof(*descriptors));

    if (!descriptors)
        return (int *)PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PySequence_GetItem(sequence, i);
        int64_t descriptor = -1;
        int result = item ? integer_read(item, "fd", 0, INT32_MAX, &descriptor) : -1;

        Py_XDECREF(item);
        if (result < 0) {
            PyMem_Free(descriptors);
            return NULL;
        }
        descriptors[i] = (int)descriptor;
    }
    return descriptors;
}

static PyObject *ring_register_files(Ring *self, PyObject *sequence)
{
    Py_ssize_t count = PySequence_Size(sequence);
    PyObject *result = NULL;
    int *descriptors, error;

    if (count < 0)
        return NULL;
    if (count == 0 || count > INT32_MAX)
        return PyErr_Format(PyExc_ValueError, "%zd files cannot be registered", count);
    descriptors = descriptors_read(sequence, count);
    if (!descriptors)
        return NULL;
    if (ring_enter(self)) {
        if (self->file_count || self->socket_count) {
            PyErr_SetString(PyExc_RuntimeError, "files were registered already");
        } else {
            error = -io_uring_register_files(&self->queue.ring, descriptors, (unsigned)count);
            if (!error)
                self->file_count = count;
            result = error ? raise_errno(error) : Py_NewRef(Py_None);
        }
        ring_unlock(self);
    }
    PyMem_Free(descriptors);
    return result;
}

/* Register a table of `count` empty places. Return 0 or a positive errno. */
static int places_register(Ring *self, Py_ssize_t count)
{
    int *nothing = PyMem_Calloc((size_t)count, sizeof(*nothing));
    int error;

    if (!nothing)
        return ENOMEM;
    for (Py_ssize_t i = 0; i < count; i++)
        nothing[i] = -1;
    error = -io_uring_register_files(&self->queue.ring, nothing, (unsigned)count);
    PyMem_Free(nothing);
    return error;
}

static PyObject *reserve_sockets(Ring *self, struct value *values)
{
    Py_ssize_t count = (Py_ssize_t)values[0].integer;
    PyObject *result = NULL;
    int error;

    if (!ring_enter(self))
        return NULL;
    if (self->file_count || self->socket_count) {
        PyErr_SetString(PyExc_RuntimeError, "files were registered already");
    } else {
        error = queue_check_sockets(&self->queue);
        if (!error)
            error = places_register(self, count);
        if (!error)
            self->socket_count = count;
        result = error ? raise_errno(error) : Py_NewRef(Py_None);
    }
    ring_unlock(self);
    return result;
}

static CALL(ring_, reserve_sockets, Ring, 1, INTEGER("count", 1, UINT16_MAX))

static PyObject *set_socket(Ring *self, struct value *values)
{
    Py_ssize_t place = (Py_ssize_t)values[0].integer;
    int fd = (int)values[1].integer, updated;
    PyObject *result;

    if (!ring_enter(self))
        return NULL;
    if (place >= self->socket_count) {
        raise_value("socket %zd: the ring has room for %zd", place, self->socket_count);
        result = NULL;
    } else if (queue_uses(&self->queue, (unsigned)place, SLOT_ANY)) {
        result = raise_errno(EBUSY);
    } else {
        updated = io_uring_register_files_update(&self->queue.ring, (unsigned)place, &fd, 1);
        result = updated == 1 ? Py_NewRef(Py_None) : raise_errno(updated < 0 ? -updated : EIO);
    }
    ring_unlock(self);
    return result;
}

static CALL(ring_, set_socket, Ring, 2, INTEGER("socket", 0, INT32_MAX),
            INTEGER("fd", -1, INT32_MAX))

static PyObject *ring_in_flight(Ring *self, void *Py_UNUSED(closure))
{
    unsigned in_flight;

    ring_inherit(self);
    ring_lock(self);
    in_flight = self->queue.running + self->queue.ended_count;
    ring_unlock(self);
    return PyLong_FromUnsignedLong(in_flight);
}

static PyGetSetDef ring_properties[] = {
    {"in_flight", (getter)ring_in_flight, NULL, "Extents submitted and not reaped.", NULL},
    {0},
};

static PyMemberDef ring_members[] = {
    {"capacity", T_UINT, offsetof(Ring, queue.capacity), READONLY,
     "The most extents that can be in flight."},
    {0},
};

static PyMethodDef ring_methods[] = {
    {"fileno", (PyCFunction)ring_fileno, METH_NOARGS,
     "fileno($self, /)\n--\n\nReturn the eventfd, readable while reap has something."},
    {"register_files", (PyCFunction)ring_register_files, METH_O,
     "register_files($self, fds, /)\n--\n\nRegister files; extents name them by their index."},
    {"reap", (PyCFunction)ring_reap, METH_NOARGS,
     "reap($self, /)\n--\n\nReturn (op_id, bytes moved or -errno) of all that ended."},
    {"close", (PyCFunction)ring_close, METH_NOARGS,
     "close($self, /)\n--\n\nWait for what is in flight, then release everything."},
    FAST("lend", ring_lend,
         "lend($self, buffers, register)\n--\n\nName the memory that I/O may touch."),
    FAST("submit", ring_submit,
         "submit($self, op_id, write, extents)\n--\n\nQueue I/O; return how many were accepted."),
    FAST("reserve_sockets", ring_reserve_sockets,
         "reserve_sockets($self, count)\n--\n\nMake room for sockets, instead of files."),
    FAST("set_socket", ring_set_socket,
         "set_socket($self, socket, fd)\n--\n\nPut a socket in a place, or none (fd -1)."),
    FAST("stream", ring_stream,
         "stream($self, op_id, write, socket, extents)\n--\n\n"
         "Queue one move of a socket; return whether it was accepted."),
    FAST("nop", ring_nop,
         "nop($self, op_id, count)\n--\n\nQueue empty operations; return how many were accepted."),
    {NULL, NULL, 0, NULL},
};

static PyType_Slot ring_slots[] = {
    {Py_tp_doc, "Ring(entries, flags=0, in_background=False)\n--\n\n"
                "An io_uring whose completions are announced on an eventfd."},
    {Py_tp_new, ring_new},
    {Py_tp_dealloc, ring_dealloc},
    {Py_tp_methods, ring_methods},
    {Py_tp_getset, ring_properties},
    {Py_tp_members, ring_members},
    {0, NULL},
};

PyType_Spec ring_spec = {
    .name = "flexkv._ext.Ring",
    .basicsize = sizeof(Ring),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = ring_slots,
};
