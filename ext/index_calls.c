/* The calls of BlockIndex that carry arrays: one per batch, never one per block. */
#include "index.h"

PyObject *index_broken(BlockIndex *self, const char *law)
{
    PyErr_SetString(self->broken_error, law);
    return NULL;
}

int tier_read(const BlockIndex *self, PyObject *object, unsigned *tier)
{
    int64_t value;

    if (integer_read(object, "tier", 0, (int64_t)self->index.tiers - 1, &value) < 0)
        return -1;
    *tier = (unsigned)value;
    return 0;
}

int request_hold(PyObject *keys, PyObject *begin, PyObject *end, Py_buffer *buffer,
                 size_t range[2])
{
    int64_t first, last, blocks;

    if (PyObject_GetBuffer(keys, buffer, PyBUF_SIMPLE) < 0)
        return -1;
    blocks = buffer->len / (Py_ssize_t)INDEX_KEY_BYTES - 1;
    if (buffer->len % (Py_ssize_t)INDEX_KEY_BYTES || blocks < 0) {
        PyErr_Format(PyExc_ValueError, "keys has %zd bytes, must be a root and keys of 16 each",
                     buffer->len);
    } else if (integer_read(begin, "begin", 0, blocks, &first) == 0 &&
               integer_read(end, "end", first, blocks, &last) == 0) {
        range[0] = (size_t)first;
        range[1] = (size_t)last;
        return 0;
    }
    PyBuffer_Release(buffer);
    return -1;
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

/* -- survey ------------------------------------------------------------------------------------ */

struct group {
    size_t count, first, last, run;
    int64_t *positions, *ids[TIERS_MAX];
};

/* Return where a block is: a base-3 digit per tier, the lowest for the nearest: nowhere, pending,
 * ready. */
static unsigned pattern_of(const struct block_index *index, ref number)
{
    const struct node *node = node_at(index, number);
    unsigned pattern = 0, digit = 1;

    for (unsigned t = 0; t < index->tiers; t++, digit *= 3)
        if (node->place[t] != NONE)
            pattern += digit * index->tier[t].places[node->place[t]].state;
    return pattern;
}

/* Reduce a pattern to the nearest usable tier: the first unless absent, else the first ready. */
static unsigned nearest_of(unsigned pattern, unsigned tiers)
{
    unsigned digit = 1;

    if (pattern % 3)
        return pattern % 3;
    for (unsigned t = 0; t < tiers; t++, digit *= 3)
        if (pattern / digit % 3 == 2)
            return 2 * digit;
    return 0;
}

static void run_begin(struct group *group, size_t position)
{
    if (!group->count)
        group->first = position;
    group->run = position;
}

static void run_end(struct group *group, size_t position)
{
    if (!group)
        return;
    group->count += position - group->run;
    group->last = position - 1;
}

void nearest_tell(BlockIndex *self)
{
    for (unsigned pattern = 0; pattern < PATTERNS_MAX; pattern++)
        self->nearest[pattern] = (uint8_t)nearest_of(pattern, self->index.tiers);
}

/* Write the pattern of each block before `known` and count them by pattern; return where the walk
 * ended. The blocks from `known` on are nowhere. */
static size_t patterns_tell(BlockIndex *self, const size_t range[2], size_t known, bool nearest,
                            struct group *groups)
{
    unsigned last = PATTERNS_MAX;
    struct group *group = NULL;

    for (size_t position = range[0]; position < known; position++) {
        unsigned pattern = pattern_of(&self->index, self->nodes[position]);

        if (nearest) {
            pattern = self->nearest[pattern];
            if (!pattern) {
                known = position;
                break;
            }
        }
        self->kinds[position] = (uint8_t)pattern;
        if (pattern != last) {
            run_end(group, position);
            group = &groups[pattern];
            run_begin(group, position);
            last = pattern;
        }
    }
    run_end(group, known);
    if (!nearest && known < range[1])
        groups[0] = (struct group){.count = range[1] - known, .first = known, .last = range[1] - 1};
    return known;
}

static PyObject *array_new(size_t count, int64_t **items)
{
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(count * sizeof(int64_t)));

    if (bytes)
        *items = (int64_t *)PyBytes_AsString(bytes);
    return bytes;
}

