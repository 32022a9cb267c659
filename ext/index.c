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
    if (options[1] == POLICY_REWARD && !options[2]) {
        PyErr_SetString(PyExc_ValueError, "the reward parameter must be 1 s or more");
        return -1;
    }
    return 0;
}

static int index_set_up(BlockIndex *self, PyObject *tiers)
{
    uint32_t options[TIERS_MAX][4], capacities[TIERS_MAX];
    Py_ssize_t count = PyTuple_Size(tiers);

    if (count < 1 || count > TIERS_MAX) {
        PyErr_Format(PyExc_ValueError, "%zd tiers given, must be 1..%d", count, TIERS_MAX);
        return -1;
    }
    for (Py_ssize_t t = 0; t < count; t++) {
        if (tier_options(PyTuple_GetItem(tiers, t), options[t]) < 0)
            return -1;
        capacities[t] = options[t][0];
    }
    if (!index_open(&self->index, (unsigned)count, capacities)) {
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
    return 0;
}

static PyObject *index_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"tiers", "broken_error", NULL};
    PyObject *tiers, *broken_error;
    BlockIndex *self;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OO:BlockIndex", names, &tiers,
                                     &broken_error))
        return NULL;
    if (!PyTuple_Check(tiers) || !PyExceptionClass_Check(broken_error))
        return PyErr_Format(PyExc_TypeError, "BlockIndex takes a tuple and an exception class");
    self = (BlockIndex *)PyType_GenericAlloc(type, 0);
    if (!self)
        return NULL;
    self->broken_error = Py_NewRef(broken_error);
    if (index_set_up(self, tiers) < 0) {
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

static PyObject *index_clear_call(BlockIndex *self, PyObject *object)
{
    uint64_t before = places_held(&self->index);
    unsigned tier;

    if (tier_read(self, object, &tier) < 0)
        return NULL;
    index_clear(&self->index, tier);
    return PyLong_FromUnsignedLongLong(before - places_held(&self->index));
}

static int key_read(PyObject *object, struct key *key)
{
    char *text;
    Py_ssize_t bytes;

    if (PyBytes_AsStringAndSize(object, &text, &bytes) < 0)
        return -1;
    if (bytes != (Py_ssize_t)INDEX_KEY_BYTES) {
        PyErr_Format(PyExc_ValueError, "root has %zd bytes, not 16", bytes);
        return -1;
    }
    memcpy(key, text, sizeof(*key));
    return 0;
}

/* Return the number of a namespace's root, NONE if it has no blocks, or -1 with an exception. */
static int64_t root_read(const BlockIndex *self, PyObject *object)
{
    struct key key;

    return key_read(object, &key) < 0 ? -1 : (int64_t)root_find(&self->index, key);
}

static PyObject *index_clear_root_call(BlockIndex *self, PyObject *object)
{
    uint64_t before = places_held(&self->index);
    int64_t root = root_read(self, object);

    if (root < 0)
        return NULL;
    if (root != NONE)
        index_clear_root(&self->index, (ref)root);
    return PyLong_FromUnsignedLongLong(before - places_held(&self->index));
}

static PyObject *index_root_blocks(BlockIndex *self, PyObject *object)
{
    int64_t root = root_read(self, object);
    PyObject *result = root < 0 ? NULL : PyTuple_New((Py_ssize_t)self->index.tiers);

    for (unsigned t = 0; result && t < self->index.tiers; t++) {
        uint32_t blocks = root == NONE ? 0 : node_at(&self->index, (ref)root)->place[t];
        PyObject *number = PyLong_FromUnsignedLong(blocks);

        if (!number || PyTuple_SetItem(result, (Py_ssize_t)t, number) < 0)
            Py_CLEAR(result);
    }
    return result;
}

/* Return the next node below `root`, parents before children, or NONE after the last. */
static ref family_next(const struct block_index *index, ref root, ref at)
{
    if (node_at(index, at)->child != NONE)
        return node_at(index, at)->child;
    while (at != root && node_at(index, at)->after == NONE)
        at = node_at(index, at)->parent;
    return at == root ? NONE : node_at(index, at)->after;
}

static PyObject *index_root_ids(BlockIndex *self, PyObject *args)
{
    PyObject *tier_object, *root_object, *result;
    unsigned number;
    int64_t root, *ids;
    Py_ssize_t count = 0;

    if (!PyArg_UnpackTuple(args, "root_ids", 2, 2, &tier_object, &root_object) ||
        tier_read(self, tier_object, &number) < 0 || (root = root_read(self, root_object)) < 0)
        return NULL;
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

static PyObject *index_pair_call(BlockIndex *self, const char *name, PyObject *args, bool resize)
{
    PyObject *tier_object, *count_object;
    unsigned tier;
    int64_t count;

    if (!PyArg_UnpackTuple(args, name, 2, 2, &tier_object, &count_object) ||
        tier_read(self, tier_object, &tier) < 0 ||
        integer_read(count_object, "count", 0, UINT32_MAX, &count) < 0)
        return NULL;
    if (resize)
        return PyLong_FromUnsignedLong(index_resize(&self->index, tier, (uint32_t)count));
    return PyLong_FromSize_t(index_evict(&self->index, tier, ANY_QUOTA, 0, (size_t)count));
}

static PyObject *index_evict_call(BlockIndex *self, PyObject *args)
{
    return index_pair_call(self, "evict", args, false);
}

static PyObject *index_resize_call(BlockIndex *self, PyObject *args)
{
    return index_pair_call(self, "resize", args, true);
}

static PyObject *index_set_quota(BlockIndex *self, PyObject *args)
{
    PyObject *tier_object, *root_object, *blocks_object;
    struct key root;
    unsigned tier;
    int64_t blocks;

    if (!PyArg_UnpackTuple(args, "set_quota", 3, 3, &tier_object, &root_object,
                           &blocks_object) ||
        tier_read(self, tier_object, &tier) < 0 || key_read(root_object, &root) < 0 ||
        integer_read(blocks_object, "blocks", 0, UINT32_MAX, &blocks) < 0)
        return NULL;
    switch (quota_set(&self->index, tier, root, (uint32_t)blocks)) {
    case 0:
        return Py_NewRef(Py_None);
    case -1:
        return PyErr_Format(PyExc_ValueError, "%d namespaces have quotas already", QUOTAS_MAX);
    default:
        return PyErr_NoMemory();
    }
}

static PyObject *index_counts(BlockIndex *self, PyObject *object)
{
    const struct tier *tier;
    unsigned number;

    if (tier_read(self, object, &number) < 0)
        return NULL;
    tier = &self->index.tier[number];
    return Py_BuildValue("(IIIIIIK)", tier->capacity, tier->free, tier->reserved, tier->ready,
                         tier->draining, tier->pinned, (unsigned long long)tier->evicted);
}

static PyObject *index_tick(BlockIndex *self, PyObject *object)
{
    int64_t now;

    if (integer_read(object, "now_s", self->index.clock_s, UINT32_MAX, &now) < 0)
        return NULL;
    self->index.clock_s = (uint32_t)now;
    return Py_NewRef(Py_None);
}

static PyObject *index_validate(BlockIndex *self, PyObject *Py_UNUSED(none))
{
    const char *law = index_check(&self->index);

    return law ? index_broken(self, law) : Py_NewRef(Py_None);
}

static PyObject *index_call_agreeing(BlockIndex *self, PyObject *object)
{
    PyObject *zero = PyLong_FromLong(0), *result = NULL;
    Py_buffer keys;
    size_t range[2];

    if (!zero)
        return NULL;
    if (request_hold(object, zero, zero, &keys, range) == 0) {
        size_t blocks = (size_t)keys.len / INDEX_KEY_BYTES - 1;
        int64_t agreeing = chain_agrees(&self->index, keys.buf, blocks);

        result = agreeing < 0 ? PyErr_NoMemory() : PyLong_FromLongLong(agreeing);
        PyBuffer_Release(&keys);
    }
    Py_DECREF(zero);
    return result;
}

#define FAST(function) ((PyCFunction)(void (*)(void))(function))
#define METHOD(function) ((PyCFunction)(void (*)(void))(function))

static PyMethodDef index_methods[] = {
    {"survey", FAST(index_survey), METH_FASTCALL | METH_KEYWORDS, "Return where blocks are."},
    {"reserve", FAST(index_call_reserve), METH_FASTCALL | METH_KEYWORDS, "Take places."},
    {"reserve_copies", FAST(index_call_reserve_copies), METH_FASTCALL | METH_KEYWORDS,
     "Take places for what another tier holds."},
    {"lacking", METHOD(index_call_lacking), METH_VARARGS,
     "Return the places whose blocks another tier lacks."},
    {"lease", FAST(index_call_lease), METH_FASTCALL | METH_KEYWORDS, "Record who fills places."},
    {"fillers", FAST(index_call_fillers), METH_FASTCALL | METH_KEYWORDS,
     "Return the op ids of the fillers."},
    {"pin", FAST(index_call_pin), METH_FASTCALL | METH_KEYWORDS, "Forbid eviction."},
    {"unpin", FAST(index_call_unpin), METH_FASTCALL | METH_KEYWORDS, "Take one pin off."},
    {"commit", FAST(index_call_commit), METH_FASTCALL | METH_KEYWORDS,
     "Make RESERVED places READY."},
    {"abort", FAST(index_call_abort), METH_FASTCALL | METH_KEYWORDS, "Free RESERVED places."},
    {"forget", FAST(index_call_forget), METH_FASTCALL | METH_KEYWORDS, "Drop blocks."},
    {"keys_of", FAST(index_call_keys), METH_FASTCALL | METH_KEYWORDS, "Return the keys of places."},
    {"agreeing", METHOD(index_call_agreeing), METH_O, "Count the blocks that form a chain."},
    {"clear", METHOD(index_clear_call), METH_O, "Forget all blocks of a tier."},
    {"clear_root", METHOD(index_clear_root_call), METH_O, "Forget a namespace."},
    {"root_blocks", METHOD(index_root_blocks), METH_O, "Count a namespace's blocks by tier."},
    {"root_ids", METHOD(index_root_ids), METH_VARARGS, "Return a namespace's READY places."},
    {"set_quota", METHOD(index_set_quota), METH_VARARGS, "Limit a namespace's places in a tier."},
    {"export", METHOD(index_call_export), METH_VARARGS, "Return what READY places hold."},
    {"restore", METHOD(index_call_restore), METH_VARARGS, "Restore a tier from exported records."},
    {"evict", METHOD(index_evict_call), METH_VARARGS, "Evict up to a number of blocks."},
    {"resize", METHOD(index_resize_call), METH_VARARGS, "Change a tier's capacity."},
    {"watch", METHOD(index_call_watch), METH_O, "Record up to a number of changes."},
    {"changes", METHOD(index_call_changes), METH_NOARGS, "Return the recorded changes."},
    {"counts", METHOD(index_counts), METH_O, "Count a tier's places by state."},
    {"tick", METHOD(index_tick), METH_O, "Set the time."},
    {"validate", METHOD(index_validate), METH_NOARGS, "Check every invariant."},
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
