/* Exports blocks of a tier as records that outlive the process, and fills a tier from them. */
#include "index_persist.h"

bool index_export(const struct block_index *index, unsigned t, int64_t id,
                  struct block_record *record)
{
    const struct place *place = place_at(&index->tier[t], id);
    const struct node *node, *parent;

    if (!place || place->state != PLACE_READY)
        return false;
    node = node_at(index, place->node);
    parent = node_at(index, node->parent);
    *record = (struct block_record){node->key, parent->key,
                                    group_of(index, place->node) << 8 |
                                        (parent->parent == NONE ? RECORD_FIRST : 0)};
    return true;
}

/* Add the node of a record. Its bucket depends on its position, and on the key of the first block
 * of its page; both follow from its parent's. */
static ref record_add(struct block_index *index, const struct restored *restored, size_t i,
                      ref *nodes, uint32_t *positions, size_t *page_first)
{
    int64_t above = restored->parents[i];
    struct key key = restored->records[i].key;
    unsigned group = record_group(&restored->records[i]);
    uint32_t bucket;
    ref parent, known;

    if (group)
        return leaf_take(index, nodes[above], group, NONE);
    if (above < 0) {
        struct key root = restored->records[i].parent;

        positions[i] = 0;
        page_first[i] = i;
        parent = root_find(index, root);
        if (parent == NONE)
            parent = node_add(index, root, bucket_of_root(index, root), NONE);
    } else {
        positions[i] = positions[above] + 1;
        page_first[i] = positions[i] % PAGE ? page_first[above] : i;
        parent = nodes[above];
    }
    bucket = bucket_in_page(index, restored->records[page_first[i]].key, positions[i]);
    known = node_find(index, key, bucket);
    return known == NONE ? node_add(index, key, bucket, parent) : known;
}

static void place_set(struct block_index *index, unsigned t, ref id, ref node)
{
    struct tier *tier = &index->tier[t];
    struct node *at = node_at(index, node);

    tier->places[id] = (struct place){
        .node = node, .state = PLACE_READY, .list = LIST_NONE,
        .quota = (uint8_t)quota_of(index, node_at(index, at->root)->key)};
    at->place[t] = id;
    node_at(index, at->root)->place[t]++;
    tier->free--;
    ready_count(index, tier, node, 1);
    changes_note(index, node, t, true);
}

void index_restore(struct block_index *index, unsigned t, const struct restored *restored,
                   ref *nodes, uint32_t *positions, size_t *page_first)
{
    struct tier *tier = &index->tier[t];

    for (ref id = 0; id < tier->capacity; id++)
        tier->places[id] = (struct place){.node = NONE, .list = LIST_NONE};
    tier->unused = tier->capacity;
    for (size_t i = 0; i < restored->n; i++) {
        nodes[i] = record_add(index, restored, i, nodes, positions, page_first);
        if (node_at(index, nodes[i])->place[t] == NONE) /* else the records have the block twice */
            place_set(index, t, (ref)restored->ids[i], nodes[i]);
    }
    /* Deepest first, so that a leaf is older than its parents in the policy's list. */
    for (size_t i = restored->n; i-- > 0;)
        if (tier->places[restored->ids[i]].state == PLACE_READY)
            policy_insert(tier, (ref)restored->ids[i], index->clock_s);
    for (ref id = tier->capacity; id-- > 0;)
        if (tier->places[id].state == PLACE_FREE) {
            tier->places[id].older = tier->free_places;
            tier->free_places = id;
        }
}