/* Return (pattern, first position, count, positions or None if unbroken, ids by tier or None). */
static PyObject *group_new(struct group *group, unsigned pattern, unsigned tiers)
{
    PyObject *ids = PyTuple_New((Py_ssize_t)tiers), *positions = NULL;
    unsigned digit = 1;

    if (!ids)
        return NULL;
    for (unsigned t = 0; t < tiers; t++, digit *= 3) {
        PyObject *array = pattern / digit % 3 ? array_new(group->count, &group->ids[t])
                                              : Py_NewRef(Py_None);

        if (!array || PyTuple_SetItem(ids, (Py_ssize_t)t, array) < 0)
            goto failed;
    }
    if (group->last - group->first + 1 == group->count)
        positions = Py_NewRef(Py_None);
    else
        positions = array_new(group->count, &group->positions);
    if (positions)
        return Py_BuildValue("(InnNN)", pattern, (Py_ssize_t)group->first,
                             (Py_ssize_t)group->count, positions, ids);
failed:
    Py_DECREF(ids);
    return NULL;
}

/* Write the positions and ids of a run of blocks with the same pattern. */
static void run_fill(const BlockIndex *self, size_t begin, size_t end, struct group *group)
{
    const struct block_index *index = &self->index;
    const ref *nodes = self->nodes;

    if (group->positions) {
        int64_t *positions = group->positions;

        for (size_t position = begin; position < end; position++)
            *positions++ = (int64_t)position;
        group->positions = positions;
    }
    for (unsigned t = 0; t < index->tiers; t++) {
        int64_t *ids = group->ids[t];

        if (!ids)
            continue;
        for (size_t position = begin; position < end; position++)
            *ids++ = node_at(index, nodes[position])->place[t];
        group->ids[t] = ids;
    }
}

static void groups_fill(const BlockIndex *self, size_t begin, size_t end, struct group *groups)
{
    while (begin < end) {
        uint8_t kind = self->kinds[begin];
        size_t next = begin + 1;

        while (next < end && self->kinds[next] == kind)
            next++;
        run_fill(self, begin, next, &groups[kind]);
        begin = next;
    }
}

static PyObject *survey(BlockIndex *self, const unsigned char *keys, const size_t range[2],
                        bool nearest, int64_t use)
{
    struct group groups[PATTERNS_MAX] = {0};
    size_t begin = range[0], from = use ? 0 : begin, known, end;
    PyObject *result;

    if (scratch_take(self, range[1]) < 0)
        return NULL;
    known = from + nodes_find(&self->index, keys, from, range[1], self->nodes + from);
    end = patterns_tell(self, range, known > begin ? known : begin, nearest, groups);
    result = PyList_New(0);
    for (unsigned pattern = 0; result && pattern < PATTERNS_MAX; pattern++) {
        PyObject *group;

        if (!groups[pattern].count)
            continue;
        group = group_new(&groups[pattern], pattern, self->index.tiers);
        if (!group || PyList_Append(result, group) < 0)
            Py_CLEAR(result);
        Py_XDECREF(group);
    }
    if (!result)
        return NULL;
    groups_fill(self, begin, end, groups);
    if (use)
        index_use(&self->index, self->nodes, known < end ? known : end);
    if (use == USE_ASKED)
        for (unsigned t = 0; t < self->index.tiers; t++)
            if (self->index.tier[t].density)
                lhd_asked(&self->index, t, &(struct batch){.keys = keys, .blocks = range[1]},
                          self->nodes, known < end ? known : end);
    return result;
}

PyObject *index_survey(BlockIndex *self, PyObject *const *args, Py_ssize_t count,
                       PyObject *keywords)
{
    static const char *const names[] = {"keys", "begin", "end", "nearest", "use"};
    static const struct signature signature = {"survey", names, 5, 5};
    PyObject *values[5], *result = NULL;
    Py_buffer keys;
    size_t range[2];
    int nearest;
    int64_t use;

    if (args_unpack(&signature, args, count, keywords, values) < 0)
        return NULL;
    nearest = PyObject_IsTrue(values[3]);
    if (nearest < 0 || integer_read(values[4], "use", 0, USE_STORED, &use) < 0 ||
        request_hold(values[0], values[1], values[2], &keys, range) < 0)
        return NULL;
    result = survey(self, keys.buf, range, nearest, use);
    PyBuffer_Release(&keys);
    return result;
}

