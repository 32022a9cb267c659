/* What the files of the extension share: argument helpers, module state, types.
 *
 * Some files know Python (module, args, keys, page_map, pool, ring); others do not and run without
 * the GIL (moves, copies, pool_threads, ring_queue). The others must not include this file.
 */
#ifndef FLEXKV_EXT_H
#define FLEXKV_EXT_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Work on more bytes than this releases the GIL. Giving the GIL away costs up to one switch
 * interval (5 ms) when another thread wants it, so short work keeps it. */
#define GIL_HOLD_BYTES_MAX ((size_t)256 << 10)

struct ext_state {
    PyTypeObject *page_map;
    PyTypeObject *copy_pool;
    PyTypeObject *ring;
    PyTypeObject *block_index;
};

/* The parameters of one METH_FASTCALL | METH_KEYWORDS function. */
struct signature {
    const char *function;
    const char *const *names;
    int required;
    int count;
};

/* A held int64[n] buffer. The memory may be unaligned, so items are loaded with int64_at. */
struct int64_view {
    Py_buffer buffer;
    Py_ssize_t count;
};

static inline int64_t int64_load(const void *items, Py_ssize_t index)
{
    int64_t item;

    memcpy(&item, (const char *)items + index * (Py_ssize_t)sizeof(item), sizeof(item));
    return item;
}

static inline int64_t int64_at(const struct int64_view *view, Py_ssize_t index)
{
    return int64_load(view->buffer.buf, index);
}

/* Fill values[] by position and keyword; a missing optional is NULL. Return 0, or -1 with
 * TypeError. */
int args_unpack(const struct signature *signature, PyObject *const *args, Py_ssize_t count,
                PyObject *keywords, PyObject **values);

/* Hold a C-contiguous buffer of 8-byte integers. Return 0, or -1 with an exception. */
int int64_view_hold(PyObject *object, const char *name, struct int64_view *view);

/* Hold a C-contiguous buffer of rows of four int64; count is the number of rows. */
int int64_rows_hold(PyObject *object, const char *name, struct int64_view *view);

/* Read an integer in [low, high]. Return 0, or -1 with TypeError or ValueError. */
int integer_read(PyObject *object, const char *name, int64_t low, int64_t high, int64_t *value);

/* Raise OSError with this (positive) errno; return NULL. */
PyObject *raise_errno(int error);

/* Free an instance of a heap type, whose content is freed already. */
void instance_free(PyObject *self);

PyObject *keys_hash128(PyObject *, PyObject *const *, Py_ssize_t, PyObject *);
PyObject *keys_chain(PyObject *, PyObject *const *, Py_ssize_t, PyObject *);
PyObject *keys_pack_int64(PyObject *, PyObject *const *, Py_ssize_t, PyObject *);
PyObject *keys_block_slots(PyObject *, PyObject *const *, Py_ssize_t, PyObject *);
PyObject *counts_change(PyObject *, PyObject *const *, Py_ssize_t, PyObject *);
PyObject *counts_any(PyObject *, PyObject *const *, Py_ssize_t, PyObject *);
PyObject *page_map_copy_now(PyObject *, PyObject *const *, Py_ssize_t, PyObject *);
PyObject *page_map_list_runs(PyObject *, PyObject *const *, Py_ssize_t, PyObject *);
PyObject *notify_address(PyObject *, PyObject *);

extern PyType_Spec page_map_spec;
extern PyType_Spec copy_pool_spec;
extern PyType_Spec ring_spec;
extern PyType_Spec block_index_spec;

#endif
