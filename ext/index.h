/* The Python interface of the block index, which takes a few files: the type, and its calls. */
#ifndef FLEXKV_INDEX_H
#define FLEXKV_INDEX_H

#include "ext.h"

#include "index_core.h"

#define PATTERNS_MAX 81 /* 3 to the power of TIERS_MAX */
#define SPAN_MAX 256
#define NODES_A_CALL (1 << 20)

typedef struct {
    PyObject_HEAD
    struct block_index index;
    PyObject *broken_error; /* raised when a call breaks a law */
    ref *nodes;             /* scratch for one request, like `kinds` */
    uint8_t *kinds;
    size_t scratch;
    /* A pattern reduced to its nearest usable tier, by the set of tiers that must not be used. */
    uint8_t nearest[1 << TIERS_MAX][PATTERNS_MAX];
} BlockIndex;

/* Which use a survey counts: that blocks are asked for, or that they are stored after that. */
enum use { USE_NONE, USE_ASKED, USE_STORED };

/* Raise an error that names the broken law; return NULL. */
PyObject *index_broken(BlockIndex *self, const char *law);

/* Read the number of a tier. */
int read_tier(PyObject *self, const struct parameter *parameter, struct value *value);

/* Check the keys of a request, the root first. Return how many blocks they are of, or -1. */
int64_t request_blocks(const struct value *keys);

/* Raise that there are not as many keys as ids; return NULL. */
PyObject *raise_keys(Py_ssize_t bytes, size_t ids);

/* Fill `nearest` for each pattern. */
void nearest_tell(BlockIndex *self);
int scratch_take(BlockIndex *self, size_t count);

/* Read the range of positions of a request: its arguments keys, begin and end. Return 0 or -1. */
int range_read(const struct value *values, size_t range[2]);
int group_read(const BlockIndex *self, const struct value *value, unsigned *group);

/* Return a bytes object for `count` int64, and set `items` to them. */
static inline PyObject *int64s_new(size_t count, int64_t **items)
{
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(count * sizeof(int64_t)));

    if (bytes)
        *items = (int64_t *)PyBytes_AsString(bytes);
    return bytes;
}

/* index_rules.c: read the rules of the KV groups; see flexkv/common/space.py. Return 0 or -1. */
int rules_count(PyObject *rules, unsigned *groups);
int rules_read(BlockIndex *self, PyObject *rules);

fast_call call_survey, call_reach, call_group_blocks;
fast_call call_reserve, call_make_room, call_reserve_copies, call_lacking;
fast_call call_lease, call_fillers;
fast_call call_pin, call_unpin, call_commit, call_abort, call_forget, call_keys_of;
fast_call call_spend;
fast_call call_export, call_restore, call_watch, call_ends, call_spans;
PyObject *index_call_changes(BlockIndex *, PyObject *);

#endif
