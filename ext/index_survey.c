/* The calls of BlockIndex that look for the blocks of a prompt. */
#include "index.h"
#include "index_density.h"

/* Some blocks of one KV group, in the order of their positions, `step` apart. */
struct strip {
    const ref *nodes;              /* NONE: nowhere */
    uint8_t *kinds;                /* the pattern of each */
    size_t count, first, step;
    unsigned unusable;             /* a bit for each tier that must not be used */
};

/* Those blocks of a strip that have one pattern, by their numbers in the strip. */
struct alike {
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
static unsigned nearest_of(unsigned pattern, unsigned tiers, unsigned unusable)
{
    unsigned digit = 1;

    if (pattern % 3)
        return unusable & 1 ? 0 : pattern % 3;
    for (unsigned t = 0; t < tiers; t++, digit *= 3)
        if (pattern / digit % 3 == 2 && !(unusable >> t & 1))
            return 2 * digit;
    return 0;
}

void nearest_tell(BlockIndex *self)
{
    unsigned tiers = self->index.tiers;

    for (unsigned unusable = 0; unusable < 1U << tiers; unusable++)
        for (unsigned pattern = 0; pattern < PATTERNS_MAX; pattern++)
            self->nearest[unusable][pattern] = (uint8_t)nearest_of(pattern, tiers, unusable);
}

static void run_begin(struct alike *alike, size_t number)
{
    if (!alike->count)
        alike->first = number;
    alike->run = number;
}

static void run_end(struct alike *alike, size_t number)
{
    if (!alike)
        return;
    alike->count += number - alike->run;
    alike->last = number - 1;
}

/* How a block's pattern is reported, and which block ends the report. */
enum told {
    TOLD_WHOLE,   /* the pattern itself; none */
    TOLD_SPARSE,  /* the same; blocks may be nowhere */
    TOLD_NEAREST, /* its nearest usable tier; one that has none */
    TOLD_READY,   /* the same; one that has none, or is being filled there */
};

/* Write the pattern of each block and count them by pattern. Return how many are reported. */
static inline __attribute__((always_inline)) size_t
patterns_tell_as(BlockIndex *self, const struct strip *strip, enum told told,
                 struct alike *alikes)
{
    const uint8_t *nearest = self->nearest[strip->unusable];
    unsigned last = PATTERNS_MAX;
    struct alike *alike = NULL;
    size_t number = 0;

    for (; number < strip->count; number++) {
        ref node = strip->nodes[number];
        unsigned pattern = told == TOLD_SPARSE && node == NONE ? 0 : pattern_of(&self->index, node);

        if (told >= TOLD_NEAREST) {
            pattern = nearest[pattern];
            if (told == TOLD_READY ? pattern < 2 : !pattern)
                break;
        }
        strip->kinds[number] = (uint8_t)pattern;
        if (pattern != last) {
            run_end(alike, number);
            alike = &alikes[pattern];
            run_begin(alike, number);
            last = pattern;
        }
    }
    run_end(alike, number);
    return number;
}

static size_t patterns_tell(BlockIndex *self, const struct strip *strip, enum told told,
                            struct alike *alikes)
{
    switch (told) {
    case TOLD_WHOLE:
        return patterns_tell_as(self, strip, TOLD_WHOLE, alikes);
    case TOLD_SPARSE:
        return patterns_tell_as(self, strip, TOLD_SPARSE, alikes);
    case TOLD_NEAREST:
        return patterns_tell_as(self, strip, TOLD_NEAREST, alikes);
    default:
        return patterns_tell_as(self, strip, TOLD_READY, alikes);
    }
}

/* Count the blocks of a strip again after it has become shorter; their patterns are written. */
static void alikes_count(const struct strip *strip, struct alike *alikes)
{
    memset(alikes, 0, PATTERNS_MAX * sizeof(*alikes));
    for (size_t number = 0; number < strip->count; number++) {
        struct alike *alike = &alikes[strip->kinds[number]];

        if (!alike->count++)
            alike->first = number;
        alike->last = number;
    }
}

/* Return (pattern, first position, count, positions or None if unbroken, ids by tier or None). */
static PyObject *alike_new(struct alike *alike, unsigned pattern, unsigned tiers,
                           const struct strip *strip)
{
    PyObject *ids = PyTuple_New((Py_ssize_t)tiers), *positions = NULL;
    unsigned digit = 1;

    if (!ids)
        return NULL;
    for (unsigned t = 0; t < tiers; t++, digit *= 3) {
        PyObject *array = pattern / digit % 3 ? int64s_new(alike->count, &alike->ids[t])
                                              : Py_NewRef(Py_None);

        if (!array || PyTuple_SetItem(ids, (Py_ssize_t)t, array) < 0)
            goto failed;
    }
    if ((alike->last - alike->first) * strip->step + 1 == alike->count)
        positions = Py_NewRef(Py_None);
    else
        positions = int64s_new(alike->count, &alike->positions);
    if (positions)
        return Py_BuildValue("(InnNN)", pattern,
                             (Py_ssize_t)(strip->first + alike->first * strip->step),
                             (Py_ssize_t)alike->count, positions, ids);
failed:
    Py_DECREF(ids);
    return NULL;
}

/* Write the positions and ids of a run of blocks with the same pattern. */
static void run_fill(const struct block_index *index, const struct strip *strip, size_t begin,
                     size_t end, struct alike *alike)
{
    if (alike->positions) {
        int64_t *positions = alike->positions;

        for (size_t number = begin; number < end; number++)
            *positions++ = (int64_t)(strip->first + number * strip->step);
        alike->positions = positions;
    }
    for (unsigned t = 0; t < index->tiers; t++) {
        int64_t *ids = alike->ids[t];

        if (!ids)
            continue;
        for (size_t number = begin; number < end; number++)
            *ids++ = node_at(index, strip->nodes[number])->place[t];
        alike->ids[t] = ids;
    }
}

static void alikes_fill(const struct block_index *index, const struct strip *strip,
                        struct alike *alikes)
{
    size_t begin = 0;

