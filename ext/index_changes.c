/* Changes to and from READY: recorded for a reader, up to a limit. */
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

void changes_note(struct block_index *index, ref node, unsigned tier, bool is_ready)
{
    struct changes *changes = &index->changes;

    if (!changes->limit)
        return;
    if (changes->count == changes->limit) {
        changes->lost = true;
        return;
    }
    changes->kept[changes->count++] =
        (struct change){node_at(index, node)->key, (uint8_t)tier, is_ready,
                        (uint8_t)group_of(index, node), 0};
}
