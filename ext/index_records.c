/* The calls of BlockIndex that report blocks to others: records for a later run, and changes. */
#include "index.h"

static int ids_of_tier(PyObject *object, const char *name, int64_t most, int64_t least,
                       struct int64_view *view)
{
    if (int64_view_hold(object, name, view) < 0)
        return -1;
    for (Py_ssize_t i = 0; i < view->count; i++) {
        int64_t value = int64_at(view, i);

        if (value >= least && value < most)
            continue;
        PyErr_Format(PyExc_ValueError, "%s[%zd]=%lld is outside %lld..%lld", name, i,
                     (long long)value, (long long)least, (long long)most - 1);
        PyBuffer_Release(&view->buffer);
        return -1;
    }
    return 0;
}

PyObject *index_call_export(BlockIndex *self, PyObject *args)
{
    PyObject *tier_object, *ids_object, *result;
    struct int64_view ids;
    unsigned tier;
    char *at;

    if (!PyArg_UnpackTuple(args, "export", 2, 2, &tier_object, &ids_object) ||
        tier_read(self, tier_object, &tier) < 0 ||
        int64_view_hold(ids_object, "ids", &ids) < 0)
        return NULL;
    result = PyBytes_FromStringAndSize(NULL,
                                       ids.count * (Py_ssize_t)sizeof(struct block_record));
    at = result ? PyBytes_AsString(result) : NULL;
    for (Py_ssize_t i = 0; result && i < ids.count; i++, at += sizeof(struct block_record)) {
        struct block_record record = {0};

        index_export(&self->index, tier, int64_at(&ids, i), &record);
        memcpy(at, &record, sizeof(record));
    }
    PyBuffer_Release(&ids.buffer);
    return result;
}

/* Check that parents come before their children, and that no place is named twice. */
static const char *restored_check(const struct restored *restored, uint8_t *seen)
{
    for (size_t i = 0; i < restored->n; i++) {
        if (restored->parents[i] >= (int64_t)i)
            return "a block is restored before its parent";
        if (restored->parents[i] < 0 && !restored->records[i].is_first)
            return "a block is restored without its parent";
        if (seen[restored->ids[i]]++)
            return "a place is restored twice";
    }
    return NULL;
}

static PyObject *restore(BlockIndex *self, unsigned tier, const struct restored *restored)
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
               (law = restored_check(restored, seen))) {
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

PyObject *index_call_restore(BlockIndex *self, PyObject *args)
{
    PyObject *tier_object, *records_object, *parents_object, *ids_object, *result = NULL;
    struct int64_view parents, ids;
    Py_buffer records;
    unsigned tier;

    if (!PyArg_UnpackTuple(args, "restore", 4, 4, &tier_object, &records_object,
                           &parents_object, &ids_object) ||
        tier_read(self, tier_object, &tier) < 0 ||
        PyObject_GetBuffer(records_object, &records, PyBUF_SIMPLE) < 0)
        return NULL;
    if (ids_of_tier(ids_object, "ids", self->index.tier[tier].capacity, 0, &ids) < 0)
        goto no_ids;
    if (ids_of_tier(parents_object, "parents", ids.count, -1, &parents) < 0)
        goto no_parents;
    if (parents.count != ids.count ||
        records.len != ids.count * (Py_ssize_t)sizeof(struct block_record) ||
        ((uintptr_t)records.buf % 4 | (uintptr_t)parents.buffer.buf % 8 |
         (uintptr_t)ids.buffer.buf % 8))
        PyErr_SetString(PyExc_ValueError, "records, parents and ids differ in length or are not "
                                          "aligned");
    else
        result = restore(self, tier,
                         &(struct restored){(size_t)ids.count, records.buf, parents.buffer.buf,
                                            ids.buffer.buf});
    PyBuffer_Release(&parents.buffer);
no_parents:
    PyBuffer_Release(&ids.buffer);
no_ids:
    PyBuffer_Release(&records);
    return result;
}

PyObject *index_call_watch(BlockIndex *self, PyObject *object)
{
    int64_t limit;

    if (integer_read(object, "limit", 0, UINT32_MAX / sizeof(struct change), &limit) < 0)
        return NULL;
    if (!changes_watch(&self->index.changes, (uint32_t)limit))
        return PyErr_NoMemory();
    return Py_NewRef(Py_None);
}

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
