/* The Python interface of the block index, which takes a few files: the type, and its calls. */
#ifndef FLEXKV_INDEX_H
#define FLEXKV_INDEX_H

#include "ext.h"

#include "index_core.h"

#define PATTERNS_MAX 81 /* 3 to the power of TIERS_MAX */

typedef struct {
    PyObject_HEAD
    struct block_index index;
    PyObject *broken_error; /* raised when a call breaks a law */
    ref *nodes;             /* scratch for one request, like `kinds` */
    uint8_t *kinds;
    size_t scratch;
    uint8_t nearest[PATTERNS_MAX]; /* a pattern reduced to its nearest usable tier */
} BlockIndex;

/* Which use a survey counts: that blocks are asked for, or that they are stored after that. */
enum use { USE_NONE, USE_ASKED, USE_STORED };

/* Raise an error that names the broken law; return NULL. */
PyObject *index_broken(BlockIndex *self, const char *law);

/* Hold the keys of a request, the root first, and check the range of positions. Return 0 or -1. */
int request_hold(PyObject *keys, PyObject *begin, PyObject *end, Py_buffer *buffer,
                 size_t range[2]);
int tier_read(const BlockIndex *self, PyObject *object, unsigned *tier);
/* Fill `nearest` for each pattern. */
void nearest_tell(BlockIndex *self);
int scratch_take(BlockIndex *self, size_t count);

PyObject *index_call_export(BlockIndex *, PyObject *);
PyObject *index_call_restore(BlockIndex *, PyObject *);
PyObject *index_call_lacking(BlockIndex *, PyObject *);
PyObject *index_call_watch(BlockIndex *, PyObject *);
PyObject *index_call_changes(BlockIndex *, PyObject *);
PyObject *index_survey(BlockIndex *, PyObject *const *, Py_ssize_t, PyObject *);
PyObject *index_call_reserve(BlockIndex *, PyObject *const *, Py_ssize_t, PyObject *);
PyObject *index_call_reserve_copies(BlockIndex *, PyObject *const *, Py_ssize_t, PyObject *);
PyObject *index_call_lease(BlockIndex *, PyObject *const *, Py_ssize_t, PyObject *);
PyObject *index_call_fillers(BlockIndex *, PyObject *const *, Py_ssize_t, PyObject *);
PyObject *index_call_pin(BlockIndex *, PyObject *const *, Py_ssize_t, PyObject *);
PyObject *index_call_unpin(BlockIndex *, PyObject *const *, Py_ssize_t, PyObject *);
PyObject *index_call_commit(BlockIndex *, PyObject *const *, Py_ssize_t, PyObject *);
PyObject *index_call_abort(BlockIndex *, PyObject *const *, Py_ssize_t, PyObject *);
PyObject *index_call_forget(BlockIndex *, PyObject *const *, Py_ssize_t, PyObject *);
PyObject *index_call_keys(BlockIndex *, PyObject *const *, Py_ssize_t, PyObject *);

#endif
