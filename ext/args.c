/* The arguments of FASTCALL functions, read by tables of parameters; errors. */
#include "ext.h"

#include <errno.h>

static int name_index(const struct signature *signature, PyObject *keyword)
{
    for (int i = 0; i < signature->count; i++)
        if (PyUnicode_CompareWithASCIIString(keyword, signature->parameters[i].name) == 0)
            return i;
    return -1;
}

/* Put the arguments where their parameters are. Return 0, or -1 with TypeError. */
static int args_place(const struct signature *signature, PyObject *const *args, Py_ssize_t count,
                      PyObject *keywords, struct value *values)
{
    Py_ssize_t keyword_count = keywords ? PyTuple_Size(keywords) : 0;

    for (int i = 0; i < signature->count; i++) {
        values[i].object = i < count ? args[i] : NULL;
        values[i].view.buffer.obj = NULL;
    }
    if (count > signature->count) {
        PyErr_Format(PyExc_TypeError, "%s() takes at most %d arguments (%zd given)",
                     signature->function, signature->count, count);
        return -1;
    }
    for (Py_ssize_t k = 0; k < keyword_count; k++) {
        PyObject *keyword = PyTuple_GetItem(keywords, k);
        int index = name_index(signature, keyword);

        if (index < 0 || values[index].object) {
            PyErr_Format(PyExc_TypeError, "%s() got %s argument '%U'", signature->function,
                         index < 0 ? "an unexpected" : "two values for", keyword);
            return -1;
        }
        values[index].object = args[count + k];
    }
    for (int i = 0; i < signature->required; i++)
        if (!values[i].object) {
            PyErr_Format(PyExc_TypeError, "%s() is missing the argument '%s'", signature->function,
                         signature->parameters[i].name);
            return -1;
        }
    return 0;
}

int args_read(const struct signature *signature, PyObject *self, PyObject *const *args,
              Py_ssize_t count, PyObject *keywords, struct value *values)
{
    if (args_place(signature, args, count, keywords, values) < 0)
        return -1;
    for (int i = 0; i < signature->count; i++) {
        const struct parameter *parameter = &signature->parameters[i];

        if (parameter->read && values[i].object && parameter->read(self, parameter, &values[i]) < 0)
            return -1;
    }
    return 0;
}

void args_release(const struct signature *signature, struct value *values)
{
    for (int i = 0; i < signature->count; i++)
        if (values[i].view.buffer.obj)
            PyBuffer_Release(&values[i].view.buffer);
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

static int int64_view_hold(PyObject *object, const char *name, struct int64_view *view)
{
    if (PyObject_GetBuffer(object, &view->buffer, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) < 0)
        return -1;
    view->count = view->buffer.len / 8;
    if (is_int64(&view->buffer))
        return 0;
    PyErr_Format(PyExc_TypeError, "%s must be 8-byte integers, not format '%s'", name,
                 view->buffer.format ? view->buffer.format : "B");
    PyBuffer_Release(&view->buffer);
    return -1;
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
    return raise_value("%s=%R is outside %lld..%lld", name, object, (long long)low,
                       (long long)high);
}

int read_integer(PyObject *Py_UNUSED(self), const struct parameter *parameter, struct value *value)
{
    return integer_read(value->object, parameter->name, parameter->low, parameter->high,
                        &value->integer);
}

int read_flag(PyObject *Py_UNUSED(self), const struct parameter *Py_UNUSED(parameter),
              struct value *value)
{
    value->integer = PyObject_IsTrue(value->object);
    return value->integer < 0 ? -1 : 0;
}

int read_bytes(PyObject *Py_UNUSED(self), const struct parameter *Py_UNUSED(parameter),
               struct value *value)
{
    return PyObject_GetBuffer(value->object, &value->view.buffer, PyBUF_SIMPLE);
}

int read_writable(PyObject *Py_UNUSED(self), const struct parameter *Py_UNUSED(parameter),
                  struct value *value)
{
    return PyObject_GetBuffer(value->object, &value->view.buffer, PyBUF_WRITABLE);
}

int read_int64s(PyObject *Py_UNUSED(self), const struct parameter *parameter, struct value *value)
{
    return int64_view_hold(value->object, parameter->name, &value->view);
}

int read_aligned(PyObject *self, const struct parameter *parameter, struct value *value)
{
    if (read_int64s(self, parameter, value) < 0)
        return -1;
    if ((uintptr_t)value->view.buffer.buf % sizeof(int64_t) == 0)
        return 0;
    return raise_value("%s must be aligned to 8 bytes", parameter->name);
}

int read_rows(PyObject *Py_UNUSED(self), const struct parameter *parameter, struct value *value)
{
    return int64_rows_hold(value->object, parameter->name, &value->view);
}

PyObject *raise_errno(int error)
{
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

int raise_value(const char *format, ...)
{
    va_list values;

    va_start(values, format);
    PyErr_FormatV(PyExc_ValueError, format, values);
    va_end(values);
    return -1;
}

int int64_range_check(const struct int64_view *view, const char *name, int64_t least, int64_t most)
{
    for (Py_ssize_t i = 0; i < view->count; i++) {
        int64_t number = int64_at(view, i);

        if (number < least || number >= most)
            return raise_value("%s[%zd]=%lld is outside %lld..%lld", name, i, (long long)number,
                               (long long)least, (long long)most - 1);
    }
    return 0;
}

int raise_details(PyObject *details)
{
    if (details)
        PyErr_SetObject(PyExc_ValueError, details);
    Py_XDECREF(details);
    return -1;
}

void instance_free(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

    release(self);
    Py_DECREF(type);
}
