/* The rules of the KV groups of leaves, as Python gives them. */
#include "index.h"

#include <stdio.h>

#define BLOCK_TOKENS_MAX ((int64_t)INT32_MAX)
#define ALIGNMENT_MAX ((uint64_t)1 << 24)

int rules_count(PyObject *rules, unsigned *groups)
{
    Py_ssize_t count = rules ? PyTuple_Size(rules) : 0;

    if (count >= GROUPS_MAX)
        return raise_value("%zd rules given, must be 0..%d", count, GROUPS_MAX - 1);
    *groups = 1 + (unsigned)count;
    return 0;
}

/* Read (group, kind, window, ratio, block_tokens). */
static int rule_fields(PyObject *object, unsigned group, int64_t fields[5])
{
    static const char *const names[] = {"group", "kind", "window", "ratio", "block_tokens"};
    const int64_t least[] = {group, 0, 0, 1, 1};
    const int64_t most[] = {group, GROUP_KINDS - 1, INT64_MAX / 2, (int64_t)ALIGNMENT_MAX,
                            BLOCK_TOKENS_MAX};

    if (!PyTuple_Check(object) || PyTuple_Size(object) != 5) {
        PyErr_SetString(PyExc_TypeError, "a rule is (group, kind, window, ratio, block_tokens)");
        return -1;
    }
    for (int i = 0; i < 5; i++) {
        char name[48];

        snprintf(name, sizeof(name), "rules[%u].%s", group - 1, names[i]);
        if (integer_read(PyTuple_GetItem(object, i), name, least[i], most[i], &fields[i]) < 0)
            return -1;
    }
    return 0;
}

/* Return the salt of a group: the canonical XXH3-128 of a text, seeded with the group. */
static struct key salt_of(unsigned group)
{
    static const char text[] = "flexkv leaf";
    struct key salt;

    keys_digest(text, sizeof(text) - 1, group, (unsigned char *)&salt);
    return salt;
}

static uint64_t common_divisor(uint64_t a, uint64_t b)
{
    while (b) {
        uint64_t rest = a % b;

        a = b;
        b = rest;
    }
    return a;
}

/* Check that a rule fits those before it, and align prefixes to its blocks. */
static int rule_fit(struct block_index *index, unsigned group, const int64_t fields[5],
                    int64_t chain_tokens)
{
    uint64_t ratio = (uint64_t)fields[3], alignment = index->alignment;
    const char *rule = group_window_rule((enum group_kind)fields[1], fields[2]);

    if (rule)
        return raise_value("rules[%u].window=%lld must be %s for kind=%lld", group - 1,
                           (long long)fields[2], rule, (long long)fields[1]);
    if (fields[4] % fields[3] || fields[4] / fields[3] != chain_tokens)
        return raise_value("rules[%u].block_tokens=%lld must be ratio=%lld times the tokens of a "
                           "block of the chain, which is %lld in rules[0]",
                           group - 1, (long long)fields[4], (long long)fields[3],
                           (long long)chain_tokens);
    alignment = alignment / common_divisor(alignment, ratio) * ratio;
    if (alignment > ALIGNMENT_MAX)
        return raise_value("rules[%u].ratio=%lld: no prefix could end before block %llu, where the "
                           "blocks of all groups end together",
                           group - 1, (long long)fields[3], (unsigned long long)alignment);
    index->alignment = (size_t)alignment;
    return 0;
}

int rules_read(BlockIndex *self, PyObject *rules)
{
    struct block_index *index = &self->index;
    int64_t chain_tokens = 0;

    for (unsigned group = 1; group < index->groups; group++) {
        int64_t fields[5];

        if (rule_fields(PyTuple_GetItem(rules, (Py_ssize_t)group - 1), group, fields) < 0)
            return -1;
        if (group == 1)
            chain_tokens = fields[4] / fields[3];
        if (rule_fit(index, group, fields, chain_tokens) < 0)
            return -1;
        rule_set(index, group, (struct rule){.kind = (enum group_kind)fields[1],
                                             .window = fields[2],
                                             .block_tokens = fields[4],
                                             .ratio = (uint32_t)fields[3],
                                             .salt = salt_of(group)});
    }
    return 0;
}

static PyObject *group_blocks(BlockIndex *self, struct value *values)
{
    const struct tier *tier = &self->index.tier[values[0].integer];
    PyObject *result = PyTuple_New((Py_ssize_t)self->index.groups);

    for (unsigned group = 0; result && group < self->index.groups; group++) {
        uint32_t ready = self->index.groups > 1 ? tier->ready_of[group] : tier->ready;
        PyObject *number = PyLong_FromUnsignedLong(ready);

        if (!number || PyTuple_SetItem(result, (Py_ssize_t)group, number) < 0)
            Py_CLEAR(result);
    }
    return result;
}

CALL(call_, group_blocks, BlockIndex, 1, READ("tier", read_tier))
