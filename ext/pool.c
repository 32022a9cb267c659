/* CopyPool: the Python interface of pool_threads. */
#include "page_map.h"
#include "pool_threads.h"

#include <unistd.h>

typedef struct {
    PyObject_HEAD
    struct pool pool;
    bool open; /* pool_open succeeded */
} CopyPool;

static PyObject *pool_closed(void)
{
    PyErr_SetString(PyExc_RuntimeError, "the pool is closed");
    return NULL;
}

static PyObject *copy_pool_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"threads", NULL};
    int threads, error;
    CopyPool *self;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "i:CopyPool", names, &threads))
        return NULL;
    if (threads < 1 || threads > POOL_THREADS_MAX)
        return PyErr_Format(PyExc_ValueError, "threads=%d is outside 1..%d", threads,
                            POOL_THREADS_MAX);
    self = (CopyPool *)PyType_GenericAlloc(type, 0);
    if (!self)
        return NULL;
    error = pool_open(&self->pool, threads);
    if (error) {
        Py_DECREF(self);
        return raise_errno(error);
    }
    self->open = true;
    return (PyObject *)self;
}

/* Release a job that pool_reap returned, or that was never submitted. */
static void job_free(struct pool_job *job)
{
    Py_XDECREF((PyObject *)job->owner);
    PyMem_Free(job);
}

static PyObject *copy_pool_close(CopyPool *self, PyObject *Py_UNUSED(none))
{
    /* After a fork the threads are in the parent only: there is nothing to join. */
    if (getpid() == self->pool.pid) {
        Py_BEGIN_ALLOW_THREADS
        pool_close(&self->pool);
        Py_END_ALLOW_THREADS
    }
    return Py_NewRef(Py_None);
}

static void copy_pool_dealloc(CopyPool *self)
{
    if (self->open && getpid() == self->pool.pid) {
        Py_BEGIN_ALLOW_THREADS
        pool_close(&self->pool);
        Py_END_ALLOW_THREADS
        for (struct pool_job *job = pool_reap(&self->pool), *next; job; job = next) {
            next = job->next;
            job_free(job);
        }
        pthread_cond_destroy(&self->pool.ended);
        pthread_cond_destroy(&self->pool.work);
        pthread_mutex_destroy(&self->pool.lock);
    }
    instance_free((PyObject *)self);
}

static PyObject *copy_pool_fileno(CopyPool *self, PyObject *Py_UNUSED(none))
{
    if (self->pool.eventfd < 0)
        return pool_closed();
    return PyLong_FromLong(self->pool.eventfd);
}

/* Make a job from held ids, or return NULL with an exception. */
static struct pool_job *job_new(PageMap *map, const struct page_ids *ids, int64_t op_id,
                                int64_t direction)
{
    size_t pairs = (size_t)ids->device.count;
    struct pool_job *job = PyMem_Calloc(1, sizeof(*job) + 2 * pairs * sizeof(int64_t));
    int64_t *host_ids = (int64_t *)(job + 1), *device_ids = host_ids + pairs;

    if (!job) {
        PyErr_NoMemory();
        return NULL;
    }
    if (page_ids_copy(map, ids, direction == CHECKSUM ? NULL : device_ids, host_ids) < 0) {
        PyMem_Free(job);
        return NULL;
    }
    job->work = (struct copy_work){&map->layout, (enum direction)direction, ids->bytes, device_ids,
                                   host_ids};
    sums_begin(&job->work);
    job->op_id = op_id;
    job->owner = Py_NewRef((PyObject *)map);
    return job;
}

/* Queue a job unless it is NULL; the pool owns it then. */
static PyObject *job_start(CopyPool *self, struct pool_job *job, bool urgent)
{
    if (!job)
        return NULL;
    if (pool_submit(&self->pool, job, urgent))
        return Py_NewRef(Py_None);
    job_free(job);
    return pool_closed();
}

static const struct ext_state *pool_state(CopyPool *self)
{
    return PyType_GetModuleState(Py_TYPE((PyObject *)self));
}

static PyObject *copy_pool_submit(CopyPool *self, PyObject *const *args, Py_ssize_t count,
                                  PyObject *keywords)
{
    static const char *const names[] = {"op_id",      "pages",    "direction",
                                        "device_ids", "host_ids", "urgent"};
    static const struct signature signature = {"submit", names, 6, 6};
    PageMap *pages;
    PyObject *values[6];
    int64_t op_id, direction;
    struct page_ids ids;
    struct pool_job *job;
    int urgent;

    if (args_unpack(&signature, args, count, keywords, values) < 0 ||
        integer_read(values[0], "op_id", INT64_MIN, INT64_MAX, &op_id) < 0)
        return NULL;
    urgent = PyObject_IsTrue(values[5]);
    if (urgent < 0 || !(pages = page_job_read(pool_state(self), values + 1, &direction, &ids)))
        return NULL;
    job = job_new(pages, &ids, op_id, direction);
    page_ids_release(&ids);
    return job_start(self, job, urgent);
}

