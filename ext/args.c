/* Argument helpers: keywords for FASTCALL functions, integer buffers, errno. */
#include "ext.h"

#include <errno.h>

static int name_index(const struct signature *signature, PyObject *keyword)
{
    for (int i = 0; i < signature->count; i++)
        if (PyUnicode_CompareWithASCIIString(keyword, signature->names[i]) == 0)
            return i;
    return -1;
}

int args_unpack(const struct signature *signature, PyObject *const *args, Py_ssize_t count,
                PyObject *keywords, PyObject **values)
{
    Py_ssize_t keyword_count = keywords ? PyTuple_Size(keywords) : 0;

    if (count > signature->count) {
        PyErr_Format(PyExc_TypeError, "%s() takes at most %d arguments (%zd given)",
                     signature->function, signature->count, count);
        return -1;
    }
    for (int i = 0; i < signature->count; i++)
        values[i] = i < count ? args[i] : NULL;
    for (Py_ssize_t k = 0; k < keyword_count; k++) {
        PyObject *keyword = PyTuple_GetItem(keywords, k);
        int index = name_index(signature, keyword);

        if (index < 0 || values[index]) {
            PyErr_Format(PyExc_TypeError, "%s() got %s argument '%U'", signature->function,
                         index < 0 ? "an unexpected" : "two values for", keyword);
            return -1;
        }
        values[index] = args[count + k];
    }
    for (int i = 0; i < signature->required; i++)
        if (!values[i]) {
            PyErr_Format(PyExc_TypeError, "%s() is missing the argument '%s'", signature->function,
                         signature->names[i]);
            return -1;
        }
    return 0;
}

static bool is_int64(const Py_buffer *buffer)
{
    const char *format = buffer->format;

    if (buffer->itemsize != 8)
        return false;
    if (!format)
        return true;
    if (*format == '@' || *format == '=' || *format == (PY_BIG_ENDIAN ? '>' : '<'))
        format++;
    return *format && strchr("qlQL", *format) && !format[1];
}

int int64_view_hold(PyObject *object, const char *name, struct int64_view *view)
{
    if (PyObject_GetBuffer(object, &view->buffer, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) < 0)
        return -1;
    if (!is_int64(&view->buffer)) {
        PyErr_Format(PyExc_TypeError, "%s must be 8-byte integers, not format '%s'", name,
                     view->buffer.format ? view->buffer.format : "B");
        PyBuffer_Release(&view->buffer);
        return -1;
    }
    view->count = view->buffer.len / 8;
    return 0;
}

int int64_rows_hold(PyObject *object, const char *name, struct int64_view *view)
{
    if (int64_view_hold(object, name, view) < 0)
        return -1;
    if (view->count % 4 || (view->buffer.ndim == 2 && view->buffer.shape[1] != 4)) {
        PyErr_Format(PyExc_ValueError, "%s must be rows of four integers", name);
        PyBuffer_Release(&view->buffer);
        return -1;
    }
    view->count /= 4;
    return 0;
}

int integer_read(PyObject *object, const char *name, int64_t low, int64_t high, int64_t *value)
{
    *value = PyLong_AsLongLong(object);
    if (*value == -1 && PyErr_Occurred()) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError))
            return -1;
        PyErr_Clear();
    } else if (*value >= low && *value <= high) {
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "%s=%R is outside %lld..%lld", name, object, (long long)low,
                 (long long)high);
    return -1;
}

PyObject *raise_errno(int error)
{
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

void instance_free(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

    release(self);
    Py_DECREF(type);
}
