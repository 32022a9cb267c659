/* Finds blocks that one tier holds and another lacks, and reserves places there, without knowing
 * their prompts. */
#include "index.h"
#include "index_density.h"

#define SAME_ROOT_MAX 1024 /* blocks for which places are taken in one go */

/* The outcome for each block for which a place in another tier was wanted. */
enum copy_outcome {
    COPY_TAKEN,   /* it has a place there now, RESERVED */
    COPY_GONE,    /* the source tier no longer has it */
    COPY_THERE,   /* it had a place there already */
    COPY_NO_ROOM, /* there is no room, or it is not worth an eviction */
};

struct copies {
    unsigned source, target;
    const int64_t *source_ids;
    const unsigned char *keys; /* of each: its place may hold another block by now */
    size_t n;
    enum reserve_how how;
    unsigned char *outcomes;
    int64_t *target_ids;       /* of those taken, in order */
    size_t taken;
};

static const struct place *ready_place(const struct tier *tier, int64_t id)
{
    const struct place *place = place_at(tier, id);

    return place && place->state == PLACE_READY ? place : NULL;
}

static enum copy_outcome copy_judge(const struct block_index *index, const struct copies *copies,
                                    size_t i)
{
    const struct place *place = ready_place(&index->tier[copies->source], copies->source_ids[i]);

    if (!place || !node_has(index, place->node, key_at(copies->keys, (int64_t)i - 1)))
        return COPY_GONE;
    return node_at(index, place->node)->place[copies->target] == NONE ? COPY_TAKEN : COPY_THERE;
}

static ref copy_node(const struct block_index *index, const struct copies *copies, size_t i)
{
    return index->tier[copies->source].places[copies->source_ids[i]].node;
}

/* Take places for candidates of one namespace; `at` has their indices among the copies. */
static void copies_take(struct block_index *index, struct copies *copies, const size_t *at,
                        size_t n)
{
    struct density *density = index->tier[copies->target].density;
    unsigned char keys[(SAME_ROOT_MAX + 1) * INDEX_KEY_BYTES];
    int64_t positions[SAME_ROOT_MAX], uses[SAME_ROOT_MAX];
    struct batch batch = {keys, n + 1, positions, n, 0};
    ref root = node_at(index, copy_node(index, copies, at[0]))->root;
    unsigned quota;
    size_t room, given = 0;

    memcpy(keys, &node_at(index, root)->key, INDEX_KEY_BYTES);
    for (size_t i = 0; i < n; i++) {
        ref number = copy_node(index, copies, at[i]);

        if (is_leaf(index, number)) /* it is taken to be used as often as its parent */
            number = node_at(index, number)->parent;
        memcpy(keys + (i + 1) * INDEX_KEY_BYTES, &node_at(index, number)->key, INDEX_KEY_BYTES);
        positions[i] = (int64_t)i;
    }
    quota = index->quotas ? quota_of(index, node_at(index, root)->key) : 0;
    if (density)
        density_foresee(density, &batch, uses);
    room = room_make(index, copies->target, quota, &batch, copies->how, uses);
    for (size_t i = 0; i < n; i++) {
        ref number = copy_node(index, copies, at[i]);

        if (node_at(index, number)->place[copies->target] != NONE) { /* it was named twice */
            copies->outcomes[at[i]] = COPY_THERE;
            continue;
        }
        if (given++ >= room) {
            copies->outcomes[at[i]] = COPY_NO_ROOM;
            continue;
        }
        copies->target_ids[copies->taken++] =
            place_reserve(index, copies->target, number, quota, density ? (uint32_t)uses[i] : 0,
                          false);
    }
}

/* Making room for some blocks drops none of the others, because each has a place in the source. */
static void copies_reserve(struct block_index *index, struct copies *copies)
{
    size_t at[SAME_ROOT_MAX], n = 0;
    ref root = NONE;

    for (size_t i = 0; i < copies->n; i++) {
        ref own;

        copies->outcomes[i] = (unsigned char)copy_judge(index, copies, i);
        if (copies->outcomes[i] != COPY_TAKEN)
            continue;
        own = node_at(index, copy_node(index, copies, i))->root;
        if (n && (own != root || n == SAME_ROOT_MAX)) {
            copies_take(index, copies, at, n);
            n = 0;
        }
        root = own;
        at[n++] = i;
    }
    if (n)
        copies_take(index, copies, at, n);
}

static PyObject *reserve_copies(BlockIndex *self, struct value *values)
{
    size_t n = (size_t)values[2].view.count;
    PyObject *outcomes, *result = NULL;
    struct copies copies = {
        .source = (unsigned)values[0].integer,
        .target = (unsigned)values[1].integer,
        .source_ids = values[2].view.buffer.buf,
        .keys = values[3].view.buffer.buf,
        .n = n,
        .how = (enum reserve_how)values[4].integer,
    };

    if ((size_t)values[3].view.buffer.len != n * INDEX_KEY_BYTES)
        return raise_keys(values[3].view.buffer.len, n);
    outcomes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)n);
    copies.target_ids = PyMem_Malloc((n + 1) * sizeof(int64_t));
    if (!copies.target_ids) {
        PyErr_NoMemory();
    } else if (outcomes) {
        copies.outcomes = (unsigned char *)PyBytes_AsString(outcomes);
        copies_reserve(&self->index, &copies);
        result = Py_BuildValue("(Oy#)", outcomes, (const char *)copies.target_ids,
                               (Py_ssize_t)(copies.taken * sizeof(int64_t)));
    }
    PyMem_Free(copies.target_ids);
    Py_XDECREF(outcomes);
    return result;
}

CALL(call_, reserve_copies, BlockIndex, 5, READ("source", read_tier), READ("target", read_tier),
     READ("ids", read_aligned), READ("keys", read_bytes), INTEGER("how", 0, RESERVE_HOWS - 1))

static PyObject *lacking(BlockIndex *self, struct value *values)
{
    const struct tier *tier = &self->index.tier[values[0].integer];
    const struct tier *target = &self->index.tier[values[1].integer];
    bool unwritten = values[4].integer;
    int64_t begin = values[2].integer, end, *ids;
    Py_ssize_t count = 0;
    PyObject *result;

    if (integer_read(values[3].object, "end", begin, UINT32_MAX, &end) < 0)
        return NULL;
    if (end > tier->unused)
        end = tier->unused;
    ids = PyMem_Malloc((end > begin ? (size_t)(end - begin) : 1) * sizeof(*ids));
    if (!ids)
        return PyErr_NoMemory();
    for (int64_t id = begin; id < end; id++) {
        const struct place *place = ready_place(tier, id);
        ref copy = place ? node_at(&self->index, place->node)->place[values[1].integer] : NONE;

        if (place && (copy == NONE || (unwritten && !ready_place(target, copy))))
            ids[count++] = id;
    }
    result = PyBytes_FromStringAndSize((const char *)ids, count * (Py_ssize_t)sizeof(*ids));
    PyMem_Free(ids);
    return result;
}

CALL(call_, lacking, BlockIndex, 5, READ("source", read_tier), READ("target", read_tier),
     INTEGER("begin", 0, UINT32_MAX), OBJECT("end"), INTEGER("unwritten", 0, 1))
