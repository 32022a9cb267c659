/* Checks of every law of the index, for tests and for the end of an engine. */
#include "index_core.h"

static const char *place_check(const struct block_index *index, unsigned t, ref id)
{
    const struct tier *tier = &index->tier[t];
    const struct place *place = &tier->places[id];

    if (place->state == PLACE_FREE)
        return place->pins ? "a FREE place is pinned" : NULL;
    if (place->node != NONE && node_at(index, place->node)->place[t] != id)
        return "a place names the wrong node";
    if (place->state == PLACE_DRAINING && (place->node != NONE || !place->pins))
        return "a DRAINING place has a node, or no pins";
    if (place->state == PLACE_READY && place->node == NONE)
        return "a READY place has no key";
    if ((place->list != LIST_NONE) != (place->state == PLACE_READY))
        return "a place is in a list and not READY, or READY and in no list";
    if (place->list == LIST_PARKED && !place->pins) {
        const struct node *node = node_at(index, place->node);

        if (node->child == NONE)
            return "a place is parked although it could be evicted";
    }
    return NULL;
}

static const char *tier_check(const struct block_index *index, unsigned t)
{
    const struct tier *tier = &index->tier[t];
    uint32_t states[4] = {0}, ready_of[GROUPS_MAX] = {0}, pinned = 0, stacked = 0;

    for (ref id = 0; id < tier->unused; id++) {
        const char *broken = place_check(index, t, id);

        if (broken)
            return broken;
        states[tier->places[id].state]++;
        pinned += tier->places[id].pins > 0;
        if (tier->places[id].state == PLACE_READY)
            ready_of[group_of(index, tier->places[id].node)]++;
    }
    for (ref id = tier->free_places; id != NONE; id = tier->places[id].older)
        if (tier->places[id].state != PLACE_FREE || ++stacked > tier->unused)
            return "the stack of free places is broken";
    if (stacked != states[PLACE_FREE])
        return "a free place is not on the stack";
    if (states[PLACE_RESERVED] != tier->reserved || states[PLACE_READY] != tier->ready ||
        states[PLACE_DRAINING] != tier->draining || pinned != tier->pinned)
        return "a tier's counters and its places differ";
    if (index->groups > 1 && memcmp(ready_of, tier->ready_of, sizeof(ready_of)) != 0)
        return "a tier's counters by KV group and its places differ";
    if (tier->free + tier->reserved + tier->ready + tier->draining != tier->capacity)
        return "a tier's counters do not add up to its capacity";
    return policy_check(tier);
}

static const char *leaf_check(const struct block_index *index, ref number)
{
    const struct node *node = node_at(index, number);
    unsigned group = group_of(index, number);
    struct key key;

    if (node->child != NONE)
        return "a leaf has a child";
    if (group >= index->groups)
        return "a leaf belongs to an unknown KV group";
    if (is_leaf(index, node->parent) || node_at(index, node->parent)->parent == NONE)
        return "a leaf's parent is not a block of the chain";
    key = leaf_key(index, node_at(index, node->parent)->key, group);
    if (memcmp(&node->key, &key, sizeof(key)) != 0)
        return "a leaf has another key than its parent and its group give it";
    if (leaf_find(index, node->parent, group, NONE) != number)
        return "a leaf is not found under its parent";
    return NULL;
}

/* Check a node's children, and that it knows of which groups it has leaves. */
static const char *family_check(const struct block_index *index, ref number)
{
    uint32_t leaves = 0;

    for (ref child = node_at(index, number)->child, before = NONE; child != NONE;
         child = node_at(index, child)->after) {
        uint32_t group = UINT32_C(1) << group_of(index, child);

        if (node_at(index, child)->parent != number || node_at(index, child)->before != before)
            return "a node's list of children is broken";
        if (is_leaf(index, child) && leaves & group)
            return "a node has two leaves of one KV group";
        if (is_leaf(index, child))
            leaves |= group;
        before = child;
    }
    if (index->groups > 1 && !is_leaf(index, number) && *node_word(index, number) != leaves)
        return "a node is wrong about its leaves";
    return NULL;
}

static const char *node_check(struct block_index *index, ref number)
{
    const struct node *node = node_at(index, number);
    const char *broken;
    uint32_t places = 0;

    if (node->parent == NODE_FREE)
        return NULL;
    broken = family_check(index, number);
    if (broken)
        return broken;
    if (!is_leaf(index, number) && node_find(index, node->key, node->bucket) != number)
        return "a node is not found under its key";
    if (node->parent == NONE)
        return node->child == NONE ? "a root has no child" : NULL;
    if (node_at(index, node->parent)->parent == NODE_FREE)
        return "a block's parent is not in the index";
    if (node->depth != node_at(index, node->parent)->depth + 1)
        return "a block is not one deeper than its parent";
    broken = is_leaf(index, number) ? leaf_check(index, number) : NULL;
    if (broken)
        return broken;
    for (unsigned t = 0; t < index->tiers; t++) {
        if (node->place[t] == NONE)
            continue;
        places++;
        if (index->tier[t].places[node->place[t]].node != number)
            return "a node names a place of another node";
    }
    return places ? NULL : "a node has no place";
}

static const char *roots_check(struct block_index *index)
{
    for (unsigned t = 0; t < index->tiers; t++) {
        int64_t blocks = 0;

        for (ref number = 0; number < index->nodes_unused; number++) {
            const struct node *node = node_at(index, number);

            if (node->parent == NODE_FREE)
                continue;
            if (node->parent == NONE)
                blocks -= node->place[t];
            else
                blocks += node->place[t] != NONE;
        }
        if (blocks)
            return "the block counts of namespaces do not match the blocks";
    }
    return NULL;
}

const char *index_check(struct block_index *index)
{
    for (unsigned t = 0; t < index->tiers; t++) {
        const char *broken = tier_check(index, t);

        if (broken)
            return broken;
    }
    for (ref number = 0; number < index->nodes_unused; number++) {
        const char *broken = node_check(index, number);

        if (broken)
            return broken;
    }
    return roots_check(index);
}