/* -- reserve ----------------------------------------------------------------------------------- */

/* Return the positions from begin to end, or those in a buffer, which must be within that range. */
static int64_t *positions_new(PyObject *object, const size_t range[2], size_t *n)
{
    struct int64_view view;
    int64_t *positions;

    if (object == Py_None) {
        *n = range[1] - range[0];
        positions = PyMem_Malloc((*n + 1) * sizeof(int64_t));
        for (size_t i = 0; positions && i < *n; i++)
            positions[i] = (int64_t)(range[0] + i);
        return positions ? positions : (int64_t *)PyErr_NoMemory();
    }
    if (int64_view_hold(object, "positions", &view) < 0)
        return NULL;
    *n = (size_t)view.count;
    positions = PyMem_Malloc((*n + 1) * sizeof(int64_t));
    for (size_t i = 0; positions && i < *n; i++) {
        positions[i] = int64_at(&view, (Py_ssize_t)i);
        if (positions[i] >= (int64_t)range[0] && positions[i] < (int64_t)range[1])
            continue;
        PyErr_Format(PyExc_ValueError, "position %lld is outside %zu..%zu",
                     (long long)positions[i], range[0], range[1]);
        PyMem_Free(positions);
        positions = NULL;
    }
    PyBuffer_Release(&view.buffer);
    if (!positions && !PyErr_Occurred())
        PyErr_NoMemory();
    return positions;
}

static size_t blocks_in(const Py_buffer *keys)
{
    return (size_t)keys->len / INDEX_KEY_BYTES - 1;
}

static PyObject *reserve(BlockIndex *self, unsigned tier, const struct batch *batch,
                         enum reserve_how how)
{
    int64_t *ids = PyMem_Malloc((batch->n + 1) * sizeof(int64_t)), taken;
    PyObject *result = NULL;

    if (!ids)
        return PyErr_NoMemory();
    taken = index_reserve(&self->index, tier, batch, how, ids);
    if (taken < 0)
        index_broken(self, self->index.broken);
    else
        result = PyBytes_FromStringAndSize((const char *)ids,
                                           (Py_ssize_t)((size_t)taken * sizeof(int64_t)));
    PyMem_Free(ids);
    return result;
}

PyObject *index_call_reserve(BlockIndex *self, PyObject *const *args, Py_ssize_t count,
                             PyObject *keywords)
{
    static const char *const names[] = {"tier", "keys", "begin", "end", "positions", "how"};
    static const struct signature signature = {"reserve", names, 6, 6};
    PyObject *values[6], *result = NULL;
    int64_t *positions;
    unsigned tier;
    Py_buffer keys;
    size_t range[2], n;
    int64_t how;

    if (args_unpack(&signature, args, count, keywords, values) < 0 ||
        tier_read(self, values[0], &tier) < 0 ||
        integer_read(values[5], "how", 0, RESERVE_HOWS - 1, &how) < 0)
        return NULL;
    if (request_hold(values[1], values[2], values[3], &keys, range) < 0)
        return NULL;
    positions = positions_new(values[4], range, &n);
    if (positions)
        result = reserve(self, tier,
                         &(struct batch){keys.buf, blocks_in(&keys), positions, n},
                         (enum reserve_how)how);
    PyMem_Free(positions);
    PyBuffer_Release(&keys);
    return result;
}

/* -- batches of ids ---------------------------------------------------------------------------- */

/* Read the arguments (tier, ids) of a call; hold the ids, which must be aligned. */
static int ids_hold(BlockIndex *self, PyObject *const *values, unsigned *tier,
                    struct int64_view *ids)
{
    if (tier_read(self, values[0], tier) < 0 || int64_view_hold(values[1], "ids", ids) < 0)
        return -1;
    if ((uintptr_t)ids->buffer.buf % sizeof(int64_t) == 0)
        return 0;
    PyErr_SetString(PyExc_ValueError, "ids must be aligned to 8 bytes");
    PyBuffer_Release(&ids->buffer);
    return -1;
}

typedef bool ids_call(struct block_index *index, unsigned tier, const int64_t *ids, size_t n);

