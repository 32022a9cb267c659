/* BlockIndex: which blocks are where, in every tier. See README.md, "Index". */
#include "index.h"

#include <errno.h>

/* Read (capacity, policy, parameter, evict_blocks) of one tier. */
static int tier_options(PyObject *object, uint32_t options[4])
{
    static const char *const names[] = {"capacity", "policy", "parameter", "evict_blocks"};
    static const int64_t most[] = {NODE_FREE / 4, POLICY_KINDS - 1, UINT32_MAX, UINT32_MAX};

    if (!PyTuple_Check(object) || PyTuple_Size(object) != 4) {
        PyErr_SetString(PyExc_TypeError,
                        "a tier is (capacity, policy, parameter, evict_blocks)");
        return -1;
    }
    for (int i = 0; i < 4; i++) {
        int64_t value;

        if (integer_read(PyTuple_GetItem(object, i), names[i], 0, most[i], &value) < 0)
            return -1;
        options[i] = (uint32_t)value;
    }
    if (options[1] == POLICY_REWARD && !options[2])
        return raise_value("the reward parameter must be 1 s or more");
    return 0;
}

static int index_set_up(BlockIndex *self, PyObject *tiers, PyObject *rules)
{
    uint32_t options[TIERS_MAX][4], capacities[TIERS_MAX];
    Py_ssize_t count = PyTuple_Size(tiers);
    unsigned groups;

    if (rules_count(rules, &groups) < 0)
        return -1;
    if (count < 1 || count > TIERS_MAX)
        return raise_value("%zd tiers given, must be 1..%d", count, TIERS_MAX);
    for (Py_ssize_t t = 0; t < count; t++) {
        if (tier_options(PyTuple_GetItem(tiers, t), options[t]) < 0)
            return -1;
        capacities[t] = options[t][0];
    }
    if (!index_open(&self->index, (unsigned)count, capacities, groups)) {
        raise_errno(errno);
        return -1;
    }
    for (Py_ssize_t t = 0; t < count; t++) {
        struct tier *tier = &self->index.tier[t];

        tier->evict_blocks = options[t][3];
        if (!tier_policy_open(tier, (enum policy_kind)options[t][1], options[t][2])) {
            PyErr_NoMemory();
            return -1;
        }
    }
    nearest_tell(self);
    return rules_read(self, rules);
}

static PyObject *index_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"tiers", "broken_error", "rules", NULL};
    PyObject *tiers, *broken_error, *rules = NULL;
    BlockIndex *self;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OO|O:BlockIndex", names, &tiers,
                                     &broken_error, &rules))
        return NULL;
    if (!PyTuple_Check(tiers) || !PyExceptionClass_Check(broken_error) ||
        (rules && !PyTuple_Check(rules)))
        return PyErr_Format(PyExc_TypeError,
                            "BlockIndex takes a tuple, an exception class and a tuple");
    self = (BlockIndex *)PyType_GenericAlloc(type, 0);
    if (!self)
        return NULL;
    self->broken_error = Py_NewRef(broken_error);
    if (index_set_up(self, tiers, rules) < 0) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void index_dealloc(BlockIndex *self)
{
    index_close(&self->index);
    PyMem_Free(self->nodes);
    PyMem_Free(self->kinds);
    Py_CLEAR(self->broken_error);
    instance_free((PyObject *)self);
}

static uint64_t places_held(const struct block_index *index)
{
    uint64_t held = 0;

    for (unsigned t = 0; t < index->tiers; t++)
        held += index->tier[t].ready + index->tier[t].reserved;
    return held;
}

static PyObject *clear(BlockIndex *self, struct value *values)
{
    uint64_t before = places_held(&self->index);

    index_clear(&self->index, (unsigned)values[0].integer);
    return PyLong_FromUnsignedLongLong(before - places_held(&self->index));
}

static CALL(call_, clear, BlockIndex, 1, READ("tier", read_tier))

static int key_read(PyObject *object, struct key *key)
{
    char *text;
    Py_ssize_t bytes;

    if (PyBytes_AsStringAndSize(object, &text, &bytes) < 0)
        return -1;
    if (bytes != (Py_ssize_t)INDEX_KEY_BYTES)
        return raise_value("root has %zd bytes, not 16", bytes);
    memcpy(key, text, sizeof(*key));
    return 0;
}

