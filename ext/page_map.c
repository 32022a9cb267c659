/* PageMap: a checked description of pages, and copy_now, which copies in the calling thread. */
#include "page_map.h"

#define COPY_NOW_HOLD_BYTES_MAX ((size_t)64 << 10)

/* Check one row of the piece table and add it to the layout. */
static int piece_read(struct layout *layout, const struct int64_view *rows, Py_ssize_t row)
{
    int64_t base = int64_at(rows, row * 4), stride = int64_at(rows, row * 4 + 1);
    int64_t bytes = int64_at(rows, row * 4 + 2), offset = int64_at(rows, row * 4 + 3);
    int64_t host_stride = (int64_t)layout->host_stride;
    int64_t span, end;
    const char *why = NULL;

    if (base < 1 || stride < 0 || bytes < 1 || offset < 0)
        why = "a field is out of range";
    else if (layout->device_blocks > 1 && stride < bytes)
        why = "blocks overlap";
    else if (bytes > host_stride || offset > host_stride - bytes)
        why = "it does not fit the host block";
    else if (__builtin_mul_overflow(stride, (int64_t)layout->device_blocks - 1, &span) ||
             __builtin_add_overflow(base, span, &end) || __builtin_add_overflow(end, bytes, &end))
        why = "addresses overflow";
    if (why)
        return raise_value("piece %zd: %s", row, why);
    layout->pieces[row] = (struct piece){.base = (char *)(intptr_t)base,
                                         .stride = (size_t)stride,
                                         .bytes = (size_t)bytes,
                                         .offset = (size_t)offset,
                                         .start = layout->block_bytes};
    layout->block_bytes += (size_t)bytes;
    if (layout->block_bytes > (size_t)host_stride)
        return raise_value("piece %zd: the pieces exceed the host block", row);
    return 0;
}

static int layout_read(struct layout *layout, PyObject *pieces)
{
    struct int64_view rows;
    int result = -1;

    if (int64_rows_hold(pieces, "pieces", &rows) < 0)
        return -1;
    if (rows.count == 0) {
        PyErr_SetString(PyExc_ValueError, "there are no pieces");
        goto release;
    }
    layout->pieces = PyMem_Calloc((size_t)rows.count, sizeof(*layout->pieces));
    if (!layout->pieces) {
        PyErr_NoMemory();
        goto release;
    }
    for (Py_ssize_t row = 0; row < rows.count; row++)
        if (piece_read(layout, &rows, row) < 0)
            goto release;
    layout->piece_count = (size_t)rows.count;
    result = 0;
release:
    PyBuffer_Release(&rows.buffer);
    return result;
}

/* Make the map keep sums in a buffer of uint64[host blocks]. Return 0, or -1 with an exception. */
static int sums_hold(PageMap *map, PyObject *sums)
{
    struct layout *layout = &map->layout;

    if (PyObject_GetBuffer(sums, &map->sums, PyBUF_WRITABLE) < 0)
        return -1;
    if ((size_t)map->sums.len != layout->host_blocks * sizeof(uint64_t) ||
        (uintptr_t)map->sums.buf % sizeof(uint64_t) != 0)
        return raise_value("sums has %zd bytes, not %zu, or is not aligned", map->sums.len,
                           layout->host_blocks * sizeof(uint64_t));
    for (size_t i = 0; i < layout->piece_count; i++)
        if (layout->pieces[i].offset != layout->pieces[i].start)
            return raise_value("piece %zu: with sums, pieces may leave no gaps", i);
    layout->sums = map->sums.buf;
    return 0;
}

static PyObject *page_map_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"pieces", "device_blocks", "host", "host_stride",
                            "owner",  "sums",          "shared", NULL};
    PyObject *pieces, *host, *owner, *sums = NULL;
    long long device_blocks, host_stride;
    int shared = 0;
    PageMap *self;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OLOLO|Op:PageMap", names, &pieces,
                                     &device_blocks, &host, &host_stride, &owner, &sums, &shared))
        return NULL;
    if (device_blocks < 1 || host_stride < 1)
        return PyErr_Format(PyExc_ValueError, "device_blocks and host_stride must be 1 or more");
    self = (PageMap *)PyType_GenericAlloc(type, 0);
    if (!self)
        return NULL;
    if (PyObject_GetBuffer(host, &self->host, PyBUF_WRITABLE) < 0) {
        Py_DECREF(self);
        return NULL;
    }
    self->owner = Py_NewRef(owner);
    self->layout.device_blocks = (size_t)device_blocks;
    self->layout.host = self->host.buf;
    self->layout.host_stride = (size_t)host_stride;
    self->layout.shared = shared;
    self->layout.host_blocks = (size_t)self->host.len / (size_t)host_stride;
    if (layout_read(&self->layout, pieces) < 0 ||
        (sums && !Py_IsNone(sums) && sums_hold(self, sums) < 0)) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