static PyObject *batch_do(BlockIndex *self, ids_call *work, const char *name, PyObject *const *args,
                          Py_ssize_t count, PyObject *keywords)
{
    static const char *const names[] = {"tier", "ids"};
    const struct signature signature = {name, names, 2, 2};
    PyObject *values[2];
    struct int64_view ids;
    unsigned tier;
    bool good;

    if (args_unpack(&signature, args, count, keywords, values) < 0 ||
        ids_hold(self, values, &tier, &ids) < 0)
        return NULL;
    good = work(&self->index, tier, ids.buffer.buf, (size_t)ids.count);
    PyBuffer_Release(&ids.buffer);
    return good ? Py_NewRef(Py_None) : index_broken(self, self->index.broken);
}

#define BATCH_CALL(verb)                                                                          \
    PyObject *index_call_##verb(BlockIndex *self, PyObject *const *args, Py_ssize_t count,        \
                                PyObject *keywords)                                               \
    {                                                                                             \
        return batch_do(self, index_##verb, #verb, args, count, keywords);                        \
    }

BATCH_CALL(pin)
BATCH_CALL(unpin)
BATCH_CALL(commit)
BATCH_CALL(abort)
BATCH_CALL(forget)

PyObject *index_call_lease(BlockIndex *self, PyObject *const *args, Py_ssize_t count,
                           PyObject *keywords)
{
    static const char *const names[] = {"tier", "ids", "op_id"};
    static const struct signature signature = {"lease", names, 3, 3};
    PyObject *values[3];
    struct int64_view ids;
    unsigned tier;
    int64_t op_id;
    bool good;

    if (args_unpack(&signature, args, count, keywords, values) < 0 ||
        integer_read(values[2], "op_id", 0, INT64_MAX, &op_id) < 0 ||
        ids_hold(self, values, &tier, &ids) < 0)
        return NULL;
    good = index_lease(&self->index, tier, ids.buffer.buf, (size_t)ids.count, op_id);
    PyBuffer_Release(&ids.buffer);
    return good ? Py_NewRef(Py_None) : index_broken(self, self->index.broken);
}

PyObject *index_call_fillers(BlockIndex *self, PyObject *const *args, Py_ssize_t count,
                             PyObject *keywords)
{
    static const char *const names[] = {"tier", "ids"};
    static const struct signature signature = {"fillers", names, 2, 2};
    PyObject *values[2], *result;
    const struct tier *at;
    struct int64_view ids;
    unsigned tier;
    int64_t *op_ids;

    if (args_unpack(&signature, args, count, keywords, values) < 0 ||
        ids_hold(self, values, &tier, &ids) < 0)
        return NULL;
    at = &self->index.tier[tier];
    result = array_new((size_t)ids.count, &op_ids);
    for (Py_ssize_t i = 0; result && i < ids.count; i++) {
        int64_t id = int64_at(&ids, i);

        if (id < 0 || id >= at->unused || at->places[id].state != PLACE_RESERVED) {
            Py_CLEAR(result);
            index_broken(self, "asked for the filler of a place that is not RESERVED");
        } else {
            op_ids[i] = place_filler(&at->places[id]);
        }
    }
    PyBuffer_Release(&ids.buffer);
    return result;
}

PyObject *index_call_keys(BlockIndex *self, PyObject *const *args, Py_ssize_t count,
                          PyObject *keywords)
{
    static const char *const names[] = {"tier", "ids"};
    static const struct signature signature = {"keys_of", names, 2, 2};
    PyObject *values[2], *result;
    const struct tier *at;
    struct int64_view ids;
    unsigned tier;

    if (args_unpack(&signature, args, count, keywords, values) < 0 ||
        ids_hold(self, values, &tier, &ids) < 0)
        return NULL;
    at = &self->index.tier[tier];
    result = PyBytes_FromStringAndSize(NULL, ids.count * (Py_ssize_t)INDEX_KEY_BYTES);
    for (Py_ssize_t i = 0; result && i < ids.count; i++) {
        int64_t id = int64_at(&ids, i);
        char *key = PyBytes_AsString(result) + i * (Py_ssize_t)INDEX_KEY_BYTES;

        if (id < 0 || id >= at->unused || at->places[id].state == PLACE_FREE ||
            at->places[id].node == NONE) {
            Py_CLEAR(result);
            index_broken(self, "asked for the key of a place that has none");
        } else {
            memcpy(key, &node_at(&self->index, at->places[id].node)->key, INDEX_KEY_BYTES);
        }
    }
    PyBuffer_Release(&ids.buffer);
    return result;
}