static PyObject *copy_pool_checksum(CopyPool *self, PyObject *const *args, Py_ssize_t count,
                                    PyObject *keywords)
{
    static const char *const names[] = {"op_id", "pages", "host_ids", "urgent"};
    static const struct signature signature = {"checksum", names, 4, 4};
    PageMap *pages;
    PyObject *values[4];
    struct page_ids ids;
    struct pool_job *job;
    int64_t op_id;
    int urgent;

    if (args_unpack(&signature, args, count, keywords, values) < 0 ||
        integer_read(values[0], "op_id", INT64_MIN, INT64_MAX, &op_id) < 0)
        return NULL;
    if (!(pages = page_map_read(pool_state(self), values[1])))
        return NULL;
    if (!pages->layout.sums) {
        PyErr_SetString(PyExc_ValueError, "the PageMap was made without sums");
        return NULL;
    }
    urgent = PyObject_IsTrue(values[3]);
    if (urgent < 0 || page_ids_hold(pages, values[2], values[2], &ids) < 0)
        return NULL;
    job = job_new(pages, &ids, op_id, CHECKSUM);
    page_ids_release(&ids);
    return job_start(self, job, urgent);
}

static PyObject *copy_pool_reap(CopyPool *self, PyObject *Py_UNUSED(none))
{
    PyObject *op_ids = PyList_New(0);
    struct pool_job *job = op_ids ? pool_reap(&self->pool) : NULL;

    while (job) {
        struct pool_job *next = job->next;
        PyObject *op_id = PyLong_FromLongLong(job->op_id);

        if (op_ids && (!op_id || PyList_Append(op_ids, op_id) < 0))
            Py_CLEAR(op_ids);
        Py_XDECREF(op_id);
        job_free(job);
        job = next;
    }
    return op_ids;
}

/* Copy one run as a job of one block of one piece. Return false if the pool closes. */
static bool run_copy(struct pool *pool, const Py_buffer *target, const Py_buffer *source)
{
    static const int64_t zero = 0;
    size_t bytes = (size_t)target->len;
    struct piece piece = {.base = source->buf, .bytes = bytes};
    struct layout layout = {.pieces = &piece,
                            .piece_count = 1,
                            .block_bytes = bytes,
                            .device_blocks = 1,
                            .host = target->buf,
                            .host_stride = bytes,
                            .host_blocks = 1};
    struct pool_job job = {.work = {&layout, TO_HOST, bytes, &zero, &zero}};

    return pool_run(pool, &job);
}

static PyObject *copy_pool_copy(CopyPool *self, PyObject *const *args, Py_ssize_t count,
                                PyObject *keywords)
{
    static const char *const names[] = {"target", "source"};
    static const struct signature signature = {"copy", names, 2, 2};
    PyObject *values[2], *result = NULL;
    Py_buffer target, source;

    if (args_unpack(&signature, args, count, keywords, values) < 0 ||
        PyObject_GetBuffer(values[0], &target, PyBUF_WRITABLE) < 0)
        return NULL;
    if (PyObject_GetBuffer(values[1], &source, PyBUF_SIMPLE) < 0) {
        PyBuffer_Release(&target);
        return NULL;
    }
    if (target.len != source.len) {
        PyErr_Format(PyExc_ValueError, "target has %zd bytes, source %zd", target.len, source.len);
    } else if ((char *)target.buf < (char *)source.buf + source.len &&
               (char *)source.buf < (char *)target.buf + target.len) {
        PyErr_SetString(PyExc_ValueError, "target and source overlap");
    } else {
        bool copied;

        Py_BEGIN_ALLOW_THREADS
        copied = run_copy(&self->pool, &target, &source);
        Py_END_ALLOW_THREADS
        result = copied ? Py_NewRef(Py_None) : pool_closed();
    }
    PyBuffer_Release(&source);
    PyBuffer_Release(&target);
    return result;
}

static PyObject *copy_pool_in_flight(CopyPool *self, void *Py_UNUSED(closure))
{
    return PyLong_FromSize_t(self->pool.in_flight);
}

static PyGetSetDef copy_pool_properties[] = {
    {"in_flight", (getter)copy_pool_in_flight, NULL, "Jobs submitted and not reaped.", NULL},
    {0},
};

#define FAST(function) ((PyCFunction)(void (*)(void))(function))

static PyMethodDef copy_pool_methods[] = {
    {"fileno", (PyCFunction)copy_pool_fileno, METH_NOARGS,
     "fileno()\n--\n\nReturn an eventfd, readable while reap has something."},
    {"submit", FAST(copy_pool_submit), METH_FASTCALL | METH_KEYWORDS,
     "submit(op_id, pages, direction, device_ids, host_ids, urgent)\n--\n\nQueue one job."},
    {"checksum", FAST(copy_pool_checksum), METH_FASTCALL | METH_KEYWORDS,
     "checksum(op_id, pages, host_ids, urgent)\n--\n\nQueue the sums of host blocks."},
    {"reap", (PyCFunction)copy_pool_reap, METH_NOARGS,
     "reap()\n--\n\nReturn the op_ids of the jobs that ended since the last call."},
    {"copy", FAST(copy_pool_copy), METH_FASTCALL | METH_KEYWORDS,
     "copy(target, source)\n--\n\nCopy bytes with all threads and non-temporal stores."},
    {"close", (PyCFunction)copy_pool_close, METH_NOARGS,
     "close()\n--\n\nFinish what is queued, join the threads, close the eventfd."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot copy_pool_slots[] = {
    {Py_tp_doc, "CopyPool(threads)\n--\n\n"
                "Standing threads that copy between device pages and host blocks."},
    {Py_tp_new, copy_pool_new},
    {Py_tp_dealloc, copy_pool_dealloc},
    {Py_tp_methods, copy_pool_methods},
    {Py_tp_getset, copy_pool_properties},
    {0, NULL},
};

PyType_Spec copy_pool_spec = {
    .name = "flexkv._ext.CopyPool",
    .basicsize = sizeof(CopyPool),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = copy_pool_slots,
};
