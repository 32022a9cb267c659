/* Blocks as records that outlive the process. */
#ifndef FLEXKV_INDEX_PERSIST_H
#define FLEXKV_INDEX_PERSIST_H

#include "index_core.h"

/* A READY block, with what is needed to restore it. */
struct block_record {
    struct key key, parent; /* the root's key for the first block of a prompt */
    uint32_t flags;         /* RECORD_FIRST, and the group from bit 8 on */
};

#define RECORD_FIRST UINT32_C(1)

static inline unsigned record_group(const struct block_record *record)
{
    return record->flags >> 8;
}

/* Write the record of a place. Return false if the place is not READY. */
bool index_export(const struct block_index *index, unsigned tier, int64_t id,
                  struct block_record *record);

/* Blocks of a tier that are known from an earlier run, parents before children. */
struct restored {
    size_t n;
    const struct block_record *records;
    const int64_t *parents; /* which of the blocks is the parent; -1 for the first of a prompt */
    const int64_t *ids;     /* their places, each once */
};

/* Fill a tier that was never used. The last three arguments are scratch space for n items each. */
void index_restore(struct block_index *index, unsigned tier, const struct restored *restored,
                   ref *nodes, uint32_t *positions, size_t *page_first);

#endif
