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

/* Read the range of positions of a request: its arguments keys, begin and end. Return 0 or -1. */
static int range_read(const struct value *values, size_t range[2])
{
    int64_t first, last, blocks = request_blocks(&values[0]);

    if (blocks < 0 || integer_read(values[1].object, "begin", 0, blocks, &first) < 0 ||
        integer_read(values[2].object, "end", first, blocks, &last) < 0)
        return -1;
    range[0] = (size_t)first;
    range[1] = (size_t)last;
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

static PyObject *survey(BlockIndex *self, struct value *values)
{
    const unsigned char *keys = values[0].view.buffer.buf;
    struct group groups[PATTERNS_MAX] = {0};
    int64_t use = values[4].integer;
    size_t range[2], begin, from, known, end;
    PyObject *result;

    if (range_read(values, range) < 0 || scratch_take(self, range[1]) < 0)
        return NULL;
    begin = range[0];
    from = use ? 0 : begin;
    known = from + nodes_find(&self->index, keys, from, range[1], self->nodes + from);
    end = patterns_tell(self, range, known > begin ? known : begin, values[3].integer, groups);
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

CALL(call_, survey, BlockIndex, 5, READ("keys", read_bytes), OBJECT("begin"), OBJECT("end"),
     READ("nearest", read_flag), INTEGER("use", 0, USE_STORED))

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

    if (range_read(values + 1, range) < 0 || !(positions = positions_new(&values[4], range, &n)))
        return NULL;
    ids = PyMem_Malloc((n + 1) * sizeof(int64_t));
    if (ids) {
        const struct batch batch = {values[1].view.buffer.buf,
                                    (size_t)request_blocks(&values[1]), positions, n};

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
     INTEGER("how", 0, RESERVE_HOWS - 1))

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
    PyObject *result = array_new((size_t)values[1].view.count, &op_ids);

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
