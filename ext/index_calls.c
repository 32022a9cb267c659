/* The calls of BlockIndex that carry arrays: one per batch, never one per block. */
#include "index.h"

PyObject *index_broken(BlockIndex *self, const char *law)
{
    return PyErr_Format(self->broken_error, "%s", law);
}

int read_tier(PyObject *self, const struct parameter *parameter, struct value *value)
{
    int64_t tiers = ((BlockIndex *)self)->index.tiers;

    return integer_read(value->object, parameter->name, 0, tiers - 1, &value->integer);
}

int64_t request_blocks(const struct value *keys)
{
    Py_ssize_t bytes = keys->view.buffer.len, blocks = bytes / (Py_ssize_t)INDEX_KEY_BYTES - 1;

    if (bytes % (Py_ssize_t)INDEX_KEY_BYTES == 0 && blocks >= 0)
        return blocks;
    return raise_value("keys has %zd bytes, must be a root and keys of 16 each", bytes);
}

int range_read(const struct value *values, size_t range[2])
{
    int64_t first, last, blocks = request_blocks(&values[0]);

    if (blocks < 0 || integer_read(values[1].object, "begin", 0, blocks, &first) < 0 ||
        integer_read(values[2].object, "end", first, blocks, &last) < 0)
        return -1;
    range[0] = (size_t)first;
    range[1] = (size_t)last;
    return 0;
}

/* Read a KV group, which may be left out: that is the chain's. */
int group_read(const BlockIndex *self, const struct value *value, unsigned *group)
{
    int64_t number = 0;

    if (value->object &&
        integer_read(value->object, "group", 0, self->index.groups - 1, &number) < 0)
        return -1;
    *group = (unsigned)number;
    return 0;
}

int scratch_take(BlockIndex *self, size_t count)
{
    ref *nodes;
    uint8_t *kinds;

    if (count <= self->scratch)
        return 0;
    nodes = PyMem_Realloc(self->nodes, count * sizeof(ref));
    if (nodes)
        self->nodes = nodes;
    kinds = PyMem_Realloc(self->kinds, count);
    if (kinds)
        self->kinds = kinds;
    if (!nodes || !kinds) {
        PyErr_NoMemory();
        return -1;
    }
    self->scratch = count;
    return 0;
}

PyObject *raise_keys(Py_ssize_t bytes, size_t ids)
{
    return PyErr_Format(PyExc_ValueError, "keys has %zd bytes, not 16 for each of %zu ids", bytes,
                        ids);
}

/* -- reserve ----------------------------------------------------------------------------------- */

/* Read positions, or None: those of the whole range. */
static int read_positions(PyObject *self, const struct parameter *parameter, struct value *value)
{
    return Py_IsNone(value->object) ? 0 : read_int64s(self, parameter, value);
}

/* Return the positions from begin to end, or those of a buffer, which must be within that range. */
static int64_t *positions_new(const struct value *value, const size_t range[2], size_t *n)
{
    bool is_given = value->view.buffer.obj != NULL;
    int64_t *positions;

    *n = is_given ? (size_t)value->view.count : range[1] - range[0];
    positions = PyMem_Malloc((*n + 1) * sizeof(int64_t));
    if (!positions)
        return (int64_t *)PyErr_NoMemory();
    for (size_t i = 0; i < *n; i++) {
        positions[i] = is_given ? int64_at(&value->view, (Py_ssize_t)i) : (int64_t)(range[0] + i);
        if (positions[i] >= (int64_t)range[0] && positions[i] < (int64_t)range[1])
            continue;
        PyErr_Format(PyExc_ValueError, "position %lld is outside %zu..%zu",
                     (long long)positions[i], range[0], range[1]);
        PyMem_Free(positions);
        return NULL;
    }
    return positions;
}

static PyObject *reserve(BlockIndex *self, struct value *values)
{
    int64_t *positions, *ids, taken;
    PyObject *result = NULL;
    size_t range[2], n;
    unsigned group;

    if (group_read(self, &values[6], &group) < 0 || range_read(values + 1, range) < 0 ||
        !(positions = positions_new(&values[4], range, &n)))
        return NULL;
    ids = PyMem_Malloc((n + 1) * sizeof(int64_t));
    if (ids) {
        const struct batch batch = {values[1].view.buffer.buf,
                                    (size_t)request_blocks(&values[1]), positions, n, group};

        taken = index_reserve(&self->index, (unsigned)values[0].integer, &batch,
                              (enum reserve_how)values[5].integer, ids);
        result = taken < 0 ? index_broken(self, self->index.broken)
                           : PyBytes_FromStringAndSize((const char *)ids,
                                                       taken * (Py_ssize_t)sizeof(int64_t));
    } else {
        PyErr_NoMemory();
    }
    PyMem_Free(ids);
    PyMem_Free(positions);
    return result;
}