    while (begin < strip->count) {
        uint8_t kind = strip->kinds[begin];
        size_t next = begin + 1;

        while (next < strip->count && strip->kinds[next] == kind)
            next++;
        run_fill(index, strip, begin, next, &alikes[kind]);
        begin = next;
    }
}

/* Return the blocks of a strip, which have been counted by pattern. */
static PyObject *alikes_list(BlockIndex *self, const struct strip *strip, struct alike *alikes)
{
    PyObject *result = PyList_New(0);

    for (unsigned pattern = 0; result && pattern < PATTERNS_MAX; pattern++) {
        PyObject *alike;

        if (!alikes[pattern].count)
            continue;
        alike = alike_new(&alikes[pattern], pattern, self->index.tiers, strip);
        if (!alike || PyList_Append(result, alike) < 0)
            Py_CLEAR(result);
        Py_XDECREF(alike);
    }
    if (result)
        alikes_fill(&self->index, strip, alikes);
    return result;
}

/* Make the tiers with LHD learn from a prompt that is asked for. */
static void prompt_asked(BlockIndex *self, const struct batch *prompt, size_t known,
                         const struct reach *reach)
{
    for (unsigned t = 0; t < self->index.tiers; t++)
        if (self->index.tier[t].density)
            lhd_asked(&self->index, t, prompt, self->nodes, known, reach);
}

/* Replace the nodes of a part of the chain by those of a group's leaves there. */
static struct strip leaves_find(BlockIndex *self, unsigned group, size_t begin, size_t known)
{
    size_t ratio = self->index.rule[group].ratio;
    struct strip strip = {self->nodes, self->kinds, 0, (begin + ratio) / ratio * ratio - 1, ratio,
                          0};
    ref leaf = NONE;

