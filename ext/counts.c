/* Use counts of many numbered things; a few are changed or read at a time.
 *
 * numpy needs several calls for this, and tens of microseconds when caches are cold. */
#include "ext.h"

/* Read counts: uint32[n], writable. */
static int read_counts(PyObject *Py_UNUSED(self), const struct parameter *Py_UNUSED(parameter),
                       struct value *value)
{
    Py_buffer *buffer = &value->view.buffer;

    if (PyObject_GetBuffer(value->object, buffer, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE) < 0)
        return -1;
    if (buffer->itemsize == sizeof(uint32_t))
        return 0;
    PyErr_SetString(PyExc_TypeError, "counts must be 4-byte integers");
    return -1;
}

/* Return the counts, after a check that each id is one of them; NULL with ValueError. */
static uint32_t *counts_of(const struct value *values)
{
    Py_ssize_t count = values[0].view.buffer.len / (Py_ssize_t)sizeof(uint32_t);

    return int64_range_check(&values[1].view, "ids", 0, count) < 0 ? NULL
                                                                   : values[0].view.buffer.buf;
}

static PyObject *change_counts(PyObject *Py_UNUSED(module), struct value *values)
{
    uint32_t *counts = counts_of(values);
    Py_ssize_t crossed = 0;

    if (!counts)
        return NULL;
    for (Py_ssize_t i = 0; i < values[1].view.count; i++) {
        uint32_t *item = &counts[int64_at(&values[1].view, i)], before = *item;

        *item = before + (uint32_t)values[2].integer;
        crossed += !before != !*item;
    }
    return PyLong_FromSsize_t(crossed);
}

CALL(counts_, change_counts, PyObject, 3, READ("counts", read_counts), READ("ids", read_int64s),
     INTEGER("by", -1, 1))

static PyObject *any_counted(PyObject *Py_UNUSED(module), struct value *values)
{
    const uint32_t *counts = counts_of(values);
    bool found = false;

    if (!counts)
        return NULL;
    for (Py_ssize_t i = 0; i < values[1].view.count && !found; i++)
        found = counts[int64_at(&values[1].view, i)];
    return PyBool_FromLong(found);
}

CALL(counts_, any_counted, PyObject, 2, READ("counts", read_counts), READ("ids", read_int64s))
