/* Changes to and from READY: recorded for a reader, up to a limit. And what is READY now. */
#include "index_core.h"

#include <stdlib.h>

/* Record up to `limit` changes from now on; none with 0. Return false without memory. */
bool changes_watch(struct changes *changes, uint32_t limit)
{
    struct change *kept = limit ? malloc(limit * sizeof(*kept)) : NULL;

    if (limit && !kept)
        return false;
    changes_close(changes);
    changes->kept = kept;
    changes->limit = limit;
    return true;
}

void changes_close(struct changes *changes)
{
    free(changes->kept);
    *changes = (struct changes){0};
}

static struct change change_of(const struct block_index *index, ref number, unsigned tier,
                               bool is_ready)
{
    const struct node *node = node_at(index, number);
    unsigned others = ready_tiers(index, node) & ~(1U << tier);

    return (struct change){
        .key = node->key, .tier = (uint8_t)tier, .is_ready = is_ready,
        .group = (uint8_t)group_of(index, number),
        .ready = (uint8_t)(others | (unsigned)is_ready << tier),
        .depth = node->depth - is_leaf(index, number)};
}

/* A place that stops being READY may still look READY here. */
void changes_note(struct block_index *index, ref node, unsigned tier, bool is_ready)
{
    struct changes *changes = &index->changes;

    if (!changes->limit)
        return;
    if (changes->count == changes->limit) {
        changes->lost = true;
        return;
    }
    changes->kept[changes->count++] = change_of(index, node, tier, is_ready);
}

size_t ready_ends(const struct block_index *index, ref begin, ref end, uint32_t size,
                  struct change *changes)
{
    size_t count = 0;

    for (ref number = begin; number < end; number++) {
        const struct node *node = node_at(index, number);
        unsigned ready;

        if (node->parent == NODE_FREE || node->parent == NONE ||
            (node->depth % size && !is_leaf(index, number)))
            continue;
        ready = ready_tiers(index, node);
        if (ready)
            changes[count++] = change_of(index, number, (unsigned)__builtin_ctz(ready), true);
    }
    return count;
}