/* Read the key of a namespace: the number of its root, NONE if it has no blocks. */
static int read_root(PyObject *self, const struct parameter *Py_UNUSED(parameter),
                     struct value *value)
{
    struct key key;

    if (key_read(value->object, &key) < 0)
        return -1;
    value->integer = (int64_t)root_find(&((BlockIndex *)self)->index, key);
    return 0;
}

static PyObject *clear_root(BlockIndex *self, struct value *values)
{
    uint64_t before = places_held(&self->index);

    if (values[0].integer != NONE)
        index_clear_root(&self->index, (ref)values[0].integer);
    return PyLong_FromUnsignedLongLong(before - places_held(&self->index));
}

static CALL(call_, clear_root, BlockIndex, 1, READ("root", read_root))

static PyObject *root_blocks(BlockIndex *self, struct value *values)
{
    int64_t root = values[0].integer;
    PyObject *result = PyTuple_New((Py_ssize_t)self->index.tiers);

    for (unsigned t = 0; result && t < self->index.tiers; t++) {
        uint32_t blocks = root == NONE ? 0 : node_at(&self->index, (ref)root)->place[t];
        PyObject *number = PyLong_FromUnsignedLong(blocks);

        if (!number || PyTuple_SetItem(result, (Py_ssize_t)t, number) < 0)
            Py_CLEAR(result);
    }
    return result;
}

static CALL(call_, root_blocks, BlockIndex, 1, READ("root", read_root))

/* Return the next node below `root`, parents before children, or NONE after the last. */
static ref family_next(const struct block_index *index, ref root, ref at)
{
    if (node_at(index, at)->child != NONE)
        return node_at(index, at)->child;
    while (at != root && node_at(index, at)->after == NONE)
        at = node_at(index, at)->parent;
    return at == root ? NONE : node_at(index, at)->after;
}

static PyObject *root_ids(BlockIndex *self, struct value *values)
{
    unsigned number = (unsigned)values[0].integer;
    int64_t root = values[1].integer, *ids;
    Py_ssize_t count = 0;
    PyObject *result;

    if (root == NONE)
        return PyBytes_FromStringAndSize(NULL, 0);
    ids = PyMem_Malloc(node_at(&self->index, (ref)root)->place[number] * sizeof(*ids) + 1);
    if (!ids)
        return PyErr_NoMemory();
    for (ref at = node_at(&self->index, (ref)root)->child; at != NONE;
         at = family_next(&self->index, (ref)root, at)) {
        ref id = node_at(&self->index, at)->place[number];

        if (id != NONE && self->index.tier[number].places[id].state == PLACE_READY)
            ids[count++] = id;
    }
    result = PyBytes_FromStringAndSize((char *)ids, count * (Py_ssize_t)sizeof(*ids));
    PyMem_Free(ids);
    return result;
}

static CALL(call_, root_ids, BlockIndex, 2, READ("tier", read_tier), READ("root", read_root))

static PyObject *evict(BlockIndex *self, struct value *values)
{
    return PyLong_FromSize_t(index_evict(&self->index, (unsigned)values[0].integer, ANY_QUOTA, 0,
                                         (size_t)values[1].integer));
}

static CALL(call_, evict, BlockIndex, 2, READ("tier", read_tier), INTEGER("count", 0, UINT32_MAX))

static PyObject *resize(BlockIndex *self, struct value *values)
{
    return PyLong_FromUnsignedLong(index_resize(&self->index, (unsigned)values[0].integer,
                                                (uint32_t)values[1].integer));
}

static CALL(call_, resize, BlockIndex, 2, READ("tier", read_tier), INTEGER("count", 0, UINT32_MAX))

static PyObject *set_quota(BlockIndex *self, struct value *values)
{
    struct key root;

    if (key_read(values[1].object, &root) < 0)
        return NULL;
    switch (quota_set(&self->index, (unsigned)values[0].integer, root,
                      (uint32_t)values[2].integer)) {
    case 0:
        return Py_NewRef(Py_None);
    case -1:
        return PyErr_Format(PyExc_ValueError, "%d namespaces have quotas already", QUOTAS_MAX);
    default:
        return PyErr_NoMemory();
    }
}

static CALL(call_, set_quota, BlockIndex, 3, READ("tier", read_tier), OBJECT("root"),
            INTEGER("blocks", 0, UINT32_MAX))

