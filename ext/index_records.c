/* The calls of BlockIndex that report blocks to others: records for a later run, changes, and what
 * is READY. */
#include "index.h"

#include "index_persist.h"

static PyObject *export(BlockIndex *self, struct value *values)
{
    const struct int64_view *ids = &values[1].view;
    PyObject *result = PyBytes_FromStringAndSize(
        NULL, ids->count * (Py_ssize_t)sizeof(struct block_record));
    char *at = result ? PyBytes_AsString(result) : NULL;

    for (Py_ssize_t i = 0; result && i < ids->count; i++, at += sizeof(struct block_record)) {
        struct block_record record = {0};

        index_export(&self->index, (unsigned)values[0].integer, int64_at(ids, i), &record);
        memcpy(at, &record, sizeof(record));
    }
    return result;
}

CALL(call_, export, BlockIndex, 2, READ("tier", read_tier), READ("ids", read_int64s))

/* Check a record whose parent, if it has one, comes before it. */
static const char *record_check(const struct block_index *index, const struct restored *restored,
                                size_t i)
{
    const struct block_record *record = &restored->records[i], *above;
    unsigned group = record_group(record);
    struct key key;

    if (restored->parents[i] < 0)
        return group || !(record->flags & RECORD_FIRST) ? "a block is restored without its parent"
                                                        : NULL;
    above = &restored->records[restored->parents[i]];
    if (record_group(above))
        return "a block is restored under a leaf";
    if (!group)
        return NULL;
    if (group >= index->groups)
        return "a leaf of an unknown KV group is restored";
    key = leaf_key(index, above->key, group);
    return memcmp(&key, &record->key, sizeof(key)) == 0 ? NULL
                                                        : "a leaf is restored under another block";
}

/* Check that parents come before their children, and that no place is named twice. */
static const char *restored_check(const struct block_index *index,
                                  const struct restored *restored, uint8_t *seen)
{
    for (size_t i = 0; i < restored->n; i++) {
        const char *broken;

        if (restored->parents[i] >= (int64_t)i)
            return "a block is restored before its parent";
        broken = record_check(index, restored, i);
        if (broken)
            return broken;
        if (seen[restored->ids[i]]++)
            return "a place is restored twice";
    }
    return NULL;
}

static PyObject *restore_checked(BlockIndex *self, unsigned tier, const struct restored *restored)
{
    size_t n = restored->n + 1;
    const struct tier *at = &self->index.tier[tier];
    ref *nodes = PyMem_Malloc(n * sizeof(*nodes));
    uint32_t *positions = PyMem_Malloc(n * sizeof(*positions));
    size_t *page_first = PyMem_Malloc(n * sizeof(*page_first));
    uint8_t *seen = PyMem_Calloc((size_t)at->capacity + 1, 1);
    const char *law = "restore of a tier that is already in use";
    PyObject *result = NULL;

    if (!nodes || !positions || !page_first || !seen) {
        PyErr_NoMemory();
    } else if (at->unused || at->capacity != at->places_max ||
               (law = restored_check(&self->index, restored, seen))) {
        index_broken(self, law);
    } else {
        index_restore(&self->index, tier, restored, nodes, positions, page_first);
        result = Py_NewRef(Py_None);
    }
    PyMem_Free(nodes);
    PyMem_Free(positions);
    PyMem_Free(page_first);
    PyMem_Free(seen);
    return result;
}

static PyObject *restore(BlockIndex *self, struct value *values)
{
    unsigned tier = (unsigned)values[0].integer;
    const Py_buffer *records = &values[1].view.buffer;
    const struct int64_view *parents = &values[2].view, *ids = &values[3].view;
    struct restored restored = {(size_t)ids->count, records->buf, parents->buffer.buf,
                                ids->buffer.buf};

    if (int64_range_check(ids, "ids", 0, self->index.tier[tier].capacity) < 0 ||
        int64_range_check(parents, "parents", -1, ids->count) < 0)
        return NULL;
    if (parents->count == ids->count && (uintptr_t)records->buf % 4 == 0 &&
        records->len == ids->count * (Py_ssize_t)sizeof(struct block_record))
        return restore_checked(self, tier, &restored);
    return PyErr_Format(PyExc_ValueError,
                        "records, parents and ids differ in length or are not aligned");
}

CALL(call_, restore, BlockIndex, 4, READ("tier", read_tier), READ("records", read_bytes),
     READ("parents", read_aligned), READ("ids", read_aligned))

static PyObject *watch(BlockIndex *self, struct value *values)
{
    if (!changes_watch(&self->index.changes, (uint32_t)values[0].integer))
        return PyErr_NoMemory();
    return Py_NewRef(Py_None);
}

CALL(call_, watch, BlockIndex, 1, INTEGER("limit", 0, UINT32_MAX / sizeof(struct change)))

PyObject *index_call_changes(BlockIndex *self, PyObject *Py_UNUSED(none))
{
    struct changes *changes = &self->index.changes;
    PyObject *result = changes->lost
                           ? Py_NewRef(Py_None)
                           : PyBytes_FromStringAndSize(
                                 (char *)changes->kept,
                                 (Py_ssize_t)(changes->count * sizeof(struct change)));

    if (!result)
        return NULL;
    changes->count = 0;
    changes->lost = false;
    return result;
}

static PyObject *ends(BlockIndex *self, struct value *values)
{
    const struct block_index *index = &self->index;
    ref begin = (ref)values[0].integer, end = index->nodes_unused;
    struct change *changes;
    PyObject *result;

    if (begin >= end)
        return Py_NewRef(Py_None);
    if (end - begin > values[1].integer)
        end = begin + (ref)values[1].integer;
    changes = PyMem_Malloc((end - begin) * sizeof(*changes));
    if (!changes)
        return PyErr_NoMemory();
    result = PyBytes_FromStringAndSize(
        (char *)changes, (Py_ssize_t)(ready_ends(index, begin, end, (uint32_t)values[2].integer,
                                                 changes) *
                                      sizeof(*changes)));
    PyMem_Free(changes);
    return result;
}

CALL(call_, ends, BlockIndex, 3, INTEGER("begin", 0, NONE), INTEGER("count", 1, NODES_A_CALL),
     INTEGER("size", 1, SPAN_MAX))
