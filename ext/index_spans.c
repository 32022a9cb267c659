/* Spans: runs of `size` blocks of the chain, the first of which is at a multiple of `size`. */
#include "index.h"

/* Whole spans that were found, one after the other. */
struct spans {
    const struct block_index *index;
    unsigned tier;
    uint32_t size;
    size_t count, room;
    int64_t *ids;        /* the places of each span's blocks */
    struct key *keys;    /* the parent of the first block of each span, and its blocks */
    bool lacks_memory;
};

static bool is_ready(const struct spans *spans, ref number)
{
    ref id = node_at(spans->index, number)->place[spans->tier];

    return id != NONE && spans->index->tier[spans->tier].places[id].state == PLACE_READY;
}

static bool spans_grow(struct spans *spans)
{
    size_t room = spans->room ? 2 * spans->room : 8;
    int64_t *ids = PyMem_Realloc(spans->ids, room * spans->size * sizeof(*ids));
    struct key *keys;

    if (ids)
        spans->ids = ids;
    keys = PyMem_Realloc(spans->keys, room * (spans->size + 1) * sizeof(*keys));
    if (keys)
        spans->keys = keys;
    spans->lacks_memory = !ids || !keys;
    if (!spans->lacks_memory)
        spans->room = room;
    return !spans->lacks_memory;
}

/* Add the span that ends with a block, if all of its blocks are READY. */
static void span_add(struct spans *spans, ref last)
{
    int64_t *ids;
    struct key *keys;
    ref at = last;

    for (uint32_t i = 0; i < spans->size; i++, at = node_at(spans->index, at)->parent)
        if (!is_ready(spans, at))
            return;
    if (spans->count == spans->room && !spans_grow(spans))
        return;
    ids = spans->ids + spans->count * spans->size;
    keys = spans->keys + spans->count * (spans->size + 1);
    spans->count++;
    at = last;
    for (uint32_t i = spans->size; i-- > 0; at = node_at(spans->index, at)->parent) {
        ids[i] = node_at(spans->index, at)->place[spans->tier];
        keys[i + 1] = node_at(spans->index, at)->key;
    }
    keys[0] = node_at(spans->index, at)->key;
}

/* Add the spans that end with a block, or with one that continues it within the same span. */
static void spans_below(struct spans *spans, ref number)
{
    const struct node *node = node_at(spans->index, number);

    if (!is_ready(spans, number) || spans->lacks_memory)
        return;
    if (node->depth % spans->size == 0) {
        span_add(spans, number);
        return;
    }
    for (ref child = node->child; child != NONE; child = node_at(spans->index, child)->after)
        if (!is_leaf(spans->index, child))
            spans_below(spans, child);
}

/* Return the node of the chain's block that is READY at a place, or NONE. */
static ref chain_node(const struct spans *spans, int64_t id)
{
    const struct place *place = place_at(&spans->index->tier[spans->tier], id);

    return place && place->state == PLACE_READY && !is_leaf(spans->index, place->node)
               ? place->node
               : NONE;
}

static PyObject *spans_of(BlockIndex *self, struct value *values)
{
    const struct int64_view *ids = &values[1].view;
    struct spans spans = {.index = &self->index,
                          .tier = (unsigned)values[0].integer,
                          .size = (uint32_t)values[2].integer};
    PyObject *result = NULL;
    ref next = ids->count ? chain_node(&spans, int64_at(ids, 0)) : NONE;

    for (Py_ssize_t i = 0; i < ids->count; i++) {
        ref number = next;
        bool goes_on;

        next = i + 1 < ids->count ? chain_node(&spans, int64_at(ids, i + 1)) : NONE;
        if (number == NONE)
            continue;
        /* Of blocks that continue one another only the last one needs a look below it. */
        goes_on = next != NONE && node_at(&self->index, next)->parent == number;
        if (!goes_on || node_at(&self->index, number)->depth % spans.size == 0)
            spans_below(&spans, number);
    }
    if (spans.lacks_memory)
        PyErr_NoMemory();
    else
        result = Py_BuildValue("(y#y#)", spans.count ? (const char *)spans.ids : "",
                               (Py_ssize_t)(spans.count * spans.size * sizeof(int64_t)),
                               spans.count ? (const char *)spans.keys : "",
                               (Py_ssize_t)(spans.count * (spans.size + 1) * sizeof(struct key)));
    PyMem_Free(spans.ids);
    PyMem_Free(spans.keys);
    return result;
}

CALL_NAMED(call_spans, "spans", spans_of, BlockIndex, 3, READ("tier", read_tier),
           READ("ids", read_int64s), INTEGER("size", 1, SPAN_MAX))
