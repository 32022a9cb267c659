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

/* Return the count of an id; NULL with ValueError if it is not from 0 to n - 1. */
static uint32_t *count_of(const struct value *values, Py_ssize_t i)
{
    Py_ssize_t count = values[0].view.buffer.len / (Py_ssize_t)sizeof(uint32_t);
    int64_t id = int64_at(&values[1].view, i);

    if (id >= 0 && id < count)
        return (uint32_t *)values[0].view.buffer.buf + id;
    PyErr_Format(PyExc_ValueError, "ids[%zd]=%lld is outside 0..%zd", i, (long long)id, count - 1);
    return NULL;
}

static PyObject *change_counts(PyObject *Py_UNUSED(module), struct value *values)
{
    Py_ssize_t crossed = 0, ids = values[1].view.count;

    for (Py_ssize_t i = 0; i < ids; i++) /* all of them are checked before one is changed */
        if (!count_of(values, i))
            return NULL;
    for (Py_ssize_t i = 0; i < ids; i++) {
        uint32_t *item = count_of(values, i), before = *item;

        *item = before + (uint32_t)values[2].integer;
        crossed += !before != !*item;
    }
    return PyLong_FromSsize_t(crossed);
}

CALL(counts_, change_counts, PyObject, 3, READ("counts", read_counts), READ("ids", read_int64s),
     INTEGER("by", -1, 1))

static PyObject *any_counted(PyObject *Py_UNUSED(module), struct value *values)
{
    bool found = false;

    for (Py_ssize_t i = 0; i < values[1].view.count; i++) {
        const uint32_t *item = count_of(values, i);

        if (!item)
            return NULL;
        found |= *item != 0;
    }
    return PyBool_FromLong(found);
}

CALL(counts_, any_counted, PyObject, 2, READ("counts", read_counts), READ("ids", read_int64s))
