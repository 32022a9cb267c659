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
    ready_count(index, t, number, -1);
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

/* Return the node of the block at a position, after adding it under its parent if it is new; NONE
 * if the parent is nowhere. `last` is the node of the previous position if known, and `fresh` is
 * whether that was added just now: then no later block of the prompt has a node to look up. */
static ref node_take(struct block_index *index, const unsigned char *keys, int64_t position,
                     ref last, bool *fresh)
{
    struct key key = key_at(keys, position), above = key_at(keys, position - 1);
    uint32_t bucket = bucket_at(index, keys, position);
    bool follows = node_has(index, last, above);
    ref number = follows && *fresh ? NONE : node_find(index, key, bucket), parent = last;

    *fresh = number == NONE;
    if (!*fresh)
        return number;
    if (!follows)
        parent = node_find(index, above, position ? bucket_at(index, keys, position - 1)
                                                  : bucket_of_root(index, above));
    if (parent == NONE) {
        if (position)
            return NONE;
        parent = node_add(index, above, bucket_of_root(index, above), NONE, 0);
    }
    return node_add(index, key, bucket, parent, 0);
}

/* The nodes that were taken last for a batch; any number if none was. */
struct taken {
    ref chain, leaf;
    bool fresh;                  /* the chain's was added just now */
};

/* Return the node of a leaf, after adding it to the chain's block at the position if it is new;
 * NONE if that block is nowhere. */
static ref leaf_take(struct block_index *index, const struct batch *batch, size_t i,
                     struct taken *taken)
{
    int64_t apart = i ? batch->positions[i] - batch->positions[i - 1] : 0;
    ref found;

    taken->chain = node_seek(index, batch->keys, batch->positions[i], taken->chain + (ref)apart);
    if (taken->chain == NONE)
        return NONE;
    found = leaf_find(index, taken->chain, batch->group, taken->leaf + 1);
    taken->leaf = found != NONE ? found : leaf_add(index, taken->chain, batch->group);
    return taken->leaf;
}

/* Return the node of the i-th block of a batch, which may be new; NONE if its parent is nowhere. */
static ref block_take(struct block_index *index, const struct batch *batch, size_t i,
                      struct taken *taken)
{
    if (batch->group)
        return leaf_take(index, batch, i, taken);
    taken->chain = node_take(index, batch->keys, batch->positions[i], taken->chain, &taken->fresh);
    return taken->chain;
}

/* Return whether a block of a batch may be at its position: a leaf hangs on the last of the chain's
 * blocks that it covers. */
static bool position_fits(const struct block_index *index, const struct batch *batch, size_t i)
{
    return !batch->group ||
           (uint64_t)(batch->positions[i] + 1) % index->rule[batch->group].ratio == 0;
}

/* Return for how many blocks there is room, in the tier and in the quota. */
static size_t room_of(const struct block_index *index, unsigned t, unsigned quota)
{
    int64_t left = quota_left(index, t, quota), free = index->tier[t].free;

    return left < 0 ? 0 : (size_t)(left < free ? left : free);
}

/* Make room for `wanted` blocks; where the quota is used up, evict its own blocks first. `least` is
 * the least number of blocks of an eviction. Return for how many blocks there is room. */
static size_t room_grow(struct block_index *index, unsigned t, unsigned quota, size_t wanted,
                      size_t least)
{
    const struct tier *tier = &index->tier[t];
    int64_t left = quota_left(index, t, quota);

    if ((int64_t)wanted > left) {
        index_evict(index, t, quota, 0, (size_t)((int64_t)wanted - left));
        left = quota_left(index, t, quota);
        if ((int64_t)wanted > left)
            wanted = left > 0 ? (size_t)left : 0;
    }
    if (wanted > tier->free) {
        size_t lacking = wanted - tier->free;

        index_evict(index, t, ANY_QUOTA, 0, lacking > least ? lacking : least);
    }
    return room_of(index, t, quota);
}

