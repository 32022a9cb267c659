/* The type Hints and its calls: one per batch of keys, never one per key. */
#include "ext.h"

#include <errno.h>

#include "hints.h"

#define TICKS_MAX (INT64_MAX / 2)

typedef struct {
    PyObject_HEAD
    struct hints hints;
    pair *found; /* scratch for one run */
    size_t found_max;
} Hints;

/* The parameters that several calls have. `holder` is the first, `size` the last. */
#define HOLDER INTEGER("holder", 0, HOLDERS_MAX - 1)
#define KEYS READ("keys", read_bytes)
#define SIZE INTEGER("size", 8, HINTS_KEY_BYTES)

/* Read the keys of a call, and how many bytes each has. Return 0, or -1 with ValueError. */
static int keys_read(const struct value *values, const struct value *size, struct keys *keys)
{
    const Py_buffer *buffer = &values->view.buffer;

    keys->bytes = buffer->buf;
    keys->size = size && size->object ? (size_t)size->integer : HINTS_KEY_BYTES;
    keys->count = (size_t)buffer->len / keys->size;
    if (keys->size != 8 && keys->size != HINTS_KEY_BYTES)
        return raise_value("size=%zu, must be 8 or 16", keys->size);
    if ((size_t)buffer->len % keys->size)
        return raise_value("keys has %zd bytes, must be keys of %zu each", buffer->len, keys->size);
    return 0;
}

static PyObject *note(Hints *self, struct value *values)
{
    struct keys keys;

    if (keys_read(&values[2], &values[3], &keys) < 0)
        return NULL;
    return PyLong_FromSize_t(hints_note(&self->hints, keys, (unsigned)values[0].integer,
                                        (unsigned)values[1].integer));
}

static CALL(hints_call_, note, Hints, 3, HOLDER, INTEGER("tier", 0, 1), KEYS, SIZE)

static PyObject *drop(Hints *self, struct value *values)
{
    struct keys keys;

    if (keys_read(&values[1], &values[2], &keys) < 0)
        return NULL;
    return PyLong_FromSize_t(hints_drop(&self->hints, keys, (unsigned)values[0].integer));
}

static CALL(hints_call_, drop, Hints, 2, HOLDER, KEYS, SIZE)

static PyObject *doubt(Hints *self, struct value *values)
{
    struct keys keys;

    if (keys_read(&values[1], NULL, &keys) < 0)
        return NULL;
    return PyLong_FromSize_t(hints_doubt(&self->hints, keys, (unsigned)values[0].integer,
                                         (unsigned)values[2].integer));
}

static CALL(hints_call_, doubt, Hints, 3, HOLDER, KEYS, INTEGER("ticks", 1, DOUBT_TICKS_MAX))

static PyObject *known(Hints *self, struct value *values)
{
    bool usable = values[2].object && values[2].integer;
    struct keys keys;
    PyObject *result;

    if (keys_read(&values[1], NULL, &keys) < 0)
        return NULL;
    result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)keys.count);
    if (result)
        hints_know(&self->hints, keys, (unsigned)values[0].integer, usable,
                   (uint8_t *)PyBytes_AsString(result));
    return result;
}

static CALL(hints_call_, known, Hints, 2, HOLDER, KEYS, READ("usable", read_flag))

static PyObject *nodes(Hints *self, struct value *values)
{
    struct keys keys;
    PyObject *result;

    if (keys_read(&values[0], NULL, &keys) < 0)
        return NULL;
    result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(keys.count * sizeof(int64_t)));
    if (result)
        hints_nodes(&self->hints, keys, (int64_t *)(void *)PyBytes_AsString(result));
    return result;
}

static CALL(hints_call_, nodes, Hints, 1, KEYS)

static int found_take(Hints *self, size_t count)
{
    pair *found;

    if (count <= self->found_max)
        return 0;
    found = PyMem_Realloc(self->found, count * sizeof(*found));
    if (!found) {
        PyErr_NoMemory();
        return -1;
    }
    self->found = found;
    self->found_max = count;
    return 0;
}

/* Return the number for each block from `first` up to `last`, of the spans that were found. */
static PyObject *ids_new(const Hints *self, int64_t first, int64_t last)
{
    PyObject *result = PyBytes_FromStringAndSize(NULL, (last - first) * (int64_t)sizeof(int64_t));
    int64_t step = self->hints.span_blocks, span = first / step;
    char *ids;

    if (!result)
        return NULL;
    ids = PyBytes_AsString(result);
    for (int64_t at = first; at < last; span++) {
        int64_t id = pair_id(self->found[span - first / step]), end = (span + 1) * step;

        for (; at < end && at < last; at++, ids += sizeof(id))
            memcpy(ids, &id, sizeof(id));
    }
    return result;
}

static PyObject *run(Hints *self, struct value *values)
{
    int64_t first, last, step = self->hints.span_blocks, end;
    struct keys prompt;
    size_t found;

    if (keys_read(&values[0], NULL, &prompt) < 0)
        return NULL;
    if (!prompt.count--) {
        raise_value("keys has no root");
        return NULL;
    }
    if (integer_read(values[1].object, "first", 0, (int64_t)prompt.count, &first) < 0 ||
        integer_read(values[2].object, "last", first, (int64_t)prompt.count, &last) < 0 ||
        found_take(self, (size_t)((last - first) / step) + 2) < 0)
        return NULL;
    found = hints_run(&self->hints, prompt, (size_t)first, (size_t)last,
                      values[3].object ? (unsigned)values[3].integer : USE_STORE | USE_NODES,
                      self->found);
    end = found ? (first / step + (int64_t)found) * step : first;
    return ids_new(self, first, end < last ? end : last);
}

