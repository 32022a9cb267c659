/* The Python face of the block index, in a few files: the type, and its calls. */
#ifndef FLEXKV_INDEX_H
#define FLEXKV_INDEX_H

#include "ext.h"

#include "index_core.h"

#define PATTERNS_MAX 81 /* 3 to the power of TIERS_MAX */

typedef struct {
    PyObject_HEAD
    struct block_index index;
    PyObject *broken_error; /* raised when a call breaks a law */
    ref *nodes;             /* scratch: of one request */
    uint8_t *kinds;
    size_t scratch;
    uint8_t nearest[PATTERNS_MAX]; /* a pattern's nearest tier that will do, as a pattern */
} BlockIndex;

/* Whether a survey counts a use: of blocks that are asked for, or stored after they were. */
enum use { USE_NONE, USE_ASKED, USE_STORED };

/* Raise what the index says was broken; gives NULL. */
PyObject *index_broken(BlockIndex *self, const char *law);

/* Hold the keys of a request, the root first, and check the range of positions. 0 or -1. */
int request_hold(PyObject *keys, PyObject *begin, PyObject *end, Py_buffer *buffer,
                 size_t range[2]);
int tier_read(const BlockIndex *self, PyObject *object, unsigned *tier);
/* Work out, for each pattern, the nearest tier that will do. */
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
