/* needed: which blocks of a KV group a prefix needs. */
#include "needs.h"

#include "ext.h"

static PyObject *needed(PyObject *Py_UNUSED(module), struct value *values)
{
    enum group_kind kind = (enum group_kind)values[0].integer;
    int64_t window = values[1].integer, block = values[2].integer, end = values[3].integer;
    const char *rule = group_window_rule(kind, window);

    if (rule) {
        raise_value("window=%lld must be %s for kind=%d", (long long)window, rule, (int)kind);
        return NULL;
    }
    if (end % block) {
        raise_value("end_tokens=%lld is not a multiple of block_tokens=%lld", (long long)end,
                    (long long)block);
        return NULL;
    }
    return Py_BuildValue("(LL)", (long long)group_needed_from(kind, window, block, end),
                         (long long)(end / block));
}

#define TOKENS_MAX (INT64_MAX / 2)

CALL(needs_, needed, PyObject, 4, INTEGER("kind", 0, GROUP_KINDS - 1),
     INTEGER("window", 0, TOKENS_MAX), INTEGER("block_tokens", 1, TOKENS_MAX),
     INTEGER("end_tokens", 0, TOKENS_MAX))