/* The map may be in a cycle with its owner (owner -> adapter -> map). */
static int page_map_traverse(PageMap *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE((PyObject *)self));
    Py_VISIT(self->owner);
    return 0;
}

static int page_map_clear(PageMap *self)
{
    Py_CLEAR(self->owner);
    return 0;
}

static void page_map_dealloc(PageMap *self)
{
    PyObject_GC_UnTrack(self);
    PyMem_Free(self->layout.pieces);
    PyBuffer_Release(&self->host);
    PyBuffer_Release(&self->sums);
    Py_CLEAR(self->owner);
    instance_free((PyObject *)self);
}

int read_pages(PyObject *self, const struct parameter *Py_UNUSED(parameter), struct value *value)
{
    const struct ext_state *state = PyModule_Check(self) ? PyModule_GetState(self)
                                                         : PyType_GetModuleState(Py_TYPE(self));

    if (PyObject_TypeCheck(value->object, state->page_map))
        return 0;
    PyErr_SetString(PyExc_TypeError, "pages must be a PageMap");
    return -1;
}

static int ids_copy(const struct int64_view *view, const char *name, size_t limit, int64_t *ids)
{
    for (Py_ssize_t i = 0; i < view->count; i++) {
        ids[i] = int64_at(view, i);
        if ((uint64_t)ids[i] >= limit)
            return raise_value("%s[%zd]=%lld is outside 0..%zd", name, i, (long long)ids[i],
                               (Py_ssize_t)limit - 1);
    }
    return 0;
}

int page_work_fill(const PageMap *map, enum direction direction, const struct int64_view *device,
                   const struct int64_view *host, int64_t *ids, struct copy_work *work)
{
    const struct layout *layout = &map->layout;

    *work = (struct copy_work){layout, direction, 0, ids, ids + host->count};
    if (device && device->count != host->count)
        return raise_value("%zd device ids for %zd host ids", device->count, host->count);
    if (__builtin_mul_overflow((size_t)host->count, layout->block_bytes, &work->bytes))
        return raise_value("the job's bytes overflow");
    if (device && ids_copy(device, "device_ids", layout->device_blocks, ids) < 0)
        return -1;
    return ids_copy(host, "host_ids", layout->host_blocks, ids + host->count);
}

int64_t *page_work_new(const struct value *values, struct copy_work *work)
{
    size_t count = (size_t)(values[2].view.count + values[3].view.count);
    int64_t *ids = PyMem_Malloc(count * sizeof(*ids));

    if (!ids)
        return (int64_t *)PyErr_NoMemory();
    if (page_work_fill((PageMap *)values[0].object, (enum direction)values[1].integer,
                       &values[2].view, &values[3].view, ids, work) < 0) {
        PyMem_Free(ids);
        return NULL;
    }
    return ids;
}

static PyObject *copy_now(PyObject *Py_UNUSED(module), struct value *values)
{
    struct copy_work work;
    int64_t *ids = page_work_new(values, &work);
    PyThreadState *saved;

    if (!ids)
        return NULL;
    sums_begin(&work);
    saved = gil_leave(work.bytes > COPY_NOW_HOLD_BYTES_MAX);
    copy_range(&work, 0, work.bytes);
    gil_return(saved);
    PyMem_Free(ids);
    return Py_NewRef(Py_None);
}

CALL(pages_, copy_now, PyObject, 4, PAGE_JOB)

static PyMemberDef page_map_members[] = {
    {"piece_count", T_PYSSIZET, offsetof(PageMap, layout.piece_count), READONLY,
     "Pieces of one block."},
    {"block_bytes", T_PYSSIZET, offsetof(PageMap, layout.block_bytes), READONLY,
     "Bytes of all pieces of one block."},
    {0},
};

static PyType_Slot page_map_slots[] = {
    {Py_tp_doc, "PageMap(pieces, device_blocks, host, host_stride, owner, sums=None, "
                "shared=False)\n--\n\n"
                "Where the pieces of a device block are, and where they go in a host block."},
    {Py_tp_new, page_map_new},
    {Py_tp_dealloc, page_map_dealloc},
    {Py_tp_traverse, page_map_traverse},
    {Py_tp_clear, page_map_clear},
    {Py_tp_members, page_map_members},
    {0, NULL},
};

PyType_Spec page_map_spec = {
    .name = "flexkv._ext.PageMap",
    .basicsize = sizeof(PageMap),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = page_map_slots,
};
