/* What a prefix needs of a KV group. The arithmetic is here and nowhere else. */
#ifndef FLEXKV_NEEDS_H
#define FLEXKV_NEEDS_H

#include <stddef.h>
#include <stdint.h>

/* The numbers are repeated in flexkv/common/space.py: append only. */
enum group_kind {
    GROUP_FULL,   /* every block */
    GROUP_WINDOW, /* the blocks of the last `window` tokens, the next one included */
    GROUP_CHUNK,  /* the blocks of the chunk of `window` tokens that the next token is in */
    GROUP_STATE,  /* the last block */
    GROUP_KINDS,
};

/* Return the rule that a group's window breaks, or NULL. */
static inline const char *group_window_rule(enum group_kind kind, int64_t window)
{
    if (kind == GROUP_WINDOW || kind == GROUP_CHUNK)
        return window < 1 ? "at least 1" : NULL;
    return window ? "0" : NULL;
}

/* Return the first of a group's own blocks that a prefix needs; all from there to its end are
 * needed. `end` is a multiple of `block`; a window, where there is one, is at least 1. All are in
 * tokens. */
static inline int64_t group_needed_from(enum group_kind kind, int64_t window, int64_t block,
                                        int64_t end)
{
    switch (kind) {
    case GROUP_WINDOW:
        return end < window ? 0 : (end - window + 1) / block;
    case GROUP_CHUNK:
        return end / window * window / block;
    case GROUP_STATE:
        return end ? end / block - 1 : 0;
    default:
        return 0;
    }
}

#endif