static CALL(hints_call_, run, Hints, 3, KEYS, OBJECT("first"), OBJECT("last"),
            INTEGER("use", 0, USE_STORE | USE_NODES))

static PyObject *tick(Hints *self, struct value *values)
{
    int64_t now;

    if (integer_read(values[0].object, "now", self->hints.clock, TICKS_MAX, &now) < 0)
        return NULL;
    self->hints.clock = now;
    return Py_NewRef(Py_None);
}

static CALL(hints_call_, tick, Hints, 1, OBJECT("now"))

/* Return None, or raise ValueError for a broken rule. */
static PyObject *rule_kept(const struct value *values, const char *rule)
{
    if (!rule)
        return Py_NewRef(Py_None);
    raise_value("holder=%lld: %s", (long long)values[0].integer, rule);
    return NULL;
}

#define HOLDER_CALL(name, work)                                                                    \
    static PyObject *name(Hints *self, struct value *values)                                       \
    {                                                                                              \
        return rule_kept(values, work(&self->hints, (unsigned)values[0].integer));                 \
    }                                                                                              \
    static CALL(hints_call_, name, Hints, 1, HOLDER)

HOLDER_CALL(retire, holder_retire)
HOLDER_CALL(revive, holder_revive)
HOLDER_CALL(begin_round, round_begin)
HOLDER_CALL(end_round, round_end)

static PyObject *avoid(Hints *self, struct value *values)
{
    self->hints.holders[values[0].integer].is_down = values[1].integer;
    return Py_NewRef(Py_None);
}

static CALL(hints_call_, avoid, Hints, 2, HOLDER, READ("is_down", read_flag))

static PyObject *scrub(Hints *self, struct value *values)
{
    return PyLong_FromUnsignedLongLong(hints_scrub(&self->hints, (uint64_t)values[0].integer));
}

static CALL(hints_call_, scrub, Hints, 1, INTEGER("lines", 0, INT64_MAX))

static PyObject *pairs_of(Hints *self, struct value *values)
{
    const struct holder *holder = &self->hints.holders[values[0].integer];

    return Py_BuildValue("(III)", holder->pairs, holder->unseen, holder_dead(holder));
}

static CALL(hints_call_, pairs_of, Hints, 1, HOLDER)

static PyObject *hints_call_counts(Hints *self, PyObject *Py_UNUSED(none))
{
    return Py_BuildValue("(KKKK)", (unsigned long long)self->hints.pairs,
                         (unsigned long long)self->hints.dead,
                         (unsigned long long)self->hints.lost,
                         (unsigned long long)self->hints.bytes);
}

static PyObject *hints_call_clear(Hints *self, PyObject *Py_UNUSED(none))
{
    hints_clear(&self->hints);
    return Py_NewRef(Py_None);
}

static Py_ssize_t hints_length(Hints *self)
{
    return (Py_ssize_t)(self->hints.pairs - self->hints.dead);
}

static PyObject *hints_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"pairs_max", "span_blocks", NULL};
    PyObject *given[2];
    int64_t pairs_max, span_blocks;
    Hints *self;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OO:Hints", names, &given[0], &given[1]) ||
        integer_read(given[0], names[0], 1, INT64_C(1) << 31, &pairs_max) < 0 ||
        integer_read(given[1], names[1], 1, INT32_MAX, &span_blocks) < 0)
        return NULL;
    self = (Hints *)PyType_GenericAlloc(type, 0);
    if (self && !hints_open(&self->hints, (uint64_t)pairs_max, (uint32_t)span_blocks)) {
        raise_errno(errno);
        Py_CLEAR(self);
    }
    return (PyObject *)self;
}

static void hints_dealloc(Hints *self)
{
    hints_close(&self->hints);
    PyMem_Free(self->found);
    instance_free((PyObject *)self);
}

static PyMethodDef hints_methods[] = {
    FAST("note", hints_call_note, "Remember that a holder has spans."),
    FAST("drop", hints_call_drop, "Forget that a holder has spans."),
    FAST("doubt", hints_call_doubt, "Keep spans of a holder out of runs for some ticks."),
    FAST("known", hints_call_known, "Return which spans a holder is said to have."),
    FAST("nodes", hints_call_nodes, "Return which node may be asked for each of some spans."),
    FAST("run", hints_call_run, "Return who has the blocks of a prompt from a position on."),
    FAST("tick", hints_call_tick, "Set the time."),
    FAST("avoid", hints_call_avoid, "Name a holder in no run while it is down."),
    FAST("retire", hints_call_retire, "Declare all pairs of a holder dead."),
    FAST("revive", hints_call_revive, "Use the number of a retired holder again."),
    FAST("begin_round", hints_call_begin_round, "Declare all pairs of a holder unseen."),
    FAST("end_round", hints_call_end_round, "Declare the unseen pairs of a holder dead."),
    FAST("scrub", hints_call_scrub, "Remove the dead pairs of some lines."),
    FAST("pairs_of", hints_call_pairs_of, "Count the pairs of a holder."),
    {"counts", (PyCFunction)hints_call_counts, METH_NOARGS, "Count pairs and bytes."},
    {"clear", (PyCFunction)hints_call_clear, METH_NOARGS, "Remove all pairs."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot hints_slots[] = {
    {Py_tp_new, hints_new},
    {Py_tp_dealloc, hints_dealloc},
    {Py_tp_methods, hints_methods},
    {Py_sq_length, hints_length},
    {Py_tp_doc, "What others are said to hold."},
    {0, NULL},
};

PyType_Spec hints_spec = {
    .name = "flexkv._ext.Hints",
    .basicsize = sizeof(Hints),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = hints_slots,
};
