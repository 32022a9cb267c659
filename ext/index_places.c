/* Places and their nodes: helpers of both the states of places and eviction. */
#include "index_core.h"
#include "index_density.h"

void place_free(struct tier *tier, ref id)
{
    struct place *place = &tier->places[id];

    if (place->state == PLACE_DRAINING)
        tier->draining--;
    place->state = PLACE_FREE;
    place->node = NONE;
    place->older = tier->free_places;
    tier->free_places = id;
    tier->free++;
}

ref place_reserve(struct block_index *index, unsigned t, ref number, unsigned quota, uint32_t uses,
                  bool last)
{
    struct tier *tier = &index->tier[t];
    struct node *node = node_at(index, number);
    ref id = tier->free_places;

    if (id == NONE)
        id = tier->unused++;
    else
        tier->free_places = tier->places[id].older;
    tier->free--;
    tier->reserved++;
    node->place[t] = id;
    node_at(index, node->root)->place[t]++;
    tier->places[id] = (struct place){.node = number, .state = PLACE_RESERVED, .list = LIST_NONE,
                                      .quota = (uint8_t)quota};
    if (tier->density)
        density_class(tier->density, &tier->places[id], uses, last);
    return id;
}

/* Return whether a tier other than `tier` has the block READY. */
bool ready_elsewhere(const struct block_index *index, const struct node *node, unsigned tier)
{
    for (unsigned t = 0; t < index->tiers; t++)
        if (t != tier && node->place[t] != NONE &&
            index->tier[t].places[node->place[t]].state == PLACE_READY)
            return true;
    return false;
}

bool has_place(const struct block_index *index, const struct node *node)
{
    for (unsigned t = 0; t < index->tiers; t++)
        if (node->place[t] != NONE)
            return true;
    return false;
}

static bool is_ready_in(const struct block_index *index, const struct node *node, unsigned t)
{
    return node->place[t] != NONE && index->tier[t].places[node->place[t]].state == PLACE_READY;
}

unsigned ready_tiers(const struct block_index *index, const struct node *node)
{
    unsigned tiers = 0;

    for (unsigned t = 0; t < index->tiers; t++)
        tiers |= (unsigned)is_ready_in(index, node, t) << t;
    return tiers;
}

bool is_loadable(const struct block_index *index, ref number, unsigned unusable)
{
    const struct node *node = node_at(index, number);

    if (node->place[0] != NONE)
        return !(unusable & 1) && is_ready_in(index, node, 0);
    for (unsigned t = 1; t < index->tiers; t++)
        if (!(unusable >> t & 1) && is_ready_in(index, node, t))
            return true;
    return false;
}

/* Make the block's parked places candidates for eviction again. */
void unpark(struct block_index *index, const struct node *node)
{
    for (unsigned t = 0; t < index->tiers; t++) {
        struct tier *tier = &index->tier[t];
        ref id = node->place[t];

        if (id != NONE && tier->places[id].list == LIST_PARKED && !tier->places[id].pins)
            policy_return(tier, id);
    }
}

/* Handle that `parent` may have lost its last child: free a root, unpark a block. */
void parent_lost_child(struct block_index *index, ref parent)
{
    struct node *node = node_at(index, parent);

    if (node->child != NONE)
        return;
    if (node->parent == NONE)
        node_free(index, parent);
    else
        unpark(index, node);
}