/* Make room for one block after the other, as long as a victim is worth less than the block. */
static void room_if_worthy(struct block_index *index, unsigned t, unsigned quota,
                           const struct batch *batch, const int64_t *uses)
{
    struct density *density = index->tier[t].density;
    float bound = density->bound;
    bool grows = true;

    for (size_t i = room_of(index, t, quota), end = i; grows && i < batch->n; i = end) {
        density->bound = density_of_new(density, (uint32_t)uses[i], is_last(batch, i));
        while (end < batch->n && uses[end] == uses[i] && is_last(batch, end) == is_last(batch, i))
            end++;
        grows = room_grow(index, t, quota, end, 0) >= end;
    }
    density->bound = bound;
}

static void room_for_all(struct block_index *index, unsigned t, unsigned quota, size_t n)
{
    const struct tier *tier = &index->tier[t];
    int64_t left = quota_left(index, t, quota);
    size_t own = (int64_t)n > left ? (size_t)((int64_t)n - left) : 0;
    size_t lacking = n > tier->free ? n - tier->free : 0;
    size_t needed = own > lacking ? own : lacking;

    index_evict_all(index, t, quota, own, needed,
                    lacking > own && needed < tier->evict_blocks ? tier->evict_blocks : needed);
}

size_t room_make(struct block_index *index, unsigned t, unsigned quota, const struct batch *batch,
                 enum reserve_how how, const int64_t *uses)
{
    size_t room = room_of(index, t, quota);

    if (batch->n <= room)
        return batch->n;
    if (how == RESERVE_ALL)
        room_for_all(index, t, quota, batch->n);
    else if (how == RESERVE_WORTHY && index->tier[t].density)
        room_if_worthy(index, t, quota, batch, uses);
    else
        room_grow(index, t, quota, batch->n, index->tier[t].evict_blocks);
    room = room_of(index, t, quota);
    if (batch->n <= room)
        return batch->n;
    return how == RESERVE_ALL ? 0 : room;
}

/* Refuse a batch that breaks a law, and free the first `taken` places, which it took already. */
static int64_t refuse(struct block_index *index, unsigned t, const int64_t *ids, size_t taken,
                      const char *law)
{
    index_abort(index, t, ids, taken);
    index->broken = law;
    return -1;
}

/* Under LHD, `ids` holds each block's uses until the block has its place. */
int64_t index_reserve(struct block_index *index, unsigned t, const struct batch *batch,
                      enum reserve_how how, int64_t *ids)
{
    struct density *density = index->tier[t].density;
    const int64_t *positions = batch->positions;
    unsigned quota = index->quotas ? quota_of(index, key_at(batch->keys, -1)) : 0;
    struct taken taken = {NONE, NONE, false};
    size_t n;

    if (density)
        density_foresee(density, batch, ids);
    n = room_make(index, t, quota, batch, how, ids);
    for (size_t i = 0; i < n; i++) {
        ref last;

        if (i + EXPECT_AHEAD < n)
            bucket_expect(index, batch->keys, positions[i + EXPECT_AHEAD]);
        if (!position_fits(index, batch, i))
            return refuse(index, t, ids, i, "reserve of a leaf where none can end");
        last = block_take(index, batch, i, &taken);
        if (last == NONE)
            return refuse(index, t, ids, i, "reserve of a block whose parent is not in the index");
        if (node_at(index, last)->place[t] != NONE)
            return refuse(index, t, ids, i, "reserve of a block that has a place already");
        ids[i] = place_reserve(index, t, last, quota, density ? (uint32_t)ids[i] : 0,
                               is_last(batch, i));
    }
    return (int64_t)n;
}

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
        ready_count(index, t, place->node, 1);
        place->state = PLACE_READY;
        policy_insert(tier, (ref)ids[n], index->clock_s);
        unpark(index, node_at(index, place->node));
    }
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

static void node_use(struct block_index *index, ref number)
{
    const struct node *node;

    if (number == NONE)
        return;
    node = node_at(index, number);
    for (unsigned t = 0; t < index->tiers; t++) {
        ref id = node->place[t];

        if (id != NONE && index->tier[t].places[id].state == PLACE_READY &&
            !index->tier[t].density)
            policy_use(&index->tier[t], id, index->clock_s);
    }
}

/* Leaves before their chain's block, so that they are older. */
void index_use(struct block_index *index, const ref *nodes, size_t n, const struct reach *reach)
{
    while (n--) {
        for (unsigned group = 1; reach && group < index->groups; group++)
            node_use(index, reach_leaf(index, reach, group, n));
        node_use(index, nodes[n]);
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
