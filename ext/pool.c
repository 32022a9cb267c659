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
    return PyErr_Format(PyExc_RuntimeError, "the pool is closed");
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

/* Queue a job of held ids; without device ids, it only makes sums. */
static PyObject *job_submit(CopyPool *self, int64_t op_id, PageMap *map, enum direction direction,
                            const struct int64_view *sides[2], bool urgent)
{
    size_t ids = 2 * (size_t)sides[1]->count * sizeof(int64_t);
    struct pool_job *job = PyMem_Calloc(1, sizeof(*job) + ids);

    if (!job)
        return PyErr_NoMemory();
    if (page_work_fill(map, direction, sides[0], sides[1], (int64_t *)(job + 1), &job->work) < 0) {
        PyMem_Free(job);
        return NULL;
    }
    sums_begin(&job->work);
    job->op_id = op_id;
    job->owner = Py_NewRef((PyObject *)map);
    if (pool_submit(&self->pool, job, urgent)) /* the pool owns it then */
        return Py_NewRef(Py_None);
    job_free(job);
    return pool_closed();
}

static PyObject *submit(CopyPool *self, struct value *values)
{
    const struct int64_view *sides[] = {&values[3].view, &values[4].view};

    return job_submit(self, values[0].integer, (PageMap *)values[1].object,
                      (enum direction)values[2].integer, sides, values[5].integer);
}

static CALL(copy_pool_, submit, CopyPool, 6, INTEGER("op_id", INT64_MIN, INT64_MAX), PAGE_JOB,
            READ("urgent", read_flag))

static PyObject *checksum(CopyPool *self, struct value *values)
{
    const struct int64_view *sides[] = {NULL, &values[2].view};
    PageMap *pages = (PageMap *)values[1].object;

    if (!pages->layout.sums)
        return PyErr_Format(PyExc_ValueError, "the PageMap was made without sums");
    return job_submit(self, values[0].integer, pages, CHECKSUM, sides, values[3].integer);
}

static CALL(copy_pool_, checksum, CopyPool, 4, INTEGER("op_id", INT64_MIN, INT64_MAX),
            READ("pages", read_pages), READ("host_ids", read_int64s), READ("urgent", read_flag))

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

static PyObject *copy(CopyPool *self, struct value *values)
{
    const Py_buffer *target = &values[0].view.buffer, *source = &values[1].view.buffer;
    bool copied;

    if (target->len != source->len)
        return PyErr_Format(PyExc_ValueError, "target has %zd bytes, source %zd", target->len,
                            source->len);
    if ((char *)target->buf < (char *)source->buf + source->len &&
        (char *)source->buf < (char *)target->buf + target->len)
        return PyErr_Format(PyExc_ValueError, "target and source overlap");
    Py_BEGIN_ALLOW_THREADS
    copied = run_copy(&self->pool, target, source);
    Py_END_ALLOW_THREADS
    return copied ? Py_NewRef(Py_None) : pool_closed();
}

static CALL(copy_pool_, copy, CopyPool, 2, READ("target", read_writable),
            READ("source", read_bytes))

static PyMemberDef copy_pool_members[] = {
    {"in_flight", T_PYSSIZET, offsetof(CopyPool, pool.in_flight), READONLY,
     "Jobs submitted and not reaped."},
    {0},
};

static PyMethodDef copy_pool_methods[] = {
    {"fileno", (PyCFunction)copy_pool_fileno, METH_NOARGS,
     "fileno()\n--\n\nReturn an eventfd, readable while reap has something."},
    {"reap", (PyCFunction)copy_pool_reap, METH_NOARGS,
     "reap()\n--\n\nReturn the op_ids of the jobs that ended since the last call."},
    {"close", (PyCFunction)copy_pool_close, METH_NOARGS,
     "close()\n--\n\nFinish what is queued, join the threads, close the eventfd."},
    FAST("submit", copy_pool_submit,
         "submit(op_id, pages, direction, device_ids, host_ids, urgent)\n--\n\nQueue one job."),
    FAST("checksum", copy_pool_checksum,
         "checksum(op_id, pages, host_ids, urgent)\n--\n\nQueue the sums of host blocks."),
    FAST("copy", copy_pool_copy,
         "copy(target, source)\n--\n\nCopy bytes with all threads and non-temporal stores."),
    {NULL, NULL, 0, NULL},
};

static PyType_Slot copy_pool_slots[] = {
    {Py_tp_doc, "CopyPool(threads)\n--\n\n"
                "Standing threads that copy between device pages and host blocks."},
    {Py_tp_new, copy_pool_new},
    {Py_tp_dealloc, copy_pool_dealloc},
    {Py_tp_methods, copy_pool_methods},
    {Py_tp_members, copy_pool_members},
    {0, NULL},
};

PyType_Spec copy_pool_spec = {
    .name = "flexkv._ext.CopyPool",
    .basicsize = sizeof(CopyPool),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = copy_pool_slots,
};
