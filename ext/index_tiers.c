/* The states of places, and the laws between tiers.
 *
 *     FREE --reserve--> RESERVED --commit--> READY --evict, forget--> FREE
 *       ^                  | abort             | forget while pinned
 *       |                  v                   v
 *       +--last unpin-- DRAINING <-------------+
 *
 * A node lives while some tier has a place for it. If a last copy is aborted or forgotten, the
 * blocks that continue it are dropped, too, so that every block has a parent.
 */
#include "index_core.h"
#include "index_density.h"

/* Free a place, unless it is pinned: then it is DRAINING. */
static void place_leave(struct tier *tier, ref id)
{
    if (tier->places[id].pins) {
        tier->places[id].state = PLACE_DRAINING;
        tier->draining++;
    } else {
        place_free(tier, id);
    }
}

/* Take a place from its node. A pinned READY place drains; a RESERVED one waits for its filler. */
static void place_detach(struct block_index *index, unsigned t, ref id)
{
    struct tier *tier = &index->tier[t];
    struct place *place = &tier->places[id];
    ref number = place->node;
    struct node *node = node_at(index, number);

    node->place[t] = NONE;
    node_at(index, node->root)->place[t]--;
    place->node = NONE;
    if (place->state != PLACE_READY)
        return;
    changes_note(index, number, t, false);
    policy_remove(tier, id);
    ready_count(index, tier, number, -1);
    place_leave(tier, id);
}

/* Remove a node that has no child, with its places. */
static void node_remove(struct block_index *index, ref number)
{
    struct node *node = node_at(index, number);
    ref parent = node->parent;

    for (unsigned t = 0; t < index->tiers; t++)
        if (node->place[t] != NONE)
            place_detach(index, t, node->place[t]);
    node_leave(index, number);
    node_free(index, number);
    parent_lost_child(index, parent);
}

/* Remove a node and all nodes that continue it. */
static void family_remove(struct block_index *index, ref top)
{
    ref at = top;

    for (;;) {
        ref parent;

        while (node_at(index, at)->child != NONE)
            at = node_at(index, at)->child;
        parent = node_at(index, at)->parent;
        node_remove(index, at);
        if (at == top)
            return;
        at = parent;
    }
}

/* Take a place from its node; if it was the last, remove the node and those that continue it. */
static void place_drop(struct block_index *index, unsigned t, ref id)
{
    ref number = index->tier[t].places[id].node;

    place_detach(index, t, id);
    if (!has_place(index, node_at(index, number)))
        family_remove(index, number);
}

/* -- filling ----------------------------------------------------------------------------------- */

static struct place *expect(struct block_index *index, unsigned t, int64_t id,
                            enum place_state state, const char *law)
{
    struct place *place = place_at(&index->tier[t], id);

    if (place && place->state == state)
        return place;
    index->broken = law;
    return NULL;
}

bool index_lease(struct block_index *index, unsigned t, const int64_t *ids, size_t n,
                 int64_t op_id)
{
    for (size_t i = 0; i < n; i++) {
        struct place *place = expect(index, t, ids[i], PLACE_RESERVED,
                                     "a lease of a place that is not RESERVED");

        if (!place)
            return false;
        place->older = (ref)op_id;
        place->newer = (ref)((uint64_t)op_id >> 32);
    }
    return true;
}

int64_t place_filler(const struct place *place)
{
    return (int64_t)((uint64_t)place->newer << 32 | place->older);
}

/* Leaves first, so that a leaf is always older than its parents; changes are noted in order. */
bool index_commit(struct block_index *index, unsigned t, const int64_t *ids, size_t n)
{
    struct tier *tier = &index->tier[t];
    size_t count = n;

    while (n--) {
        struct place *place = expect(index, t, ids[n], PLACE_RESERVED,
                                     "a commit of a place that is not RESERVED");

        if (!place)
            return false;
        tier->reserved--;
        if (place->node == NONE) {
            place_leave(tier, (ref)ids[n]); /* its block was dropped meanwhile */
            continue;
        }
        ready_count(index, tier, place->node, 1);
        place->state = PLACE_READY;
        policy_insert(tier, (ref)ids[n], index->clock_s);
        if (t && is_spent(index, place->node)) /* a leaf enters the first tier because it is used */
            policy_spend(tier, (ref)ids[n]);
        unpark(index, node_at(index, place->node));
    }
    if (count && tier->places[ids[count - 1]].state == PLACE_READY &&
        is_leaf(index, tier->places[ids[count - 1]].node))
        leaves_spend(index, tier->places[ids[count - 1]].node);
    for (size_t i = 0; i < count && index->changes.limit; i++)
        if (tier->places[ids[i]].state == PLACE_READY)
            changes_note(index, tier->places[ids[i]].node, t, true);
    return true;
}