    for (size_t position = strip.first; position < known; position += ratio) {
        leaf = leaf_find(&self->index, self->nodes[position], group, leaf + 1);
        self->nodes[strip.count++] = leaf;
    }
    return strip;
}

/* Return the blocks of a strip by pattern; the last `absent` positions are nowhere. */
static PyObject *strip_list(BlockIndex *self, struct strip *strip, enum told told, size_t absent)
{
    struct alike alikes[PATTERNS_MAX] = {0};

    strip->count = patterns_tell(self, strip, told, alikes);
    if (absent)
        alikes[0] = (struct alike){.count = absent, .first = strip->count,
                                   .last = strip->count + absent - 1};
    return alikes_list(self, strip, alikes);
}

static PyObject *survey_leaves(BlockIndex *self, unsigned group, const size_t range[2],
                               size_t known, bool use)
{
    struct strip strip = leaves_find(self, group, range[0], known);
    PyObject *result = strip_list(self, &strip, TOLD_SPARSE, 0);

    if (result && use)
        index_use(&self->index, strip.nodes, strip.count, true);
    return result;
}

static PyObject *survey(BlockIndex *self, struct value *values)
{
    const unsigned char *keys = values[0].view.buffer.buf;
    bool nearest = values[3].integer;
    enum use use = (enum use)values[4].integer;
    struct strip strip;
    size_t range[2], from, known;
    PyObject *result;
    unsigned group;

    if (group_read(self, &values[5], &group) < 0 || range_read(values, range) < 0 ||
        scratch_take(self, range[1]) < 0)
        return NULL;
    from = use && !group ? 0 : range[0];
    known = from + nodes_find(&self->index, keys, from, range[1], self->nodes + from);
    if (group)
        return survey_leaves(self, group, range, known, use);
    strip = (struct strip){self->nodes + range[0], self->kinds + range[0],
                           known > range[0] ? known - range[0] : 0, range[0], 1, 0};
    result = strip_list(self, &strip, nearest ? TOLD_NEAREST : TOLD_WHOLE,
                        nearest ? 0 : range[1] - range[0] - strip.count);
    if (!result)
        return NULL;
    if (nearest && known > range[0] + strip.count)
        known = range[0] + strip.count;
    if (use)
        index_use(&self->index, self->nodes, known, use == USE_ASKED);
    if (use == USE_ASKED)
        prompt_asked(self, &(struct batch){.keys = keys, .blocks = range[1]}, known, NULL);
    return result;
}

CALL(call_, survey, BlockIndex, 5, READ("keys", read_bytes), OBJECT("begin"), OBJECT("end"),
     READ("nearest", read_flag), INTEGER("use", 0, USE_STORED), OBJECT("group"))

/* -- reach ------------------------------------------------------------------------------------- */

/* Divide scratch memory among the chain and the groups, and as much again for what is used. Return
 * 0, or -1 without memory. */
static int reach_open(BlockIndex *self, struct reach *reach, size_t blocks, ref **used)
{
    size_t at = blocks;

    for (unsigned group = 1; group < self->index.groups; group++)
        at += blocks / self->index.rule[group].ratio;
    if (scratch_take(self, 2 * at) < 0)
        return -1;
    *used = self->nodes + at;
    at = blocks;
    for (unsigned group = 1; group < self->index.groups; group++) {
        reach->leaves[group].nodes = self->nodes + at;
        at += blocks / self->index.rule[group].ratio;
    }
    reach->chain = self->nodes;
    return 0;
}

/* Return (group, its needed leaves by pattern). */
static PyObject *reach_group(BlockIndex *self, const struct reach *reach, unsigned group)
{
    size_t ratio = self->index.rule[group].ratio, from = reach->leaves[group].from;
    size_t count = reach->end / ratio - from;
    struct strip strip = {reach->leaves[group].nodes + from, self->kinds, count,
                          (from + 1) * ratio - 1, ratio, reach->unusable};
    PyObject *alikes = strip_list(self, &strip, TOLD_NEAREST, 0);

    return alikes ? Py_BuildValue("(IN)", group, alikes) : NULL;
}

static PyObject *reach_leaves(BlockIndex *self, const struct reach *reach)
{
    PyObject *result = PyList_New(0);

    for (unsigned group = 1; result && group < self->index.groups; group++) {
        PyObject *told;

        if (reach->leaves[group].from >= reach->end / self->index.rule[group].ratio)
            continue;
        told = reach_group(self, reach, group);
        if (!told || PyList_Append(result, told) < 0)
            Py_CLEAR(result);
        Py_XDECREF(told);
    }
    return result;
}

/* Read a buffer, or None: there is none. */
static int read_device(PyObject *self, const struct parameter *parameter, struct value *value)
{
    return Py_IsNone(value->object) ? 0 : read_bytes(self, parameter, value);
}

/* Read op ids; None means that nothing may be waited for. */
static int read_shunned(PyObject *self, const struct parameter *parameter, struct value *value)
{
    return Py_IsNone(value->object) ? 0 : read_aligned(self, parameter, value);
}

/* Read the limits of a search, each of which may be left out: tiers that must not be used, leaves
 * that have a block of the device, and ops that must not be waited for. Return 0 or -1. */
static int limits_read(const BlockIndex *self, const struct value *values, struct reach *reach)
{
    static const uint8_t nothing[1];
    const struct value *unusable = &values[0], *device = &values[1], *shunned = &values[2];
    bool is_given = device->view.buffer.obj != NULL;
    Py_ssize_t bytes = is_given ? device->view.buffer.len : 0;
    Py_ssize_t groups = (Py_ssize_t)self->index.groups - 1;
    int64_t tiers = 0;

    if (unusable->object && integer_read(unusable->object, "unusable", 0,
                                         (INT64_C(1) << self->index.tiers) - 1, &tiers) < 0)
        return -1;
    if (groups ? bytes % groups : bytes)
        return raise_value("device has %zd bytes, must be as many for each of %zd groups", bytes,
                           groups);
    reach->unusable = (unsigned)tiers;
    reach->device = bytes ? device->view.buffer.buf : is_given ? nothing : NULL;
    reach->device_blocks = groups ? (size_t)(bytes / groups) : 0;
    reach->waits = shunned->view.buffer.obj != NULL;
    reach->shunned = reach->waits ? shunned->view.buffer.buf : NULL;
    reach->shunned_count = reach->waits ? (size_t)shunned->view.count : 0;
    return 0;
}

/* Set `reach->ready`: where the loadable chain ends. Return where its ready part ends. */
static size_t reach_chain(BlockIndex *self, struct reach *reach, struct strip *strip,
                          struct alike *alikes)
{
    size_t ready;

