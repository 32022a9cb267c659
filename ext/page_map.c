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
    if (why) {
        PyErr_Format(PyExc_ValueError, "piece %zd: %s", row, why);
        return -1;
    }
    layout->pieces[row] = (struct piece){.base = (char *)(intptr_t)base,
                                         .stride = (size_t)stride,
                                         .bytes = (size_t)bytes,
                                         .offset = (size_t)offset,
                                         .start = layout->block_bytes};
    layout->block_bytes += (size_t)bytes;
    if (layout->block_bytes > (size_t)host_stride) {
        PyErr_Format(PyExc_ValueError, "piece %zd: the pieces exceed the host block", row);
        return -1;
    }
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
        (uintptr_t)map->sums.buf % sizeof(uint64_t) != 0) {
        PyErr_Format(PyExc_ValueError, "sums has %zd bytes, not %zu, or is not aligned",
                     map->sums.len, layout->host_blocks * sizeof(uint64_t));
        return -1;
    }
    for (size_t i = 0; i < layout->piece_count; i++)
        if (layout->pieces[i].offset != layout->pieces[i].start) {
            PyErr_Format(PyExc_ValueError, "piece %zu: with sums, pieces may leave no gaps", i);
            return -1;
        }
    layout->sums = map->sums.buf;
    return 0;
}

static PyObject *page_map_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"pieces", "device_blocks", "host", "host_stride",
                            "owner",  "sums",          NULL};
    PyObject *pieces, *host, *owner, *sums = NULL;
    long long device_blocks, host_stride;
    PageMap *self;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OLOLO|O:PageMap", names, &pieces,
                                     &device_blocks, &host, &host_stride, &owner, &sums))
        return NULL;
    if (device_blocks < 1 || host_stride < 1) {
        PyErr_SetString(PyExc_ValueError, "device_blocks and host_stride must be 1 or more");
        return NULL;
    }
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

int page_ids_hold(const PageMap *map, PyObject *device, PyObject *host, struct page_ids *ids)
{
    if (int64_view_hold(device, "device_ids", &ids->device) < 0)
        return -1;
    if (int64_view_hold(host, "host_ids", &ids->host) < 0) {
        PyBuffer_Release(&ids->device.buffer);
        return -1;
    }
    if (ids->device.count != ids->host.count) {
        PyErr_Format(PyExc_ValueError, "%zd device ids for %zd host ids", ids->device.count,
                     ids->host.count);
        page_ids_release(ids);
        return -1;
    }
    if (__builtin_mul_overflow((size_t)ids->device.count, map->layout.block_bytes, &ids->bytes)) {
        PyErr_SetString(PyExc_ValueError, "the job's bytes overflow");
        page_ids_release(ids);
        return -1;
    }
    return 0;
}

PageMap *page_map_read(const struct ext_state *state, PyObject *object)
{
    if (PyObject_TypeCheck(object, state->page_map))
        return (PageMap *)object;
    PyErr_SetString(PyExc_TypeError, "pages must be a PageMap");
    return NULL;
}

PageMap *page_job_read(const struct ext_state *state, PyObject *const *values, int64_t *direction,
                       struct page_ids *ids)
{
    PageMap *map = page_map_read(state, values[0]);

    if (!map || integer_read(values[1], "direction", TO_HOST, TO_DEVICE, direction) < 0 ||
        page_ids_hold(map, values[2], values[3], ids) < 0)
        return NULL;
    return map;
}

static int ids_copy(const struct int64_view *view, const char *name, size_t limit, int64_t *ids)
{
    for (Py_ssize_t i = 0; i < view->count; i++) {
        ids[i] = int64_at(view, i);
        if ((uint64_t)ids[i] >= limit) {
            PyErr_Format(PyExc_ValueError, "%s[%zd]=%lld is outside 0..%zd", name, i,
                         (long long)ids[i], (Py_ssize_t)limit - 1);
            return -1;
        }
    }
    return 0;
}

int page_ids_copy(const PageMap *map, const struct page_ids *ids, int64_t *device_ids,
                  int64_t *host_ids)
{
    if (device_ids &&
        ids_copy(&ids->device, "device_ids", map->layout.device_blocks, device_ids) < 0)
        return -1;
    return ids_copy(&ids->host, "host_ids", map->layout.host_blocks, host_ids);
}

void page_ids_release(struct page_ids *ids)
{
    PyBuffer_Release(&ids->device.buffer);
    PyBuffer_Release(&ids->host.buffer);
}

PyObject *page_map_copy_now(PyObject *module, PyObject *const *args, Py_ssize_t count,
                            PyObject *keywords)
{
    static const char *const names[] = {"pages", "direction", "device_ids", "host_ids"};
    static const struct signature signature = {"copy_now", names, 4, 4};
    PyObject *values[4], *result = NULL;
    struct page_ids ids;
    int64_t direction, *id_copies;
    size_t pairs;
    PageMap *map;

    if (args_unpack(&signature, args, count, keywords, values) < 0)
        return NULL;
    map = page_job_read(PyModule_GetState(module), values, &direction, &ids);
    if (!map)
        return NULL;
    pairs = (size_t)ids.device.count;
    id_copies = PyMem_Malloc(2 * pairs * sizeof(*id_copies));
    if (!id_copies) {
        PyErr_NoMemory();
    } else if (page_ids_copy(map, &ids, id_copies, id_copies + pairs) == 0) {
        struct copy_work work = {&map->layout, (enum direction)direction, ids.bytes, id_copies,
                                 id_copies + pairs};

        sums_begin(&work);
        if (work.bytes > COPY_NOW_HOLD_BYTES_MAX) {
            Py_BEGIN_ALLOW_THREADS
            copy_range(&work, 0, work.bytes);
            Py_END_ALLOW_THREADS
        } else {
            copy_range(&work, 0, work.bytes);
        }
        result = Py_NewRef(Py_None);
    }
    PyMem_Free(id_copies);
    page_ids_release(&ids);
    return result;
}

static PyObject *page_map_block_bytes(PageMap *self, void *Py_UNUSED(closure))
{
    return PyLong_FromSize_t(self->layout.block_bytes);
}

static PyObject *page_map_piece_count(PageMap *self, void *Py_UNUSED(closure))
{
    return PyLong_FromSize_t(self->layout.piece_count);
}

static PyGetSetDef page_map_properties[] = {
    {"piece_count", (getter)page_map_piece_count, NULL, "Pieces of one block.", NULL},
    {"block_bytes", (getter)page_map_block_bytes, NULL, "Bytes of all pieces of one block.", NULL},
    {0},
};

static PyType_Slot page_map_slots[] = {
    {Py_tp_doc, "PageMap(pieces, device_blocks, host, host_stride, owner, sums=None)\n--\n\n"
                "Where the pieces of a device block are, and where they go in a host block."},
    {Py_tp_new, page_map_new},
    {Py_tp_dealloc, page_map_dealloc},
    {Py_tp_traverse, page_map_traverse},
    {Py_tp_clear, page_map_clear},
    {Py_tp_getset, page_map_properties},
    {0, NULL},
};

PyType_Spec page_map_spec = {
    .name = "flexkv._ext.PageMap",
    .basicsize = sizeof(PageMap),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = page_map_slots,
};