bool index_abort(struct block_index *index, unsigned t, const int64_t *ids, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        struct place *place = expect(index, t, ids[i], PLACE_RESERVED,
                                     "an abort of a place that is not RESERVED");

        if (!place)
            return false;
        if (place->node != NONE)
            place_drop(index, t, (ref)ids[i]);
        index->tier[t].reserved--;
        place_leave(&index->tier[t], (ref)ids[i]);
    }
    return true;
}

/* -- holding ----------------------------------------------------------------------------------- */

bool index_pin(struct block_index *index, unsigned t, const int64_t *ids, size_t n)
{
    struct tier *tier = &index->tier[t];

    for (size_t i = 0; i < n; i++) {
        struct place *place = place_at(tier, ids[i]);

        if (!place || place->state == PLACE_FREE) {
            index->broken = "a pin of a FREE block";
            return false;
        }
        tier->pinned += !place->pins++;
    }
    return true;
}

bool index_unpin(struct block_index *index, unsigned t, const int64_t *ids, size_t n)
{
    struct tier *tier = &index->tier[t];

    while (n--) {
        struct place *place = place_at(tier, ids[n]);

        if (!place || !place->pins) {
            index->broken = "an unpin of a place that is not pinned";
            return false;
        }
        if (--place->pins)
            continue;
        tier->pinned--;
        if (place->state == PLACE_DRAINING)
            place_free(tier, (ref)ids[n]);
        else if (place->list == LIST_PARKED)
            policy_unpark(tier, (ref)ids[n], index->clock_s);
    }
    return true;
}

size_t index_spend(struct block_index *index, unsigned t, const int64_t *ids,
                   const unsigned char *keys, size_t n)
{
    struct tier *tier = &index->tier[t];
    size_t spent = 0;

    for (size_t i = 0; i < n; i++) {
        const struct place *place = place_at(tier, ids[i]);

        if (!place || place->state != PLACE_READY ||
            !node_has(index, place->node, key_at(keys, (int64_t)i - 1)))
            continue;
        policy_spend(tier, (ref)ids[i]);
        spent++;
    }
    return spent;
}

void index_use(struct block_index *index, const ref *nodes, size_t n, bool asked)
{
    while (n--) {
        const struct node *node;

        if (nodes[n] == NONE)
            continue;
        node = node_at(index, nodes[n]);
        for (unsigned t = 0; t < index->tiers; t++) {
            ref id = node->place[t];
            const struct place *place = id == NONE ? NULL : &index->tier[t].places[id];

            if (place && place->state == PLACE_READY && (asked || !place->spent) &&
                !index->tier[t].density)
                policy_use(&index->tier[t], id, index->clock_s);
        }
    }
}

/* -- dropping ---------------------------------------------------------------------------------- */

bool index_forget(struct block_index *index, unsigned t, const int64_t *ids, size_t n)
{
    struct tier *tier = &index->tier[t];

    for (size_t i = 0; i < n; i++) {
        if (ids[i] < 0 || ids[i] >= tier->unused) {
            index->broken = "forget of a place that holds no block";
            return false;
        }
        if (tier->places[ids[i]].state != PLACE_FREE && tier->places[ids[i]].node != NONE)
            place_drop(index, t, (ref)ids[i]);
    }
    return true;
}

void index_clear(struct block_index *index, unsigned t)
{
    struct tier *tier = &index->tier[t];

    for (ref id = 0; id < tier->unused; id++)
        if (tier->places[id].state != PLACE_FREE && tier->places[id].node != NONE)
            place_drop(index, t, id);
}

/* The root is freed with its last child. */
void index_clear_root(struct block_index *index, ref root)
{
    ref child = node_at(index, root)->child;

    while (child != NONE) {
        ref after = node_at(index, child)->after;

        family_remove(index, child);
        child = after;
    }
}
