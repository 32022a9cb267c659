/* Quotas: how many places of a tier a namespace may have. A namespace with a quota has lists of its
 * own, so that what it stores beyond the quota replaces its own blocks, by the tier's policy. */
#include "index_core.h"

unsigned quota_of(const struct block_index *index, struct key root)
{
    for (unsigned quota = 1; quota <= index->quotas; quota++)
        if (index->quota_taken[quota] &&
            memcmp(&index->quota_root[quota], &root, sizeof(root)) == 0)
            return quota;
    return 0;
}

/* Return a number that is not taken, or QUOTAS_MAX + 1 if all are. */
static unsigned quota_free(const struct block_index *index)
{
    unsigned quota = 1;

    while (quota <= index->quotas && index->quota_taken[quota])
        quota++;
    return quota;
}

/* Move the places of a namespace to its own lists, in their present order. */
static void quota_adopt(struct block_index *index, struct tier *tier, ref root, uint8_t quota)
{
    struct policy *common = &tier->policies[0];

    for (unsigned number = 0; number < common->list_count; number++)
        for (ref at = common->lists[number].oldest, newer; at != NONE; at = newer) {
            newer = tier->places[at].newer;
            if (node_at(index, tier->places[at].node)->root == root)
                policy_move(tier, at, quota);
        }
    for (ref at = 0; at < tier->unused; at++) {
        const struct place *place = &tier->places[at];

        if (place->state != PLACE_FREE && place->node != NONE &&
            node_at(index, place->node)->root == root && place->quota != quota)
            policy_move(tier, at, quota); /* the place is in no list */
    }
}

static bool lists_open(struct tier *tier, unsigned quota)
{
    const struct policy *common = &tier->policies[0];
    struct policy *own = &tier->policies[quota];

    if (quota >= tier->policy_count) {
        if (!policy_open(own, common->kind, common->parameter, tier->places_max))
            return false;
        tier->policy_count = quota + 1;
    }
    own->first_bucket = common->first_bucket;
    own->cursor = 0;
    tier->quota_blocks[quota] = NO_QUOTA;
    return true;
}

static bool quota_open(struct block_index *index, struct key key, unsigned quota)
{
    ref root = root_find(index, key);

    for (unsigned t = 0; t < index->tiers; t++)
        if (!lists_open(&index->tier[t], quota))
            return false;
    index->quota_root[quota] = key;
    index->quota_taken[quota] = true;
    if (index->quotas < quota)
        index->quotas = quota;
    for (unsigned t = 0; root != NONE && t < index->tiers; t++)
        quota_adopt(index, &index->tier[t], root, (uint8_t)quota);
    return true;
}

/* If a quota no longer bounds any tier, move its places to the common lists, as the newest. */
static void quota_close(struct block_index *index, unsigned quota)
{
    for (unsigned t = 0; t < index->tiers; t++)
        if (index->tier[t].quota_blocks[quota] != NO_QUOTA)
            return;
    for (unsigned t = 0; t < index->tiers; t++) {
        struct tier *tier = &index->tier[t];

        for (unsigned number = 0; number < tier->policies[quota].list_count; number++)
            while (tier->policies[quota].lists[number].oldest != NONE)
                policy_move(tier, tier->policies[quota].lists[number].oldest, 0);
        for (ref at = 0; at < tier->unused; at++)
            if (tier->places[at].quota == quota)
                tier->places[at].quota = 0; /* the place is in no list */
    }
    index->quota_taken[quota] = false;
}

int quota_set(struct block_index *index, unsigned t, struct key root, uint32_t blocks)
{
    unsigned quota = quota_of(index, root);
    uint64_t most = (uint64_t)blocks * 4 / 5;
    struct tier *tier = &index->tier[t];
    uint32_t has;

    if (!quota) {
        if (blocks == NO_QUOTA)
            return 0;
        quota = quota_free(index);
        if (quota > QUOTAS_MAX)
            return -1;
        if (!quota_open(index, root, quota))
            return -2;
    }
    tier->quota_blocks[quota] = blocks;
    tier->policies[quota].protected_max = most < tier->places_max ? (uint32_t)most
                                                                  : tier->places_max;
    has = quota_used(index, t, root);
    if (has > blocks)
        index_evict(index, t, quota, 0, has - blocks);
    if (blocks == NO_QUOTA)
        quota_close(index, quota);
    return 0;
}

uint32_t quota_used(const struct block_index *index, unsigned t, struct key root)
{
    ref number = root_find(index, root);

    return number == NONE ? 0 : node_at(index, number)->place[t];
}

int64_t quota_left(const struct block_index *index, unsigned t, unsigned quota)
{
    if (!quota)
        return INT64_MAX;
    return (int64_t)index->tier[t].quota_blocks[quota] -
           quota_used(index, t, index->quota_root[quota]);
}