    strip->count = patterns_tell(self, strip, reach->waits ? TOLD_NEAREST : TOLD_READY, alikes);
    ready = alikes[1].count ? alikes[1].first : strip->count; /* pattern 1 is being filled */
    reach->ready = reach->first + strip->count;
    for (size_t number = ready; reach->shunned_count && number < strip->count; number++) {
        if (strip->kinds[number] != 1 || reach_awaits(&self->index, reach, strip->nodes[number]))
            continue;
        reach->ready = reach->first + number;
        break;
    }
    return reach->first + ready;
}

static PyObject *reach(BlockIndex *self, struct value *values)
{
    const unsigned char *keys = values[0].view.buffer.buf;
    struct alike alikes[PATTERNS_MAX] = {0};
    struct reach reach;
    size_t range[2], from, known, ready;
    struct strip strip;
    PyObject *chain, *leaves;
    ref *used;

    if (range_read(values, range) < 0 || limits_read(self, &values[5], &reach) < 0 ||
        reach_open(self, &reach, range[1], &used) < 0)
        return NULL;
    from = values[4].integer ? 0 : range[0];
    known = from + nodes_find(&self->index, keys, from, range[1], self->nodes + from);
    strip = (struct strip){self->nodes + range[0], self->kinds,
                           known > range[0] ? known - range[0] : 0, range[0], 1, reach.unusable};
    reach.first = range[0];
    ready = reach_chain(self, &reach, &strip, alikes);
    reach_find(&self->index, &reach, (size_t)values[3].integer);
    if (reach.end < range[0] + strip.count) {
        strip.count = reach.end - range[0];
        alikes_count(&strip, alikes);
    }
    chain = alikes_list(self, &strip, alikes);
    leaves = chain ? reach_leaves(self, &reach) : NULL;
    if (!leaves) {
        Py_XDECREF(chain);
        return NULL;
    }
    if (known > reach.end)
        known = reach.end;
    if (values[4].integer) {
        index_use(&self->index, used, reach_nodes(&self->index, &reach, known, used), true);
        prompt_asked(self, &(struct batch){.keys = keys, .blocks = range[1]}, known, &reach);
    }
    return Py_BuildValue("(nnNN)", (Py_ssize_t)reach.end, (Py_ssize_t)ready, chain, leaves);
}

CALL(call_, reach, BlockIndex, 5, READ("keys", read_bytes), OBJECT("begin"), OBJECT("end"),
     INTEGER("drop", 0, UINT32_MAX), READ("use", read_flag), OBJECT("unusable"),
     READ("device", read_device), READ("shunned", read_shunned))
