/* A job as a list of byte runs, for copy engines that take addresses; and the C function by which a
 * foreign thread notifies an event loop. Neither touches the memory at those addresses. */
#include "page_map.h"

#include <sys/eventfd.h>

struct run_list {
    uint64_t *targets, *sources, *sizes;
    size_t count;
};

/* Append a run, or extend the last one if both its source and its target continue there. */
static void run_append(struct run_list *runs, uint64_t target, uint64_t source, uint64_t bytes)
{
    size_t last = runs->count - 1;

    if (runs->count > 0 && runs->targets[last] + runs->sizes[last] == target &&
        runs->sources[last] + runs->sizes[last] == source) {
        runs->sizes[last] += bytes;
        return;
    }
    runs->targets[runs->count] = target;
    runs->sources[runs->count] = source;
    runs->sizes[runs->count++] = bytes;
}

static void runs_list(const struct copy_work *work, struct run_list *runs)
{
    const struct layout *layout = work->layout;

    for (size_t pair = 0; pair < work->bytes / layout->block_bytes; pair++)
        for (size_t index = 0; index < layout->piece_count; index++) {
            const struct piece *piece = &layout->pieces[index];
            uint64_t device = (uintptr_t)piece->base + work->device_ids[pair] * piece->stride;
            uint64_t host = (uintptr_t)layout->host + work->host_ids[pair] * layout->host_stride +
                            piece->offset;

            if (work->direction == TO_HOST)
                run_append(runs, host, device, piece->bytes);
            else
                run_append(runs, device, host, piece->bytes);
        }
}

static PyObject *list_runs(PyObject *Py_UNUSED(module), struct value *values)
{
    const struct layout *layout = &((PageMap *)values[0].object)->layout;
    const Py_buffer *out = &values[4].view.buffer;
    size_t most = (size_t)values[2].view.count * layout->piece_count;
    size_t part = (size_t)out->len / 3 / sizeof(uint64_t);
    uint64_t *first = out->buf;
    struct run_list runs = {first, first + part, first + 2 * part, 0};
    struct copy_work work;
    int64_t *ids;

    if ((size_t)out->len != 3 * part * sizeof(uint64_t) || part < most ||
        (uintptr_t)out->buf % sizeof(uint64_t) != 0)
        return PyErr_Format(PyExc_ValueError, "out has %zd bytes, not three times %zu or more",
                            out->len, most * sizeof(uint64_t));
    ids = page_work_new(values, &work);
    if (!ids)
        return NULL;
    runs_list(&work, &runs);
    PyMem_Free(ids);
    return PyLong_FromSize_t(runs.count);
}

CALL(pages_, list_runs, PyObject, 5, PAGE_JOB, READ("out", read_writable))

/* The function that a foreign thread calls; `eventfd` is the descriptor itself. */
static void eventfd_notify(void *eventfd)
{
    eventfd_write((int)(intptr_t)eventfd, 1);
}

PyObject *notify_address(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return PyLong_FromVoidPtr((void *)(uintptr_t)eventfd_notify);
}