static PyObject *counts(BlockIndex *self, struct value *values)
{
    const struct tier *tier = &self->index.tier[values[0].integer];

    return Py_BuildValue("(IIIIIIK)", tier->capacity, tier->free, tier->reserved, tier->ready,
                         tier->draining, tier->pinned, (unsigned long long)tier->evicted);
}

static CALL(call_, counts, BlockIndex, 1, READ("tier", read_tier))

static PyObject *tick(BlockIndex *self, struct value *values)
{
    int64_t now;

    if (integer_read(values[0].object, "now_s", self->index.clock_s, UINT32_MAX, &now) < 0)
        return NULL;
    self->index.clock_s = (uint32_t)now;
    return Py_NewRef(Py_None);
}

static CALL(call_, tick, BlockIndex, 1, OBJECT("now_s"))

static PyObject *index_validate(BlockIndex *self, PyObject *Py_UNUSED(none))
{
    const char *law = index_check(&self->index);

    return law ? index_broken(self, law) : Py_NewRef(Py_None);
}

static PyObject *agreeing(BlockIndex *self, struct value *values)
{
    int64_t blocks = request_blocks(&values[0]);
    int64_t agreeing = blocks < 0 ? 0 : chain_agrees(&self->index, values[0].view.buffer.buf,
                                                     (size_t)blocks);

    if (blocks < 0)
        return NULL;
    return agreeing < 0 ? PyErr_NoMemory() : PyLong_FromLongLong(agreeing);
}

static CALL(call_, agreeing, BlockIndex, 1, READ("keys", read_bytes))

static PyMethodDef index_methods[] = {
    FAST("survey", call_survey, "Return where blocks are."),
    FAST("reach", call_reach, "Return the longest prefix that every KV group can load."),
    FAST("group_blocks", call_group_blocks, "Count a tier's READY places by KV group."),
    FAST("reserve", call_reserve, "Take places."),
    FAST("make_room", call_make_room, "Evict for a batch, or not at all."),
    FAST("reserve_copies", call_reserve_copies, "Take places for what another tier holds."),
    FAST("lacking", call_lacking, "Return the places whose blocks another tier lacks."),
    FAST("lease", call_lease, "Record who fills places."),
    FAST("fillers", call_fillers, "Return the op ids of the fillers."),
    FAST("pin", call_pin, "Forbid eviction."),
    FAST("unpin", call_unpin, "Take one pin off."),
    FAST("commit", call_commit, "Make RESERVED places READY."),
    FAST("abort", call_abort, "Free RESERVED places."),
    FAST("forget", call_forget, "Drop blocks."),
    FAST("spend", call_spend, "Make places the next to be evicted."),
    FAST("keys_of", call_keys_of, "Return the keys of places."),
    FAST("agreeing", call_agreeing, "Count the blocks that form a chain."),
    FAST("clear", call_clear, "Forget all blocks of a tier."),
    FAST("clear_root", call_clear_root, "Forget a namespace."),
    FAST("root_blocks", call_root_blocks, "Count a namespace's blocks by tier."),
    FAST("root_ids", call_root_ids, "Return a namespace's READY places."),
    FAST("set_quota", call_set_quota, "Limit a namespace's places in a tier."),
    FAST("export", call_export, "Return what READY places hold."),
    FAST("spans", call_spans, "Return the whole spans of blocks in which places are."),
    FAST("restore", call_restore, "Restore a tier from exported records."),
    FAST("evict", call_evict, "Evict up to a number of blocks."),
    FAST("resize", call_resize, "Change a tier's capacity."),
    FAST("watch", call_watch, "Record up to a number of changes."),
    FAST("ends", call_ends, "Return the READY ends of spans, and the READY leaves."),
    FAST("counts", call_counts, "Count a tier's places by state."),
    FAST("tick", call_tick, "Set the time."),
    {"changes", (PyCFunction)index_call_changes, METH_NOARGS,
     "Return the recorded changes."},
    {"validate", (PyCFunction)index_validate, METH_NOARGS,
     "Check every invariant."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot index_slots[] = {
    {Py_tp_new, index_new},
    {Py_tp_dealloc, index_dealloc},
    {Py_tp_methods, index_methods},
    {Py_tp_doc, "The index of which blocks are where, in every tier."},
    {0, NULL},
};

PyType_Spec block_index_spec = {
    .name = "flexkv._ext.BlockIndex",
    .basicsize = sizeof(BlockIndex),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = index_slots,
};
