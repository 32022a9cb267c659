/* What the files of the extension share: argument helpers, module state, types.
 *
 * Some files know Python (module, args, keys, page_map, pool, ring); others do not and run without
 * the GIL (moves, copies, pool_threads, ring_queue). The others must not include this file.
 */
#ifndef FLEXKV_EXT_H
#define FLEXKV_EXT_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Work on more bytes than this releases the GIL. Giving the GIL away costs up to one switch
 * interval (5 ms) when another thread wants it, so short work keeps it. */
#define GIL_HOLD_BYTES_MAX ((size_t)256 << 10)

struct ext_state {
    PyTypeObject *page_map;
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

/* What a call was given for one of its parameters. */
struct value {
    PyObject *object; /* borrowed; NULL if the argument was left out */
    int64_t integer;
    struct int64_view view; /* held until the call ends, if view.buffer.obj is set */
};

/* A parameter: its name, and how its argument is read. Reading returns 0, or -1 with an exception.
 * An argument without `read` is taken as it is. */
struct parameter {
    const char *name;
    int (*read)(PyObject *self, const struct parameter *parameter, struct value *value);
    int64_t low, high; /* bounds of an integer */
};

/* The parameters of one METH_FASTCALL | METH_KEYWORDS function. */
struct signature {
    const char *function;
    const struct parameter *parameters;
    int required;
    int count;
};

#define OBJECT(text) {.name = (text), .read = NULL}
#define READ(text, reader) {.name = (text), .read = (reader)}
#define INTEGER(text, least, most)                                                                 \
    {.name = (text), .read = read_integer, .low = (least), .high = (most)}

int read_integer(PyObject *self, const struct parameter *parameter, struct value *value);
int read_flag(PyObject *self, const struct parameter *parameter, struct value *value);
int read_bytes(PyObject *self, const struct parameter *parameter, struct value *value);
int read_writable(PyObject *self, const struct parameter *parameter, struct value *value);
/* C-contiguous buffers of 8-byte integers: any, aligned ones, and rows of four of them, whose
 * `count` is the number of rows. */
int read_int64s(PyObject *self, const struct parameter *parameter, struct value *value);
int read_aligned(PyObject *self, const struct parameter *parameter, struct value *value);
int read_rows(PyObject *self, const struct parameter *parameter, struct value *value);

/* Fill values[] by position and keyword, and read each. Return 0, or -1 with an exception. */
int args_read(const struct signature *signature, PyObject *self, PyObject *const *args,
              Py_ssize_t count, PyObject *keywords, struct value *values);

/* Release the buffers that the values hold. */
void args_release(const struct signature *signature, struct value *values);

typedef PyObject *fast_call(PyObject *, PyObject *const *, Py_ssize_t, PyObject *);

/* Define `prefix##work`, a function for Python that reads its arguments, calls work(self, values),
 * and releases what the arguments hold. The parameters follow; the first `needed` are required. */
#define CALL(prefix, work, type, needed, ...)                                                      \
    CALL_NAMED(prefix##work, #work, work, type, needed, __VA_ARGS__)

#define CALL_NAMED(function, text, work, type, needed, ...)                                        \
    PyObject *function(PyObject *self, PyObject *const *args, Py_ssize_t count,                    \
                       PyObject *keywords)                                                         \
    {                                                                                              \
        static const struct parameter parameters[] = {__VA_ARGS__};                                \
        enum { COUNT = sizeof(parameters) / sizeof(*parameters) };                                 \
        static const struct signature signature = {text, parameters, needed, COUNT};               \
        struct value values[COUNT];                                                                \
        PyObject *result = NULL;                                                                   \
                                                                                                   \
        if (args_read(&signature, self, args, count, keywords, values) == 0)                       \
            result = work((type *)self, values);                                                   \
        args_release(&signature, values);                                                          \
        return result;                                                                             \
    }

/* An entry in a table of methods, for a function that CALL has defined. */
#define FAST(name, function, doc)                                                                  \
    {name, (PyCFunction)(void (*)(void))(function), METH_FASTCALL | METH_KEYWORDS, doc}

/* Read an integer in [low, high]. Return 0, or -1 with TypeError or ValueError. */
int integer_read(PyObject *object, const char *name, int64_t low, int64_t high, int64_t *value);

/* Hold a C-contiguous buffer of rows of four int64; count is the number of rows. */
int int64_rows_hold(PyObject *object, const char *name, struct int64_view *view);

/* Raise OSError with this (positive) errno; return NULL. */
PyObject *raise_errno(int error);

/* Raise ValueError with a message; return -1. */
int raise_value(const char *format, ...);

/* Check that numbers are from `least` to `most` - 1. Return 0, or -1 with ValueError. */
int int64_range_check(const struct int64_view *view, const char *name, int64_t least, int64_t most);

/* Raise ValueError with these details, unless they are NULL with an exception; return -1. */
int raise_details(PyObject *details);

/* Release the GIL until gil_return, if that is worth it. */
static inline PyThreadState *gil_leave(bool is_worth)
{
    return is_worth ? PyEval_SaveThread() : NULL;
}

static inline void gil_return(PyThreadState *saved)
{
    if (saved)
        PyEval_RestoreThread(saved);
}

/* Free an instance of a heap type, whose content is freed already. */
void instance_free(PyObject *self);

/* Write the canonical XXH3-128 of some bytes: 16 bytes. */
void keys_digest(const void *data, size_t bytes, uint64_t seed, unsigned char *digest);

fast_call keys_hash128, keys_chain_keys, keys_pack_int64, keys_block_slots;
fast_call counts_change_counts, counts_any_counted;
fast_call needs_needed;
fast_call pages_copy_now, pages_list_runs;
PyObject *notify_address(PyObject *, PyObject *);

extern PyType_Spec page_map_spec;
extern PyType_Spec copy_pool_spec;
extern PyType_Spec ring_spec;
extern PyType_Spec block_index_spec;
extern PyType_Spec hints_spec;

#endif
