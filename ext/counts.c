/* Use counts of many numbered things; a few are changed or read at a time.
 *
 * numpy needs several calls for this, and tens of microseconds when caches are cold. */
#include "ext.h"

struct counts {
    Py_buffer buffer;
    uint32_t *items;
    Py_ssize_t count;
};

/* Hold counts (uint32[n], writable) and ids (int64[k]), which must be from 0 to n - 1. Return 0, or
 * -1 with an exception and nothing held. */
static int counts_hold(PyObject *const *values, struct counts *counts, struct int64_view *ids)
{
    if (PyObject_GetBuffer(values[0], &counts->buffer, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE) < 0)
        return -1;
    if (counts->buffer.itemsize != sizeof(uint32_t)) {
        PyErr_SetString(PyExc_TypeError, "counts must be 4-byte integers");
        PyBuffer_Release(&counts->buffer);
        return -1;
    }
    counts->items = counts->buffer.buf;
    counts->count = counts->buffer.len / (Py_ssize_t)sizeof(uint32_t);
    if (int64_view_hold(values[1], "ids", ids) < 0) {
        PyBuffer_Release(&counts->buffer);
        return -1;
    }
    for (Py_ssize_t i = 0; i < ids->count; i++) {
        int64_t id = int64_at(ids, i);

        if (id < 0 || id >= counts->count) {
            PyErr_Format(PyExc_ValueError, "ids[%zd]=%lld is outside 0..%zd", i, (long long)id,
                         counts->count - 1);
            PyBuffer_Release(&ids->buffer);
            PyBuffer_Release(&counts->buffer);
            return -1;
        }
    }
    return 0;
}

static void counts_release(struct counts *counts, struct int64_view *ids)
{
    PyBuffer_Release(&ids->buffer);
    PyBuffer_Release(&counts->buffer);
}

PyObject *counts_change(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count,
                        PyObject *keywords)
{
    static const char *const names[] = {"counts", "ids", "by"};
    static const struct signature signature = {"change_counts", names, 3, 3};
    PyObject *values[3];
    struct counts counts;
    struct int64_view ids;
    int64_t by;
    Py_ssize_t crossed = 0;

    if (args_unpack(&signature, args, count, keywords, values) < 0 ||
        integer_read(values[2], "by", -1, 1, &by) < 0 || counts_hold(values, &counts, &ids) < 0)
        return NULL;
    for (Py_ssize_t i = 0; i < ids.count; i++) {
        uint32_t *item = &counts.items[int64_at(&ids, i)], before = *item;

        *item = before + (uint32_t)by;
        crossed += !before != !*item;
    }
    counts_release(&counts, &ids);
    return PyLong_FromSsize_t(crossed);
}

PyObject *counts_any(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count,
                     PyObject *keywords)
{
    static const char *const names[] = {"counts", "ids"};
    static const struct signature signature = {"any_counted", names, 2, 2};
    PyObject *values[2];
    struct counts counts;
    struct int64_view ids;
    bool found = false;

    if (args_unpack(&signature, args, count, keywords, values) < 0 ||
        counts_hold(values, &counts, &ids) < 0)
        return NULL;
    for (Py_ssize_t i = 0; i < ids.count && !found; i++)
        found = counts.items[int64_at(&ids, i)];
    counts_release(&counts, &ids);
    return PyBool_FromLong(found);
}
