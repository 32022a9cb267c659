/* Eviction of places in the policy's order: all that are needed, or none.
 *
 * A READY place may be evicted if it is not pinned and either another tier has the block READY or
 * no block continues it, so that every remaining block has its parent. A place that may not go when
 * its turn comes is parked until it may; so each is looked at once, however many are pinned.
 */
#include "index_core.h"

static bool is_last_place(const struct block_index *index, const struct node *node, unsigned tier)
{
    for (unsigned t = 0; t < index->tiers; t++)
        if (t != tier && node->place[t] != NONE)
            return false;
    return true;
}

/* Unlink a node from its family, after which its parent may be evicted next. */
static void family_leave(struct block_index *index, ref number)
{
    const struct node *parent = node_at(index, node_at(index, number)->parent);

    node_leave(index, number);
    if (parent->child == NONE && parent->parent != NONE)
        unpark(index, parent);
}

/* Find a victim, and unlink it from its list, and its node from its family if it is the last copy.
 * Places that may not go are parked on the way. */
static ref victim_take(struct block_index *index, unsigned t, unsigned quota)
{
    struct tier *tier = &index->tier[t];
    ref id;

    while ((id = quota == ANY_QUOTA ? policy_victim(tier, index->clock_s)
                                    : policy_victim_of(tier, quota, index->clock_s)) != NONE) {
        struct place *place = &tier->places[id];
        struct node *node = node_at(index, place->node);

        policy_remove(tier, id);
        if (!place->pins) {
            if (ready_elsewhere(index, node, t) || node->child == NONE) {
                if (is_last_place(index, node, t))
                    family_leave(index, place->node);
                return id;
            }
        }
        place->list = LIST_PARKED;
    }
    return NONE;
}

static void victim_return(struct block_index *index, unsigned t, ref id)
{
    struct tier *tier = &index->tier[t];
    ref number = tier->places[id].node;

    if (is_last_place(index, node_at(index, number), t))
        node_join(index, number);
    policy_return(tier, id);
}

static void victim_free(struct block_index *index, unsigned t, ref id)
{
    struct tier *tier = &index->tier[t];
    ref number = tier->places[id].node;
    struct node *node = node_at(index, number);
    ref parent = node->parent;

    changes_note(index, number, t, false);
    node->place[t] = NONE;
    node_at(index, node->root)->place[t]--;
    ready_count(index, tier, number, -1);
    tier->evicted++;
    place_free(tier, id);
    if (has_place(index, node))
        return;
    node_free(index, number);
    if (node_at(index, parent)->parent == NONE)
        parent_lost_child(index, parent);
}

/* Victims are in no list, so `older` and `newer` chain them in the order in which they were taken.
 * If there are too few, they are put back, last taken first, which restores the policy's order. */
size_t index_evict_all(struct block_index *index, unsigned t, unsigned quota, size_t own,
                       size_t needed, size_t wanted)
{
    struct place *places = index->tier[t].places;
    ref first = NONE, last = NONE, id;
    size_t taken = 0;

    if (needed > index->tier[t].ready)
        return 0;
    while (taken < wanted &&
           (id = victim_take(index, t, taken < own ? quota : ANY_QUOTA)) != NONE) {
        __builtin_prefetch(&index->buckets[node_at(index, places[id].node)->bucket], 1);
        places[id].older = last;
        places[id].newer = NONE;
        if (last == NONE)
            first = id;
        else
            places[last].newer = id;
        last = id;
        taken++;
    }
    if (taken < needed) {
        for (id = last; id != NONE; id = last) {
            last = places[id].older;
            victim_return(index, t, id);
        }
        return 0;
    }
    for (id = first; id != NONE; id = first) {
        first = places[id].newer;
        victim_free(index, t, id);
    }
    return taken;
}

size_t index_evict(struct block_index *index, unsigned t, unsigned quota, size_t needed,
                   size_t wanted)
{
    return index_evict_all(index, t, quota, quota == ANY_QUOTA ? 0 : wanted, needed, wanted);
}

/* Free places are removed from the tier or returned to it; which ones does not matter. */
uint32_t index_resize(struct block_index *index, unsigned t, uint32_t capacity)
{
    struct tier *tier = &index->tier[t];

    if (capacity < tier->capacity) {
        uint32_t fewer = tier->capacity - capacity;

        if (fewer > tier->free)
            index_evict(index, t, ANY_QUOTA, 0, fewer - tier->free);
        if (fewer > tier->free)
            fewer = tier->free;
        tier->capacity -= fewer;
        tier->free -= fewer;
    } else {
        if (capacity > tier->places_max)
            capacity = tier->places_max;
        tier->free += capacity - tier->capacity;
        tier->capacity = capacity;
    }
    return tier->capacity;
}