CALL(call_, reserve, BlockIndex, 6, READ("tier", read_tier), READ("keys", read_bytes),
     OBJECT("begin"), OBJECT("end"), READ("positions", read_positions),
     INTEGER("how", 0, RESERVE_HOWS - 1), OBJECT("group"))

static PyObject *make_room(BlockIndex *self, struct value *values)
{
    struct block_index *index = &self->index;
    const unsigned char *keys = values[1].view.buffer.buf;
    const struct batch batch = {.keys = keys, .n = (size_t)values[2].integer};
    unsigned quota;

    if (request_blocks(&values[1]) < 0)
        return NULL;
    quota = index->quotas ? quota_of(index, key_at(keys, -1)) : 0;
    return PyBool_FromLong(room_make(index, (unsigned)values[0].integer, quota, &batch,
                                     RESERVE_ALL, NULL) == batch.n);
}

CALL(call_, make_room, BlockIndex, 3, READ("tier", read_tier), READ("keys", read_bytes),
     INTEGER("count", 0, UINT32_MAX))

/* -- batches of ids ---------------------------------------------------------------------------- */

#define TIER_AND_IDS READ("tier", read_tier), READ("ids", read_aligned)

/* Return None, or raise for a broken law. */
static PyObject *outcome(BlockIndex *self, bool is_good)
{
    return is_good ? Py_NewRef(Py_None) : index_broken(self, self->index.broken);
}

#define BATCH_CALL(verb)                                                                           \
    static PyObject *verb##_ids(BlockIndex *self, struct value *values)                            \
    {                                                                                              \
        return outcome(self, index_##verb(&self->index, (unsigned)values[0].integer,               \
                                          values[1].view.buffer.buf,                               \
                                          (size_t)values[1].view.count));                          \
    }                                                                                              \
    CALL_NAMED(call_##verb, #verb, verb##_ids, BlockIndex, 2, TIER_AND_IDS)

BATCH_CALL(pin)
BATCH_CALL(unpin)
BATCH_CALL(commit)
BATCH_CALL(abort)
BATCH_CALL(forget)

static PyObject *spend(BlockIndex *self, struct value *values)
{
    size_t n = (size_t)values[1].view.count;

    if ((size_t)values[2].view.buffer.len != n * INDEX_KEY_BYTES)
        return raise_keys(values[2].view.buffer.len, n);
    return PyLong_FromSize_t(index_spend(&self->index, (unsigned)values[0].integer,
                                         values[1].view.buffer.buf, values[2].view.buffer.buf, n));
}

CALL(call_, spend, BlockIndex, 3, TIER_AND_IDS, READ("keys", read_bytes))

static PyObject *lease(BlockIndex *self, struct value *values)
{
    return outcome(self, index_lease(&self->index, (unsigned)values[0].integer,
                                     values[1].view.buffer.buf, (size_t)values[1].view.count,
                                     values[2].integer));
}

CALL(call_, lease, BlockIndex, 3, TIER_AND_IDS, INTEGER("op_id", 0, INT64_MAX))

/* Return a place in use; NULL if no such place is. */
static const struct place *place_of(const BlockIndex *self, const struct value *values,
                                    Py_ssize_t i)
{
    const struct place *place = place_at(&self->index.tier[values[0].integer],
                                         int64_at(&values[1].view, i));

    return place && place->state != PLACE_FREE ? place : NULL;
}

static PyObject *fillers(BlockIndex *self, struct value *values)
{
    int64_t *op_ids;
    PyObject *result = int64s_new((size_t)values[1].view.count, &op_ids);

    for (Py_ssize_t i = 0; result && i < values[1].view.count; i++) {
        const struct place *place = place_of(self, values, i);

        if (!place || place->state != PLACE_RESERVED) {
            Py_CLEAR(result);
            index_broken(self, "asked for the filler of a place that is not RESERVED");
        } else {
            op_ids[i] = place_filler(place);
        }
    }
    return result;
}

CALL(call_, fillers, BlockIndex, 2, TIER_AND_IDS)

static PyObject *keys_of(BlockIndex *self, struct value *values)
{
    PyObject *result =
        PyBytes_FromStringAndSize(NULL, values[1].view.count * (Py_ssize_t)INDEX_KEY_BYTES);

    for (Py_ssize_t i = 0; result && i < values[1].view.count; i++) {
        const struct place *place = place_of(self, values, i);
        char *key = PyBytes_AsString(result) + i * (Py_ssize_t)INDEX_KEY_BYTES;

        if (!place || place->node == NONE) {
            Py_CLEAR(result);
            index_broken(self, "asked for the key of a place that has none");
        } else {
            memcpy(key, &node_at(&self->index, place->node)->key, INDEX_KEY_BYTES);
        }
    }
    return result;
}

CALL(call_, keys_of, BlockIndex, 2, TIER_AND_IDS)
